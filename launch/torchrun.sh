#!/bin/bash
# NPROC=8 launch/torchrun.sh CONFIG [key=value ...]
#
# One node: a rank for each GPU, or NPROC of them. On several nodes start it on each, with NNODES=4 and the same
# RDZV_ENDPOINT=HOST:PORT everywhere, HOST being one of them.

nodes=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    meet=${RDZV_ENDPOINT:?say where the nodes meet: HOST:PORT}
    nodes=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$meet" --rdzv-id="$meet")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${nodes[@]}" --nproc-per-node="${NPROC:-auto}" -m twa_scale run "$@"
