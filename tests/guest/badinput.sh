#!/bin/bash
# Bad input and edges: each is refused in words an operator can act on, with the right exit code,
# with nothing changed, and with the engine alive.
# guests: 2
# disks: ram:40M ram:40M ram:24M
# timeout: 115
. ./lib.sh

NET="connect-int 2; timeout 15; ping-int 2; ping-timeout 10;"

alive() { is "$1" role_of r0; }
head_of() { dd if="$(disk "$1")" bs=1M iflag=direct status=none | sha256sum; }
# unchanged N DIGEST: the whole disk is what it was.
unchanged() { same "$(head_of "$1")" "$2"; }
logged() { grep -qiE -- "$1" /run/drbd/r0.log; }

node_setup < <(resource r0 $PORT 0)

disks_and_metadata() {
	local before
	step "a disk without metadata, with foreign metadata, missing, in use"
	before=$(head_of 0)
	refused 10 '119|no valid meta' "drbdctl up r0"
	check "nothing runs after that" no_engine r0
	check "the disk is unchanged" unchanged 0 "$before"

	dd if=/dev/urandom of="$(disk 0)" bs=4k count=1 seek=$((40 * 256 - 1)) conv=fsync status=none
	before=$(head_of 0)
	refused 10 '119|no valid meta' "drbdctl up r0"
	check "the disk is unchanged" unchanged 0 "$before"

	mkfs.ext4 -q -F "$(disk 1)"
	before=$(head_of 1)
	resource r0 $PORT 1 >"$CONF"
	refused 40 'file ?system|ext4|data' "drbdctl create-md r0"
	check "the file system is unchanged" unchanged 1 "$before"
	dd if=/dev/zero of="$(disk 1)" bs=1M count=1 conv=fsync status=none
	type_ "drbdctl create-md r0"
	mkfs.ext4 -q -F "$(disk 1)" 30M
	mount -t ext4 "$(disk 1)" /mnt
	refused 10 '114|in use|claimed' "drbdctl up r0"
	check "nothing runs after that" no_engine r0
	umount /mnt

	resource r0 $PORT 7 >"$CONF"
	refused 10 '104|open' "drbdctl up r0"
	resource r0 $PORT 0 >"$CONF"
}

configuration() {
	step "configurations and commands that make no sense"
	echo 'resource r0 { net { protocol Z; } }' >/tmp/bad.conf
	refused 10 'protocol|Z' "drbdctl -c /tmp/bad.conf up r0"
	echo 'resource r0 {' >/tmp/bad.conf
	refused 10 'bad.conf' "drbdctl -c /tmp/bad.conf up r0"
	refused 10 'none.conf' "drbdctl -c /tmp/none.conf up r0"
	refused 1,10 'nowhere' "drbdctl up nowhere"
	refused 1,2 'frobnicate' "drbdctl frobnicate r0"
	refused 20 'not running' "drbdctl primary r0"
	type_ "drbdctl down r0"
}

wrong_state() {
	step "commands in the wrong state"
	refused 17 '\(-2\)|UpToDate' "drbdctl primary r0"
	before=$(drbdctl status r0 --json | jq -c '.[0].devices')
	refused 1,10 '12[0-9]|already|in use|configured' "drbdctl up r0"
	refused 1,10,20,40 'in use|configured|attached|opened|busy' "drbdctl create-md --force r0"
	check "state unchanged" same "$before" "$(drbdctl status r0 --json | jq -c '.[0].devices')"
	check "the engine lives" alive Secondary
	refused 11 '\(-15\)|connection' "drbdctl invalidate-remote r0"
	refused 1 '.' "dd if=/dev/zero of=$(device 0) bs=4k count=1 oflag=direct"
}

held_open() {
	step "a device that is held open is not demoted"
	type_ "mkfs.ext4 -q $(device 0)"
	type_ "mount $(device 0) /mnt"
	refused 11 '\(-12\)|held open' "drbdctl secondary r0"
	refused 11 '\(-12\)|held open|open|in use' "drbdctl down r0"
	check "the engine lives" alive Primary
	# A file system is in use until its last write, also when no mount table has it any more.
	(cd /mnt && exec tail -f /dev/null) &
	must "somebody is in the file system" wait_until 5 same_folder $! /mnt
	type_ "umount -l /mnt"
	refused 11 "held open|in use|claimed" "drbdctl secondary r0"
	kill $!
	must "it can go when the file system has ended" wait_until 10 drbdctl secondary r0
}
same_folder() { [ "$(readlink "/proc/$1/cwd")" = "$2" ]; }

# Strangers on the replication port: noise, half a packet, a handshake of another version.
strangers() {
	step "strangers on the port"
	python3 - <<-END
		import os, socket, struct
		def talk(data, answer=False):
		    s = socket.create_connection(("10.0.0.1", $PORT), 5)
		    try:
		        s.sendall(data)
		        s.settimeout(5)
		        if answer:
		            s.recv(1)
		    except OSError:
		        pass
		    s.close()
		for i in range(20):
		    talk(os.urandom(4096))
		talk(b"")
		talk(b"GET / HTTP/1.0\r\n\r\n", True)
		# initial meta packet, then a feature packet that speaks only versions 200 to 210
		talk(struct.pack(">IHH", 0x83740267, 0xfff1, 0))
		talk(struct.pack(">IHH", 0x83740267, 0xfffe, 80) + struct.pack(">III", 200, 0, 210) + bytes(68), True)
		talk(struct.pack(">IHH", 0x83740267, 0xfffe, 65535) + bytes(65535), True)
	END
	check "the engine lives" alive Secondary
}

# The ublk number that is ours by rights belongs to another server.
number_taken() {
	step "another server has the number of our device"
	local store other line
	store=$(mktemp -d)
	coproc OTHER { exec ./ublk_ram "$store" 0:8 2>&1; }
	other=$OTHER_PID
	until [[ ${line:-} == live* ]]; do
		read -r -t 20 -u "${OTHER[0]}" line || die "no other ublk server: ${line:-}"
	done
	type_ "drbdctl up r0"
	type_ "drbdctl primary r0"
	check "the other one keeps its device" [ -b /dev/ublkb0 ]
	check "ours has another number, and the same name" is_not /dev/ublkb0 readlink -f "$(device 0)"
	type_ "dd if=/dev/urandom of=$(device 0) bs=64k count=4 oflag=direct status=none"
	type_ "cmp -n 262144 $(device 0) $(disk 0)"
	type_ "drbdctl down r0"
	check "our name is gone" [ ! -e "$(device 0)" ]
	check "the other device is not" dd if=/dev/ublkb0 of=/dev/null bs=4k count=1 status=none
	echo stop >&"${OTHER[1]}"
	wait "$other"
}

peers_disagree() { # WHAT LOG-PATTERN: g2 has come with something else; nothing gets damaged
	must "$1: refused, and the log says why" wait_until 30 logged "$2"
	check "$1: not connected" is_not Connected connection r0
	check "$1: the engine lives" alive Secondary
}

if [ "$VM_ID" = 1 ]; then
	disks_and_metadata
	configuration
	dd if=/dev/zero of="$(disk 0)" bs=4k count=1 seek=$((40 * 256 - 1)) conv=fsync status=none
	NET="$NET cram-hmac-alg sha256; shared-secret right;" resource r0 $PORT 0 >"$CONF"
else
	NET="$NET cram-hmac-alg sha256; shared-secret wrong;" resource r0 $PORT 0 >"$CONF"
fi
meet disks

step "a peer with another secret"
type_ "drbdctl create-md --force r0"
type_ "drbdctl up r0"
meet secret-up
[ "$VM_ID" = 2 ] || wrong_state
peers_disagree "another secret" 'authentication of peer failed|authentication'
meet secret
[ "$VM_ID" = 1 ] || strangers
[ "$VM_ID" = 2 ] || check "the engine lives" alive Secondary
type_ "drbdctl down r0"
meet secret-down

step "a peer with another protocol"
if [ "$VM_ID" = 1 ]; then PROTOCOL=C; else PROTOCOL=A; fi
export PROTOCOL
resource r0 $PORT 0 >"$CONF"
type_ "drbdctl up r0"
peers_disagree "another protocol" 'protocol'
meet protocol
type_ "drbdctl down r0"
meet protocol-down

step "a peer with a smaller disk"
PROTOCOL=C
resource r0 $PORT 0 >"$CONF"
type_ "drbdctl up r0"
if [ "$VM_ID" = 1 ]; then
	type_ "drbdctl primary --force r0"
	held_open
fi
meet grown
type_ "drbdctl wait-sync r0"
meet synced
type_ "drbdctl down r0"
meet synced-down
if [ "$VM_ID" = 2 ]; then
	resource r0 $PORT 0 | sed "s,$(disk 0);,$(disk 2);," >"$CONF"
	type_ "drbdctl create-md --force r0"
fi
type_ "drbdctl up r0"
peers_disagree "a smaller disk" 'size'
[ "$VM_ID" = 2 ] || check "own data is still good" is UpToDate disk_state r0
meet small
type_ "drbdctl down r0"
[ "$VM_ID" = 2 ] || number_taken
finish
