#!/bin/bash
# The story on two hosts: metadata, first synchronisation of random data, verified writes, the other
# node takes over and holds every byte, takes new data and gives it back; nothing is left.
. "$(dirname "$0")/lib.sh"

lab_setup 1 < <(resource r0 $PORT 0)
ALICE=$(uri alice) BOB=$(uri bob)
FIO="fio --name=verified --ioengine=nbd --size=64M --bs=16k --rw=randwrite --iodepth=16 \
--verify=crc32c --randseed=7 --minimal --output=$LAB/fio"

step "data on alice's disk, none on bob's"
type_ "head -c 100M /dev/urandom | dd of=$(image alice) bs=1M conv=notrunc iflag=fullblock status=none"
type_ "cp --sparse=never $(image alice) $LAB/original"
for node in alice bob; do
	on $node type_ "drbdctl create-md --force r0"
	on $node type_ "drbdctl up r0"
done
for node in alice bob; do
	must "$node finds its peer" wait_until 20 on $node is Connected connection r0
	check "the fresh disk of $node is Inconsistent" on $node is Inconsistent disk_state r0
done
on bob refused 17 'UpToDate' "drbdctl primary r0"

step "one node's data is declared good; the other one gets a copy"
on alice type_ "drbdctl primary --force r0"
on alice type_ "drbdctl wait-sync r0"
both_in_sync r0
BYTES=$(exposed)
on alice type_ "drbdctl status r0"
on bob type_ "drbdctl status r0 --verbose --statistics"
check "the whole disk was announced" same "$(announced bob)" $((BYTES / 1024))
check "the whole disk travelled" same "$(received bob r0)" $((BYTES / 1024))
identical "first synchronisation"
check "the data are those of before" cmp -n "$BYTES" "$LAB/original" "$(image bob)"

step "what an NBD client sees"
on alice type_ "nbdinfo $ALICE"
check "the export has the size of the volume" same "$(NODE=alice nbdinfo --size "$ALICE")" "$BYTES"
check "a Secondary shows the size" same "$(NODE=bob nbdinfo --size "$BOB")" "$BYTES"
on bob refused 1 'error' "nbdcopy $BOB $LAB/nothing"

step "verified writes on alice, verified again on bob"
on alice type_ "$FIO --uri=$ALICE"
hand_over alice bob
on bob type_ "$FIO --uri=$BOB --verify_only"
on bob type_ "qemu-io -f raw -c 'write -P 0xb0 200M 1M' -c flush '$BOB'"
on alice refused 1 'error' "nbdcopy $ALICE $LAB/nothing"

step "a whole image onto bob, back from alice"
type_ "head -c $BYTES /dev/urandom >$LAB/source"
on bob type_ "nbdcopy --flush $LAB/source $BOB"
hand_over bob alice
on alice type_ "nbdcopy $ALICE $LAB/copy"
type_ "qemu-img compare -f raw -F raw $LAB/source $LAB/copy"
on alice type_ "qemu-img compare -f raw -F raw $LAB/source '$ALICE'"
on alice type_ "drbdctl secondary r0"
check "nothing is out of sync" on alice is 0 out_of_sync r0
identical "the whole image"

step "down leaves nothing"
for node in alice bob; do
	pid=$(engine_pid $node)
	on $node type_ "drbdctl down r0"
	nothing_left $node r0 $PORT "$pid"
	on $node type_ "drbdctl down r0"
done
finish
