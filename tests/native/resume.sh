#!/bin/bash
# A resync is interrupted by a cut link and by the death of either engine: it goes on by itself, does
# not forget what was saved when a link was lost, and ends with equal bytes. A half synchronised
# node is not promoted.
. "$(dirname "$0")/lib.sh"

NET="timeout 9; ping-int 1; ping-timeout 5; connect-int 1;"
SLOW="resync-rate 24M; c-plan-ahead 0;"
FAST="resync-rate 1G; c-plan-ahead 0;"
DISK=$SLOW
lab_setup 1 < <(resource r0 $PORT 0)
ALICE=$(uri alice)
type_ "head -c 256M /dev/urandom | dd of=$(image alice) bs=1M conv=notrunc iflag=fullblock status=none"

step "a slow first synchronisation"
for node in alice bob; do
	on $node type_ "drbdctl create-md --force r0"
	on $node type_ "drbdctl up r0"
done
must "the nodes find each other" wait_until 20 on alice is Connected connection r0
on alice type_ "drbdctl primary --force r0"
BYTES=$(exposed)
last=$((BYTES / 1024))

# got_more_than KIB: the resync of bob has brought that much since its engine started.
got_more_than() { [ "$(received bob r0)" -gt "$1" ]; }
# goes_on KIB: connected again, and the resync begins with no more than that.
goes_on() {
	must "the nodes find each other again" wait_until 15 on bob is SyncTarget replication r0
	now=$(announced bob)
	note "$now KiB are left, $last KiB were when it began before"
	check "the resync does not begin anew" between 1 "$now" "$1"
	last=$now
}

step "the link is cut"
must "the resync runs" wait_until 20 got_more_than 40960
on bob refused 11 'Multiple primaries' "drbdctl primary r0"
type_ "cable down"
must "bob notices" wait_until 10 on bob is_not Connected connection r0
on bob refused 17 'UpToDate' "drbdctl primary r0"
on bob type_ "drbdctl status r0"
check "bob is Inconsistent" on bob is Inconsistent disk_state r0
on alice type_ "qemu-io -f raw -c 'write -P 0x77 0 64k' -c flush '$ALICE'"
type_ "cable up"
goes_on $((last - 36864))

step "the target dies"
at=$(received bob r0)
must "the resync runs" wait_until 20 got_more_than $((at + 20480))
type_ "kill -9 $(engine_pid bob)"
must "alice notices" wait_until 10 on alice is_not Connected connection r0
on bob type_ "drbdctl up r0"
goes_on "$last"

step "the source dies"
at=$(received bob r0)
must "the resync runs" wait_until 20 got_more_than $((at + 20480))
type_ "kill -9 $(engine_pid alice)"
must "bob notices" wait_until 10 on bob is_not Connected connection r0
on alice type_ "drbdctl up r0"
check "alice comes back as Secondary" on alice is Secondary role_of r0
# The extent of the one write was hot.
goes_on $((last + 4096))

step "faster, without an interruption"
DISK=$FAST resource r0 $PORT 0 >"$CONF"
for node in alice bob; do
	on $node type_ "drbdctl adjust r0"
done
on bob type_ "drbdctl wait-sync r0"
both_in_sync r0
check "nothing is left out of sync" on alice is 0 out_of_sync r0
identical "interrupted resync"
on bob type_ "drbdctl primary r0"
on bob type_ "qemu-io -f raw -r -c 'read -P 0x77 0 64k' '$(uri bob)'"
check "what was written between is there" same "$(grep -c 'verification failed' <<<"$OUTPUT")" 0
for node in alice bob; do
	on $node type_ "drbdctl down r0"
done
finish
