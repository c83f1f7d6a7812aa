#!/bin/bash
# The service of a resource (scripts/drbd@.service) under a real systemd: it starts the engine,
# starts it again when it was killed under a mounted file system, takes another program into use
# there, leaves a device in use alone, and stops without remains.
# guests: 1
# disks: ram:32M
# kernels: 7.2
# timeout: 120
. ./lib.sh
. ./load.sh

# systemd is the init of a PID namespace, with nothing to start but what this test starts; the
# test goes there as well.
begin_systemd() {
	local want
	mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
	for want in sysinit basic sockets timers local-fs multi-user; do
		rm -rf "/usr/lib/systemd/system/$want.target.wants" "/etc/systemd/system/$want.target.wants"
	done
	install -D -m 755 -t /usr/local/sbin ublk-target drbdctl
	install -m 644 drbd@.service /etc/systemd/system
	mkdir -p /etc/systemd/system/drbd@.service.d
	printf '[Service]\nTimeoutStopSec=4\n' >/etc/systemd/system/drbd@.service.d/test.conf
	echo 0123456789abcdef0123456789abcdef >/etc/machine-id
	env -i PATH="$PATH" container=guest unshare --fork --pid --mount --mount-proc \
		/usr/lib/systemd/systemd --system --unit=multi-user.target --log-target=console >"$OUT/systemd" 2>&1 &
	must "systemd runs" wait_until 40 systemd_runs
	exec nsenter -t "$(pgrep -x systemd)" -m -p env INSIDE=1 bash -c "cd '$PWD' && exec bash '$0'"
}
systemd_runs() {
	local init
	init=$(pgrep -x systemd) && nsenter -t "$init" -m -p systemctl is-active -q multi-user.target 2>/dev/null
}

mkdir -p "$OUT"
[ -n "${INSIDE:-}" ] || begin_systemd
# The peer never comes.
ip addr add 10.0.0.1/24 dev lo
node_setup < <(resource r0 $PORT 0)
DEV=$(device 0)
UNIT=drbd@r0

main_pid() { systemctl show -p MainPID --value $UNIT; }
is_engine() { [ "$(main_pid)" != 0 ] && [ "$(readlink "/proc/$(main_pid)/exe")" = /usr/local/sbin/ublk-target ]; }
is_another() { is_engine && is_not "$1" main_pid; }
has_state() { [ "$(systemctl is-active $UNIT)" = "$1" ]; }
io_errors() { dmesg | grep -cE 'I/O error|EXT4-fs error'; }

step "a resource that cannot come up is a service that fails"
refused 1 "failed" "systemctl start $UNIT"
check "for want of metadata" grep -qi "meta-\?data" /run/drbd/r0.log
check "and leaves no engine" no_engine r0

step "the service starts the engine"
type_ "drbdctl create-md --force r0"
type_ "systemctl reset-failed $UNIT && systemctl enable -q $UNIT && systemctl start $UNIT"
check "the engine is its main process" is_engine
check "memory may be locked" grep -q 'Max locked memory *unlimited' "/proc/$(main_pid)/limits"
type_ "drbdctl primary --force r0"
must "it has a device" wait_until 10 test -b "$DEV"
type_ "mkfs.ext4 -q $DEV && mount $DEV /mnt"
type_ "dmesg --clear"
start_verified load /mnt/load 8
must "the load runs" wait_until 20 wrote_more_than r0 512

step "the engine is killed"
first=$(main_pid)
type_ "kill -KILL $first"
must "another one is started" wait_until 20 is_another "$first"
must "it serves" wait_until 20 wrote_more_than r0 512
check "it is Primary as before" is Primary role_of r0
check "the load goes on" kill -0 "$LOAD"

step "another program is installed"
second=$(main_pid)
type_ "install -m 755 ublk-target.other /usr/local/sbin/ublk-target"
refused 10 "systemctl reload $UNIT" "drbdctl upgrade r0"
check "the engine stays" same "$(main_pid)" "$second"
type_ "systemctl reload $UNIT"
must "it is the main process" is_another "$second"
must "it serves" wait_until 20 wrote_more_than r0 512
check "it is Primary as before" is Primary role_of r0
check "the load goes on" kill -0 "$LOAD"
check "the service runs" has_state active

step "a device in use is not taken away"
second=$(main_pid)
type_ "systemctl stop --no-block $UNIT"
must "the service says that it has not stopped" wait_until 30 has_state failed
at=$(written r0)
must "the load goes on" wait_until 20 wrote_more_than r0 $((at + 512))
check "the same engine serves" same "$(pgrep -x ublk-target)" "$second"
stop_verified load "$LOAD" 256
check "the kernel saw no I/O error" same "$(io_errors)" 0
type_ "umount /mnt && e2fsck -f -n $DEV"

step "the service ends"
type_ "systemctl start $UNIT"
check "it has found the engine" same "$(main_pid)" "$second"
type_ "systemctl stop $UNIT"
nothing_left r0 $PORT 0
check "no ublk device" no_ublk_left
type_ "systemctl start $UNIT"
check "and starts again" is_engine
type_ "systemctl stop $UNIT"
nothing_left r0 $PORT 0
finish
