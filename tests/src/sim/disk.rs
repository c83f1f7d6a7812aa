//! A disk with a volatile cache.
//!
//! A finished write is visible at once and durable only after a flush that was *submitted* after
//! it had finished, or by FUA. At a power cut each 512-byte sector that is not durable takes, for
//! itself, any of the contents it had since the last durable one: so writes are kept, lost,
//! reordered and torn. A killed process loses nothing of this.
//!
//! Contents are sparse: pages and sectors that were never written are zeroes.

use std::collections::{BTreeMap, BTreeSet};

use replication_core::units::{Errno, SectorRange};

use super::rng::Rng;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Bytes of a page of storage.
pub const PAGE: usize = 4096;
/// Sectors of a page.
pub const PAGE_SECTORS: u64 = 8;

type SectorBytes = Box<[u8; SECTOR]>;
type PageBytes = Box<[u8; PAGE]>;

/// What an operation does, as far as faults tell operations apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read of data.
    Read,
    /// Write, discard or zeroes of data.
    Write,
    /// Flush.
    Flush,
    /// Read of metadata.
    MetaRead,
    /// Write of metadata.
    MetaWrite,
}

/// What a faulty disk does instead of the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Fails. A failed write leaves any mixture of old and new sectors.
    Fail(Errno),
    /// Never answers, until the disk is released.
    Stick,
    /// A write lands at this sector instead, and succeeds.
    Misdirect(u64),
}

/// A fault that waits for its operation.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Operations of this kind.
    pub kind: Kind,
    /// Touching this range; `None`: any.
    pub range: Option<SectorRange>,
    /// This many times; `None`: from now on.
    pub times: Option<u32>,
    /// What happens.
    pub trouble: Trouble,
}

/// What becomes of un-flushed sectors at a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Nothing is kept.
    LoseAll,
    /// Everything is kept.
    KeepAll,
    /// Chance decides for each sector.
    Mixed,
}

/// One disk.
#[derive(Debug)]
pub struct Disk {
    sectors: u64,
    durable: BTreeMap<u64, PageBytes>,
    /// Contents of a sector since the durable one, oldest first, each with the number of its
    /// write.
    cached: BTreeMap<u64, Vec<(u64, SectorBytes)>>,
    writes: u64,
    faults: Vec<Fault>,
    /// A flush does nothing, and succeeds.
    lies: bool,
}

impl Disk {
    /// A disk of zeroes.
    #[must_use]
    pub const fn new(sectors: u64) -> Self {
        Self {
            sectors,
            durable: BTreeMap::new(),
            cached: BTreeMap::new(),
            writes: 0,
            faults: Vec::new(),
            lies: false,
        }
    }

    /// From now on flushes do nothing.
    pub const fn lie(&mut self) {
        self.lies = true;
    }

    /// Size in sectors.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Makes the disk larger.
    ///
    /// # Panics
    /// If it would shrink.
    pub fn grow(&mut self, sectors: u64) {
        assert!(sectors >= self.sectors, "disks of the simulator do not shrink");
        self.sectors = sectors;
    }

    /// Plans a fault.
    pub fn add_fault(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    /// Whether a fault waits for its operation.
    #[must_use]
    pub const fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// No more faults.
    pub fn heal(&mut self) {
        self.faults.clear();
    }

    /// The trouble that an operation meets, if any.
    pub fn trouble(&mut self, kind: Kind, range: SectorRange) -> Option<Trouble> {
        let at = self.faults.iter().position(|fault| {
            fault.kind == kind && fault.range.is_none_or(|bad| bad.overlaps(range))
        })?;
        let fault = &mut self.faults[at];
        let trouble = fault.trouble;
        if let Some(times) = &mut fault.times {
            *times -= 1;
            if *times == 0 {
                self.faults.remove(at);
            }
        }
        Some(trouble)
    }

    /// The number of the last finished write: what a flush submitted now will cover.
    #[must_use]
    pub const fn flush_point(&self) -> u64 {
        self.writes
    }

    /// Reads sectors.
    ///
    /// # Panics
    /// If the range leaves the disk.
    pub fn read(&self, first: u64, out: &mut [u8]) {
        assert!(out.len().is_multiple_of(SECTOR), "whole sectors only");
        assert!(first + (out.len() / SECTOR) as u64 <= self.sectors, "read beyond the end");
        for (sector, bytes) in (first..).zip(out.chunks_mut(SECTOR)) {
            bytes.copy_from_slice(self.sector(sector));
        }
    }

    /// The visible contents of a sector.
    #[must_use]
    pub fn sector(&self, sector: u64) -> &[u8] {
        if let Some((_, bytes)) = self.cached.get(&sector).and_then(|versions| versions.last()) {
            return &bytes[..];
        }
        self.durable_sector(sector)
    }

    fn durable_sector(&self, sector: u64) -> &[u8] {
        const ZEROES: [u8; SECTOR] = [0; SECTOR];
        match self.durable.get(&(sector / PAGE_SECTORS)) {
            Some(page) => &page[offset(sector)..offset(sector) + SECTOR],
            None => &ZEROES,
        }
    }

    /// Writes sectors.
    ///
    /// # Panics
    /// If the range leaves the disk.
    pub fn write(&mut self, first: u64, data: &[u8], durable: bool) {
        assert!(data.len().is_multiple_of(SECTOR), "whole sectors only");
        assert!(first + (data.len() / SECTOR) as u64 <= self.sectors, "write beyond the end");
        self.writes += 1;
        for (sector, bytes) in (first..).zip(data.chunks(SECTOR)) {
            if durable {
                self.cached.remove(&sector);
                self.make_durable(sector, bytes);
            } else {
                let mut copy = Box::new([0; SECTOR]);
                copy.copy_from_slice(bytes);
                self.cached.entry(sector).or_default().push((self.writes, copy));
            }
        }
    }

    /// A bit of a sector turns over by itself.
    pub fn rot(&mut self, sector: u64, bit: usize) {
        let mut bytes = [0; SECTOR];
        bytes.copy_from_slice(self.sector(sector));
        bytes[bit / 8 % SECTOR] ^= 1 << (bit % 8);
        self.write(sector, &bytes, true);
    }

    /// Zeroes sectors.
    pub fn zero(&mut self, range: SectorRange) {
        self.writes += 1;
        for sector in range.start..range.end {
            let is_zero = self.sector(sector).iter().all(|byte| *byte == 0);
            if !is_zero {
                let zeroes = Box::new([0; SECTOR]);
                self.cached.entry(sector).or_default().push((self.writes, zeroes));
            }
        }
    }

    fn make_durable(&mut self, sector: u64, bytes: &[u8]) {
        let page = sector / PAGE_SECTORS;
        let is_zero = bytes.iter().all(|byte| *byte == 0);
        if is_zero && !self.durable.contains_key(&page) {
            return;
        }
        let page = self.durable.entry(page).or_insert_with(|| Box::new([0; PAGE]));
        page[offset(sector)..offset(sector) + SECTOR].copy_from_slice(bytes);
    }

    /// Makes every write durable that had finished at `point`.
    pub fn flush(&mut self, point: u64) {
        if self.lies {
            return;
        }
        let cached = std::mem::take(&mut self.cached);
        for (sector, mut versions) in cached {
            let covered = versions.partition_point(|(write, _)| *write <= point);
            if covered > 0 {
                self.make_durable(sector, &versions[covered - 1].1[..]);
                versions.drain(..covered);
            }
            if !versions.is_empty() {
                self.cached.insert(sector, versions);
            }
        }
    }

    /// Loses power. Returns the pages whose visible contents changed.
    pub fn power_cut(&mut self, cut: Cut, rng: &mut Rng) -> BTreeSet<u64> {
        let mut changed = BTreeSet::new();
        for (sector, versions) in std::mem::take(&mut self.cached) {
            let count = versions.len() as u64;
            let kept = match cut {
                Cut::LoseAll => 0,
                Cut::KeepAll => count,
                Cut::Mixed => rng.below(count + 1),
            };
            if kept < count {
                changed.insert(sector / PAGE_SECTORS);
            }
            if let Some(last) = kept.checked_sub(1) {
                let at = usize::try_from(last).expect("an index");
                self.make_durable(sector, &versions[at].1[..]);
            }
        }
        changed
    }

    /// The visible contents of a page (the last one of the disk filled up with zeroes).
    #[must_use]
    pub fn page(&self, page: u64) -> [u8; PAGE] {
        let mut out = [0; PAGE];
        for (index, bytes) in (0..PAGE_SECTORS).zip(out.chunks_mut(SECTOR)) {
            bytes.copy_from_slice(self.sector(page * PAGE_SECTORS + index));
        }
        out
    }

    /// Pages that may hold something else than zeroes, ascending.
    #[must_use]
    pub fn used_pages(&self) -> BTreeSet<u64> {
        let cached = self.cached.keys().map(|sector| sector / PAGE_SECTORS);
        self.durable.keys().copied().chain(cached).collect()
    }

    /// Whether a power cut leaves the visible contents of a sector as they are: they are durable,
    /// or whatever is not has the same contents.
    #[must_use]
    pub fn is_durable(&self, sector: u64) -> bool {
        let cached = self.cached.get(&sector);
        cached.is_none_or(|versions| {
            versions.iter().all(|(_, bytes)| bytes[..] == *self.durable_sector(sector))
        })
    }
}

fn offset(sector: u64) -> usize {
    usize::try_from(sector % PAGE_SECTORS).expect("less than 8") * SECTOR
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(byte: u8, sectors: usize) -> Vec<u8> {
        vec![byte; sectors * SECTOR]
    }

    /// A flush covers what had finished when it was submitted, and nothing later.
    #[test]
    fn a_flush_covers_what_finished_before_it() {
        let mut disk = Disk::new(64);
        disk.write(3, &filled(1, 2), false);
        let point = disk.flush_point();
        disk.write(4, &filled(2, 1), false);
        disk.flush(point);
        assert_eq!(disk.sector(4)[0], 2, "the later write is visible");
        let changed = disk.power_cut(Cut::LoseAll, &mut Rng::new(1));
        assert_eq!(changed.into_iter().collect::<Vec<_>>(), [0]);
        assert_eq!([disk.sector(3)[0], disk.sector(4)[0], disk.sector(5)[0]], [1, 1, 0]);
    }

    /// At a power cut the sectors of one write go different ways.
    #[test]
    fn an_unflushed_write_tears_between_sectors() {
        let mut disk = Disk::new(64);
        disk.write(0, &filled(9, 64), false);
        disk.power_cut(Cut::Mixed, &mut Rng::new(5));
        let kept = (0..64).filter(|sector| disk.sector(*sector)[0] == 9).count();
        assert!((10..54).contains(&kept), "{kept} of 64 sectors were kept");
    }

    /// FUA is durable at once, and replaces what was cached.
    #[test]
    fn a_durable_write_survives() {
        let mut disk = Disk::new(8);
        disk.write(0, &filled(1, 1), false);
        disk.write(0, &filled(2, 1), true);
        assert!(disk.power_cut(Cut::LoseAll, &mut Rng::new(1)).is_empty());
        assert_eq!(disk.sector(0)[0], 2);
    }

    /// What is written once more is no less durable for it.
    #[test]
    fn the_same_contents_stay_durable() {
        let mut disk = Disk::new(8);
        assert!(disk.is_durable(0));
        disk.write(0, &filled(1, 1), true);
        disk.write(0, &filled(1, 1), false);
        assert!(disk.is_durable(0));
        disk.write(0, &filled(2, 1), false);
        disk.write(0, &filled(1, 1), false);
        assert!(!disk.is_durable(0), "what was in between may be left");
    }

    /// Zeroes are cached like other writes.
    #[test]
    fn zeroes_are_volatile_too() {
        let mut disk = Disk::new(8);
        disk.write(0, &filled(1, 2), true);
        disk.zero(SectorRange { start: 1, end: 2 });
        assert_eq!((disk.sector(0)[0], disk.sector(1)[0]), (1, 0));
        disk.power_cut(Cut::LoseAll, &mut Rng::new(1));
        assert_eq!(disk.sector(1)[0], 1);
    }

    /// A fault hits its kind and range as often as planned.
    #[test]
    fn faults_hit_their_kind_and_range() {
        let mut disk = Disk::new(8);
        let range = SectorRange { start: 2, end: 4 };
        let trouble = Trouble::Fail(Errno::EIO);
        disk.add_fault(Fault { kind: Kind::Read, range: Some(range), times: Some(1), trouble });
        let all = SectorRange { start: 0, end: 8 };
        assert_eq!(disk.trouble(Kind::Write, all), None);
        assert_eq!(disk.trouble(Kind::Read, SectorRange { start: 4, end: 8 }), None);
        assert_eq!(disk.trouble(Kind::Read, all), Some(trouble));
        assert_eq!(disk.trouble(Kind::Read, all), None);
    }
}
