//! The superblock: identity, flags and size of one volume, and where the rest of its metadata is.
//!
//! Layout of the 4096 bytes, numbers big endian:
//!
//! | offset | type | field |
//! |---|---|---|
//! | 0 | u64 | size last agreed with the peer, in sectors; 0 = none yet |
//! | 8 | u64 | current generation identifier |
//! | 16 | u64 | bitmap identifier |
//! | 24, 32 | u64 | history identifiers, younger first |
//! | 40 | u64 | device identifier (unused, carried along) |
//! | 48 | u64 | reserved, zero |
//! | 56 | u32 | [`MetaFlags`] |
//! | 60 | u32 | [`Magic`] |
//! | 64 | u32 | sectors of all metadata |
//! | 68 | i32 | sectors from here to the activity log |
//! | 72 | u32 | slots of the activity log |
//! | 76 | i32 | sectors from here to the bitmap |
//! | 80 | u32 | bytes of data for each bit: 4096 |
//! | 84 | u32 | largest request the peer was known to take, in bytes |
//! | 88 | u32 | stripes of the activity log |
//! | 92 | u32 | blocks of 4 KiB of each stripe |
//! | 96 | | zero |
//!
//! There is no checksum. All of it lies in one sector, so that a tear at a sector boundary
//! leaves the old superblock or the new one (MD-1). Reserved bytes are written as zero and not
//! looked at, as the stock driver does.
//!
//! [`Superblock::decode`] accepts the two marks of format v08 and reads the fields;
//! [`Superblock::check`] holds them against the devices (MD-2). Whether the metadata is *clean*,
//! that is whether the activity log has to be applied first, is a third question:
//! [`Superblock::is_clean`].

use std::fmt;

use super::layout::{Geometry, MetaKind};
use super::page::{PAGE_SIZE, Page};
use super::{FormatError, layout};
use crate::limits::MAX_DEVICE_SECTORS;
use crate::units::{BLOCK_SIZE, SECTOR_SIZE, Sector};

const LA_SIZE: usize = 0;
const CURRENT: usize = 8;
const BITMAP: usize = 16;
const HISTORY: [usize; 2] = [24, 32];
const DEVICE_UUID: usize = 40;
const FLAGS: usize = 56;
const MAGIC: usize = 60;
const MD_SIZE: usize = 64;
const AL_OFFSET: usize = 68;
const AL_EXTENTS: usize = 72;
const BM_OFFSET: usize = 76;
const BYTES_PER_BIT: usize = 80;
const PEER_MAX_BIO: usize = 84;
const AL_STRIPES: usize = 88;
const AL_STRIPE_SIZE: usize = 92;
/// Bytes of the superblock that carry anything.
const USED: usize = AL_STRIPE_SIZE + 4;

const _: () = assert!(USED == 96 && FLAGS == DEVICE_UUID + 16 && MAGIC == FLAGS + 4);
const _: () = assert!(BITMAP == CURRENT + 8 && HISTORY[0] == BITMAP + 8);
const _: () = assert!(HISTORY[1] == HISTORY[0] + 8 && DEVICE_UUID == HISTORY[1] + 8);
// The assumption about torn writes: everything in use shares one sector.
const _: () = assert!(USED < 512 && SECTOR_SIZE == 512 && PAGE_SIZE == 4096);

/// Bytes of data that one bit stands for, as the superblock records it.
pub const BYTES_PER_BIT_V08: u32 = 4096;
const _: () = assert!(BLOCK_SIZE == 4096);
/// Slots of the activity log that newly created metadata records; the driver writes its own
/// setting at the first attach.
pub const AL_EXTENTS_CREATED: u32 = 257;
/// Current identifier of metadata that never saw data.
pub const UUID_JUST_CREATED: u64 = 4;

/// What the mark of a metadata block says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Magic {
    /// Format v07 of DRBD 0.7, with another activity log; not readable here.
    V07,
    /// Format v08; with [`MetaFlags::AL_CLEAN`] the activity log is empty.
    V08Clean,
    /// Format v08 in use or after use: the activity log has to be applied before the next use.
    V08Unclean,
    /// Format v09 of DRBD 9; the stock tool converts between it and v08.
    V09,
    /// Anything else.
    Unknown(u32),
}

impl Magic {
    /// Interprets the number on disk.
    #[must_use]
    pub fn from_raw(raw: u32) -> Self {
        match raw {
            0x8374_026a => Self::V07,
            0x8374_026b => Self::V08Clean,
            0x8374_026c => Self::V08Unclean,
            0x8374_026d => Self::V09,
            other => Self::Unknown(other),
        }
    }

    /// The number on disk.
    #[must_use]
    pub fn raw(self) -> u32 {
        match self {
            Self::V07 => 0x8374_026a,
            Self::V08Clean => 0x8374_026b,
            Self::V08Unclean => 0x8374_026c,
            Self::V09 => 0x8374_026d,
            Self::Unknown(other) => other,
        }
    }

    /// Whether this module can read what follows the mark.
    #[must_use]
    pub fn is_v08(self) -> bool {
        match self {
            Self::V08Clean | Self::V08Unclean => true,
            Self::V07 | Self::V09 | Self::Unknown(_) => false,
        }
    }
}

impl fmt::Display for Magic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::V07 => "format v07",
            Self::V08Clean => "format v08, clean",
            Self::V08Unclean => "format v08, unclean",
            Self::V09 => "format v09",
            Self::Unknown(_) => "no known format",
        };
        write!(f, "{:#010x} ({name})", self.raw())
    }
}

/// The flag word of the superblock. Bits without a name are carried along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MetaFlags(pub u32);

impl MetaFlags {
    /// No flag.
    pub const EMPTY: Self = Self(0);
    /// The data is consistent: the disk state is better than Inconsistent.
    pub const CONSISTENT: Self = Self(0x001);
    /// This node is Primary, or serves a Primary that has no usable disk.
    pub const PRIMARY_IND: Self = Self(0x002);
    /// A connection was up.
    pub const CONNECTED_IND: Self = Self(0x004);
    /// All bits are being set: the bitmap on disk counts as all ones.
    pub const FULL_SYNC: Self = Self(0x008);
    /// The disk state is better than Outdated.
    pub const WAS_UP_TO_DATE: Self = Self(0x010);
    /// The peer's disk is Inconsistent or Outdated.
    pub const PEER_OUT_DATED: Self = Self(0x020);
    /// This node crashed as Primary and has not been in sync since.
    pub const CRASHED_PRIMARY: Self = Self(0x040);
    /// The activity log is empty and need not be applied.
    pub const AL_CLEAN: Self = Self(0x080);
    /// The activity log is not written, or is being initialised.
    pub const AL_DISABLED: Self = Self(0x100);

    /// Whether every flag of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Sets every flag of `other`.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Clears every flag of `other`.
    pub fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
    }

    /// The flags with those of `other` set or cleared.
    #[must_use]
    pub const fn with(self, other: Self, set: bool) -> Self {
        if set { Self(self.0 | other.0) } else { Self(self.0 & !other.0) }
    }
}

/// The generation identifiers as they are on disk; bit 0 of the current one is a marker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uuids {
    /// Of the data as it is.
    pub current: u64,
    /// Of the data that the bitmap counts from; 0 = none.
    pub bitmap: u64,
    /// Of earlier data, younger first.
    pub history: [u64; 2],
}

/// The content of a superblock of format v08.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Size last agreed with the peer; zero before the first attach.
    pub la_size: Sector,
    /// Generation identifiers.
    pub uuids: Uuids,
    /// Carried along; the stock tool writes 0.
    pub device_uuid: u64,
    /// State that survives.
    pub flags: MetaFlags,
    /// Mark of the format; one of the two v08 marks.
    pub magic: Magic,
    /// Sectors of all metadata.
    pub md_size_sectors: u32,
    /// Sectors from the superblock to the activity log.
    pub al_offset: i32,
    /// Slots of the activity log in use.
    pub al_extents: u32,
    /// Sectors from the superblock to the bitmap.
    pub bm_offset: i32,
    /// Bytes of data of one bit.
    pub bytes_per_bit: u32,
    /// Largest request that the peer was known to take, in bytes; 0 = unknown.
    pub la_peer_max_bio_size: u32,
    /// Stripes of the activity log.
    pub al_stripes: u32,
    /// Blocks of 4 KiB of each stripe.
    pub al_stripe_size_4k: u32,
}

impl Superblock {
    /// The superblock of newly created metadata: inconsistent, clean, of no size.
    #[must_use]
    pub fn fresh(geometry: &Geometry) -> Self {
        Self {
            la_size: Sector(0),
            uuids: Uuids { current: UUID_JUST_CREATED, bitmap: 0, history: [0; 2] },
            device_uuid: 0,
            flags: MetaFlags::AL_CLEAN,
            magic: Magic::V08Clean,
            md_size_sectors: recorded_size(geometry),
            al_offset: geometry.al_offset,
            al_extents: AL_EXTENTS_CREATED,
            bm_offset: geometry.bm_offset,
            bytes_per_bit: BYTES_PER_BIT_V08,
            la_peer_max_bio_size: 0,
            al_stripes: geometry.al_stripes,
            al_stripe_size_4k: geometry.al_stripe_size_4k,
        }
    }

    /// The layout that this superblock's activity log asks for on these devices.
    ///
    /// # Errors
    /// As [`Geometry::new`].
    pub fn geometry(
        &self,
        kind: MetaKind,
        data_device: Sector,
        meta_device: Sector,
    ) -> Result<Geometry, FormatError> {
        Geometry::new(kind, data_device, meta_device, self.al_stripes, self.al_stripe_size_4k)
    }

    /// Records the places of a layout, when metadata is created or its device has grown.
    pub fn set_geometry(&mut self, geometry: &Geometry) {
        self.md_size_sectors = recorded_size(geometry);
        self.al_offset = geometry.al_offset;
        self.bm_offset = geometry.bm_offset;
        self.al_stripes = geometry.al_stripes;
        self.al_stripe_size_4k = geometry.al_stripe_size_4k;
    }

    /// Writes the superblock into a page; every byte of the page is overwritten.
    ///
    /// # Panics
    /// If the magic is not one of v08: such a superblock is not ours to write.
    pub fn encode(&self, page: &mut Page) {
        assert!(self.magic.is_v08(), "refusing to write a superblock of {}", self.magic);
        page.clear();
        page.put_u64(LA_SIZE, self.la_size.0);
        page.put_u64(CURRENT, self.uuids.current);
        page.put_u64(BITMAP, self.uuids.bitmap);
        page.put_u64(HISTORY[0], self.uuids.history[0]);
        page.put_u64(HISTORY[1], self.uuids.history[1]);
        page.put_u64(DEVICE_UUID, self.device_uuid);
        page.put_u32(FLAGS, self.flags.0);
        page.put_u32(MAGIC, self.magic.raw());
        page.put_u32(MD_SIZE, self.md_size_sectors);
        page.put_i32(AL_OFFSET, self.al_offset);
        page.put_u32(AL_EXTENTS, self.al_extents);
        page.put_i32(BM_OFFSET, self.bm_offset);
        page.put_u32(BYTES_PER_BIT, self.bytes_per_bit);
        page.put_u32(PEER_MAX_BIO, self.la_peer_max_bio_size);
        page.put_u32(AL_STRIPES, self.al_stripes);
        page.put_u32(AL_STRIPE_SIZE, self.al_stripe_size_4k);
    }

    /// Reads a superblock. An activity log of 0 x 0, written by drivers that knew no stripes,
    /// is read as the 1 x 8 that it means.
    ///
    /// # Errors
    /// If the block does not carry a mark of format v08. The values themselves are judged by
    /// [`Superblock::check`].
    pub fn decode(page: &Page) -> Result<Self, FormatError> {
        let magic = Magic::from_raw(page.u32_at(MAGIC));
        if !magic.is_v08() {
            return Err(FormatError::ForeignMagic { found: magic });
        }
        let (al_stripes, al_stripe_size_4k) =
            match (page.u32_at(AL_STRIPES), page.u32_at(AL_STRIPE_SIZE)) {
                (0, 0) => (layout::AL_STRIPES_DEFAULT, layout::AL_STRIPE_SIZE_4K_DEFAULT),
                shape => shape,
            };
        Ok(Self {
            la_size: Sector(page.u64_at(LA_SIZE)),
            uuids: Uuids {
                current: page.u64_at(CURRENT),
                bitmap: page.u64_at(BITMAP),
                history: [page.u64_at(HISTORY[0]), page.u64_at(HISTORY[1])],
            },
            device_uuid: page.u64_at(DEVICE_UUID),
            flags: MetaFlags(page.u32_at(FLAGS)),
            magic,
            md_size_sectors: page.u32_at(MD_SIZE),
            al_offset: page.i32_at(AL_OFFSET),
            al_extents: page.u32_at(AL_EXTENTS),
            bm_offset: page.i32_at(BM_OFFSET),
            bytes_per_bit: page.u32_at(BYTES_PER_BIT),
            la_peer_max_bio_size: page.u32_at(PEER_MAX_BIO),
            al_stripes,
            al_stripe_size_4k,
        })
    }

    /// Holds the fields against the layout computed from the devices ([`Superblock::geometry`]),
    /// before anything is done with the disk. `configured_size` is the size that the operator
    /// has set, if any.
    ///
    /// The stock driver relocates metadata whose recorded places differ from the computed ones;
    /// here this is refused with the field named, except that flexible metadata may be smaller
    /// than its device has become.
    ///
    /// # Errors
    /// One of [`FormatError`], for the first field that does not fit.
    pub fn check(
        &self,
        geometry: &Geometry,
        configured_size: Option<Sector>,
    ) -> Result<(), FormatError> {
        if self.bytes_per_bit != BYTES_PER_BIT_V08 {
            let (expected, found) = (BYTES_PER_BIT_V08, self.bytes_per_bit);
            return Err(FormatError::BytesPerBit { expected, found });
        }
        layout::check_al_shape(self.al_stripes, self.al_stripe_size_4k)?;
        let found = (self.al_stripes, self.al_stripe_size_4k);
        let expected = (geometry.al_stripes, geometry.al_stripe_size_4k);
        if found != expected {
            return Err(FormatError::AlShapeDiffers { expected, found });
        }
        self.check_places(geometry)?;
        self.check_size(geometry, configured_size)
    }

    fn check_places(&self, geometry: &Geometry) -> Result<(), FormatError> {
        if self.al_offset != geometry.al_offset {
            let (expected, found) = (geometry.al_offset, self.al_offset);
            return Err(FormatError::AlOffset { expected, found });
        }
        if self.bm_offset != geometry.bm_offset {
            let (expected, found) = (geometry.bm_offset, self.bm_offset);
            return Err(FormatError::BitmapOffset { expected, found });
        }
        let (expected, found) = (geometry.md_size_sectors, u64::from(self.md_size_sectors));
        let fits = match geometry.kind {
            MetaKind::Internal | MetaKind::Indexed(_) => found == expected,
            MetaKind::Flexible => found <= expected && self.bitmap_covers(geometry) > 0,
        };
        if !fits {
            return Err(FormatError::MdSize { expected, found });
        }
        Ok(())
    }

    fn check_size(
        &self,
        geometry: &Geometry,
        configured_size: Option<Sector>,
    ) -> Result<(), FormatError> {
        let covered = self.bitmap_covers(geometry);
        if covered < self.la_size.0 {
            return Err(FormatError::BitmapTooSmall { la_size: self.la_size, covered });
        }
        let capacity = geometry.capacity;
        // A configured size above the capacity is ignored, so it is no consent to shrink.
        let consented = configured_size.is_some_and(|size| size <= capacity);
        if self.flags.contains(MetaFlags::CONSISTENT) && self.la_size > capacity && !consented {
            return Err(FormatError::WouldTruncate { la_size: self.la_size, capacity });
        }
        let found = configured_size.map_or(capacity, |size| size.min(capacity)).0;
        if found > MAX_DEVICE_SECTORS {
            return Err(FormatError::AboveOurLimit { limit: MAX_DEVICE_SECTORS, found });
        }
        Ok(())
    }

    /// Sectors of data that the bitmap has bits for, by the recorded size of the metadata.
    fn bitmap_covers(&self, geometry: &Geometry) -> u64 {
        match geometry.kind {
            MetaKind::Internal | MetaKind::Indexed(_) => geometry.bitmap_covers(),
            MetaKind::Flexible => {
                let start = u64::from(geometry.bm_offset.unsigned_abs());
                let area = u64::from(self.md_size_sectors).saturating_sub(start);
                (area - area % 8) * layout::DATA_SECTORS_PER_BITMAP_SECTOR
            }
        }
    }

    /// Whether the activity log need not be applied before the disk is used. The stock driver
    /// refuses to attach a disk that is not clean; we apply the log ourselves.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.magic == Magic::V08Clean && self.flags.contains(MetaFlags::AL_CLEAN)
    }
}

fn recorded_size(geometry: &Geometry) -> u32 {
    u32::try_from(geometry.md_size_sectors).expect("a layout fits into its fields")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(MetaKind::Internal, Sector(24_576), Sector(0), 1, 8).unwrap()
    }

    fn used() -> Superblock {
        Superblock {
            la_size: Sector(24_000),
            uuids: Uuids { current: 0x11, bitmap: 0x22, history: [0x33, 0x44] },
            device_uuid: 0x55,
            flags: MetaFlags::CONSISTENT.with(MetaFlags::PRIMARY_IND, true),
            magic: Magic::V08Unclean,
            al_extents: 1237,
            la_peer_max_bio_size: 1 << 20,
            ..Superblock::fresh(&geometry())
        }
    }

    /// Created metadata of a 12 MiB device, every byte.
    #[test]
    fn fresh_superblock_is_the_created_image() {
        let mut page = Page::zeroed();
        page.0.fill(0xee);
        Superblock::fresh(&geometry()).encode(&mut page);
        let mut expected = [0_u8; PAGE_SIZE];
        expected[15] = 4;
        expected[56..96].copy_from_slice(&[
            0, 0, 0, 0x80, 0x83, 0x74, 0x02, 0x6b, // flags, magic
            0, 0, 0, 0x50, 0xff, 0xff, 0xff, 0xc0, // size, log
            0, 0, 1, 1, 0xff, 0xff, 0xff, 0xb8, // slots, bitmap
            0, 0, 0x10, 0, 0, 0, 0, 0, // bytes of a bit, peer's request size
            0, 0, 0, 1, 0, 0, 0, 8, // stripes
        ]);
        assert!(page.0 == expected, "{page:?}");
        assert!(Superblock::decode(&page).unwrap().is_clean());
    }

    /// Clean needs both the mark and the flag.
    #[test]
    fn clean_needs_mark_and_flag() {
        for (magic, flag, clean) in [
            (Magic::V08Clean, true, true),
            (Magic::V08Clean, false, false),
            (Magic::V08Unclean, true, false),
            (Magic::V08Unclean, false, false),
        ] {
            let flags = MetaFlags::CONSISTENT.with(MetaFlags::AL_CLEAN, flag);
            assert_eq!(Superblock { magic, flags, ..used() }.is_clean(), clean);
        }
    }

    /// MD-2: other formats are refused, and named.
    #[test]
    fn other_formats_are_named() {
        let mut page = Page::zeroed();
        for (raw, found, text) in [
            (0x8374_026a, Magic::V07, "0x8374026a (format v07)"),
            (0x8374_026d, Magic::V09, "0x8374026d (format v09)"),
            (0, Magic::Unknown(0), "0x00000000 (no known format)"),
        ] {
            used().encode(&mut page);
            page.put_u32(MAGIC, raw);
            let error = Superblock::decode(&page).unwrap_err();
            assert_eq!(error, FormatError::ForeignMagic { found });
            assert!(error.to_string().ends_with(text), "{error}");
        }
    }

    /// MD-2: every field that does not fit the device is named with both values.
    #[test]
    fn fields_that_do_not_fit_are_named() {
        use FormatError as E;
        let good = used();
        assert_eq!(good.check(&geometry(), None), Ok(()));
        let shape =
            |al_stripes, al_stripe_size_4k| Superblock { al_stripes, al_stripe_size_4k, ..good };
        let table = [
            (
                Superblock { bytes_per_bit: 512, ..good },
                E::BytesPerBit { expected: 4096, found: 512 },
            ),
            (shape(0, 8), E::AlShape { stripes: 0, stripe_size_4k: 8 }),
            (shape(8, 0), E::AlShape { stripes: 8, stripe_size_4k: 0 }),
            (shape(1, 7), E::AlShape { stripes: 1, stripe_size_4k: 7 }),
            (shape(8, 1), E::AlShapeDiffers { expected: (1, 8), found: (8, 1) }),
            (Superblock { al_offset: 8, ..good }, E::AlOffset { expected: -64, found: 8 }),
            (Superblock { bm_offset: -80, ..good }, E::BitmapOffset { expected: -72, found: -80 }),
            (Superblock { md_size_sectors: 88, ..good }, E::MdSize { expected: 80, found: 88 }),
            (
                Superblock { la_size: Sector(262_145), ..good },
                E::BitmapTooSmall { la_size: Sector(262_145), covered: 262_144 },
            ),
            (
                Superblock { la_size: Sector(24_497), ..good },
                E::WouldTruncate { la_size: Sector(24_497), capacity: Sector(24_496) },
            ),
        ];
        for (superblock, expected) in table {
            assert_eq!(superblock.check(&geometry(), None), Err(expected), "{expected}");
        }
    }

    /// Data that is worthless, or a size that the operator has set, may shrink the device.
    #[test]
    fn shrinking_needs_consent() {
        let large = Superblock { la_size: Sector(30_000), ..used() };
        assert_eq!(large.check(&geometry(), Some(Sector(20_000))), Ok(()));
        assert_eq!(large.check(&geometry(), Some(Sector(24_496))), Ok(()));
        let refused =
            Err(FormatError::WouldTruncate { la_size: Sector(30_000), capacity: Sector(24_496) });
        assert_eq!(large.check(&geometry(), Some(Sector(24_497))), refused);
        let worthless = Superblock { flags: MetaFlags::EMPTY, ..large };
        assert_eq!(worthless.check(&geometry(), None), Ok(()));
    }

    /// Flexible metadata may be smaller than its device, not larger.
    #[test]
    fn flexible_metadata_may_be_smaller_than_its_device() {
        let flexible =
            |meta| Geometry::new(MetaKind::Flexible, Sector(5000), Sector(meta), 1, 8).unwrap();
        let superblock = Superblock { la_size: Sector(5000), ..Superblock::fresh(&flexible(400)) };
        assert_eq!(superblock.check(&flexible(800), None), Ok(()));
        let too_large = Err(FormatError::MdSize { expected: 399, found: 400 });
        assert_eq!(superblock.check(&flexible(399), None), too_large);
        let no_bitmap = Superblock { md_size_sectors: 79, ..superblock };
        let expected = Err(FormatError::MdSize { expected: 400, found: 79 });
        assert_eq!(no_bitmap.check(&flexible(400), None), expected);
    }

    /// Larger than we keep bitmaps for: refused unless a smaller size is configured.
    #[test]
    fn our_own_limit_is_checked() {
        let size = Sector(MAX_DEVICE_SECTORS + (1 << 24));
        let geometry = Geometry::new(MetaKind::Internal, size, Sector(0), 1, 8).unwrap();
        let superblock = Superblock::fresh(&geometry);
        let (limit, found) = (MAX_DEVICE_SECTORS, geometry.capacity.0);
        let refused = Err(FormatError::AboveOurLimit { limit, found });
        assert_eq!(superblock.check(&geometry, None), refused);
        assert_eq!(superblock.check(&geometry, Some(Sector(1 << 35))), Ok(()));
    }

    /// The log of a driver that knew no stripes has the default shape.
    #[test]
    fn unset_log_shape_means_the_default() {
        let mut page = Page::zeroed();
        Superblock { al_stripes: 0, al_stripe_size_4k: 0, ..used() }.encode(&mut page);
        assert_eq!(Superblock::decode(&page), Ok(used()));
    }

    /// MD-1: whatever sectors of a block arrive, in any combination, the result is the old
    /// superblock or the new one.
    #[test]
    fn torn_superblock_is_old_or_new() {
        let (mut old, mut new) = (Page::zeroed(), Page::zeroed());
        let before = Superblock::fresh(&geometry());
        before.encode(&mut old);
        used().encode(&mut new);
        for arrived in 0_u32..256 {
            let mut torn = old.clone();
            for sector in (0..8).filter(|sector| arrived & (1 << sector) != 0) {
                let bytes = sector * 512..(sector + 1) * 512;
                torn.0[bytes.clone()].copy_from_slice(&new.0[bytes]);
            }
            let expected = if arrived & 1 == 1 { used() } else { before };
            assert_eq!(Superblock::decode(&torn), Ok(expected), "sectors {arrived:#010b}");
        }
    }

    proptest! {
        /// Any block is refused or read; what was read is written back the same.
        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in prop::collection::vec(any::<u8>(), USED),
            magic in prop_oneof![Just(None), Just(Some(0x8374_026b)), Just(Some(0x8374_026c))],
            size in any::<u64>(),
        ) {
            let mut page = Page::zeroed();
            page.0[..USED].copy_from_slice(&bytes);
            page.0[48..56].fill(0);
            if let Some(magic) = magic {
                page.put_u32(MAGIC, magic);
            }
            match Superblock::decode(&page) {
                Err(error) => {
                    let found = Magic::from_raw(page.u32_at(MAGIC));
                    prop_assert_eq!(error, FormatError::ForeignMagic { found });
                }
                Ok(superblock) => {
                    let mut again = Page::zeroed();
                    superblock.encode(&mut again);
                    prop_assert_eq!(&again, &page);
                    let verdict = superblock.check(&geometry(), Some(Sector(size)));
                    prop_assert!(verdict.is_err(), "random fields fitted: {:?}", superblock);
                }
            }
        }
    }
}
