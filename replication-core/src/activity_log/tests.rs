use super::*;
use crate::limits::{AL_EXTENTS_DEFAULT, AL_EXTENTS_MIN};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

fn acquire(log: &mut ActivityLog, first: u32, last: u32) -> Acquire {
    let answer = log.acquire(AlExtent(first), AlExtent(last));
    log.self_check();
    answer
}

fn release(log: &mut ActivityLog, first: u32, last: u32) {
    log.release(AlExtent(first), AlExtent(last));
    log.self_check();
}

fn log_all(log: &mut ActivityLog) -> AlTransaction {
    let transaction = log.begin_transaction().unwrap();
    log.self_check();
    log.commit_transaction();
    log.self_check();
    transaction
}

/// A log with the extents `0..slots` hot and without references.
fn warm(slots: u16) -> ActivityLog {
    let mut log = ActivityLog::new(slots);
    for extent in 0..u32::from(slots) {
        assert_eq!(log.acquire(AlExtent(extent), AlExtent(extent)), Acquire::Pending);
        log.release(AlExtent(extent), AlExtent(extent));
        if !log.queued.is_full() {
            continue;
        }
        log_all(&mut log);
    }
    if log.pending() {
        log_all(&mut log);
    }
    log
}

#[test]
fn a_write_waits_until_its_extent_is_durable() {
    let mut log = ActivityLog::new(AL_EXTENTS_MIN);
    assert_eq!(acquire(&mut log, 7, 7), Acquire::Pending);
    assert!(log.pending() && !log.in_transaction());
    let transaction = log.begin_transaction().unwrap();
    assert_eq!(transaction.number, 0);
    assert_eq!(transaction.updates[..], [(0, AlExtent(7))]);
    assert!(transaction.evicted.is_empty());
    assert!(!log.pending() && log.in_transaction());
    // A second write to the same extent waits for the same transaction.
    assert_eq!(acquire(&mut log, 7, 7), Acquire::Pending);
    assert!(!log.pending() && !log.is_hot(AlExtent(7), AlExtent(7)));
    assert_eq!(log.extents().count(), 0);
    log.commit_transaction();
    assert!(log.is_hot(AlExtent(7), AlExtent(7)));
    assert_eq!(acquire(&mut log, 7, 7), Acquire::Hot);
    assert_eq!(log.references(AlExtent(7)), 3);
    assert_eq!(log.extents().collect::<Vec<_>>(), [AlExtent(7)]);
}

#[test]
fn only_one_transaction_is_under_way() {
    let mut log = ActivityLog::new(AL_EXTENTS_MIN);
    assert_eq!(log.begin_transaction(), None);
    assert_eq!(acquire(&mut log, 1, 1), Acquire::Pending);
    assert!(log.begin_transaction().is_some());
    assert_eq!(acquire(&mut log, 1, 2), Acquire::Pending);
    assert_eq!(log.begin_transaction(), None);
    log.commit_transaction();
    assert!(!log.is_hot(AlExtent(1), AlExtent(2)));
    let second = log_all(&mut log);
    assert_eq!((second.number, &second.updates[..]), (1, &[(1, AlExtent(2))][..]));
    assert!(log.is_hot(AlExtent(1), AlExtent(2)));
}

#[test]
fn free_slots_go_first_then_the_least_recently_used() {
    let mut log = warm(4);
    assert_eq!(acquire(&mut log, 0, 0), Acquire::Hot);
    release(&mut log, 0, 0);
    assert_eq!(acquire(&mut log, 2, 2), Acquire::Hot);
    // Idle from old to new: 1, 3, 0; 2 is in use.
    assert_eq!(acquire(&mut log, 10, 11), Acquire::Pending);
    let transaction = log_all(&mut log);
    assert_eq!(transaction.updates[..], [(1, AlExtent(10)), (3, AlExtent(11))]);
    assert_eq!(transaction.evicted[..], [AlExtent(1), AlExtent(3)]);
    assert!(log.is_hot(AlExtent(0), AlExtent(0)) && !log.is_hot(AlExtent(1), AlExtent(1)));
    assert_eq!(log.active(), 4);
}

#[test]
fn an_acquisition_takes_all_or_nothing() {
    let mut log = warm(4);
    assert_eq!(acquire(&mut log, 0, 1), Acquire::Hot);
    // Two idle slots, of the extents 2 and 3: enough for two others, or for one beside 3.
    let before = format!("{log:?}");
    assert_eq!(acquire(&mut log, 10, 12), Acquire::Busy);
    assert_eq!(acquire(&mut log, 3, 5), Acquire::Busy);
    assert_eq!(format!("{log:?}"), before, "a refusal changes nothing");
    assert_eq!(acquire(&mut log, 3, 4), Acquire::Pending);
    let transaction = log_all(&mut log);
    assert_eq!(transaction.evicted[..], [AlExtent(2)], "a wanted extent is not evicted");
    assert_eq!(acquire(&mut log, 9, 9), Acquire::Busy);
    release(&mut log, 0, 1);
    assert_eq!(acquire(&mut log, 9, 9), Acquire::Pending);
}

#[test]
fn a_pending_extent_without_references_is_not_evicted() {
    let mut log = ActivityLog::new(1);
    assert_eq!(acquire(&mut log, 1, 1), Acquire::Pending);
    release(&mut log, 1, 1);
    assert_eq!(acquire(&mut log, 2, 2), Acquire::Busy);
    assert!(log.begin_transaction().is_some());
    assert_eq!(acquire(&mut log, 2, 2), Acquire::Busy);
    log.commit_transaction();
    assert_eq!(acquire(&mut log, 2, 2), Acquire::Pending);
    assert_eq!(log_all(&mut log).evicted[..], [AlExtent(1)]);
}

#[test]
fn an_extent_evicted_and_wanted_again_takes_another_slot() {
    let mut log = warm(2);
    assert_eq!(acquire(&mut log, 5, 5), Acquire::Pending);
    assert_eq!(acquire(&mut log, 0, 0), Acquire::Pending);
    let transaction = log_all(&mut log);
    assert_eq!(transaction.updates[..], [(0, AlExtent(5)), (1, AlExtent(0))]);
    assert_eq!(transaction.evicted[..], [AlExtent(0), AlExtent(1)]);
    assert!(log.is_hot(AlExtent(0), AlExtent(0)));
}

#[test]
fn a_full_transaction_makes_the_next_wait() {
    let mut log = ActivityLog::new(AL_EXTENTS_DEFAULT);
    assert_eq!(acquire(&mut log, 0, 63), Acquire::Pending);
    assert_eq!(acquire(&mut log, 100, 100), Acquire::Busy);
    assert_eq!(acquire(&mut log, 60, 63), Acquire::Pending);
    let transaction = log.begin_transaction().unwrap();
    assert_eq!(transaction.updates.len(), 64);
    assert_eq!(acquire(&mut log, 100, 100), Acquire::Pending);
}

#[test]
fn the_largest_discard_fits_into_the_smallest_log() {
    let mut log = warm(AL_EXTENTS_MIN);
    assert_eq!(acquire(&mut log, 1000, 1032), Acquire::Pending);
    assert_eq!(acquire(&mut log, 2000, 2032), Acquire::Busy, "66 changes at once");
    let first = log.begin_transaction().unwrap();
    assert_eq!(acquire(&mut log, 2000, 2032), Acquire::Pending);
    log.commit_transaction();
    assert_eq!(acquire(&mut log, 3000, 3032), Acquire::Busy);
    let second = log_all(&mut log);
    assert_eq!((first.updates.len(), second.updates.len()), (33, 33));
    assert!(log.is_hot(AlExtent(1000), AlExtent(1032)));
    assert!(log.is_hot(AlExtent(2000), AlExtent(2032)));
}

#[test]
fn the_context_shows_all_slots_in_turn() {
    for (slots, starts) in [
        (67, [0, 0, 0, 0]),
        (919, [0, 0, 0, 0]),
        (920, [0, 919, 0, 919]),
        (1237, [0, 919, 0, 919]),
        (1839, [0, 919, 1838, 0]),
    ] {
        let mut log = ActivityLog::new(slots);
        let found = [0, 1, 2, 3].map(|extent| {
            assert_eq!(log.acquire(AlExtent(extent), AlExtent(extent)), Acquire::Pending);
            let transaction = log_all(&mut log);
            assert_eq!(transaction.number, extent);
            transaction.context_start
        });
        assert_eq!(found, starts, "{slots} slots");
    }
    assert_eq!(following_context(64_330, AL_EXTENTS_MAX), 65_249);
    assert_eq!(following_context(65_249, AL_EXTENTS_MAX), 0);
}

#[test]
fn the_number_wraps() {
    let mut log = ActivityLog::new(8);
    log.next_number = u32::MAX;
    assert_eq!(acquire(&mut log, 1, 1), Acquire::Pending);
    assert_eq!(log_all(&mut log).number, u32::MAX);
    assert_eq!(acquire(&mut log, 2, 2), Acquire::Pending);
    assert_eq!(log_all(&mut log).number, 0);
}

#[test]
fn a_reset_log_starts_anew() {
    let mut log = warm(1000);
    assert_eq!(acquire(&mut log, 5000, 5000), Acquire::Pending);
    assert!(!log.is_quiet());
    release(&mut log, 5000, 5000);
    log.reset();
    log.self_check();
    assert_eq!((log.active(), log.pending(), log.slots()), (0, false, 1000));
    assert!(log.slots_before().iter().all(Option::is_none));
    assert_eq!(acquire(&mut log, 5, 5), Acquire::Pending);
    let transaction = log_all(&mut log);
    assert_eq!((transaction.number, transaction.context_start), (0, 0));
}

#[test]
fn nothing_is_allocated_after_creation() {
    let mut log = ActivityLog::new(67);
    let before = (log.entries.as_ptr(), log.entries.capacity());
    for extent in 0..1000 {
        assert_eq!(acquire(&mut log, extent, extent + 32), Acquire::Pending);
        log_all(&mut log);
        release(&mut log, extent, extent + 32);
    }
    assert_eq!((log.entries.as_ptr(), log.entries.capacity()), before);
}

#[test]
#[should_panic(expected = "released too often")]
fn a_release_without_a_reference_is_found() {
    warm(4).release(AlExtent(1), AlExtent(1));
}

#[test]
#[should_panic(expected = "keeps its slot")]
fn a_release_of_an_unknown_extent_is_found() {
    warm(4).release(AlExtent(9), AlExtent(9));
}

#[test]
#[should_panic(expected = "an extent is in use")]
fn a_log_in_use_is_not_reset() {
    let mut log = warm(4);
    assert_eq!(log.acquire(AlExtent(1), AlExtent(1)), Acquire::Hot);
    log.reset();
}

#[test]
#[should_panic(expected = "a transaction is under way")]
fn a_log_in_transaction_is_not_reset() {
    let mut log = ActivityLog::new(4);
    assert_eq!(acquire(&mut log, 1, 1), Acquire::Pending);
    release(&mut log, 1, 1);
    assert!(log.begin_transaction().is_some());
    log.reset();
}

#[test]
#[should_panic(expected = "a transaction is under way")]
fn a_commit_without_a_transaction_is_found() {
    ActivityLog::new(4).commit_transaction();
}

#[test]
#[should_panic(expected = "do not fit into one transaction")]
fn more_extents_than_a_transaction_holds_are_refused() {
    let _ = ActivityLog::new(1000).acquire(AlExtent(0), AlExtent(64));
}

/// What a simple-minded log knows of an extent.
#[derive(Clone, Copy, PartialEq)]
struct Known {
    references: u32,
    stage: Stage,
    /// When it became idle, if it is.
    idle_since: Option<u64>,
}

/// The rules without slots and lists.
struct Model {
    slots: usize,
    extents: BTreeMap<u32, Known>,
    clock: u64,
}

impl Model {
    fn with_stage(&self, stage: Stage) -> usize {
        self.extents.values().filter(|known| known.stage == stage).count()
    }

    fn settle(&mut self, extent: u32) {
        self.clock += 1;
        let known = self.extents.get_mut(&extent).unwrap();
        let is_idle = known.references == 0 && known.stage == Stage::Hot;
        known.idle_since = is_idle.then_some(self.clock);
    }

    fn acquire(&mut self, first: u32, last: u32) -> Acquire {
        let missing: Vec<_> =
            (first..=last).filter(|extent| !self.extents.contains_key(extent)).collect();
        let evictable = self
            .extents
            .iter()
            .filter(|(extent, known)| {
                known.idle_since.is_some() && !(first..=last).contains(*extent)
            })
            .count();
        let room = self.slots - self.extents.len() + evictable;
        if missing.len() > room || missing.len() + self.with_stage(Stage::Queued) > 64 {
            return Acquire::Busy;
        }
        for extent in first..=last {
            if let Some(known) = self.extents.get_mut(&extent) {
                known.references += 1;
                known.idle_since = None;
            }
        }
        for extent in missing {
            if self.extents.len() == self.slots {
                let idle = self.extents.iter().filter_map(|(e, k)| k.idle_since.map(|t| (t, *e)));
                let (_, oldest) = idle.min().unwrap();
                self.extents.remove(&oldest);
            }
            let known = Known { references: 1, stage: Stage::Queued, idle_since: None };
            self.extents.insert(extent, known);
        }
        let is_hot = (first..=last).all(|extent| self.extents[&extent].stage == Stage::Hot);
        if is_hot { Acquire::Hot } else { Acquire::Pending }
    }

    fn release(&mut self, first: u32, last: u32) {
        for extent in first..=last {
            self.extents.get_mut(&extent).unwrap().references -= 1;
            self.settle(extent);
        }
    }
}

/// A block of the log on a disk.
#[derive(Clone)]
struct Block {
    number: u32,
    context: Vec<(u16, Option<AlExtent>)>,
    updates: Vec<(u16, AlExtent)>,
}

/// The ring of blocks on a disk; `None` is a block without a valid update transaction.
#[derive(Clone)]
struct Ring(Vec<Option<Block>>);

impl Ring {
    /// The smallest ring that is allowed for so many slots.
    fn new(slots: u16) -> Self {
        let windows = usize::from(slots).div_ceil(AL_CONTEXT_PER_TRANSACTION);
        Self(vec![None; windows + 1])
    }

    fn place(&mut self, number: u32) -> &mut Option<Block> {
        let len = u32::try_from(self.0.len()).unwrap();
        &mut self.0[usize::try_from(number % len).unwrap()]
    }

    /// What is hot after a crash: contexts and updates from the oldest block to the newest.
    fn replay(&self, slots: u16) -> Vec<Option<AlExtent>> {
        let mut blocks: Vec<_> = self.0.iter().flatten().collect();
        blocks.sort_by_key(|block| block.number);
        let mut found = vec![None; usize::from(slots)];
        for block in blocks {
            for (slot, extent) in &block.context {
                found[usize::from(*slot)] = *extent;
            }
            for (slot, extent) in &block.updates {
                found[usize::from(*slot)] = Some(*extent);
            }
        }
        found
    }
}

#[derive(Clone, Debug)]
enum Step {
    Acquire(u32, u32),
    Release(usize),
    Begin,
    Commit,
}

/// The log beside the model and the disk.
struct Bench {
    log: ActivityLog,
    model: Model,
    ring: Ring,
    /// The block being written.
    under_way: Option<Block>,
    /// Acquired ranges.
    held: Vec<(u32, u32)>,
}

impl Bench {
    fn new(slots: u16) -> Self {
        Self {
            log: ActivityLog::new(slots),
            model: Model { slots: usize::from(slots), extents: BTreeMap::new(), clock: 0 },
            ring: Ring::new(slots),
            under_way: None,
            held: Vec::new(),
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Acquire(first, len) => {
                let last = first + len - 1;
                let answer = self.log.acquire(AlExtent(*first), AlExtent(last));
                assert_eq!(answer, self.model.acquire(*first, last));
                if answer != Acquire::Busy {
                    self.held.push((*first, last));
                }
            }
            Step::Release(at) if !self.held.is_empty() => {
                let (first, last) = self.held.swap_remove(at % self.held.len());
                self.log.release(AlExtent(first), AlExtent(last));
                self.model.release(first, last);
            }
            Step::Release(_) => {}
            Step::Begin => self.begin(),
            Step::Commit => self.commit(),
        }
        self.log.self_check();
        self.compare();
        self.crash();
    }

    fn begin(&mut self) {
        let may_begin = self.under_way.is_none() && self.model.with_stage(Stage::Queued) > 0;
        let transaction = self.log.begin_transaction();
        assert_eq!(transaction.is_some(), may_begin);
        let Some(transaction) = transaction else { return };
        for (_, extent) in &transaction.updates {
            let known = self.model.extents.get_mut(&extent.0).unwrap();
            assert!(known.stage == Stage::Queued);
            known.stage = Stage::Begun;
        }
        assert_eq!(self.model.with_stage(Stage::Queued), 0);
        let slots_before = self.log.slots_before();
        let evicted: Vec<_> = transaction
            .updates
            .iter()
            .filter_map(|(slot, _)| slots_before[usize::from(*slot)])
            .collect();
        assert_eq!(transaction.evicted[..], evicted[..]);
        let start = transaction.context_start;
        let window = (0u16..).zip(slots_before.iter().copied());
        self.under_way = Some(Block {
            number: transaction.number,
            context: window.skip(usize::from(start)).take(AL_CONTEXT_PER_TRANSACTION).collect(),
            updates: transaction.updates.to_vec(),
        });
    }

    fn commit(&mut self) {
        let Some(block) = self.under_way.take() else { return };
        self.log.commit_transaction();
        for (_, extent) in &block.updates {
            self.model.extents.get_mut(&extent.0).unwrap().stage = Stage::Hot;
            self.model.settle(extent.0);
        }
        let number = block.number;
        *self.ring.place(number) = Some(block);
    }

    fn compare(&self) {
        let Self { log, model, .. } = self;
        assert_eq!(log.active(), model.extents.len());
        assert_eq!(log.pending(), model.with_stage(Stage::Queued) > 0);
        assert_eq!(log.in_transaction(), self.under_way.is_some());
        assert_eq!(log.is_quiet(), self.held.is_empty() && !log.in_transaction());
        let hot: BTreeSet<_> = log.extents().map(|extent| extent.0).collect();
        for (extent, known) in &model.extents {
            let extent = AlExtent(*extent);
            assert_eq!(log.references(extent), known.references);
            assert_eq!(log.is_hot(extent, extent), known.stage == Stage::Hot);
            assert_eq!(hot.contains(&extent.0), known.stage == Stage::Hot);
        }
        assert_eq!(hot.len(), model.with_stage(Stage::Hot));
    }

    /// Power fails now: the block under way is not there, torn or complete.
    fn crash(&self) {
        let slots = self.log.slots();
        let absent = self.ring.replay(slots);
        assert_eq!(absent, self.log.slots_before());
        self.assert_covered(&absent);
        if let Some(block) = &self.under_way {
            let mut ring = self.ring.clone();
            *ring.place(block.number) = None;
            assert_eq!(ring.replay(slots), absent, "a torn block takes nothing with it");
            *ring.place(block.number) = Some(block.clone());
            self.assert_covered(&ring.replay(slots));
        }
    }

    /// Every extent that may be written to now is among those found after the crash.
    fn assert_covered(&self, found: &[Option<AlExtent>]) {
        let found: BTreeSet<_> = found.iter().flatten().map(|extent| extent.0).collect();
        for (extent, known) in &self.model.extents {
            if known.stage == Stage::Hot && known.references > 0 {
                assert!(found.contains(extent), "extent {extent} is lost in a crash");
            }
        }
    }
}

fn step(extents: u32) -> impl Strategy<Value = Step> {
    let len = prop_oneof![6 => Just(1u32), 2 => 1u32..5, 1 => 1u32..=33, 1 => 1u32..=64];
    prop_oneof![
        6 => (0..extents, len).prop_map(|(first, len)| Step::Acquire(first, len)),
        5 => any::<usize>().prop_map(Step::Release),
        3 => Just(Step::Begin),
        3 => Just(Step::Commit),
    ]
}

fn log_and_steps() -> impl Strategy<Value = (u16, Vec<Step>)> {
    let slots = prop_oneof![3 => 1u16..12, 3 => Just(AL_EXTENTS_MIN), 1 => 900u16..2000];
    slots.prop_flat_map(|slots| {
        let extents = u32::from(slots) * 2;
        (Just(slots), prop::collection::vec(step(extents), 0..150))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn behaves_like_the_model_and_survives_a_crash_at_any_step((slots, steps) in log_and_steps()) {
        let mut bench = Bench::new(slots);
        for step in &steps {
            bench.step(step);
        }
    }
}

#[test]
fn a_long_run_over_several_context_windows_survives_crashes() {
    // Slots in three windows, the ring has four blocks; every slot changes hands several times.
    let mut bench = Bench::new(1900);
    for round in 0..200u32 {
        let first = round.wrapping_mul(2_654_435_761) % 6000;
        bench.step(&Step::Acquire(first, 1 + round % 33));
        bench.step(&Step::Begin);
        bench.step(&Step::Acquire(first + 7, 1 + round % 5));
        bench.step(&Step::Commit);
        bench.step(&Step::Release(usize::try_from(round).unwrap()));
        bench.step(&Step::Release(0));
    }
    assert_eq!(bench.log.active(), 1900);
    assert!(bench.log.next_number >= 200);
}
