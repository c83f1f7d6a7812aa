//! One bit per 4 KiB block: set where this node and the peer may differ.
//!
//! The bitmap knows blocks and pages, not why a bit changes: whether a write must be marked, or
//! whether there is proof that a block is equal (BM-3), is decided by the callers. Bits live in
//! memory; each 4 KiB page of the map remembers whether it was changed since its last write
//! began, and the metadata layer moves pages to and from the disk.
//!
//! Invariants kept:
//! - BM-7: the count is that of the set bits at any time, and bits beyond the end are zero.
//! - BM-8: a grown area is set unless the caller vouches for it; its pages are dirty in either
//!   case, since nothing is known of what the disk holds there.
//! - BM-2 (the part of the memory): a change of a bit makes its page dirty, also while an earlier
//!   state of that page is on its way to the disk.
//!
//! The population of each page is kept too, so that searches step over pages without a match; a
//! map of 2^32 bits is searched through 131072 such numbers instead of 512 MiB.
//!
//! Source: metadata notes, section 6 (bit order, page size).

use crate::limits::MAX_DEVICE_SECTORS;
use crate::units::{AlExtent, BLOCKS_PER_AL_EXTENT, BlockRange, SECTORS_PER_BLOCK};

/// Bytes of a page of the bitmap, the unit in which it is read and written.
pub const PAGE_BYTES: usize = 4096;
/// Bits of a page: 128 MiB of the device.
pub const BITS_PER_PAGE: u64 = 32768;
/// Most bits of a bitmap, see [`MAX_DEVICE_SECTORS`].
pub const MAX_BITS: u64 = MAX_DEVICE_SECTORS / SECTORS_PER_BLOCK;

const BITS_PER_WORD: u64 = 64;
const WORDS_PER_PAGE: u64 = BITS_PER_PAGE / BITS_PER_WORD;

// An extent never lies across two pages.
const _: () = assert!(BITS_PER_PAGE.is_multiple_of(BLOCKS_PER_AL_EXTENT));

/// The value that a bit gets or that is searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bit {
    Set,
    Clear,
}

/// The out-of-sync bits of one volume.
#[derive(Debug)]
pub struct Bitmap {
    bits: u64,
    /// Block `n` is bit `n % 64` of word `n / 64`.
    words: Vec<u64>,
    /// Set bits of all pages.
    count: u64,
    /// Set bits per page.
    populations: Vec<u32>,
    dirty: Vec<bool>,
    dirty_pages: usize,
}

impl Bitmap {
    /// A map of `bits` blocks, all clear and no page dirty.
    ///
    /// # Panics
    /// If `bits` is above [`MAX_BITS`].
    #[must_use]
    pub fn new(bits: u64) -> Self {
        assert!(bits <= MAX_BITS, "{bits} blocks are more than a device may have");
        let pages = offset(bits.div_ceil(BITS_PER_PAGE));
        Self {
            bits,
            words: vec![0; offset(bits.div_ceil(BITS_PER_WORD))],
            count: 0,
            populations: vec![0; pages],
            dirty: vec![false; pages],
            dirty_pages: 0,
        }
    }

    /// Number of blocks.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Number of set bits.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of set bits in `range`.
    #[must_use]
    pub fn count_in(&self, range: BlockRange) -> u64 {
        let range = self.clip(range);
        parts(range, BITS_PER_PAGE)
            .map(|(page, part)| {
                let in_page = u64::from(self.populations[offset(page)]);
                if in_page == 0 || part == self.blocks_of(page) {
                    return in_page;
                }
                let ones = |(word, mask): (usize, u64)| (self.words[word] & mask).count_ones();
                masks(part).map(|item| u64::from(ones(item))).sum()
            })
            .sum()
    }

    /// The words of the map: block `n` is bit `n % 64` of word `n / 64`. The last word is filled
    /// up with zeros.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Sets the bits of `range`; what lies beyond the end is left out.
    ///
    /// Returns how many were clear before.
    pub fn set(&mut self, range: BlockRange) -> u64 {
        self.change(range, Bit::Set)
    }

    /// Clears the bits of `range`; what lies beyond the end is left out.
    ///
    /// Returns how many were set before.
    pub fn clear(&mut self, range: BlockRange) -> u64 {
        self.change(range, Bit::Clear)
    }

    /// Sets every bit and makes every page dirty, whatever it was before.
    pub fn set_all(&mut self) {
        self.set(self.whole());
        assert!(self.count == self.bits, "every bit is set");
        self.mark_all_dirty();
    }

    /// Clears every bit and makes every page dirty, whatever it was before.
    pub fn clear_all(&mut self) {
        self.clear(self.whole());
        assert!(self.count == 0, "every bit is clear");
        self.mark_all_dirty();
    }

    /// Whether a bit of `range` is set.
    #[must_use]
    pub fn is_any_set(&self, range: BlockRange) -> bool {
        self.find(range, Bit::Set).is_some()
    }

    /// Whether the bit of `block` is set; `false` beyond the end.
    #[must_use]
    pub fn is_set(&self, block: u64) -> bool {
        block < self.bits && self.words[offset(block / BITS_PER_WORD)] & bit(block) != 0
    }

    /// The first set bit at or after `from`.
    #[must_use]
    pub fn next_set(&self, from: u64) -> Option<u64> {
        self.find(BlockRange { start: from, end: self.bits }, Bit::Set)
    }

    /// The first clear bit at or after `from`, before the end of the map.
    #[must_use]
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        self.find(BlockRange { start: from, end: self.bits }, Bit::Clear)
    }

    /// Changes the number of blocks. With `set_new` the bits of a grown area are set, else clear.
    /// The last page that was and all that are new become dirty, since the disk may hold anything
    /// beyond the old end. Allocates.
    ///
    /// # Panics
    /// If `bits` is above [`MAX_BITS`].
    pub fn resize(&mut self, bits: u64, set_new: bool) {
        assert!(bits <= MAX_BITS, "{bits} blocks are more than a device may have");
        let old = self.bits;
        // Bits beyond the end are zero: those of a shrunk map must not come back with a later one.
        self.clear(BlockRange { start: bits, end: old });
        let pages = offset(bits.div_ceil(BITS_PER_PAGE));
        let cut = self.dirty.iter().skip(pages).filter(|dirty| **dirty).count();
        self.dirty_pages -= cut;
        self.bits = bits;
        self.words.resize(offset(bits.div_ceil(BITS_PER_WORD)), 0);
        self.populations.resize(pages, 0);
        self.dirty.resize(pages, false);
        if set_new {
            self.set(BlockRange { start: old, end: bits });
        }
        let common_end = old.min(bits);
        for page in common_end.saturating_sub(1) / BITS_PER_PAGE..self.pages() {
            self.mark_dirty(page);
        }
    }

    /// Compares what is kept twice.
    ///
    /// # Panics
    /// If the map contradicts itself.
    pub fn self_check(&self) {
        assert_eq!(self.words.len(), offset(self.bits.div_ceil(BITS_PER_WORD)), "words");
        assert_eq!(self.populations.len(), offset(self.pages()), "populations");
        assert_eq!(self.dirty.len(), offset(self.pages()), "dirty marks");
        let mut count = 0;
        for (words, population) in
            self.words.chunks(offset(WORDS_PER_PAGE)).zip(self.populations.iter())
        {
            assert_eq!(ones(words), *population, "population of a page");
            count += u64::from(*population);
        }
        assert_eq!(count, self.count, "counted bits");
        if let Some(last) = self.words.last() {
            let (_, mask) = masks(self.whole()).last().expect("a map with words has bits");
            assert_eq!(last & !mask, 0, "bits beyond the end");
        }
        let dirty = self.dirty.iter().filter(|dirty| **dirty).count();
        assert_eq!(dirty, self.dirty_pages, "counted dirty pages");
    }

    fn whole(&self) -> BlockRange {
        BlockRange { start: 0, end: self.bits }
    }

    fn clip(&self, range: BlockRange) -> BlockRange {
        BlockRange { start: range.start.min(self.bits), end: range.end.min(self.bits) }
    }

    /// The blocks of a page, fewer on the last one.
    fn blocks_of(&self, page: u64) -> BlockRange {
        let start = page * BITS_PER_PAGE;
        self.clip(BlockRange { start, end: start + BITS_PER_PAGE })
    }

    /// The number of set bits with which no bit of `page` has the value other than `wanted`.
    fn uniform_population(&self, page: u64, wanted: Bit) -> u64 {
        match wanted {
            Bit::Set => self.blocks_of(page).len(),
            Bit::Clear => 0,
        }
    }

    fn change(&mut self, range: BlockRange, to: Bit) -> u64 {
        let range = self.clip(range);
        let mut changed = 0;
        for (page, part) in parts(range, BITS_PER_PAGE) {
            if u64::from(self.populations[offset(page)]) != self.uniform_population(page, to) {
                changed += self.change_in_page(page, part, to);
            }
        }
        assert!(changed <= range.len());
        changed
    }

    fn change_in_page(&mut self, page: u64, part: BlockRange, to: Bit) -> u64 {
        let mut changed = 0;
        for (word, mask) in masks(part) {
            let old = self.words[word];
            let new = match to {
                Bit::Set => old | mask,
                Bit::Clear => old & !mask,
            };
            self.words[word] = new;
            changed += (old ^ new).count_ones();
        }
        if changed > 0 {
            let population = &mut self.populations[offset(page)];
            match to {
                Bit::Set => {
                    *population += changed;
                    self.count += u64::from(changed);
                }
                Bit::Clear => {
                    *population -= changed;
                    self.count -= u64::from(changed);
                }
            }
            self.mark_dirty(page);
        }
        u64::from(changed)
    }

    fn find(&self, range: BlockRange, wanted: Bit) -> Option<u64> {
        let other = match wanted {
            Bit::Set => Bit::Clear,
            Bit::Clear => Bit::Set,
        };
        for (page, part) in parts(self.clip(range), BITS_PER_PAGE) {
            if u64::from(self.populations[offset(page)]) == self.uniform_population(page, other) {
                continue;
            }
            for (word, mask) in masks(part) {
                let found = match wanted {
                    Bit::Set => self.words[word] & mask,
                    Bit::Clear => !self.words[word] & mask,
                };
                if found != 0 {
                    return Some(first_bit(word) + u64::from(found.trailing_zeros()));
                }
            }
        }
        None
    }
}

/// Pages: how the map meets the disk.
impl Bitmap {
    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bits.div_ceil(BITS_PER_PAGE)
    }

    /// The page that holds the bit of `block`.
    #[must_use]
    pub fn page_of(&self, block: u64) -> u64 {
        block / BITS_PER_PAGE
    }

    /// The one page that holds the bits of `extent`.
    #[must_use]
    pub fn page_of_extent(&self, extent: AlExtent) -> u64 {
        self.page_of(extent.blocks().start)
    }

    /// Takes a page as it was read from the disk; it is clean then. Bits beyond the end are
    /// ignored.
    ///
    /// **Shape**: block `n` of the page is bit `n % 8` of byte `n / 8`.
    ///
    /// # Panics
    /// If there is no such page, or if it is dirty: marks that the disk lacks would be lost.
    pub fn load_page(&mut self, page: u64, bytes: &[u8; PAGE_BYTES]) {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        assert!(!self.is_dirty(page), "page {page} has changes that are not on the disk");
        for ((word, mask), bytes) in masks(self.blocks_of(page)).zip(bytes.chunks_exact(8)) {
            let value = u64::from_le_bytes(bytes.try_into().expect("chunks of 8 bytes"));
            self.words[word] = value & mask;
        }
        let population = ones(self.page_words(page));
        let before = std::mem::replace(&mut self.populations[offset(page)], population);
        self.count -= u64::from(before);
        self.count += u64::from(population);
    }

    /// Writes a page into `bytes` in the shape of the disk; bits beyond the end are zero. The
    /// page stays as dirty as it is, see [`Self::mark_clean`].
    ///
    /// # Panics
    /// If there is no such page.
    pub fn store_page(&self, page: u64, bytes: &mut [u8; PAGE_BYTES]) {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        let words = self.page_words(page);
        let (used, rest) = bytes.split_at_mut(words.len() * 8);
        for (word, bytes) in words.iter().zip(used.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        rest.fill(0);
    }

    /// Whether `page` was changed since its last write began; `false` beyond the end.
    #[must_use]
    pub fn is_dirty(&self, page: u64) -> bool {
        page < self.pages() && self.dirty[offset(page)]
    }

    /// The first dirty page at or after `from_page`.
    #[must_use]
    pub fn next_dirty(&self, from_page: u64) -> Option<u64> {
        if self.dirty_pages == 0 {
            return None;
        }
        (from_page..self.pages()).find(|page| self.dirty[offset(*page)])
    }

    /// Whether any page is dirty.
    #[must_use]
    pub fn any_dirty(&self) -> bool {
        self.dirty_pages > 0
    }

    /// To be called when the write of a copy of `page` starts: a change that comes while the
    /// write is under way makes the page dirty again. If the write fails, [`Self::mark_dirty`]
    /// says so.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn mark_clean(&mut self, page: u64) {
        self.dirty_pages -= usize::from(self.replace_dirty(page, false));
    }

    /// The disk does not hold what `page` holds, although no bit changed.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn mark_dirty(&mut self, page: u64) {
        self.dirty_pages += usize::from(!self.replace_dirty(page, true));
    }

    /// Makes every page dirty, so that the whole map is written.
    pub fn mark_all_dirty(&mut self) {
        self.dirty.fill(true);
        self.dirty_pages = self.dirty.len();
    }

    fn replace_dirty(&mut self, page: u64, dirty: bool) -> bool {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        std::mem::replace(&mut self.dirty[offset(page)], dirty)
    }

    fn page_words(&self, page: u64) -> &[u64] {
        let start = page * WORDS_PER_PAGE;
        let end = offset(start + WORDS_PER_PAGE).min(self.words.len());
        &self.words[offset(start)..end]
    }
}

/// Splits `range` where multiples of `unit` lie; gives the number of the unit with each part.
fn parts(range: BlockRange, unit: u64) -> impl Iterator<Item = (u64, BlockRange)> {
    let units = if range.is_empty() { 0..0 } else { range.start / unit..range.end.div_ceil(unit) };
    units.map(move |number| {
        let start = range.start.max(number * unit);
        let end = range.end.min((number + 1) * unit);
        (number, BlockRange { start, end })
    })
}

/// The words that hold `range`, each with the mask of the bits that belong to it.
fn masks(range: BlockRange) -> impl Iterator<Item = (usize, u64)> {
    parts(range, BITS_PER_WORD).map(|(word, part)| {
        let ones = u64::MAX >> (BITS_PER_WORD - part.len());
        (offset(word), ones << (part.start % BITS_PER_WORD))
    })
}

fn bit(block: u64) -> u64 {
    1 << (block % BITS_PER_WORD)
}

fn first_bit(word: usize) -> u64 {
    u64::try_from(word).expect("an address has at most 64 bits") * BITS_PER_WORD
}

fn ones(words: &[u64]) -> u32 {
    words.iter().map(|word| word.count_ones()).sum()
}

fn offset(index: u64) -> usize {
    usize::try_from(index).expect("a map of the largest device fits into the address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> BlockRange {
        BlockRange { start, end }
    }

    #[test]
    fn ranges_are_counted_once_and_clipped() {
        let mut map = Bitmap::new(200);
        for (start, end, new, count) in [
            (0, 0, 0, 0),
            (9, 3, 0, 0),
            (63, 65, 2, 2),
            (0, 64, 63, 65),
            (199, 200, 1, 66),
            (190, 1000, 9, 75),
            (200, 300, 0, 75),
            (u64::MAX - 1, u64::MAX, 0, 75),
            (0, u64::MAX, 125, 200),
        ] {
            assert_eq!((map.set(range(start, end)), map.count()), (new, count), "{start}..{end}");
            map.self_check();
        }
        assert_eq!((map.clear(range(100, 500)), map.count()), (100, 100));
        assert_eq!(
            (map.next_set(100), map.next_clear(0), map.next_clear(200)),
            (None, Some(100), None)
        );
        assert!(map.is_set(99) && !map.is_set(100) && !map.is_set(u64::MAX));
        map.self_check();
    }

    #[test]
    fn a_map_without_blocks_has_nothing() {
        let mut map = Bitmap::new(0);
        map.set_all();
        map.clear_all();
        assert_eq!((map.set(range(0, 10)), map.pages(), map.words().len()), (0, 0, 0));
        assert_eq!((map.next_set(0), map.next_clear(0), map.next_dirty(0)), (None, None, None));
        assert!(!map.any_dirty());
        map.self_check();
    }

    #[test]
    fn the_largest_map_finds_its_last_bit() {
        let mut map = Bitmap::new(MAX_BITS);
        assert_eq!(map.pages(), 131_072);
        map.set(range(MAX_BITS - 1, MAX_BITS));
        assert_eq!((map.next_set(0), map.count()), (Some(MAX_BITS - 1), 1));
        assert_eq!(map.next_dirty(0), Some(131_071));
        assert!(!map.is_any_set(range(0, MAX_BITS - 1)));
    }

    #[test]
    fn a_page_is_little_endian_and_ends_with_zeros() {
        let mut map = Bitmap::new(BITS_PER_PAGE + 70);
        let last = BITS_PER_PAGE;
        map.set(range(last, last + 1));
        map.set(range(last + 9, last + 11));
        map.set(range(last + 69, last + 70));
        let mut bytes = [0xaa; PAGE_BYTES];
        map.store_page(1, &mut bytes);
        assert_eq!(bytes[..10], [1, 6, 0, 0, 0, 0, 0, 0, 0x20, 0]);
        assert!(bytes[10..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn marks_of_the_disk_beyond_the_end_are_ignored() {
        let mut map = Bitmap::new(BITS_PER_PAGE + 70);
        map.load_page(1, &[0xff; PAGE_BYTES]);
        assert_eq!((map.count(), map.next_set(0)), (70, Some(BITS_PER_PAGE)));
        assert!(!map.any_dirty());
        map.load_page(1, &[0; PAGE_BYTES]);
        assert_eq!(map.count(), 0);
        map.self_check();
    }

    #[test]
    fn a_change_during_a_write_makes_the_page_dirty_again() {
        let mut map = Bitmap::new(3 * BITS_PER_PAGE);
        map.set(range(BITS_PER_PAGE, BITS_PER_PAGE + 5));
        assert_eq!(map.next_dirty(0), Some(1));
        map.mark_clean(1);
        assert!(!map.any_dirty());
        map.set(range(BITS_PER_PAGE, BITS_PER_PAGE + 5));
        assert!(!map.any_dirty(), "no bit changed");
        map.clear(range(BITS_PER_PAGE, BITS_PER_PAGE + 1));
        assert!(map.is_dirty(1) && !map.is_dirty(0) && !map.is_dirty(2) && !map.is_dirty(3));
        map.mark_clean(1);
        map.mark_dirty(1);
        assert_eq!((map.next_dirty(1), map.next_dirty(2)), (Some(1), None));
        map.self_check();
    }

    #[test]
    fn whole_map_operations_write_every_page() {
        for operation in [Bitmap::set_all, Bitmap::clear_all] {
            let mut map = Bitmap::new(2 * BITS_PER_PAGE + 1);
            operation(&mut map);
            operation(&mut map);
            assert_eq!((0..4).filter(|page| map.is_dirty(*page)).count(), 3);
            map.self_check();
        }
    }

    #[test]
    fn the_bits_of_an_extent_lie_in_one_page() {
        let map = Bitmap::new(MAX_BITS);
        for (extent, page) in [(0, 0), (31, 0), (32, 1), (63, 1), (4_194_303, 131_071)] {
            assert_eq!(map.page_of_extent(AlExtent(extent)), page);
            assert_eq!(map.page_of(AlExtent(extent).blocks().end - 1), page);
        }
    }

    #[test]
    fn a_grown_area_is_set_unless_vouched_for() {
        for (set_new, count) in [(true, 100 + 40_000), (false, 100)] {
            let mut map = Bitmap::new(1000);
            map.set(range(900, 1000));
            map.mark_clean(0);
            map.resize(41_000, set_new);
            assert_eq!((map.count(), map.pages()), (count, 2));
            assert!(map.is_dirty(0) && map.is_dirty(1));
            map.self_check();
        }
    }

    #[test]
    fn a_shrunk_map_forgets_what_it_lost() {
        let mut map = Bitmap::new(100_000);
        map.set_all();
        map.resize(70, false);
        assert_eq!((map.count(), map.pages(), map.words().len()), (70, 1, 2));
        map.resize(100_000, false);
        assert_eq!((map.count(), map.next_clear(0)), (70, Some(70)));
        map.resize(0, true);
        assert!(!map.any_dirty());
        map.self_check();
    }

    #[test]
    #[should_panic(expected = "not on the disk")]
    fn unsaved_marks_are_not_overwritten_by_the_disk() {
        let mut map = Bitmap::new(10);
        map.set(range(0, 1));
        map.load_page(0, &[0; PAGE_BYTES]);
    }

    #[test]
    #[should_panic(expected = "page 1 of 1")]
    fn there_is_no_page_behind_the_last() {
        Bitmap::new(BITS_PER_PAGE).store_page(1, &mut [0; PAGE_BYTES]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(BlockRange),
        Clear(BlockRange),
        SetAll,
        ClearAll,
        Write(u64),
        Reload(u64),
        Resize(u64, bool),
    }

    /// Enough for two whole pages and a part of a third.
    const SPACE: u64 = 2 * BITS_PER_PAGE + 3000;

    fn any_range() -> impl Strategy<Value = BlockRange> {
        let len = prop_oneof![4 => 0u64..200, 1 => 0..SPACE];
        (0..SPACE, len).prop_map(|(start, len)| range(start, start + len))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => any_range().prop_map(Step::Set),
            8 => any_range().prop_map(Step::Clear),
            1 => Just(Step::SetAll),
            1 => Just(Step::ClearAll),
            3 => (0u64..3).prop_map(Step::Write),
            2 => (0u64..3).prop_map(Step::Reload),
            2 => (0..SPACE, any::<bool>()).prop_map(|(bits, set)| Step::Resize(bits, set)),
        ]
    }

    /// The naive map, with what the disk would hold: `None` where it is unknown.
    struct Model {
        bits: Vec<bool>,
        disk: Vec<Option<bool>>,
    }

    impl Model {
        fn put(&mut self, range: BlockRange, value: bool) -> u64 {
            let (start, end) = (offset(range.start), offset(range.end));
            let (start, end) = (start.min(self.bits.len()), end.min(self.bits.len()));
            let part = &mut self.bits[start..end.max(start)];
            let changed = part.iter().filter(|bit| **bit != value).count();
            part.fill(value);
            u64::try_from(changed).unwrap()
        }

        fn apply(&mut self, map: &mut Bitmap, step: Step) {
            match step {
                Step::Set(range) => assert_eq!(map.set(range), self.put(range, true)),
                Step::Clear(range) => assert_eq!(map.clear(range), self.put(range, false)),
                Step::SetAll => {
                    map.set_all();
                    self.bits.fill(true);
                }
                Step::ClearAll => {
                    map.clear_all();
                    self.bits.fill(false);
                }
                Step::Write(page) if page < map.pages() => {
                    let mut bytes = [0xaa; PAGE_BYTES];
                    map.store_page(page, &mut bytes);
                    map.mark_clean(page);
                    let blocks = map.blocks_of(page);
                    for (at, block) in (blocks.start..blocks.end).map(offset).enumerate() {
                        self.disk[block] = Some(bytes[at / 8] & (1 << (at % 8)) != 0);
                    }
                }
                Step::Reload(page) if page < map.pages() && !map.is_dirty(page) => {
                    let mut bytes = [0; PAGE_BYTES];
                    map.store_page(page, &mut bytes);
                    map.load_page(page, &[0; PAGE_BYTES]);
                    assert_eq!(map.count_in(map.blocks_of(page)), 0);
                    map.load_page(page, &bytes);
                }
                Step::Write(_) | Step::Reload(_) => {}
                Step::Resize(bits, set) => {
                    map.resize(bits, set);
                    self.bits.resize(offset(bits), set);
                    self.disk.resize(offset(bits), None);
                }
            }
        }

        fn check(&self, map: &Bitmap, query: BlockRange) {
            let position = |value: bool, start: u64, end: u64| {
                let mut blocks = start..end.min(map.bits());
                blocks.find(|block| self.bits[offset(*block)] == value)
            };
            let BlockRange { start, end } = query;
            assert_eq!(map.bits(), u64::try_from(self.bits.len()).unwrap());
            assert_eq!(map.next_set(start), position(true, start, SPACE));
            assert_eq!(map.next_clear(start), position(false, start, SPACE));
            assert_eq!(map.is_any_set(query), position(true, start, end).is_some());
            assert_eq!(map.is_set(start), position(true, start, start + 1).is_some());
            let count = |start: u64, end: u64| {
                let end = end.min(map.bits());
                (start..end).filter(|block| self.bits[offset(*block)]).count()
            };
            assert_eq!(map.count(), u64::try_from(count(0, SPACE)).unwrap());
            assert_eq!(map.count_in(query), u64::try_from(count(start, end)).unwrap());
            for (block, (memory, disk)) in (0u64..).zip(self.bits.iter().zip(&self.disk)) {
                let same = *disk == Some(*memory);
                assert!(same || map.is_dirty(map.page_of(block)), "block {block} is forgotten");
            }
            let pages: Vec<_> = (0..map.pages()).filter(|page| map.is_dirty(*page)).collect();
            assert_eq!(map.next_dirty(0), pages.first().copied());
            assert_eq!(map.next_dirty(2), pages.into_iter().find(|page| *page >= 2));
            assert_eq!(map.any_dirty(), map.next_dirty(0).is_some());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn behaves_like_a_vector_of_bools(
            bits in 0..SPACE,
            steps in prop::collection::vec((step(), any_range()), 0..40),
        ) {
            let mut map = Bitmap::new(bits);
            // The disk starts equal: a fresh map is clean.
            let mut model =
                Model { bits: vec![false; offset(bits)], disk: vec![Some(false); offset(bits)] };
            for (step, query) in steps {
                model.apply(&mut map, step);
                map.self_check();
                model.check(&map, query);
            }
        }
    }
}
