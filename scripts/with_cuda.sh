#!/usr/bin/env bash
# Runs a command with the libraries of CUDA that the kernels need (NVRTC, cuBLASLt), and NCCL, on its path: those of
# a toolkit, or of the Python packages nvidia-cuda-nvrtc, nvidia-cublas and nvidia-nccl-cu12 or -cu13.
#   scripts/with_cuda.sh trilith doctor
set -euo pipefail
folders=()
for folder in "${CUDA_HOME:-/usr/local/cuda}/lib64" "${CUDA_HOME:-/usr/local/cuda}/targets/x86_64-linux/lib"; do
    if [ -d "$folder" ]; then folders+=("$folder"); fi
done
if command -v python3 > /dev/null; then
    while read -r folder; do folders+=("$folder"); done < <(python3 - << 'PY'
import glob, sysconfig, os
for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
    for library in ("libnvrtc.so*", "libcublasLt.so*", "libnccl.so*"):
        for found in glob.glob(os.path.join(site, "nvidia", "*", "lib", library)):
            print(os.path.dirname(found))
PY
    )
fi
path=$(printf '%s\n' "${folders[@]}" | awk 'NF && !seen[$0]++' | paste -sd: -)
export LD_LIBRARY_PATH="$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$@"
