//! After a warm-up, no replicated write makes the ring thread of either node ask for memory, also
//! when it moves the activity log: under memory pressure an allocation would wait for the very
//! device that the engine serves (LV-2).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Bed, Node, pattern};
use replication_core::control::Command;

/// The system's allocator, which counts what ring threads ask of it.
struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);
static PLACES: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// This is a ring thread, and it is not busy with counting.
    static IS_COUNTED: Cell<bool> = const { Cell::new(false) };
}

/// Counts an allocation, and remembers where the first ones were wanted.
fn count() {
    if !IS_COUNTED.try_with(|is_counted| is_counted.replace(false)).unwrap_or(false) {
        return;
    }
    if COUNT.fetch_add(1, Ordering::Relaxed) < 20 {
        let place = std::backtrace::Backtrace::force_capture().to_string();
        PLACES.lock().unwrap().push(place);
    }
    IS_COUNTED.set(true);
}

// SAFETY: every call is handed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the rules of this very function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the memory came from the system's allocator, as all of it does.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above, and the caller keeps the rules of this very function.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs a node's engine on a thread of this process.
fn start(node: &Node) -> std::thread::JoinHandle<()> {
    let config = node.config.clone();
    std::thread::spawn(move || {
        let signals = ublk_target::engine::block_signals().unwrap();
        IS_COUNTED.set(true);
        ublk_target::engine::run(config, true, signals).unwrap();
        IS_COUNTED.set(false);
    })
}

/// More extents than [`LOG`] holds.
const AREA: u64 = 60 << 20;
const LOG: u16 = 7;

/// Writes all over the device, as a host does: some alone, most of them many at a time, with a
/// flush and a read now and then.
fn write(client: &mut common::nbd::Client, rounds: u64) {
    let data = pattern(rounds, 4096);
    for round in 0..rounds {
        let depth = if round % 4 == 0 { 1 } else { 16 };
        for number in 0..depth {
            let offset = (round * 41 + number) * 65536 % AREA;
            client.send(common::nbd::WRITE, 0, offset, 4096, &data);
        }
        for _ in 0..depth {
            assert_eq!(client.answer().0, 0);
        }
        if round % 10 == 0 {
            assert_eq!(client.flush(), 0);
            assert_eq!(client.read(round * 41 * 65536 % AREA, 4096).unwrap(), data);
        }
    }
}

#[test]
fn no_replicated_write_allocates() {
    let mut bed = Bed::with(64, |config| config.resource.volumes[0].disk.al_extents = LOG);
    let engines = [start(&bed.alice), start(&bed.bob)];
    bed.alice.wait_for_socket();
    bed.bob.wait_for_socket();
    bed.alice.wait_for("a connection", |status| status.volumes[0].cstate == "Connected");
    bed.alice.ask(Command::Primary { force: true }).unwrap();
    bed.wait_for_sync();
    let mut client = bed.alice.nbd();
    write(&mut client, 80);
    let before = COUNT.swap(0, Ordering::Relaxed);
    assert!(before > 0, "the start was not counted");
    PLACES.lock().unwrap().clear();
    write(&mut client, 60);
    let found = COUNT.load(Ordering::Relaxed);
    let places = std::mem::take(&mut *PLACES.lock().unwrap());
    assert_eq!(found, 0, "allocations, the first of them:\n{}", places.join("\n"));
    drop(client);
    bed.alice.wait_for("a closed device", |status| !status.volumes[0].open);
    for node in [&mut bed.alice, &mut bed.bob] {
        node.ask(Command::Down { holder: None, force: true }).unwrap();
    }
    for engine in engines {
        engine.join().unwrap();
    }
}
