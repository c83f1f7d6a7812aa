//! What the hosts of a crash-point history wrote, and what of it has to survive.
//!
//! Hosts here never have two writes of one sector under way, so the versions of a sector have an
//! order, and a crash may leave any of them from the last safe one on.

use std::collections::BTreeMap;

use replication_core::units::SectorRange;

use super::medium::{Device, Image, SECTOR, sector_of};

#[derive(Clone, Copy, Debug)]
struct Version {
    number: u64,
    /// It left zeroes instead of its stamp.
    zeroes: bool,
    /// As how many-th of all requests it was answered with success.
    acked: Option<u64>,
    /// It was mirrored to an UpToDate peer all the time.
    mirrored: bool,
    /// Covered by an answered flush or FUA, on each node.
    safe: [bool; 2],
}

/// The versions of every sector that was ever written, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    sectors: BTreeMap<u64, Vec<Version>>,
}

/// Writes the contents of a sector.
pub fn stamp(bytes: &mut [u8], sector: u64, version: u64) {
    for (index, part) in bytes.chunks_mut(16).enumerate() {
        let high = (sector << 8) | index as u64;
        part[..8].copy_from_slice(&version.to_le_bytes());
        part[8..].copy_from_slice(&high.to_le_bytes());
    }
}

impl Version {
    fn contents(&self, sector: u64) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        if !self.zeroes {
            stamp(&mut bytes, sector, self.number);
        }
        bytes
    }
}

impl Ledger {
    /// A write begins, or with `zeroes` a discard or write of zeroes.
    pub fn submitted(&mut self, range: SectorRange, number: u64, zeroes: bool) {
        for sector in range.start..range.end {
            let version =
                Version { number, zeroes, acked: None, mirrored: false, safe: [false; 2] };
            self.sectors.entry(sector).or_default().push(version);
        }
    }

    /// A write was answered with success.
    ///
    /// # Panics
    /// If it was not submitted.
    pub fn acked(
        &mut self,
        range: SectorRange,
        number: u64,
        answered: u64,
        mirrored: bool,
        safe_on: Option<usize>,
    ) {
        for sector in range.start..range.end {
            let versions = self.sectors.get_mut(&sector).expect("it was submitted");
            let version = versions.iter_mut().find(|v| v.number == number);
            let version = version.expect("it was submitted");
            version.acked = Some(answered);
            version.mirrored = mirrored;
            if let Some(n) = safe_on {
                version.safe[n] = true;
            }
        }
    }

    /// A flush was answered on node `n` that was submitted after so many answers.
    pub fn flushed(&mut self, answered: u64, n: usize, mirrored: bool) {
        for version in self.sectors.values_mut().flatten() {
            if version.acked.is_some_and(|at| at <= answered) {
                version.safe[n] = true;
                version.safe[1 - n] |= mirrored && version.mirrored;
            }
        }
    }

    /// DUR-1 and DUR-2: no sector of the image is older than the last safe version of it.
    ///
    /// # Errors
    /// The sector that is.
    pub fn check_safe(&self, n: usize, image: &Image) -> Result<(), String> {
        for (sector, versions) in &self.sectors {
            let Some(last) = versions.iter().rposition(|v| v.safe[n]) else { continue };
            let found = sector_of(image, Device::Data, *sector);
            let is_one_of = versions[last..].iter().any(|v| v.contents(*sector) == found);
            if !is_one_of {
                let number = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
                return Err(format!(
                    "DUR: sector {sector} of node {n} holds version {number}, of {versions:?}"
                ));
            }
        }
        Ok(())
    }

    /// Sectors whose last acknowledged version was not mirrored and is not in this image.
    pub fn lacking<'a>(&'a self, image: &'a Image) -> impl Iterator<Item = u64> + 'a {
        let lacks = |sector: u64, versions: &[Version]| {
            let last = versions.iter().rfind(|v| v.acked.is_some());
            last.is_some_and(|v| {
                !v.mirrored && v.contents(sector) != sector_of(image, Device::Data, sector)
            })
        };
        let all = self.sectors.iter();
        all.filter(move |(sector, versions)| lacks(**sector, versions)).map(|(sector, _)| *sector)
    }

    /// Every sector that was ever written, ascending.
    pub fn sectors(&self) -> impl Iterator<Item = u64> + '_ {
        self.sectors.keys().copied()
    }
}
