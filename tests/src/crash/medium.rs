//! A disk of which every possible state after a power cut can be built.
//!
//! Writes are numbered when they are submitted. A write is *pending* until it is durable: covered
//! by a flush that was submitted after the write had finished, or durable by itself. At a power
//! cut each pending write is there wholly, not at all, or torn between its sectors of 512 bytes;
//! for each sector the last of the writes that are there counts. A durable write flushes first:
//! where any sector of it is there, everything is that its flush covers.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::sim::rng::Rng;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// Which device of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Device {
    /// The data, and internal metadata.
    Data,
    /// Metadata on a device of its own.
    Meta,
}

/// The contents of a sector.
pub type Sector = Rc<[u8; SECTOR]>;

/// The contents of the devices of one volume; what is not named is zero.
pub type Image = BTreeMap<(Device, u64), Sector>;

/// The contents of a sector of an image.
#[must_use]
pub fn sector_of(image: &Image, device: Device, sector: u64) -> [u8; SECTOR] {
    image.get(&(device, sector)).map_or([0; SECTOR], |bytes| **bytes)
}

#[derive(Debug)]
struct Pending {
    number: u64,
    device: Device,
    start: u64,
    /// `None`: something newer is durable there.
    sectors: Vec<Option<Sector>>,
    finished: bool,
    /// It flushes first: the writes that this flush covers.
    after: Option<Vec<u64>>,
}

/// The devices of one volume.
#[derive(Debug, Default)]
pub struct Medium {
    durable: Image,
    pending: Vec<Pending>,
    submitted: u64,
    /// Counts the changes: at each of them a crash leaves other states than before.
    changes: u64,
}

impl Medium {
    /// Devices with these contents, all of them durable.
    #[must_use]
    pub fn new(image: Image) -> Self {
        Self { durable: image, ..Self::default() }
    }

    /// Counts the changes.
    #[must_use]
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// What a flush or durable write submitted now covers on a device.
    #[must_use]
    pub fn covered_now(&self, device: Device) -> Vec<u64> {
        let covered = self.pending.iter().filter(|p| p.device == device && p.finished);
        covered.map(|p| p.number).collect()
    }

    /// A write begins. `durable`: flushes first, and is durable when it has finished.
    ///
    /// # Panics
    /// If `bytes` are no whole sectors.
    pub fn submit(&mut self, device: Device, start: u64, bytes: &[u8], durable: bool) -> u64 {
        self.submit_after(device, start, bytes, durable.then(|| self.covered_now(device)))
    }

    /// A write begins that is durable when it has finished, without a flush before it.
    pub fn submit_fua(&mut self, device: Device, start: u64, bytes: &[u8]) -> u64 {
        self.submit_after(device, start, bytes, Some(Vec::new()))
    }

    fn submit_after(
        &mut self,
        device: Device,
        start: u64,
        bytes: &[u8],
        after: Option<Vec<u64>>,
    ) -> u64 {
        assert!(bytes.len().is_multiple_of(SECTOR), "whole sectors only");
        let sectors = bytes.chunks(SECTOR).map(|part| {
            let mut sector = [0; SECTOR];
            sector.copy_from_slice(part);
            Some(Rc::new(sector))
        });
        self.submitted += 1;
        self.changes += 1;
        let number = self.submitted;
        let sectors = sectors.collect();
        self.pending.push(Pending { number, device, start, sectors, finished: false, after });
        number
    }

    /// A write has finished.
    ///
    /// # Panics
    /// If it is not under way.
    pub fn finish(&mut self, number: u64) {
        let write = self.pending.iter_mut().find(|p| p.number == number);
        let write = write.expect("a write finishes once");
        assert!(!write.finished, "a write finishes once");
        write.finished = true;
        self.changes += 1;
        if let Some(mut covered) = write.after.take() {
            covered.push(number);
            self.make_durable(&covered);
        }
    }

    /// A flush has finished that covers these writes.
    pub fn flushed(&mut self, covered: &[u64]) {
        self.changes += 1;
        self.make_durable(covered);
    }

    /// Moves writes, in their order, to the durable contents. An older write of a sector that is
    /// still pending may not come back over a newer one.
    fn make_durable(&mut self, covered: &[u64]) {
        let (done, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|p| covered.contains(&p.number));
        self.pending = left;
        for write in done {
            apply(&mut self.durable, &write, |_| true);
            let older = self.pending.iter_mut().filter(|p| p.number < write.number);
            for old in older.filter(|p| p.device == write.device) {
                for (sector, bytes) in (old.start..).zip(&mut old.sectors) {
                    let end = write.start + write.sectors.len() as u64;
                    if (write.start..end).contains(&sector) {
                        *bytes = None;
                    }
                }
            }
        }
    }

    /// What reads see: everything that has finished.
    #[must_use]
    pub fn finished_view(&self) -> Image {
        self.view(|p| p.finished)
    }

    /// What reads will see once everything has finished that is under way.
    #[must_use]
    pub fn submitted_view(&self) -> Image {
        self.view(|_| true)
    }

    fn view(&self, wanted: impl Fn(&Pending) -> bool) -> Image {
        let mut image = self.durable.clone();
        for write in self.pending.iter().filter(|p| wanted(p)) {
            apply(&mut image, write, |_| true);
        }
        image
    }

    /// Reads a finished sector.
    #[must_use]
    pub fn read(&self, device: Device, sector: u64) -> [u8; SECTOR] {
        let newest = self.pending.iter().rev().find_map(|p| {
            let index = sector.checked_sub(p.start).filter(|_| p.finished && p.device == device)?;
            p.sectors.get(usize::try_from(index).ok()?)?.as_ref()
        });
        newest.map_or_else(|| sector_of(&self.durable, device, sector), |bytes| **bytes)
    }

    /// Pictures of the devices after a power cut now: every subset of the pending writes if there
    /// are at most `most` of them, else none, all and as many by chance; and as many again by
    /// chance with torn writes. Equal pictures are left out.
    pub fn crash_images(&self, most: usize, rng: &mut Rng) -> Vec<Image> {
        let count = self.pending.len();
        let mut seen: BTreeSet<Vec<u8>> = BTreeSet::new();
        let mut images = Vec::new();
        let exhaustive = u32::try_from(count).ok().and_then(|n| 1_usize.checked_shl(n));
        let whole = exhaustive.filter(|all| *all <= most);
        for round in 0..whole.unwrap_or(most) {
            let masks = (0..count).map(|bit| match (whole, round) {
                (Some(_), _) => {
                    if round >> bit & 1 == 1 {
                        0xff
                    } else {
                        0
                    }
                }
                (None, 0) => 0,
                (None, 1) => 0xff,
                (None, _) => {
                    if rng.chance(50) {
                        0xff
                    } else {
                        0
                    }
                }
            });
            self.add_image(masks.collect(), &mut seen, &mut images, rng);
        }
        let torn = if count == 0 { 0 } else { most.div_ceil(2) };
        for _ in 0..torn {
            let victim = rng.below(count as u64);
            let masks = (0..count as u64).map(|bit| match rng.below(3) {
                _ if bit == victim => u8::try_from(rng.between(1, 254)).expect("a byte"),
                0 => 0,
                1 => 0xff,
                _ => u8::try_from(rng.below(256)).expect("a byte"),
            });
            self.add_image(masks.collect(), &mut seen, &mut images, rng);
        }
        images
    }

    /// Each mask says which sectors of a page of its write are there.
    fn add_image(
        &self,
        mut masks: Vec<u8>,
        seen: &mut BTreeSet<Vec<u8>>,
        images: &mut Vec<Image>,
        rng: &mut Rng,
    ) {
        for index in 0..self.pending.len() {
            let first = self.pending[index].after.as_ref().filter(|_| masks[index] != 0);
            for number in first.into_iter().flatten() {
                let before = self.pending.iter().position(|p| p.number == *number);
                if let Some(before) = before {
                    masks[before] = 0xff;
                }
            }
        }
        if !seen.insert(masks.clone()) {
            return;
        }
        let mut image = self.durable.clone();
        for (write, mask) in self.pending.iter().zip(masks) {
            let turn = if mask == 0xff { 0 } else { rng.below(8) };
            let mask = mask.rotate_left(u32::try_from(turn).expect("less than 8"));
            apply(&mut image, write, |index| mask >> (index % 8) & 1 == 1);
        }
        images.push(image);
    }
}

fn apply(image: &mut Image, write: &Pending, wanted: impl Fn(usize) -> bool) {
    for (index, sector) in write.sectors.iter().enumerate() {
        if let Some(sector) = sector.as_ref().filter(|_| wanted(index)) {
            image.insert((write.device, write.start + index as u64), Rc::clone(sector));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_bytes(images: &[Image], sectors: u64) -> BTreeSet<Vec<u8>> {
        let bytes = |image: &Image| {
            (0..sectors).map(|s| sector_of(image, Device::Data, s)[0]).collect::<Vec<_>>()
        };
        images.iter().map(bytes).collect()
    }

    /// Every subset of what is pending, and nothing of what is durable gets lost.
    #[test]
    fn images_are_the_subsets_of_what_is_pending() {
        let mut medium = Medium::default();
        let one = medium.submit(Device::Data, 0, &[1; SECTOR], false);
        medium.finish(one);
        let covered = medium.covered_now(Device::Data);
        medium.submit(Device::Data, 1, &[2; SECTOR], false);
        let before = first_bytes(&medium.crash_images(4, &mut Rng::new(1)), 2);
        assert_eq!(before, [vec![0, 0], vec![0, 2], vec![1, 0], vec![1, 2]].into());
        medium.flushed(&covered);
        let after = first_bytes(&medium.crash_images(4, &mut Rng::new(1)), 2);
        assert_eq!(after, [vec![1, 0], vec![1, 2]].into());
    }

    /// A durable write is there only together with what its flush covers.
    #[test]
    fn a_durable_write_comes_after_its_flush() {
        let mut medium = Medium::default();
        let one = medium.submit(Device::Data, 0, &[1; SECTOR], false);
        medium.finish(one);
        let two = medium.submit(Device::Data, 1, &[2; SECTOR], true);
        let images = first_bytes(&medium.crash_images(4, &mut Rng::new(1)), 2);
        assert_eq!(images, [vec![0, 0], vec![1, 0], vec![1, 2]].into());
        medium.finish(two);
        let images = first_bytes(&medium.crash_images(4, &mut Rng::new(1)), 2);
        assert_eq!(images, [vec![1, 2]].into());
    }

    /// Writes tear between sectors, and never inside of one.
    #[test]
    fn writes_tear_between_sectors() {
        let mut medium = Medium::default();
        medium.submit(Device::Data, 0, &[1; 8 * SECTOR], false);
        let images = first_bytes(&medium.crash_images(64, &mut Rng::new(1)), 8);
        assert!(images.len() > 20, "{images:?}");
        assert!(images.iter().flatten().all(|byte| *byte < 2));
    }
}
