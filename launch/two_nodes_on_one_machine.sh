#!/usr/bin/env bash
# A run over two nodes, on one Linux machine: two network namespaces joined by a veth pair, one torchrun in each.
# The nodes share files and processors but no loopback, so whatever works here crossed a network interface.
#
#   sudo env "PATH=$PATH" NPROC=1 launch/two_nodes_on_one_machine.sh --config configs/NAME.yaml
#
# NPROC is the number of processes on each node (1). Needs root and ip (iproute2). Both namespaces are removed at exit.
set -euo pipefail

if ((EUID != 0)); then
    echo "network namespaces need root, not uid $EUID: run  sudo env \"PATH=\$PATH\" $0 ..." >&2
    exit 2
fi
if ! command -v ip > /dev/null; then
    echo "ip is not on PATH: install iproute2" >&2
    exit 2
fi

multinode=$(dirname "${BASH_SOURCE[0]}")/multinode.sh
namespaces=("mixdist-$$-0" "mixdist-$$-1")
addresses=(10.83.0.1 10.83.0.2)
nodes=()

# shellcheck disable=SC2317 # called by the traps
clean_up() {
    trap - EXIT INT TERM
    # torchrun passes SIGTERM on to its workers; the namespaces can go once they have ended.
    ((${#nodes[@]} == 0)) || kill -TERM "${nodes[@]}" 2> /dev/null || true
    wait || true
    for namespace in "${namespaces[@]}"; do
        ip netns delete "$namespace" 2> /dev/null || true # and with it its end of the veth pair
    done
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for namespace in "${namespaces[@]}"; do
    if ! message=$(ip netns add "$namespace" 2>&1); then
        echo "this machine does not allow network namespaces ($message): run on a host, or in a privileged container" >&2
        exit 2
    fi
done
ip -netns "${namespaces[0]}" link add veth0 type veth peer name veth0 netns "${namespaces[1]}"
for node in 0 1; do
    ip -netns "${namespaces[node]}" address add "${addresses[node]}/24" dev veth0
    ip -netns "${namespaces[node]}" link set veth0 up
    ip -netns "${namespaces[node]}" link set lo up
done

for node in 0 1; do
    ip netns exec "${namespaces[node]}" env \
        NNODES=2 NODE_RANK="$node" NPROC="${NPROC:-1}" MASTER_ADDR="${addresses[0]}" \
        GLOO_SOCKET_IFNAME=veth0 NCCL_SOCKET_IFNAME=veth0 \
        bash "$multinode" "$@" &
    nodes+=("$!")
done

# Both are waited for: a node must notice by itself that the other has died.
status=0
for node in 0 1; do
    wait "${nodes[node]}" || status=$?
done
exit "$status"
