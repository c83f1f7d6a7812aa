//! Opening a backing device or file: claim it, look at it, refuse what is in use.
//!
//! Runs on a helper thread, because opening may block for as long as a device likes.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use replication_core::config::BackingConfig;
use replication_core::event::DiskInfo;
use replication_core::meta::layout::superblock_sector;
use replication_core::meta::{MetaFlags, MetaKind, Page, Superblock};
use replication_core::units::{SECTOR_SIZE, Sector};
use rustix::fs::{FallocateFlags, FlockOperation};

use crate::holders;
use crate::patience::patiently;

/// How long a device that is in use is tried again. An engine that was killed has its disk until
/// the last operation in flight has ended, while its lock is free already; given up at once, the
/// engine that follows would come up without a disk.
const BUSY_LIMIT: Duration = Duration::from_secs(3);

/// A backing device that is open and claimed.
#[derive(Debug)]
pub struct Opened {
    /// The data device.
    pub data: OwnedFd,
    /// The metadata device, if it is another one.
    pub meta: Option<OwnedFd>,
    /// What was found.
    pub info: DiskInfo,
    /// Discards go to the device as such if it cannot punch holes.
    pub is_block_device: bool,
    /// What is where the superblock has to be. Whether it fits is found and reported by the core.
    pub superblock: Option<Superblock>,
}

impl Opened {
    /// According to its metadata, this node was Primary when its last engine ended.
    #[must_use]
    pub fn was_primary(&self) -> bool {
        self.superblock.is_some_and(|found| found.flags.contains(MetaFlags::PRIMARY_IND))
    }
}

/// Whether others may use a metadata device at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    /// It is ours alone.
    Exclusive,
    /// It holds the metadata of several volumes, told apart by an index.
    Indexed,
}

/// Opens the devices of a volume. May take some seconds if one is in use.
///
/// # Errors
/// There is no such device, it is in use, or it cannot be read.
pub fn open(backing: &BackingConfig, kind: MetaKind) -> Result<Opened> {
    open_within(backing, kind, BUSY_LIMIT)
}

fn open_within(backing: &BackingConfig, kind: MetaKind, patience: Duration) -> Result<Opened> {
    let until = Instant::now() + patience;
    let sharing = match kind {
        MetaKind::Indexed(_) => Sharing::Indexed,
        MetaKind::Internal | MetaKind::Flexible => Sharing::Exclusive,
    };
    let path = backing.disk.as_deref().context("this node has no disk for the volume")?;
    let data = Device::open(Path::new(path), Sharing::Exclusive, until)?;
    let meta = match backing.meta_disk.as_deref() {
        Some(meta) if !is_same(path, meta)? => Some(Device::open(Path::new(meta), sharing, until)?),
        Some(_) | None => None,
    };
    let info = DiskInfo {
        data_sectors: data.sectors,
        meta_sectors: meta.as_ref().map_or(data.sectors, |meta| meta.sectors),
        meta_on_data_device: meta.is_none(),
        logical_block_size: data.logical_block_size,
        physical_block_size: data.physical_block_size,
        discard: data.discard,
    };
    let is_block_device = data.is_block_device;
    let meta_file = meta.as_ref().map_or(&data.file, |meta| &meta.file);
    let superblock = superblock(kind, &info, meta_file);
    let meta = meta.map(|meta| OwnedFd::from(meta.file));
    Ok(Opened { data: data.file.into(), meta, info, is_block_device, superblock })
}

/// The superblock. What is wrong with one is found and reported by the core, which reads it again.
fn superblock(kind: MetaKind, info: &DiskInfo, file: &File) -> Option<Superblock> {
    let sector = superblock_sector(kind, info.data_sectors, info.meta_sectors).ok()?;
    let mut page = Page::zeroed();
    file.read_exact_at(&mut page.0, sector.byte()).ok()?;
    Superblock::decode(&page).ok()
}

/// Looks again at the sizes of open devices; everything else is as in `info`.
///
/// # Errors
/// A size cannot be found out.
pub fn probe(info: DiskInfo, data: &OwnedFd, meta: &OwnedFd) -> Result<DiskInfo> {
    let size = |fd: &OwnedFd| rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0));
    let data_sectors = Sector(size(data).context("size of the data device")? / SECTOR_SIZE);
    let meta_sectors = Sector(size(meta).context("size of the metadata device")? / SECTOR_SIZE);
    Ok(DiskInfo { data_sectors, meta_sectors, ..info })
}

fn is_same(one: &str, other: &str) -> Result<bool> {
    let stat = |path: &str| std::fs::metadata(path).with_context(|| format!("look at {path}"));
    let (one, other) = (stat(one)?, stat(other)?);
    let block = one.file_type().is_block_device() && other.file_type().is_block_device();
    let same_inode = one.dev() == other.dev() && one.ino() == other.ino();
    Ok(same_inode || (block && one.rdev() == other.rdev()))
}

struct Device {
    file: File,
    sectors: Sector,
    logical_block_size: u32,
    physical_block_size: u32,
    discard: bool,
    is_block_device: bool,
}

impl Device {
    fn open(path: &Path, sharing: Sharing, until: Instant) -> Result<Self> {
        let name = path.display();
        let kind = std::fs::metadata(path).with_context(|| format!("open {name}"))?.file_type();
        let is_block_device = kind.is_block_device();
        ensure!(
            is_block_device || kind.is_file(),
            "open {name}: neither a block device nor a regular file"
        );
        if kind.is_file()
            && let Some(device) = holders::loop_device_of(path)
        {
            bail!("open {name}: in use by loop device {device}");
        }
        let exclusive = is_block_device && sharing == Sharing::Exclusive;
        let mut file = open_file(path, exclusive, until)?;
        lock(path, &file, sharing, until)?;
        let bytes = file.seek(SeekFrom::End(0)).with_context(|| format!("size of {name}"))?;
        let (logical_block_size, physical_block_size) = if is_block_device {
            block_sizes(&file).with_context(|| format!("block sizes of {name}"))?
        } else {
            let size = probe_block_size(&file, bytes).with_context(|| format!("read {name}"))?;
            (size, size.max(4096))
        };
        let discard = if is_block_device {
            block_device_discards(&file).with_context(|| format!("queue limits of {name}"))?
        } else {
            file_discards(path, &file, bytes)
        };
        let sectors = Sector(bytes / SECTOR_SIZE);
        let device = Self {
            file,
            sectors,
            logical_block_size,
            physical_block_size,
            discard,
            is_block_device,
        };
        Ok(device)
    }
}

fn open_file(path: &Path, exclusive: bool, until: Instant) -> Result<File> {
    let name = path.display();
    let claim = if exclusive { libc::O_EXCL } else { 0 };
    let open = |direct: i32| {
        let flags = libc::O_CLOEXEC | claim | direct;
        let try_once = || OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let is_busy = |error: &std::io::Error| error.raw_os_error() == Some(libc::EBUSY);
        patiently(until, try_once, is_busy)
    };
    match open(libc::O_DIRECT) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            tracing::warn!(
                "{name}: its file system has no direct I/O; writes go through the page cache"
            );
            open(0).with_context(|| format!("open {name}"))
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let holder = holders::of_block_path(path);
            let holder = holder.unwrap_or_else(|| "mounted or claimed".to_owned());
            Err(anyhow!("open {name}: device is in use ({holder}); is it the right one?"))
        }
        Err(error) => Err(error).with_context(|| format!("open {name}")),
    }
}

fn lock(path: &Path, file: &File, sharing: Sharing, until: Instant) -> Result<()> {
    let operation = match sharing {
        Sharing::Exclusive => FlockOperation::NonBlockingLockExclusive,
        Sharing::Indexed => FlockOperation::NonBlockingLockShared,
    };
    let name = path.display();
    let is_busy = |errno: &rustix::io::Errno| *errno == rustix::io::Errno::WOULDBLOCK;
    match patiently(until, || rustix::fs::flock(file, operation), is_busy) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let holder = holders::of_path(path);
            let holder = holder.unwrap_or_else(|| "another process".to_owned());
            Err(anyhow!("open {name}: in use by {holder}"))
        }
        Err(errno) => Err(errno).with_context(|| format!("lock {name}")),
    }
}

fn block_sizes(file: &File) -> rustix::io::Result<(u32, u32)> {
    Ok((rustix::fs::ioctl_blksszget(file)?, rustix::fs::ioctl_blkpbszget(file)?))
}

/// The smallest read that a file takes, which depends on the device below its file system.
fn probe_block_size(file: &File, bytes: u64) -> std::io::Result<u32> {
    if bytes < SECTOR_SIZE {
        return Ok(512);
    }
    let mut page = Page::zeroed();
    match file.read_at(&mut page.0[..512], 0) {
        Ok(_) => Ok(512),
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(4096),
        Err(error) => Err(error),
    }
}

/// Whether the device has discards, from sysfs; a partition has the limits of its disk.
fn block_device_discards(file: &File) -> Result<bool> {
    let rdev = file.metadata()?.rdev();
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    for queue in ["queue", "../queue"] {
        let path = device.join(queue).join("discard_max_bytes");
        match std::fs::read_to_string(&path) {
            Ok(text) => return Ok(text.trim() != "0"),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        }
    }
    Ok(false)
}

/// Whether the file system can punch holes, tried behind the end of the file.
fn file_discards(path: &Path, file: &File, bytes: u64) -> bool {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, bytes, 4096) {
        Ok(()) => true,
        Err(rustix::io::Errno::OPNOTSUPP) => false,
        Err(errno) => {
            // Files can be without discards for many reasons; none of them forbids reads and
            // writes, which fail for themselves if they cannot be.
            tracing::warn!("{}: no discards: punch a hole: {errno}", path.display());
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_core::meta::Geometry;

    fn backing(disk: &Path, meta: Option<&Path>) -> BackingConfig {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        BackingConfig { disk: Some(text(disk)), meta_disk: meta.map(text) }
    }

    fn file(dir: &tempfile::TempDir, name: &str, bytes: u64) -> PathBuf {
        let path = dir.path().join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    #[test]
    fn a_file_is_opened_and_measured() {
        let dir = tempfile::tempdir().unwrap();
        let data = file(&dir, "data", 1 << 20);
        let meta = file(&dir, "meta", 65536 + 100);
        let opened = open(&backing(&data, Some(&meta)), MetaKind::Flexible).unwrap();
        assert_eq!(opened.info.data_sectors, Sector(2048));
        assert_eq!(opened.info.meta_sectors, Sector(128));
        assert!(!opened.info.meta_on_data_device && opened.meta.is_some());
        assert!(!opened.is_block_device);
    }

    #[test]
    fn the_superblock_tells_who_was_primary() {
        let dir = tempfile::tempdir().unwrap();
        let data = file(&dir, "data", 1 << 20);
        let was_primary = || open(&backing(&data, None), MetaKind::Internal).unwrap().was_primary();
        assert!(!was_primary(), "there is no superblock");
        let sectors = Sector(2048);
        let geometry = Geometry::new(MetaKind::Internal, sectors, sectors, 0, 0).unwrap();
        let mut superblock = Superblock::fresh(&geometry);
        let mut page = Page::zeroed();
        for is_primary in [false, true] {
            superblock.flags = superblock.flags.with(MetaFlags::PRIMARY_IND, is_primary);
            superblock.encode(&mut page);
            let writer = OpenOptions::new().write(true).open(&data).unwrap();
            writer.write_all_at(&page.0, geometry.superblock.byte()).unwrap();
            assert_eq!(was_primary(), is_primary);
        }
    }

    #[test]
    fn a_grown_file_is_seen_by_a_new_look() {
        let dir = tempfile::tempdir().unwrap();
        let data = file(&dir, "data", 1 << 20);
        let opened = open(&backing(&data, None), MetaKind::Internal).unwrap();
        OpenOptions::new().write(true).open(&data).unwrap().set_len(2 << 20).unwrap();
        let found = probe(opened.info, &opened.data, &opened.data).unwrap();
        assert_eq!((found.data_sectors, found.meta_sectors), (Sector(4096), Sector(4096)));
        assert_eq!(found.logical_block_size, opened.info.logical_block_size);
    }

    #[test]
    fn the_same_file_for_data_and_metadata_is_internal() {
        let dir = tempfile::tempdir().unwrap();
        let data = file(&dir, "data", 1 << 20);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&data, &link).unwrap();
        let opened = open(&backing(&data, Some(&link)), MetaKind::Internal).unwrap();
        assert!(opened.info.meta_on_data_device && opened.meta.is_none());
        assert_eq!(opened.info.meta_sectors, opened.info.data_sectors);
    }

    #[test]
    fn a_file_in_use_is_refused_until_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let data = file(&dir, "data", 1 << 20);
        let first = open(&backing(&data, None), MetaKind::Internal).unwrap();
        let open_at_once =
            || open_within(&backing(&data, None), MetaKind::Internal, Duration::ZERO);
        let refused = open_at_once().unwrap_err();
        assert!(format!("{refused:#}").contains("in use by"), "{refused:#}");
        drop(first);
        open_at_once().unwrap();
    }

    #[test]
    fn a_file_that_takes_no_holes_is_used_without_discards() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let fd = memfd_create("sealed", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let file = File::from(fd);
        file.set_len(1 << 20).unwrap();
        assert!(file_discards(Path::new("memory"), &file, 1 << 20));
        let seal = nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_WRITE);
        nix::fcntl::fcntl(&file, seal).unwrap();
        assert!(!file_discards(Path::new("memory"), &file, 1 << 20));
    }

    #[test]
    fn an_indexed_metadata_file_is_shared() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (file(&dir, "one", 4096), file(&dir, "two", 4096));
        let meta = file(&dir, "meta", 1 << 20);
        let first = open(&backing(&one, Some(&meta)), MetaKind::Indexed(0)).unwrap();
        let second = open(&backing(&two, Some(&meta)), MetaKind::Indexed(0)).unwrap();
        assert_eq!(first.info.meta_sectors, second.info.meta_sectors);
        open_within(&backing(&meta, None), MetaKind::Internal, Duration::ZERO).unwrap_err();
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error = open(&backing(&missing, None), MetaKind::Internal).unwrap_err();
        assert!(format!("{error:#}").contains("missing"), "{error:#}");
        let error = open(&backing(dir.path(), None), MetaKind::Internal).unwrap_err();
        assert!(format!("{error:#}").contains("neither a block device"), "{error:#}");
        let nothing = BackingConfig { disk: None, meta_disk: None };
        open(&nothing, MetaKind::Internal).unwrap_err();
    }
}
