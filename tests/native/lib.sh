# Shared by the native tests: two whole engines on this machine's kernel, each with backing files,
# an NBD server and a node name of its own, driven by one script that types on both nodes.
#
# A test runs by itself (`tests/native/story.sh`) or by `scripts/test native`; it needs root. All of
# it happens in fresh network, mount and process name spaces, which take everything with them at
# the end. A node is a network name space with its own host name and /run; or, with
# NODES=loopback set before this file is read, a name for `drbdctl --node` on one host.
#
#   NATIVE_BIN   where ublk-target and drbdctl are (default: target/release)
#   VM_OUT       where evidence goes when a check fails (default: target/test-logs/native-NAME)
#   VM_TIMEOUT   hard limit in seconds; a test gives up 12 s earlier, with evidence
#
# What is told, counted and waited for is as in the guest tests.
# shellcheck shell=bash disable=SC2034 # variables are for the tests

NATIVE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
REPOSITORY=$NATIVE/../..
TEST=$(basename "$0" .sh)
PROGRAMS="drbdctl fio nbdcopy nbdinfo qemu-img qemu-io"

# The lab: started once, by the test itself, which then runs again inside of it.
if [ -z "${LAB:-}" ]; then
	[ "$(id -u)" -eq 0 ] || { echo "$TEST: needs root for name spaces" >&2; exit 1; }
	LAB=$(mktemp -d /var/tmp/native-XXXXXX) || exit 1
	export LAB
	# The test is not the first process there, or it would inherit the engines.
	unshare --net --mount --pid --fork --kill-child --mount-proc \
		bash -c '"$@"; exit $?' lab bash "$(readlink -f "$0")"
	rc=$?
	rm -rf "$LAB"
	exit $rc
fi

VM_ID=0
VM_OUT=${VM_OUT:-$REPOSITORY/target/test-logs/native-$TEST}
VM_TIMEOUT=${VM_TIMEOUT:-72}
. "$NATIVE/../guest/lib.sh"
ME=lab
NODES=${NODES:-namespaces}
# Size of a backing file.
SIZE_MB=${SIZE_MB:-256}

# ---- the two nodes ---------------------------------------------------------------------------

# on NODE COMMAND...: a function or a program, as typed on that node.
on() {
	local -x NODE=$1
	local ME=$1
	shift
	"$@"
}

# Stands in for each of $PROGRAMS: runs the real one on the node that NODE names.
write_programs() {
	local name
	mkdir "$LAB/bin"
	cat >"$LAB/bin/program" <<-'END'
		#!/bin/bash
		name=${0##*/}
		PATH=$NATIVE_BIN:${PATH#"$LAB/bin:"}
		enter=() node=()
		[ ! -e "$LAB/$NODE.pid" ] || enter=(nsenter -t "$(<"$LAB/$NODE.pid")" -n -m -u --wd="$PWD" --)
		[ -e "$LAB/$NODE.pid" ] || [ "$name" != drbdctl ] || node=(--node "$NODE")
		exec "${enter[@]}" "$name" "${node[@]}" "$@"
	END
	chmod +x "$LAB/bin/program"
	for name in $PROGRAMS; do
		ln -s program "$LAB/bin/$name"
	done
	NATIVE_BIN=$(readlink -f "${NATIVE_BIN:-$REPOSITORY/target/release}")
	export NATIVE_BIN
	PATH=$LAB/bin:$PATH:/usr/sbin:/sbin
	[ -x "$NATIVE_BIN/drbdctl" ] && [ -x "$NATIVE_BIN/ublk-target" ] ||
		die "no programs in $NATIVE_BIN: cargo build --release -p ublk-target -p drbdctl"
}

# A process that keeps the name spaces of a node: $LAB/NODE.pid is where to enter them.
make_node() {
	mkfifo "$LAB/$1.fifo"
	ip netns exec "$1" unshare --uts --mount bash -c "
		mount -t tmpfs run /run && mount -t tmpfs lib /var/lib/drbd && hostname $1 && ip link set lo up && echo \$\$ >'$LAB/$1.pid' &&
		exec cat <>'$LAB/$1.fifo'" >/dev/null &
	wait_until 10 [ -s "$LAB/$1.pid" ] || die "no name spaces for $1"
}

make_nodes() {
	local node
	mkdir -p /var/lib/drbd && mount -t tmpfs lib /var/lib/drbd || die "no private /var/lib/drbd"
	mount -t tmpfs run /run && mkdir -p /run/etc/upper /run/etc/work &&
		mount -t overlay etc -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work /etc ||
		die "no private /run and /etc"
	ip link set lo up
	mkdir "$LAB/alice" "$LAB/bob"
	[ "$NODES" = namespaces ] || return 0
	for node in alice bob; do
		ip netns add "$node" || die "no network name space for $node"
	done
	ip link add net0 netns alice type veth peer name net0 netns bob || die "no veth between the nodes"
	ip -n alice addr add 10.0.0.1/24 dev net0
	ip -n bob addr add 10.0.0.2/24 dev net0
	for node in alice bob; do
		ip -n "$node" link set net0 up
		make_node "$node"
	done
}

# cable up|down [NODE]: the cable at one node.
cable() { ip -n "${2:-bob}" link set net0 "$1"; }

# blackhole on|off [NODE]: packets of the replication vanish, and no interface knows.
blackhole() {
	case $1 in
	on)
		ip netns exec "${2:-bob}" nft -f - <<-END
			table inet cut {
				chain input { type filter hook input priority 0; tcp dport $PORT drop; tcp sport $PORT drop; }
				chain output { type filter hook output priority 0; tcp dport $PORT drop; tcp sport $PORT drop; }
			}
		END
		;;
	off) ip netns exec "${2:-bob}" nft delete table inet cut ;;
	esac
}

# The directory of run-time files of a node, seen from the lab.
run_dir() {
	case $NODES in
	namespaces) echo "/proc/$(<"$LAB/$1.pid")/root/run/drbd" ;;
	loopback) echo "/run/drbd/$1" ;;
	esac
}
log_of() { echo "$(run_dir "$1")/${2:-r0}.log"; }
# The socket of the NBD server as the node itself names it.
nbd_socket() {
	case $NODES in
	namespaces) echo "/run/drbd/${2:-r0}.nbd" ;;
	loopback) echo "/run/drbd/$1/${2:-r0}.nbd" ;;
	esac
}
# uri NODE [RES] [VOLUME]: what NBD clients on that node are given.
uri() { echo "nbd+unix:///${3:-0}?socket=$(nbd_socket "$1" "${2:-r0}")"; }
# image NODE [N]: the N-th backing file of a node.
image() { echo "$LAB/$1/d${2:-0}.img"; }
engine_pid() { cat "$(run_dir "$1")/${2:-r0}.lock"; }

# ---- resources -------------------------------------------------------------------------------

# resource NAME PORT FIRST_IMAGE [VOLUMES]: one resource of the pair, on standard output.
# PROTOCOL, NET, DISK and OPTIONS (statements of these sections) come from the environment. A resync
# is as fast as max-buffers lets it be: its default would make most of a test's time.
resource() {
	local node v ip port
	printf 'resource %s {\n' "$1"
	section net "protocol ${PROTOCOL:-C}; max-buffers 8192; ${NET:-}"
	section disk "${DISK:-resync-rate 1G; c-plan-ahead 0;}"
	section options "frontend nbd; ${OPTIONS:-}"
	for node in alice bob; do
		ip=10.0.0.1 port=$2
		[ "$node" = alice ] || ip=10.0.0.2
		[ "$NODES" = namespaces ] || { ip=127.0.0.1 && [ "$node" = alice ] || port=$(($2 + 1000)); }
		printf '    on %s {\n        address %s:%d;\n' "$node" "$ip" "$port"
		for v in $(seq 0 $((${4:-1} - 1))); do
			printf '        volume %d {\n' "$v"
			printf '            device    minor %d;\n' $(($3 + v))
			printf '            disk      %s;\n' "$(image "$node" $(($3 + v)))"
			printf '            meta-disk internal;\n        }\n'
		done
		printf '    }\n'
	done
	printf '}\n'
}

# lab_setup IMAGES: everything is there but metadata and engines; the configuration comes from
# standard input.
lab_setup() {
	local node n
	guard_time
	mkdir -p "$OUT"
	write_programs
	make_nodes
	cat >"$CONF"
	cd "$LAB" || die "no $LAB"
	for node in alice bob; do
		for n in $(seq 0 $((${1:-1} - 1))); do
			truncate -s "${SIZE_MB}M" "$(image "$node" "$n")"
		done
	done
}

# bring_up RES...: metadata, engines and the first synchronisation; alice becomes Primary.
bring_up() {
	local r node
	for r in "$@"; do
		for node in alice bob; do
			on "$node" type_ "drbdctl create-md --force $r"
			on "$node" type_ "drbdctl up $r"
		done
		on alice type_ "drbdctl primary --force $r"
		on alice type_ "drbdctl wait-sync $r"
		both_in_sync "$r"
	done
}

# both_in_sync RES [VOLUME]: both nodes say so, soon.
both_in_sync() {
	local node
	for node in alice bob; do
		must "$1/${2:-0} is in sync, says $node" wait_until 30 on "$node" in_sync "$1" "${2:-0}"
	done
}

# Who is Primary changes from one node to the other.
hand_over() {
	on "$1" type_ "drbdctl secondary ${3:-r0}"
	on "$2" type_ "drbdctl primary ${3:-r0}"
}

# The bytes of a volume, from the node's status.
exposed() { echo $(($(on alice field "${1:-r0}" ".devices[${2:-0}].size") * 1024)); }

# identical NAME [N] [RES] [VOLUME]: the N-th backing files are equal below the metadata.
identical() {
	local bytes
	bytes=$(exposed "${3:-r0}" "${4:-0}")
	note "$1: comparing $bytes bytes"
	check "the size of the volume is known ($1)" [ "$bytes" -gt $((SIZE_MB * 1000000)) ]
	check "backing files identical below the metadata ($1)" \
		cmp -n "$bytes" "$(image alice "${2:-0}")" "$(image bob "${2:-0}")"
}

# received NODE RES [VOLUME]: KiB that came from the peer.
received() { on "$1" peer_device "$2" received "${3:-0}"; }
written() { on "$1" field "${2:-r0}" ".devices[${3:-0}].written"; }
# wrote_more_than NODE KIB [RES]
wrote_more_than() { [ "$(written "$1" "${3:-r0}")" -gt "$2" ]; }
# The size in KiB of the last resync that a node's log announces.
announced() { grep -oE 'will sync [0-9]+ KB' "$(log_of "$1" "${2:-r0}")" | tail -n 1 | grep -oE '[0-9]+'; }
# log_says NODE PATTERN [RES]
log_says() { grep -qE -- "$2" "$(log_of "$1" "${3:-r0}")"; }

# ---- load ------------------------------------------------------------------------------------

# start_load NODE URI REPORT OPTION...: fio in the background, until stop_load; its pid is in LOAD.
start_load() {
	local node=$1 uri=$2 report=$3 before
	shift 3
	printf '%s# fio %s &\n' "$node" "$*"
	before=$(written "$node")
	NODE=$node fio --name=load --ioengine=nbd --uri="$uri" --time_based --runtime=600 \
		--output-format=json --output="$report" "$@" >"$report.err" 2>&1 &
	LOAD=$!
	must "the load runs" wait_until 20 wrote_more_than "$node" $((before + 2048))
}
stop_load() {
	kill -INT "$LOAD" 2>/dev/null
	wait "$LOAD"
}

# ---- what is left, what is kept ----------------------------------------------------------------

# nothing_left NODE RES PORT PID: what down must leave behind. PID is the engine's from before.
nothing_left() {
	local node=$1 res=$2 port=$3 pid=$4 dir
	dir=$(run_dir "$node")
	check "the engine of $node has ended" wait_until 5 [ ! -e "/proc/$pid" ]
	check "no control socket of $res on $node" [ ! -e "$dir/$res.sock" ]
	check "no NBD socket of $res on $node" [ ! -e "$dir/$res.nbd" ]
	check "nobody holds the lock of $res on $node" lock_of_is_free "$dir/$res.lock"
	check "port $port of $node is free" port_of_is_free "$node" "$port"
	check "the backing file of $node is free" file_is_free "$(image "$node")"
}
lock_of_is_free() { [ ! -e "$1" ] || flock -n "$1" true; }
port_of_is_free() {
	case $NODES in
	namespaces) [ -z "$(ip netns exec "$1" ss -Htln "sport = :$2")" ] ;;
	loopback) [ -z "$(ss -Htln "sport = :$2")" ] ;;
	esac
}
# The engine locks its backing files.
file_is_free() { flock -n "$1" true; }

# Asks both nodes and keeps what they say; called by the first check that fails.
evidence() {
	local node log
	for node in alice bob; do
		{
			NODE=$node timeout 5 drbdctl status --verbose --statistics
			NODE=$node timeout 5 drbdctl status --json
			ps -eo pid,ppid,stat,wchan:32,args
		} >"$OUT/state.$node" 2>&1
		for log in "$(run_dir "$node")"/*.log; do
			[ -e "$log" ] || continue
			cp "$log" "$OUT/$node.$(basename "$log")"
			printf '   ---- %s on %s, the last lines\n' "$(basename "$log")" "$node"
			tail -n 20 "$log" | sed 's/^/   | /'
		done
	done
	cp "$CONF" "$OUT"
}
