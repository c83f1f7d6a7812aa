//! The conversation with a running engine over its control socket.
//!
//! One connection carries one command and its answer. The frames are those of
//! [`replication_core::control`]; an answer is a `Result<Reply, Refusal>`. How long an answer is
//! waited for is decided here, unless a caller is in a hurry of its own.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use replication_core::control::{
    Command, FrameError, Refusal, Reply, Status, decode_frame, encode_frame, frame_length,
};

use crate::context::Paths;
use crate::engine::{self, Mute};
use crate::exit::{self, Failure};

/// Time for the answer to a question, which the engine has at hand, and until it takes a
/// connection.
const QUERY_LIMIT: Duration = Duration::from_secs(5);
/// Time for the answer to a command that changes something. The engine bounds its own waiting (for
/// a peer, a disk, a handshake); this is for an engine that hangs.
const CHANGE_LIMIT: Duration = Duration::from_secs(120);

/// Time for the answer to a command.
fn limit_of(command: &Command) -> Duration {
    match command {
        Command::Status => QUERY_LIMIT,
        Command::Up
        | Command::Upgrade
        | Command::Down { .. }
        | Command::Attach(_)
        | Command::Detach { .. }
        | Command::Connect { .. }
        | Command::Disconnect { .. }
        | Command::Primary { .. }
        | Command::Secondary { .. }
        | Command::Invalidate(_)
        | Command::InvalidateRemote(_)
        | Command::Resize { .. }
        | Command::Outdate
        | Command::PauseSync(_)
        | Command::NewCurrentUuid { .. }
        | Command::Adjust(_) => CHANGE_LIMIT,
    }
}

/// What is at the other end of a socket's path.
#[derive(Debug)]
pub enum Contact {
    /// No socket.
    Absent,
    /// A socket that a dead engine has left behind.
    Stale,
    /// An engine.
    Engine(Client),
}

/// A connection to an engine.
#[derive(Debug)]
pub struct Client {
    /// An engine that takes no connection any more is one that does not answer.
    stream: Result<UnixStream, AskError>,
    /// Another limit for the answer than that of the command.
    limit: Option<Duration>,
    /// The resource and its files, for messages.
    resource: String,
    paths: Paths,
}

/// The engine's answer to a command.
pub type Answer = Result<Reply, Refusal>;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The time is over.
    #[error("the engine did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// The connection broke.
    #[error("{}", io_text(.0))]
    Io(io::Error),
    /// Bytes that are no answer.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

fn io_text(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "the engine closed the connection without an answer".to_owned(),
        _ => error.to_string(),
    }
}

/// Tries to reach the engine of a resource.
///
/// # Errors
/// If the socket is there and may not be used.
pub fn contact(resource: &str, paths: &Paths) -> Result<Contact, Failure> {
    contact_within(QUERY_LIMIT, resource, paths)
}

fn contact_within(limit: Duration, resource: &str, paths: &Paths) -> Result<Contact, Failure> {
    let stream = match connect(&paths.socket, limit) {
        Ok(stream) => Ok(stream),
        Err(error) => match error.kind() {
            ErrorKind::NotFound => return Ok(Contact::Absent),
            ErrorKind::ConnectionRefused => return Ok(Contact::Stale),
            _ if is_silence(&error) => Err(AskError::Silent(limit)),
            _ => {
                let act = format!("{resource}: connect to {}", paths.socket.display());
                return Err(Failure::system(act, &error));
            }
        },
    };
    let (resource, paths) = (resource.to_owned(), paths.clone());
    Ok(Contact::Engine(Client { stream, limit: None, resource, paths }))
}

/// Connects within the limit: there is room for some connections that nobody takes, not for any
/// number.
fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let (family, kind) = (AddressFamily::Unix, SockType::Stream);
    let stream = UnixStream::from(socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?);
    stream.set_write_timeout(Some(limit))?;
    socket::connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(stream)
}

fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

impl Client {
    /// The same with another limit for the answer.
    #[must_use]
    pub fn with_limit(self, limit: Duration) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// Sends a command and waits for the answer.
    ///
    /// # Errors
    /// If there is none.
    pub fn try_ask(self, command: &Command) -> Result<Answer, AskError> {
        let limit = self.limit.unwrap_or_else(|| limit_of(command));
        let mut stream = self.stream?;
        let frame = encode_frame(command)?;
        let body = exchange(&mut stream, &frame, limit).map_err(|error| match error {
            AskError::Io(error) if is_silence(&error) => AskError::Silent(limit),
            other => other,
        })?;
        Ok(decode_frame(&body)?)
    }

    /// Sends a command and waits for the answer.
    ///
    /// # Errors
    /// If there is none; the failure names the resource.
    pub fn ask(self, command: &Command) -> Result<Answer, Failure> {
        let (resource, paths) = (self.resource.clone(), self.paths.clone());
        self.try_ask(command).map_err(|error| match error {
            AskError::Silent(limit) => {
                engine::mute(&resource, engine::seen(&paths), Mute::Silent(limit))
            }
            error @ (AskError::Io(_) | AskError::Frame(_)) => {
                Failure::new(exit::SYSTEM, format!("{resource}: ask the engine: {error}"))
            }
        })
    }

    /// Asks for the state.
    ///
    /// # Errors
    /// If there is no answer, or a refusal.
    pub fn status(self) -> Result<Status, Failure> {
        let resource = self.resource.clone();
        match self.ask(&Command::Status)? {
            Ok(Reply::Status(status)) => Ok(*status),
            Ok(Reply::Done | Reply::NothingToDo) => Err(Failure::new(
                exit::SYSTEM,
                format!("{resource}: the engine answered without a state"),
            )),
            Err(refusal) => Err(Failure::refused(&resource, &refusal)),
        }
    }
}

/// Sends a frame; gives the body of the one that comes back.
fn exchange(stream: &mut UnixStream, frame: &[u8], limit: Duration) -> Result<Vec<u8>, AskError> {
    stream.set_read_timeout(Some(limit)).map_err(AskError::Io)?;
    stream.set_write_timeout(Some(limit)).map_err(AskError::Io)?;
    stream.write_all(frame).map_err(AskError::Io)?;
    let mut field = [0; 4];
    stream.read_exact(&mut field).map_err(AskError::Io)?;
    let mut body = vec![0; frame_length(field)?];
    stream.read_exact(&mut body).map_err(AskError::Io)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::socket::Backlog;

    use super::*;

    /// A socket with room for few connections, none of which is taken.
    fn socket_of_nobody(path: &Path) -> impl AsRawFd {
        let (family, kind) = (AddressFamily::Unix, SockType::Stream);
        let listener = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        socket::bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        socket::listen(&listener, Backlog::new(0).unwrap()).unwrap();
        listener
    }

    /// An engine that is stopped while others ask again and again takes no connection some day: it
    /// is as mute as one that takes it, and nobody waits longer.
    #[test]
    fn an_engine_that_takes_no_connection_does_not_answer() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(dir.path(), "r0");
        let _listener = socket_of_nobody(&paths.socket);
        let mut waiting = Vec::new();
        loop {
            let (family, kind) = (AddressFamily::Unix, SockType::Stream);
            let fd = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
            fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
            match socket::connect(fd.as_raw_fd(), &UnixAddr::new(&paths.socket).unwrap()) {
                Ok(()) => waiting.push(fd),
                Err(errno) => break assert_eq!(errno, Errno::EAGAIN),
            }
        }
        let limit = Duration::from_millis(10);
        let Contact::Engine(client) = contact_within(limit, "r0", &paths).unwrap() else {
            panic!("somebody has the socket")
        };
        let failure = client.status().unwrap_err();
        assert!(failure.text.starts_with("r0: an engine lives but does not answer"), "{failure}");
    }

    /// The socket's path says whether there is an engine at all.
    #[test]
    fn nobody_and_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::in_dir(dir.path(), "r0");
        assert!(matches!(contact("r0", &paths), Ok(Contact::Absent)));
        drop(socket_of_nobody(&paths.socket));
        assert!(matches!(contact("r0", &paths), Ok(Contact::Stale)));
    }
}
