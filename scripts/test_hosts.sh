#!/usr/bin/env bash
# Training over several hosts: network namespaces, each with an address of its own on a bridge, play the
# hosts; mpirun starts the ranks in them with `ip netns exec` where it would use ssh, and they talk TCP over
# the bridge and nothing else. Weights and state must be those of the same mesh as threads.
#
# Needs root (ip netns), iproute2, and what scripts/test_mpi.sh needs of OpenMPI. Skips, and says so, where
# namespaces are not allowed.
set -euo pipefail
cd "$(dirname "$0")/.."
hosts=${HOSTS:-3}
export MPICC=${MPICC:-mpicc.openmpi} OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
name=tri$$
net=10.213.$((RANDOM % 256))

. scripts/tiny_run.sh
tear_down() {
    for host in $(seq "$hosts"); do
        ip netns pids "$name-$host" 2> /dev/null | xargs -r kill -9 || true
        ip netns del "$name-$host" 2> /dev/null || true
    done
    ip netns del "$name-wire" 2> /dev/null || true
    rm -rf "$work"
}
trap tear_down EXIT
if ! ip netns add "$name-wire" 2> "$work/why"; then
    echo "skipped: no network namespaces here: $(cat "$work/why")"
    exit 0
fi

# The bridge stands in a namespace of its own, so nothing of it is ever seen outside.
ip -n "$name-wire" link add bridge type bridge
ip -n "$name-wire" link set bridge up
for host in $(seq "$hosts"); do
    ip netns add "$name-$host"
    ip link add "eth" netns "$name-$host" type veth peer name "port$host" netns "$name-wire"
    ip -n "$name-wire" link set "port$host" master bridge up
    ip -n "$name-$host" addr add "$net.$host/24" dev eth
    ip -n "$name-$host" link set eth up
    ip -n "$name-$host" link set lo up
done

# What mpirun calls instead of ssh: HOST COMMAND...
agent=$work/agent
cat > "$agent" <<END
#!/bin/sh
host=\${1##*.}; shift
exec ip netns exec "$name-\$host" unshare --uts sh -c 'hostname "$name-'"\$host"'"; exec sh -c "\$*"' sh "\$@"
END
chmod +x "$agent"

trilith=${TRILITH:-$(cargo build -p trilith --features mpi --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/trilith\)".*/\1/p' | tail -1)}
tiny_recipe
"$trilith" train "$recipe" "${mesh[@]}" --set "run.dir=$work/threads" --ranks 4

list=$(seq -s , -f "$net.%g:2" "$hosts")
over_tcp=(--mca plm_rsh_agent "$agent" --mca btl tcp,self --mca pml ob1
    --mca btl_tcp_if_include "$net.0/24" --mca oob_tcp_if_include "$net.0/24"
    --mca plm_rsh_no_tree_spawn 1 --bind-to none --map-by node --host "$list" -n 4)
on_first() { timeout 300 ip netns exec "$name-1" unshare --uts sh -c "hostname $name-1; exec \"\$@\"" sh "$@"; }
on_first mpirun.openmpi "${over_tcp[@]}" hostname | sort | uniq -c
received() { ip netns exec "$name-$1" cat /sys/class/net/eth/statistics/rx_bytes; }
before=$(received 2)
on_first mpirun.openmpi "${over_tcp[@]}" "$trilith" train "$recipe" "${mesh[@]}" --set "run.dir=$work/hosts"
echo "host 2 received $(($(received 2) - before)) bytes over its wire"
test $(($(received 2) - before)) -gt 1000000
same_state "$work/threads" "$work/hosts"
echo "training over $hosts hosts ends with the bits of threads"
