//! A node as its operator sees it: commands, the state it reports, its process and its disk.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replication_core::control::{
    Command, Refusal, Reply, Status, decode_frame, encode_frame, frame_length,
};

/// Longest that an engine may take to answer: an engine that is busy with a peer answers all the
/// same.
const ANSWER: Duration = Duration::from_secs(10);

/// A node of the lab that `tests/native/lib.sh` makes.
#[derive(Debug)]
pub struct Node {
    /// Its host name.
    pub name: &'static str,
    run: PathBuf,
    image: PathBuf,
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Resident memory.
    pub kib: u64,
    /// Open descriptors.
    pub descriptors: usize,
}

impl Node {
    /// The node of this name; its engine need not run yet.
    ///
    /// # Errors
    /// There is no such node in the lab.
    pub fn of_lab(lab: &Path, name: &'static str) -> Result<Self> {
        let path = lab.join(format!("{name}.pid"));
        let text = std::fs::read_to_string(&path);
        let pid = text.with_context(|| format!("read {}", path.display()))?;
        let run = Path::new("/proc").join(pid.trim()).join("root/run/drbd");
        Ok(Self { name, run, image: lab.join(name).join("d0.img") })
    }

    /// The socket of the NBD server.
    #[must_use]
    pub fn server(&self) -> PathBuf {
        self.run.join("r0.nbd")
    }

    /// Gives the engine a command.
    ///
    /// # Errors
    /// No answer in time, or none at all.
    pub fn ask(&self, command: &Command) -> Result<Result<Reply, Refusal>> {
        let act = || format!("{}: ask the engine for {command:?}", self.name);
        let mut socket = UnixStream::connect(self.run.join("r0.sock")).with_context(act)?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.write_all(&encode_frame(command)?).with_context(act)?;
        let mut length = [0; 4];
        socket.read_exact(&mut length).with_context(act)?;
        let mut frame = vec![0; frame_length(length)?];
        socket.read_exact(&mut frame).with_context(act)?;
        Ok(decode_frame(&frame)?)
    }

    /// The state of everything.
    ///
    /// # Errors
    /// No answer in time.
    pub fn status(&self) -> Result<Status> {
        match self.ask(&Command::Status)? {
            Ok(Reply::Status(status)) => Ok(*status),
            other => bail!("{}: no status: {other:?}", self.name),
        }
    }

    /// Types `drbdctl ARGUMENTS` on this node.
    ///
    /// # Errors
    /// It failed.
    pub fn drbdctl(&self, arguments: &[&str]) -> Result<()> {
        let mut process = Process::new("drbdctl");
        process.args(arguments).env("NODE", self.name).stdin(Stdio::null());
        let output = process.output().context("run drbdctl")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{}# drbdctl {arguments:?}: {told}{said}", self.name);
        Ok(())
    }

    /// The process of the engine.
    ///
    /// # Errors
    /// There is none.
    pub fn pid(&self) -> Result<u32> {
        let text = std::fs::read_to_string(self.run.join("r0.lock"));
        let pid = text.context("read the lock")?.trim().parse().context("a process id")?;
        let exe = Path::new("/proc").join(format!("{pid}")).join("exe");
        ensure!(exe.exists(), "{}: the engine is gone (process {pid})", self.name);
        Ok(pid)
    }

    /// What the engine holds.
    ///
    /// # Errors
    /// There is no engine.
    pub fn footprint(&self) -> Result<Footprint> {
        let process = Path::new("/proc").join(self.pid()?.to_string());
        let status = std::fs::read_to_string(process.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|text| text.split_whitespace().next());
        let kib = number.context("no VmRSS")?.parse()?;
        let descriptors = std::fs::read_dir(process.join("fd"))?.count();
        Ok(Footprint { kib, descriptors })
    }

    /// Whether both disks are good and both nodes know it.
    ///
    /// # Errors
    /// No answer in time.
    pub fn is_in_sync(&self) -> Result<bool> {
        let status = self.status()?;
        let is_good = |word: &str| word == "UpToDate";
        Ok(status.connection == "Connected"
            && status.volumes.iter().all(|volume| {
                is_good(&volume.disk)
                    && is_good(&volume.peer_disk)
                    && volume.replication == "Established"
            }))
    }
}

/// Bytes that differ between the disks of two nodes, below `size`: how many, and the first.
///
/// # Errors
/// A disk cannot be read.
pub fn differences(nodes: &[Node; 2], size: u64) -> Result<(u64, Option<u64>)> {
    const AT_ONCE: u64 = 1 << 20;
    let open = |node: &Node| File::open(&node.image).context("open a backing file");
    let files = [open(&nodes[0])?, open(&nodes[1])?];
    let (mut count, mut first) = (0, None);
    let mut at = 0;
    while at < size {
        let length = usize::try_from(AT_ONCE.min(size - at))?;
        let (mut one, mut two) = (vec![0; length], vec![0; length]);
        files[0].read_exact_at(&mut one, at)?;
        files[1].read_exact_at(&mut two, at)?;
        if one != two {
            for (place, _) in (at..).zip(one.iter().zip(&two)).filter(|(_, (a, b))| a != b) {
                first = first.or(Some(place));
                count += 1;
            }
        }
        at += AT_ONCE;
    }
    Ok((count, first))
}

/// Looks again and again, until it is so or the time is over.
///
/// # Errors
/// It did not become so in time, or looking failed.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut is_so: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let begun = Instant::now();
    while !is_so()? {
        ensure!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(50));
    }
    Ok(())
}
