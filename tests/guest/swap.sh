#!/bin/bash
# The Primary's host swaps, to another disk, while a file system on the device is written back:
# nothing stands still, nobody is killed, the engine is not swapped out, and the file is there.
# guests: 2
# disks: ram:64M ram:128M
# memory: 256M
# kernels: 6.12
# timeout: 120
. ./lib.sh

# What is left of the guest's memory beside the hog, and what has to be swapped at least.
readonly LEFT_KB=16384 SWAPPED_KB=8192
readonly FILE_MB=24
NET="timeout 100; ping-int 10; ping-timeout 50; connect-int 5;"
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

kib() { awk -v key="$1:" '$1 == key { print $2 }' "$2"; }
killed() { dmesg | grep -c 'Out of memory: Killed'; }
swapped() { echo $(($(kib SwapTotal /proc/meminfo) - $(kib SwapFree /proc/meminfo))); }
has_swapped() { [ "$(swapped)" -ge "$1" ]; }
# text: what the file holds; no two pages are equal.
text() { openssl enc -aes-128-ctr -nosalt -K 05 -iv 00 -in /dev/zero 2>/dev/null | head -c ${FILE_MB}M; }
# hog KIB: holds that much memory, none of it alike, and goes on touching it until it is killed.
hog() {
	python3 -c '
import mmap, os, select, sys
pages = int(sys.argv[1]) // 4
memory = mmap.mmap(-1, pages * 4096)
for page in range(pages):
    memory[page * 4096:page * 4096 + 1024] = os.urandom(1024)
print("full", flush=True)
while True:
    for page in range(0, pages, 16):
        memory[page * 4096] ^= 1
    select.select([], [], [], 1)
' "$1" >/tmp/hog 2>&1 &
	HOG=$!
}
is_full() { grep -q full /tmp/hog; }

step "a pair in sync, a file system, and a disk to swap to"
bring_up r0
pid=$(cat /run/drbd/r0.lock)
if [ "$VM_ID" = 1 ]; then
	type_ "mkfs.ext4 -q -E nodiscard $DEV"
	type_ "mount $DEV /mnt"
	type_ "echo 60 >/proc/sys/vm/dirty_ratio; echo 40 >/proc/sys/vm/dirty_background_ratio"
	type_ "mkswap -q $(disk 1) && swapon $(disk 1)"

	step "memory is full, and $FILE_MB MiB are to be written"
	hog $(($(kib MemAvailable /proc/meminfo) - LEFT_KB))
	must "memory is full" wait_until 40 is_full
	text >/mnt/file &
	WRITER=$!
	check "the host has to swap" wait_until 40 has_swapped $SWAPPED_KB
	wait $WRITER
	check "the file is written" same $? 0
	type_ "sync /mnt/file"
	note "$(swapped) KiB are swapped, $(kib MemAvailable /proc/meminfo) KiB available"
	check "nothing of the engine is swapped" same "$(kib VmSwap "/proc/$pid/status")" 0
	check "whoever has taken the memory has it still" kill "$HOG"
	wait "$HOG" 2>/dev/null
	type_ "echo 3 >/proc/sys/vm/drop_caches"
	check "the file is what was written" cmp <(text) /mnt/file
	type_ "swapoff $(disk 1)"
	type_ "umount /mnt"
	type_ "e2fsck -f -n $DEV"
	type_ "drbdctl secondary r0"
fi
meet written
check "the same engine runs" same "$(cat /run/drbd/r0.lock)" "$pid"
check "nobody was killed" same "$(killed)" 0
must "in sync" wait_until 30 in_sync r0
identical swap 0
meet compared
type_ "drbdctl down r0"
check "no ublk device" no_ublk_left
finish
