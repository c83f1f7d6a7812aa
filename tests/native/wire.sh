#!/bin/bash
# timeout: 240
# Everything that a wire and whoever sits at its other end can do: resets, half closes, trickles,
# stalls and flipped bits at any byte, strangers, mad peers. The engines survive it, no host request
# fails or hangs, no acknowledged write is lost, and afterwards the disks are equal.
# tests/README.md, "Faults on the wire", says what is asked for when.
#
#   tests/native/wire.sh [--seconds N] [--seed N] [--only KIND,KIND]
#
# The short form takes about a minute and a half; --seconds 3600 goes on for an hour.
readonly WIRE_USAGE='usage: tests/native/wire.sh [--seconds N] [--seed N] [--only KIND,KIND]'
while [ $# -gt 0 ]; do
	case $1 in
	--seconds) WIRE_SECONDS=${2:-} ;;
	--seed) WIRE_SEED=${2:-} ;;
	--only) WIRE_ONLY=${2:-} ;;
	*) set -- ;;
	esac
	shift 2 2>/dev/null || { echo "$WIRE_USAGE" >&2; exit 2; }
done
export WIRE_SECONDS=${WIRE_SECONDS:-0} WIRE_SEED=${WIRE_SEED:-1} WIRE_ONLY=${WIRE_ONLY:-}
export VM_TIMEOUT=${VM_TIMEOUT:-$((WIRE_SECONDS + 240))}
. "$(dirname "$0")/lib.sh"

# The cable between the nodes becomes two: each node has a neighbour that holds the peer's address.
part_nodes() {
	local node
	ip -n alice link del net0 || die "no cable to cut"
	for node in alice bob; do
		ip netns add "near-$node" || die "no neighbour for $node"
		ip link add net0 netns "$node" type veth peer name net0 netns "near-$node" || die "no veth"
	done
	ip -n alice addr add 10.0.0.1/24 dev net0
	ip -n near-alice addr add 10.0.0.2/24 dev net0
	ip -n bob addr add 10.0.0.2/24 dev net0
	ip -n near-bob addr add 10.0.0.1/24 dev net0
	for node in alice bob near-alice near-bob; do
		ip -n "$node" link set net0 up
	done
}

# All time limits as short as can be: a round has seconds.
SIZE_MB=32
NET="timeout 9; ping-int 1; ping-timeout 5; socket-check-timeout 1; connect-int 1;
	cram-hmac-alg sha256; shared-secret \"between us\";"
DISK="resync-rate 1G; c-plan-ahead 0; al-extents 67;"
lab_setup 1 < <(resource r0 $PORT 0)
part_nodes
[ -x "$NATIVE_BIN/disturb" ] || die "no disturb in $NATIVE_BIN: cargo build --release -p tests --bins"

step "seed $WIRE_SEED"
readonly DISTURB=("$NATIVE_BIN/disturb" --lab "$LAB" --seed "$WIRE_SEED" --seconds "$WIRE_SECONDS"
	${WIRE_ONLY:+--only "$WIRE_ONLY"})
check "both engines survive, no request fails, nothing is lost, the disks are equal" "${DISTURB[@]}"
for node in alice bob; do
	check "no engine of $node has ended by a panic" [ -z "$(grep -h 'panicked' "$(log_of $node)")" ]
done
finish
