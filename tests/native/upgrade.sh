#!/bin/bash
# The engine is replaced by another program in mid-service, on the Primary and on the Secondary
# under load: the role stays, nothing is lost, and nothing is synced but what changed meanwhile.
. "$(dirname "$0")/lib.sh"

NET="timeout 20; ping-int 3; ping-timeout 10; connect-int 3;"
lab_setup 1 < <(resource r0 $PORT 0)
ALICE=$(uri alice) BOB=$(uri bob)
mkdir "$LAB/next" && cp "$NATIVE_BIN/ublk-target" "$LAB/next" || die "no second program"
readonly OLD=$NATIVE_BIN/ublk-target NEXT=$LAB/next/ublk-target

runs() { readlink "/proc/$(engine_pid "$1")/exe"; }
# replace NODE PROGRAM: with what everybody should find afterwards.
replace() {
	local node=$1 program=$2 role pid
	role=$(on "$node" role_of r0)
	pid=$(engine_pid "$node")
	on "$node" type_ "DRBD_ENGINE=$program drbdctl upgrade r0"
	check "the pause is told" grep -qE "r0: engine replaced \(pid $pid -> [0-9]+\); requests waited for [0-9.]+ s" <<<"$OUTPUT"
	check "NBD clients are told" grep -q "NBD clients have to connect again" <<<"$OUTPUT"
	check "the other program runs" is "$program" runs "$node"
	check "the old one is gone" [ ! -e "/proc/$pid" ]
	check "$node is $role as before" is "$role" role_of_node "$node"
	must "the nodes find each other again" wait_until 20 on "$node" is Connected connection r0
}
role_of_node() { on "$1" role_of r0; }
# How often recovery had to mark what the activity log covered.
marked() { grep -c 'based on AL' "$(log_of "$1")"; }

step "a pair in sync"
bring_up r0

step "the Primary's engine is replaced, there and back"
program=$NEXT
for round in 1 2 3; do
	on alice type_ "qemu-io -f raw -c 'write -P 0x$round$round ${round}0M 4M' '$ALICE'"
	before=$(received bob r0)
	replace alice "$program"
	both_in_sync r0
	check "next to nothing was synced" between 0 $(($(received bob r0) - before)) 64
	on alice type_ "qemu-io -f raw -c 'read -P 0x$round$round ${round}0M 4M' '$ALICE'"
	check "what was written is there" same "$(grep -c 'verification failed' <<<"$OUTPUT")" 0
	[ "$program" = "$NEXT" ] && program=$OLD || program=$NEXT
done
check "its activity log was empty each time" same "$(marked alice)" 0

step "the Secondary's engine is replaced under load"
start_load alice "$ALICE" "$LAB/load.json" --size=16M --rw=randwrite --bs=4k --iodepth=8 --fsync=64
for program in "$NEXT" "$OLD"; do
	replace bob "$program"
	check "the load goes on" kill -0 $LOAD
done
stop_load
both_in_sync r0
check "no write failed" same "$(fio_report "$LAB/load.json" '.jobs[0].error')" 0

step "a Primary that is alone keeps its marks"
on bob type_ "drbdctl down r0"
on alice type_ "qemu-io -f raw -c 'write -P 0x77 100M 1M' '$ALICE'"
pid=$(engine_pid alice)
on alice type_ "DRBD_ENGINE=$NEXT drbdctl upgrade r0"
check "it is Primary as before" is Primary role_of_node alice
on bob type_ "drbdctl up r0"
both_in_sync r0
check "bob gets what it has missed" between 1024 "$(received bob r0)" 2048

step "a program that is none does not get the chance"
pid=$(engine_pid alice)
on alice refused 20 'check' "DRBD_ENGINE=/bin/false drbdctl upgrade r0"
check "the old engine serves" is "$pid" engine_pid alice
on alice type_ "qemu-io -f raw -c 'read -P 0x77 100M 1M' '$ALICE'"
identical "replaced engines"

step "the other node can take over"
hand_over alice bob
on bob type_ "qemu-io -f raw -r -c 'read -P 0x77 100M 1M' '$BOB'"
check "with everything" same "$(grep -c 'verification failed' <<<"$OUTPUT")" 0
for node in alice bob; do
	pid=$(engine_pid "$node")
	on "$node" type_ "drbdctl down r0"
	nothing_left "$node" r0 $PORT "$pid"
done
finish
