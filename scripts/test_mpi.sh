#!/usr/bin/env bash
# The collectives, and real training, over MPI on one machine: the collectives on 1 to 4 ranks, then
# `mpirun -n 4 trilith train` against the same mesh as threads, by the hash of weights and state.
#
# Needs OpenMPI: libopenmpi-dev, openmpi-bin, clang and libclang-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
export MPICC=${MPICC:-mpicc.openmpi} OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun=${MPIRUN:-mpirun.openmpi}
many=(--oversubscribe --bind-to none)

test=$(cargo test -p dist --features mpi --test mpi --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*deps\/mpi-[^"]*\)".*/\1/p' | tail -1)
for ranks in 1 2 3 4; do
    timeout 120 "$mpirun" "${many[@]}" -n "$ranks" "$test"
done

trilith=$(cargo build -p trilith --features mpi --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/trilith\)".*/\1/p' | tail -1)
. scripts/tiny_run.sh
tiny_recipe
"$trilith" train "$recipe" "${mesh[@]}" --set "run.dir=$work/threads" --ranks 4
timeout 300 "$mpirun" "${many[@]}" -n 4 "$trilith" train "$recipe" "${mesh[@]}" --set "run.dir=$work/mpi"
same_state "$work/threads" "$work/mpi"

# A rank that stops is named by one message, in time, and the run goes on from what was saved.
log=$work/stopped.log
timeout 300 "$mpirun" "${many[@]}" -n 4 "$trilith" train "$recipe" "${mesh[@]}" --set mesh.deadline=10 \
    --set "run.dir=$work/stopped" 2> "$log" &
launcher=$!
until [ -s "$work/stopped/metrics.jsonl" ]; do
    kill -0 "$launcher"
    sleep 0.05
done
for pid in $(pgrep -f "run.dir=$work/stopped"); do
    if tr '\0' '\n' < "/proc/$pid/environ" | grep -qx 'OMPI_COMM_WORLD_RANK=2'; then kill -STOP "$pid"; fi
done
if wait "$launcher"; then echo "the run ended well although a rank was stopped" >&2; exit 1; fi
cat "$log"
grep -c '^error: ' "$log" | grep -qx 1
grep -q '^error: rank 2 is dead: its process does not answer.* step ' "$log"
timeout 300 "$mpirun" "${many[@]}" -n 4 "$trilith" train "$recipe" "${mesh[@]}" --set "run.dir=$work/stopped" --resume
same_state "$work/threads" "$work/stopped"

# SIGUSR1, which the launcher passes on, saves and ends with 75.
"$mpirun" "${many[@]}" -n 4 "$trilith" train "$recipe" "${mesh[@]}" --set "run.dir=$work/told" &
launcher=$!
until [ -s "$work/told/metrics.jsonl" ]; do
    kill -0 "$launcher"
    sleep 0.05
done
kill -USR1 "$launcher"
if wait "$launcher"; then code=0; else code=$?; fi
test "$code" = 75
timeout 300 "$mpirun" "${many[@]}" -n 4 "$trilith" train "$recipe" "${mesh[@]}" --set "run.dir=$work/told" --resume
same_state "$work/threads" "$work/told"

if pgrep -f "run.dir=$work"; then echo "processes are left" >&2; exit 1; fi
echo "training over MPI ends with the bits of threads"
