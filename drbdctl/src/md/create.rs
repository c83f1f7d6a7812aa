//! Creating, reading and erasing metadata of one volume.
//!
//! Creation asks three questions before it writes a byte: is there metadata already, is there
//! something else, and would that something still fit? The first two can be answered by
//! `--force`. The third cannot: a file system that reaches into the metadata would be destroyed
//! bit by bit while it is used (exit code 40, as the stock tool does).
//!
//! The bytes written are those of the stock tool; the order is ours: the old superblock goes
//! first and the new one comes last, each behind a flush, so a crash in between leaves no
//! metadata rather than a mixture (MD-2).

use std::fmt::Write as _;

use replication_core::meta::dump::{self, gi_line};
use replication_core::meta::layout::{bitmap_bytes_on_disk, superblock_sector};
use replication_core::meta::{
    FormatError, Geometry, Magic, MetaFlags, MetaKind, Page, Superblock, al_journal,
};
use replication_core::units::{SECTOR_SIZE, Sector, SectorRange};

use super::device::{Access, Device};
use super::signature::{self, Found};
use crate::conf::VolumeView;
use crate::exit::{self, Failure};
use crate::settings::{meta_kind, meta_path};

/// Bytes that internal metadata of v07 took at the end of a device.
const V07_BYTES: u64 = 128 << 20;
/// Where the mark of v07 is in its block.
const V07_MAGIC_AT: u64 = 28;

/// The devices of one volume.
#[derive(Debug)]
pub struct Target {
    /// The volume in messages, `RES/VOL`.
    object: String,
    kind: MetaKind,
    data: Device,
    /// Another device that carries the metadata.
    meta: Option<Device>,
    /// `disk { size }`, if set.
    size: Option<Sector>,
}

/// What is to be created, after all questions are answered.
#[derive(Debug)]
pub struct Plan {
    geometry: Geometry,
    /// What the operator should know, complete lines.
    pub notes: Vec<String>,
}

impl Target {
    /// Opens the devices of a volume.
    ///
    /// # Errors
    /// If it has no disk on this node, or a device cannot be opened.
    pub fn open(resource: &str, volume: &VolumeView, access: Access) -> Result<Self, Failure> {
        let object = format!("{resource}/{}", volume.nr);
        let (Some(disk), Some(kind)) = (&volume.disk, meta_kind(volume)) else {
            let text = format!("{object}: no disk is configured on this node");
            return Err(Failure::new(exit::FAILURE, text));
        };
        let named = |failure: Failure| Failure::new(failure.exit, format!("{object}: {failure}"));
        let size = volume.options.size_sectors;
        let size = (size > 0).then_some(Sector(size));
        // With metadata elsewhere, only the size of the data device is looked at.
        let data_access = if kind == MetaKind::Internal { access } else { Access::Read };
        let data = Device::open(disk, data_access).map_err(named)?;
        let meta_access = match (access, kind) {
            (Access::Write, MetaKind::Indexed(_)) => Access::WriteShared,
            (access, MetaKind::Internal | MetaKind::Flexible | MetaKind::Indexed(_)) => access,
        };
        let meta = meta_path(volume).map(|path| Device::open(path, meta_access).map_err(named));
        Ok(Self { meta: meta.transpose()?, object, kind, data, size })
    }

    /// The device that carries the metadata.
    fn carrier(&self) -> &Device {
        self.meta.as_ref().unwrap_or(&self.data)
    }

    fn bad(&self, error: &FormatError) -> Failure {
        let text = format!("{}: {}: {error}", self.object, self.carrier().path.display());
        Failure::new(exit::FAILURE, text)
    }

    fn superblock_sector(&self) -> Result<Sector, Failure> {
        let sector = superblock_sector(self.kind, self.data.size, self.carrier().size);
        sector.map_err(|error| self.bad(&error))
    }

    /// Decides whether metadata may be created, and where.
    ///
    /// # Errors
    /// If it does not fit, or would destroy something and `force` does not allow that.
    pub fn plan(&self, force: bool) -> Result<Plan, Failure> {
        let geometry = Geometry::new(self.kind, self.data.size, self.carrier().size, 0, 0)
            .map_err(|error| self.bad(&error))?;
        let fresh = Superblock::fresh(&geometry);
        fresh.check(&geometry, self.size).map_err(|error| self.bad(&error))?;
        let mut plan = Plan { geometry, notes: Vec::new() };
        if let Err(small) = geometry.check_kernel_minimum() {
            plan.notes.push(format!("{}: note: {small}", self.object));
        }
        let usable = geometry.capacity.byte();
        let data = signature::probe(&self.data)?;
        if let Some(found) = &data {
            self.check_room(found, usable)?;
        }
        if let Some(format) = self.old_metadata()? {
            let what = format!("DRBD metadata of {format}");
            self.confirm(&what, exit::USAGE, force, &mut plan)?;
        }
        match (&self.meta, data) {
            // The file system stays whole, if the guess about its size is right.
            (None, Some(found)) => {
                let what = format!("a {found} that ends before byte {usable}");
                let what = if found.size.is_some() { what } else { format!("a {found}") };
                let exit = if found.size.is_some() { exit::USAGE } else { exit::WOULD_DESTROY };
                self.confirm(&what, exit, force, &mut plan)?;
            }
            (Some(meta), _) => {
                if let Some(found) = signature::probe(meta)? {
                    let what = format!("a {found}");
                    self.confirm(&what, exit::WOULD_DESTROY, force, &mut plan)?;
                }
            }
            (None, None) => {}
        }
        Ok(plan)
    }

    /// Refuses to cut off the end of something that says how large it is.
    fn check_room(&self, found: &Found, usable: u64) -> Result<(), Failure> {
        let Some(needed) = found.size.filter(|size| *size > usable) else {
            return Ok(());
        };
        let kib = |bytes: u64| bytes.div_ceil(1024);
        let mut text = format!(
            "{}: {} carries a {found} of {} KiB, but {} KiB would be left for it.\n\
             Its end would be cut off and its data lost. Operation refused.\n  what to do: ",
            self.object,
            self.data.path.display(),
            kib(needed),
            usable / 1024,
        );
        let advice = match self.kind {
            MetaKind::Internal => format!(
                "shrink it to {} KiB, or grow the device by {} KiB, or put the metadata on a \
                 device of their own (meta-disk), or erase it (wipefs)",
                usable / 1024,
                kib(needed - usable)
            ),
            MetaKind::Flexible | MetaKind::Indexed(_) => {
                format!("use a metadata device that can describe {} KiB of data", kib(needed))
            }
        };
        text.push_str(&advice);
        Err(Failure::new(exit::WOULD_DESTROY, text))
    }

    /// Goes on with a note if the operator insists, else refuses.
    fn confirm(&self, what: &str, exit: u8, force: bool, plan: &mut Plan) -> Result<(), Failure> {
        let place = self.carrier().path.display();
        if force {
            plan.notes.push(format!("{}: {place} carries {what}; going on (--force)", self.object));
            return Ok(());
        }
        let text = format!(
            "{}: {place} carries {what}.\nOperation cancelled.\n  \
             what to do: if this is the right device, repeat with --force",
            self.object
        );
        Err(Failure::new(exit, text))
    }

    /// The format of metadata that is there already.
    fn old_metadata(&self) -> Result<Option<&'static str>, Failure> {
        let page = self.carrier().read_page(self.superblock_sector()?)?;
        let magic_at = |at: u64| -> Result<Magic, Failure> {
            let mut bytes = [0; 4];
            self.carrier().read_at(at, &mut bytes)?;
            Ok(Magic::from_raw(u32::from_be_bytes(bytes)))
        };
        let here = match Superblock::decode(&page) {
            Ok(_) => return Ok(Some("format v08")),
            Err(FormatError::ForeignMagic { found }) => found,
            Err(_) => return Ok(Some("format v08, damaged")),
        };
        let bytes = self.carrier().size.byte();
        let v07_at = match self.kind {
            MetaKind::Internal => (bytes & !4095).checked_sub(V07_BYTES),
            MetaKind::Flexible | MetaKind::Indexed(_) => Some(self.superblock_sector()?.byte()),
        };
        if let Some(at) = v07_at
            && magic_at(at + V07_MAGIC_AT)? == Magic::V07
        {
            return Ok(Some("format v07"));
        }
        Ok(match here {
            Magic::V09 => Some("format v09"),
            Magic::V07 => Some("format v07"),
            Magic::V08Clean | Magic::V08Unclean => Some("format v08"),
            Magic::Unknown(_) => None,
        })
    }

    /// Writes new metadata. `say` gets each line of progress.
    ///
    /// # Errors
    /// If the device cannot be written; there is then no metadata on it.
    pub fn create(
        &self,
        plan: &Plan,
        mut say: impl FnMut(&str) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let carrier = self.carrier();
        for step in creation(&plan.geometry) {
            match step {
                Step::Say(line) => say(&line)?,
                Step::Write(sector, page) => carrier.write_page(sector, &page)?,
                Step::Zero(area) => carrier.zero(Sector(area.start), area.sectors())?,
                Step::Flush => carrier.flush()?,
            }
        }
        Ok(())
    }

    /// The superblock and the layout of the metadata that is there.
    ///
    /// # Errors
    /// If there is none, or it does not fit the devices.
    pub fn read(&self) -> Result<(Superblock, Geometry), Failure> {
        let page = self.carrier().read_page(self.superblock_sector()?)?;
        let superblock = match Superblock::decode(&page) {
            Ok(superblock) => superblock,
            Err(FormatError::ForeignMagic { .. }) => return Err(self.none()),
            Err(error) => return Err(self.bad(&error)),
        };
        let geometry = superblock.geometry(self.kind, self.data.size, self.carrier().size);
        let geometry = geometry.map_err(|error| self.bad(&error))?;
        superblock.check(&geometry, self.size).map_err(|error| self.bad(&error))?;
        Ok((superblock, geometry))
    }

    fn none(&self) -> Failure {
        let place = self.carrier().path.display();
        let text = format!("{}: No valid meta data found on {place}", self.object);
        Failure::new(exit::NO_METADATA, text)
    }

    /// Erases the mark of the metadata. Returns whether there was one.
    ///
    /// # Errors
    /// If there is one and `force` was not given, or the device cannot be written.
    pub fn wipe(&self, force: bool) -> Result<bool, Failure> {
        let Some(format) = self.old_metadata()? else {
            return Ok(false);
        };
        if format == "format v07" {
            let text = format!("{}: cannot wipe metadata of {format}", self.object);
            return Err(Failure::new(exit::FAILURE, text));
        }
        if !force {
            let place = self.carrier().path.display();
            let text = format!(
                "{}: {place} carries metadata of {format}.\nOperation cancelled.\n  \
                 what to do: to erase it and all knowledge about the peer, repeat with --force",
                self.object
            );
            return Err(Failure::usage(text));
        }
        self.carrier().write_page(self.superblock_sector()?, &Page::zeroed())?;
        self.carrier().flush()?;
        Ok(true)
    }

    /// The text form, behind a header line for each of `header`.
    ///
    /// # Errors
    /// If there is no metadata, it needs its activity log applied and `force` was not given, or
    /// the device cannot be read.
    pub fn dump(&self, header: &[String], force: bool) -> Result<String, Failure> {
        let (superblock, geometry) = self.read()?;
        let mut text = String::new();
        for line in header {
            text.push_str(line.as_str());
            text.push('\n');
        }
        if !superblock.is_clean() {
            if !force {
                let text = format!(
                    "{}: the metadata is unclean: its bitmap lacks what the activity log covers\n  \
                     what to do: drbdctl up and down again, or --force to see it as it is",
                    self.object
                );
                return Err(Failure::new(exit::SYSTEM, text));
            }
            // No comment: a tool that reads dumps must stop here.
            text.push_str("unclean-do-not-restore;\n\n");
        }
        let read = |number, page: &mut Page| match geometry.bitmap_page_sector(number) {
            Some(sector) => {
                *page = *self.carrier().read_page(sector).map_err(DumpFault::Device)?;
                Ok(())
            }
            None => Err(DumpFault::Format),
        };
        match dump::dump(&superblock, &geometry, &mut text, read) {
            Ok(()) => Ok(text),
            Err(DumpFault::Device(failure)) => Err(failure),
            Err(DumpFault::Format) => {
                let text = format!("{}: the bitmap is shorter than the data", self.object);
                Err(Failure::new(exit::FAILURE, text))
            }
        }
    }
}

/// One step of a creation, on the device that carries the metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Tell the operator.
    Say(String),
    /// Write a page.
    Write(Sector, Box<Page>),
    /// Write zeroes.
    Zero(SectorRange),
    /// Wait until all before is durable.
    Flush,
}

/// What is to be done, in this order, to create metadata of this layout.
#[must_use]
pub fn creation(geometry: &Geometry) -> Vec<Step> {
    // What a larger data device would need later is written when it grows.
    let sectors = match geometry.kind {
        MetaKind::Internal => geometry.bitmap_sectors,
        MetaKind::Flexible | MetaKind::Indexed(_) => {
            let needed = bitmap_bytes_on_disk(geometry.capacity).div_ceil(4096) * 8;
            needed.min(geometry.bitmap_sectors)
        }
    };
    let start = geometry.bitmap.0;
    let kib = sectors * SECTOR_SIZE / 1024;
    let mut steps = vec![
        Step::Write(geometry.superblock, Page::zeroed()),
        Step::Flush,
        Step::Say(format!("initializing bitmap ({kib} KB) to all zero")),
        Step::Zero(SectorRange { start, end: start + sectors }),
        Step::Say(String::from("initializing activity log")),
    ];
    let mut page = Page::zeroed();
    al_journal::encode_initialised(&mut page);
    let blocks = 0..geometry.al_blocks();
    steps.extend(blocks.map(|block| Step::Write(geometry.al_block_sector(block), page.clone())));
    steps.extend([Step::Flush, Step::Say(String::from("Writing meta data..."))]);
    let mut page = Page::zeroed();
    Superblock::fresh(geometry).encode(&mut page);
    steps.extend([Step::Write(geometry.superblock, page), Step::Flush]);
    steps.push(Step::Say(String::from("New drbd meta data block successfully created.")));
    steps
}

/// Why a dump stopped.
enum DumpFault {
    Device(Failure),
    /// The text could not be formed.
    Format,
}

impl From<std::fmt::Error> for DumpFault {
    fn from(_: std::fmt::Error) -> Self {
        Self::Format
    }
}

/// The disk state that the flags stand for while the disk is not in use.
#[must_use]
pub fn disk_state(superblock: &Superblock) -> &'static str {
    let has = |flag| superblock.flags.contains(flag);
    match (has(MetaFlags::CONSISTENT), has(MetaFlags::WAS_UP_TO_DATE)) {
        (false, _) => "Inconsistent",
        (true, false) => "Outdated",
        (true, true) if has(MetaFlags::PEER_OUT_DATED) => "UpToDate",
        (true, true) => "Consistent",
    }
}

/// The identifiers, one line for each field.
#[must_use]
pub fn explained(superblock: &Superblock) -> String {
    let mut out = format!("{}\n", gi_line(superblock));
    let uuids = &superblock.uuids;
    let numbers = [
        ("current data generation", uuids.current),
        ("generation the bitmap counts from", uuids.bitmap),
        ("younger history", uuids.history[0]),
        ("older history", uuids.history[1]),
    ];
    let flags = [
        ("data are consistent", MetaFlags::CONSISTENT),
        ("data were up to date", MetaFlags::WAS_UP_TO_DATE),
        ("node was Primary", MetaFlags::PRIMARY_IND),
        ("node was connected", MetaFlags::CONNECTED_IND),
        ("everything has to be synced", MetaFlags::FULL_SYNC),
        ("peer's disk was outdated or inconsistent", MetaFlags::PEER_OUT_DATED),
        ("node crashed as Primary and has not seen its peer since", MetaFlags::CRASHED_PRIMARY),
    ];
    for (name, number) in numbers {
        writeln!(out, "  {number:016X}  {name}").expect("a string takes it");
    }
    for (name, flag) in flags {
        let bit = u8::from(superblock.flags.contains(flag));
        writeln!(out, "  {bit:<16}  {name}").expect("a string takes it");
    }
    out
}
