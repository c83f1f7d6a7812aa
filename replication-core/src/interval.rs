//! The sector ranges of operations in flight, and which of them a new one touches.
//!
//! Local writes, the peer's writes and resync requests are entered here while they run; who wants
//! to start something on a range asks first what overlaps it. The table answers; whether to wait,
//! to refuse or to supersede is decided by the caller.
//!
//! The ranges are kept in a vector sorted by start. A query begins at the first entry that could
//! reach into the asked range, which is known from the length of the longest entry (rounded up to
//! a power of two), so a query costs a binary search and the few entries around the range. A long
//! discard in flight makes queries slower, not wrong.
//!
//! Invariants kept:
//! - ORD-5: no entry that shares a sector with the asked range is left out.
//! - LV-2: nothing allocates up to the capacity given at creation. The tables whose keys are
//!   stored here limit the number of entries.
//!
//! Source: ours.

use crate::units::SectorRange;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry<T> {
    range: SectorRange,
    id: T,
}

/// Ranges with an identifier each; the same range may be entered several times.
#[derive(Debug)]
pub struct Intervals<T: Copy + Eq> {
    /// Sorted by start; equal starts in the order of insertion.
    entries: Vec<Entry<T>>,
    /// Number of entries per class of length: class `n` is `2^n ..= 2^(n+1) - 1` sectors.
    classes: [usize; 64],
    /// Bit `n` is set while class `n` has an entry.
    occupied: u64,
}

impl<T: Copy + Eq> Intervals<T> {
    /// An empty table that takes `n` ranges without allocating.
    #[must_use]
    pub fn with_capacity(n: usize) -> Self {
        Self { entries: Vec::with_capacity(n), classes: [0; 64], occupied: 0 }
    }

    /// Enters `range` under `id`.
    ///
    /// # Panics
    /// If the range is empty: it would never be found again by an overlap.
    pub fn insert(&mut self, range: SectorRange, id: T) {
        assert!(!range.is_empty(), "an empty range touches nothing");
        let at = self.entries.partition_point(|entry| entry.range.start <= range.start);
        self.entries.insert(at, Entry { range, id });
        let class = class_of(range);
        self.classes[class] += 1;
        self.occupied |= 1 << class;
    }

    /// Removes one entry with exactly this range and `id`; `false` if there is none.
    pub fn remove(&mut self, range: SectorRange, id: T) -> bool {
        let first = self.entries.partition_point(|entry| entry.range.start < range.start);
        let same_start =
            self.entries[first..].iter().take_while(|entry| entry.range.start == range.start);
        let wanted = Entry { range, id };
        let Some(at) = same_start.enumerate().find(|(_, entry)| **entry == wanted) else {
            return false;
        };
        self.entries.remove(first + at.0);
        let class = class_of(range);
        assert!(self.classes[class] > 0, "an entry of class {class} was not counted");
        self.classes[class] -= 1;
        if self.classes[class] == 0 {
            self.occupied &= !(1 << class);
        }
        true
    }

    /// The identifier of the overlapping entry with the lowest start, if any.
    #[must_use]
    pub fn first_overlap(&self, range: SectorRange) -> Option<T> {
        self.overlaps(range).next().map(|(_, id)| id)
    }

    /// All entries that share a sector with `range`, by ascending start; none if it is empty.
    pub fn overlaps(&self, range: SectorRange) -> impl Iterator<Item = (SectorRange, T)> {
        let longest = self.longest();
        let first = self
            .entries
            .partition_point(|entry| entry.range.start.saturating_add(longest) <= range.start);
        self.entries[first..]
            .iter()
            .take_while(move |entry| !range.is_empty() && entry.range.start < range.end)
            .filter(move |entry| entry.range.overlaps(range))
            .map(|entry| (entry.range, entry.id))
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Compares what is kept twice.
    ///
    /// # Panics
    /// If the table contradicts itself.
    pub fn self_check(&self) {
        assert!(self.entries.is_sorted_by_key(|entry| entry.range.start), "sorted by start");
        let mut classes = [0; 64];
        for entry in &self.entries {
            assert!(!entry.range.is_empty(), "an empty range was entered");
            assert!(entry.range.sectors() <= self.longest(), "an entry is over the bound");
            classes[class_of(entry.range)] += 1;
        }
        assert_eq!(classes, self.classes, "counted classes of length");
        for (class, count) in classes.into_iter().enumerate() {
            assert_eq!(count > 0, self.occupied & (1 << class) != 0, "mark of class {class}");
        }
    }

    /// No entry is longer than this; 0 if there is no entry.
    fn longest(&self) -> u64 {
        match self.occupied.checked_ilog2() {
            None => 0,
            Some(class) => u64::MAX >> (63 - class),
        }
    }
}

fn class_of(range: SectorRange) -> usize {
    usize::try_from(range.sectors().ilog2()).expect("below 64")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> SectorRange {
        SectorRange { start, end }
    }

    #[test]
    fn ranges_that_only_touch_do_not_overlap() {
        let mut table = Intervals::with_capacity(4);
        table.insert(range(8, 16), 'a');
        for (start, end, found) in [
            (0, 8, None),
            (16, 24, None),
            (0, 9, Some('a')),
            (15, 16, Some('a')),
            (0, 100, Some('a')),
            (10, 10, None),
            (12, 8, None),
        ] {
            assert_eq!(table.first_overlap(range(start, end)), found, "{start}..{end}");
        }
    }

    #[test]
    fn a_long_range_far_before_is_found() {
        let mut table = Intervals::with_capacity(100);
        table.insert(range(0, 1 << 18), 1000);
        for i in 0..90 {
            table.insert(range(8 * i, 8 * i + 8), i);
        }
        assert_eq!(table.first_overlap(range((1 << 18) - 1, 1 << 19)), Some(1000));
        assert!(table.remove(range(0, 1 << 18), 1000));
        assert_eq!(table.longest(), 15);
        assert_eq!(table.first_overlap(range((1 << 18) - 1, 1 << 19)), None);
        assert_eq!(table.overlaps(range(7, 17)).map(|(_, id)| id).collect::<Vec<_>>(), [0, 1, 2]);
        table.self_check();
    }

    #[test]
    fn only_the_named_entry_is_removed() {
        let mut table = Intervals::with_capacity(4);
        for id in ['a', 'b', 'a'] {
            table.insert(range(0, 8), id);
        }
        assert!(!table.remove(range(0, 8), 'c'));
        assert!(!table.remove(range(0, 9), 'a'));
        assert!(!table.remove(range(5, 5), 'a'));
        assert!(table.remove(range(0, 8), 'a'));
        let left: Vec<_> = table.overlaps(range(0, 1)).map(|(_, id)| id).collect();
        assert_eq!(left, ['b', 'a']);
        assert!(table.remove(range(0, 8), 'a'));
        assert!(table.remove(range(0, 8), 'b'));
        assert!(table.is_empty());
        assert_eq!(table.longest(), 0);
        table.self_check();
    }

    #[test]
    fn the_largest_range_is_no_special_case() {
        let mut table = Intervals::with_capacity(2);
        table.insert(range(0, u64::MAX), 1);
        table.insert(range(u64::MAX - 1, u64::MAX), 2);
        let found: Vec<_> =
            table.overlaps(range(u64::MAX - 1, u64::MAX)).map(|(_, id)| id).collect();
        assert_eq!(found, [1, 2]);
        table.self_check();
    }

    #[test]
    fn nothing_is_allocated_up_to_the_capacity() {
        let mut table = Intervals::with_capacity(64);
        let before = table.entries.as_ptr();
        for i in 0..64 {
            table.insert(range(i, i + 3), i);
        }
        assert_eq!(table.entries.as_ptr(), before);
    }

    #[test]
    #[should_panic(expected = "touches nothing")]
    fn an_empty_range_is_not_entered() {
        Intervals::with_capacity(1).insert(range(8, 8), 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(SectorRange, u8),
        Remove(usize),
        RemoveOther(SectorRange, u8),
    }

    fn any_range() -> impl Strategy<Value = SectorRange> {
        let len = prop_oneof![5 => 1u64..10, 1 => 1u64..200, 1 => Just(1u64 << 40)];
        (0u64..300, len).prop_map(|(start, len)| range(start, start + len))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (any_range(), 0u8..4).prop_map(|(range, id)| Step::Insert(range, id)),
            2 => any::<usize>().prop_map(Step::Remove),
            1 => (any_range(), 0u8..4).prop_map(|(range, id)| Step::RemoveOther(range, id)),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_list(
            steps in prop::collection::vec((step(), any_range()), 0..120),
        ) {
            let mut table = Intervals::with_capacity(16);
            let mut model: Vec<(SectorRange, u8)> = Vec::new();
            for (step, query) in steps {
                match step {
                    Step::Insert(range, id) => {
                        table.insert(range, id);
                        model.push((range, id));
                    }
                    Step::Remove(at) if !model.is_empty() => {
                        let (range, id) = model[at % model.len()];
                        prop_assert!(table.remove(range, id));
                        let first = model.iter().position(|entry| *entry == (range, id)).unwrap();
                        model.remove(first);
                    }
                    Step::RemoveOther(range, id) => {
                        let first = model.iter().position(|entry| *entry == (range, id));
                        prop_assert_eq!(table.remove(range, id), first.is_some());
                        first.map(|at| model.remove(at));
                    }
                    Step::Remove(_) => {}
                }
                table.self_check();
                prop_assert_eq!(table.len(), model.len());
                let mut expected: Vec<_> = model
                    .iter()
                    .filter(|(range, _)| range.start < query.end && query.start < range.end)
                    .copied()
                    .collect();
                expected.sort_by_key(|(range, _)| range.start);
                prop_assert_eq!(table.first_overlap(query), expected.first().map(|e| e.1));
                prop_assert_eq!(table.overlaps(query).collect::<Vec<_>>(), expected);
            }
        }
    }
}
