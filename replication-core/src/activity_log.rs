//! Which 4 MiB extents of the device may hold writes that the peer does not have yet.
//!
//! After the crash of a primary only the blocks of these extents are synchronised again. The log
//! in memory is an LRU set of extents, each in a numbered slot, with a count of the writes that
//! rely on it. An extent becomes *hot*, and a write to it may go to the disk, when the transaction
//! that put it into its slot is durable. This module decides which extents take which slots and
//! what a transaction contains; its shape on the disk belongs to `meta`, and so does writing
//! the bitmap pages of evicted extents and flushing the data device before the transaction.
//!
//! Life of an extent: [`acquire`](ActivityLog::acquire) gives it a slot and queues the change;
//! [`begin_transaction`](ActivityLog::begin_transaction) takes all queued changes at once;
//! [`commit_transaction`](ActivityLog::commit_transaction) makes them hot. When its last reference
//! goes it stays, and writes to it stay cheap, until its slot is needed for another extent.
//!
//! # What callers owe
//! - **Order of waiting** (AL-8). A request that got [`Acquire::Busy`] waits in a queue, and later
//!   requests that need a new extent wait behind it. Then all earlier references go away in time
//!   and even the largest request finds its slots; without a queue, small requests could starve it.
//!   To be tried again after each release, begin and commit.
//! - **Eviction** (AL-3). Before a transaction is written, the bitmap pages of its evicted extents
//!   are durable and the data device's cache is flushed.
//! - **Failure** (AL-4). There is no way to withdraw a transaction: if one fails, the disk fails.
//!
//! # Limits
//! One transaction carries at most 64 changes. An acquisition that would add more than fit to the
//! queued ones is busy until the next transaction begins; a single acquisition is never split, so
//! it spans at most 64 extents. The largest request, a discard of 128 MiB, touches 33.
//!
//! Invariants kept:
//! - AL-1: an extent with a reference is never evicted, nor is one whose transaction is under way.
//! - AL-2: nothing is hot before the transaction that logged it is durable.
//! - AL-7: references are counted; when to release is the caller's decision.
//! - AL-8: an acquisition takes all of its extents or none, so two of them never block each other.
//! - LV-2: nothing allocates after creation.
//!
//! Source: metadata notes, sections 4 and 5.

use arrayvec::ArrayVec;

use crate::limits::{
    AL_CONTEXT_PER_TRANSACTION, AL_EXTENTS_MAX, AL_UPDATES_PER_TRANSACTION as MAX_UPDATES,
};
use crate::units::AlExtent;

#[cfg(test)]
mod tests;

/// Answer to the wish to write to some extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Acquire {
    /// All extents are in the durable log and referenced: the write may start.
    Hot,
    /// All extents have slots and are referenced, but the write must wait until
    /// [`ActivityLog::is_hot`]: one or two transactions have to become durable first.
    Pending,
    /// Not enough slots, or the next transaction is full; nothing was changed. The caller queues
    /// and tries again.
    Busy,
}

/// The changes that one transaction brings to the log on the disk.
///
/// Its context is what [`ActivityLog::slots_before`] says of up to 919 slots from
/// `context_start` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlTransaction {
    /// Counts from 0 and wraps.
    pub number: u32,
    /// Slots that change, with the extent that each of them holds from now on.
    pub updates: ArrayVec<(u16, AlExtent), MAX_UPDATES>,
    /// What these slots held until now: the bits of these extents must be durable before the
    /// transaction is written.
    pub evicted: ArrayVec<AlExtent, MAX_UPDATES>,
    /// The first slot of the context.
    pub context_start: u16,
}

/// How far an extent is on its way into the durable log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Waits for the next transaction.
    Queued,
    /// Part of the transaction under way.
    Begun,
    /// Durable.
    Hot,
}

/// A slot that holds an extent. Slots are named by `u16` numbers below [`AL_EXTENTS_MAX`].
#[derive(Debug)]
struct Entry {
    extent: AlExtent,
    references: u32,
    stage: Stage,
    /// Next slot in the same bucket of the index.
    chain: Option<u16>,
    /// Neighbours in the list of idle slots.
    older: Option<u16>,
    newer: Option<u16>,
}

impl Entry {
    /// Whether the slot may be given to another extent.
    fn is_idle(&self) -> bool {
        self.references == 0 && self.stage == Stage::Hot
    }
}

/// The activity log of one volume.
#[derive(Debug)]
pub struct ActivityLog {
    slots: u16,
    /// The slots in use are the first ones: a slot never becomes free again, only changes hands.
    entries: Vec<Entry>,
    /// Heads of the chains of slots, by the hash of their extents; a power of two of them.
    buckets: Vec<Option<u16>>,
    /// Idle slots from the least to the most recently used one.
    oldest: Option<u16>,
    newest: Option<u16>,
    idle: usize,
    /// Slots that change with the next transaction.
    queued: ArrayVec<u16, MAX_UPDATES>,
    /// Slots that change with the transaction under way.
    begun: Option<ArrayVec<u16, MAX_UPDATES>>,
    /// What the slots on the disk hold.
    durable: Vec<Option<AlExtent>>,
    next_number: u32,
    next_context: u16,
}

impl ActivityLog {
    /// An empty log of `slots` slots over an empty log on the disk.
    ///
    /// # Panics
    /// If `slots` is 0 or above [`AL_EXTENTS_MAX`]. (The least that may be configured is a rule of
    /// the configuration.)
    #[must_use]
    pub fn new(slots: u16) -> Self {
        assert!(slots > 0, "a log without slots would block every write");
        assert!(slots <= AL_EXTENTS_MAX, "{slots} slots do not fit into the format");
        let count = usize::from(slots);
        Self {
            slots,
            entries: Vec::with_capacity(count),
            // At least two, so that the hash is shifted by less than its width.
            buckets: vec![None; count.next_power_of_two().max(2)],
            oldest: None,
            newest: None,
            idle: 0,
            queued: ArrayVec::new(),
            begun: None,
            durable: vec![None; count],
            next_number: 0,
            next_context: 0,
        }
    }

    /// Takes a reference to each extent from `first` to `last` (inclusive), or changes nothing.
    ///
    /// New extents get free slots first, then those of the least recently used extents without
    /// references.
    ///
    /// # Panics
    /// If `last` is before `first`, or the range has more extents than one transaction can log.
    pub fn acquire(&mut self, first: AlExtent, last: AlExtent) -> Acquire {
        let wanted = extents_of(first, last);
        let (mut missing, mut idle_wanted) = (0, 0);
        let mut is_hot = true;
        let mut held = ArrayVec::<Option<u16>, MAX_UPDATES>::new();
        for extent in wanted.clone() {
            let slot = self.find(extent);
            held.push(slot);
            match slot.map(|slot| self.entry(slot)) {
                None => missing += 1,
                Some(entry) => {
                    is_hot &= entry.stage == Stage::Hot;
                    idle_wanted += usize::from(entry.is_idle());
                }
            }
        }
        // An idle slot of a wanted extent is no room for another wanted one.
        let room = usize::from(self.slots) - self.entries.len() + self.idle - idle_wanted;
        if missing > room || missing > self.queued.remaining_capacity() {
            return Acquire::Busy;
        }
        // First all that is there: a reference protects it from the evictions that follow.
        for slot in held.iter().flatten() {
            self.reference(*slot);
        }
        for (extent, _) in wanted.zip(&held).filter(|(_, slot)| slot.is_none()) {
            let slot = self.assign(extent);
            self.reference(slot);
        }
        if missing == 0 && is_hot { Acquire::Hot } else { Acquire::Pending }
    }

    /// Whether each extent from `first` to `last` is in the durable log and will stay there while
    /// it is referenced.
    ///
    /// # Panics
    /// As [`Self::acquire`].
    #[must_use]
    pub fn is_hot(&self, first: AlExtent, last: AlExtent) -> bool {
        extents_of(first, last).all(|extent| {
            self.find(extent).is_some_and(|slot| self.entry(slot).stage == Stage::Hot)
        })
    }

    /// Gives back one reference to each extent from `first` to `last`; also possible while they
    /// are pending.
    ///
    /// # Panics
    /// If one of them is not referenced, and as [`Self::acquire`].
    pub fn release(&mut self, first: AlExtent, last: AlExtent) {
        for extent in extents_of(first, last) {
            let slot = self.find(extent).expect("a referenced extent keeps its slot");
            let entry = self.entry_mut(slot);
            assert!(entry.references > 0, "extent {} was released too often", extent.0);
            entry.references -= 1;
            if entry.is_idle() {
                self.push_newest(slot);
            }
        }
    }

    /// Whether changes wait for a transaction to begin.
    #[must_use]
    pub fn pending(&self) -> bool {
        !self.queued.is_empty()
    }

    /// Whether a transaction has begun and is not durable yet.
    #[must_use]
    pub fn in_transaction(&self) -> bool {
        self.begun.is_some()
    }

    /// Takes all waiting changes into a transaction; `None` if there are none or a transaction is
    /// under way.
    pub fn begin_transaction(&mut self) -> Option<AlTransaction> {
        if self.in_transaction() || !self.pending() {
            return None;
        }
        let slots = std::mem::take(&mut self.queued);
        let mut transaction = AlTransaction {
            number: self.next_number,
            updates: ArrayVec::new(),
            evicted: ArrayVec::new(),
            context_start: self.next_context,
        };
        for slot in &slots {
            let entry = self.entry_mut(*slot);
            assert!(entry.stage == Stage::Queued, "slot {slot} was queued twice");
            entry.stage = Stage::Begun;
            transaction.updates.push((*slot, entry.extent));
            transaction.evicted.extend(self.durable[usize::from(*slot)]);
        }
        self.begun = Some(slots);
        self.next_number = self.next_number.wrapping_add(1);
        self.next_context = following_context(self.next_context, self.slots);
        Some(transaction)
    }

    /// The transaction under way is durable: its extents are hot.
    ///
    /// # Panics
    /// If no transaction is under way.
    pub fn commit_transaction(&mut self) {
        let slots = self.begun.take().expect("a transaction is under way");
        for slot in slots {
            let entry = self.entry_mut(slot);
            assert!(entry.stage == Stage::Begun, "slot {slot} changed during its transaction");
            entry.stage = Stage::Hot;
            let (extent, is_idle) = (entry.extent, entry.is_idle());
            self.durable[usize::from(slot)] = Some(extent);
            if is_idle {
                self.push_newest(slot);
            }
        }
    }

    /// What the slots on the disk hold, without the transaction under way: the source of its
    /// context.
    #[must_use]
    pub fn slots_before(&self) -> &[Option<AlExtent>] {
        &self.durable
    }

    /// Number of slots in use, their extents hot or on the way.
    #[must_use]
    pub fn active(&self) -> usize {
        self.entries.len()
    }

    /// The hot extents in the order of their slots.
    pub fn extents(&self) -> impl Iterator<Item = AlExtent> {
        self.entries.iter().filter(|entry| entry.stage == Stage::Hot).map(|entry| entry.extent)
    }

    /// Number of references to `extent`.
    #[must_use]
    pub fn references(&self, extent: AlExtent) -> u32 {
        self.find(extent).map_or(0, |slot| self.entry(slot).references)
    }

    /// Whether there is no reference and no transaction under way, as [`Self::reset`] demands.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        !self.in_transaction() && self.entries.iter().all(|entry| entry.references == 0)
    }

    /// Number of slots.
    #[must_use]
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// The log on the disk was written anew and is empty: so is this one, and the next
    /// transaction has number 0. Waiting changes without references are dropped.
    ///
    /// # Panics
    /// If an extent is referenced or a transaction is under way: writes would go on in extents
    /// that no log knows (AL-1).
    pub fn reset(&mut self) {
        assert!(!self.in_transaction(), "a transaction is under way");
        assert!(self.is_quiet(), "an extent is in use");
        self.entries.clear();
        self.buckets.fill(None);
        (self.oldest, self.newest, self.idle) = (None, None, 0);
        self.queued.clear();
        self.durable.fill(None);
        (self.next_number, self.next_context) = (0, 0);
    }

    /// Walks over the whole log and compares what is kept twice.
    ///
    /// # Panics
    /// If the log contradicts itself.
    pub fn self_check(&self) {
        assert!(self.entries.len() <= usize::from(self.slots), "more extents than slots");
        assert!(self.next_context < self.slots, "the context starts behind the last slot");
        let begun = self.begun.as_deref().unwrap_or_default();
        for (slot, entry) in (0u16..).zip(&self.entries) {
            // An extent in two slots would be found in one of them only.
            assert_eq!(self.find(entry.extent), Some(slot), "index of slot {slot}");
            let is_durable = self.durable[usize::from(slot)] == Some(entry.extent);
            assert_eq!(is_durable, entry.stage == Stage::Hot, "durable state of slot {slot}");
            let stages = [(&self.queued[..], Stage::Queued), (begun, Stage::Begun)];
            for (list, stage) in stages {
                let listed = list.iter().filter(|of_list| **of_list == slot).count();
                assert_eq!(listed, usize::from(entry.stage == stage), "{stage:?} slot {slot}");
            }
        }
        let free = &self.durable[self.entries.len()..];
        assert!(free.iter().all(Option::is_none), "a free slot is in use on the disk");
        let idle = self.entries.iter().filter(|entry| entry.is_idle()).count();
        assert_eq!(idle, self.idle, "counted idle slots");
        let (mut listed, mut before, mut at) = (0, None, self.oldest);
        while let Some(slot) = at {
            let entry = self.entry(slot);
            assert!(entry.is_idle(), "slot {slot} is in use and may be evicted");
            assert_eq!(entry.older, before, "links of slot {slot}");
            listed += 1;
            assert!(listed <= idle, "the list of idle slots has a loop");
            (before, at) = (at, entry.newer);
        }
        assert_eq!((listed, before), (idle, self.newest), "every idle slot is listed");
    }
}

/// Slots, their index and their order.
impl ActivityLog {
    fn entry(&self, slot: u16) -> &Entry {
        &self.entries[usize::from(slot)]
    }

    fn entry_mut(&mut self, slot: u16) -> &mut Entry {
        &mut self.entries[usize::from(slot)]
    }

    /// Takes a reference to the extent in `slot`, which is idle no more.
    fn reference(&mut self, slot: u16) {
        if self.entry(slot).is_idle() {
            self.unlink(slot);
        }
        let entry = self.entry_mut(slot);
        entry.references =
            entry.references.checked_add(1).expect("fewer requests in flight than 2^32");
    }

    /// Gives `extent` a slot of its own and queues the change; there is room for it.
    fn assign(&mut self, extent: AlExtent) -> u16 {
        let slot = if self.entries.len() < usize::from(self.slots) {
            u16::try_from(self.entries.len()).expect("below the number of slots")
        } else {
            let slot = self.oldest.expect("room was counted before");
            self.unlink(slot);
            self.unindex(slot);
            slot
        };
        let bucket = self.bucket_of(extent);
        let chain = self.buckets[bucket].replace(slot);
        let entry =
            Entry { extent, references: 0, stage: Stage::Queued, chain, older: None, newer: None };
        match self.entries.get_mut(usize::from(slot)) {
            Some(evicted) => {
                assert!(evicted.is_idle(), "slot {slot} is in use");
                *evicted = entry;
            }
            None => self.entries.push(entry),
        }
        self.queued.push(slot);
        slot
    }

    fn find(&self, extent: AlExtent) -> Option<u16> {
        let mut at = self.buckets[self.bucket_of(extent)];
        for _ in 0..=self.entries.len() {
            let entry = self.entry(at?);
            if entry.extent == extent {
                return at;
            }
            at = entry.chain;
        }
        panic!("a chain of the index has a loop")
    }

    /// Takes `slot` out of its chain in the index.
    fn unindex(&mut self, slot: u16) {
        let Entry { extent, chain, .. } = *self.entry(slot);
        let bucket = self.bucket_of(extent);
        if self.buckets[bucket] == Some(slot) {
            self.buckets[bucket] = chain;
            return;
        }
        let mut at = self.buckets[bucket].expect("an extent in use is in its chain");
        while self.entry(at).chain != Some(slot) {
            at = self.entry(at).chain.expect("an extent in use is in its chain");
        }
        self.entry_mut(at).chain = chain;
    }

    /// The chain of `extent`. Multiplication by 2^32 divided by the golden ratio spreads extents
    /// that follow each other evenly; the upper bits are the good ones.
    fn bucket_of(&self, extent: AlExtent) -> usize {
        let hash = extent.0.wrapping_mul(0x9e37_79b1);
        let bits = self.buckets.len().trailing_zeros();
        usize::try_from(hash >> (32 - bits)).expect("at most 16 bits")
    }

    /// Enters a slot as the most recently used idle one.
    fn push_newest(&mut self, slot: u16) {
        let older = self.newest.replace(slot);
        match older {
            Some(older) => self.entry_mut(older).newer = Some(slot),
            None => self.oldest = Some(slot),
        }
        let entry = self.entry_mut(slot);
        assert!(entry.is_idle(), "slot {slot} is in use");
        (entry.older, entry.newer) = (older, None);
        self.idle += 1;
    }

    /// Takes an idle slot out of the list of idle ones.
    fn unlink(&mut self, slot: u16) {
        let entry = self.entry_mut(slot);
        assert!(entry.is_idle(), "slot {slot} is in use");
        let (older, newer) = (entry.older.take(), entry.newer.take());
        match older {
            Some(older) => self.entry_mut(older).newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.entry_mut(newer).older = older,
            None => self.newest = older,
        }
        assert!(self.idle > 0, "an idle slot was not counted");
        self.idle -= 1;
    }
}

/// The extents from `first` to `last`, at most as many as fit into one transaction.
fn extents_of(first: AlExtent, last: AlExtent) -> impl Iterator<Item = AlExtent> + Clone {
    assert!(first <= last, "a write touches an extent");
    let steps = usize::try_from(last.0 - first.0).expect("an address has at least 32 bits");
    assert!(steps < MAX_UPDATES, "{steps} and one extents do not fit into one transaction");
    (first.0..=last.0).map(AlExtent)
}

/// Where the context starts after one that started at `start`: consecutive windows show all slots.
fn following_context(start: u16, slots: u16) -> u16 {
    let next = usize::from(start) + AL_CONTEXT_PER_TRANSACTION;
    match u16::try_from(next) {
        Ok(next) if next < slots => next,
        Ok(_) | Err(_) => 0,
    }
}
