#!/usr/bin/env bash
# One node's share of a run over several nodes. Start it once on every node, with the same arguments:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/multinode.sh --config configs/NAME.yaml    # on 10.0.0.1
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/multinode.sh --config configs/NAME.yaml    # on the other
#
# NNODES       number of nodes (1)
# NODE_RANK    this node, 0 to NNODES-1; node 0 owns MASTER_ADDR (0)
# MASTER_ADDR  address of node 0, reachable from every node (required when NNODES > 1)
# MASTER_PORT  a port free on node 0 (29500)
# NPROC        processes on this node: a number, gpu or cpu (the number of GPUs, or 1 where there is none)
# TORCHRUN     the torchrun to use (the one on PATH)
#
# The rendezvous is the static one: node ranks are as given here, so the placement of experts can be read off them.
# On a machine with several networks also set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.
set -euo pipefail

nnodes=${NNODES:-1}
if ((nnodes > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
    echo "MASTER_ADDR is not set with NNODES=$nnodes: set it to the address of node 0, the same on every node" >&2
    exit 2
fi
if [[ -z ${NPROC:-} ]]; then
    NPROC=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    ((NPROC > 0)) || NPROC=1
fi

exec "${TORCHRUN:-torchrun}" \
    --nnodes "$nnodes" \
    --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "$NPROC" \
    --rdzv-backend static \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${MASTER_PORT:-29500}" \
    -m mixdist train "$@"
