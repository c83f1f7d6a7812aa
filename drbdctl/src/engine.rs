//! Engine processes: how one is started, found and ended.
//!
//! An engine holds the lock of its resource from its first moment to its last, so the lock says
//! whether one lives; the system takes it away even from an engine that was killed. The socket
//! says whether it listens. Nothing here trusts a process id alone: a process is only killed if
//! it is seen to have the locked file open.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use replication_core::config::{EngineConfig, Frontend};

use crate::client::{Client, Contact, contact};
use crate::context::Paths;
use crate::exit::{self, Failure};

/// Name of the engine program.
const PROGRAM: &str = "ublk-target";
/// Time from the start of an engine to the first connection to its socket. It locks its memory
/// before it listens, which takes a while on a slow machine.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Time from the answer to `down` to the end of the process.
const END_LIMIT: Duration = Duration::from_secs(30);
/// Time that a killed process has to disappear.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of the log's end that are shown when an engine ends too early.
const TAIL_BYTES: u64 = 4096;
/// Lines of the log's end that are shown.
const TAIL_LINES: usize = 10;

/// Lets time pass between two looks at something that gives no notice of its changes: another
/// program's socket, lock or state. The only place of the tool where time passes.
pub fn pause(time: Duration) {
    std::thread::park_timeout(time);
}

/// Looks again and again until `look` finds something or the time is over.
///
/// # Errors
/// Those of `look`.
pub fn poll_until<T>(
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>, Failure>,
) -> Result<Option<T>, Failure> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        pause(Duration::from_millis(20));
    }
}

/// The program of the engine: as told by `DRBD_ENGINE`, else beside this program, else found by
/// the search path.
#[must_use]
pub fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("DRBD_ENGINE").filter(|named| !named.is_empty()) {
        return PathBuf::from(named);
    }
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|own| own.parent().map(|dir| dir.join(PROGRAM)));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| PathBuf::from(PROGRAM))
}

/// The command line of the engine.
#[must_use]
pub fn command_line(paths: &Paths) -> Vec<OsString> {
    vec![program().into(), "run".into(), "--config".into(), paths.json.clone().into()]
}

/// Has the engine program check a configuration that was written.
///
/// # Errors
/// If it cannot be run, or finds something wrong; what it said is in the text.
pub fn check(resource: &str, paths: &Paths) -> Result<(), Failure> {
    run_verb("check", resource, paths)
}

/// Has the engine program do something with the configuration that ends by itself.
fn run_verb(verb: &str, resource: &str, paths: &Paths) -> Result<(), Failure> {
    let program = program();
    let fail = |error: &dyn std::fmt::Display| {
        Failure::system(format!("{resource}: run {} {verb}", program.display()), error)
    };
    let mut command = Command::new(&program);
    let command = command.args([verb, "--config"]).arg(&paths.json).stdin(Stdio::null());
    let output = command.output().map_err(|error| fail(&error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    Err(fail(&format!("{}: {}", output.status, said.trim())))
}

/// The configuration as the engine reads it.
///
/// # Errors
/// If it cannot be written as JSON.
pub fn to_json(config: &EngineConfig) -> Result<String, Failure> {
    let act = || format!("{}: write the configuration as JSON", config.resource.name);
    serde_json::to_string_pretty(config).map_err(|error| Failure::system(act(), &error))
}

/// Writes the engine's configuration.
///
/// # Errors
/// If the directory or the file cannot be written.
pub fn write_config(paths: &Paths, config: &EngineConfig) -> Result<(), Failure> {
    write_whole(&paths.json, &to_json(config)?, 0o600)
}

/// Writes a file, and its directory if there is none: another reader sees the old file or the new
/// one, whole, also after a crash.
///
/// # Errors
/// If the directory or the file cannot be written.
pub fn write_whole(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let dir = path.parent().expect("the path was joined to a directory");
    let mut new = path.to_owned().into_os_string();
    new.push(format!(".{}", std::process::id()));
    let new = PathBuf::from(new);
    let write = || {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(mode).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|error| Failure::system(format!("write {}", path.display()), &error))
}

/// The configuration that was last written; none if there is no such file or it is another
/// version's.
#[must_use]
pub fn read_config(paths: &Paths) -> Option<EngineConfig> {
    let text = std::fs::read(&paths.json).ok()?;
    serde_json::from_slice(&text).ok()
}

/// A lock that some engine may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Nobody has it.
    Free,
    /// An engine lives. Its process id, if it is known for sure.
    Held(Option<i32>),
}

/// Who holds the lock of a resource.
///
/// # Errors
/// If the lock file is there and cannot be examined.
pub fn lock_state(paths: &Paths) -> Result<Lock, Failure> {
    let shown = paths.lock.display();
    let file = match File::open(&paths.lock) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Lock::Free),
        Err(error) => return Err(Failure::system(format!("open {shown}"), &error)),
    };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_free_again_when_dropped) => Ok(Lock::Free),
        Err((file, Errno::EWOULDBLOCK)) => Ok(Lock::Held(holder(file, &paths.lock))),
        Err((_, errno)) => Err(Failure::system(format!("examine the lock {shown}"), &errno)),
    }
}

/// The engine of a resource by a look at what its lock file says, without touching the lock: an
/// engine that is starting at this moment would find it taken. For messages and for what is checked
/// again; an engine that has not written its process id yet is not seen.
#[must_use]
pub fn seen(paths: &Paths) -> Option<i32> {
    holder(File::open(&paths.lock).ok()?, &paths.lock)
}

/// The process named by the lock file, if it has the very file open.
fn holder(mut file: File, path: &Path) -> Option<i32> {
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    let pid: i32 = text.trim().parse().ok().filter(|pid| *pid > 1)?;
    let locked = std::fs::metadata(path).ok()?;
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut open = open.filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok());
    open.any(|file| (file.dev(), file.ino()) == (locked.dev(), locked.ino())).then_some(pid)
}

/// How an engine that lives lets itself not be talked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mute {
    /// It has no socket.
    Deaf,
    /// It did not answer within this time.
    Silent(Duration),
}

/// What is told of an engine that lives and cannot be talked to.
#[must_use]
pub fn mute(resource: &str, pid: Option<i32>, how: Mute) -> Failure {
    let who = pid.map_or_else(|| "an engine".to_owned(), |pid| format!("engine process {pid}"));
    let how = match how {
        Mute::Deaf => "does not listen: it starts, ends, or hangs".to_owned(),
        Mute::Silent(limit) => format!("does not answer: nothing came in {} s", limit.as_secs()),
    };
    let state = pid.and_then(process_state);
    let shown = state.as_ref().map_or_else(String::new, |state| format!("; its state is {state}"));
    let is_stopped = state.is_some_and(|state| state.starts_with(['T', 't']));
    let first = match pid {
        Some(pid) if is_stopped => format!("let it go on (kill -CONT {pid})"),
        Some(_) | None => "try again".to_owned(),
    };
    let text = format!(
        "{resource}: {who} lives but {how}{shown}\n  \
         what to do: {first}, or end it: drbdctl down --force {resource}"
    );
    Failure::new(exit::SYSTEM, text)
}

/// The state of a process in the words of the kernel, as in `T (stopped)`.
fn process_state(pid: i32) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let state = status.lines().find_map(|line| line.strip_prefix("State:"))?;
    Some(state.trim().to_owned())
}

/// An engine that was started by this program.
#[derive(Debug)]
pub struct Started {
    child: Child,
    /// Length of the log before the start.
    log_start: u64,
}

impl Started {
    /// Whether it has not ended yet.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn is_running(&mut self, resource: &str) -> Result<bool, Failure> {
        let ended = self.child.try_wait();
        let ended = ended
            .map_err(|error| Failure::system(format!("{resource}: watch the engine"), &error))?;
        Ok(ended.is_none())
    }

    /// Any process in the place of an engine.
    #[cfg(test)]
    pub(crate) fn for_test(child: Child) -> Self {
        Self { child, log_start: 0 }
    }
}

/// Starts an engine that outlives this program: in a session of its own, with its output in the
/// log.
///
/// # Errors
/// If it cannot be started.
pub fn start(resource: &str, paths: &Paths) -> Result<Started, Failure> {
    let fail = |act: &str, error: &dyn std::fmt::Display| {
        Failure::system(format!("{resource}: {act}"), error)
    };
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&paths.log);
    let log =
        log.map_err(|error| fail(&format!("open the log {}", paths.log.display()), &error))?;
    let log_start = log.metadata().map_err(|error| fail("examine the log", &error))?.len();
    let output = log.try_clone().map_err(|error| fail("use the log", &error))?;
    let own = std::env::current_exe().map_err(|error| fail("find this program", &error))?;
    let child = Command::new(own)
        .args(["sh-detached", "--"])
        .args(command_line(paths))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(log)
        .spawn()
        .map_err(|error| fail("start the engine", &error))?;
    Ok(Started { child, log_start })
}

/// Becomes the leader of a new session, then the program: the second half of [`start`], which
/// runs in the new process. Of what whoever called this tool has open, nothing is kept: for as
/// long as the engine lives, a pipe would not end and a file system could not be unmounted.
/// Returns only if that fails.
#[must_use]
pub fn become_engine(command: &[OsString]) -> Failure {
    use std::os::unix::process::CommandExt;
    let Some((program, arguments)) = command.split_first() else {
        return Failure::usage("sh-detached needs a program");
    };
    if let Err(errno) = nix::unistd::setsid() {
        return Failure::system("start a session", &errno);
    }
    if let Err(error) = close_inherited() {
        return Failure::system("close what was inherited", &error);
    }
    let error = Command::new(program).args(arguments).exec();
    Failure::system(format!("run {}", program.display()), &error)
}

/// Closes every descriptor but the three that [`start`] has set. None is handed over on purpose:
/// the service manager is reached by the name of its socket.
fn close_inherited() -> std::io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        open.extend(entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        match nix::unistd::close(fd) {
            // The list itself was open and is not any more.
            Ok(()) | Err(Errno::EBADF) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Waits until the engine listens, and connects.
///
/// # Errors
/// If it ends, or does not listen in time; what it said is in the text.
pub fn wait_for_engine(
    resource: &str,
    paths: &Paths,
    started: &mut Started,
) -> Result<Client, Failure> {
    let found = poll_until(START_LIMIT, || {
        // A socket that is left over answers too early: ask whether the engine lives first.
        if let Some(status) = started
            .child
            .try_wait()
            .map_err(|error| Failure::system(format!("{resource}: watch the engine"), &error))?
        {
            let said = log_tail(paths, started.log_start);
            return Err(Failure::new(
                exit::SYSTEM,
                format!("{resource}: the engine ended at once ({status}){said}"),
            ));
        }
        Ok(match contact(resource, paths)? {
            Contact::Absent | Contact::Stale => None,
            Contact::Engine(client) => Some(client),
        })
    })?;
    found.ok_or_else(|| {
        let seconds = START_LIMIT.as_secs();
        let said = log_tail(paths, started.log_start);
        Failure::new(
            exit::SYSTEM,
            format!("{resource}: the engine does not listen after {seconds} s{said}"),
        )
    })
}

/// Ends an engine that was just started, and waits for it.
pub fn discard(mut started: Started) {
    // Fails if it has ended by itself, which is as good.
    let _ = started.child.kill();
    // Fails if somebody else has collected it, which is as good.
    let _ = started.child.wait();
}

/// The last lines that were added to the log, for an error message.
fn log_tail(paths: &Paths, from: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&paths.log)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = match read() {
        Ok(bytes) => bytes,
        Err(error) => return format!("; its log {}: {error}", paths.log.display()),
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let skip = lines.len().saturating_sub(TAIL_LINES);
    let mut said = format!("; it said nothing in {}", paths.log.display());
    if !lines.is_empty() {
        said = format!("; the last lines of {}:", paths.log.display());
    }
    for line in &lines[skip..] {
        let shown = line.chars().map(|c| if c.is_control() { '?' } else { c });
        said.push_str("\n  ");
        said.extend(shown);
    }
    said
}

/// Waits until no engine holds the lock. Returns whether that came true.
///
/// # Errors
/// If the lock cannot be examined.
pub fn wait_for_end(paths: &Paths, limit: Duration) -> Result<bool, Failure> {
    let ended = poll_until(limit, || Ok((lock_state(paths)? == Lock::Free).then_some(())))?;
    Ok(ended.is_some())
}

/// Waits for the end of an engine that was told to end, and removes its files.
///
/// # Errors
/// If it does not end in time, or files cannot be removed.
pub fn finish(resource: &str, paths: &Paths) -> Result<(), Failure> {
    if wait_for_end(paths, END_LIMIT)? {
        return clean_up(paths);
    }
    let seconds = END_LIMIT.as_secs();
    let text = format!(
        "{resource}: the engine did not end within {seconds} s\n  \
         what to do: drbdctl down --force {resource}"
    );
    Err(Failure::new(exit::SYSTEM, text))
}

/// Kills the engine of a resource and removes what it leaves behind.
///
/// # Errors
/// As [`end_by_force`] and [`clear_away`].
pub fn kill_engine(resource: &str, paths: &Paths) -> Result<(), Failure> {
    end_by_force(resource, paths)?;
    clear_away(resource, paths)
}

/// Removes what an engine left behind that did not end as it should: its block devices, which the
/// kernel keeps for the next one, and its files. A device that is in use stays, with the files.
///
/// # Errors
/// If a device is in use or cannot be removed, or a file cannot.
pub fn clear_away(resource: &str, paths: &Paths) -> Result<(), Failure> {
    let has_devices = match read_config(paths) {
        Some(config) => config.frontend == Frontend::Ublk,
        None => paths.json.exists(),
    };
    if has_devices {
        run_verb("clear", resource, paths).map_err(|mut failure| {
            failure.text.push_str(&format!(
                "\n  what to do: drbdctl up {resource} serves it again; \
                 once it is closed: drbdctl down {resource}"
            ));
            failure
        })?;
    }
    clean_up(paths)
}

/// Kills the engine of a resource, whose devices and files stay for the next one. Only a process
/// that holds the lock is killed.
///
/// # Errors
/// If the process is not known for sure, cannot be killed, or does not go away.
pub fn end_by_force(resource: &str, paths: &Paths) -> Result<(), Failure> {
    let pid = match lock_state(paths)? {
        Lock::Free => return Ok(()),
        Lock::Held(Some(pid)) => pid,
        Lock::Held(None) => {
            let shown = paths.lock.display();
            let text = format!(
                "{resource}: {shown} is locked, but no process is seen that has it; killed nobody"
            );
            return Err(Failure::new(exit::SYSTEM, text));
        }
    };
    match kill(Pid::from_raw(pid), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => {
            return Err(Failure::system(format!("{resource}: kill process {pid}"), &errno));
        }
    }
    if wait_for_end(paths, KILL_LIMIT)? {
        return Ok(());
    }
    let seconds = KILL_LIMIT.as_secs();
    let text = format!(
        "{resource}: process {pid} was killed and is still there after {seconds} s; \
         it may wait for its disk"
    );
    Err(Failure::new(exit::SYSTEM, text))
}

/// Removes what an engine left behind, when none lives. The lock file stays: to remove it would
/// let two engines lock two files of one name.
///
/// # Errors
/// If a file cannot be removed.
pub fn clean_up(paths: &Paths) -> Result<(), Failure> {
    for path in [&paths.socket, &paths.json] {
        match std::fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Failure::system(format!("remove {}", path.display()), &error));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lock is free, held by a known process, or held by one that its file does not name.
    #[test]
    fn the_holder_is_named_only_when_it_is_sure() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(dir.path(), "r0");
        assert_eq!(lock_state(&paths).unwrap(), Lock::Free);
        std::fs::write(&paths.lock, format!("{}\n", std::process::id())).unwrap();
        assert_eq!(lock_state(&paths).unwrap(), Lock::Free);
        let held = Flock::lock(File::open(&paths.lock).unwrap(), FlockArg::LockExclusive).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(lock_state(&paths).unwrap(), Lock::Held(Some(own)));
        for text in ["", "1\n", "-7\n", "x\n", "2147483000\n"] {
            std::fs::write(&paths.lock, text).unwrap();
            assert_eq!(lock_state(&paths).unwrap(), Lock::Held(None), "{text:?}");
        }
        drop(held);
        assert_eq!(lock_state(&paths).unwrap(), Lock::Free);
    }

    /// A look at who has the lock leaves an engine alone that takes it at the same moment.
    #[test]
    fn a_look_takes_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(dir.path(), "r0");
        assert_eq!(seen(&paths), None);
        std::fs::write(&paths.lock, "").unwrap();
        let (ask, end) = std::sync::mpsc::channel::<()>();
        let looking = paths.clone();
        let look = std::thread::spawn(move || {
            let running = Err(std::sync::mpsc::TryRecvError::Empty);
            while end.try_recv() == running {
                assert_eq!(seen(&looking), None, "nobody has written who he is");
            }
        });
        for turn in 0..2000 {
            let file = File::open(&paths.lock).unwrap();
            let taken = Flock::lock(file, FlockArg::LockExclusiveNonblock);
            assert!(taken.is_ok(), "turn {turn}");
        }
        ask.send(()).unwrap();
        look.join().unwrap();
        let _held = Flock::lock(File::open(&paths.lock).unwrap(), FlockArg::LockExclusive).unwrap();
        std::fs::write(&paths.lock, format!("{}\n", std::process::id())).unwrap();
        assert_eq!(seen(&paths), i32::try_from(std::process::id()).ok());
    }

    /// What an engine said last is shown, without what was there before and without control
    /// characters.
    #[test]
    fn the_end_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(dir.path(), "r0");
        assert!(log_tail(&paths, 0).contains("No such file"));
        std::fs::write(&paths.log, "old\n").unwrap();
        assert!(log_tail(&paths, 4).contains("it said nothing"));
        let new: String = (0..30).map(|n| format!("line {n}\x1b[0m\n")).collect();
        std::fs::write(&paths.log, format!("old\n{new}")).unwrap();
        let tail = log_tail(&paths, 4);
        assert_eq!(tail.lines().count(), 1 + TAIL_LINES);
        assert!(tail.ends_with("\n  line 29?[0m") && !tail.contains("old"), "{tail}");
    }
}
