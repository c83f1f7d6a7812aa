//! The text form of metadata that the operator's tools exchange, and the one-line summary.
//!
//! [`dump`] writes what `drbdmeta dump-md` prints for format v08, from the line `version` on;
//! the caller puts its own comment lines (date, command) before it. [`parse`] reads such a text,
//! from either tool. [`gi_line`] is what `get-gi` prints.
//!
//! ```text
//! version "v08";
//! uuid {
//!     0x0123456789ABCDEF; 0x0000000000000000; 0x0000000000000000; 0x0000000000000000;
//!     flags 0x00000011;
//! }
//! la-size-sect 130992;
//! bm-byte-per-bit 4096;
//! device-uuid 0x0000000000000000;
//! la-peer-max-bio-size 1048576;
//! al-stripes 1;
//! al-stripe-size-4k 8;
//! bm {
//!     48 times 0xFFFFFFFFFFFFFFFF;
//!     0x0000000000000001; ...
//! }
//! ```
//!
//! `#` begins a comment that reaches to the end of its line. The bitmap is a sequence of 64-bit
//! words, the first block in the lowest bit. Words are written four to a line; eight and more
//! that are all zero or all ones are counted instead, in multiples of four.
//!
//! One difference to the stock tool is meant: it prints the flags of v08 as zero whatever they
//! are; here they are what is on disk.

use std::fmt;

use thiserror::Error;

use super::layout::{Geometry, bitmap_bytes_on_disk};
use super::page::{PAGE_SIZE, Page};
use super::superblock::{BYTES_PER_BIT_V08, Magic, MetaFlags, Superblock, Uuids};
use crate::units::Sector;

/// Words of bitmap in one page.
const WORDS_PER_PAGE: u64 = 512;
/// Words of one line.
const WORDS_PER_ROW: u64 = 4;
/// Equal words from this number on are counted.
const RUN_MIN: u64 = 8;
/// Words between two position comments.
const WORDS_PER_COMMENT: u64 = 32;
/// Data that one word describes, in KiB.
const KIB_PER_WORD: u64 = 64 * 4;

const _: () = assert!(WORDS_PER_PAGE * 8 == 4096 && PAGE_SIZE == 4096);

/// The identifiers and flags in one line, as `get-gi` prints them: four identifiers, then the
/// digits consistent, up to date, primary, connected, full sync, peer outdated, crashed primary.
#[must_use]
pub fn gi_line(superblock: &Superblock) -> String {
    let Uuids { current, bitmap, history } = superblock.uuids;
    let mut line = format!("{current:016X}:{bitmap:016X}:{:016X}:{:016X}", history[0], history[1]);
    for flag in [
        MetaFlags::CONSISTENT,
        MetaFlags::WAS_UP_TO_DATE,
        MetaFlags::PRIMARY_IND,
        MetaFlags::CONNECTED_IND,
        MetaFlags::FULL_SYNC,
        MetaFlags::PEER_OUT_DATED,
        MetaFlags::CRASHED_PRIMARY,
    ] {
        line.push_str(if superblock.flags.contains(flag) { ":1" } else { ":0" });
    }
    line
}

/// Writes the text form. `read_page` fills in a page of the bitmap by its number; pages are
/// asked for in ascending order, each once, only those that the agreed size needs.
///
/// # Errors
/// Those of `read_page` and of the output.
pub fn dump<E: From<fmt::Error>>(
    superblock: &Superblock,
    geometry: &Geometry,
    out: &mut impl fmt::Write,
    mut read_page: impl FnMut(u64, &mut Page) -> Result<(), E>,
) -> Result<(), E> {
    let bitmap_bytes = bitmap_bytes_on_disk(superblock.la_size);
    write_fields(superblock, geometry, out)?;
    writeln!(out, "# bm-bytes {bitmap_bytes};\nbm {{")?;
    let mut printer = Printer::default();
    let mut page = Page::zeroed();
    for number in 0..bitmap_bytes / 4096 {
        read_page(number, &mut page)?;
        let (words, rest) = page.0.as_chunks::<8>();
        assert!(rest.is_empty(), "a page is a whole number of words");
        for word in words {
            printer.push(u64::from_le_bytes(*word), out)?;
        }
    }
    printer.finish(out)?;
    writeln!(out, "}}\n# bits-set {};", printer.bits_set)?;
    Ok(())
}

fn write_fields(
    superblock: &Superblock,
    geometry: &Geometry,
    out: &mut impl fmt::Write,
) -> fmt::Result {
    let Uuids { current, bitmap, history } = superblock.uuids;
    writeln!(out, "version \"v08\";\n")?;
    writeln!(out, "# md_size_sect {}", superblock.md_size_sectors)?;
    writeln!(out, "# md_offset {}", geometry.superblock.byte())?;
    writeln!(out, "# al_offset {}", geometry.activity_log.byte())?;
    writeln!(out, "# bm_offset {}\n", geometry.bitmap.byte())?;
    writeln!(out, "uuid {{")?;
    writeln!(
        out,
        "    {current:#018X}; {bitmap:#018X}; {:#018X}; {:#018X};",
        history[0], history[1]
    )?;
    writeln!(out, "    flags {:#010X};\n}}", superblock.flags.0)?;
    writeln!(out, "# al-extents {};", superblock.al_extents)?;
    writeln!(out, "la-size-sect {};", superblock.la_size.0)?;
    writeln!(out, "bm-byte-per-bit {};", superblock.bytes_per_bit)?;
    writeln!(out, "device-uuid {:#018X};", superblock.device_uuid)?;
    writeln!(out, "la-peer-max-bio-size {};", superblock.la_peer_max_bio_size)?;
    writeln!(out, "al-stripes {};", superblock.al_stripes)?;
    writeln!(out, "al-stripe-size-4k {};", superblock.al_stripe_size_4k)
}

/// Arranges words in lines. Equal words are held back until a different one comes.
#[derive(Default)]
struct Printer {
    /// Words printed.
    position: u64,
    /// Words of the line that is being collected.
    row: arrayvec::ArrayVec<u64, 4>,
    /// A word and how often it has come since, behind `row`.
    run: Option<(u64, u64)>,
    bits_set: u64,
}

impl Printer {
    fn push(&mut self, word: u64, out: &mut impl fmt::Write) -> fmt::Result {
        self.bits_set += u64::from(word.count_ones());
        match &mut self.run {
            Some((value, count)) if *value == word => {
                *count += 1;
                Ok(())
            }
            Some((value, count)) => {
                let (value, count) = (*value, *count);
                self.run = Some((word, 1));
                self.flush(value, count, out)
            }
            None => {
                self.run = Some((word, 1));
                Ok(())
            }
        }
    }

    fn finish(&mut self, out: &mut impl fmt::Write) -> fmt::Result {
        if let Some((value, count)) = self.run.take() {
            self.flush(value, count, out)?;
        }
        assert!(self.row.is_empty(), "a page is a whole number of lines");
        Ok(())
    }

    /// Prints a complete run: the words that fill up the line, then counted or line by line.
    fn flush(&mut self, value: u64, mut count: u64, out: &mut impl fmt::Write) -> fmt::Result {
        while count > 0 {
            let countable = value == 0 || value == u64::MAX;
            if self.row.is_empty() && countable && count >= RUN_MIN {
                let counted = count - count % WORDS_PER_ROW;
                self.comment(out)?;
                writeln!(out, "    {counted} times {value:#018X};")?;
                self.position += counted;
                count -= counted;
            } else {
                self.row.push(value);
                count -= 1;
                self.flush_row(out)?;
            }
        }
        Ok(())
    }

    fn flush_row(&mut self, out: &mut impl fmt::Write) -> fmt::Result {
        if !self.row.is_full() {
            return Ok(());
        }
        self.comment(out)?;
        let [a, b, c, d] = self.row.take().into_inner().expect("the line is full");
        writeln!(out, "    {a:#018X}; {b:#018X}; {c:#018X}; {d:#018X};")?;
        self.position += WORDS_PER_ROW;
        Ok(())
    }

    fn comment(&self, out: &mut impl fmt::Write) -> fmt::Result {
        if self.position.is_multiple_of(WORDS_PER_COMMENT) {
            writeln!(out, "   # at {}kB", self.position * KIB_PER_WORD)?;
        }
        Ok(())
    }
}

/// Why a text cannot be restored. Lines count from 1.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DumpError {
    /// Something else was expected here.
    #[error("line {line}: expected {expected}, found \"{found}\"")]
    Expected {
        /// Where.
        line: usize,
        /// What belongs here.
        expected: &'static str,
        /// What is here.
        found: String,
    },
    /// The text stops early.
    #[error("the text ends where {expected} was expected")]
    Truncated {
        /// What is missing.
        expected: &'static str,
    },
    /// A bit stands for another amount of data.
    #[error("line {line}: bm-byte-per-bit: expected {expected}, found {found}")]
    BytesPerBit {
        /// Where.
        line: usize,
        /// Bytes of a block.
        expected: u32,
        /// The value in the text.
        found: u64,
    },
    /// More bitmap than the agreed size has.
    #[error("line {line}: more bitmap than la-size-sect needs: at most {limit} words")]
    TooManyWords {
        /// Where.
        line: usize,
        /// Words of bitmap for this size.
        limit: u64,
    },
}

/// A run of equal words of the bitmap, by the number of the word behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    end: u64,
    word: u64,
}

/// The content of a text dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Size last agreed with the peer.
    pub la_size: Sector,
    /// Generation identifiers.
    pub uuids: Uuids,
    /// Carried along.
    pub device_uuid: u64,
    /// The flags as written in the text; the stock tool writes zero.
    pub flags: MetaFlags,
    /// Largest request the peer was known to take; 0 if the text does not say.
    pub la_peer_max_bio_size: u32,
    /// Stripes of the activity log; both 0 if the text does not say.
    pub al_stripes: u32,
    /// Blocks of 4 KiB of each stripe.
    pub al_stripe_size_4k: u32,
    bitmap: Vec<Run>,
}

impl Restored {
    /// The superblock to write, for a layout computed with the shape of the log found here. It
    /// is clean, which is true only if an emptied activity log is written with it.
    #[must_use]
    pub fn superblock(&self, geometry: &Geometry) -> Superblock {
        Superblock {
            la_size: self.la_size,
            uuids: self.uuids,
            device_uuid: self.device_uuid,
            flags: self.flags.with(MetaFlags::AL_CLEAN, true),
            magic: Magic::V08Clean,
            la_peer_max_bio_size: self.la_peer_max_bio_size,
            ..Superblock::fresh(geometry)
        }
    }

    /// Fills in a page of the bitmap; zero behind what the text describes.
    pub fn read_page(&self, number: u64, page: &mut Page) {
        page.clear();
        let mut position = number.saturating_mul(WORDS_PER_PAGE);
        let mut next = self.bitmap.partition_point(|run| run.end <= position);
        for target in page.0.as_chunks_mut::<8>().0 {
            let Some(run) = self.bitmap.get(next) else { return };
            *target = run.word.to_le_bytes();
            position += 1;
            if position == run.end {
                next += 1;
            }
        }
    }
}

/// Reads the text form.
///
/// # Errors
/// If the text is no dump of format v08; the line is named.
pub fn parse(text: &str) -> Result<Restored, DumpError> {
    let mut parser = Parser { tokens: tokens(text), last: None };
    parser.literal("version", "the word version")?;
    parser.literal("\"v08\"", "the format \"v08\"")?;
    parser.end()?;
    parser.literal("uuid", "the word uuid")?;
    parser.literal("{", "{")?;
    let current = parser.hex()?;
    let bitmap = parser.hex()?;
    let history = [parser.hex()?, parser.hex()?];
    parser.literal("flags", "the word flags")?;
    let flags = parser.hex_u32()?;
    parser.literal("}", "}")?;
    parser.literal("la-size-sect", "the word la-size-sect")?;
    let la_size = Sector(parser.decimal()?);
    parser.literal("bm-byte-per-bit", "the word bm-byte-per-bit")?;
    let (expected, found) = (BYTES_PER_BIT_V08, parser.decimal()?);
    if found != u64::from(expected) {
        return Err(DumpError::BytesPerBit { line: parser.line(), expected, found });
    }
    parser.literal("device-uuid", "the word device-uuid")?;
    let device_uuid = parser.hex()?;
    let la_peer_max_bio_size = parser.optional("la-peer-max-bio-size")?;
    let al_stripes = parser.optional("al-stripes")?;
    let al_stripe_size_4k = parser.optional("al-stripe-size-4k")?;
    let bitmap_words = parser.bitmap(bitmap_bytes_on_disk(la_size) / 8)?;
    Ok(Restored {
        la_size,
        uuids: Uuids { current, bitmap, history },
        device_uuid,
        flags: MetaFlags(flags),
        la_peer_max_bio_size,
        al_stripes,
        al_stripe_size_4k,
        bitmap: bitmap_words,
    })
}

/// Words and marks of the text with the number of their line, comments left out.
fn tokens(text: &str) -> std::iter::Peekable<std::vec::IntoIter<(usize, &str)>> {
    let mut found = Vec::new();
    for (line, content) in (1..).zip(text.lines()) {
        let content = content.split('#').next().unwrap_or_default();
        for word in content.split_whitespace() {
            let marks = |c| matches!(c, '{' | '}' | ';');
            found.extend(
                word.split_inclusive(marks)
                    .flat_map(|part| match part.strip_suffix(marks) {
                        Some(before) => [before, &part[before.len()..]],
                        None => [part, ""],
                    })
                    .filter(|part| !part.is_empty())
                    .map(|part| (line, part)),
            );
        }
    }
    found.into_iter().peekable()
}

struct Parser<'a> {
    tokens: std::iter::Peekable<std::vec::IntoIter<(usize, &'a str)>>,
    last: Option<usize>,
}

impl<'a> Parser<'a> {
    fn next(&mut self, expected: &'static str) -> Result<(usize, &'a str), DumpError> {
        let token = self.tokens.next().ok_or(DumpError::Truncated { expected })?;
        self.last = Some(token.0);
        Ok(token)
    }

    /// The line of the last token.
    fn line(&self) -> usize {
        self.last.unwrap_or(1)
    }

    fn literal(&mut self, literal: &str, expected: &'static str) -> Result<(), DumpError> {
        let (line, found) = self.next(expected)?;
        if found != literal {
            return Err(DumpError::Expected { line, expected, found: found.to_owned() });
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), DumpError> {
        self.literal(";", "a semicolon")
    }

    fn number<T>(
        &mut self,
        expected: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, DumpError> {
        let (line, found) = self.next(expected)?;
        let value = read(found).ok_or_else(|| DumpError::Expected {
            line,
            expected,
            found: found.to_owned(),
        })?;
        Ok(value)
    }

    /// A hexadecimal number with its semicolon.
    fn hex(&mut self) -> Result<u64, DumpError> {
        let value = self.number("a 64-bit hexadecimal number", hex_u64)?;
        self.end()?;
        Ok(value)
    }

    fn hex_u32(&mut self) -> Result<u32, DumpError> {
        let read = |text: &str| hex_u64(text).and_then(|value| u32::try_from(value).ok());
        let value = self.number("a 32-bit hexadecimal number", read)?;
        self.end()?;
        Ok(value)
    }

    /// A decimal number with its semicolon.
    fn decimal(&mut self) -> Result<u64, DumpError> {
        let value = self.number("a decimal number", |text| text.parse().ok())?;
        self.end()?;
        Ok(value)
    }

    /// A field that texts of older tools do not have; 0 without it.
    fn optional(&mut self, name: &'static str) -> Result<u32, DumpError> {
        if self.tokens.next_if(|(_, found)| *found == name).is_none() {
            return Ok(0);
        }
        let value = self.number("a 32-bit decimal number", |text| text.parse().ok())?;
        self.end()?;
        Ok(value)
    }

    /// The words of the bitmap up to the end of the text.
    fn bitmap(&mut self, limit: u64) -> Result<Vec<Run>, DumpError> {
        self.literal("bm", "the word bm")?;
        self.literal("{", "{")?;
        let mut runs: Vec<Run> = Vec::new();
        let mut position: u64 = 0;
        while self.tokens.next_if(|(_, found)| *found == "}").is_none() {
            let expected = "a word of the bitmap, a count of words, or }";
            let (line, found) = self.next(expected)?;
            let (count, word) = if let Some(word) = hex_u64(found) {
                self.end()?;
                (1, word)
            } else if let Ok(count) = found.parse() {
                self.literal("times", "the word times")?;
                (count, self.hex()?)
            } else {
                return Err(DumpError::Expected { line, expected, found: found.to_owned() });
            };
            let end = position.checked_add(count).filter(|end| *end <= limit);
            let Some(end) = end else { return Err(DumpError::TooManyWords { line, limit }) };
            match runs.last_mut() {
                Some(run) if run.word == word => run.end = end,
                Some(_) | None if count > 0 => runs.push(Run { end, word }),
                Some(_) | None => {}
            }
            position = end;
        }
        match self.tokens.next() {
            None => Ok(runs),
            Some((line, found)) => {
                let found = found.to_owned();
                Err(DumpError::Expected { line, expected: "the end of the text", found })
            }
        }
    }
}

/// One to sixteen hexadecimal digits after `0x`.
fn hex_u64(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x")?;
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::layout::MetaKind;
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(MetaKind::Internal, Sector(131_072), Sector(0), 1, 8).unwrap()
    }

    fn superblock(la_size: u64) -> Superblock {
        Superblock {
            la_size: Sector(la_size),
            uuids: Uuids { current: 0xf69b_02d0_a429_ad36, bitmap: 0, history: [0; 2] },
            flags: MetaFlags(0x97),
            al_extents: 67,
            la_peer_max_bio_size: 1 << 20,
            ..Superblock::fresh(&geometry())
        }
    }

    fn text_of(superblock: &Superblock, words: &[u64]) -> String {
        let mut text = String::new();
        dump(superblock, &geometry(), &mut text, |number, page| {
            let from = usize::try_from(number * WORDS_PER_PAGE).unwrap();
            let words = words.iter().skip(from).chain(std::iter::repeat(&0));
            for (target, word) in page.0.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                *target = word.to_le_bytes();
            }
            Ok::<(), fmt::Error>(())
        })
        .unwrap();
        text
    }

    /// Four extents marked on a 64 MiB device: the text of the stock tool, but for the flags.
    #[test]
    fn dump_reads_as_the_stock_tools() {
        let mut words = vec![u64::MAX; 144];
        words[48..128].fill(0);
        let expected = "version \"v08\";

# md_size_sect 80
# md_offset 67104768
# al_offset 67072000
# bm_offset 67067904

uuid {
    0xF69B02D0A429AD36; 0x0000000000000000; 0x0000000000000000; 0x0000000000000000;
    flags 0x00000097;
}
# al-extents 67;
la-size-sect 130992;
bm-byte-per-bit 4096;
device-uuid 0x0000000000000000;
la-peer-max-bio-size 1048576;
al-stripes 1;
al-stripe-size-4k 8;
# bm-bytes 4096;
bm {
   # at 0kB
    48 times 0xFFFFFFFFFFFFFFFF;
    80 times 0x0000000000000000;
   # at 32768kB
    16 times 0xFFFFFFFFFFFFFFFF;
    368 times 0x0000000000000000;
}
# bits-set 4096;
";
        assert_eq!(text_of(&superblock(130_992), &words), expected);
        assert!(text_of(&superblock(0), &[]).ends_with("# bm-bytes 0;\nbm {\n}\n# bits-set 0;\n"));
    }

    /// The digits of the summary, in their order.
    #[test]
    fn summary_lists_identifiers_and_flags() {
        let mut block = superblock(0);
        block.uuids.history = [0x1234, 4];
        let uuids = "F69B02D0A429AD36:0000000000000000:0000000000001234:0000000000000004";
        for (flags, digits) in [
            (0x80, "0:0:0:0:0:0:0"),
            (0x01, "1:0:0:0:0:0:0"),
            (0x10, "0:1:0:0:0:0:0"),
            (0x02, "0:0:1:0:0:0:0"),
            (0x04, "0:0:0:1:0:0:0"),
            (0x08, "0:0:0:0:1:0:0"),
            (0x20, "0:0:0:0:0:1:0"),
            (0x40, "0:0:0:0:0:0:1"),
            (0x1ff, "1:1:1:1:1:1:1"),
        ] {
            block.flags = MetaFlags(flags);
            assert_eq!(gi_line(&block), format!("{uuids}:{digits}"));
        }
    }

    /// What is wrong with a text is told with its line.
    #[test]
    fn broken_texts_name_their_line() {
        let good = text_of(&superblock(8), &[5]);
        assert_eq!(parse(&good).map(|restored| restored.la_size), Ok(Sector(8)));
        for (from, to, message) in [
            ("\"v08\"", "\"v09\"", "line 1: expected the format \"v08\", found \"\"v09\"\""),
            ("flags 0x", "flags 0xfff", "line 10: expected a 32-bit hexadecimal number, found"),
            ("4096;\ndev", "512;\ndev", "line 14: bm-byte-per-bit: expected 4096, found 512"),
            (
                "la-size-sect 8",
                "la-size-sect -8",
                "line 13: expected a decimal number, found \"-8\"",
            ),
            ("la-size-sect 8", "la-size 8", "line 13: expected the word la-size-sect, found"),
            ("al-stripes 1;", "al-stripes 1", "line 18: expected a semicolon, found"),
            ("508 times", "509 times", "line 23: more bitmap than la-size-sect needs: at most 512"),
            ("508 times", "508 x", "line 23: expected the word times, found \"x\""),
            ("508 times", "none", "line 23: expected a word of the bitmap, a count"),
            (
                "}\n# bits",
                "# bits",
                "the text ends where a word of the bitmap, a count of words, or",
            ),
            (
                "}\n# bits",
                "} more\n# bits",
                "line 24: expected the end of the text, found \"more\"",
            ),
        ] {
            assert!(good.contains(from), "{from}");
            let error = parse(&good.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error} (expected: {message})");
        }
        assert_eq!(parse(""), Err(DumpError::Truncated { expected: "the word version" }));
    }

    /// Fields that older tools do not write have a default; white space does not matter.
    #[test]
    fn older_and_denser_texts_are_read() {
        let text = "version\"v08\";".replace("version", "version ")
            + "uuid{0x1;0x2;0x3;0x4;flags 0x11;}la-size-sect 9000;bm-byte-per-bit 4096;\
               device-uuid 0x7;bm{3 times 0xFF;0 times 0x1;0x5;# no more\n}";
        let restored = parse(&text).unwrap();
        assert_eq!((restored.al_stripes, restored.la_peer_max_bio_size), (0, 0));
        let block = restored.superblock(&geometry());
        assert_eq!(block.uuids, Uuids { current: 1, bitmap: 2, history: [3, 4] });
        assert_eq!((block.device_uuid, block.flags), (7, MetaFlags(0x91)));
        assert!(block.is_clean());
        let mut page = Page::zeroed();
        restored.read_page(0, &mut page);
        assert_eq!(page.0[..8], [0xff, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page.0[16..34], [0xff, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        restored.read_page(u64::MAX, &mut page);
        assert_eq!(page, Page::zeroed());
    }

    fn runs() -> impl Strategy<Value = Vec<u64>> {
        let word = prop_oneof![Just(0), Just(u64::MAX), Just(5), any::<u64>()];
        prop::collection::vec((word, 1_usize..600), 0..20).prop_map(|runs| {
            runs.into_iter().flat_map(|(word, count)| std::iter::repeat_n(word, count)).collect()
        })
    }

    proptest! {
        /// What is written is read back, bit for bit.
        #[test]
        fn dump_and_parse_are_inverse(words in runs(), spare in 0_u64..512) {
            let count = u64::try_from(words.len()).unwrap();
            let block = superblock(count * 512 + 1 + spare);
            let restored = parse(&text_of(&block, &words)).unwrap();
            let expected = Superblock { al_extents: 257, ..block };
            prop_assert_eq!(restored.superblock(&geometry()), expected);
            let mut page = Page::zeroed();
            for number in 0..=count / WORDS_PER_PAGE + 1 {
                restored.read_page(number, &mut page);
                for (index, bytes) in (0..).zip(page.0.as_chunks::<8>().0) {
                    let word = usize::try_from(number * WORDS_PER_PAGE + index).unwrap();
                    let expected = words.get(word).copied().unwrap_or(0);
                    prop_assert_eq!(u64::from_le_bytes(*bytes), expected);
                }
            }
        }

        /// Any text: an answer, never a panic.
        #[test]
        fn arbitrary_text_never_panics(
            cut in 0_usize..700,
            noise in "\\PC{0,20}",
            at in 0_usize..700,
        ) {
            let good = text_of(&superblock(3000), &[1, 2, 3]);
            let cut = &good[..cut.min(good.len())];
            let (head, tail) = cut.split_at(at.min(cut.len()));
            if let Ok(restored) = parse(&format!("{head}{noise}{tail}")) {
                restored.read_page(0, &mut Page::zeroed());
            }
        }
    }
}
