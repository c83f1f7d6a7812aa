//! The activity log on disk: a ring of transactions, and what they say after a crash.
//!
//! The log has `stripes x stripe size` blocks of 4 KiB. The transaction numbered `t` goes to the
//! block that [`block_index`] names, so that consecutive transactions walk round the ring, and
//! with several stripes jump from stripe to stripe.
//!
//! Layout of a block, numbers big endian:
//!
//! | offset | type | field |
//! |---|---|---|
//! | 0 | u32 | mark 0x69cb65a2 |
//! | 4 | u32 | transaction number, wraps |
//! | 8 | u32 | checksum |
//! | 12 | u16 | 0 = update, 0xffff = initialised |
//! | 14 | u16 | number of updates, at most 64 |
//! | 16 | u16 | slots of the whole log |
//! | 18 | u16 | first slot of the context |
//! | 20 | 16 bytes | zero |
//! | 36 | 64 x u16 | updates: slot; 0xffff = unused |
//! | 164 | 64 x u32 | updates: the extent that the slot holds from now on; 0xffffffff = unused |
//! | 420 | 919 x u32 | context: extents of slots in a row before the updates; 0xffffffff = free |
//!
//! The **context** walks over all slots, 919 at a time, so that the whole ring without its
//! oldest block names every slot. This needs `slots <= (blocks - 1) x 919` ([`max_slots`]).
//!
//! The **checksum** is CRC-32C with start value 0 and no final complement. The usual function
//! starts with all ones and complements at the end; begun with a previous checksum `c` it goes on
//! from the register value `!c`. So `!crc32c_append(!0, bytes)` is the one wanted: the register
//! starts at `!!0 = 0`, and the complement at the end is undone.
//!
//! What a crash can leave behind (AL-6): the block of the newest transaction torn. It is left
//! out; whatever waited for it was not written. Or, if it came while the log was being emptied
//! after a replay, some blocks emptied already. An emptying begins with the oldest block, alone,
//! and ends with the newest one, alone ([`Replay::ends`]): either may be torn. (If there is one
//! transaction only and the block behind it is torn, it begins with that block.) Once the oldest is
//! gone, it is known that an emptying was under way; as long as the newest is there, older ones
//! do not bring back what had left the log. [`Replay::complete`] tells when something else is
//! missing. So a crash of the recovery does not change its outcome (MD-5).
//!
//! Known limits of the format, in the lap in which numbers wrap after 2^32 transactions: an
//! emptying cut off by a crash may be taken for damage. And where the number of blocks is no power
//! of two, the walk round the ring makes one short lap. A crash in that lap is found by the same
//! test and reported as incomplete.

use arrayvec::ArrayVec;
use crc32c::crc32c_append;

use super::FormatError;
use super::layout::bitmap_bytes;
use super::page::{PAGE_SIZE, Page};
use crate::limits::{AL_CONTEXT_PER_TRANSACTION, AL_EXTENTS_MAX, AL_UPDATES_PER_TRANSACTION};
use crate::units::AlExtent;

const MAGIC: u32 = 0x69cb_65a2;
const TYPE_UPDATE: u16 = 0;
const TYPE_INITIALISED: u16 = 0xffff;
const SLOT_UNUSED: u16 = 0xffff;
const EXTENT_FREE: u32 = 0xffff_ffff;

const NUMBER_AT: usize = 4;
const CHECKSUM_AT: usize = 8;
const TYPE_AT: usize = 12;
const UPDATES_AT: usize = 14;
const SLOTS_AT: usize = 16;
const START_AT: usize = 18;
const UPDATE_SLOT_AT: usize = 36;
const UPDATE_EXTENT_AT: usize = UPDATE_SLOT_AT + 2 * AL_UPDATES_PER_TRANSACTION;
const CONTEXT_AT: usize = UPDATE_EXTENT_AT + 4 * AL_UPDATES_PER_TRANSACTION;

const _: () = assert!(UPDATE_SLOT_AT == START_AT + 2 + 16);
const _: () = assert!(UPDATE_EXTENT_AT == 164 && CONTEXT_AT == 420);
const _: () = assert!(CONTEXT_AT + 4 * AL_CONTEXT_PER_TRANSACTION == PAGE_SIZE);

/// Slots of context in one transaction, as the arithmetic of slots needs it.
const CONTEXT_SLOTS: u16 = 919;
const _: () = assert!(AL_CONTEXT_PER_TRANSACTION == 919);

/// What one transaction says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Its number.
    pub number: u32,
    /// Slots and the extents they hold from now on.
    pub updates: ArrayVec<(u16, AlExtent), AL_UPDATES_PER_TRANSACTION>,
    /// Slots of the whole log.
    pub context_slots: u16,
    /// The first slot that the context describes.
    pub context_start: u16,
    /// The extents of consecutive slots before the updates.
    pub context: ArrayVec<Option<AlExtent>, AL_CONTEXT_PER_TRANSACTION>,
}

/// What a block of the log is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AlBlock {
    /// Written when the log was created or emptied.
    Initialised,
    /// A transaction.
    Update(Box<Transaction>),
    /// Torn, damaged, or never part of a log.
    Invalid,
}

/// The block of the ring that the transaction of this number occupies.
///
/// # Panics
/// If the log has no blocks.
#[must_use]
pub fn block_index(number: u32, stripes: u32, stripe_size_4k: u32) -> u32 {
    let blocks = stripes * stripe_size_4k;
    assert!(blocks > 0, "an activity log has blocks");
    let round = number % blocks;
    (round % stripes) * stripe_size_4k + round / stripes
}

/// Most slots whose state a ring of this many blocks can always reconstruct.
#[must_use]
pub fn max_slots(blocks: u32) -> u16 {
    let covered = blocks.saturating_sub(1).saturating_mul(u32::from(CONTEXT_SLOTS));
    u16::try_from(covered).unwrap_or(AL_EXTENTS_MAX).min(AL_EXTENTS_MAX)
}

/// Where the context of the next transaction starts.
#[must_use]
pub fn next_context_start(start: u16, slots: u16) -> u16 {
    match start.checked_add(CONTEXT_SLOTS) {
        Some(next) if next < slots => next,
        Some(_) | None => 0,
    }
}

/// Writes a transaction into a page; every byte of the page is overwritten.
///
/// `slots` is the state of all slots *before* the updates.
///
/// # Panics
/// If the arguments do not describe a transaction that the format can carry: more than 64
/// updates, a slot that does not exist, the extent number that means "free", a context that
/// starts beyond the last slot.
pub fn encode_transaction(
    number: u32,
    updates: &[(u16, AlExtent)],
    slots: &[Option<AlExtent>],
    context_start: u16,
    page: &mut Page,
) {
    assert!(updates.len() <= AL_UPDATES_PER_TRANSACTION, "{} updates", updates.len());
    let slot_count = u16::try_from(slots.len()).expect("limited to 65534 slots");
    assert!(slot_count <= AL_EXTENTS_MAX, "{slot_count} slots");
    assert!(context_start < slot_count, "context from slot {context_start} of {slot_count}");
    assert!(updates.iter().all(|(slot, _)| *slot < slot_count), "update of a slot beyond the last");

    page.0[..UPDATE_SLOT_AT].fill(0);
    page.0[UPDATE_SLOT_AT..].fill(0xff);
    page.put_u32(0, MAGIC);
    page.put_u32(NUMBER_AT, number);
    page.put_u16(TYPE_AT, TYPE_UPDATE);
    page.put_u16(UPDATES_AT, u16::try_from(updates.len()).expect("at most 64"));
    page.put_u16(SLOTS_AT, slot_count);
    page.put_u16(START_AT, context_start);
    for (index, (slot, extent)) in updates.iter().enumerate() {
        page.put_u16(UPDATE_SLOT_AT + 2 * index, *slot);
        page.put_u32(UPDATE_EXTENT_AT + 4 * index, raw_extent(*extent));
    }
    let context = slots.iter().skip(usize::from(context_start)).take(AL_CONTEXT_PER_TRANSACTION);
    for (index, slot) in context.enumerate() {
        if let Some(extent) = slot {
            page.put_u32(CONTEXT_AT + 4 * index, raw_extent(*extent));
        }
    }
    page.put_u32(CHECKSUM_AT, checksum(page));
}

/// Writes the block that an empty log consists of; every byte of the page is overwritten.
pub fn encode_initialised(page: &mut Page) {
    page.clear();
    page.put_u32(0, MAGIC);
    page.put_u16(TYPE_AT, TYPE_INITIALISED);
    page.put_u32(CHECKSUM_AT, checksum(page));
}

/// Reads a block of the log. Whatever the bytes are, the answer is one of [`AlBlock`].
#[must_use]
pub fn decode_block(page: &Page) -> AlBlock {
    if page.u32_at(0) != MAGIC || page.u32_at(CHECKSUM_AT) != checksum(page) {
        return AlBlock::Invalid;
    }
    match page.u16_at(TYPE_AT) {
        TYPE_UPDATE => decode_update(page)
            .map_or(AlBlock::Invalid, |transaction| AlBlock::Update(Box::new(transaction))),
        TYPE_INITIALISED => AlBlock::Initialised,
        _ => AlBlock::Invalid,
    }
}

/// Reads the fields of an update. `None` if it claims more updates than fit.
///
/// An update of the unused slot, or to no extent, is skipped: keeping what the slot held before
/// marks too much rather than too little.
fn decode_update(page: &Page) -> Option<Transaction> {
    let count = usize::from(page.u16_at(UPDATES_AT));
    if count > AL_UPDATES_PER_TRANSACTION {
        return None;
    }
    let mut updates = ArrayVec::new();
    for index in 0..count {
        let slot = page.u16_at(UPDATE_SLOT_AT + 2 * index);
        let extent = page.u32_at(UPDATE_EXTENT_AT + 4 * index);
        if slot != SLOT_UNUSED && extent != EXTENT_FREE {
            updates.push((slot, AlExtent(extent)));
        }
    }
    let context_slots = page.u16_at(SLOTS_AT);
    let context_start = page.u16_at(START_AT);
    let described = usize::from(context_slots.saturating_sub(context_start));
    let mut context: ArrayVec<_, AL_CONTEXT_PER_TRANSACTION> = (0..AL_CONTEXT_PER_TRANSACTION)
        .map(|index| page.u32_at(CONTEXT_AT + 4 * index))
        .map(|raw| (raw != EXTENT_FREE).then_some(AlExtent(raw)))
        .collect();
    // Beyond the last slot entries are free; one that is not counts all the same.
    while context.len() > described && context.last().is_some_and(Option::is_none) {
        context.pop();
    }
    Some(Transaction {
        number: page.u32_at(NUMBER_AT),
        updates,
        context_slots,
        context_start,
        context,
    })
}

fn raw_extent(extent: AlExtent) -> u32 {
    assert!(extent.0 != EXTENT_FREE, "this extent number means a free slot");
    extent.0
}

/// The checksum of a block, with its own field taken as zero.
fn checksum(page: &Page) -> u32 {
    let register_zero = !0;
    let head = crc32c_append(register_zero, &page.0[..CHECKSUM_AT]);
    let field = crc32c_append(head, &[0; 4]);
    !crc32c_append(field, &page.0[TYPE_AT..])
}

/// What the log says about the time before the crash.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Replay {
    /// The extents that may hold unfinished writes, ascending, each once.
    pub extents: Vec<AlExtent>,
    /// Whether there was a transaction at all: if so the log has to be emptied after its extents
    /// are marked.
    pub updates_found: bool,
    /// Whether nothing is missing that a crash cannot have torn. If false, the extents are what
    /// could still be read, and the disk has lost or mixed up blocks of the log: only marking
    /// the whole device is safe.
    pub complete: bool,
    /// The blocks that an emptying of this log has to begin and to end with.
    pub ends: (u32, u32),
}

/// Reads the whole log, all blocks in the order of the disk, and collects the extents that it
/// names. Reading it twice gives the same (AL-5).
///
/// # Errors
/// If there is no transaction although the log is not new: the first block is damaged, and others.
///
/// # Panics
/// If there are not as many blocks as the shape says.
pub fn replay<'a>(
    blocks: impl IntoIterator<Item = &'a Page>,
    stripes: u32,
    stripe_size_4k: u32,
) -> Result<Replay, FormatError> {
    let mut ring = Ring::read(blocks);
    let expected = stripes * stripe_size_4k;
    assert!(ring.blocks == expected, "{} of {expected} blocks of the log", ring.blocks);
    let Some(newest) = ring.newest() else {
        let was_emptied = ring.initialised.contains(&0);
        if !was_emptied && ring.invalid.iter().any(|index| *index != 0) {
            let invalid = u32::try_from(ring.invalid.len()).expect("no more than blocks");
            return Err(FormatError::ActivityLogUnusable { invalid, blocks: ring.blocks });
        }
        let extents = Vec::new();
        return Ok(Replay { extents, updates_found: false, complete: true, ends: (0, 0) });
    };
    let age = |transaction: &Transaction| newest.wrapping_sub(transaction.number);
    let next = block_index(newest.wrapping_add(1), stripes, stripe_size_4k);
    let in_place = ring.updates.iter().all(|(index, transaction)| {
        age(transaction) < ring.blocks
            && *index == block_index(transaction.number, stripes, stripe_size_4k)
    });
    // In the first lap the next block is one of those that were never used.
    let is_first_lap = ring.updates.iter().all(|(_, transaction)| transaction.number <= newest)
        && newest < ring.blocks;
    let oldest = if is_first_lap { 0 } else { next };
    // With a torn block behind the only transaction, a tear in that one would leave two of them.
    let is_only_one = ring.updates.len() == 1 && ring.invalid.contains(&next);
    let first = if is_only_one { next } else { oldest };
    let last = block_index(newest, stripes, stripe_size_4k);
    let torn_by_crash = ring.invalid.iter().all(|index| *index == next || *index == oldest);
    let being_emptied = (!is_first_lap && !ring.initialised.is_empty())
        || ring.is_being_emptied(newest, stripes, stripe_size_4k);
    let complete = in_place && (being_emptied || torn_by_crash);
    ring.updates.sort_by_key(|(_, transaction)| std::cmp::Reverse(age(transaction)));
    let mut slots: Vec<Option<AlExtent>> = Vec::new();
    for (_, transaction) in &ring.updates {
        for (slot, extent) in (usize::from(transaction.context_start)..).zip(&transaction.context) {
            *slot_mut(&mut slots, slot) = *extent;
        }
        for (slot, extent) in &transaction.updates {
            *slot_mut(&mut slots, usize::from(*slot)) = Some(*extent);
        }
    }
    let mut extents: Vec<AlExtent> = slots.into_iter().flatten().collect();
    extents.sort_unstable();
    extents.dedup();
    Ok(Replay { extents, updates_found: true, complete, ends: (first, last) })
}

/// Sets the bits of those extents that page `number` of the bitmap describes, and returns how
/// many were not set before. Setting them again changes nothing (AL-5).
pub fn mark_extents(extents: &[AlExtent], number: u64, page: &mut Page) -> u64 {
    let mut added = 0;
    for extent in extents {
        let (of_extent, bytes) = bitmap_bytes(*extent);
        if of_extent == number {
            let marked = &mut page.0[bytes];
            added += marked.iter().map(|byte| u64::from(byte.count_zeros())).sum::<u64>();
            marked.fill(0xff);
        }
    }
    added
}

/// The blocks of a log, sorted by what they are, with their place in the ring.
struct Ring {
    blocks: u32,
    initialised: Vec<u32>,
    updates: Vec<(u32, Box<Transaction>)>,
    invalid: Vec<u32>,
}

impl Ring {
    fn read<'a>(blocks: impl IntoIterator<Item = &'a Page>) -> Self {
        let mut ring =
            Self { blocks: 0, initialised: Vec::new(), updates: Vec::new(), invalid: Vec::new() };
        for page in blocks {
            match decode_block(page) {
                AlBlock::Initialised => ring.initialised.push(ring.blocks),
                AlBlock::Update(transaction) => ring.updates.push((ring.blocks, transaction)),
                AlBlock::Invalid => ring.invalid.push(ring.blocks),
            }
            ring.blocks += 1;
        }
        ring
    }

    /// Whether an emptying of the log was cut off.
    ///
    /// Numbers start at 0 in an empty log, so in its first lap the initialised blocks are those
    /// beyond the newest transaction. Anywhere else they come from an emptying, and that happens
    /// after all extents were marked: whatever is missing by now is not missed.
    fn is_being_emptied(&self, newest: u32, stripes: u32, stripe_size_4k: u32) -> bool {
        let position = |index: u32| (index % stripe_size_4k) * stripes + index / stripe_size_4k;
        let beyond_newest = |index: &u32| newest < position(*index);
        !self.initialised.iter().all(beyond_newest)
    }

    /// The number of the newest transaction: numbers wrap, so the half of all numbers that
    /// follow one is newer than it.
    fn newest(&self) -> Option<u32> {
        self.updates.iter().map(|(_, transaction)| transaction.number).reduce(|newest, number| {
            let ahead = number.wrapping_sub(newest);
            if ahead < 1 << 31 { number } else { newest }
        })
    }
}

/// A slot, in a table that grows to it: at most 65535 + 919 entries.
fn slot_mut(slots: &mut Vec<Option<AlExtent>>, slot: usize) -> &mut Option<AlExtent> {
    if slots.len() <= slot {
        slots.resize(slot + 1, None);
    }
    &mut slots[slot]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slots(count: usize) -> Vec<Option<AlExtent>> {
        vec![None; count]
    }

    fn transaction(number: u32, updates: &[(u16, AlExtent)], before: &[Option<AlExtent>]) -> Page {
        let mut page = Page::zeroed();
        page.0.fill(0x5a);
        encode_transaction(number, updates, before, 0, &mut page);
        *page
    }

    fn initialised() -> Page {
        let mut page = Page::zeroed();
        page.0.fill(0x5a);
        encode_initialised(&mut page);
        *page
    }

    /// Checksums of blocks that the stock driver and tool wrote.
    #[test]
    fn checksums_match_the_stock_driver() {
        assert_eq!(initialised().u32_at(CHECKSUM_AT), 0x709c_c651);
        assert_eq!(transaction(0, &[], &slots(1237)).u32_at(CHECKSUM_AT), 0x7396_232e);
        assert_eq!(transaction(0, &[], &slots(67)).u32_at(CHECKSUM_AT), 0x3ef8_578b);
    }

    /// The seven further blocks of the stock driver's first initialisation: numbers and the walk
    /// of the context.
    #[test]
    fn context_walks_over_the_slots() {
        let crcs = [
            0x7396_232e_u32,
            0xa619_fd4b,
            0x3ddb_c52b,
            0xe854_1b4e,
            0xef0d_ef24,
            0x3a82_3141,
            0xa140_0921,
            0x74cf_d744,
        ];
        let mut start = 0;
        let mut page = Page::zeroed();
        for (number, crc) in (0..).zip(crcs) {
            assert_eq!(start, if number % 2 == 0 { 0 } else { 919 });
            encode_transaction(number, &[], &slots(1237), start, &mut page);
            assert_eq!(page.u32_at(CHECKSUM_AT), crc, "number {number}");
            start = next_context_start(start, 1237);
        }
        assert_eq!(next_context_start(0, 919), 0);
        assert_eq!(next_context_start(64_330, 65_534), 65_249);
        assert_eq!(next_context_start(65_249, 65_534), 0);
    }

    /// What a ring can reconstruct.
    #[test]
    fn slots_are_limited_by_the_ring() {
        let table = [(8, 6433), (0, 0), (1, 0), (2, 919), (73, 65_534), (u32::MAX, 65_534)];
        for (blocks, expected) in table {
            assert_eq!(max_slots(blocks), expected, "{blocks} blocks");
        }
    }

    /// The ring visits every block once in a lap, stripe by stripe.
    #[test]
    fn ring_visits_stripes_in_turn() {
        let order: Vec<u32> = (0..13).map(|number| block_index(number, 3, 4)).collect();
        assert_eq!(order, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, 0]);
        let plain: Vec<u32> = (6..10).map(|number| block_index(number, 1, 8)).collect();
        assert_eq!(plain, [6, 7, 0, 1]);
        assert_eq!(block_index(u32::MAX, 1, 8), 7);
    }

    /// Written and read again: the same, with context cut to the slots there are.
    #[test]
    fn transaction_reads_back() {
        let mut before = slots(1000);
        before[0] = Some(AlExtent(7));
        before[999] = Some(AlExtent(u32::MAX - 1));
        let updates: Vec<(u16, AlExtent)> =
            (0..64).map(|slot| (slot, AlExtent(u32::from(slot) * 3))).collect();
        let mut page = Page::zeroed();
        encode_transaction(u32::MAX, &updates, &before, 919, &mut page);
        let AlBlock::Update(read) = decode_block(&page) else { panic!("not an update") };
        assert_eq!((read.number, read.context_slots, read.context_start), (u32::MAX, 1000, 919));
        assert_eq!(read.updates.as_slice(), updates);
        assert_eq!(read.context.as_slice(), &before[919..]);
        assert_eq!(decode_block(&initialised()), AlBlock::Initialised);
    }

    /// A block with a good checksum and impossible content is no transaction.
    #[test]
    fn impossible_fields_make_a_block_invalid() {
        for (at, value) in [(UPDATES_AT, 65), (TYPE_AT, 1), (0, 0x69cc)] {
            let mut page = transaction(3, &[], &slots(67));
            page.put_u16(at, value);
            page.put_u32(CHECKSUM_AT, checksum(&page));
            assert_eq!(decode_block(&page), AlBlock::Invalid, "field at {at}");
        }
        let mut unused = transaction(3, &[(5, AlExtent(6)), (7, AlExtent(8))], &slots(67));
        unused.put_u16(UPDATE_SLOT_AT, SLOT_UNUSED);
        unused.put_u32(CHECKSUM_AT, checksum(&unused));
        let AlBlock::Update(read) = decode_block(&unused) else { panic!("not an update") };
        assert_eq!(read.updates.as_slice(), [(7, AlExtent(8))]);
    }

    /// AL-6: a block of which any prefix or suffix of sectors arrived is no transaction, unless
    /// that makes it the old or the new block.
    #[test]
    fn torn_block_is_recognised() {
        let mut before = slots(1237);
        for (extent, slot) in (0..).zip(before.iter_mut()) {
            *slot = Some(AlExtent(extent));
        }
        let old = transaction(8, &[(3, AlExtent(5000))], &before);
        before[3] = Some(AlExtent(5000));
        before[800] = Some(AlExtent(5001));
        let new = transaction(16, &[(900, AlExtent(6000))], &before);
        for cut in 1..8 {
            for (head, tail) in [(&old, &new), (&new, &old)] {
                let mut torn = head.clone();
                torn.0[cut * 512..].copy_from_slice(&tail.0[cut * 512..]);
                if torn != old && torn != new {
                    assert_eq!(decode_block(&torn), AlBlock::Invalid, "cut at sector {cut}");
                }
            }
        }
        let mut first_sector_only = old.clone();
        first_sector_only.0[..512].copy_from_slice(&new.0[..512]);
        assert_eq!(decode_block(&first_sector_only), AlBlock::Invalid);
    }

    /// A log of `blocks` blocks after so many one-slot transactions on `count` slots, from the
    /// first number on, and the extents that are hot after the last one and before it.
    fn run(stripes: u32, size: u32, count: u16, first: u32, moves: &[(u16, u32)]) -> Run {
        let mut log = vec![initialised(); usize::try_from(stripes * size).unwrap()];
        let mut table = slots(usize::from(count));
        let (mut start, mut number) = (0, first);
        let mut before = Vec::new();
        for (slot, extent) in moves {
            let slot = slot % count;
            before = hot(&table);
            let index = usize::try_from(block_index(number, stripes, size)).unwrap();
            encode_transaction(
                number,
                &[(slot, AlExtent(*extent))],
                &table,
                start,
                &mut log[index],
            );
            table[usize::from(slot)] = Some(AlExtent(*extent));
            start = next_context_start(start, count);
            number = number.wrapping_add(1);
        }
        Run { log, now: hot(&table), before, next: number }
    }

    struct Run {
        log: Vec<Page>,
        now: Vec<AlExtent>,
        before: Vec<AlExtent>,
        next: u32,
    }

    fn hot(table: &[Option<AlExtent>]) -> Vec<AlExtent> {
        let mut extents: Vec<AlExtent> = table.iter().flatten().copied().collect();
        extents.sort_unstable();
        extents.dedup();
        extents
    }

    /// A new log, and one whose first transaction was torn, have nothing to say. Anything else
    /// without a transaction is damage.
    #[test]
    fn log_without_transactions() {
        let nothing =
            Replay { extents: vec![], updates_found: false, complete: true, ends: (0, 0) };
        let mut log = vec![initialised(); 8];
        assert_eq!(replay(&log, 1, 8), Ok(nothing.clone()));
        log[0].0[100] = 1;
        assert_eq!(replay(&log, 1, 8), Ok(nothing));
        log[3].0[100] = 1;
        let damaged = FormatError::ActivityLogUnusable { invalid: 2, blocks: 8 };
        assert_eq!(replay(&log, 1, 8), Err(damaged));
        let zeroed = vec![*Page::zeroed(); 8];
        let unusable = FormatError::ActivityLogUnusable { invalid: 8, blocks: 8 };
        assert_eq!(replay(&zeroed, 1, 8), Err(unusable));
    }

    /// The numbers wrap in the middle of the ring and the newest is still known.
    #[test]
    fn replay_follows_wrapping_numbers() {
        let moves: Vec<(u16, u32)> = (0..40).map(|step| (step % 5, u32::from(step))).collect();
        let run = run(1, 8, 5, u32::MAX - 35, &moves);
        assert_eq!(run.next, 4);
        let read = replay(&run.log, 1, 8).unwrap();
        assert_eq!(read.extents, run.now);
        assert!(read.complete);
    }

    /// A block that is not the torn newest one: the extents are reported, and that they are not
    /// all. A misplaced block and a stale one count the same.
    #[test]
    fn damage_that_no_crash_explains_is_told() {
        let moves: Vec<(u16, u32)> = (0..20).map(|step| (step, u32::from(step))).collect();
        let good = run(1, 8, 67, 0, &moves);
        assert!(replay(&good.log, 1, 8).unwrap().complete);
        for index in 0..8 {
            let mut log = good.log.clone();
            log[index].0[4000] ^= 1;
            // Numbers 12..=19 are there: 19 may be torn in block 3, or 20 in block 4.
            let torn = index == 3 || index == 4;
            assert_eq!(replay(&log, 1, 8).unwrap().complete, torn, "block {index}");
        }
        let mut misplaced = good.log.clone();
        misplaced.swap(1, 2);
        assert!(!replay(&misplaced, 1, 8).unwrap().complete);
        let mut lost_write = good.log.clone();
        let early = run(1, 8, 67, 0, &moves[..12]);
        lost_write[6] = early.log[6].clone();
        assert!(!replay(&lost_write, 1, 8).unwrap().complete);
        // A block that was not emptied, and looks newer than what was written since.
        let begun = run(1, 8, 67, 0, &moves[..1]);
        let mut never_emptied = begun.log.clone();
        never_emptied[3] = good.log[3].clone();
        assert!(replay(&begun.log, 1, 8).unwrap().complete);
        assert!(!replay(&never_emptied, 1, 8).unwrap().complete);
        // The first transaction in another place, in a log that was never used.
        let mut elsewhere = vec![initialised(); 8];
        elsewhere[5] = begun.log[0].clone();
        assert!(!replay(&elsewhere, 1, 8).unwrap().complete);
    }

    fn torn(page: &Page) -> Page {
        let mut page = page.clone();
        page.0[..512].copy_from_slice(&initialised().0[..512]);
        page
    }

    /// MD-5: a crash while the log is being emptied, whatever blocks it tears, is no damage, and
    /// names no extent that had left the log.
    #[test]
    fn interrupted_emptying_is_no_damage() {
        let cases = [1, 3, 8, 21].into_iter().flat_map(|moves| [(moves, false), (moves, true)]);
        for (moves, next_is_torn) in cases {
            let moves: Vec<_> = (0..moves).map(|step| (step % 4, u32::from(step))).collect();
            for (stripes, size) in [(1, 8), (2, 4)] {
                let mut full = run(stripes, size, 4, 0, &moves);
                if next_is_torn {
                    // What the crash that led here has torn.
                    let next = block_index(full.next, stripes, size) as usize;
                    full.log[next] = torn(&transaction(full.next, &[], &slots(4)));
                }
                let (first, last) = replay(&full.log, stripes, size).unwrap().ends;
                let mut log = full.log.clone();
                log[first as usize] = torn(&full.log[first as usize]);
                assert!(replay(&log, stripes, size).unwrap().complete, "the first is torn");
                // Each of the others is as it was, torn, or emptied.
                for mix in (0..3_usize.pow(8)).step_by(41) {
                    for (block, page) in log.iter_mut().enumerate() {
                        let is_old = block == last as usize && block != first as usize;
                        *page = match (mix / 3_usize.pow(block.try_into().unwrap())) % 3 {
                            _ if is_old => full.log[block].clone(),
                            _ if block == first as usize => initialised(),
                            0 => full.log[block].clone(),
                            1 if full.log[block] != initialised() => torn(&full.log[block]),
                            _ => initialised(),
                        };
                    }
                    let read = replay(&log, stripes, size).unwrap();
                    assert!(read.complete, "{mix}");
                    assert!(read.extents.iter().all(|extent| full.now.contains(extent)), "{mix}");
                }
                let mut log = vec![initialised(); 8];
                log[last as usize] = torn(&full.log[last as usize]);
                assert!(replay(&log, stripes, size).unwrap().complete, "the last is torn");
            }
        }
    }

    /// Bits of an extent go to its page alone, and are counted once.
    #[test]
    fn extents_are_marked_once() {
        let extents = [AlExtent(31), AlExtent(32), AlExtent(33)];
        let mut page = Page::zeroed();
        page.0[128] = 0b11;
        assert_eq!(mark_extents(&extents, 1, &mut page), 2046);
        assert!(page.0[..256].iter().all(|byte| *byte == 0xff));
        assert!(page.0[256..].iter().all(|byte| *byte == 0));
        assert_eq!(mark_extents(&extents, 1, &mut page), 0);
        assert_eq!(mark_extents(&extents, 2, &mut page), 0);
    }

    fn shapes() -> impl Strategy<Value = (u32, u32)> {
        prop_oneof![Just((1, 8)), Just((3, 4)), Just((8, 1)), Just((2, 8))]
    }

    proptest! {
        /// AL-5 and AL-6 against the table that the writer had: after a clean stop the replay
        /// is that table; with the newest block torn it is the table before, or more.
        #[test]
        fn replay_is_the_writers_table(
            (stripes, size) in shapes(),
            count in prop_oneof![1_u16..100, 900_u16..1300, Just(6433)],
            moves in prop::collection::vec((any::<u16>(), 0_u32..5000), 0..60),
            sector in 1_usize..8,
        ) {
            let run = run(stripes, size, count, 0, &moves);
            let read = replay(&run.log, stripes, size).unwrap();
            prop_assert!(read.complete);
            prop_assert_eq!(read.updates_found, !moves.is_empty());
            prop_assert_eq!(&read.extents, &run.now);

            // The next transaction is torn: all but its last sectors are still the old block.
            let mut log = run.log.clone();
            let next = usize::try_from(block_index(run.next, stripes, size)).unwrap();
            log[next].0[..sector * 512].fill(0x77);
            let torn = replay(&log, stripes, size).unwrap();
            prop_assert!(torn.complete);
            prop_assert_eq!(&torn.extents, &run.now);

            // The newest one is torn instead: what it added had not been written to.
            if let Some(newest) = run.next.checked_sub(1) {
                let newest = usize::try_from(block_index(newest, stripes, size)).unwrap();
                log = run.log.clone();
                log[newest].0[..sector * 512].fill(0x77);
                let torn = replay(&log, stripes, size).unwrap();
                prop_assert!(torn.complete);
                prop_assert_eq!(&torn.extents, &run.before);
            }
        }

        /// Any bytes in any block, even with a good checksum: an answer, never a panic.
        #[test]
        fn arbitrary_bytes_never_panic(
            noise in prop::collection::vec(any::<u8>(), 600),
            kind in prop_oneof![Just(0_u16), Just(0xffff), any::<u16>()],
            checked in any::<bool>(),
            place in 0_usize..8,
        ) {
            let mut page = Page::zeroed();
            page.0[..600].copy_from_slice(&noise);
            if checked {
                page.put_u32(0, MAGIC);
                page.put_u16(TYPE_AT, kind);
                page.put_u32(CHECKSUM_AT, checksum(&page));
            }
            let block = decode_block(&page);
            prop_assert!(checked || block == AlBlock::Invalid);
            let mut log = vec![initialised(); 8];
            log[place] = *page;
            let read = replay(&log, 1, 8);
            // A log whose first block is empty has nothing to lose in the others.
            prop_assert!(read.is_ok());
        }
    }
}
