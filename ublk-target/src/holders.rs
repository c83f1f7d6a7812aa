//! Who uses a device or a file: for the texts of refusals, and to know whether a device is open.
//!
//! The kernel tells nobody when a ublk device is opened, so this looks where traces are: open
//! descriptors of all processes, mounts of all mount namespaces, swap, and block devices stacked on
//! top. It reads `/proc` and `/sys` and may take a while; never call it on the ring thread.
//!
//! A file system can be in use without such a trace: a mount leaves the tables before what is dirty
//! is written, and after `umount -l` long before. Whoever is about to take a device away asks for
//! the kernel's own claim as well ([`Users::certainly_of_volume`]).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, StatxFlags};

/// A client of the NBD server that uses a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The server's number for it.
    pub client: u64,
    /// Index of the volume.
    pub volume: usize,
    /// In words.
    pub who: String,
}

/// How a block device is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Nobody was found.
    Unused,
    /// A process has it open.
    Open,
    /// Somebody has it for himself, as a mounted file system has.
    Claimed,
}

/// What the frontends know about use of the volumes; shared with the control threads.
#[derive(Debug, Default)]
pub struct Users {
    clients: Mutex<Vec<User>>,
    devices: Mutex<Vec<(usize, PathBuf)>>,
}

impl Users {
    /// A client has begun to use a volume.
    pub fn add(&self, user: User) {
        self.clients.lock().push(user);
    }

    /// A client is gone.
    pub fn remove(&self, client: u64) {
        self.clients.lock().retain(|user| user.client != client);
    }

    /// A volume has a block device, or has none any more.
    pub fn set_device(&self, volume: usize, path: Option<PathBuf>) {
        let mut devices = self.devices.lock();
        devices.retain(|(other, _)| *other != volume);
        devices.extend(path.map(|path| (volume, path)));
    }

    /// Who uses a volume, in words; `None`: nobody was found. Leaves the device alone: fit for
    /// looking at it often.
    #[must_use]
    pub fn of_volume(&self, volume: usize) -> Option<String> {
        let clients = self.clients.lock();
        if let Some(user) = clients.iter().find(|user| user.volume == volume) {
            return Some(format!("used by NBD {}", user.who));
        }
        drop(clients);
        self.device_of(volume).and_then(|path| of_block_path(&path))
    }

    /// Who uses a volume, or what the kernel says when nobody is found: it lets one at a time claim
    /// a device for itself, and a file system does so until its last write. Claims the device for
    /// a moment, in which somebody else's mount would fail.
    #[must_use]
    pub fn certainly_of_volume(&self, volume: usize) -> Option<String> {
        let claimed = || self.device_of(volume).filter(|path| is_claimed(path));
        self.of_volume(volume).or_else(|| {
            claimed().map(|_| "claimed in the kernel, as by a file system that ends".to_owned())
        })
    }

    /// Who uses any of `volumes` volumes, for certain.
    #[must_use]
    pub fn certainly_of_any(&self, volumes: usize) -> Option<String> {
        (0..volumes).find_map(|volume| self.certainly_of_volume(volume))
    }

    /// The block device of a volume, if it has one.
    pub(crate) fn device_of(&self, volume: usize) -> Option<PathBuf> {
        let devices = self.devices.lock();
        devices.iter().find(|(other, _)| *other == volume).map(|(_, path)| path.clone())
    }
}

/// Who uses a block device, in words.
#[must_use]
pub fn of_block_path(path: &Path) -> Option<String> {
    let device = fs::metadata(path).ok().filter(|data| data.file_type().is_block_device())?;
    let number = device.rdev();
    let name = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    mounted_on(&name)
        .map(|place| format!("mounted on {place}"))
        .or_else(|| stacked_on(&name).map(|above| format!("claimed by {above}")))
        .or_else(|| is_swap(path).then(|| "used as swap".to_owned()))
        .or_else(|| opened_by(|link| is_device(link, number)).map(|who| format!("open by {who}")))
}

/// How a block device is used. Claims it for a moment.
#[must_use]
pub fn usage_of_block_path(path: &Path) -> Usage {
    if is_claimed(path) {
        Usage::Claimed
    } else if of_block_path(path).is_some() {
        Usage::Open
    } else {
        Usage::Unused
    }
}

/// Whether the kernel refuses the device to anybody who wants it for himself.
fn is_claimed(path: &Path) -> bool {
    let flags = libc::O_EXCL | libc::O_CLOEXEC;
    let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(path);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// Which other process has a file open.
#[must_use]
pub fn of_path(path: &Path) -> Option<String> {
    let path = fs::canonicalize(path).ok()?;
    opened_by(|link| fs::read_link(link).is_ok_and(|target| target == path))
}

/// The loop device that is backed by a file.
#[must_use]
pub fn loop_device_of(path: &Path) -> Option<String> {
    let path = fs::canonicalize(path).ok()?;
    let devices = fs::read_dir("/sys/block").ok()?;
    devices.flatten().find_map(|device| {
        let name = device.file_name().into_string().ok()?;
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
        (Path::new(backing.trim_end()) == path).then_some(name)
    })
}

/// `pid 123 (name)`.
#[must_use]
pub fn process_name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
    let name = name.as_deref().map_or("?", str::trim_end);
    format!("pid {pid} ({})", name.escape_default())
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The first mount point of a device in any mount namespace.
fn mounted_on(name: &str) -> Option<String> {
    let mut seen = BTreeSet::new();
    for pid in pids() {
        let Ok(namespace) = fs::read_link(format!("/proc/{pid}/ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/mountinfo")) else { continue };
        if let Some(place) = mount_point(&text, name) {
            return Some(place.to_owned());
        }
    }
    None
}

/// The mount point of device `name` (major:minor) in a `mountinfo` text.
fn mount_point<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        (fields.next()? == name).then_some(())?;
        fields.nth(1)
    })
}

/// The block device that was stacked on this one.
fn stacked_on(name: &str) -> Option<String> {
    let holders = fs::read_dir(format!("/sys/dev/block/{name}/holders")).ok()?;
    holders.flatten().find_map(|entry| entry.file_name().into_string().ok())
}

fn is_swap(path: &Path) -> bool {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    swaps.lines().any(|line| line.split_whitespace().next().is_some_and(|p| Path::new(p) == path))
}

/// Whether a descriptor (a link of `/proc`) is open on the device, by whatever name.
fn is_device(link: &Path, number: u64) -> bool {
    // A link of `/proc` leads to what is open without a lookup, and file systems that would ask a
    // server are told not to: so this does not hang.
    let (flags, wanted) = (AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
    rustix::fs::statx(rustix::fs::CWD, link, flags, wanted).is_ok_and(|data| {
        FileType::from_raw_mode(u32::from(data.stx_mode)) == FileType::BlockDevice
            && rustix::fs::makedev(data.stx_rdev_major, data.stx_rdev_minor) == number
    })
}

/// The first other process with a descriptor for which `matches` holds.
fn opened_by(matches: impl Fn(&Path) -> bool) -> Option<String> {
    let own = std::process::id();
    pids().filter(|pid| *pid != own).find_map(|pid| {
        let mut links = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        links.any(|link| matches(&link.path())).then(|| process_name(pid))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_device_number() {
        let text = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                    30 22 259:3 / /srv/data rw - xfs /dev/ublkb0 rw\n";
        assert_eq!(mount_point(text, "259:3"), Some("/srv/data"));
        assert_eq!(mount_point(text, "259:4"), None);
        assert_eq!(mount_point("", "8:1"), None);
    }

    #[test]
    fn another_process_with_the_file_open_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(of_path(file.path()), None);
        let held = fs::File::open(file.path()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").stdin(held).spawn().unwrap();
        let holder = of_path(file.path());
        child.kill().unwrap();
        child.wait().unwrap();
        let holder = holder.unwrap();
        assert!(holder.starts_with(&format!("pid {} (", child.id())), "{holder}");
    }

    #[test]
    fn a_device_that_is_open_by_another_name_is_found() {
        // Needs the right to make device nodes, as an engine has; no such device exists.
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("node");
        let (kind, mode) = (FileType::BlockDevice, rustix::fs::Mode::RUSR);
        let number = rustix::fs::makedev(4000, 77);
        rustix::fs::mknodat(rustix::fs::CWD, &node, kind, mode, number).unwrap();
        assert_eq!(of_block_path(&node), None);
        let path = rustix::fs::OFlags::PATH;
        let held = rustix::fs::open(&node, path, rustix::fs::Mode::empty()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").stdin(held).spawn().unwrap();
        let holder = of_block_path(&node);
        child.kill().unwrap();
        child.wait().unwrap();
        let holder = holder.unwrap();
        assert!(holder.starts_with(&format!("open by pid {} (", child.id())), "{holder}");
    }

    #[test]
    fn users_of_a_volume_are_named() {
        let users = Users::default();
        users.add(User { client: 3, volume: 1, who: "client at 127.0.0.1:9".to_owned() });
        assert_eq!(users.certainly_of_volume(0), None);
        let text = "used by NBD client at 127.0.0.1:9";
        assert_eq!(users.certainly_of_any(2).as_deref(), Some(text));
        users.remove(3);
        assert_eq!(users.certainly_of_any(2), None);
    }
}
