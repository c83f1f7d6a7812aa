//! The receiver's side of write order: which mirrored writes may go to the disk now.
//!
//! Writes between two barriers are an epoch. No write of an epoch is submitted before every write
//! of the epochs before it has finished and, with [`Ordering::Flush`], been flushed (ORD-2). The
//! barrier is acknowledged with the exact number of writes (ORD-3), and with `Flush` only when
//! they are durable (DUR-3). A write that waits for a conflict counts as unfinished.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::event::VolumeIx;
use crate::wire::BarrierToken;

/// How epochs are kept apart on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ordering {
    /// Not at all: the disk keeps the order by itself.
    None,
    /// The writes of an epoch finish before those of the next are submitted.
    Drain,
    /// ... and are flushed.
    Flush,
}

impl Ordering {
    /// The word in status outputs.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Drain => "drain",
            Self::Flush => "flush",
        }
    }
}

/// Names an epoch within one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EpochId(u64);

/// A set of volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeSet(u64);

impl VolumeSet {
    /// Adds a volume.
    pub fn insert(&mut self, volume: VolumeIx) {
        self.0 |= 1 << volume.0;
    }

    /// Whether no volume is in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The volumes in ascending order.
    pub fn iter(self) -> impl Iterator<Item = VolumeIx> {
        (0..64_u8).filter(move |i| self.0 & 1 << i != 0).map(VolumeIx)
    }
}

#[derive(Clone, Copy, Debug)]
struct Epoch {
    id: EpochId,
    writes: u32,
    unfinished: u32,
    touched: VolumeSet,
    barrier: Option<BarrierToken>,
    /// Flushes under way; `None` before they were asked for.
    flushing: Option<u32>,
}

/// What has to be done for the oldest epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Flush these volumes' disks and report each with [`ReceiveEpochs::flushed`].
    Flush(VolumeSet),
    /// Acknowledge the barrier; the next epoch's writes may be submitted.
    Acknowledge {
        /// The token of the barrier.
        barrier: BarrierToken,
        /// Writes of the epoch.
        writes: u32,
    },
}

/// The epochs of a connection that are not finished, oldest first. The last one is open.
#[derive(Debug)]
pub struct ReceiveEpochs {
    queue: VecDeque<Epoch>,
    next: u64,
    ordering: Ordering,
}

impl ReceiveEpochs {
    /// A connection without any write.
    #[must_use]
    pub fn new(ordering: Ordering) -> Self {
        let mut epochs = Self { queue: VecDeque::with_capacity(64), next: 0, ordering };
        epochs.open();
        epochs
    }

    /// Forgets everything: a new connection starts with fresh counters (ORD-3). Ids given out
    /// before are recognised as stale.
    pub fn reset(&mut self, ordering: Ordering) {
        self.queue.clear();
        self.ordering = ordering;
        self.open();
    }

    /// The method in force.
    #[must_use]
    pub const fn ordering(&self) -> Ordering {
        self.ordering
    }

    fn open(&mut self) {
        let id = EpochId(self.next);
        self.next += 1;
        self.queue.push_back(Epoch {
            id,
            writes: 0,
            unfinished: 0,
            touched: VolumeSet::default(),
            barrier: None,
            flushing: None,
        });
    }

    fn find(&mut self, id: EpochId) -> Option<&mut Epoch> {
        let first = self.queue.front()?.id.0;
        let index = usize::try_from(id.0.checked_sub(first)?).ok()?;
        self.queue.get_mut(index)
    }

    /// Counts a received write into the open epoch.
    ///
    /// # Panics
    /// Never: there is always an open epoch.
    pub fn add(&mut self, volume: VolumeIx) -> EpochId {
        let epoch = self.queue.back_mut().expect("the last epoch is open");
        epoch.writes += 1;
        epoch.unfinished += 1;
        epoch.touched.insert(volume);
        epoch.id
    }

    /// Counts a write that was refused at once, for want of a disk.
    ///
    /// # Panics
    /// Never: there is always an open epoch.
    pub fn add_refused(&mut self) {
        self.queue.back_mut().expect("the last epoch is open").writes += 1;
    }

    /// Whether a write of this epoch may be submitted now.
    #[must_use]
    pub fn may_submit(&self, id: EpochId) -> bool {
        match self.ordering {
            Ordering::None => true,
            Ordering::Drain | Ordering::Flush => self.queue.front().is_some_and(|e| e.id == id),
        }
    }

    /// A write of this epoch is finished, well or not. Writes of an older connection are ignored.
    pub fn finished(&mut self, id: EpochId) {
        if let Some(epoch) = self.find(id) {
            assert!(epoch.unfinished > 0, "every write finishes once");
            epoch.unfinished -= 1;
        }
    }

    /// The open epoch is complete; later writes belong to the next.
    ///
    /// # Panics
    /// Never: there is always an open epoch.
    pub fn barrier(&mut self, token: BarrierToken) {
        let epoch = self.queue.back_mut().expect("the last epoch is open");
        epoch.barrier = Some(token);
        self.open();
    }

    /// One of the flushes asked for is done.
    pub fn flushed(&mut self, id: EpochId) {
        if let Some(epoch) = self.find(id) {
            let left = epoch.flushing.as_mut().expect("only a flushing epoch is flushed");
            assert!(*left > 0, "every flush is answered once");
            *left -= 1;
        }
    }

    /// The oldest epoch, to name it in [`Self::flushed`].
    ///
    /// # Panics
    /// Never: there is always an open epoch.
    #[must_use]
    pub fn oldest(&self) -> EpochId {
        self.queue.front().expect("the last epoch is open").id
    }

    /// What is to be done now. Call again until it says `None`.
    pub fn next_step(&mut self) -> Option<Step> {
        let ordering = self.ordering;
        let epoch = self.queue.front_mut()?;
        let barrier = epoch.barrier?;
        if epoch.unfinished > 0 {
            return None;
        }
        if ordering == Ordering::Flush && !epoch.touched.is_empty() {
            match epoch.flushing {
                None => {
                    epoch.flushing = Some(epoch.touched.0.count_ones());
                    return Some(Step::Flush(epoch.touched));
                }
                Some(0) => {}
                Some(_) => return None,
            }
        }
        let writes = epoch.writes;
        self.queue.pop_front();
        Some(Step::Acknowledge { barrier, writes })
    }

    /// Epochs that are not finished, the open one included: bounded by
    /// [`crate::limits::MAX_PEER_EPOCHS`], as none is received beyond.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Never: there is always an open epoch.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Writes received and not finished.
    #[must_use]
    pub fn unfinished(&self) -> u64 {
        self.queue.iter().map(|epoch| u64::from(epoch.unfinished)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: VolumeIx = VolumeIx(0);

    fn token(n: u32) -> BarrierToken {
        BarrierToken(n)
    }

    /// Shows ORD-2: the next epoch waits for the writes and the flush of this one.
    #[test]
    fn an_epoch_waits_for_finish_and_flush_of_the_one_before() {
        let mut epochs = ReceiveEpochs::new(Ordering::Flush);
        let a = epochs.add(V);
        let b = epochs.add(VolumeIx(3));
        epochs.barrier(token(7));
        let c = epochs.add(V);
        assert!(epochs.may_submit(a) && epochs.may_submit(b) && !epochs.may_submit(c));
        epochs.finished(a);
        assert_eq!(epochs.next_step(), None);
        epochs.finished(b);
        let Some(Step::Flush(volumes)) = epochs.next_step() else { panic!("flush comes first") };
        assert_eq!(volumes.iter().collect::<Vec<_>>(), [V, VolumeIx(3)]);
        assert_eq!(epochs.next_step(), None, "the flush is asked for once");
        let oldest = epochs.oldest();
        epochs.flushed(oldest);
        assert_eq!(epochs.next_step(), None);
        assert!(!epochs.may_submit(c));
        epochs.flushed(oldest);
        let ack = Step::Acknowledge { barrier: token(7), writes: 2 };
        assert_eq!(epochs.next_step(), Some(ack));
        assert!(epochs.may_submit(c));
        assert_eq!(epochs.next_step(), None, "the open epoch has no barrier");
    }

    #[test]
    fn drain_acknowledges_without_a_flush_and_none_does_not_wait() {
        let mut epochs = ReceiveEpochs::new(Ordering::Drain);
        let a = epochs.add(V);
        epochs.barrier(token(1));
        epochs.finished(a);
        let ack = Step::Acknowledge { barrier: token(1), writes: 1 };
        assert_eq!(epochs.next_step(), Some(ack));

        let mut epochs = ReceiveEpochs::new(Ordering::None);
        let a = epochs.add(V);
        epochs.barrier(token(1));
        let b = epochs.add(V);
        assert!(epochs.may_submit(a) && epochs.may_submit(b));
    }

    #[test]
    fn a_new_connection_starts_afresh_and_ignores_old_writes() {
        let mut epochs = ReceiveEpochs::new(Ordering::Flush);
        let old = epochs.add(V);
        epochs.reset(Ordering::Drain);
        epochs.finished(old);
        assert_eq!(epochs.unfinished(), 0);
        let a = epochs.add(V);
        assert!(a > old);
        assert!(!epochs.may_submit(old));
        epochs.barrier(token(0));
        epochs.finished(a);
        let ack = Step::Acknowledge { barrier: token(0), writes: 1 };
        assert_eq!(epochs.next_step(), Some(ack));
    }

    #[test]
    fn a_barrier_without_writes_is_acknowledged_at_once() {
        let mut epochs = ReceiveEpochs::new(Ordering::Flush);
        epochs.barrier(token(9));
        let ack = Step::Acknowledge { barrier: token(9), writes: 0 };
        assert_eq!(epochs.next_step(), Some(ack));
    }
}
