# Shared by the guest tests: what an operator types, what is checked, and what is kept when a
# check fails. Sourced by bash in a node's directory, with vmctl (scripts/vm/README.md) in PATH.
#
# A node is a guest (scripts/vm/run) or a network namespace (scripts/nodes). Both set VM_ID,
# VM_PEER and VM_BOOT; the second also VM_DISK_PREFIX and VM_MINOR_STEP, because there the two
# nodes share one kernel.
# shellcheck shell=bash

set -u
export LC_ALL=C.UTF-8
PATH=$PWD:$PATH
OUT=${VM_OUT:-/guest/out}
ME=g$VM_ID
PEER=g${VM_PEER:-}
CONF=/etc/drbd.conf
PORT=7789
PASSED=0
FAILED=0
# A descriptor that never has anything to read: read -t on it is the clock of wait_until.
exec {NEVER}<> <(:)

# ---- what is told and counted ----------------------------------------------------------------

step() { printf '\n== %s: %s\n' "$ME" "$*"; }

note() { printf '   %s\n' "$*"; }

pass() {
	PASSED=$((PASSED + 1))
	printf '   ok: %s\n' "$*"
}

fail() {
	FAILED=$((FAILED + 1))
	printf '   NOT OK: %s\n' "$*"
	[ "$FAILED" -gt 1 ] || evidence
}

# Nothing that follows would mean anything.
die() {
	fail "$@"
	finish
}

finish() {
	printf '\n== %s: checks: %d passed, %d failed\n' "$ME" "$PASSED" "$FAILED"
	[ "$PASSED" -gt 0 ] && [ "$FAILED" -eq 0 ]
	exit $?
}

# check DESCRIPTION COMMAND...: counts; the test goes on either way.
check() {
	local what=$1
	shift
	if "$@"; then pass "$what"; else fail "$what ($*)"; fi
}

# must DESCRIPTION COMMAND...: the same, but without it the rest makes no sense.
must() {
	local what=$1
	shift
	if "$@"; then pass "$what"; else die "$what ($*)"; fi
}

# type_ 'COMMAND LINE': typed as an operator would; shown with what came of it; must succeed.
type_() {
	printf '%s# %s\n' "$ME" "$1"
	OUTPUT=$(eval "$1" 2>&1)
	RC=$?
	[ -z "$OUTPUT" ] || printf '%s\n' "$OUTPUT" | sed 's/^/    /'
	[ "$RC" -eq 0 ] || die "exit code $RC: $1"
}

# refused CODE[,CODE] PATTERN 'COMMAND LINE': must fail with that exit code and say PATTERN.
refused() {
	printf '%s# %s\n' "$ME" "$3"
	OUTPUT=$(eval "$3" 2>&1)
	RC=$?
	[ -z "$OUTPUT" ] || printf '%s\n' "$OUTPUT" | sed 's/^/    /'
	case ,$1, in
	*,$RC,*) ;;
	*)
		fail "exit code $RC instead of $1: $3"
		return
		;;
	esac
	if grep -qiE -- "$2" <<<"$OUTPUT"; then
		pass "refused with exit code $RC: $3"
	else
		fail "exit code $RC, but the message does not say '$2': $3"
	fi
}

# ---- waiting ---------------------------------------------------------------------------------

# The time between two looks at a condition; the only pause in these tests.
pause_() { ! read -r -t 0.2 -u "$NEVER"; }

# wait_until SECONDS COMMAND...: returns as soon as the command succeeds, fails after SECONDS.
wait_until() {
	local end=$((SECONDS + $1))
	shift
	until "$@"; do
		[ "$SECONDS" -lt "$end" ] || return 1
		pause_
	done
	return 0
}

# Both nodes have come here.
meet() { vmctl barrier "$1" || die "the other node did not come to '$1'"; }
tell() { vmctl set "$@"; }
ask() { vmctl wait "$1"; }

# ---- what is kept when something fails -------------------------------------------------------

evidence() {
	local pid log
	mkdir -p "$OUT"
	{
		timeout 5 drbdctl status --verbose --statistics 2>&1
		timeout 5 drbdctl status --json 2>&1
		ps -eo pid,ppid,stat,wchan:32,args
		ss -tanp
		ls -l /dev/ublk* /dev/drbd* /run/drbd
		for pid in $(pgrep -x ublk-target); do
			grep -E '^(State|Threads|Vm)' "/proc/$pid/status"
			for log in /proc/"$pid"/task/*/stack; do
				echo "$log"
				cat "$log"
			done
		done
	} >"$OUT/state" 2>&1
	cp "$CONF" /run/drbd/*.log "$OUT" 2>/dev/null
	dmesg >"$OUT/dmesg" 2>/dev/null
	for log in /run/drbd/*.log; do
		[ -e "$log" ] || continue
		printf '   ---- %s, the last lines\n' "$log"
		tail -n 20 "$log" | sed 's/^/   | /'
	done
}

# The runner ends a test at its time limit without asking; be ready a little earlier.
on_time_limit() {
	trap - TERM
	die "the time limit of $VM_TIMEOUT s is near"
}

guard_time() {
	local main=$$ left=$((VM_TIMEOUT - 12 - SECONDS))
	trap on_time_limit TERM
	(
		trap - TERM
		read -r -t "$left" -u "$NEVER"
		kill -TERM "$main"
		# What the script waits for in the foreground holds the trap back: end it too.
		for pid in $(pgrep -P "$main"); do
			[ "$pid" = "$BASHPID" ] || kill -TERM "$pid" 2>/dev/null
		done
	) </dev/null &
}

# ---- the nodes' resources --------------------------------------------------------------------

disk() { echo "${VM_DISK_PREFIX:-/dev/d}$1"; }

# minor N [NODE]: this node's minor for the N-th device of the test.
minor() { echo $(($1 + (${2:-$VM_ID} - 1) * ${VM_MINOR_STEP:-0})); }
device() { echo "/dev/drbd$(minor "$1")"; }

# resource NAME PORT FIRST_DEVICE [VOLUMES]: one resource of the pair, on standard output.
# PROTOCOL, NET and DISK (statements of these sections) come from the environment.
resource() {
	local node v
	printf 'resource %s {\n' "$1"
	section net "protocol ${PROTOCOL:-C}; ${NET:-}"
	section disk "${DISK:-resync-rate 400M; c-plan-ahead 0;}"
	for node in 1 2; do
		printf '    on g%d {\n        address 10.0.0.%d:%d;\n' "$node" "$node" "$2"
		for v in $(seq 0 $((${4:-1} - 1))); do
			printf '        volume %d {\n' "$v"
			printf '            device    /dev/drbd%d;\n' "$(minor $(($3 + v)) "$node")"
			printf '            disk      %s;\n' "$(disk $(($3 + v)))"
			printf '            meta-disk internal;\n        }\n'
		done
		printf '    }\n'
	done
	printf '}\n'
}

# section NAME 'STATEMENT; STATEMENT;': one statement a line.
section() {
	printf '    %s {\n' "$1"
	tr ';' '\n' <<<"$2" | sed -n 's/^ *\([^ ].*\)/        \1;/p'
	printf '    }\n'
}

# Ready for drbdctl: driver loaded, a fresh configuration from standard input (not from a pipe:
# the time guard and the exit must be those of the script itself).
node_setup() {
	[ -z "${VM_TIMEOUT:-}" ] || guard_time
	mkdir -p /etc/drbd.d "$OUT"
	cat >"$CONF"
	modprobe ublk_drv 2>/dev/null
	[ -e /dev/ublk-control ] || [ -n "${VM_REFERENCE:-}" ] || die "this kernel has no ublk (/dev/ublk-control)"
}

# field RES JQ-EXPRESSION: one value of status --json, empty when the engine does not answer.
field() { timeout 10 drbdctl status "$1" --json 2>/dev/null | jq -r "first(.[]) | $2" 2>/dev/null; }

role_of() { field "$1" .role; }
peer_role() { field "$1" '.connections[0]."peer-role"'; }
connection() { field "$1" '.connections[0]."connection-state"'; }
disk_state() { field "$1" ".devices[${2:-0}].\"disk-state\""; }
peer_device() { field "$1" ".connections[0].peer_devices[${3:-0}].\"$2\""; }
replication() { peer_device "$1" replication-state "${2:-0}"; }
out_of_sync() { peer_device "$1" out-of-sync "${2:-0}"; }

# The middle is how an operator reads it; the rest is for conditions.
is() {
	local want=$1
	shift
	[ "$("$@")" = "$want" ]
}
is_not() { ! is "$@"; }

in_sync() {
	is Connected connection "$1" &&
		is "UpToDate UpToDate Established" sync_words "$1" "${2:-0}"
}
sync_words() { echo "$(disk_state "$1" "$2") $(peer_device "$1" peer-disk-state "$2") $(replication "$1" "$2")"; }

# Prints how far the synchronisation is whenever it has moved; counts that in PROGRESS.
watch_sync() {
	local last='' now end=$((SECONDS + ${2:-60}))
	PROGRESS=0
	until in_sync "$1"; do
		[ "$SECONDS" -lt "$end" ] || return 1
		now=$(field "$1" '.connections[0].peer_devices[0] |
			select(."has-sync-details") | "\(."replication-state") done:\(."percent-in-sync")"')
		if [ -n "$now" ] && [ "$now" != "$last" ]; then
			note "$now"
			last=$now
			PROGRESS=$((PROGRESS + 1))
		fi
		pause_
	done
	return 0
}

# Metadata, engine and first synchronisation of resources on both nodes; g1 becomes Primary.
bring_up() {
	local r
	for r in "$@"; do
		type_ "drbdctl create-md --force $r"
		type_ "drbdctl up $r"
	done
	meet "up-$*"
	for r in "$@"; do
		[ "$VM_ID" = 2 ] || type_ "drbdctl primary --force $r"
	done
	for r in "$@"; do
		type_ "drbdctl wait-sync $r"
		must "$r is UpToDate on both sides" wait_until 60 in_sync "$r"
	done
	meet "synced-$*"
}

# The size of the replicated device in bytes; asked of the kernel without opening the device.
size_of() { echo $((512 * $(cat "/sys/class/block/$(basename "$(readlink -f "$(device "$1")")")/size"))); }

# content N: a digest of the N-th backing disk below the metadata, past every cache. MD5 finds what
# is not equal by mistake, in half the time of the better ones; guests are slow.
content() {
	dd if="$(disk "$1")" bs=1M iflag=direct,count_bytes count="$(size_of "$1")" status=none |
		md5sum | cut -d ' ' -f 1
}

# identical NAME N: the N-th backing disks of both nodes are equal byte for byte.
identical() {
	local mine other
	mine=$(content "$2")
	tell "content-$1-$ME" "$mine"
	other=$(ask "content-$1-$PEER")
	note "$ME $mine"
	check "backing disks identical below the metadata ($1)" same "$mine" "$other"
}

# fio_report FILE EXPRESSION: a value from fio's JSON; before it fio may say that it was interrupted.
fio_report() { sed -n '/^{/,$p' "$1" | jq "$2"; }

# write_and_compare NAME 'RES...' DEVICE...: load on the devices of g1, then identity on both nodes.
write_and_compare() {
	local name=$1 resources=$2 d r
	shift 2
	if [ "$VM_ID" = 1 ]; then
		for d in "$@"; do
			type_ "fio --name=$name-$d --filename=$(device "$d") --size=4M --rw=randwrite --bs=4k --direct=1 \
--iodepth=4 --ioengine=io_uring --verify=crc32c --minimal --output=/tmp/fio"
		done
		for r in $resources; do
			type_ "drbdctl secondary $r"
		done
	fi
	meet "written-$name"
	# With protocol A writes may still be on their way; the change of role travels behind them.
	for r in $resources; do
		[ "$VM_ID" = 1 ] || must "g1 is Secondary for $r" wait_until 20 is Secondary peer_role "$r"
	done
	meet "arrived-$name"
	for r in $resources; do
		check "$r is in sync after the load" wait_until 10 in_sync "$r"
	done
	for d in "$@"; do
		identical "$name-$d" "$d"
	done
	meet "compared-$name"
}

# will_sync RES: the size in KiB of the last resync that the engine's log announces.
will_sync() { grep -oE 'will sync [0-9]+ KB' "/run/drbd/$1.log" | tail -n 1 | grep -oE '[0-9]+'; }

same() { [ -n "$1" ] && [ "$1" = "$2" ]; }
between() { [ -n "$2" ] && [ "$1" -le "$2" ] && [ "$2" -le "$3" ]; }

# Can the disk be opened exclusively: nobody holds it.
disk_is_free() {
	python3 -c 'import os, sys; os.close(os.open(sys.argv[1], os.O_RDWR | os.O_EXCL))' "$(disk "$1")" 2>/dev/null
}
port_is_free() { [ -z "$(ss -Htln "sport = :$1")" ]; }

# nothing_left RES PORT DEVICE...: what down must leave behind.
nothing_left() {
	local res=$1 port=$2 d
	shift 2
	check "no engine process for $res" wait_until 10 no_engine "$res"
	for d in "$@"; do
		check "no device $(device "$d")" [ ! -e "$(device "$d")" ]
		check "disk $(disk "$d") is free" disk_is_free "$d"
	done
	check "no control socket /run/drbd/$res.sock" [ ! -e "/run/drbd/$res.sock" ]
	check "port $port is free" port_is_free "$port"
	check "nobody holds the lock of $res" lock_is_free "$res"
}
lock_is_free() { [ ! -e "/run/drbd/$1.lock" ] || flock -n "/run/drbd/$1.lock" true; }
no_engine() { [ -z "$(pgrep -f "ublk-target .*$1")" ]; }
no_ublk_left() { [ -z "$(compgen -G '/dev/ublkb*')$(compgen -G '/dev/ublkc*')" ]; }
