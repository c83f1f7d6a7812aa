//! One tool at a time works on the life of a resource.
//!
//! Starting, ending and adjusting an engine goes through several steps on files that the steps of
//! another run of the tool would take away. Each of these verbs holds the lock of `RES.tool` from
//! its first look to its last step; verbs that only ask or send one command that touches no file
//! do without. The file is never removed: to remove it would let two tools lock two files of one
//! name.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::context::Paths;
use crate::engine::poll_until;
use crate::exit::{self, Failure};

/// How long another tool is waited for: the start of an engine and its answer to `up` may take as
/// much.
const PATIENCE: Duration = Duration::from_secs(150);
/// The same for an operator who insists, because what is waited for may hang.
const FORCED_PATIENCE: Duration = Duration::from_secs(5);

/// How a verb goes about the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It begins something: the directory is made if it is not there.
    Begin,
    /// It changes or ends what is there.
    Change,
    /// The same, and another tool that seems to hang does not stop it.
    Force,
}

/// The lock, until it is dropped; `None` inside: there was nothing to guard.
#[derive(Debug)]
pub struct Guard {
    _held: Option<Flock<File>>,
}

/// Waits for other tools that work on the resource.
///
/// # Errors
/// If one does not end, or the lock cannot be taken.
pub fn take(resource: &str, paths: &Paths, manner: Manner) -> Result<Guard, Failure> {
    let patience = match manner {
        Manner::Begin | Manner::Change => PATIENCE,
        Manner::Force => FORCED_PATIENCE,
    };
    take_within(resource, paths, manner, patience)
}

fn take_within(
    resource: &str,
    paths: &Paths,
    manner: Manner,
    patience: Duration,
) -> Result<Guard, Failure> {
    let shown = paths.tool.display();
    let fail = |act: &str, error: &dyn std::fmt::Display| {
        Failure::system(format!("{resource}: {act} {shown}"), error)
    };
    let file = match open(paths, manner) {
        Ok(file) => file,
        // Nothing was ever begun.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Guard { _held: None }),
        Err(error) => return Err(fail("open", &error)),
    };
    let mut waiting = Some(file);
    let held = poll_until(patience, || {
        let Some(file) = waiting.take() else { return Ok(None) };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Some(held)),
            Err((file, Errno::EWOULDBLOCK)) => {
                waiting = Some(file);
                Ok(None)
            }
            Err((_, errno)) => Err(fail("lock", &errno)),
        }
    })?;
    let Some(mut held) = held else {
        if manner == Manner::Force {
            return Ok(Guard { _held: None });
        }
        let who = waiting.and_then(named).map_or_else(String::new, |pid| format!(" (pid {pid})"));
        let seconds = patience.as_secs();
        let text =
            format!("{resource}: another drbdctl{who} works on it for more than {seconds} s");
        return Err(Failure::new(exit::SYSTEM, text));
    };
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut held).map_err(|error| fail("write", &error))?;
    Ok(Guard { _held: Some(held) })
}

fn open(paths: &Paths, manner: Manner) -> std::io::Result<File> {
    if manner == Manner::Begin
        && let Some(dir) = paths.tool.parent()
    {
        DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    }
    // An engine may have been started without this tool.
    let create = manner == Manner::Begin || paths.lock.exists();
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).truncate(false).mode(0o600).open(&paths.tool)
}

/// The process that the file names.
fn named(mut file: File) -> Option<i32> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One at a time; who waits in vain is told for whom, unless it insists.
    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(&dir.path().join("run"), "r0");
        let none = take_within("r0", &paths, Manner::Change, Duration::ZERO).unwrap();
        assert!(none._held.is_none() && !paths.tool.exists());
        let first = take_within("r0", &paths, Manner::Begin, Duration::ZERO).unwrap();
        let refused = take_within("r0", &paths, Manner::Change, Duration::ZERO).unwrap_err();
        let pid = std::process::id();
        let text = format!("r0: another drbdctl (pid {pid}) works on it for more than 0 s");
        assert_eq!(refused, Failure::new(exit::SYSTEM, text));
        let forced = take_within("r0", &paths, Manner::Force, Duration::ZERO).unwrap();
        assert!(forced._held.is_none());
        drop(first);
        let second = take_within("r0", &paths, Manner::Change, Duration::ZERO).unwrap();
        assert!(second._held.is_some());
    }
}
