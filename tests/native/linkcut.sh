#!/bin/bash
# The replication link is cut under load, once by pulling the cable and once by a filter that drops
# every packet: I/O goes on after no longer than configured, and when the link heals only the
# blocks that changed meanwhile travel.
. "$(dirname "$0")/lib.sh"

# A ping that follows ping-int of silence has to be answered within ping-timeout; what is under way
# when the link dies waits for that.
readonly PING_INT_MS=1000 PING_TIMEOUT_MS=500
# What the processor may add: two engines, fio and others share it.
readonly SLACK_MS=700
readonly LOAD_MB=32
readonly EXTRA_KB=4096

NET="timeout 9; ping-int 1; ping-timeout 5; connect-int 1;"
lab_setup 1 < <(resource r0 $PORT 0)
ALICE=$(uri alice)
step "a pair in sync"
bring_up r0

# one_cut NAME CUT HEAL: commands that cut and heal.
one_cut() {
	local at stall errors changed before report=$LAB/$1.json
	step "load, and then: $2"
	start_load alice "$ALICE" "$report" --size=${LOAD_MB}M --rw=randwrite --bs=4k --iodepth=8
	type_ "$2"
	must "alice notices the loss" wait_until 10 on alice is_not Connected connection r0
	at=$(written alice)
	must "I/O goes on without the peer" wait_until 10 wrote_more_than alice $((at + 2048))
	must "bob notices the loss too" wait_until 10 on bob is_not Connected connection r0
	stop_load
	stall=$(fio_report "$report" '[.jobs[0].write | .clat_ns.max, .lat_ns.max] | max / 1000000 | floor')
	errors=$(fio_report "$report" '.jobs[0].error')
	note "longest write $stall ms, configured $((PING_INT_MS + PING_TIMEOUT_MS)) ms"
	check "no write failed" same "$errors" 0
	check "writes waited for the dead peer" between 200 "$stall" 60000
	check "no write waited longer than configured" \
		between 0 "$stall" $((PING_INT_MS + PING_TIMEOUT_MS + SLACK_MS))
	on alice type_ "qemu-io -f raw -c 'write -P 0xe1 128M ${EXTRA_KB}k' -c flush '$ALICE'"
	on alice type_ "drbdctl status r0"
	check "the peer's state is unknown" on alice is DUnknown peer_device r0 peer-disk-state
	changed=$(on alice out_of_sync r0)
	note "$changed KiB changed since the cut"
	check "what changed is counted, and nothing else" \
		between $((EXTRA_KB + 2048)) "$changed" $((EXTRA_KB + LOAD_MB * 1024))
	before=$(received bob r0)

	step "and then: $3"
	type_ "$3"
	must "the nodes find each other again" wait_until 15 on alice is Connected connection r0
	on alice type_ "drbdctl wait-sync r0"
	both_in_sync r0
	check "the resync announced what had changed" same "$(announced alice)" "$changed"
	check "only that travelled" same $(($(received bob r0) - before)) "$changed"
	check "nothing is left out of sync" on alice is 0 out_of_sync r0
	check "the whole volume is larger by far" [ $((changed * 4)) -lt $(($(exposed) / 1024)) ]
	identical "$1"
}

one_cut cable "cable down bob" "cable up bob"
one_cut near-cable "cable down alice" "cable up alice"
one_cut filter "blackhole on bob" "blackhole off bob"
for node in alice bob; do
	on $node type_ "drbdctl down r0"
done
finish
