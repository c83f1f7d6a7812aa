#!/bin/bash
# The engine of one node is stopped under load for longer than every timeout. The other one goes on
# within the configured time. A Secondary that continues gets what it missed; a Primary that was
# replaced meanwhile finds a split brain, and nothing is thrown away before the operator says so.
# guests: 2
# disks: ram:48M
# kernels: 6.12
# timeout: 150
. ./lib.sh
. ./load.sh

readonly LOAD_MB=8
readonly EXTRA_KB=1024

NET="$QUICK ko-count 1;"
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

signal_engine() { type_ "kill -$1 $(pgrep -f 'ublk-target .*r0')"; }
lost() { must "the loss is noticed" wait_until 20 is_not Connected connection r0; }
detected() { grep -q 'Split-Brain detected' /run/drbd/r0.log; }
# mark BYTES-FROM: random data there, which is found again.
mark() {
	type_ "head -c ${EXTRA_KB}K /dev/urandom >/tmp/mark"
	type_ "dd if=/tmp/mark of=$DEV bs=64k seek=$(($1 * 16)) oflag=direct conv=notrunc,fsync status=none"
}
marked() { dd if="$DEV" bs=64k skip=$(($1 * 16)) count=$((EXTRA_KB / 64)) iflag=direct status=none | cmp - /tmp/mark; }

step "a pair in sync"
bring_up r0

step "the Secondary's engine is stopped under load"
[ "$VM_ID" = 2 ] || start_load r0 "$DEV" $LOAD_MB
meet loaded
if [ "$VM_ID" = 2 ]; then
	signal_engine STOP
	tell stopped yes
	changed=$(ask changed)
	step "it continues"
	signal_engine CONT
else
	ask stopped >/dev/null
	lost
	at=$(written r0)
	must "I/O goes on without the peer" wait_until 10 wrote_more_than r0 $((at + 1024))
	stop_load
	mark 32
	changed=$(out_of_sync r0)
	note "$changed KiB changed since then"
	check "what changed is counted, and nothing else" between $EXTRA_KB "$changed" $((EXTRA_KB + LOAD_MB * 1024))
	tell changed "$changed"
	must "the other one is seen again" wait_until 40 is Connected connection r0
fi
must "UpToDate on both sides" wait_until 40 in_sync r0
check "it is found in its role" is Secondary "$([ "$VM_ID" = 2 ] && echo role_of || echo peer_role)" r0
check "the resync announced what had changed" same "$(will_sync r0)" "$changed"
check "nothing is left out of sync" is 0 out_of_sync r0
meet continued

step "the Primary's engine is stopped under load, and the other node takes over"
if [ "$VM_ID" = 1 ]; then
	start_load r0 "$DEV" $LOAD_MB
	signal_engine STOP
	tell primary-stopped yes
	ask replaced >/dev/null
	step "it continues"
	signal_engine CONT
else
	ask primary-stopped >/dev/null
	lost
	type_ "drbdctl primary r0"
	mark 40
	tell replaced yes
fi
must "split brain is detected" wait_until 60 detected
must "the connection was dropped" wait_until 20 is_not Connected connection r0
type_ "drbdctl status r0"
check "own data is still good" is UpToDate disk_state r0
check "the role is as before" is Primary role_of r0
if [ "$VM_ID" = 1 ]; then
	check "the load goes on" kill -0 "$LOAD"
	kill -INT "$LOAD"
	wait "$LOAD"
	check "no write failed" same "$(fio_report /tmp/fio.json '.jobs[0].error')" 0
else
	check "what was written here is there" marked 40
fi
meet split

step "the changes of the one that was stopped are thrown away"
if [ "$VM_ID" = 1 ]; then
	type_ "drbdctl secondary r0"
	is StandAlone connection r0 || type_ "drbdctl disconnect r0"
	type_ "drbdctl connect --discard-my-data r0"
else
	is Connecting connection r0 || type_ "drbdctl connect r0"
fi
must "the nodes find each other" wait_until 30 is Connected connection r0
must "UpToDate on both sides" wait_until 40 in_sync r0
synced=$(will_sync r0)
note "resynced $synced KiB"
check "only what differed was copied" between $EXTRA_KB "$synced" $((EXTRA_KB + LOAD_MB * 1024))
if [ "$VM_ID" = 2 ]; then
	check "what was written here is there" marked 40
	type_ "drbdctl secondary r0"
fi
meet healed
identical stopped 0
type_ "drbdctl down r0"
check "no ublk device" no_ublk_left
finish
