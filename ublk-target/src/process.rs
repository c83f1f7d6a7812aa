//! The process itself: made fit to serve a block device under memory pressure.
//!
//! Everything here is best effort: without the rights for it the engine runs, with a warning that
//! says what is missing.
//!
//! Invariants kept: FE-3 (the process does not wait on its own device: memory locked, reclaim told
//! so, no mounts shared with the host).

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::mman::{MlockAllFlags, mlockall};
use rustix::fs::FlockOperation;

use crate::patience::patiently;
use crate::worker::STACK_SIZE;

/// How often the ring thread is looked at. One that made no turn between two looks, twice in a row,
/// hangs: its longest wait is a fifth of that. Once is not enough, because a process that was
/// stopped and goes on may come to the look before the ring thread has had its turn.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);
/// Looks without a turn.
const SILENT_MAX: u32 = 2;

/// How long the lock of a resource is tried again: whoever wants to know whether an engine runs
/// holds it for a moment. Another engine holds it for good.
const LOCK_LIMIT: Duration = Duration::from_secs(1);

/// Locks memory, tells the kernel that this process serves I/O, and asks the OOM killer for
/// mercy. Call before payload memory is made and before threads are started.
///
/// `needed` are the paths that this process will use, for an engine that makes block devices:
/// `None` leaves the mounts as they are.
pub fn harden(needed: Option<&[PathBuf]>) {
    if let Err(errno) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        tracing::warn!(
            "memory is not locked: {errno}; raise RLIMIT_MEMLOCK (LimitMEMLOCK=infinity)"
        );
    }
    if let Err(errno) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::warn!("PR_SET_IO_FLUSHER: {errno}; CAP_SYS_RESOURCE is needed");
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!("oom_score_adj: {error}; CAP_SYS_RESOURCE is needed");
    }
    if let Some(needed) = needed
        && let Err(error) = leave_mounts(needed)
    {
        tracing::warn!(
            "own mount namespace: {error:#}; do not mount the device where this process sees it"
        );
    }
}

/// Leaves the host's mounts for a namespace of our own, and there lets go of every file system on a
/// block device that is not needed. One of them may lie on our own device, mounted while an earlier
/// engine ran: held here, the host could not unmount it, and at our end the kernel would write it
/// back through this very process.
fn leave_mounts(needed: &[PathBuf]) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("leave the host's")?;
    let none: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).context("make mounts private")?;
    let text = std::fs::read_to_string("/proc/self/mountinfo").context("list mounts")?;
    let is_block = |source: &Path| {
        std::fs::metadata(source).is_ok_and(|data| data.file_type().is_block_device())
    };
    for place in unneeded_mounts(&text, needed, is_block) {
        // One that went with the mount it was on is gone already.
        if let Err(errno) = umount2(&place, MntFlags::MNT_DETACH)
            && errno != nix::errno::Errno::EINVAL
            && errno != nix::errno::Errno::ENOENT
        {
            tracing::warn!("let go of {}: {errno}", place.display());
        }
    }
    Ok(())
}

/// The mount points of a `mountinfo` text that are on block devices and on the way to none of the
/// needed paths.
fn unneeded_mounts(
    text: &str,
    needed: &[PathBuf],
    is_block: impl Fn(&Path) -> bool,
) -> Vec<PathBuf> {
    let unneeded = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(2);
        let device = fields.next()?;
        let place = unescape(fields.nth(1)?);
        let mut fields = file_system.split(' ');
        let (kind, source) = (fields.next()?, unescape(fields.next()?));
        // File systems with device numbers of their own (btrfs) still name their source.
        // The layers of an overlay may lie on one.
        let on_device = !device.starts_with("0:") || kind == "overlay" || is_block(&source);
        let is_needed = needed.iter().any(|path| path.starts_with(&place));
        (on_device && !is_needed).then_some(place)
    };
    text.lines().filter_map(unneeded).collect()
}

/// A path of `mountinfo`, in which blanks and their like are written as octal numbers.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let number = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(number.unwrap_or(*first));
        rest = if number.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Keeps a second engine for the same resource away, as long as it lives.
#[derive(Debug)]
pub struct ResourceLock {
    file: File,
}

impl ResourceLock {
    /// Leaves it to the end of the process to give the lock back. Operations in flight keep the
    /// disks until then: with the lock alone, the next engine would find its disks in use.
    pub fn keep_until_exit(self) {
        std::mem::forget(self.file);
    }
}

/// Takes the lock of a resource and writes our process id into it.
///
/// # Errors
/// Another engine has it.
pub fn lock_resource(run_dir: &Path, name: &str) -> Result<ResourceLock> {
    std::fs::create_dir_all(run_dir).with_context(|| format!("create {}", run_dir.display()))?;
    let path = run_dir.join(format!("{name}.lock"));
    let shown = path.display();
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(&path).with_context(|| format!("open {shown}"))?;
    let lock = || rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
    let is_busy = |errno: &rustix::io::Errno| *errno == rustix::io::Errno::WOULDBLOCK;
    match patiently(Instant::now() + LOCK_LIMIT, lock, is_busy) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let pid = std::fs::read_to_string(&path).unwrap_or_default();
            bail!("resource {name} is served by another engine (pid {})", pid.trim());
        }
        Err(errno) => return Err(errno).with_context(|| format!("lock {shown}")),
    }
    file.set_len(0).with_context(|| format!("write {shown}"))?;
    writeln!(file, "{}", std::process::id()).with_context(|| format!("write {shown}"))?;
    Ok(ResourceLock { file })
}

/// Ends the process if the ring thread hangs: an engine that does nothing blocks I/O for ever,
/// one that died is replaced.
#[derive(Debug)]
pub struct Heartbeat {
    beats: Arc<AtomicU64>,
    /// The watching thread ends with it.
    _alive: SyncSender<()>,
}

impl Heartbeat {
    /// Longest time that may pass between two beats of a healthy ring thread.
    pub const INTERVAL: Duration = Duration::from_secs(6);

    /// Starts the thread that watches.
    ///
    /// # Errors
    /// There are no threads left.
    pub fn start() -> Result<Self> {
        let beats = Arc::new(AtomicU64::new(0));
        let (alive, gone) = sync_channel::<()>(0);
        let heartbeat = Self { beats: Arc::clone(&beats), _alive: alive };
        let watch = move || {
            let mut pulse = Pulse::default();
            while gone.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if pulse.is_dead(beats.load(Ordering::Relaxed)) {
                    let silence = LOOK_INTERVAL * SILENT_MAX;
                    tracing::error!("the ring thread made no turn for {silence:?}");
                    std::process::abort();
                }
            }
        };
        let builder = std::thread::Builder::new().name("heartbeat".to_owned());
        builder.stack_size(STACK_SIZE).spawn(watch).context("start the heartbeat thread")?;
        Ok(heartbeat)
    }

    /// The ring thread is alive.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the looks at the ring thread have shown.
#[derive(Debug, Default)]
struct Pulse {
    last: u64,
    silent: u32,
}

impl Pulse {
    /// Takes in a look; whether the ring thread hangs.
    fn is_dead(&mut self, beats: u64) -> bool {
        self.silent = if beats == self.last { self.silent + 1 } else { 0 };
        self.last = beats;
        self.silent >= SILENT_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_on_the_way_to_needed_paths_stay() {
        let text = "21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
                    22 21 0:5 / /dev rw - devtmpfs devtmpfs rw\n\
                    23 21 259:0 / /mnt/on\\040ours rw shared:9 - xfs /dev/ublkb0 rw\n\
                    24 21 0:44 / /mnt/btrfs rw - btrfs /dev/ublkb1 rw\n\
                    25 21 0:45 / /mnt/nfs rw - nfs server:/export rw\n\
                    26 21 8:2 / /srv rw - ext4 /dev/sda2 rw\n\
                    27 26 8:3 / /srv/images rw - ext4 /dev/sda3 rw\n\
                    28 21 8:4 / /srv2 rw - ext4 /dev/sda4 rw\n\
                    29 21 0:46 / /mnt/layers rw - overlay overlay rw,lowerdir=/mnt/on\n";
        let needed = [PathBuf::from("/srv/images/r0.img"), PathBuf::from("/run/drbd")];
        let found = unneeded_mounts(text, &needed, |source| source.starts_with("/dev"));
        let expected = ["/mnt/on ours", "/mnt/btrfs", "/srv2", "/mnt/layers"].map(PathBuf::from);
        assert_eq!(found, expected);
        assert!(unneeded_mounts("", &needed, |_| true).is_empty());
        assert!(unneeded_mounts("nonsense\n", &needed, |_| true).is_empty());
    }

    #[test]
    fn escapes_of_mount_points_are_undone() {
        assert_eq!(unescape(r"/a\040b\011c\134"), Path::new("/a b\tc\\"));
        assert_eq!(unescape(r"/a\9x\04"), Path::new(r"/a\9x\04"));
    }

    #[test]
    fn a_second_engine_for_a_resource_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock_resource(dir.path(), "r0").unwrap();
        let error = lock_resource(dir.path(), "r0").unwrap_err();
        let text = format!("resource r0 is served by another engine (pid {})", std::process::id());
        assert_eq!(error.to_string(), text);
        lock_resource(dir.path(), "r1").unwrap();
        drop(first);
        lock_resource(dir.path(), "r0").unwrap();
    }

    #[test]
    fn a_look_at_the_lock_does_not_keep_an_engine_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        let looked_at = File::create(dir.path().join("r0.lock")).unwrap();
        rustix::fs::flock(&looked_at, FlockOperation::LockShared).unwrap();
        let look = std::thread::spawn(move || {
            std::thread::park_timeout(Duration::from_millis(100));
            drop(looked_at);
        });
        lock_resource(dir.path(), "r0").unwrap();
        look.join().unwrap();
    }

    #[test]
    fn a_lock_that_is_kept_outlives_its_engine() {
        let dir = tempfile::tempdir().unwrap();
        lock_resource(dir.path(), "r0").unwrap().keep_until_exit();
        lock_resource(dir.path(), "r0").unwrap_err();
    }

    #[test]
    fn a_ring_thread_hangs_only_if_it_is_silent_twice() {
        let mut pulse = Pulse::default();
        let looks = [5, 5, 6, 6, 7, 7, 7].map(|beats| pulse.is_dead(beats));
        assert_eq!(looks, [false, false, false, false, false, false, true]);
    }
}
