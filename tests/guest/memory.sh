#!/bin/bash
# Memory is short: the engine in a group with hardly more than it has locked, in a guest with little,
# under a file system with far more to write back than either. Nothing stands still, nothing is
# killed, and every file is there.
# guests: 2
# disks: ram:224M
# memory: 320M
# kernels: 7.2
# timeout: 150
. ./lib.sh

readonly GROUP=/sys/fs/cgroup/engine
readonly FILES=4 FILE_MB=48 ROOM_KB=4096
NET="timeout 100; ping-int 10; ping-timeout 50; connect-int 5;"
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)

engine_pid() { pgrep -f 'ublk-target run .*r0'; }
kib() { awk -v key="$1:" '$1 == key { print $2 }' "$2"; }
group() { awk -v key="$1" '$1 == key { print $2 }' "$GROUP/memory.events"; }
killed() { dmesg | grep -cE 'Out of memory: Killed|oom-kill:.*ublk-target'; }

# text N: what the N-th file holds; no two pages of all files are equal.
text() { openssl enc -aes-128-ctr -nosalt -K "0$1" -iv 00 -in /dev/zero 2>/dev/null | head -c ${FILE_MB}M; }
writers=()
any_writes() {
	local pid
	for pid in "${writers[@]}"; do
		! kill -0 "$pid" 2>/dev/null || return 0
	done
	return 1
}

step "an engine in a group of its own"
mountpoint -q /sys/fs/cgroup || type_ "mount -t cgroup2 cgroup2 /sys/fs/cgroup"
type_ "echo +memory >/sys/fs/cgroup/cgroup.subtree_control && mkdir $GROUP"
echo $$ >$GROUP/cgroup.procs
type_ "drbdctl create-md --force r0"
type_ "drbdctl up r0"
echo $$ >/sys/fs/cgroup/cgroup.procs
pid=$(engine_pid)
check "the engine is there, alone" same "$(cat $GROUP/cgroup.procs)" "$pid"
meet up
[ "$VM_ID" = 2 ] || type_ "drbdctl primary --force r0"
type_ "drbdctl wait-sync r0"
must "UpToDate on both sides" wait_until 60 in_sync r0
locked=$(kib VmLck "/proc/$pid/status")
resident=$(kib VmRSS "/proc/$pid/status")
current=$(($(<$GROUP/memory.current) / 1024))
note "locked $locked KiB, resident $resident KiB, charged to the group $current KiB"
check "all of its memory is locked" between "$resident" "$locked" $((1 << 20))
check "the buffers are there from the start" between $((32 << 10)) "$resident" $((256 << 10))
check "the OOM killer leaves it alone" same "$(<"/proc/$pid/oom_score_adj")" -1000
limit=$((current + ROOM_KB))
type_ "echo ${limit}K >$GROUP/memory.max"
meet limited

step "$((FILES * FILE_MB)) MiB to write back"
note "the guest has $(kib MemTotal /proc/meminfo) KiB, $(kib MemAvailable /proc/meminfo) KiB of them available"
if [ "$VM_ID" = 1 ]; then
	type_ "mkfs.ext4 -q -E nodiscard $DEV"
	type_ "mount $DEV /mnt"
	type_ "echo 80 >/proc/sys/vm/dirty_ratio; echo 60 >/proc/sys/vm/dirty_background_ratio"
	for i in $(seq $FILES); do
		text "$i" >"/mnt/$i" &
		writers+=($!)
	done
	most=0
	while any_writes; do
		dirty=$(($(kib Dirty /proc/meminfo) + $(kib Writeback /proc/meminfo)))
		[ "$dirty" -le "$most" ] || most=$dirty
		pause_
	done
	type_ "sync"
	note "at most $most KiB were dirty"
	check "that was many times the room of the engine" between $((8 * ROOM_KB)) "$most" $((1 << 20))
	type_ "echo 3 >/proc/sys/vm/drop_caches"
	for i in $(seq $FILES); do
		check "file $i is what was written" cmp <(text "$i") "/mnt/$i"
	done
	type_ "umount /mnt"
	type_ "e2fsck -f -n $DEV"
	type_ "drbdctl secondary r0"
fi
meet written
check "the same engine runs" same "$(engine_pid)" "$pid"
check "nobody was killed" same "$(killed)" 0
check "no process of the group either" same "$(group oom_kill)" 0
note "the group: peak $(($(<$GROUP/memory.peak) / 1024)) KiB of $limit KiB, limit met $(group max) times, out of memory $(group oom) times"
note "$(grep -E '^(VmPeak|VmHWM|VmLck|VmRSS)' "/proc/$pid/status" | tr -s '\t\n ' ' ')"
must "in sync" wait_until 30 in_sync r0
check "nothing is out of sync" is 0 out_of_sync r0
meet checked
identical memory 0
type_ "drbdctl down r0"
check "no ublk device" no_ublk_left
finish
