#!/usr/bin/env bash
# The collectives over real OpenMPI on 1 to 4 ranks. Needs libopenmpi-dev, openmpi-bin and libclang-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
export MPICC=${MPICC:-mpicc.openmpi} OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
test=$(cargo test -p dist --features mpi --test mpi --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*deps\/mpi-[^"]*\)".*/\1/p' | tail -1)
for ranks in 1 2 3 4; do
    timeout 120 "${MPIRUN:-mpirun.openmpi}" --oversubscribe -n "$ranks" "$test"
done
