#!/bin/bash
# Two volumes in one resource, and a second resource beside it: each has its own export.
. "$(dirname "$0")/lib.sh"

SIZE_MB=96
lab_setup 3 < <(resource r0 $PORT 0 2; resource r1 $((PORT + 1)) 2)
step "three volumes in two resources"
bring_up r0 r1
both_in_sync r0 1
on alice type_ "drbdctl status"
on alice type_ "nbdinfo --list 'nbd+unix://?socket=$(nbd_socket alice r0)'"
check "both volumes are exported" same "$(grep -c '^export=' <<<"$OUTPUT")" 2

step "different data on each"
load() {
	on alice type_ "fio --name=$1-$2 --ioengine=nbd --uri=$(uri alice "$1" "$2") --size=32M --rw=randwrite \
--bs=16k --iodepth=16 --verify=crc32c --randseed=$3 --minimal --output=$LAB/fio"
}
load r0 0 1
load r0 1 2
load r1 0 3
check "volumes are not mixed up" [ "$(sha256sum <"$(image alice 0)")" != "$(sha256sum <"$(image alice 1)")" ]
hand_over alice bob r0
hand_over alice bob r1
identical "r0/0" 0 r0 0
identical "r0/1" 1 r0 1
identical "r1/0" 2 r1 0

step "one resource goes, the other one does not care"
for node in alice bob; do
	pid=$(engine_pid $node r0)
	on $node type_ "drbdctl down r0"
	nothing_left $node r0 $PORT "$pid"
done
check "r1 is still in sync" on bob in_sync r1
on bob type_ "nbdcopy $(uri bob r1 0) $LAB/copy"
check "and readable" cmp -n "$(exposed r1)" "$LAB/copy" "$(image bob 2)"
for node in alice bob; do
	on $node type_ "drbdctl down all"
done
finish
