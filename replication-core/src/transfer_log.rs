//! The sender's side of write order: which mirrored writes the peer has not confirmed as stable.
//!
//! A mirrored write enters the log when it is submitted and leaves it when the barrier of its
//! epoch is acknowledged, or when the connection is lost. Writes of one epoch have no order among
//! each other; epochs have. An epoch is closed as soon as one of its writes was reported to the
//! host as finished (ORD-1), when it is full, and by a flush. Only mirrored writes are in here, so
//! an epoch never mixes mirrored and local writes (ORD-3). Requests keep their activity-log
//! references while they are in the log (AL-7).
//!
//! The epoch number counts on over reconnects; the numbers of writes do not.

use std::collections::VecDeque;

use thiserror::Error;

use crate::slab::Key;
use crate::units::Time;

/// The peer acknowledged a barrier that does not fit what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BarrierMismatch {
    /// Not the oldest barrier sent.
    #[error("barrier ack for epoch {found}, expected {expected:?}")]
    Epoch {
        /// The oldest unacknowledged epoch whose barrier was sent.
        expected: Option<u32>,
        /// In the packet.
        found: u32,
    },
    /// The number of writes differs.
    #[error("barrier ack for epoch {epoch} counts {found} writes, sent were {expected}")]
    Count {
        /// The epoch.
        epoch: u32,
        /// Writes sent.
        expected: u32,
        /// In the packet.
        found: u32,
    },
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: Key,
    epoch: u32,
}

#[derive(Clone, Copy, Debug)]
struct ClosedEpoch {
    number: u32,
    writes: u32,
    closed_at: Time,
}

/// The log of mirrored writes.
#[derive(Debug)]
pub struct TransferLog {
    entries: VecDeque<Entry>,
    closed: VecDeque<ClosedEpoch>,
    current: u32,
    current_writes: u32,
    max_epoch_size: u32,
    capacity: usize,
}

impl TransferLog {
    /// An empty log for at most `capacity` writes.
    ///
    /// # Panics
    /// If a size is zero.
    #[must_use]
    pub fn new(capacity: usize, max_epoch_size: u32) -> Self {
        assert!(capacity > 0 && max_epoch_size > 0, "a log has room for a write");
        Self {
            entries: VecDeque::with_capacity(capacity),
            closed: VecDeque::with_capacity(capacity),
            current: 0,
            current_writes: 0,
            max_epoch_size,
            capacity,
        }
    }

    /// Changes the limit of writes per epoch.
    pub fn set_max_epoch_size(&mut self, writes: u32) {
        self.max_epoch_size = writes.max(1);
    }

    /// Writes in the log.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no write is in the log.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether another write must wait (LV-2).
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.entries.len() >= self.capacity
    }

    /// Enters a write into the current epoch and returns the epoch's number. When the epoch is
    /// full afterwards, [`Self::is_epoch_full`] says so and the caller closes it.
    ///
    /// # Panics
    /// If the log is full.
    pub fn add(&mut self, key: Key) -> u32 {
        assert!(!self.is_full(), "the caller asks is_full first");
        self.entries.push_back(Entry { key, epoch: self.current });
        self.current_writes += 1;
        self.current
    }

    /// Whether the current epoch holds as many writes as it may.
    #[must_use]
    pub fn is_epoch_full(&self) -> bool {
        self.current_writes >= self.max_epoch_size
    }

    /// The number of the current, open epoch.
    #[must_use]
    pub fn current(&self) -> u32 {
        self.current
    }

    /// Closes the current epoch if it holds a write; the result is the epoch whose barrier is to
    /// be sent, before any later write.
    pub fn close(&mut self, now: Time) -> Option<u32> {
        if self.current_writes == 0 {
            return None;
        }
        let number = self.current;
        let writes = self.current_writes;
        self.closed.push_back(ClosedEpoch { number, writes, closed_at: now });
        self.current = self.current.wrapping_add(1);
        self.current_writes = 0;
        Some(number)
    }

    /// Takes the acknowledgement of a barrier; `released` gets the writes that are now stable on
    /// the peer.
    ///
    /// # Errors
    /// The acknowledgement does not fit; nothing is changed.
    pub fn acknowledge(
        &mut self,
        epoch: u32,
        writes: u32,
        released: &mut Vec<Key>,
    ) -> Result<(), BarrierMismatch> {
        let oldest = self.closed.front().copied();
        let Some(oldest) = oldest.filter(|o| o.number == epoch) else {
            let expected = oldest.map(|o| o.number);
            return Err(BarrierMismatch::Epoch { expected, found: epoch });
        };
        if oldest.writes != writes {
            let expected = oldest.writes;
            return Err(BarrierMismatch::Count { epoch, expected, found: writes });
        }
        self.closed.pop_front();
        for _ in 0..writes {
            let entry = self.entries.pop_front().expect("an epoch's writes are in the log");
            assert_eq!(entry.epoch, epoch, "the log is ordered by epoch");
            released.push(entry.key);
        }
        Ok(())
    }

    /// Empties the log after the connection is lost and starts a new epoch.
    pub fn drain(&mut self, lost: &mut Vec<Key>) {
        lost.extend(self.entries.drain(..).map(|entry| entry.key));
        self.closed.clear();
        self.current = self.current.wrapping_add(1);
        self.current_writes = 0;
    }

    /// Whether a write of an epoch up to and including `epoch` is still in the log.
    #[must_use]
    pub fn holds_up_to(&self, epoch: u32) -> bool {
        let is_old = |e: &Entry| epoch.wrapping_sub(e.epoch) < u32::MAX / 2;
        self.entries.front().is_some_and(is_old)
    }

    /// When the oldest barrier that waits for its acknowledgement was sent.
    #[must_use]
    pub fn oldest_barrier(&self) -> Option<Time> {
        self.closed.front().map(|epoch| epoch.closed_at)
    }

    /// The writes in the log, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = Key> + '_ {
        self.entries.iter().map(|entry| entry.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> Key {
        Key(1 << 32 | n)
    }

    /// Shows that epochs are released in order and only with the right count.
    #[test]
    fn barriers_release_whole_epochs_in_order() {
        let mut log = TransferLog::new(8, 3);
        assert_eq!(log.close(Time(0)), None, "an empty epoch gets no barrier");
        assert_eq!(log.add(key(1)), 0);
        assert_eq!(log.add(key(2)), 0);
        assert_eq!(log.close(Time(5)), Some(0));
        assert_eq!(log.add(key(3)), 1);
        assert_eq!(log.oldest_barrier(), Some(Time(5)));

        let mut released = Vec::new();
        let early = log.acknowledge(1, 1, &mut released);
        assert_eq!(early, Err(BarrierMismatch::Epoch { expected: Some(0), found: 1 }));
        let short = log.acknowledge(0, 1, &mut released);
        assert_eq!(short, Err(BarrierMismatch::Count { epoch: 0, expected: 2, found: 1 }));
        assert!(released.is_empty());

        assert!(log.holds_up_to(0));
        log.acknowledge(0, 2, &mut released).unwrap();
        assert_eq!(released, [key(1), key(2)]);
        assert!(!log.holds_up_to(0));
        assert!(log.holds_up_to(1));
        let open = log.acknowledge(1, 1, &mut released);
        assert_eq!(open, Err(BarrierMismatch::Epoch { expected: None, found: 1 }));
    }

    #[test]
    fn a_lost_connection_empties_the_log_and_starts_a_new_epoch() {
        let mut log = TransferLog::new(4, 2);
        log.add(key(1));
        log.close(Time(0));
        log.add(key(2));
        log.add(key(3));
        assert!(log.is_epoch_full());
        let mut lost = Vec::new();
        log.drain(&mut lost);
        assert_eq!(lost, [key(1), key(2), key(3)]);
        assert!(log.is_empty() && !log.is_epoch_full());
        assert_eq!(log.add(key(4)), 2);
        assert_eq!(log.close(Time(1)), Some(2));
        let mut released = Vec::new();
        log.acknowledge(2, 1, &mut released).unwrap();
        assert_eq!(released, [key(4)]);
    }

    #[test]
    fn a_full_log_says_so() {
        let mut log = TransferLog::new(1, 1);
        assert!(!log.is_full());
        log.add(key(1));
        assert!(log.is_full());
    }

    #[test]
    fn epoch_numbers_may_wrap() {
        let mut log = TransferLog::new(4, 2);
        log.current = u32::MAX;
        log.add(key(1));
        assert_eq!(log.close(Time(0)), Some(u32::MAX));
        log.add(key(2));
        assert_eq!(log.close(Time(0)), Some(0));
        assert!(log.holds_up_to(0), "an epoch before the wrap is older");
        let mut released = Vec::new();
        log.acknowledge(u32::MAX, 1, &mut released).unwrap();
        log.acknowledge(0, 1, &mut released).unwrap();
        assert_eq!(released.len(), 2);
    }
}
