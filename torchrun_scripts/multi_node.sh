#!/bin/sh
# Several machines, one rank each, meeting at a c10d rendezvous. Start it on every machine, with the same values:
#   RENDEZVOUS=10.0.0.1:29500 INTERFACE=wg0 NUM_NODES=4 sh torchrun_scripts/multi_node.sh --compressor nf4
# RENDEZVOUS is an address of one of the machines, INTERFACE the network interface that carries the links. torchrun
# decides which machine is rank 0; record and journal are written there. Neither the rendezvous nor the links are
# authenticated or encrypted: use a private network (see README, Security).
set -eu
cd "$(dirname "$0")/.."
: "${RENDEZVOUS:?set it to HOST:PORT of one of the machines}"
: "${INTERFACE:?set it to the network interface of the private network}"
export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
exec torchrun --nnodes="${NUM_NODES:-4}" --nproc_per_node=1 \
    --rdzv_backend=c10d --rdzv_endpoint="$RENDEZVOUS" --rdzv_id="${RUN_ID:-thinwire}" \
    run_pipeline.py --config "${CONFIG:-qwen3_32b.yaml}" --set runtime.interface="$INTERFACE" \
    --set partition.num_nodes="${NUM_NODES:-4}" "$@"
