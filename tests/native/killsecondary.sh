#!/bin/bash
# The Secondary's engine is killed under load, and then it freezes: the Primary goes on after no
# longer than configured, the Secondary comes back and gets what was written meanwhile, while the
# load goes on.
. "$(dirname "$0")/lib.sh"

readonly LOAD_MB=32
# A ping that follows ping-int of silence has to be answered within ping-timeout; and what the
# processor may add.
readonly STALL_MS=1500 SLACK_MS=700
NET="timeout 9; ping-int 1; ping-timeout 5; connect-int 1;"
lab_setup 1 < <(resource r0 $PORT 0)
ALICE=$(uri alice)
step "a pair in sync"
bring_up r0

step "the Secondary's engine is killed under load"
start_load alice "$ALICE" "$LAB/load.json" --size=${LOAD_MB}M --rw=randwrite --bs=4k --iodepth=16 --fsync=64
type_ "kill -9 $(engine_pid bob)"
must "alice notices" wait_until 10 on alice is_not Connected connection r0
at=$(written alice)
must "I/O goes on without the peer" wait_until 10 wrote_more_than alice $((at + 4096))

# comes_back HOW: bob's engine is there again, the load goes on and ends well.
comes_back() {
	step "it comes back while the load goes on"
	at=$(written alice)
	eval "$1"
	must "it finds the other one" wait_until 15 on bob is Connected connection r0
	on bob type_ "drbdctl wait-sync r0"
	both_in_sync r0
	must "the load still runs" wait_until 5 wrote_more_than alice $((at + 4096))
	stop_load
	check "no write failed" same "$(fio_report "$LAB/load.json" '.jobs[0].error')" 0
	stall=$(fio_report "$LAB/load.json" '[.jobs[0].write | .clat_ns.max, .lat_ns.max] | max / 1000000 | floor')
	note "longest write $stall ms, configured $STALL_MS ms"
	check "no write waited longer than configured" between 0 "$stall" $((STALL_MS + SLACK_MS))
	synced=$(announced bob)
	note "resynced $synced KiB"
	check "only what was written was resynced" between 1 "$synced" $((LOAD_MB * 1024))
	check "nothing is left out of sync" on alice is 0 out_of_sync r0
}

comes_back 'on bob type_ "drbdctl up r0"'

step "the Secondary's engine freezes under load"
start_load alice "$ALICE" "$LAB/load.json" --size=${LOAD_MB}M --rw=randwrite --bs=4k --iodepth=16 --fsync=64
type_ "kill -STOP $(engine_pid bob)"
must "alice notices" wait_until 10 on alice is_not Connected connection r0
at=$(written alice)
must "I/O goes on without the peer" wait_until 10 wrote_more_than alice $((at + 4096))
comes_back 'type_ "kill -CONT $(engine_pid bob)"'

on alice type_ "drbdctl secondary r0"
identical "killed Secondary"
for node in alice bob; do
	on $node type_ "drbdctl down r0"
done
finish
