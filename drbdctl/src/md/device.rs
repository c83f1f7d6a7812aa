//! Devices and files that carry data or metadata, opened for the metadata tools.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use replication_core::meta::Page;
use replication_core::meta::page::PAGE_SIZE;
use replication_core::units::{SECTOR_SIZE, Sector};
use rustix::fs::FlockOperation;

use crate::exit::{self, Failure};

/// What a device is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Looking only; others may use it meanwhile.
    Read,
    /// Writing; refused while the system or an engine uses it.
    Write,
    /// Writing one part of metadata that several volumes share; refused while the system uses it,
    /// or somebody who does not share it.
    WriteShared,
}

/// An open device or file.
#[derive(Debug)]
pub struct Device {
    file: File,
    /// Its path.
    pub path: PathBuf,
    /// Its size.
    pub size: Sector,
}

impl Device {
    /// Opens a block device or a plain file.
    ///
    /// # Errors
    /// If it cannot be opened, is in use and to be written, or is neither.
    pub fn open(path: &Path, access: Access) -> Result<Self, Failure> {
        let fail = |error: &io::Error| {
            let busy = error.raw_os_error() == Some(nix::libc::EBUSY);
            let hint = if busy { " (mounted, part of another device, or an engine's)" } else { "" };
            Failure::new(exit::SYSTEM, format!("open {}: {error}{hint}", path.display()))
        };
        let kind = std::fs::metadata(path).map_err(|error| fail(&error))?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            let text = format!("'{}' is not a block device!", path.display());
            return Err(Failure::new(exit::SYSTEM, text));
        }
        let mut options = OpenOptions::new();
        options.read(true);
        if access != Access::Read {
            options.write(true);
            if kind.is_block_device() {
                // The system then refuses what is mounted or claimed.
                options.custom_flags(nix::libc::O_EXCL);
            }
        }
        let mut file = options.open(path).map_err(|error| fail(&error))?;
        lock(&file, access).map_err(|error| fail(&error))?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(|error| fail(&error))?;
        Ok(Self { file, path: path.to_path_buf(), size: Sector(bytes / SECTOR_SIZE) })
    }

    /// Reads into `bytes` from a byte offset; what lies behind the end reads as zero.
    ///
    /// # Errors
    /// If the device cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        bytes.fill(0);
        let mut done = 0;
        while done < bytes.len() {
            let at = offset.saturating_add(done.try_into().map_err(|error| {
                Failure::system(format!("read {}", self.path.display()), &error)
            })?);
            match self.file.read_at(&mut bytes[done..], at) {
                Ok(0) => return Ok(()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let act = format!("read {} at byte {at}", self.path.display());
                    return Err(Failure::system(act, &error));
                }
            }
        }
        Ok(())
    }

    /// Reads a page.
    ///
    /// # Errors
    /// If the device cannot be read, or ends before.
    pub fn read_page(&self, at: Sector) -> Result<Box<Page>, Failure> {
        let mut page = Page::zeroed();
        let act = || format!("read {} at sector {}", self.path.display(), at.0);
        let read = self.file.read_exact_at(&mut page.0, at.byte());
        read.map_err(|error| Failure::system(act(), &error))?;
        Ok(page)
    }

    /// Writes a page.
    ///
    /// # Errors
    /// If the device cannot be written.
    pub fn write_page(&self, at: Sector, page: &Page) -> Result<(), Failure> {
        let act = || format!("write {} at sector {}", self.path.display(), at.0);
        let written = self.file.write_all_at(&page.0, at.byte());
        written.map_err(|error| Failure::system(act(), &error))
    }

    /// Fills a range of whole pages with zeroes.
    ///
    /// # Errors
    /// If the device cannot be written.
    pub fn zero(&self, from: Sector, sectors: u64) -> Result<(), Failure> {
        const PAGES_AT_ONCE: usize = 256;
        let zeroes = vec![0_u8; PAGES_AT_ONCE * PAGE_SIZE];
        let act = || format!("write {} from sector {}", self.path.display(), from.0);
        let mut left = sectors * SECTOR_SIZE;
        let mut at = from.byte();
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(zeroes.len());
            let written = self.file.write_all_at(&zeroes[..count], at);
            written.map_err(|error| Failure::system(act(), &error))?;
            let count = u64::try_from(count).map_err(|error| Failure::system(act(), &error))?;
            left -= count;
            at += count;
        }
        Ok(())
    }

    /// Waits until everything written is durable.
    ///
    /// # Errors
    /// If it is not.
    pub fn flush(&self) -> Result<(), Failure> {
        let flushed = self.file.sync_data();
        flushed.map_err(|error| Failure::system(format!("flush {}", self.path.display()), &error))
    }
}

/// Takes the lock by which engines keep others away from what they use; it goes with the file. A
/// plain file has no other guard.
fn lock(file: &File, access: Access) -> io::Result<()> {
    let operation = match access {
        Access::Read => return Ok(()),
        Access::Write => FlockOperation::NonBlockingLockExclusive,
        Access::WriteShared => FlockOperation::NonBlockingLockShared,
    };
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(rustix::io::Errno::BUSY.into()),
        Err(errno) => Err(errno.into()),
    }
}
