//! The ledger: which contents a sector of a volume may have.
//!
//! Every sector that a host writes carries its version, address and a checksum, so that torn,
//! misdirected and stale data is recognised on sight. The ledger keeps for every sector the
//! versions that may still be there. Moments are numbers of simulation steps.
//!
//! A version is *superseded* when a version that was submitted after its end is known to be
//! there: acknowledged, or seen by a read. What was never acknowledged may be there or not, until
//! it is superseded. When the only good copy loses power, what was not flushed becomes doubtful
//! again ([`Ledger::doubt_unflushed`]).

use std::collections::BTreeMap;

use replication_core::units::SectorRange;

use super::disk::SECTOR;
use super::rng::mix;

const MAGIC: u64 = u64::from_le_bytes(*b"SIMSECT1");

/// The content of a sector as far as it is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All zeroes.
    Zeroes,
    /// A whole sector of this version, in its place.
    Version(u64),
    /// A whole sector that belongs elsewhere.
    Misplaced {
        /// Its version.
        version: u64,
        /// Where it belongs.
        volume: u8,
        /// Where it belongs.
        sector: u64,
    },
    /// Anything else.
    Garbage,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Writes the contents of a sector.
pub fn stamp(bytes: &mut [u8], volume: u8, sector: u64, version: u64) {
    assert!(bytes.len() == SECTOR, "one sector");
    let base = mix(version ^ (sector << 20));
    let mut sum = MAGIC;
    for (at, part) in bytes.chunks_mut(8).enumerate() {
        let value = match at {
            0 => MAGIC,
            1 => version,
            2 => sector,
            3 => u64::from(volume),
            63 => sum,
            at => base.wrapping_mul(at as u64 | 1).rotate_left(29),
        };
        sum = (sum.rotate_left(17) ^ value).wrapping_mul(MAGIC | 1);
        part.copy_from_slice(&value.to_le_bytes());
    }
}

/// Recognises the contents of a sector.
#[must_use]
pub fn recognise(bytes: &[u8], volume: u8, sector: u64) -> Content {
    if bytes.iter().all(|byte| *byte == 0) {
        return Content::Zeroes;
    }
    if word(bytes, 0) != MAGIC {
        return Content::Garbage;
    }
    let (version, own_sector) = (word(bytes, 8), word(bytes, 16));
    let Ok(own_volume) = u8::try_from(word(bytes, 24)) else { return Content::Garbage };
    let mut expected = [0; SECTOR];
    stamp(&mut expected, own_volume, own_sector, version);
    if bytes != expected {
        Content::Garbage
    } else if (own_volume, own_sector) == (volume, sector) {
        Content::Version(version)
    } else {
        Content::Misplaced { version, volume: own_volume, sector: own_sector }
    }
}

/// One write of one sector.
#[derive(Clone, Debug)]
struct Record {
    version: u64,
    /// It left zeroes instead of its stamp.
    zeroes: bool,
    /// It left what nobody knows.
    anything: bool,
    submitted: u64,
    /// When it was answered, or given up by a crash; `None`: under way.
    ended: Option<u64>,
    /// Known to be there at its end.
    certain: bool,
    /// Covered by an acknowledged flush.
    safe: bool,
    /// Seen equal on both disks, at rest.
    settled: bool,
    /// When a read had ended that saw that another one was there: no read that is asked later may
    /// return it.
    ruled_out: Option<u64>,
}

impl Record {
    fn matches(&self, content: Content) -> bool {
        self.anything || self.leaves(content)
    }

    fn leaves(&self, content: Content) -> bool {
        match content {
            Content::Zeroes => self.zeroes,
            Content::Version(version) => !self.zeroes && version == self.version,
            Content::Misplaced { .. } | Content::Garbage => false,
        }
    }

    const fn base(anything: bool) -> Self {
        Self {
            version: 0,
            zeroes: true,
            anything,
            submitted: 0,
            ended: Some(0),
            certain: true,
            safe: true,
            settled: true,
            ruled_out: None,
        }
    }
}

/// What a host asked to be written.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// Its number.
    pub version: u64,
    /// The volume.
    pub volume: u8,
    /// Where.
    pub range: SectorRange,
    /// Zeroes or a discard.
    pub zeroes: bool,
}

/// The ledger of both hosts.
#[derive(Debug, Default)]
pub struct Ledger {
    sectors: BTreeMap<(u8, u64), Vec<Record>>,
    /// Ranges that may have held anything before the first write.
    unknown: Vec<(u8, SectorRange)>,
    next_version: u64,
    keeps_unsettled: bool,
    is_lenient: bool,
}

impl Ledger {
    /// An empty ledger. `keeps_unsettled`: flushed data may come back into question too
    /// (protocols A and B).
    #[must_use]
    pub fn new(keeps_unsettled: bool) -> Self {
        Self { keeps_unsettled, ..Self::default() }
    }

    /// Flushed data may come back into question, too.
    pub const fn keep_unsettled(&mut self, keeps: bool) {
        self.keeps_unsettled |= keeps;
    }

    /// Whether flushed data may come back into question.
    #[must_use]
    pub const fn keeps_unsettled(&self) -> bool {
        self.keeps_unsettled
    }

    /// From now on any version that was ever written to a sector may be there: two nodes have a
    /// history each, or no good copy is left. What was never written there is still recognised, by
    /// its stamp.
    pub const fn be_lenient(&mut self) {
        self.is_lenient = true;
    }

    /// A part of a device that nobody has written to yet holds anything, such as metadata that was
    /// there before the device grew.
    pub fn add_unknown(&mut self, volume: u8, range: SectorRange) {
        self.unknown.push((volume, range));
    }

    fn base_of(&self, volume: u8, sector: u64) -> Record {
        let is_it = |(of, range): &(u8, SectorRange)| {
            *of == volume && (range.start..range.end).contains(&sector)
        };
        Record::base(self.unknown.iter().any(is_it))
    }

    /// A version that was never used.
    pub fn new_version(&mut self) -> u64 {
        self.next_version += 1;
        self.next_version
    }

    /// A write begins.
    pub fn submitted(&mut self, write: Write, now: u64) {
        for sector in write.range.start..write.range.end {
            let key = (write.volume, sector);
            let base = self.base_of(write.volume, sector);
            let records = self.sectors.entry(key).or_insert_with(|| vec![base]);
            prune(records);
            records.push(Record {
                version: write.version,
                zeroes: write.zeroes,
                anything: false,
                submitted: now,
                ended: None,
                certain: false,
                safe: false,
                settled: false,
                ruled_out: None,
            });
        }
    }

    /// A write was answered, or given up by a crash.
    pub fn ended(&mut self, write: Write, now: u64, acknowledged: bool, fua: bool) {
        for sector in write.range.start..write.range.end {
            let records = self.sectors.get_mut(&(write.volume, sector)).expect("it was submitted");
            let record = records.iter_mut().find(|record| record.version == write.version);
            let record = record.expect("a write under way is not forgotten");
            assert!(record.ended.is_none(), "a write ends once");
            record.ended = Some(now);
            record.certain = acknowledged;
            record.safe = acknowledged && fua;
        }
    }

    /// A flush that was submitted at `submitted` was acknowledged.
    pub fn flushed(&mut self, volume: u8, submitted: u64) {
        for (_, records) in self.sectors.range_mut((volume, 0)..=(volume, u64::MAX)) {
            for record in records {
                let before = record.ended.is_some_and(|ended| ended <= submitted);
                record.safe |= record.certain && before;
            }
        }
    }

    /// The only good copy lost power: what was not flushed may be there or not.
    pub fn doubt_unflushed(&mut self, volume: u8) {
        for (_, records) in self.sectors.range_mut((volume, 0)..=(volume, u64::MAX)) {
            for record in records {
                record.ruled_out = None;
                record.certain &= record.safe;
            }
        }
    }

    /// A node took over that need not have what was acknowledged since both were last equal
    /// (protocols A and B; disks of both nodes failed).
    pub fn doubt_unsettled(&mut self, volume: u8) {
        for (_, records) in self.sectors.range_mut((volume, 0)..=(volume, u64::MAX)) {
            for record in records {
                record.ruled_out = None;
                record.safe &= record.settled;
                record.certain &= record.settled;
            }
        }
    }

    /// The operator has thrown data away: anything that was ever written may be there.
    pub fn forget(&mut self, volume: u8, range: SectorRange) {
        for (_, records) in self.sectors.range_mut((volume, range.start)..(volume, range.end)) {
            for record in records {
                record.ruled_out = None;
                record.certain = false;
            }
        }
    }

    /// Whether a sector may have these contents for a read issued at `issued`.
    ///
    /// # Errors
    /// Which contents it may have instead.
    pub fn check(&self, volume: u8, sector: u64, bytes: &[u8], issued: u64) -> Result<(), String> {
        let content = recognise(bytes, volume, sector);
        let base = [self.base_of(volume, sector)];
        let records = self.sectors.get(&(volume, sector)).map_or(&base[..], Vec::as_slice);
        let was_written = match content {
            Content::Zeroes => true,
            Content::Version(version) => version <= self.next_version,
            Content::Misplaced { .. } | Content::Garbage => false,
        };
        let is_legal = records
            .iter()
            .any(|record| record.matches(content) && is_possible(record, records, issued));
        if is_legal || (self.is_lenient && was_written) {
            return Ok(());
        }
        let legal: Vec<String> = records
            .iter()
            .filter(|record| is_possible(record, records, issued))
            .map(|record| record.words())
            .collect();
        let all: Vec<String> = records.iter().map(Record::words).collect();
        Err(format!(
            "volume {volume} sector {sector} holds {content:?}, which is not one of {legal:?} \
             (known: {all:?}, asked at step {issued})"
        ))
    }

    /// A host read from `issued` to `now` has seen these contents while nothing was being written
    /// there: whatever else was possible is not there. Reads that are asked from now on may not go
    /// back; those that are under way saw the disk when they did.
    pub fn seen(&mut self, volume: u8, sector: u64, bytes: &[u8], (issued, now): (u64, u64)) {
        let content = recognise(bytes, volume, sector);
        let Some(records) = self.sectors.get_mut(&(volume, sector)) else { return };
        let is_quiet = records.iter().all(|record| record.ended.is_some_and(|e| e <= issued));
        if is_quiet {
            for record in records.iter_mut().filter(|record| !record.matches(content)) {
                record.ruled_out.get_or_insert(now);
            }
        }
    }

    /// Both disks hold these contents and nothing is under way: this is the base from now on.
    pub fn settle(&mut self, volume: u8, sector: u64, bytes: &[u8], now: u64) {
        let content = recognise(bytes, volume, sector);
        let Some(records) = self.sectors.get_mut(&(volume, sector)) else { return };
        if self.is_lenient {
            return;
        }
        let is_known = records.iter().any(|record| record.matches(content));
        assert!(is_known, "the contents were checked before");
        for record in records {
            let is_there = record.matches(content);
            record.certain |= is_there;
            record.settled |= is_there;
            // It may come back at a power cut, as long as what replaced it is not safe.
            record.ruled_out = (!is_there).then_some(now);
        }
    }

    /// Every sector of a volume that was ever written, ascending.
    pub fn sectors_of(&self, volume: usize) -> impl Iterator<Item = u64> + '_ {
        let volume = u8::try_from(volume).expect("few volumes");
        self.sectors.range((volume, 0)..=(volume, u64::MAX)).map(|((_, sector), _)| *sector)
    }
}

impl Record {
    fn words(&self) -> String {
        let what = match self {
            Self { anything: true, .. } => "anything",
            Self { zeroes: true, .. } => "zeroes",
            Self { .. } => "data",
        };
        let end = match self.ended {
            None => String::from("under way"),
            Some(at) if self.certain => format!("acknowledged at {at}"),
            Some(at) => format!("doubtful since {at}"),
        };
        let safe = if self.safe { ", safe" } else { "" };
        let out = self.ruled_out.map_or_else(String::new, |at| format!(", ruled out at {at}"));
        format!("v{} {what} from {}, {end}{safe}{out}", self.version, self.submitted)
    }
}

fn is_possible(record: &Record, records: &[Record], issued: u64) -> bool {
    let superseded = |by: &Record| {
        by.certain
            && by.ended.is_some_and(|ended| ended <= issued)
            && record.ended.is_some_and(|ended| ended < by.submitted)
    };
    let is_ruled_out = record.ruled_out.is_some_and(|at| at <= issued);
    !is_ruled_out && !records.iter().any(superseded)
}

/// Forgets what can never come back: superseded by something safe that both disks were seen to
/// hold. Less would not do where the disks of both nodes fail ([`Ledger::doubt_unsettled`]).
fn prune(records: &mut Vec<Record>) {
    let is_final = |by: &&Record| by.certain && by.safe && by.settled;
    let safe: Vec<u64> = records.iter().filter(is_final).map(|by| by.submitted).collect();
    records.retain(|record| {
        !record.ended.is_some_and(|ended| safe.iter().any(|submitted| ended < *submitted))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector_of(version: u64) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR];
        stamp(&mut bytes, 0, 5, version);
        bytes
    }

    fn write(ledger: &mut Ledger) -> Write {
        let version = ledger.new_version();
        Write { version, volume: 0, range: SectorRange { start: 5, end: 6 }, zeroes: false }
    }

    #[test]
    fn torn_and_misplaced_sectors_are_recognised() {
        let mut bytes = sector_of(3);
        assert_eq!(recognise(&bytes, 0, 5), Content::Version(3));
        let elsewhere = Content::Misplaced { version: 3, volume: 0, sector: 5 };
        assert_eq!(recognise(&bytes, 0, 6), elsewhere);
        bytes[400] ^= 1;
        assert_eq!(recognise(&bytes, 0, 5), Content::Garbage);
        assert_eq!(recognise(&[0; SECTOR], 0, 5), Content::Zeroes);
    }

    /// In flight both old and new may be read, afterwards only the new one.
    #[test]
    fn an_acknowledged_version_supersedes() {
        let mut ledger = Ledger::default();
        let one = write(&mut ledger);
        ledger.submitted(one, 10);
        ledger.check(0, 5, &[0; SECTOR], 11).unwrap();
        ledger.check(0, 5, &sector_of(1), 11).unwrap();
        ledger.ended(one, 20, true, false);
        assert!(ledger.check(0, 5, &[0; SECTOR], 15).is_ok(), "the read was issued before");
        ledger.check(0, 5, &[0; SECTOR], 21).unwrap_err();
        assert!(ledger.check(0, 5, &sector_of(2), 21).is_err(), "never written");
    }

    /// A write that failed may be there or not, but a read decides.
    #[test]
    fn a_read_rules_the_other_versions_out() {
        let mut ledger = Ledger::default();
        let one = write(&mut ledger);
        ledger.submitted(one, 10);
        ledger.ended(one, 20, false, false);
        ledger.check(0, 5, &[0; SECTOR], 30).unwrap();
        ledger.seen(0, 5, &sector_of(1), (30, 35));
        ledger.check(0, 5, &[0; SECTOR], 40).unwrap_err();
    }

    /// A read from before the end of a write may return what was there before, also if it ends
    /// after a later read that has seen the write.
    #[test]
    fn what_a_read_has_seen_binds_later_reads_only() {
        let mut ledger = Ledger::default();
        let one = write(&mut ledger);
        ledger.submitted(one, 10);
        let asked_before_the_end = 15;
        ledger.ended(one, 20, true, false);
        ledger.seen(0, 5, &sector_of(1), (25, 30));
        ledger.check(0, 5, &[0; SECTOR], asked_before_the_end).unwrap();
        ledger.check(0, 5, &[0; SECTOR], 31).unwrap_err();
    }

    /// What nobody has written to may hold anything, until somebody does.
    #[test]
    fn unknown_contents_are_superseded() {
        let mut ledger = Ledger::default();
        ledger.add_unknown(0, SectorRange { start: 4, end: 6 });
        ledger.check(0, 5, &[7; SECTOR], 5).unwrap();
        ledger.check(0, 6, &[7; SECTOR], 5).unwrap_err();
        let one = write(&mut ledger);
        ledger.submitted(one, 10);
        ledger.check(0, 5, &[7; SECTOR], 15).unwrap();
        ledger.ended(one, 20, true, false);
        ledger.check(0, 5, &[7; SECTOR], 25).unwrap_err();
        ledger.check(0, 5, &sector_of(1), 25).unwrap();
    }

    /// What a read has seen of a write that is in doubt binds what is asked after its end, and
    /// later reads that see the same do not put it off.
    #[test]
    fn the_first_sight_counts() {
        let mut ledger = Ledger::default();
        let one = write(&mut ledger);
        ledger.submitted(one, 10);
        ledger.ended(one, 20, false, false);
        ledger.seen(0, 5, &sector_of(1), (30, 40));
        ledger.seen(0, 5, &sector_of(1), (50, 60));
        ledger.check(0, 5, &[0; SECTOR], 35).unwrap();
        ledger.check(0, 5, &[0; SECTOR], 45).unwrap_err();
    }

    /// Without the flush, older contents come back into question at a power cut; with it not.
    #[test]
    fn a_power_cut_doubts_what_was_not_flushed() {
        let mut ledger = Ledger::default();
        let one = write(&mut ledger);
        ledger.submitted(one, 1);
        ledger.ended(one, 2, true, false);
        ledger.flushed(0, 3);
        let two = write(&mut ledger);
        ledger.submitted(two, 4);
        ledger.ended(two, 5, true, false);
        ledger.check(0, 5, &sector_of(1), 6).unwrap_err();
        ledger.doubt_unflushed(0);
        ledger.check(0, 5, &sector_of(1), 6).unwrap();
        assert!(ledger.check(0, 5, &[0; SECTOR], 6).is_err(), "the flushed one stays certain");
    }
}
