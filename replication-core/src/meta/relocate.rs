//! Internal metadata that its device has outgrown: where it was, and how it comes to the new end.
//!
//! Internal metadata is looked for at the end of its device. A device that has grown while nobody
//! could move the metadata (the node was down, or a resize was refused) has it where the end used
//! to be, so the sizes that the device has had are remembered outside of it ([`KnownSizes`]).
//! [`look`] finds out where the metadata is, [`Relocation::steps`] is how it moves: activity log
//! and bitmap as they are, with zeroes where the bitmap becomes longer, and the superblock with
//! its new offsets. Reading and writing is up to the caller, who also has to keep everybody else
//! away from the device.
//!
//! The list does not say whose metadata was seen: the stock tool writes a zero where v08 has an
//! identifier of the device, and generations change more often than the list is written. So whoever
//! creates or erases metadata has to empty it.
//!
//! # Crashes (MD-1, MD-5)
//!
//! * The new place lies behind the old one: the old metadata is whole until the new superblock is
//!   durable, which is the last thing that is written there. Then the old superblock is erased, so
//!   that a device that shrinks again has no metadata instead of an outdated one.
//! * The two overlap, because the device has grown by less than its metadata takes: the new
//!   superblock goes first and says that every bit counts as set. A crash between it and the end
//!   costs a full sync, as it does when metadata moves under a volume in use.
//!
//! Either way [`look`] finds after a crash the old metadata, and the move is made anew, or the new
//! one, and the old superblock is erased if it is still there.
//!
//! Pages are copied from the last to the first: metadata moves towards the end of the device, so
//! that nothing is overwritten before it was copied.

use std::fmt;

use thiserror::Error;

use super::layout::superblock_sector;
use super::{FormatError, Geometry, MetaFlags, MetaKind, Page, Superblock};
use crate::limits::MAX_KNOWN_SIZES;
use crate::units::{SECTORS_PER_BLOCK, Sector, SectorRange};

/// Sizes of a data device at whose ends its internal metadata may be, the newest first.
///
/// **Shape** (`Display` is the whole file, [`KnownSizes::parse`] reads it): a line with a number of
/// sectors for each; lines that start with `#` say something to people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KnownSizes(Vec<Sector>);

/// Why a text is no list of sizes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KnownSizesError {
    /// A line holds something else.
    #[error("line {line}: expected a number of sectors, found '{found}'")]
    NoNumber {
        /// Its number, from 1.
        line: usize,
        /// What it holds, made printable.
        found: String,
    },
    /// There are more lines than anybody writes.
    #[error("at most {limit} sizes are expected")]
    TooMany {
        /// [`MAX_KNOWN_SIZES`].
        limit: usize,
    },
}

impl KnownSizes {
    /// What is known once `superblock` was read at the end of a device of this size: nothing new,
    /// unless it was written for that size. `configured` is the size that the operator has set.
    #[must_use]
    pub fn seen(superblock: &Superblock, size: Sector, configured: Option<Sector>) -> Option<Self> {
        layout_for(superblock, size, configured).is_ok().then(|| Self(vec![size]))
    }

    /// The device has this size, and metadata is about to move to its end.
    pub fn expect(&mut self, size: Sector) {
        self.0.retain(|known| *known != size);
        self.0.insert(0, size);
        if self.0.len() > MAX_KNOWN_SIZES {
            // The oldest is the one at which metadata was seen.
            self.0.remove(MAX_KNOWN_SIZES - 1);
        }
    }

    /// The sizes, newest first.
    pub fn iter(&self) -> impl Iterator<Item = Sector> + '_ {
        self.0.iter().copied()
    }

    /// Reads the text form.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(text: &str) -> Result<Self, KnownSizesError> {
        let mut sizes = Vec::new();
        for (line, words) in (1..).zip(text.lines()) {
            if words.starts_with('#') {
                continue;
            }
            let number = words.parse().map_err(|_| {
                let found = words.escape_default().take(80).collect();
                KnownSizesError::NoNumber { line, found }
            })?;
            sizes.push(Sector(number));
            if sizes.len() > MAX_KNOWN_SIZES {
                return Err(KnownSizesError::TooMany { limit: MAX_KNOWN_SIZES });
            }
        }
        Ok(Self(sizes))
    }
}

impl fmt::Display for KnownSizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# sectors of the disk, newest size first")?;
        self.0.iter().try_for_each(|size| writeln!(f, "{}", size.0))
    }
}

/// Where the internal metadata of a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// At its end.
    AtEnd {
        /// The superblock that a move was cut off from erasing.
        leftover: Option<Sector>,
    },
    /// Where its end was. It has to move.
    Behind(Box<Relocation>),
    /// Nowhere, or not where it can be used from.
    Nowhere(Nowhere),
}

/// Why there is no metadata that could be used. Sizes are in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Nowhere {
    /// Neither at the end nor where the end is known to have been.
    #[error("no v08 metadata at its end, nor where its end is known to have been")]
    NotFound,
    /// The device has lost its end, where the metadata was or was about to move. What may be left
    /// at an older end is not to be trusted.
    #[error(
        "the device has shrunk from {} sectors to {}; its metadata may have been in what is gone",
        .was.0, .now.0
    )]
    Shrunk {
        /// The last size that is known.
        was: Sector,
        /// The size now.
        now: Sector,
    },
    /// The superblock stays where it is, but the bitmap would need a page of the data.
    #[error("the device has grown from {} sectors to {}: too little", .was.0, .now.0)]
    GrownTooLittle {
        /// The size for which the metadata was written.
        was: Sector,
        /// The size now.
        now: Sector,
        /// The next size at which it can move.
        needed: Sector,
    },
    /// There is metadata, which does not fit the device.
    #[error(transparent)]
    Unfit(#[from] FormatError),
}

/// Looks for the internal metadata of a device: at its end, then at the ends it is known to have
/// had. `configured` is the size that the operator has set, if any; `read` reads a page.
///
/// What fits at the end counts, even if there is more elsewhere: whoever attaches the disk takes
/// it.
///
/// # Errors
/// Those of `read`.
pub fn look<E>(
    device: Sector,
    configured: Option<Sector>,
    known: &KnownSizes,
    mut read: impl FnMut(Sector) -> Result<Box<Page>, E>,
) -> Result<Place, E> {
    let end = match superblock_sector(MetaKind::Internal, device, device) {
        Ok(end) => end,
        Err(error) => return Ok(Place::Nowhere(error.into())),
    };
    let unfit = match fitting(read(end)?.as_ref(), device, configured) {
        Ok((superblock, geometry)) => {
            let leftover = leftover(&superblock, &geometry, known, read)?;
            return Ok(Place::AtEnd { leftover });
        }
        Err(unfit) => unfit,
    };
    if let Some(was) = known.iter().next().filter(|was| *was > device) {
        return Ok(Place::Nowhere(Nowhere::Shrunk { was, now: device }));
    }
    for was in known.iter().filter(|was| *was < device) {
        let Ok(sector) = superblock_sector(MetaKind::Internal, was, was) else { continue };
        let Ok((superblock, from)) = fitting(read(sector)?.as_ref(), was, configured) else {
            continue;
        };
        if sector == end {
            let needed = Sector(end.0 + 2 * SECTORS_PER_BLOCK);
            return Ok(Place::Nowhere(Nowhere::GrownTooLittle { was, now: device, needed }));
        }
        if !matches!(unfit, FormatError::ForeignMagic { .. }) {
            break;
        }
        return Ok(match Relocation::new(superblock, from, device, configured) {
            Ok(relocation) => Place::Behind(Box::new(relocation)),
            Err(error) => Place::Nowhere(error.into()),
        });
    }
    Ok(Place::Nowhere(match unfit {
        FormatError::ForeignMagic { .. } => Nowhere::NotFound,
        unfit => Nowhere::Unfit(unfit),
    }))
}

/// The superblock of a page, if it was written for a device of this size.
fn fitting(
    page: &Page,
    device: Sector,
    configured: Option<Sector>,
) -> Result<(Superblock, Geometry), FormatError> {
    let superblock = Superblock::decode(page)?;
    let geometry = layout_for(&superblock, device, configured)?;
    Ok((superblock, geometry))
}

/// The layout of the metadata, if it was written for a device of this size.
fn layout_for(
    superblock: &Superblock,
    device: Sector,
    configured: Option<Sector>,
) -> Result<Geometry, FormatError> {
    let geometry = superblock.geometry(MetaKind::Internal, device, device)?;
    superblock.check(&geometry, configured)?;
    Ok(geometry)
}

/// The superblock that a move to the end was about to erase when it was cut off. Any other at a
/// former end may be worth more than the one at this end, and stays.
fn leftover<E>(
    superblock: &Superblock,
    geometry: &Geometry,
    known: &KnownSizes,
    mut read: impl FnMut(Sector) -> Result<Box<Page>, E>,
) -> Result<Option<Sector>, E> {
    let device = geometry.meta_device;
    // Without an agreed size nobody knows where data is.
    let first = superblock.la_size;
    // A move is announced.
    if first.0 == 0 || known.iter().next() != Some(device) {
        return Ok(None);
    }
    for was in known.iter().filter(|was| *was < device) {
        let Ok(sector) = superblock_sector(MetaKind::Internal, was, was) else { continue };
        if sector < first || touches(geometry, sector) {
            continue;
        }
        // Nobody has used the disk since.
        let is_same = |found: Superblock| {
            (found.device_uuid, found.uuids) == (superblock.device_uuid, superblock.uuids)
        };
        if Superblock::decode(read(sector)?.as_ref()).is_ok_and(is_same) {
            return Ok(Some(sector));
        }
    }
    Ok(None)
}

/// Whether a page lies in one of the areas of a layout.
fn touches(geometry: &Geometry, page: Sector) -> bool {
    let page = SectorRange { start: page.0, end: page.0 + SECTORS_PER_BLOCK };
    geometry.areas().iter().any(|area| area.overlaps(page))
}

/// Internal metadata on its way to the end of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relocation {
    superblock: Superblock,
    from: Geometry,
    to: Geometry,
}

/// One step of a move. Pages are named by their first sector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Copy a page.
    Copy {
        /// From here.
        from: Sector,
        /// To here.
        to: Sector,
    },
    /// Write zeroes over a page.
    Zero(Sector),
    /// Write a page.
    Write(Sector, Box<Page>),
    /// Wait until all before is durable.
    Flush,
}

impl Relocation {
    fn new(
        superblock: Superblock,
        from: Geometry,
        device: Sector,
        configured: Option<Sector>,
    ) -> Result<Self, FormatError> {
        let to = superblock.geometry(MetaKind::Internal, device, device)?;
        let mut moved = superblock;
        moved.set_geometry(&to);
        moved.check(&to, configured)?;
        let relocation = Self { superblock: moved, from, to };
        relocation.self_check();
        Ok(relocation)
    }

    /// The size of the device that the metadata was written for.
    #[must_use]
    pub fn old_size(&self) -> Sector {
        self.from.meta_device
    }

    /// The size of the device now.
    #[must_use]
    pub fn new_size(&self) -> Sector {
        self.to.meta_device
    }

    /// Whether a part of the old place is a part of the new one.
    #[must_use]
    pub fn overlaps(&self) -> bool {
        self.to.bitmap <= self.from.superblock
    }

    /// What has to be done, in this order.
    pub fn steps(&self) -> impl Iterator<Item = Step> {
        let write = |flags: MetaFlags| {
            let mut page = Page::zeroed();
            Superblock { flags, ..self.superblock }.encode(&mut page);
            [Step::Write(self.to.superblock, page), Step::Flush]
        };
        let flags = self.superblock.flags;
        let uncertain = flags.with(MetaFlags::FULL_SYNC, true).with(MetaFlags::AL_DISABLED, true);
        let first = self.overlaps().then(|| write(uncertain)).into_iter().flatten();
        let is_left = !touches(&self.to, self.from.superblock);
        let erase = is_left.then_some([Step::Zero(self.from.superblock), Step::Flush]);
        first
            .chain(self.copies())
            .chain([Step::Flush])
            .chain(write(flags))
            .chain(erase.into_iter().flatten())
    }

    /// Activity log and bitmap, from the last page to the first.
    fn copies(&self) -> impl Iterator<Item = Step> {
        let page = |area: Sector, page: u64| Sector(area.0 + page * SECTORS_PER_BLOCK);
        let (from, to) = (self.from, self.to);
        let log = (0..u64::from(to.al_blocks())).rev().map(move |block| Step::Copy {
            from: page(from.activity_log, block),
            to: page(to.activity_log, block),
        });
        let [old, new] = [from, to].map(|layout| layout.bitmap_sectors / SECTORS_PER_BLOCK);
        let added = (old..new).rev().map(move |number| Step::Zero(page(to.bitmap, number)));
        let bitmap = (0..old).rev().map(move |number| Step::Copy {
            from: page(from.bitmap, number),
            to: page(to.bitmap, number),
        });
        log.chain(added).chain(bitmap)
    }

    fn self_check(&self) {
        let (from, to) = (&self.from, &self.to);
        assert!(from.meta_device < to.meta_device, "metadata moves with a device that grows");
        assert!(from.al_blocks() == to.al_blocks(), "the log keeps its shape");
        // So that each page is read before it is overwritten, and no data is.
        assert!(from.superblock < to.superblock, "{self:?}");
        assert!(from.activity_log < to.activity_log && from.bitmap <= to.bitmap, "{self:?}");
        assert!(from.superblock.0 + SECTORS_PER_BLOCK <= to.superblock.0, "{self:?}");
    }
}

#[cfg(test)]
#[path = "relocate_tests.rs"]
mod tests;
