//! Names of block devices: `/dev/drbdMINOR` and `/dev/drbd/by-res/RES/VOL`.
//!
//! Links that point to something else than a ublk device, and what is no link at all (the in-kernel
//! driver's device nodes), are left alone.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::ublk::DeviceId;

/// The links of one volume.
#[derive(Clone, Debug)]
pub(super) struct Links {
    dev: PathBuf,
    by_minor: PathBuf,
    by_resource: PathBuf,
}

impl Links {
    pub(super) fn new(dev: &Path, resource: &str, volume: u16, minor: u32) -> Self {
        let by_resource = dev.join("drbd/by-res").join(resource).join(volume.to_string());
        let by_minor = dev.join(format!("drbd{minor}"));
        Self { dev: dev.to_owned(), by_minor, by_resource }
    }

    /// The ublk device that the links point to. One of them may not be ours, so either will do.
    pub(super) fn target(&self) -> Option<DeviceId> {
        let target = |link| fs::read_link(link).ok().and_then(|target| device_of(&target));
        target(&self.by_minor).or_else(|| target(&self.by_resource))
    }

    /// Lets the links point to a device. A link that cannot be made does not keep the other one
    /// away: by either of them the next engine finds the device.
    pub(super) fn set(&self, id: DeviceId) -> Result<()> {
        let by_resource = set_link(&self.by_resource, id);
        set_link(&self.by_minor, id).and(by_resource)
    }

    /// Removes the links of other volumes that point to a device which was just made for this one.
    /// They are left from an earlier device of that number, and their engine would take this one
    /// for its own.
    pub(super) fn disown(&self, id: DeviceId) {
        let by_minor = entries(&self.dev);
        let by_resource = entries(&self.dev.join("drbd/by-res")).flat_map(|dir| entries(&dir));
        for link in by_minor.chain(by_resource) {
            if link != self.by_minor && link != self.by_resource && points_to(&link, id) {
                remove(&link);
            }
        }
    }

    /// Removes the links, if they point to this device.
    pub(super) fn remove(&self, id: DeviceId) {
        for link in [&self.by_minor, &self.by_resource] {
            if points_to(link, id) {
                remove(link);
            }
        }
        // The directory of the resource goes with its last volume.
        if let Some(dir) = self.by_resource.parent() {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// What lies in a directory; nothing if there is none.
fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn points_to(link: &Path, id: DeviceId) -> bool {
    fs::read_link(link).is_ok_and(|target| device_of(&target) == Some(id))
}

fn remove(link: &Path) {
    if let Err(error) = fs::remove_file(link) {
        tracing::warn!("remove {}: {error}", link.display());
    }
}

fn set_link(link: &Path, id: DeviceId) -> Result<()> {
    let shown = link.display();
    if let Some(dir) = link.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    match fs::read_link(link) {
        Ok(target) if device_of(&target).is_some() => {
            fs::remove_file(link).with_context(|| format!("replace {shown}"))?;
        }
        Ok(target) => bail!("{shown} points to {}: left alone", target.display()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(_) => bail!("{shown} exists and is no link (the in-kernel drbd?): left alone"),
    }
    symlink(id.block_path(), link).with_context(|| format!("make link {shown}"))
}

fn device_of(target: &Path) -> Option<DeviceId> {
    let number = target.to_str()?.strip_prefix("/dev/ublkb")?;
    number.parse().ok().map(DeviceId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_come_move_and_go() {
        let dev = tempfile::tempdir().unwrap();
        let links = Links::new(dev.path(), "r0", 3, 7);
        assert_eq!(links.target(), None);
        links.set(DeviceId(7)).unwrap();
        assert_eq!(links.target(), Some(DeviceId(7)));
        let by_resource = dev.path().join("drbd/by-res/r0/3");
        assert_eq!(fs::read_link(&by_resource).unwrap(), Path::new("/dev/ublkb7"));
        links.set(DeviceId(9)).unwrap();
        links.remove(DeviceId(7));
        assert_eq!(links.target(), Some(DeviceId(9)));
        links.remove(DeviceId(9));
        assert_eq!(links.target(), None);
        assert!(!by_resource.parent().unwrap().exists());
    }

    #[test]
    fn old_links_of_others_to_a_new_device_go() {
        let dev = tempfile::tempdir().unwrap();
        let (old, new) = (Links::new(dev.path(), "r0", 0, 0), Links::new(dev.path(), "r1", 0, 1));
        old.set(DeviceId(7)).unwrap();
        new.set(DeviceId(7)).unwrap();
        new.disown(DeviceId(8));
        assert_eq!(old.target(), Some(DeviceId(7)));
        new.disown(DeviceId(7));
        assert_eq!((old.target(), new.target()), (None, Some(DeviceId(7))));
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let dev = tempfile::tempdir().unwrap();
        let links = Links::new(dev.path(), "r0", 0, 0);
        fs::write(dev.path().join("drbd0"), "").unwrap();
        assert!(links.set(DeviceId(0)).is_err());
        fs::remove_file(dev.path().join("drbd0")).unwrap();
        symlink("/dev/sda", dev.path().join("drbd0")).unwrap();
        assert!(links.set(DeviceId(0)).is_err());
        // The other link is there all the same, so that the device is found again.
        assert_eq!(links.target(), Some(DeviceId(0)));
        links.remove(DeviceId(0));
        assert_eq!(links.target(), None);
        fs::read_link(dev.path().join("drbd0")).unwrap();
    }
}
