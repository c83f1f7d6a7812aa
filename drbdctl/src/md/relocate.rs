//! Internal metadata of a device that has grown while no engine used it: found where it was, and
//! moved to the new end.
//!
//! Where to look and what to do is the core's ([`replication_core::meta::relocate`]); here are the
//! device, the file that remembers its sizes, and the words. Looking takes no lock, so it hinders
//! nobody; to write, the device is opened once more, for itself alone, and looked at again.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use replication_core::meta::relocate::{Nowhere, Place, Relocation, Step, look};
use replication_core::meta::{KnownSizes, MetaKind, Page};
use replication_core::units::Sector;

use super::device::{Access, Device};
use crate::conf::VolumeView;
use crate::engine::{poll_until, write_whole};
use crate::exit::{self, Failure};
use crate::settings::meta_kind;

/// How long a device that is in use is tried again: an engine that was killed has its disk until
/// the last operation in flight has ended.
const BUSY_LIMIT: Duration = Duration::from_secs(3);

/// One volume with internal metadata.
#[derive(Debug)]
pub struct Outgrown {
    /// The volume in messages, `RES/VOL`.
    object: String,
    disk: PathBuf,
    /// `disk { size }`, if set.
    size: Option<Sector>,
    /// The file with the sizes that the device has had.
    sizes: PathBuf,
}

impl Outgrown {
    /// `None` if the metadata of the volume does not move with the size of its disk.
    #[must_use]
    pub fn new(resource: &str, volume: &VolumeView, sizes: PathBuf) -> Option<Self> {
        if meta_kind(volume) != Some(MetaKind::Internal) {
            return None;
        }
        let disk = volume.disk.clone()?;
        let size = volume.options.size_sectors;
        let size = (size > 0).then_some(Sector(size));
        Some(Self { object: format!("{resource}/{}", volume.nr), disk, size, sizes })
    }

    /// Whether the metadata is at the end, and nowhere else.
    ///
    /// # Errors
    /// If there is none that could be used ([`exit::NO_METADATA`] if nothing tells where it is),
    /// or the device cannot be read.
    pub fn is_in_place(&self) -> Result<bool, Failure> {
        let device = Device::open(&self.disk, Access::Read);
        let device = device.map_err(|failure| self.named(&failure))?;
        match self.look(&device, &self.known()?)? {
            Place::AtEnd { leftover } => Ok(leftover.is_none()),
            Place::Behind(_) => Ok(false),
            Place::Nowhere(nowhere) => Err(self.nowhere(&nowhere)),
        }
    }

    /// Moves the metadata to the end. Returns what was done, a complete line.
    ///
    /// # Errors
    /// If it cannot be moved. Cut off, it can be done again.
    pub fn settle(&self, dry_run: bool) -> Result<Option<String>, Failure> {
        if dry_run {
            return Ok(Some(format!("{}: would move the internal metadata", self.object)));
        }
        let device = self.open()?;
        let known = self.known()?;
        match self.look(&device, &known)? {
            Place::AtEnd { leftover: None } => Ok(None),
            Place::AtEnd { leftover: Some(at) } => {
                [Step::Zero(at), Step::Flush]
                    .into_iter()
                    .try_for_each(|step| run(&device, step))?;
                Ok(Some(format!("{}: erased metadata that had been moved", self.object)))
            }
            Place::Behind(relocation) => self.relocate(&device, &relocation, known).map(Some),
            Place::Nowhere(nowhere) => Err(self.nowhere(&nowhere)),
        }
    }

    fn relocate(
        &self,
        device: &Device,
        relocation: &Relocation,
        mut known: KnownSizes,
    ) -> Result<String, Failure> {
        // Until the next attach, the metadata may be at either end.
        known.expect(relocation.new_size());
        write_whole(&self.sizes, &known.to_string(), 0o644)?;
        relocation.steps().try_for_each(|step| run(device, step))?;
        Ok(format!(
            "{}: {} has grown from {} to {} sectors: internal metadata moved to its end",
            self.object,
            self.disk.display(),
            relocation.old_size().0,
            relocation.new_size().0
        ))
    }

    fn look(&self, device: &Device, known: &KnownSizes) -> Result<Place, Failure> {
        look(device.size, self.size, known, |at| device.read_page(at))
    }

    /// Opens the device to write, for which nobody else may use it.
    fn open(&self) -> Result<Device, Failure> {
        let mut busy = None;
        let opened = poll_until(BUSY_LIMIT, || match Device::open(&self.disk, Access::Write) {
            Ok(device) => Ok(Some(device)),
            Err(failure) => {
                busy = Some(failure);
                Ok(None)
            }
        })?;
        let why = || busy.expect("every attempt that gave no device has failed");
        opened.ok_or_else(|| self.named(&why()))
    }

    fn named(&self, failure: &Failure) -> Failure {
        Failure::new(failure.exit, format!("{}: {failure}", self.object))
    }

    fn known(&self) -> Result<KnownSizes, Failure> {
        let act = || format!("{}: read {}", self.object, self.sizes.display());
        match std::fs::read_to_string(&self.sizes) {
            Ok(text) => KnownSizes::parse(&text).map_err(|error| {
                let text = format!(
                    "{}: {error}\n  what to do: remove it, if the disk has not grown",
                    act()
                );
                Failure::new(exit::SYSTEM, text)
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(KnownSizes::default()),
            Err(error) => Err(Failure::system(act(), &error)),
        }
    }

    fn nowhere(&self, nowhere: &Nowhere) -> Failure {
        let (object, disk) = (&self.object, self.disk.display());
        let (exit, advice) = match nowhere {
            Nowhere::NotFound => {
                let text = format!("{object}: No valid meta data found on {disk}: {nowhere}");
                return Failure::new(exit::NO_METADATA, text);
            }
            Nowhere::Shrunk { was, .. } => {
                (exit::FAILURE, format!("give the device its {} sectors back", was.0))
            }
            Nowhere::GrownTooLittle { needed, .. } => {
                (exit::FAILURE, format!("let the device grow to {} sectors", needed.0))
            }
            Nowhere::Unfit(_) => (exit::FAILURE, format!("drbdctl dump-md {object}")),
        };
        let text =
            format!("{object}: {disk}: {nowhere}; nothing was changed\n  what to do: {advice}");
        Failure::new(exit, text)
    }
}

/// Forgets the sizes that a disk has had, because the metadata that was seen by them is given up:
/// whatever is left at one of these places may not come to life.
///
/// # Errors
/// If they may come back.
pub fn forget(sizes: &Path) -> Result<(), Failure> {
    let dir = sizes.parent().expect("the path was joined to a directory");
    match std::fs::remove_file(sizes).and_then(|()| File::open(dir)?.sync_all()) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => {
            done.map_err(|error| Failure::system(format!("remove {}", sizes.display()), &error))
        }
    }
}

/// Carries out a step.
fn run(device: &Device, step: Step) -> Result<(), Failure> {
    match step {
        Step::Copy { from, to } => device.write_page(to, device.read_page(from)?.as_ref()),
        Step::Zero(at) => device.write_page(at, &Page::zeroed()),
        Step::Write(at, page) => device.write_page(at, &page),
        Step::Flush => device.flush(),
    }
}
