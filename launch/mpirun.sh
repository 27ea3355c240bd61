#!/bin/bash
# NPROC=8 launch/mpirun.sh CONFIG [key=value ...]
#
# One node, or inside an allocation of a scheduler all of its nodes; elsewhere HOSTFILE=FILE lists them. NPROC counts the
# ranks of all nodes, PER_NODE those of each. For Open MPI.

nodes=()
if [ -n "$PER_NODE" ]; then nodes+=(--map-by "ppr:$PER_NODE:node"); fi
if [ -n "$HOSTFILE" ]; then nodes+=(--hostfile "$HOSTFILE"); fi
# Bound to one core each, the threads of a rank would share it; unbound, all ranks would use all cores.
exec mpirun -n "${NPROC:-1}" "${nodes[@]}" --bind-to none -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    "${PYTHON:-python}" -m twa_scale run "$@"
