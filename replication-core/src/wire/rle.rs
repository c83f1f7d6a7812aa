//! The bitmap on the wire: plain words and run lengths (BM-9).
//!
//! A transfer is a series of packets with nothing in between. Each one continues where the last
//! one ended; it ends with a compressed packet that reaches the last block, or with an empty plain
//! packet after the last word. Run lengths that would take more room than the plain words give way
//! to plain words for one packet, which starts at the word that holds the current position, so
//! that up to 63 blocks are sent again.
//!
//! Run lengths alternate between clear and set. Each is coded as a prefix that names a class of
//! lengths and the offset within the class.
//!
//! Nothing in a received packet is trusted (WP-4): runs beyond the device, code words cut short,
//! bits behind the last code word and packets of the wrong size are errors. A received bitmap
//! reports set runs as ranges of blocks; it does not hold the bitmap.
//!
//! Source: protocol notes, sections 12.2 to 12.4.

use super::error::DecodeError;
use super::header::HeaderKind;
use super::packet::{CompressedBitmap, Packet};
use crate::limits::CONTROL_PACKET_SIZE;
use crate::units::BlockRange;

/// Blocks of a word.
const WORD_BITS: u64 = 64;
/// Bytes of a word.
const WORD_BYTES: usize = 8;
/// Most blocks of a transfer: runs stay shorter than the longest code word can tell. Far above
/// every device.
const MAX_BITS: u64 = 1 << 56;
/// Position of a sender whose transfer is over. No device has as many blocks.
const FINISHED: u64 = u64::MAX;

/// A class of run lengths.
struct Class {
    /// The lowest bits of a code word of this class.
    prefix: u64,
    /// Number of these bits.
    prefix_bits: u32,
    /// Number of bits behind the prefix, which hold the run length less the base.
    data_bits: u32,
    /// Least run length of the class.
    base: u64,
}

const fn class(prefix: u64, prefix_bits: u32, data_bits: u32, base: u64) -> Class {
    Class { prefix, prefix_bits, data_bits, base }
}

/// All classes, shortest code words first. No prefix begins another one.
const CLASSES: [Class; 10] = [
    class(0x00, 1, 1, 1),
    class(0x01, 2, 1, 3),
    class(0x03, 3, 2, 5),
    class(0x07, 4, 3, 9),
    class(0x0f, 5, 5, 17),
    class(0x1f, 6, 8, 49),
    class(0x3f, 8, 13, 305),
    class(0x7f, 8, 21, 8497),
    class(0xbf, 8, 34, 2_105_649),
    class(0xff, 8, 56, 17_181_974_833),
];

impl Class {
    const fn code_bits(&self) -> u32 {
        self.prefix_bits + self.data_bits
    }

    /// The class of a run length.
    ///
    /// # Panics
    /// If the run is empty, or longer than any device.
    fn of(run: u64) -> &'static Self {
        assert!(run > 0, "a run holds at least one block");
        CLASSES
            .iter()
            .find(|class| run - class.base < 1 << class.data_bits)
            .expect("runs are shorter than 2^56 blocks")
    }

    /// The class that the lowest bits of a code word name.
    fn named_by(code: u64) -> &'static Self {
        CLASSES
            .iter()
            .find(|class| code & low_bits(class.prefix_bits) == class.prefix)
            .expect("the prefixes cover every byte")
    }
}

/// A number whose lowest `count` bits are set; `count` is below 64.
const fn low_bits(count: u32) -> u64 {
    (1 << count) - 1
}

/// A position or a count that indexes memory.
fn index(value: u64) -> usize {
    usize::try_from(value).expect("a bitmap fits into memory")
}

/// A length in memory as a count.
fn count(length: usize) -> u64 {
    u64::try_from(length).expect("lengths fit 64 bits")
}

/// The words of a full plain packet.
fn plain_words(kind: HeaderKind) -> u64 {
    count((CONTROL_PACKET_SIZE - kind.size()) / WORD_BYTES)
}

/// The bytes of code words in a full compressed packet.
fn code_capacity(kind: HeaderKind) -> usize {
    CONTROL_PACKET_SIZE - kind.size() - 1
}

/// The first position behind `start` whose bit differs from `set`, or `bits`. Words without such
/// a bit are passed over whole.
fn run_end(words: &[u64], bits: u64, start: u64, set: bool) -> u64 {
    assert!(start < bits, "a run starts inside of the bitmap");
    let words = &words[..index(bits.div_ceil(WORD_BITS))];
    let same = if set { u64::MAX } else { 0 };
    let first = index(start / WORD_BITS);
    let mut differing = (words[first] ^ same) & (u64::MAX << (start % WORD_BITS));
    let mut at = first;
    while differing == 0 {
        at += 1;
        let Some(word) = words.get(at) else { return bits };
        differing = word ^ same;
    }
    bits.min(count(at) * WORD_BITS + u64::from(differing.trailing_zeros()))
}

/// The sending side of one transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapSender {
    bits: u64,
    position: u64,
}

impl BitmapSender {
    /// Starts a transfer of `bits` blocks.
    #[must_use]
    pub const fn new(bits: u64) -> Self {
        Self { bits, position: 0 }
    }

    /// The next packet of the transfer; `None` when it is over. See [`encode_bitmap`].
    pub fn next_packet(
        &mut self,
        words: &[u64],
        use_rle: bool,
        kind: HeaderKind,
    ) -> Option<Packet> {
        encode_bitmap(words, self.bits, &mut self.position, use_rle, kind)
    }

    /// Whether the last packet was handed out.
    #[must_use]
    pub const fn is_finished(&self) -> bool {
        self.position == FINISHED
    }
}

/// The next packet of a transfer of `bits` blocks, and moves `position`, which starts at 0.
/// `None` when the transfer is over.
///
/// `use_rle` must be off for agreed versions below 90. Bits of the last word beyond the device are
/// sent as clear.
///
/// # Panics
/// If `words` is shorter than the bitmap.
pub fn encode_bitmap(
    words: &[u64],
    bits: u64,
    position: &mut u64,
    use_rle: bool,
    kind: HeaderKind,
) -> Option<Packet> {
    assert!(bits <= MAX_BITS, "the device has a size that can exist");
    assert!(count(words.len()) >= bits.div_ceil(WORD_BITS), "the words hold the bitmap");
    if *position == FINISHED {
        return None;
    }
    assert!(*position <= bits, "the position lies in the bitmap");
    if *position == bits {
        *position = FINISHED;
        return Some(Packet::Bitmap(Vec::new()));
    }
    if use_rle && let Some((packet, end)) = compress(words, bits, *position, code_capacity(kind)) {
        *position = if end == bits { FINISHED } else { end };
        return Some(Packet::CompressedBitmap(packet));
    }
    let first = *position / WORD_BITS;
    let end = bits.div_ceil(WORD_BITS).min(first + plain_words(kind));
    *position = bits.min(end * WORD_BITS);
    let mut bytes = Vec::with_capacity(index(end - first) * WORD_BYTES);
    for word in &words[index(first)..index(end)] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    clear_beyond(&mut bytes, *position - first * WORD_BITS);
    Some(Packet::Bitmap(bytes))
}

/// Clears the bits from `bits` on.
fn clear_beyond(bytes: &mut [u8], bits: u64) {
    let first = index(bits / 8);
    if let Some(partial) = bytes.get_mut(first) {
        *partial &= (1 << (bits % 8)) - 1;
    }
    bytes.iter_mut().skip(first + 1).for_each(|byte| *byte = 0);
}

/// A packet of run lengths from `start`, and the position behind it; `None` if plain words take
/// less room.
fn compress(
    words: &[u64],
    bits: u64,
    start: u64,
    capacity: usize,
) -> Option<(CompressedBitmap, u64)> {
    let first_run_set = words[index(start / WORD_BITS)] >> (start % WORD_BITS) & 1 == 1;
    let mut writer = CodeWriter::new(capacity);
    let mut set = first_run_set;
    let mut at = start;
    while at < bits {
        let end = run_end(words, bits, at, set);
        if !writer.push(end - at) {
            break;
        }
        at = end;
        set = !set;
    }
    let (code, unused_bits) = writer.finish();
    let is_smaller = at - start >= 8 * count(code.len());
    is_smaller.then_some((CompressedBitmap { first_run_set, unused_bits, code }, at))
}

/// Collects code words, least significant bit first.
struct CodeWriter {
    code: Vec<u8>,
    capacity: usize,
    /// Bits that do not fill a byte yet.
    pending: u128,
    pending_bits: u32,
}

impl CodeWriter {
    fn new(capacity: usize) -> Self {
        Self { code: Vec::new(), capacity, pending: 0, pending_bits: 0 }
    }

    /// Appends a run; `false` if its code word does not fit.
    fn push(&mut self, run: u64) -> bool {
        let class = Class::of(run);
        let bits = count(self.code.len()) * 8 + u64::from(self.pending_bits + class.code_bits());
        if bits > count(self.capacity) * 8 {
            return false;
        }
        let word = (run - class.base) << class.prefix_bits | class.prefix;
        self.pending |= u128::from(word) << self.pending_bits;
        self.pending_bits += class.code_bits();
        while self.pending_bits >= 8 {
            self.code.push(self.pending.to_le_bytes()[0]);
            self.pending >>= 8;
            self.pending_bits -= 8;
        }
        true
    }

    /// The bytes, and the number of unused bits in the last one.
    fn finish(mut self) -> (Vec<u8>, u8) {
        if self.pending_bits == 0 {
            return (self.code, 0);
        }
        self.code.push(self.pending.to_le_bytes()[0]);
        let unused = u8::try_from(8 - self.pending_bits).expect("less than a byte is pending");
        (self.code, unused)
    }
}

/// Whether a transfer goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// More packets follow.
    More,
    /// This was the last packet.
    Done,
}

/// The receiving side of one transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapReceiver {
    bits: u64,
    words_per_packet: u64,
    /// The first block not received yet; [`FINISHED`] after the last packet.
    position: u64,
}

impl BitmapReceiver {
    /// Expects a transfer of `bits` blocks on a connection with 16-byte headers.
    #[must_use]
    pub fn new(bits: u64) -> Self {
        Self::for_kind(bits, HeaderKind::H100)
    }

    /// Expects a transfer of `bits` blocks; plain packets are larger behind 8-byte headers.
    ///
    /// # Panics
    /// If no device has as many blocks.
    #[must_use]
    pub fn for_kind(bits: u64, kind: HeaderKind) -> Self {
        assert!(bits <= MAX_BITS, "the device has a size that can exist");
        Self { bits, words_per_packet: plain_words(kind), position: 0 }
    }

    /// Takes the next packet of the transfer and reports its runs of set bits in ascending order.
    /// Blocks may be reported again by a later packet.
    ///
    /// # Errors
    /// [`DecodeError`] if the packet is no part of a transfer or does not fit this one. Runs may
    /// have been reported by then; the transfer cannot go on.
    pub fn receive(
        &mut self,
        packet: &Packet,
        set: impl FnMut(BlockRange),
    ) -> Result<Progress, DecodeError> {
        let (position, bits) = (self.position, self.bits);
        let misplaced = DecodeError::BitmapPacket { name: packet.name(), position, bits };
        if position == FINISHED {
            return Err(misplaced);
        }
        let is_last = if let Packet::Bitmap(bytes) = packet {
            self.receive_plain(bytes, set)?
        } else if let Packet::CompressedBitmap(compressed) = packet {
            self.receive_compressed(compressed, set)?
        } else {
            return Err(misplaced);
        };
        if is_last {
            self.position = FINISHED;
            return Ok(Progress::Done);
        }
        assert!(self.position > position, "a packet moves the transfer on");
        Ok(Progress::More)
    }

    fn receive_plain(
        &mut self,
        bytes: &[u8],
        set: impl FnMut(BlockRange),
    ) -> Result<bool, DecodeError> {
        let first = self.position / WORD_BITS;
        let is_over = self.position == self.bits;
        let remaining = if is_over { 0 } else { self.bits.div_ceil(WORD_BITS) - first };
        let expected = remaining.min(self.words_per_packet);
        let (words, rest) = bytes.as_chunks::<WORD_BYTES>();
        let found = count(words.len());
        if found != expected || !rest.is_empty() {
            return Err(DecodeError::BitmapWords { position: self.position, expected, found });
        }
        if is_over {
            return Ok(true);
        }
        let end = self.bits.min((first + expected) * WORD_BITS);
        report_words(words, first * WORD_BITS, end, set);
        self.position = end;
        Ok(false)
    }

    fn receive_compressed(
        &mut self,
        packet: &CompressedBitmap,
        mut set: impl FnMut(BlockRange),
    ) -> Result<bool, DecodeError> {
        let mut reader = CodeReader::new(packet)?;
        let mut is_set = packet.first_run_set;
        while !reader.is_empty() {
            let position = self.position;
            let run = reader.pop().ok_or(DecodeError::BitmapCode { position })?;
            if run > self.bits - position {
                return Err(DecodeError::BitmapRun { position, run, bits: self.bits });
            }
            self.position += run;
            if is_set {
                set(BlockRange { start: position, end: self.position });
            }
            is_set = !is_set;
        }
        Ok(self.position == self.bits)
    }
}

/// Reports the runs of set bits in `words`, the first of which holds block `start`, up to `end`.
fn report_words(words: &[[u8; WORD_BYTES]], start: u64, end: u64, mut set: impl FnMut(BlockRange)) {
    let mut open: Option<u64> = None;
    let mut base = start;
    for bytes in words {
        let word = u64::from_le_bytes(*bytes);
        let is_uniform = (word == 0 && open.is_none()) || (word == u64::MAX && open.is_some());
        let mut at = if is_uniform { WORD_BITS } else { 0 };
        while at < WORD_BITS {
            let same = if open.is_some() { u64::MAX } else { 0 };
            let differing = (word ^ same) & (u64::MAX << at);
            if differing == 0 {
                break;
            }
            at = u64::from(differing.trailing_zeros());
            open = match open {
                None => Some(base + at),
                Some(first) => {
                    report(first, (base + at).min(end), &mut set);
                    None
                }
            };
        }
        base += WORD_BITS;
    }
    if let Some(first) = open {
        report(first, end, &mut set);
    }
}

/// Reports a run unless it lies beyond the device.
fn report(start: u64, end: u64, set: &mut impl FnMut(BlockRange)) {
    let range = BlockRange { start, end };
    if !range.is_empty() {
        set(range);
    }
}

/// Takes code words from a packet.
struct CodeReader<'a> {
    code: &'a [u8],
    position: u64,
    end: u64,
}

impl<'a> CodeReader<'a> {
    fn new(packet: &'a CompressedBitmap) -> Result<Self, DecodeError> {
        let unused = packet.unused_bits;
        let code = packet.code.as_slice();
        let truncated = DecodeError::BitmapCode { position: 0 };
        let last = code.last().ok_or(truncated)?;
        if unused > 7 || last.leading_zeros() < u32::from(unused) {
            return Err(DecodeError::BitmapTrailing { unused });
        }
        Ok(Self { code, position: 0, end: count(code.len()) * 8 - u64::from(unused) })
    }

    const fn is_empty(&self) -> bool {
        self.position == self.end
    }

    /// The next 64 bits of the stream; zeroes behind its end.
    fn peek(&self) -> u64 {
        let tail = &self.code[index(self.position / 8)..];
        let mut bytes = [0; 16];
        let length = tail.len().min(9);
        bytes[..length].copy_from_slice(&tail[..length]);
        let shifted = u128::from_le_bytes(bytes) >> (self.position % 8);
        let [low, _] = split(shifted);
        low
    }

    /// The next run length; `None` if the stream ends inside of its code word.
    fn pop(&mut self) -> Option<u64> {
        let code = self.peek();
        let class = Class::named_by(code);
        let next = self.position + u64::from(class.code_bits());
        if next > self.end {
            return None;
        }
        self.position = next;
        Some(((code >> class.prefix_bits) & low_bits(class.data_bits)) + class.base)
    }
}

/// The low and the high half of a number.
fn split(value: u128) -> [u64; 2] {
    let bytes = value.to_le_bytes();
    let (halves, rest) = bytes.as_chunks::<8>();
    assert!(rest.is_empty() && halves.len() == 2, "sixteen bytes are two halves");
    [u64::from_le_bytes(halves[0]), u64::from_le_bytes(halves[1])]
}

#[cfg(test)]
#[path = "rle_tests.rs"]
mod tests;
