//! Where the three metadata areas lie, for every kind and size of device.
//!
//! With `A` = sectors of the activity log, `D` = sectors of the data device, `B` = sectors of
//! the bitmap = `D / 32768` rounded up, then up to a multiple of 8:
//!
//! | kind | areas in order | superblock | `al_offset` | `bm_offset` | `md_size_sect` |
//! |---|---|---|---|---|---|
//! | internal | data, bitmap, log, superblock | last block | `-A` | `-(A + B)` | `A + B + 8` |
//! | flexible | superblock, log, bitmap | sector 0 | 8 | `8 + A` | metadata device |
//! | indexed `i` | superblock, log, bitmap | `i` x 262144 | 8 | 72 | 262144 |
//!
//! Offsets count from the superblock, in sectors; the superblock takes 8, and the last block is
//! the last whole and aligned 4 KiB of the device. `B` is computed from the whole device, so
//! internal metadata reserves a little more than its data needs.
//!
//! Keeps MD-3: areas never overlap, lie inside of their device, and the bitmap covers the
//! capacity. A proptest holds this down for all kinds, odd sizes and stripes.
//!
//! One decision is ours: a bitmap area that is no whole number of 4 KiB pages (flexible metadata
//! on a device of odd size) ends at its last whole page, because a page cannot be read beyond
//! the end of a device. The capacity follows.

use serde::{Deserialize, Serialize};

use super::FormatError;
use super::page::PAGE_SIZE;
use crate::units::{AlExtent, BLOCKS_PER_AL_EXTENT, SECTORS_PER_BLOCK, Sector, SectorRange};

/// Stripes of an activity log when nothing else is asked for.
pub const AL_STRIPES_DEFAULT: u32 = 1;
/// Blocks of 4 KiB of a stripe when nothing else is asked for: 32 KiB.
pub const AL_STRIPE_SIZE_4K_DEFAULT: u32 = 8;
/// Fewest blocks of an activity log (format rule).
pub const AL_BLOCKS_MIN: u64 = 8;
/// Most blocks of an activity log (format rule): 16 GiB.
pub const AL_BLOCKS_MAX: u64 = 4_194_304;
/// Sectors of one slot of an indexed metadata device: 128 MiB.
pub const INDEXED_SLOT_SECTORS: u64 = 262_144;
/// Sectors of data that one sector of bitmap describes: 4096 bits of 4 KiB each.
pub const DATA_SECTORS_PER_BITMAP_SECTOR: u64 = 4096 * SECTORS_PER_BLOCK;
/// Largest data device with internal or flexible metadata: 2^51 sectors, as the stock driver.
pub const MAX_DATA_SECTORS: u64 = 1 << 51;
/// Smallest metadata device that the stock driver attaches, 1 MiB; with internal metadata the
/// whole device counts. The stock tool creates metadata on smaller ones.
pub const KERNEL_MIN_META_SECTORS: u64 = 2048;
/// Bytes of bitmap of one activity-log extent.
pub const BITMAP_BYTES_PER_AL_EXTENT: usize = 128;

/// Sectors of the superblock, and of every other page.
const PAGE_SECTORS: u64 = SECTORS_PER_BLOCK;
/// Activity-log extents that one page of bitmap describes.
const AL_EXTENTS_PER_PAGE: u32 = 32;

const _: () = assert!(32 * BITMAP_BYTES_PER_AL_EXTENT == PAGE_SIZE && AL_EXTENTS_PER_PAGE == 32);
const _: () = assert!(BITMAP_BYTES_PER_AL_EXTENT == 128 && BLOCKS_PER_AL_EXTENT == 128 * 8);

/// Which device carries the metadata, and how it is arranged there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaKind {
    /// At the end of the data device.
    Internal,
    /// A metadata device of its own, of any size (the tools call it `flex-external`).
    Flexible,
    /// One of several slots of 128 MiB on a shared metadata device.
    Indexed(u32),
}

/// The places of all areas. Built by [`Geometry::new`] alone, which checks that they fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The kind it was computed for.
    pub kind: MetaKind,
    /// Size of the device that carries the metadata.
    pub meta_device: Sector,
    /// Sector of the superblock on the metadata device.
    pub superblock: Sector,
    /// First sector of the activity log on the metadata device.
    pub activity_log: Sector,
    /// Stripes of the activity log.
    pub al_stripes: u32,
    /// Blocks of 4 KiB of each stripe.
    pub al_stripe_size_4k: u32,
    /// First sector of the bitmap on the metadata device.
    pub bitmap: Sector,
    /// Sectors of the bitmap area, a multiple of 8.
    pub bitmap_sectors: u64,
    /// Sectors of all metadata, as the superblock records it.
    pub md_size_sectors: u64,
    /// From the superblock to the activity log, in sectors.
    pub al_offset: i32,
    /// From the superblock to the bitmap, in sectors.
    pub bm_offset: i32,
    /// Largest usable size of the data.
    pub capacity: Sector,
}

/// The sector of the superblock, which does not depend on the shape of the activity log: it is
/// read first, and names the shape.
///
/// `meta_device` is ignored for internal metadata.
///
/// # Errors
/// If the device has no room for a superblock there.
pub fn superblock_sector(
    kind: MetaKind,
    data_device: Sector,
    meta_device: Sector,
) -> Result<Sector, FormatError> {
    match kind {
        MetaKind::Internal => match (data_device.0 - data_device.0 % PAGE_SECTORS)
            .checked_sub(PAGE_SECTORS)
        {
            Some(sector) => Ok(Sector(sector)),
            None => {
                Err(FormatError::MetaDeviceTooSmall { needed: PAGE_SECTORS, found: data_device.0 })
            }
        },
        MetaKind::Flexible => {
            require_meta_device(PAGE_SECTORS, meta_device)?;
            Ok(Sector(0))
        }
        MetaKind::Indexed(index) => {
            let start = u64::from(index) * INDEXED_SLOT_SECTORS;
            require_meta_device(start + INDEXED_SLOT_SECTORS, meta_device)?;
            Ok(Sector(start))
        }
    }
}

/// The page of the bitmap and the bytes in it that describe an activity-log extent.
#[must_use]
pub fn bitmap_bytes(extent: AlExtent) -> (u64, std::ops::Range<usize>) {
    let page = u64::from(extent.0 / AL_EXTENTS_PER_PAGE);
    let index = usize::try_from(extent.0 % AL_EXTENTS_PER_PAGE).expect("less than 32");
    let start = index * BITMAP_BYTES_PER_AL_EXTENT;
    (page, start..start + BITMAP_BYTES_PER_AL_EXTENT)
}

/// Bytes of bitmap that `size` sectors of data occupy on disk, in whole pages.
#[must_use]
pub fn bitmap_bytes_on_disk(size: Sector) -> u64 {
    let page_bytes = PAGE_SECTORS * 512;
    size.0.div_ceil(SECTORS_PER_BLOCK).div_ceil(64).saturating_mul(8).div_ceil(page_bytes)
        * page_bytes
}

/// Checks the shape of an activity log and returns its number of blocks.
///
/// # Errors
/// If one number is zero or the product lies outside of the format's bounds.
pub fn check_al_shape(stripes: u32, stripe_size_4k: u32) -> Result<u32, FormatError> {
    let blocks = u64::from(stripes) * u64::from(stripe_size_4k);
    if !(AL_BLOCKS_MIN..=AL_BLOCKS_MAX).contains(&blocks) {
        return Err(FormatError::AlShape { stripes, stripe_size_4k });
    }
    Ok(u32::try_from(blocks).expect("bounded by AL_BLOCKS_MAX"))
}

impl Geometry {
    /// Computes the layout for a data device and a metadata device of these sizes.
    ///
    /// `meta_device` is ignored for internal metadata. Stripes and stripe size both zero mean
    /// the default of 1 x 8, as in a superblock.
    ///
    /// # Errors
    /// If a device is too small or too large for the format, or the shape of the activity log
    /// is not allowed.
    pub fn new(
        kind: MetaKind,
        data_device: Sector,
        meta_device: Sector,
        al_stripes: u32,
        al_stripe_size_4k: u32,
    ) -> Result<Self, FormatError> {
        let (al_stripes, al_stripe_size_4k) = match (al_stripes, al_stripe_size_4k) {
            (0, 0) => (AL_STRIPES_DEFAULT, AL_STRIPE_SIZE_4K_DEFAULT),
            shape => shape,
        };
        let blocks = check_al_shape(al_stripes, al_stripe_size_4k)?;
        if data_device.0 < PAGE_SECTORS {
            let (needed, found) = (PAGE_SECTORS, data_device.0);
            return Err(FormatError::DataDeviceTooSmall { needed, found });
        }
        if data_device.0 > MAX_DATA_SECTORS {
            let (limit, found) = (MAX_DATA_SECTORS, data_device.0);
            return Err(FormatError::DeviceTooLarge { limit, found });
        }
        let al_sectors = u64::from(blocks) * PAGE_SECTORS;
        let meta_device = match kind {
            MetaKind::Internal => data_device,
            MetaKind::Flexible | MetaKind::Indexed(_) => meta_device,
        };
        let superblock = superblock_sector(kind, data_device, meta_device)?;
        let plan = match kind {
            MetaKind::Internal => Plan::internal(superblock, meta_device, al_sectors)?,
            MetaKind::Flexible => {
                Plan::external(superblock, meta_device.0, data_device, al_sectors)?
            }
            MetaKind::Indexed(_) => {
                if (al_stripes, al_stripe_size_4k)
                    != (AL_STRIPES_DEFAULT, AL_STRIPE_SIZE_4K_DEFAULT)
                {
                    let (stripes, stripe_size_4k) = (al_stripes, al_stripe_size_4k);
                    return Err(FormatError::AlShapeIndexed { stripes, stripe_size_4k });
                }
                Plan::external(superblock, INDEXED_SLOT_SECTORS, data_device, al_sectors)?
            }
        };
        let geometry = Self {
            kind,
            meta_device,
            superblock,
            activity_log: plan.activity_log,
            al_stripes,
            al_stripe_size_4k,
            bitmap: plan.bitmap,
            bitmap_sectors: plan.bitmap_sectors,
            md_size_sectors: plan.md_size_sectors,
            al_offset: offset(superblock, plan.activity_log, meta_device)?,
            bm_offset: offset(superblock, plan.bitmap, meta_device)?,
            capacity: plan.capacity,
        };
        geometry.self_check();
        Ok(geometry)
    }

    /// Blocks of the activity log.
    #[must_use]
    pub fn al_blocks(&self) -> u32 {
        self.al_stripes * self.al_stripe_size_4k
    }

    /// The first sector of a block of the activity log.
    ///
    /// # Panics
    /// If the log has no such block.
    #[must_use]
    pub fn al_block_sector(&self, index: u32) -> Sector {
        assert!(index < self.al_blocks(), "block {index} of {}", self.al_blocks());
        Sector(self.activity_log.0 + u64::from(index) * PAGE_SECTORS)
    }

    /// The first sector of a page of the bitmap; `None` beyond its area.
    #[must_use]
    pub fn bitmap_page_sector(&self, page: u64) -> Option<Sector> {
        if page >= self.bitmap_sectors / PAGE_SECTORS {
            return None;
        }
        Some(Sector(self.bitmap.0 + page * PAGE_SECTORS))
    }

    /// Sectors of data that the bitmap area has bits for.
    #[must_use]
    pub fn bitmap_covers(&self) -> u64 {
        self.bitmap_sectors.saturating_mul(DATA_SECTORS_PER_BITMAP_SECTOR)
    }

    /// Whether the stock driver would accept a metadata device of this size. We do ourselves;
    /// what creates metadata should say so when the answer is no.
    ///
    /// # Errors
    /// If the metadata device is smaller than 1 MiB.
    pub fn check_kernel_minimum(&self) -> Result<(), FormatError> {
        let (needed, found) = (KERNEL_MIN_META_SECTORS, self.meta_device.0);
        if found < needed {
            return Err(FormatError::BelowKernelMinimum { needed, found });
        }
        Ok(())
    }

    /// The three areas: superblock, activity log, bitmap.
    #[must_use]
    pub fn areas(&self) -> [SectorRange; 3] {
        let area = |start: Sector, len: u64| SectorRange { start: start.0, end: start.0 + len };
        [
            area(self.superblock, PAGE_SECTORS),
            area(self.activity_log, u64::from(self.al_blocks()) * PAGE_SECTORS),
            area(self.bitmap, self.bitmap_sectors),
        ]
    }

    fn self_check(&self) {
        let [superblock, activity_log, bitmap] = self.areas();
        assert!(!superblock.overlaps(activity_log), "{self:?}");
        assert!(!superblock.overlaps(bitmap), "{self:?}");
        assert!(!activity_log.overlaps(bitmap), "{self:?}");
        assert!(self.areas().iter().all(|area| area.end <= self.meta_device.0), "{self:?}");
        assert!(self.bitmap_covers() >= self.capacity.0, "{self:?}");
        if self.kind == MetaKind::Internal {
            assert!(self.areas().iter().all(|area| area.start >= self.capacity.0), "{self:?}");
        }
    }
}

/// The part of a layout that depends on the kind.
struct Plan {
    activity_log: Sector,
    bitmap: Sector,
    bitmap_sectors: u64,
    md_size_sectors: u64,
    capacity: Sector,
}

impl Plan {
    fn internal(superblock: Sector, device: Sector, al_sectors: u64) -> Result<Self, FormatError> {
        let bitmap_sectors =
            device.0.div_ceil(DATA_SECTORS_PER_BITMAP_SECTOR).next_multiple_of(PAGE_SECTORS);
        let before = bitmap_sectors + al_sectors;
        let needed = PAGE_SECTORS + before + PAGE_SECTORS;
        require_meta_device(needed, Sector(superblock.0 + PAGE_SECTORS))?;
        let bitmap = Sector(superblock.0 - before);
        Ok(Self {
            activity_log: Sector(superblock.0 - al_sectors),
            bitmap,
            bitmap_sectors,
            md_size_sectors: before + PAGE_SECTORS,
            capacity: bitmap,
        })
    }

    fn external(
        superblock: Sector,
        md_size_sectors: u64,
        data_device: Sector,
        al_sectors: u64,
    ) -> Result<Self, FormatError> {
        let bm_offset = PAGE_SECTORS + al_sectors;
        require_meta_device(bm_offset + PAGE_SECTORS, Sector(md_size_sectors))?;
        let limit = u64::from(u32::MAX);
        if md_size_sectors > limit {
            return Err(FormatError::DeviceTooLarge { limit, found: md_size_sectors });
        }
        let area = md_size_sectors - bm_offset;
        let bitmap_sectors = area - area % PAGE_SECTORS;
        let covered = bitmap_sectors * DATA_SECTORS_PER_BITMAP_SECTOR;
        Ok(Self {
            activity_log: Sector(superblock.0 + PAGE_SECTORS),
            bitmap: Sector(superblock.0 + bm_offset),
            bitmap_sectors,
            md_size_sectors,
            capacity: Sector(data_device.0.min(covered)),
        })
    }
}

fn require_meta_device(needed: u64, meta_device: Sector) -> Result<(), FormatError> {
    if meta_device.0 < needed {
        return Err(FormatError::MetaDeviceTooSmall { needed, found: meta_device.0 });
    }
    Ok(())
}

/// The distance from the superblock to an area as the superblock records it.
fn offset(superblock: Sector, area: Sector, device: Sector) -> Result<i32, FormatError> {
    let signed = |sector: Sector| i64::try_from(sector.0).expect("sectors of a device fit");
    // Internal metadata alone reaches so far: a bitmap of 2^31 sectors describes 2^46 of data.
    let too_large = FormatError::DeviceTooLarge { limit: 1 << 46, found: device.0 };
    i32::try_from(signed(area) - signed(superblock)).map_err(|_| too_large)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn default_log(kind: MetaKind, data: u64, meta: u64) -> Result<Geometry, FormatError> {
        Geometry::new(kind, Sector(data), Sector(meta), 0, 0)
    }

    /// Internal metadata of devices that were measured with the stock tool.
    #[test]
    fn internal_layout_matches_measured_devices() {
        // bytes of the device, superblock byte, al_offset, bm_offset, md_size, capacity
        let table = [
            (12 << 20, 12_578_816, -64, -72, 80, 24_496),
            (64 << 20, 67_104_768, -64, -72, 80, 130_992),
            (512 << 20, 536_866_816, -64, -96, 104, 1_048_472),
            (70_144, 65_536, -64, -72, 80, 56),
            (134_218_240, 134_213_632, -64, -80, 88, 262_056),
            (150_994_432, 150_986_752, -64, -80, 88, 294_816),
        ];
        for (bytes, superblock, al, bm, size, capacity) in table {
            let geometry = default_log(MetaKind::Internal, bytes / 512, 0).unwrap();
            assert_eq!(geometry.superblock.byte(), superblock, "{bytes} bytes");
            assert_eq!((geometry.al_offset, geometry.bm_offset), (al, bm), "{bytes} bytes");
            assert_eq!(geometry.md_size_sectors, size, "{bytes} bytes");
            assert_eq!(geometry.capacity, Sector(capacity), "{bytes} bytes");
        }
        let striped = Geometry::new(MetaKind::Internal, Sector(131_072), Sector(0), 3, 4).unwrap();
        assert_eq!((striped.al_offset, striped.bm_offset), (-96, -104));
        assert_eq!((striped.md_size_sectors, striped.al_blocks()), (112, 12));
    }

    /// External metadata starts at its slot; the bitmap limits the capacity.
    #[test]
    fn external_layout_limits_the_capacity() {
        let flexible = default_log(MetaKind::Flexible, 1 << 30, 4099).unwrap();
        assert_eq!((flexible.superblock, flexible.md_size_sectors), (Sector(0), 4099));
        assert_eq!((flexible.al_offset, flexible.bm_offset), (8, 72));
        assert_eq!(flexible.bitmap_sectors, 4024);
        assert_eq!(flexible.capacity, Sector(4024 * 32_768));
        let second = default_log(MetaKind::Indexed(1), 1 << 34, 2 * 262_144).unwrap();
        assert_eq!(second.superblock.byte(), 134_217_728);
        assert_eq!((second.md_size_sectors, second.capacity), (262_144, Sector(8_587_575_296)));
        let small = default_log(MetaKind::Indexed(0), 99, 262_144).unwrap();
        assert_eq!(small.capacity, Sector(99));
    }

    /// Every refusal names what is wrong with the device.
    #[test]
    fn impossible_devices_are_refused() {
        use FormatError as E;
        let table = [
            (MetaKind::Internal, 87, 0, E::MetaDeviceTooSmall { needed: 88, found: 80 }),
            (MetaKind::Internal, 7, 0, E::DataDeviceTooSmall { needed: 8, found: 7 }),
            (MetaKind::Flexible, 800, 79, E::MetaDeviceTooSmall { needed: 80, found: 79 }),
            (MetaKind::Flexible, 0, 800, E::DataDeviceTooSmall { needed: 8, found: 0 }),
            (
                MetaKind::Indexed(1),
                800,
                524_287,
                E::MetaDeviceTooSmall { needed: 524_288, found: 524_287 },
            ),
            (
                MetaKind::Internal,
                (1 << 51) + 1,
                0,
                E::DeviceTooLarge { limit: 1 << 51, found: (1 << 51) + 1 },
            ),
            (MetaKind::Internal, 1 << 50, 0, E::DeviceTooLarge { limit: 1 << 46, found: 1 << 50 }),
            (
                MetaKind::Flexible,
                800,
                1 << 32,
                E::DeviceTooLarge { limit: (1 << 32) - 1, found: 1 << 32 },
            ),
        ];
        for (kind, data, meta, expected) in table {
            assert_eq!(default_log(kind, data, meta), Err(expected), "{kind:?} {data} {meta}");
        }
    }

    /// The bounds of the activity log, and the one shape of an indexed device.
    #[test]
    fn impossible_logs_are_refused() {
        let new = |kind, stripes, size| {
            Geometry::new(kind, Sector(1 << 30), Sector(1 << 30), stripes, size)
        };
        for (stripes, stripe_size_4k) in [(0, 8), (1, 0), (7, 1), (4_194_305, 1), (u32::MAX, 8)] {
            let expected = FormatError::AlShape { stripes, stripe_size_4k };
            assert_eq!(new(MetaKind::Flexible, stripes, stripe_size_4k), Err(expected));
        }
        assert_eq!(new(MetaKind::Flexible, 2, 2_097_152).unwrap().al_blocks(), 4_194_304);
        let expected = FormatError::AlShapeIndexed { stripes: 2, stripe_size_4k: 4 };
        assert_eq!(new(MetaKind::Indexed(0), 2, 4), Err(expected));
    }

    /// 1 MiB is what the stock driver asks for.
    #[test]
    fn the_minimum_of_the_stock_driver_is_known() {
        let just = default_log(MetaKind::Internal, 2048, 0).unwrap();
        assert_eq!(just.check_kernel_minimum(), Ok(()));
        let below = default_log(MetaKind::Internal, 2047, 0).unwrap();
        let expected = FormatError::BelowKernelMinimum { needed: 2048, found: 2047 };
        assert_eq!(below.check_kernel_minimum(), Err(expected));
    }

    /// An extent's bits: 128 bytes, never across a page.
    #[test]
    fn extents_map_to_bytes_of_one_page() {
        assert_eq!(bitmap_bytes(AlExtent(0)), (0, 0..128));
        assert_eq!(bitmap_bytes(AlExtent(31)), (0, 3968..4096));
        assert_eq!(bitmap_bytes(AlExtent(32)), (1, 0..128));
        assert_eq!(bitmap_bytes(AlExtent(u32::MAX)), (134_217_727, 3968..4096));
        assert_eq!(bitmap_bytes_on_disk(Sector(0)), 0);
        assert_eq!(bitmap_bytes_on_disk(Sector(1)), 4096);
        assert_eq!(bitmap_bytes_on_disk(Sector(262_144)), 4096);
        assert_eq!(bitmap_bytes_on_disk(Sector(262_145)), 8192);
    }

    /// Sizes spread over all magnitudes, most of them odd: 64 KiB to 16 TiB.
    fn device_sectors() -> impl Strategy<Value = u64> {
        (7_u32..=35, any::<u64>(), -9_i64..=9).prop_map(|(magnitude, low, edge)| {
            let base = 1_u64 << magnitude;
            let size =
                if low % 2 == 0 { base.saturating_add_signed(edge) } else { base + low % base };
            size.clamp(128, 1 << 35)
        })
    }

    fn kind() -> impl Strategy<Value = MetaKind> {
        prop_oneof![
            Just(MetaKind::Internal),
            Just(MetaKind::Flexible),
            (0_u32..5).prop_map(MetaKind::Indexed),
        ]
    }

    fn shape() -> impl Strategy<Value = (u32, u32)> {
        prop_oneof![Just((0, 0)), Just((1, 8)), (1_u32..20, 1_u32..5000)]
    }

    proptest! {
        /// MD-3: nothing overlaps, nothing lies outside, and every block of data has its bit.
        #[test]
        fn areas_never_overlap(
            kind in kind(),
            data in device_sectors(),
            meta in device_sectors(),
            (stripes, stripe_size_4k) in shape(),
        ) {
            let on_data = kind == MetaKind::Internal;
            let holder = if on_data { data } else { meta };
            match Geometry::new(kind, Sector(data), Sector(meta), stripes, stripe_size_4k) {
                Ok(geometry) => {
                    let mut areas: Vec<(u64, u64)> =
                        geometry.areas().iter().map(|area| (area.start, area.end)).collect();
                    if on_data {
                        areas.push((0, geometry.capacity.0));
                    }
                    areas.sort_unstable();
                    for pair in areas.windows(2) {
                        prop_assert!(pair[0].1 <= pair[1].0, "{:?} of {:?}", pair, geometry);
                    }
                    prop_assert!(areas.iter().all(|area| area.0 < area.1 && area.1 <= holder));
                    prop_assert!(geometry.areas().iter().all(|area| area.start % 8 == 0));
                    prop_assert!(geometry.capacity.0 <= data);
                    let last_block = (geometry.capacity.0 - 1) / 8;
                    let page = geometry.bitmap_page_sector(last_block / 32_768).unwrap();
                    let bitmap = geometry.areas()[2];
                    prop_assert!(bitmap.start <= page.0 && page.0 + 8 <= bitmap.end);
                    prop_assert_eq!(geometry.bitmap_page_sector(geometry.bitmap_sectors / 8), None);
                    let last = geometry.al_block_sector(geometry.al_blocks() - 1);
                    prop_assert_eq!(last.0 + 8, geometry.areas()[1].end);
                }
                Err(FormatError::MetaDeviceTooSmall { needed, found }) => {
                    prop_assert!(found < needed && found <= holder);
                }
                Err(FormatError::AlShape { stripes, stripe_size_4k }) => {
                    prop_assert!(stripes * stripe_size_4k < 8);
                }
                Err(FormatError::AlShapeIndexed { .. }) => {
                    prop_assert!((stripes, stripe_size_4k) != (1, 8));
                }
                Err(FormatError::DeviceTooLarge { limit, found }) => prop_assert!(found > limit),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }

        /// No combination of numbers panics.
        #[test]
        fn arbitrary_sizes_never_panic(
            kind in prop_oneof![
                Just(MetaKind::Internal),
                Just(MetaKind::Flexible),
                any::<u32>().prop_map(MetaKind::Indexed),
            ],
            data in any::<u64>(),
            meta in any::<u64>(),
            shift in 0_u32..64,
            stripes in any::<u32>(),
            stripe_size_4k in any::<u32>(),
        ) {
            for (stripes, stripe_size_4k) in [(stripes, stripe_size_4k), (1, 8), (0, 0)] {
                let (data, meta) = (Sector(data >> shift), Sector(meta >> shift));
                if let Ok(geometry) = Geometry::new(kind, data, meta, stripes, stripe_size_4k) {
                    prop_assert!(geometry.capacity.0 > 0);
                }
            }
        }
    }
}
