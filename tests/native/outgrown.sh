#!/bin/bash
# Disks grow below engines that are down, that were killed, or that are told by their peer: internal
# metadata is found where it was and moved before the next attach, and nothing is synced but what
# was missed.
. "$(dirname "$0")/lib.sh"

NET="timeout 20; ping-int 3; ping-timeout 10; connect-int 3;"
lab_setup 1 < <(resource r0 $PORT 0)
ALICE=$(uri alice)
SIZE=$SIZE_MB

# grow NODE MEGABYTES: its backing file becomes so large.
grow() { truncate -s "$2M" "$(image "$1")"; }
is_not_moved() { ! is_moved; }
is_moved() { grep -q "internal metadata moved to its end" <<<"$OUTPUT"; }
# exposes MEGABYTES: what is left of so much.
exposes() { between $((($1 - 1) << 20)) "$(exposed r0)" $(($1 << 20)); }

step "a pair in sync"
bring_up r0

step "a disk grows while its node is down"
on bob type_ "drbdctl down r0"
on alice type_ "qemu-io -f raw -c 'write -P 0x11 10M 1M' '$ALICE'"
grow bob $((SIZE + 64))
on bob type_ "drbdctl up r0"
check "its metadata is moved" is_moved
both_in_sync r0
check "bob gets what it has missed" between 1024 "$(received bob r0)" 2048
check "the size stays" exposes "$SIZE"

step "a disk grows below a Primary that is killed"
on alice type_ "qemu-io -f raw -c 'write -P 0x22 20M 1M' '$ALICE'"
grow alice $((SIZE + 64))
type_ "kill -9 $(engine_pid alice)"
on alice type_ "drbdctl up r0"
check "its metadata is moved" is_moved
check "its activity log counts" log_says alice "out-of-sync based on AL"
on alice type_ "drbdctl primary r0"
both_in_sync r0
on alice type_ "qemu-io -f raw -c 'read -P 0x22 20M 1M' '$ALICE'"
check "what was written is there" same "$(grep -c 'verification failed' <<<"$OUTPUT")" 0

step "both have grown: the volume follows"
on alice type_ "drbdctl resize r0"
must "the device has grown" wait_until 20 exposes $((SIZE + 64))
both_in_sync r0

step "a node that was only told by its peer remembers where its metadata is"
for node in alice bob; do
	grow "$node" $((SIZE + 128))
done
on alice type_ "drbdctl resize r0"
must "the device has grown" wait_until 20 exposes $((SIZE + 128))
both_in_sync r0
pid=$(engine_pid bob)
type_ "kill -9 $pid"
must "it is gone" wait_until 5 [ ! -e "/proc/$pid" ]
grow bob $((SIZE + 192))
on bob type_ "drbdctl check-resize r0"
check "its metadata is moved" is_moved
on bob type_ "drbdctl up r0"
check "once" is_not_moved
both_in_sync r0
identical "disks that have grown"
for node in alice bob; do
	on "$node" type_ "drbdctl down r0"
done
finish
