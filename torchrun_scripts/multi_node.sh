#!/bin/sh
# Several machines, one rank each, meeting at a c10d rendezvous. Start it on every machine, with the same values:
#   RENDEZVOUS=10.0.0.1:29500 INTERFACE=wg0 NUM_NODES=4 sh torchrun_scripts/multi_node.sh --compressor nf4
# RENDEZVOUS is an address of one of the machines ([fd00::1]:29500 with IPv6), which is to start within a minute of the
# others; INTERFACE the network interface that carries the links, RANKS_PER_NODE the ranks on each machine (1),
# MAX_RESTARTS how often torchrun starts lost ranks again (0). torchrun decides which machine is rank 0; record and
# journal are written there. Neither the rendezvous nor the links are
# authenticated or encrypted: use a private network (docs/security.md).
set -eu
cd "$(dirname "$0")/.."
: "${RENDEZVOUS:?set it to HOST:PORT of one of the machines}"
: "${INTERFACE:?set it to the network interface of the private network}"
nodes=${NUM_NODES:-4}
ranks=${RANKS_PER_NODE:-1}

fail() {
    echo "error: $*" >&2
    exit 2
}

command -v ip >/dev/null || fail "no ip command, which tells the address of $INTERFACE; install iproute2"
ip link show dev "$INTERFACE" >/dev/null 2>&1 ||
    fail "INTERFACE=$INTERFACE is none of this machine's: $(ip -o link | awk -F '[:@ ]+' '{printf "%s ", $2}')"
addresses=$( (ip -o -4 addr show dev "$INTERFACE"; ip -o -6 addr show dev "$INTERFACE") |
    awk '!/ fe80:/ {sub("/.*", "", $4); print $4}')
[ -n "$addresses" ] || fail "INTERFACE=$INTERFACE has no address; is the network up?"
local_addr=$(echo "$addresses" | head -n 1)

host=${RENDEZVOUS%:*}
port=${RENDEZVOUS##*:}
case $RENDEZVOUS in
    *:*) ;;
    *) fail "RENDEZVOUS=$RENDEZVOUS has no port; write $RENDEZVOUS:29500" ;;
esac
case $port in
    '' | *[!0-9]*) fail "RENDEZVOUS=$RENDEZVOUS ends in no port; write HOST:29500, or [ADDRESS]:29500 with IPv6" ;;
esac
case $host in
    \[*\])
        host=${host#\[}
        host=${host%\]}
        ;;
    *:*) fail "RENDEZVOUS=$RENDEZVOUS: write an IPv6 address in brackets, [ADDRESS]:29500" ;;
esac

# torchrun knows neither a private address as this machine's nor a name that /etc/hosts maps to 127.0.1.1. Of several
# torchruns on one machine's loopback it finds the host itself.
is_host=
for found in "$host" $(getent ahosts "$host" 2>/dev/null | awk '{print $1}'); do
    case " $(uname -n) $addresses " in
        *[[:space:]]"$found"[[:space:]]*) is_host=is_host=true ;;
    esac
done
case $local_addr in 127.* | ::1) is_host= ;; esac

export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"  # no warning for each address without a name
echo "==> $local_addr on $INTERFACE ${is_host:+hosts the rendezvous and }waits for $nodes machines at $RENDEZVOUS"
exec torchrun --nnodes="$nodes" --nproc_per_node="$ranks" --local_addr="$local_addr" \
    --rdzv_backend=c10d --rdzv_endpoint="$RENDEZVOUS" --rdzv_id="${RUN_ID:-thinwire}" \
    --max_restarts="${MAX_RESTARTS:-0}" ${is_host:+--rdzv_conf "$is_host"} \
    run_pipeline.py --config "${CONFIG:-qwen3_32b.yaml}" --set runtime.interface="$INTERFACE" \
    --set partition.num_nodes="$((nodes * ranks))" "$@"
