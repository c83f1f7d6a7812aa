//! Numbers that travel: sectors, blocks, extents, time, identifiers and buffers.
//!
//! Each unit is a type of its own, so that a sector count never meets a byte count by accident.
//! Conversions are named and say in which direction they round. Ranges are half-open and may be
//! empty.

use std::fmt;
use std::ops::{Add, Sub};

use serde::{Deserialize, Serialize};

/// Bytes of a sector, the unit of addresses on the wire and of tearing on a disk.
pub const SECTOR_SIZE: u64 = 512;
/// Bytes of a block, the unit of the bitmap and of metadata I/O.
pub const BLOCK_SIZE: u64 = 4096;
/// Sectors of a block.
pub const SECTORS_PER_BLOCK: u64 = BLOCK_SIZE / SECTOR_SIZE;
/// Sectors of an activity-log extent (4 MiB).
pub const SECTORS_PER_AL_EXTENT: u64 = 8192;
/// Blocks of an activity-log extent.
pub const BLOCKS_PER_AL_EXTENT: u64 = SECTORS_PER_AL_EXTENT / SECTORS_PER_BLOCK;

/// A point in monotonic time, nanoseconds since an origin of the driver's choice.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Time(pub u64);

/// A span of time in nanoseconds.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Span(pub u64);

impl Time {
    /// The origin.
    pub const ZERO: Self = Self(0);

    /// Time passed since `earlier`; zero if `earlier` lies in the future.
    #[must_use]
    pub fn since(self, earlier: Self) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
}

impl Span {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// A span of whole milliseconds.
    #[must_use]
    pub const fn from_ms(ms: u64) -> Self {
        Self(ms * 1_000_000)
    }

    /// A span of whole seconds.
    #[must_use]
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1_000_000_000)
    }

    /// A span given in tenths of a second, the unit of `timeout` and `ping-timeout`.
    #[must_use]
    pub const fn from_tenths(tenths: u64) -> Self {
        Self(tenths * 100_000_000)
    }

    /// Whole milliseconds, rounded down.
    #[must_use]
    pub const fn as_ms(self) -> u64 {
        self.0 / 1_000_000
    }

    /// The span `n` times over.
    #[must_use]
    pub const fn times(self, n: u64) -> Self {
        Self(self.0.saturating_mul(n))
    }
}

impl Add<Span> for Time {
    type Output = Self;

    fn add(self, span: Span) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl Sub<Span> for Time {
    type Output = Self;

    fn sub(self, span: Span) -> Self {
        Self(self.0.saturating_sub(span.0))
    }
}

/// A 512-byte sector address, or a number of sectors where the name says so.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Sector(pub u64);

impl Sector {
    /// The first byte of the sector.
    #[must_use]
    pub const fn byte(self) -> u64 {
        self.0 * SECTOR_SIZE
    }

    /// The block that holds this sector.
    #[must_use]
    pub const fn block(self) -> Block {
        Block(self.0 / SECTORS_PER_BLOCK)
    }

    /// The activity-log extent that holds this sector.
    ///
    /// # Panics
    /// If the sector lies beyond 16 PiB, far outside of any size the metadata can describe.
    #[must_use]
    pub fn al_extent(self) -> AlExtent {
        let extent = self.0 / SECTORS_PER_AL_EXTENT;
        AlExtent(u32::try_from(extent).expect("device sizes are limited to 2^51 sectors"))
    }
}

impl fmt::Display for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0)
    }
}

/// A 4 KiB block number: the index of its bit in the bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

impl Block {
    /// The first sector of the block.
    #[must_use]
    pub const fn sector(self) -> Sector {
        Sector(self.0 * SECTORS_PER_BLOCK)
    }
}

/// The number of an activity-log extent: 4 MiB of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AlExtent(pub u32);

impl AlExtent {
    /// The blocks of the extent (the last extent of a device may reach beyond its end).
    #[must_use]
    pub const fn blocks(self) -> BlockRange {
        let first = self.0 as u64 * BLOCKS_PER_AL_EXTENT;
        BlockRange { start: first, end: first + BLOCKS_PER_AL_EXTENT }
    }
}

/// A half-open range of block numbers; empty when `start >= end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockRange {
    /// The first block.
    pub start: u64,
    /// One past the last block.
    pub end: u64,
}

impl BlockRange {
    /// Number of blocks.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether the range holds no block.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }
}

/// A half-open range of sectors on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SectorRange {
    /// The first sector.
    pub start: u64,
    /// One past the last sector.
    pub end: u64,
}

impl SectorRange {
    /// The range of `bytes` bytes from `start`; `None` if `bytes` is no whole number of sectors
    /// or the end does not fit into 64 bits.
    #[must_use]
    pub fn from_bytes(start: Sector, bytes: u64) -> Option<Self> {
        if !bytes.is_multiple_of(SECTOR_SIZE) {
            return None;
        }
        let end = start.0.checked_add(bytes / SECTOR_SIZE)?;
        Some(Self { start: start.0, end })
    }

    /// Number of sectors.
    #[must_use]
    pub const fn sectors(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Number of bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.sectors() * SECTOR_SIZE
    }

    /// Whether the range holds no sector.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// Whether the two ranges share a sector.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether `other` lies inside of this range.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// All blocks touched by the range: the direction in which bits are *set*.
    #[must_use]
    pub const fn blocks_outward(self) -> BlockRange {
        if self.is_empty() {
            return BlockRange { start: 0, end: 0 };
        }
        BlockRange {
            start: self.start / SECTORS_PER_BLOCK,
            end: self.end.div_ceil(SECTORS_PER_BLOCK),
        }
    }

    /// The blocks wholly inside the range: the direction in which bits are *cleared*. A range
    /// that ends at `device_end` covers the partial last block of the device.
    #[must_use]
    pub const fn blocks_inward(self, device_end: Sector) -> BlockRange {
        let end = if self.end >= device_end.0 {
            self.end.div_ceil(SECTORS_PER_BLOCK)
        } else {
            self.end / SECTORS_PER_BLOCK
        };
        BlockRange { start: self.start.div_ceil(SECTORS_PER_BLOCK), end }
    }

    /// The first and the last activity-log extent touched.
    ///
    /// # Panics
    /// If the range is empty.
    #[must_use]
    pub fn al_extents(self) -> (AlExtent, AlExtent) {
        assert!(!self.is_empty(), "an empty range touches no extent");
        (Sector(self.start).al_extent(), Sector(self.end - 1).al_extent())
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s +{}", self.start, self.sectors())
    }
}

/// The number of a volume inside of its resource, as on the wire.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct VolumeNr(pub u16);

impl fmt::Display for VolumeNr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An errno value of a failed operation, as the driver saw it; never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Errno(pub i32);

impl Errno {
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// No space left on device.
    pub const ENOSPC: Self = Self(28);
    /// Operation not supported.
    pub const EOPNOTSUPP: Self = Self(95);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "errno {}", self.0)
    }
}

/// Payload memory: the number of its first 4 KiB page in the driver's arena. The core passes
/// these numbers around and never looks at the bytes behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Buf(pub u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_outward_and_cleared_inward() {
        let range = SectorRange { start: 7, end: 17 };
        assert_eq!(range.blocks_outward(), BlockRange { start: 0, end: 3 });
        assert_eq!(range.blocks_inward(Sector(100)), BlockRange { start: 1, end: 2 });
        assert_eq!(range.blocks_inward(Sector(17)), BlockRange { start: 1, end: 3 });
        let inside = SectorRange { start: 1, end: 7 };
        assert!(inside.blocks_inward(Sector(100)).is_empty());
        assert!(SectorRange { start: 5, end: 5 }.blocks_outward().is_empty());
    }

    #[test]
    fn a_range_of_partial_sectors_is_refused() {
        assert_eq!(SectorRange::from_bytes(Sector(1), 513), None);
        assert_eq!(SectorRange::from_bytes(Sector(u64::MAX), 1024), None);
        let range = SectorRange::from_bytes(Sector(8), 4096).unwrap();
        assert_eq!((range.start, range.end, range.bytes()), (8, 16, 4096));
    }

    #[test]
    fn extents_of_a_range_include_both_ends() {
        let range = SectorRange { start: 8191, end: 8193 };
        assert_eq!(range.al_extents(), (AlExtent(0), AlExtent(1)));
        assert_eq!(AlExtent(1).blocks(), BlockRange { start: 1024, end: 2048 });
    }
}
