//! The engine while memory is short: it must never wait for its own device (FE-3).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Bed, pattern};

/// Flags of a thread in `/proc/PID/task/TID/stat` that PR_SET_IO_FLUSHER sets: memory is made free
/// for it without I/O, and it is not slowed down as a writer.
const IO_FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;
/// Index of the flags behind the name, which ends with the last bracket.
const FLAGS: usize = 6;

/// An engine in sync, at work.
fn busy() -> Bed {
    let bed = Bed::synced(32);
    let mut client = bed.alice.nbd();
    assert_eq!(client.write(0, &pattern(3, 1 << 20)), 0);
    bed
}

/// No thread can be made to wait for I/O by its need of memory. Without the right to ask for that,
/// the engine says so.
#[test]
fn no_thread_waits_for_its_own_device() {
    let bed = busy();
    let log = bed.alice.log();
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", bed.alice.pid())).unwrap() {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
        let (name, fields) = stat.rsplit_once(") ").unwrap();
        let flags: u64 = fields.split(' ').nth(FLAGS).unwrap().parse().unwrap();
        let is_flusher = flags & IO_FLUSHER == IO_FLUSHER;
        assert_eq!(is_flusher, !log.contains("PR_SET_IO_FLUSHER"), "{name}) {flags:#x}\n{log}");
        threads += 1;
    }
    assert!(threads > 1, "the ring has a thread of its own");
}

/// Memory of its own cannot be taken away, whenever it was made. Without the right to lock it, the
/// engine says so.
#[test]
fn all_memory_is_locked() {
    let bed = busy();
    let log = bed.alice.log();
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", bed.alice.pid())).unwrap();
    let mut place = "";
    let mut unlocked = Vec::new();
    for line in maps.lines() {
        let Some(flags) = line.strip_prefix("VmFlags: ") else {
            if line.split(' ').next().is_some_and(|first| first.contains('-')) {
                place = line;
            }
            continue;
        };
        let has = |flag| flags.split(' ').any(|found| found == flag);
        // What belongs to a device or the kernel is not paged.
        if has("wr") && !has("lo") && !has("io") && !has("pf") && !has("mm") {
            unlocked.push(place);
        }
    }
    let is_told = log.contains("memory is not locked");
    assert_eq!(unlocked.is_empty(), !is_told, "not locked: {unlocked:#?}\n{log}");
}
