//! The sizes that a device with internal metadata has had, in a file that survives the engine and
//! the host: when the device has grown while no engine ran, the operator's tool finds the metadata
//! by them, and moves it before the next attach.
//!
//! Written at every attach, and before the core may move the metadata. Another reader sees the old
//! list or the new one, whole, also after a crash. A file system that does not answer, which may be
//! one on the node's own device, is waited for a few seconds only (FE-3).

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::thread::Builder;
use std::time::Duration;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use replication_core::meta::KnownSizes;
use replication_core::units::Sector;

use super::open::Opened;
use crate::worker::STACK_SIZE;

/// How long a file system may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// One at a time: what took too long may still be under way.
static TURN: Mutex<()> = Mutex::new(());

/// Remembers the size of a device that was opened, if its internal metadata is at its end. If not,
/// what is known already tells where it is.
///
/// # Errors
/// The file cannot be written, or not in time.
pub fn remember_seen(path: &Path, opened: &Opened, configured: Option<Sector>) -> Result<()> {
    let size = opened.info.data_sectors;
    let seen = opened.superblock.and_then(|found| KnownSizes::seen(&found, size, configured));
    let Some(known) = seen else { return Ok(()) };
    in_time(path, PATIENCE, move |path| {
        // What cannot be read is replaced.
        if load(path).is_ok_and(|found| found == known) { Ok(()) } else { save(path, &known) }
    })
}

/// Remembers that the device has this size now, to whose end metadata may move.
///
/// # Errors
/// The file cannot be read or written, or not in time.
pub fn remember_expected(path: &Path, size: Sector) -> Result<()> {
    in_time(path, PATIENCE, move |path| {
        let found = load(path)?;
        let mut known = found.clone();
        known.expect(size);
        if known == found { Ok(()) } else { save(path, &known) }
    })
}

/// Does this with the file. A thread of its own stays behind if it takes too long.
fn in_time(
    path: &Path,
    patience: Duration,
    work: impl FnOnce(&Path) -> Result<()> + Send + 'static,
) -> Result<()> {
    let (done, result) = sync_channel(1);
    let file: PathBuf = path.to_owned();
    let run = move || {
        let _turn = TURN.lock();
        // Nobody may listen any more.
        done.send(work(&file)).unwrap_or_default();
    };
    let builder = Builder::new().name("known sizes".to_owned()).stack_size(STACK_SIZE);
    builder.spawn(run).context("start a thread")?;
    result.recv_timeout(patience).with_context(|| {
        let name = path.display();
        format!("{name}: its file system does not answer; is it on a device of this node?")
    })?
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
        write!(file, "{known}")?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::open::open;
    use super::*;
    use replication_core::config::BackingConfig;
    use replication_core::meta::{Geometry, MetaKind, Page, Superblock};
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::os::unix::fs::FileExt;

    /// A disk of so many sectors, opened, with metadata that was written for another size.
    fn opened(dir: &tempfile::TempDir, sectors: u64, written_for: u64) -> Opened {
        let path = dir.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(sectors * 512).unwrap();
        let size = Sector(written_for);
        let geometry = Geometry::new(MetaKind::Internal, size, size, 0, 0).unwrap();
        let mut page = Page::zeroed();
        Superblock::fresh(&geometry).encode(&mut page);
        file.write_all_at(&page.0, geometry.superblock.byte()).unwrap();
        let disk = Some(path.to_str().unwrap().to_owned());
        open(&BackingConfig { disk, meta_disk: None }, MetaKind::Internal).unwrap()
    }

    #[test]
    fn sizes_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lib").join("r0-0.sizes");
        let text = || std::fs::read_to_string(&path).unwrap();
        remember_expected(&path, Sector(2048)).unwrap();
        remember_expected(&path, Sector(4096)).unwrap();
        assert_eq!(text(), "# sectors of the disk, newest size first\n4096\n2048\n");
        remember_seen(&path, &opened(&dir, 4096, 4096), None).unwrap();
        assert_eq!(text(), "# sectors of the disk, newest size first\n4096\n");
        std::fs::write(&path, "nonsense\n").unwrap();
        let error = remember_expected(&path, Sector(8192)).unwrap_err();
        assert!(format!("{error:#}").contains("line 1"), "{error:#}");
        remember_seen(&path, &opened(&dir, 8192, 8192), None).unwrap();
        assert_eq!(text(), "# sectors of the disk, newest size first\n8192\n");
    }

    /// Metadata that an attach will refuse, because the device has grown by too little for it to
    /// move, is found by the size that was known before, and by no other.
    #[test]
    fn a_size_that_metadata_was_not_written_for_is_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r0-0.sizes");
        std::fs::write(&path, "262144\n").unwrap();
        let grown = opened(&dir, 262_145, 262_144);
        assert!(grown.superblock.is_some(), "it is where one of the new size would be");
        remember_seen(&path, &grown, None).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "262144\n");
    }

    /// As with one on the device that waits for this.
    #[test]
    fn a_file_system_that_does_not_answer_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r0-0.sizes");
        let (kind, mode) = (FileType::Fifo, Mode::RUSR | Mode::WUSR);
        mknodat(CWD, &path, kind, mode, 0).unwrap();
        let read = |path: &Path| load(path).map(drop);
        let error = in_time(&path, Duration::from_millis(50), read).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error:#}");
        // Lets the thread go, which waits for somebody to write.
        drop(OpenOptions::new().write(true).open(&path).unwrap());
    }

    #[test]
    fn a_size_that_cannot_be_remembered_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let path = dir.path().join("file").join("r0-0.sizes");
        let error = remember_seen(&path, &opened(&dir, 2048, 2048), None).unwrap_err();
        assert!(format!("{error:#}").contains("r0-0.sizes"), "{error:#}");
    }
}
