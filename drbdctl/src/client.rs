//! The conversation with a running engine over its control socket.
//!
//! One connection carries one command and its answer. The frames are those of
//! [`replication_core::control`]; an answer is a `Result<Reply, Refusal>`.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use replication_core::control::{
    Command, FrameError, Refusal, Reply, Status, decode_frame, encode_frame, frame_length,
};

use crate::exit::{self, Failure};

/// Time for an answer. The engine bounds its own waiting (for a peer, a disk, a handshake); this
/// is for an engine that hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

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
    stream: UnixStream,
    /// The resource, for messages.
    resource: String,
}

/// The engine's answer to a command.
pub type Answer = Result<Reply, Refusal>;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The connection broke, or the time is over.
    #[error("{}", io_text(.0))]
    Io(#[from] io::Error),
    /// Bytes that are no answer.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

fn io_text(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            "the engine did not answer in time".to_owned()
        }
        ErrorKind::UnexpectedEof => "the engine closed the connection without an answer".to_owned(),
        _ => error.to_string(),
    }
}

/// Tries to reach the engine of a resource.
///
/// # Errors
/// If the socket is there and may not be used.
pub fn contact(resource: &str, socket: &Path) -> Result<Contact, Failure> {
    let fail = |error: &io::Error| {
        Failure::system(format!("{resource}: connect to {}", socket.display()), error)
    };
    let stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                ErrorKind::NotFound => Ok(Contact::Absent),
                ErrorKind::ConnectionRefused => Ok(Contact::Stale),
                _ => Err(fail(&error)),
            };
        }
    };
    stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(|error| fail(&error))?;
    stream.set_write_timeout(Some(ANSWER_LIMIT)).map_err(|error| fail(&error))?;
    Ok(Contact::Engine(Client { stream, resource: resource.to_owned() }))
}

impl Client {
    /// The same with another limit for the answer.
    ///
    /// # Errors
    /// If the system does not take it.
    pub fn with_limit(self, limit: Duration) -> Result<Self, Failure> {
        match self.stream.set_read_timeout(Some(limit)) {
            Ok(()) => Ok(self),
            Err(error) => Err(Failure::system(format!("{}: limit", self.resource), &error)),
        }
    }

    /// Sends a command and waits for the answer.
    ///
    /// # Errors
    /// If there is none.
    pub fn try_ask(mut self, command: &Command) -> Result<Answer, AskError> {
        self.stream.write_all(&encode_frame(command)?)?;
        let mut field = [0; 4];
        self.stream.read_exact(&mut field)?;
        let mut body = vec![0; frame_length(field)?];
        self.stream.read_exact(&mut body)?;
        Ok(decode_frame(&body)?)
    }

    /// Sends a command and waits for the answer.
    ///
    /// # Errors
    /// If there is none; the failure names the resource.
    pub fn ask(self, command: &Command) -> Result<Answer, Failure> {
        let resource = self.resource.clone();
        self.try_ask(command).map_err(|error| {
            Failure::new(exit::SYSTEM, format!("{resource}: ask the engine: {error}"))
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
