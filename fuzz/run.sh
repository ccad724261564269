#!/usr/bin/env bash
# Fuzz every target, or those named: fuzz/run.sh SECONDS [TARGET...]
# Needs a C++ compiler for libFuzzer, and neither cargo-fuzz nor nightly: coverage comes from the
# compiler's own passes. Overflow and debug checks are on; there is no address sanitizer, since the
# parsers forbid unsafe code.
set -euo pipefail
seconds=${1:?usage: fuzz/run.sh SECONDS [TARGET...]}
shift
cd "$(dirname "$0")"
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(safetensors_header gguf manifest)

triple=$(rustc -vV | sed -n 's/^host: //p')
# With --target the flags reach neither build scripts nor procedural macros.
passes="-Cpasses=sancov-module -Ccodegen-units=1"
for option in -sanitizer-coverage-level=4 -sanitizer-coverage-inline-8bit-counters \
    -sanitizer-coverage-pc-table -sanitizer-coverage-trace-compares; do
    passes+=" -Cllvm-args=$option"
done
build=(cargo build --quiet --release --target "$triple")
target_dir=${CARGO_TARGET_DIR:-target}

# The seeds have a main of their own and no libFuzzer to take the counters: built apart.
seeds=target/seeds
cargo run --quiet --release --bin seeds -- "$seeds"
for target in "${targets[@]}"; do
    RUSTFLAGS="$passes" "${build[@]}" --bin "$target"
done
for target in "${targets[@]}"; do
    mkdir -p "target/corpus/$target" "artifacts/$target"
    echo "fuzzing $target for $seconds s"
    "$target_dir/$triple/release/$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 \
        -max_len=8192 -print_final_stats=1 -verbosity=0 -artifact_prefix="artifacts/$target/" \
        "target/corpus/$target" "$seeds/$target"
done
