//! The sizes that a device with internal metadata has had, in a file that survives the engine and
//! the host: when the device has grown while no engine ran, the operator's tool finds the metadata
//! by them, and moves it before the next attach.
//!
//! Written at every attach, and before the core may move the metadata. Another reader sees the old
//! list or the new one, whole, also after a crash.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result};
use replication_core::meta::KnownSizes;
use replication_core::units::Sector;

/// Remembers that metadata was seen at the end of a device of this size.
///
/// # Errors
/// The file cannot be written.
pub fn remember_seen(path: &Path, size: Sector) -> Result<()> {
    let known = KnownSizes::seen(size);
    // What cannot be read is replaced.
    if load(path).is_ok_and(|found| found == known) {
        return Ok(());
    }
    save(path, &known)
}

/// Remembers that the device has this size now, to whose end metadata may move.
///
/// # Errors
/// The file cannot be read or written.
pub fn remember_expected(path: &Path, size: Sector) -> Result<()> {
    let found = load(path)?;
    let mut known = found.clone();
    known.expect(size);
    if known == found { Ok(()) } else { save(path, &known) }
}

fn load(path: &Path) -> Result<KnownSizes> {
    let name = path.display();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(KnownSizes::default()),
        Err(error) => return Err(error).with_context(|| format!("read {name}")),
    };
    KnownSizes::parse(&text).with_context(|| format!("read {name}"))
}

fn save(path: &Path, known: &KnownSizes) -> Result<()> {
    let dir = path.parent().context("a file is in a directory")?;
    let new = path.with_extension(format!("sizes.{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&new)?;
        writeln!(file, "# sectors of the disk, newest size first")?;
        write!(file, "{known}")?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lib").join("r0-0.sizes");
        let text = || std::fs::read_to_string(&path).unwrap();
        remember_expected(&path, Sector(8)).unwrap();
        remember_expected(&path, Sector(16)).unwrap();
        assert_eq!(text(), "# sectors of the disk, newest size first\n16\n8\n");
        remember_seen(&path, Sector(16)).unwrap();
        assert_eq!(text(), "# sectors of the disk, newest size first\n16\n");
        std::fs::write(&path, "nonsense\n").unwrap();
        let error = remember_expected(&path, Sector(24)).unwrap_err();
        assert!(format!("{error:#}").contains("line 1"), "{error:#}");
        remember_seen(&path, Sector(24)).unwrap();
        assert_eq!(load(&path).unwrap(), KnownSizes::seen(Sector(24)));
    }

    #[test]
    fn a_size_that_cannot_be_remembered_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let path = dir.path().join("file").join("r0-0.sizes");
        let error = remember_seen(&path, Sector(8)).unwrap_err();
        assert!(format!("{error:#}").contains("r0-0.sizes"), "{error:#}");
    }
}
