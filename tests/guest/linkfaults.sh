#!/bin/bash
# The link loses one direction, stalls, and has its connections reset, each under load and healed:
# no write waits longer than configured, only what changed travels, the disks are identical.
# guests: 2
# disks: ram:32M
# kernels: 6.12
# timeout: 150
. ./lib.sh
. ./load.sh

readonly LOAD_MB=8

NET="$QUICK ko-count 1;"
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

# lose HOOK: packets of the replication in this direction vanish at this node.
lose() {
	type_ "nft -f - <<-END
		table inet lost {
			chain here { type filter hook $1 priority 0; tcp dport $PORT drop; tcp sport $PORT drop; }
		}
	END"
}
heal() { type_ "nft delete table inet lost"; }
# Ends every connection of the replication with a reset.
reset_link() {
	type_ "ss -Htn -K state established '( sport = :$PORT or dport = :$PORT )'"
	check "connections were reset" grep -q ":$PORT" <<<"$OUTPUT"
}
lost() { must "the loss is noticed" wait_until 20 is_not Connected connection r0; }
greetings() { grep -c 'Handshake to peer .* successful' /run/drbd/r0.log; }
greeted_after() { [ "$(greetings)" -gt "$1" ]; }
# fault KEY WHAT NODE BEGIN END: what NODE does to the link under load, and undoes.
fault() {
	local key=$1 node=$3 at changed before
	step "$2"
	[ "$VM_ID" = 2 ] || start_load r0 "$DEV" $LOAD_MB
	meet "loaded-$key"
	[ "$VM_ID" != "$node" ] || $4
	lost
	if [ "$VM_ID" = 1 ]; then
		at=$(written r0)
		must "I/O goes on without the peer" wait_until 10 wrote_more_than r0 $((at + 512))
		stop_load
		changed=$(out_of_sync r0)
		note "$changed KiB changed since then"
		tell "changed-$key" "$changed"
	else
		changed=$(ask "changed-$key")
	fi
	before=$(received r0)
	meet "healing-$key"
	[ "$VM_ID" != "$node" ] || $5
	must "the nodes find each other again" wait_until 40 is Connected connection r0
	must "UpToDate on both sides" wait_until 40 in_sync r0
	check "the resync announced what had changed" same "$(will_sync r0)" "$changed"
	[ "$VM_ID" = 1 ] || check "only that travelled" same $(($(received r0) - before)) "$changed"
	check "nothing is left out of sync" is 0 out_of_sync r0
	meet "healed-$key"
}

step "a pair in sync"
bring_up r0

lose_to_peer() { lose output; }
lose_from_peer() { lose input; }
stall() { type_ "tc qdisc add dev net0 root netem delay 30s"; }
flow() { type_ "tc qdisc del dev net0 root"; }
fault mute "the Primary is not heard" 1 lose_to_peer heal
fault deaf "the Secondary is not heard" 1 lose_from_peer heal
fault stall "the link stalls" 2 stall flow

step "the connections are reset, again and again"
[ "$VM_ID" = 2 ] || start_load r0 "$DEV" $LOAD_MB
for round in 1 2 3; do
	count=$(greetings)
	meet "reset-$round"
	[ "$VM_ID" != $((round % 2 + 1)) ] || reset_link
	must "the nodes find each other again" wait_until 40 greeted_after "$count"
	must "UpToDate on both sides" wait_until 40 in_sync r0
done
[ "$VM_ID" = 2 ] || stop_load
meet quiet
check "nothing is left out of sync" is 0 out_of_sync r0
[ "$VM_ID" = 2 ] || type_ "drbdctl secondary r0"
meet demoted
identical linkfaults 0
type_ "drbdctl down r0"
finish
