#!/bin/bash
# Power failures in a row, of the Primary, the Secondary, and both nodes at once, on disks that
# lose and tear what was not flushed. Every file that was fsynced before a failure is there after
# it, with what was written into it (DUR-1, DUR-5, AL-5, RS-3), whoever serves it then.
#
# ROUNDS in the environment says how many failures (50). What is known to be durable is kept
# outside of the nodes.
# guests: 2
# disks: faulty:64M
# timeout: 3000
. ./lib.sh
. ./load.sh

ROUNDS=${ROUNDS:-50}
readonly ENOUGH=6
NET=$QUICK
DISK="resync-rate 400M; c-plan-ahead 0; al-extents 67;"
DEV=$(device 0)

# keep KEY VALUE, get KEY DEFAULT: a value that survives this node.
keep() { vmctl set "$@" || die "the host does not keep $*"; }
get() {
	local value
	value=$(vmctl get "$1") || die "the host does not answer"
	echo "${value:-$2}"
}
files() { get files 0; }
files_at_least() { [ "$(files)" -ge "$1" ]; }

# The N-th file: its number tells size and content.
content_of() { yes "file $1 of this run" | head -c $((1 + $1 * 7919 % 24000)); }
keep_writing() {
	local i
	i=$(files)
	while :; do
		i=$((i + 1))
		content_of $i >"/mnt/file.$i"
		sync "/mnt/file.$i" /mnt || return 1
		keep files $i
	done
}
all_there() {
	local i count
	count=$(files)
	for ((i = 1; i <= count; i++)); do
		content_of "$i" | cmp -s - "/mnt/file.$i" || { note "file.$i is not what was written"; return 1; }
	done
	note "$count files"
}
is_mounted() { grep -q ' /mnt ' /proc/mounts; }
promoted() { drbdctl primary r0 >/dev/null 2>&1; }

stop_writing() {
	kill "$WRITER"
	wait "$WRITER" 2>/dev/null
}

take_the_device() {
	is_mounted && return
	must "this node becomes Primary" wait_until 40 promoted
	type_ "mount $DEV /mnt"
	must "every fsynced file is there" all_there
}

# serve ROUND KIND: this node is the Primary.
serve() {
	# Both were gone, and each may have missed something of the other's: not without the other.
	[ "$VM_BOOT" = 1 ] || is_mounted || must "in sync after both had failed" wait_until 60 in_sync r0
	take_the_device
	if [ "$2" = primary ]; then
		must "in sync before this node fails" wait_until 60 in_sync r0
		keep armed "$1"
		keep_writing
		die "writing failed before the power did"
	fi
	keep_writing &
	WRITER=$!
	must "files are written" wait_until 40 files_at_least $(($(files) + ENOUGH))
	keep round $(($1 + 1))
	if [ "$2" = both ]; then
		note "round $1: both nodes fail, $(files) files"
		keep primary "$VM_PEER"
		vmctl powercycle all
		die "this node should be gone"
	fi
	note "round $1: the Secondary fails, $(files) files"
	vmctl powercycle "$VM_PEER"
	must "the loss is noticed, or the other one is back" wait_until 40 files_at_least $(($(files) + ENOUGH))
	stop_writing
}

# follow ROUND KIND: this node is the Secondary, and the one who pulls the Primary's plug.
is_armed() { [ "$(get armed 0)" = "$1" ]; }
follow() {
	local primary=$VM_PEER
	if [ "$2" != primary ]; then
		wait_until 200 false
		die "round $1: nobody has pulled this node's plug"
	fi
	must "the Primary is ready" wait_until 120 is_armed "$1"
	must "files are written" wait_until 40 files_at_least $(($(files) + ENOUGH))
	note "round $1: the Primary fails, $(files) files"
	keep primary "$VM_ID"
	keep round $(($1 + 1))
	vmctl powercycle "$primary"
	must "the loss is noticed" wait_until 30 is_not Connected connection r0
}

node_setup < <(resource r0 $PORT 0)
if [ "$VM_BOOT" = 1 ]; then
	step "a pair in sync, a file system"
	bring_up r0
	if [ "$VM_ID" = 1 ]; then
		type_ "mkfs.ext4 -q -E nodiscard $DEV"
		type_ "mount $DEV /mnt"
	fi
	meet ready
else
	type_ "drbdctl up r0"
fi
readonly KINDS=(both primary secondary)
while round=$(get round 1) && [ "$round" -le "$ROUNDS" ]; do
	step "round $round"
	if [ "$(get primary 1)" = "$VM_ID" ]; then
		serve "$round" "${KINDS[round % 3]}"
	else
		follow "$round" "${KINDS[round % 3]}"
	fi
done

step "the end"
if [ "$(get primary 1)" = "$VM_ID" ]; then
	take_the_device
	check "every fsynced file is there" all_there
	type_ "umount /mnt"
	type_ "e2fsck -f -n $DEV"
	type_ "drbdctl secondary r0"
fi
meet over
must "UpToDate on both sides" wait_until 60 in_sync r0
check "nothing is out of sync" is 0 out_of_sync r0
identical powercuts 0
type_ "drbdctl down r0"
check "no ublk device" no_ublk_left
finish
