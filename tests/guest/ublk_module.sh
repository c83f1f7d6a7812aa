#!/bin/bash
# The ublk frontend on a real kernel: two devices in one ring, file systems, verified I/O, flush,
# FUA, discard, zeroes, resize, kill -9 with recovery, and nothing left at the end.
#
# Runs as root in a guest of the test harness, with the example `ublk_ram` copied beside it:
#     run --kernel 6.12 --script tests/guest/ublk_module.sh \
#         --copy target/debug/examples/ublk_ram --mem 1024 --timeout 300
# Any other root shell on a machine with the module will do as well (it uses devices 5 and 9).
set -u -o pipefail
cd "$(dirname "$0")"
[ -x ./ublk_ram ] || cd /guest
store=$(mktemp -d /dev/shm/ublk_ram.XXXXXX)
mnt=$(mktemp -d)
failures=0

fail() { echo "   NOT OK: $*"; failures=$((failures + 1)); }
check() { # check WHAT COMMAND...
	local what=$1
	shift
	if "$@"; then echo "   ok: $what"; else fail "$what: $*"; fi
}
die() { echo "   NOT OK: $*"; exit 1; }

# launch ARGUMENT...: starts ublk_ram and waits until it is live.
launch() {
	coproc RAM { exec ./ublk_ram "$@" 2>&1; }
	ram=$RAM_PID
	exec 6<&"${RAM[0]}" 7>&"${RAM[1]}"
	hear live
}
hear() { # hear WORD: reads lines until one starts with WORD
	local line
	while IFS= read -r -t 120 line <&6; do
		echo "ublk_ram: $line"
		case $line in
		"$1"*) return 0 ;;
		error*) return 1 ;;
		esac
	done
	echo "ublk_ram fell silent"
	return 1
}
ask() { # ask COMMAND...: prints the one line of the answer
	local line
	echo "$*" >&7
	IFS= read -r -t 120 line <&6 && echo "$line"
}
counter() { # counter DEVICE NAME
	local line found=
	echo stats >&7
	for _ in 5 9; do
		IFS= read -r -t 120 line <&6 || return 1
		case $line in "stats $1 "*) found=${line#* "$2"=} ;; esac
	done
	echo "${found%% *}"
}
more() { # more DEVICE COUNTER COMMAND...: the command makes the counter grow
	local device=$1 name=$2 before after
	shift 2
	before=$(counter "$device" "$name")
	"$@" || { fail "$*"; return; }
	after=$(counter "$device" "$name")
	check "$name of device $device: $before -> $after" [ "$after" -gt "$before" ]
}
sysfs() { cat "/sys/block/ublkb5/$1"; }
verify() { # verify FILE-OR-DEVICE SIZE EXTRA...
	local file=$1 size=$2
	shift 2
	fio --name=v --filename="$file" --size="$size" --rw=randwrite --bs=4k --ioengine=libaio \
		--iodepth=16 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 \
		--fsync=64 --output-format=terse --randseed=7 "$@" >/tmp/fio.out 2>&1 ||
		{ cat /tmp/fio.out; return 1; }
}

uname -r
echo "== without rights"
modprobe ublk_drv
answer=$(setpriv --reuid=65534 --regid=65534 --clear-groups ./ublk_ram "$store" 5:64 2>&1)
check "refused: $answer" grep -q 'permission denied' <<<"$answer"
rmmod ublk_drv || die "the module does not go away"

echo "== start (loads the module)"
[ ! -e /dev/ublk-control ] || die "the control device should be missing now"
launch "$store" 5:64 9:48 || die "no device"
check "size" [ "$(blockdev --getsz /dev/ublkb5)" = 131072 ]
check "size of the other" [ "$(blockdev --getsz /dev/ublkb9)" = 98304 ]
check "volatile cache" [ "$(sysfs queue/write_cache)" = "write back" ]
check "FUA" [ "$(sysfs queue/fua)" = 1 ]
check "logical block" [ "$(sysfs queue/logical_block_size)" = 512 ]
check "physical block" [ "$(sysfs queue/physical_block_size)" = 4096 ]
check "largest request" [ "$(sysfs queue/max_hw_sectors_kb)" = 1024 ]
check "discard" [ "$(sysfs queue/discard_max_bytes)" = $((16384 * 512)) ]
check "zeroes" [ "$(sysfs queue/write_zeroes_max_bytes)" = $((8192 * 512)) ]
check "not rotational" [ "$(sysfs queue/rotational)" = 0 ]
answer=$(ask info 5)
check "info: $answer" grep -q 'state: Live' <<<"$answer"
answer=$(./ublk_ram "$store" 5:64 2>&1 </dev/null)
check "a second owner: $answer" grep -q 'error: /dev/ublkb5: exists already' <<<"$answer"
answer=$(./ublk_ram --recover "$store" 5:64 2>&1 </dev/null)
check "recovery of a live device: $answer" grep -q 'error: /dev/ublkb5: cannot start' <<<"$answer"

echo "== a process that dies between adding and starting"
answer=$(./ublk_ram "$store" 6:64 5:64 2>&1 </dev/null)
check "died: $answer" grep -q 'error: /dev/ublkb5: exists already' <<<"$answer"
answer=$(ask info 6)
check "remains: $answer" grep -q 'state: Dead' <<<"$answer"
answer=$(./ublk_ram --recover "$store" 6:64 2>&1 </dev/null)
check "nothing to recover: $answer" grep -q 'the device is not started' <<<"$answer"
check "removed" [ "$(ask delete 6)" = deleted ]
answer=$(./ublk_ram --halfway "$store" 6:64 2>&1 </dev/null)
check "died later: $answer" grep -q 'as told' <<<"$answer"
answer=$(ask info 6)
check "remains: $answer" grep -q 'state: Dead' <<<"$answer"
check "removed" [ "$(ask delete 6)" = deleted ]
answer=$(ask info 6)
check "gone: $answer" grep -q 'error: /dev/ublkb6: .* there is no such device' <<<"$answer"

echo "== counters"
more 5 writes dd if=/dev/urandom of=/dev/ublkb5 bs=1M count=4 oflag=direct status=none
more 5 reads dd if=/dev/ublkb5 of=/dev/null bs=1M count=4 iflag=direct status=none
more 5 fua dd if=/dev/urandom of=/dev/ublkb5 bs=4k count=4 oflag=direct,dsync status=none
more 9 flushes sh -c 'dd if=/dev/urandom of=/dev/ublkb9 bs=64k count=4 status=none conv=fsync'
dd if=/dev/urandom of=/dev/ublkb5 bs=1M count=32 oflag=direct status=none
used=$(du -k "$store/ublk5.ram" | cut -f1)
more 5 discards blkdiscard -o 0 -l 16M /dev/ublkb5
freed=$((used - $(du -k "$store/ublk5.ram" | cut -f1)))
check "16 MiB given back: $freed KiB" [ "$freed" -ge 16000 ]
more 5 zeroes blkdiscard -z -o 16M -l 8M /dev/ublkb5
check "zeroes read back" cmp -n 8388608 -i 16777216:0 /dev/ublkb5 /dev/zero

echo "== file systems and verified I/O on both at once"
for d in 5 9; do
	mkdir "$mnt/$d"
	mkfs.ext4 -q -F "/dev/ublkb$d" || die mkfs
	mount -o discard "/dev/ublkb$d" "$mnt/$d" || die mount
done
verify "$mnt/5/f" 16M & one=$!
verify "$mnt/9/f" 16M & two=$!
wait $one; check "fio on 5" [ $? = 0 ]
wait $two; check "fio on 9" [ $? = 0 ]
sum=$(md5sum <"$mnt/5/f")
umount "$mnt/5" "$mnt/9"
check "fsck" e2fsck -fn /dev/ublkb5
mount /dev/ublkb5 "$mnt/5" || die mount
check "same bytes after a remount" [ "$(md5sum <"$mnt/5/f")" = "$sum" ]

echo "== resize while mounted"
answer=$(ask resize 5 196608)
case $(uname -r) in
6.12.*)
	check "refused: $answer" grep -q 'error: .*kernel 6.12.* does not support it' <<<"$answer"
	check "size unchanged" [ "$(blockdev --getsz /dev/ublkb5)" = 131072 ]
	sectors=131072
	;;
*)
	check "answer $answer" [ "$answer" = resized ]
	check "new size" [ "$(blockdev --getsz /dev/ublkb5)" = 196608 ]
	check "the file system follows" resize2fs /dev/ublkb5
	sectors=196608
	;;
esac
answer=$(ask resize 77 8)
check "no such device: $answer" grep -q '^error: ' <<<"$answer"

echo "== kill -9 under a file system, recovery by a new process"
verify "$mnt/5/g" 24M --rate_iops=600 & fio=$!
while [ ! -s "$mnt/5/g" ]; do :; done
before=$(counter 5 writes)
while [ "$(counter 5 writes)" -lt $((before + 500)) ]; do :; done
kill -9 "$ram"
wait "$ram" 2>/dev/null
exec 6<&- 7>&-
tries=0
until_dead() { # until_dead ERROR ARGUMENT...: a recovery that dies on its way, with that error
	until
		answer=$(./ublk_ram --recover "${@:2}" </dev/null 2>&1)
		echo "$answer"
		grep -q "error: .*$1" <<<"$answer"
	do
		tries=$((tries + 1))
		[ $tries -lt 200 ] || die "no recovery"
	done
}
until_dead ublkb77 "$store" 5:0 77:0
until_dead ublkb77 "$store" 5:0 77:0
until_dead as.told --halfway "$store" 5:0 9:0
until_dead as.told --halfway "$store" 5:0 9:0
until_dead ublkb77 "$store" 5:0 77:0
until launch --recover "$store" 5:0 9:0; do
	wait "$ram" 2>/dev/null
	exec 6<&- 7>&-
	tries=$((tries + 1))
	[ $tries -lt 200 ] || die "no recovery"
done
echo "recovered after $tries refusals"
wait $fio; check "fio saw no error and verified" [ $? = 0 ]
check "the size was kept" [ "$(blockdev --getsz /dev/ublkb5)" = "$sectors" ]
check "the old file" [ "$(md5sum <"$mnt/5/f")" = "$sum" ]
umount "$mnt/5"
check "fsck" e2fsck -fn /dev/ublkb5
check "refused requests" [ "$(counter 5 refused)" = 0 ]

echo "== stop"
echo stop >&7
check "stopped" hear gone
wait "$ram"; check "exit code" [ $? = 0 ]
exec 6<&- 7>&-
for d in 5 9; do
	check "no block device $d" [ ! -e /dev/ublkb$d ]
	check "no character device $d" [ ! -e /dev/ublkc$d ]
done
if dmesg | grep -E 'I/O error|BUG|WARNING|Oops|hung'; then fail "the kernel complains"; fi

echo "== errors reach the host; stop under load"
mkdir "$store/small"
mount -t tmpfs -o size=4M small "$store/small" || die mount
launch "$store/small" 6:64 || die "no device"
answer=$(dd if=/dev/urandom of=/dev/ublkb6 bs=1M count=8 oflag=direct 2>&1)
check "full: $answer" grep -q 'No space left on device' <<<"$answer"
check "still served" dd if=/dev/ublkb6 of=/dev/null bs=1M count=8 iflag=direct status=none
fio --name=l --filename=/dev/ublkb6 --size=3M --rw=randwrite --bs=4k --ioengine=libaio \
	--iodepth=16 --direct=1 --time_based --runtime=60 >/tmp/load.out 2>&1 & fio=$!
while awk '{ exit $9 > 0 }' /sys/block/ublkb6/stat; do :; done
echo stop >&7
check "stopped" hear gone
wait "$ram"; check "exit code" [ $? = 0 ]
wait $fio; check "the load ended with an error" [ $? != 0 ]
exec 6<&- 7>&-
umount "$store/small"
check "the module can go" rmmod ublk_drv
if dmesg | grep -E 'BUG|WARNING|Oops|hung'; then fail "the kernel complains"; fi
rm -r "$store" "$mnt"
echo "== $failures failures"
[ $failures = 0 ]
