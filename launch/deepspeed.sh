#!/bin/bash
# NPROC=8 launch/deepspeed.sh CONFIG [key=value ...]
#
# One node: a rank for each GPU, or NPROC of them. Several nodes, over ssh: HOSTFILE=FILE with a line `HOST slots=8` for
# each, NNODES=4 of which are used.

python=${PYTHON:-python}
nodes=()
if [ "${NNODES:-1}" -gt 1 ]; then
    nodes=(--hostfile="${HOSTFILE:?name the file that lists the hosts}" --num_nodes="$NNODES")
fi
# DeepSpeed's own default is one port for all jobs of a host.
port=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
exec "$python" -m deepspeed.launcher.runner "${nodes[@]}" ${NPROC:+--num_gpus="$NPROC"} --master_port="$port" \
    --no_local_rank --module twa_scale run "$@"
