#!/bin/sh
# lease-gpu.sh COMMAND...: run a rollout server on GPUs of its own, since compose gives every replica the same ones.
#
#   GPUS         what there is to lease, one word a replica: "6 7", or "4,5 6,7" for two GPUs each
#   LEASES       directory that all replicas of this host share; default /retort/leases
#
# A lease is a lock on a file there. The kernel lets go of it when the process ends, however it ends.
set -eu
port=8000
for gpu in $GPUS; do
    exec 9>"${LEASES:-/retort/leases}/gpu-$gpu"
    if flock --nonblock 9; then
        export CUDA_VISIBLE_DEVICES="$gpu"
        # Replicas share the host's network, so each needs a port of its own. The health check reads it.
        export RETORT_ROLLOUT__PORT="$port"
        echo "$port" >"${TMPDIR:-/tmp}/port"
        # Same host, other container: NCCL would try shared memory and peer access, which end at a container's border.
        NCCL_HOSTID="$(cat /proc/sys/kernel/random/uuid)"
        export NCCL_HOSTID
        exec "$@" --name "rollout-$(uname -n)-gpu-$gpu"
    fi
    port=$((port + 1))
done
echo "every one of the GPUs $GPUS is leased by another replica; start fewer, or name more in GPUS" >&2
exit 3
