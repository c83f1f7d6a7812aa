//! The metadata on disk: where it lies, what its bytes mean, what makes it unacceptable.
//!
//! The format is the one called `v08` by the in-tree driver 8.4 and its tools, bit for bit, so
//! that a disk changes hands in both directions without a resync. Three areas make it up:
//!
//! | area | module | size | who may change it |
//! |---|---|---|---|
//! | superblock | [`superblock`] | one 4 KiB block | identity, flags, size: every change of state |
//! | activity log | [`al_journal`] | a ring of 4 KiB blocks | one block for each transaction |
//! | bitmap | (content: the bitmap room) | 4 KiB pages, one bit for 4 KiB of data | see there |
//!
//! [`layout`] computes the places of the three, [`relocate`] moves them to the end of a device that
//! has grown while nobody looked, [`dump`] writes and reads the text form that the operator's tools
//! exchange. No I/O happens here: pages come in and go out.
//!
//! # What the medium has to promise (MD-1)
//!
//! All metadata I/O is done in aligned 4 KiB blocks, but a disk that tears a block at a sector
//! boundary must not lead to wrong decisions. What is relied upon, area by area:
//!
//! * **Superblock**: it has no checksum. Every byte in use lies in its first 96 bytes, and the
//!   rest is zero before and after. So one atomic 512-byte sector is all that is assumed: a torn
//!   block is the old superblock or the new one. Layout and a test hold this down.
//! * **Activity log**: every block has a checksum over all its bytes. A torn block is recognised
//!   and left out; the write that waited for it has not been started (AL-2, AL-6).
//! * **Bitmap**: it has no checksum. Each sector stands for 16 MiB of its own, so any mix of old
//!   and new sectors of a page is a bitmap in which some changes have not arrived yet. Nothing
//!   may depend on such a change before the flush behind it has been answered (AL-3).
//!
//! # Invariants kept here
//!
//! MD-2 (foreign or damaged metadata is refused with the field named), MD-3 (areas never
//! overlap), MD-7 (read and written as the stock tools do), AL-5 and AL-6 (replay).
//!
//! Source of the rules: the format notes of the project and experiments with the stock tool,
//! repeated by `tests/drbdmeta_blackbox.rs`.

pub mod al_journal;
pub mod dump;
pub mod layout;
pub mod page;
pub mod relocate;
pub mod superblock;

use thiserror::Error;

use crate::units::Sector;

pub use layout::{Geometry, MetaKind};
pub use page::Page;
pub use relocate::KnownSizes;
pub use superblock::{Magic, MetaFlags, Superblock, Uuids};

/// Why metadata, or a device that should carry it, cannot be used. Sizes are in sectors unless
/// the name says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FormatError {
    /// The block where the superblock should be carries another mark.
    #[error("no v08 metadata here: expected magic 0x8374026b or 0x8374026c, found {found}")]
    ForeignMagic {
        /// What is there instead.
        found: Magic,
    },
    /// The metadata device cannot hold the areas and, for internal metadata, one block of data.
    #[error("metadata device is too small: {needed} sectors needed, it has {found}")]
    MetaDeviceTooSmall {
        /// Sectors that the areas need.
        needed: u64,
        /// Sectors of the device.
        found: u64,
    },
    /// The data device has not even one block.
    #[error("data device is too small: {needed} sectors needed, it has {found}")]
    DataDeviceTooSmall {
        /// Sectors of the smallest device.
        needed: u64,
        /// Sectors of the device.
        found: u64,
    },
    /// A device is so large that an offset or a size does not fit into its field.
    #[error("device is too large for the metadata format: at most {limit} sectors, it has {found}")]
    DeviceTooLarge {
        /// The largest size that can be described.
        limit: u64,
        /// Sectors of the device.
        found: u64,
    },
    /// The device would be larger than this implementation keeps a bitmap for.
    #[error("usable size of {found} sectors exceeds {limit}, the limit of this implementation")]
    AboveOurLimit {
        /// [`crate::limits::MAX_DEVICE_SECTORS`].
        limit: u64,
        /// The size that would be exposed.
        found: u64,
    },
    /// The shape of the activity log is impossible.
    #[error(
        "activity log of {stripes} stripes of {stripe_size_4k} blocks: both numbers must be set, \
         and their product lie between 8 and 4194304"
    )]
    AlShape {
        /// Number of stripes.
        stripes: u32,
        /// Blocks of 4 KiB of each stripe.
        stripe_size_4k: u32,
    },
    /// Indexed metadata has room for the default activity log alone.
    #[error(
        "indexed metadata needs an activity log of 1 x 8 blocks, found {stripes} x {stripe_size_4k}"
    )]
    AlShapeIndexed {
        /// Number of stripes.
        stripes: u32,
        /// Blocks of 4 KiB of each stripe.
        stripe_size_4k: u32,
    },
    /// The superblock describes another activity log than the layout was computed for.
    #[error("al_stripes x al_stripe_size_4k: expected {expected:?}, found {found:?}")]
    AlShapeDiffers {
        /// Stripes and blocks of each stripe in the layout.
        expected: (u32, u32),
        /// The same in the superblock.
        found: (u32, u32),
    },
    /// A bit of the bitmap stands for another amount of data.
    #[error("bm_bytes_per_bit: expected {expected}, found {found}")]
    BytesPerBit {
        /// Bytes of a block.
        expected: u32,
        /// The field of the superblock.
        found: u32,
    },
    /// The activity log is not where it must be.
    #[error("al_offset: expected {expected}, found {found}")]
    AlOffset {
        /// The value for this device.
        expected: i32,
        /// The field of the superblock.
        found: i32,
    },
    /// The bitmap is not where it must be.
    #[error("bm_offset: expected {expected}, found {found}")]
    BitmapOffset {
        /// The value for this device.
        expected: i32,
        /// The field of the superblock.
        found: i32,
    },
    /// The metadata has another size than it must have on this device.
    #[error("md_size_sect: expected {expected}, found {found}")]
    MdSize {
        /// The value (for flexible metadata: the largest value) for this device.
        expected: u64,
        /// The field of the superblock.
        found: u64,
    },
    /// The bitmap cannot hold a bit for every block of the agreed size.
    #[error("la_size_sect of {la_size} sectors: the bitmap covers only {covered}")]
    BitmapTooSmall {
        /// The last agreed size.
        la_size: Sector,
        /// Sectors that the bitmap area can describe.
        covered: u64,
    },
    /// Consistent data would lose its end.
    #[error(
        "refusing to truncate consistent data of {la_size} sectors: only {capacity} can be used"
    )]
    WouldTruncate {
        /// The last agreed size.
        la_size: Sector,
        /// What the devices have room for now.
        capacity: Sector,
    },
    /// The stock driver refuses a metadata device as small as this.
    #[error("the in-tree driver needs a metadata device of {needed} sectors, it has {found}")]
    BelowKernelMinimum {
        /// Sectors that the stock driver insists on.
        needed: u64,
        /// Sectors of the device.
        found: u64,
    },
    /// The activity log holds no transaction, and this is not because it is new.
    #[error(
        "activity log is unusable: {invalid} of {blocks} blocks are damaged, none is an update"
    )]
    ActivityLogUnusable {
        /// Blocks with a wrong mark or checksum.
        invalid: u32,
        /// Blocks of the log.
        blocks: u32,
    },
}
