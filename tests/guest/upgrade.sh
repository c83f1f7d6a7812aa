#!/bin/bash
# The engine is replaced by another build of it under a mounted file system with load on it, and
# back: no I/O error, nothing lost, the role stays, and next to nothing is synced. Then the
# Secondary's.
# guests: 2
# disks: ram:64M
# timeout: 170
. ./lib.sh
. ./load.sh

NET="timeout 40; ping-int 5; ping-timeout 20; connect-int 5;"
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

# Another build, under the usual name.
mkdir -p /tmp/next && cp ublk-target.other /tmp/next/ublk-target || die "no second program"
OLD=$(readlink -f ublk-target)
! cmp -s "$OLD" /tmp/next/ublk-target || die "both builds are the same"
NEXT=/tmp/next/ublk-target

pid_of() { cat /run/drbd/r0.lock; }
runs() { readlink "/proc/$(pid_of)/exe"; }
# What the kernel said of failed requests; a Secondary's device fails those of the partition scan.
io_errors() { dmesg | grep -cE 'I/O error|EXT4-fs error'; }
marked() { grep -c 'based on AL' /run/drbd/r0.log; }
# replace PROGRAM: what an operator types, and what everybody should find afterwards.
replace() {
	local pid
	pid=$(pid_of)
	type_ "DRBD_ENGINE=$1 drbdctl upgrade r0"
	check "the pause is told" grep -qE "engine replaced \(pid $pid -> [0-9]+\); requests waited for" <<<"$OUTPUT"
	check "the other program runs" is "$1" runs
	check "the old one is gone" [ ! -e "/proc/$pid" ]
	must "the nodes find each other again" wait_until 40 is Connected connection r0
	must "UpToDate on both sides" wait_until 40 in_sync r0
}

step "a pair in sync"
bring_up r0

if [ "$VM_ID" = 1 ]; then
	type_ "mkfs.ext4 -q $DEV"
	type_ "mount $DEV /mnt"
	errors=$(io_errors)
	start_verified load /mnt/load 12
	program=$NEXT
	for round in 1 2 3; do
		step "the Primary's engine is replaced, round $round"
		replace "$program"
		check "it is Primary as before" is Primary role_of r0
		check "the load goes on" kill -0 "$LOAD"
		type_ "dd if=/dev/urandom of=/mnt/file$round bs=64k count=4 conv=fsync status=none"
		[ "$program" = "$NEXT" ] && program=$OLD || program=$NEXT
	done
	check "the activity log was empty each time" same "$(marked)" 0
	meet primary-replaced
	meet secondary-replaced
	stop_verified load "$LOAD" 256
	check "the kernel saw no I/O error" same "$(io_errors)" "$errors"
	type_ "umount /mnt"
	type_ "e2fsck -f -n $DEV"
	type_ "drbdctl secondary r0"
else
	meet primary-replaced
	step "the Secondary's engine is replaced"
	replace "$NEXT"
	check "it is Secondary as before" is Secondary role_of r0
	meet secondary-replaced
fi
meet done
check "still in sync" wait_until 20 in_sync r0
identical upgrade 0
meet compared
type_ "drbdctl down r0"
nothing_left r0 $PORT 0
check "no ublk device" no_ublk_left
finish
