//! The operator's socket: `RUN_DIR/RES.sock`, for root alone.
//!
//! A thread accepts, and each client has a thread of its own, so a slow, silent or mad client holds
//! up nobody: frames are bounded, a frame must come within [`FRAME_LIMIT`], clients are few. A
//! command goes to the ring thread; its answer comes back through a channel. What needs a look at
//! the rest of the system (who holds a device open, process id, paths) is filled in here.
//!
//! A command that takes its time (waiting for the peer, or for a disk) is waited for as long as the
//! client stays.
//!
//! Invariants kept: LV-2.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use parking_lot::{Condvar, Mutex};
use replication_core::config::EngineConfig;
use replication_core::control::{
    Command, Refusal, Reply, Status, decode_frame, encode_frame, frame_length,
};
use replication_core::event::CommandId;

use crate::holders::Users;
use crate::worker::{Answer, Mailbox, News, STACK_SIZE};

/// Clients at the same time.
const CLIENTS_MAX: usize = 16;
/// Time for the rest of a frame once it has begun, and for the client to take an answer.
pub const FRAME_LIMIT: Duration = Duration::from_secs(5);
/// Time without a command after which a client is sent away.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// How often a waiting thread looks whether its client is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How long the end of the engine waits for answers to be taken.
const FINISH_LIMIT: Duration = Duration::from_secs(2);

/// Exit code of the tool when the engine cannot answer.
const EXIT_GONE: u8 = 10;

#[derive(Debug)]
struct Shared {
    config: EngineConfig,
    users: Arc<Users>,
    mailbox: Mailbox,
    next_command: AtomicU64,
    clients: Mutex<usize>,
    client_left: Condvar,
}

/// The socket; it goes with this value.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    shared: Arc<Shared>,
}

impl Socket {
    /// Starts to listen. The lock of the resource must be held, because a socket that is there
    /// already is taken to be left over.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(config: &EngineConfig, users: Arc<Users>, mailbox: Mailbox) -> Result<Self> {
        let path = Path::new(&config.run_dir).join(format!("{}.sock", config.resource.name));
        let shown = path.display().to_string();
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("remove old {shown}")),
        }
        let listener = UnixListener::bind(&path).with_context(|| format!("listen on {shown}"))?;
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&path, mode).with_context(|| format!("restrict {shown}"))?;
        let shared = Arc::new(Shared {
            config: config.clone(),
            users,
            mailbox,
            next_command: AtomicU64::new(1),
            clients: Mutex::new(0),
            client_left: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("control".to_owned());
        let builder = builder.stack_size(STACK_SIZE);
        builder.spawn(move || accept(&listener, &accepting)).context("start control thread")?;
        Ok(Self { path, shared })
    }

    /// Waits a moment until every client has got its last answer. Clients that wait for more are
    /// not waited for.
    pub fn finish(&self) {
        let deadline = Instant::now() + FINISH_LIMIT;
        let mut clients = self.shared.clients.lock();
        while *clients > 0 {
            if self.shared.client_left.wait_until(&mut clients, deadline).timed_out() {
                return;
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("remove {}: {error}", self.path.display());
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        match client {
            Ok(client) => {
                if let Err(error) = admit(client, shared) {
                    tracing::warn!("control socket: {error:#}");
                }
            }
            Err(error) => {
                tracing::warn!("control socket: accept: {error}");
                // Out of descriptors or memory: not to be tried again at once.
                std::thread::sleep(LOOK_INTERVAL);
            }
        }
    }
}

fn admit(client: UnixStream, shared: &Arc<Shared>) -> Result<()> {
    let credentials = getsockopt(&client.as_fd(), sockopt::PeerCredentials)?;
    let own = rustix::process::geteuid().as_raw();
    let uid = credentials.uid();
    ensure!(uid == 0 || uid == own, "user {uid} was refused");
    let mut clients = shared.clients.lock();
    if *clients >= CLIENTS_MAX {
        bail!("a client was refused: {CLIENTS_MAX} are connected");
    }
    let place = Place(Arc::clone(shared));
    *clients += 1;
    drop(clients);
    let serve = move || {
        if let Err(error) = serve(client, &place.0) {
            tracing::debug!("control client: {error:#}");
        }
        drop(place);
    };
    let builder = std::thread::Builder::new().name("control client".to_owned());
    builder.stack_size(STACK_SIZE).spawn(serve).context("start a client's thread")?;
    Ok(())
}

/// A client's place among the few; given back when its thread ends, or cannot start.
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.clients.lock() -= 1;
        self.0.client_left.notify_all();
    }
}

fn serve(mut client: UnixStream, shared: &Shared) -> Result<()> {
    client.set_write_timeout(Some(FRAME_LIMIT))?;
    loop {
        let Some(frame) = read_frame(&mut client)? else { return Ok(()) };
        let answer = match decode_frame::<Command>(&frame) {
            Ok(command) => run(&client, shared, command)?,
            Err(error) => Err(refusal(error.to_string(), "use the drbdctl of this engine")),
        };
        client.write_all(&encode_frame(&answer)?).context("answer")?;
    }
}

/// The next frame, without its length; `None` at the end of the conversation.
fn read_frame(client: &mut UnixStream) -> Result<Option<Vec<u8>>> {
    client.set_read_timeout(Some(IDLE_LIMIT))?;
    let mut length = [0; 4];
    if client.read(&mut length[..1])? == 0 {
        return Ok(None);
    }
    let deadline = Instant::now() + FRAME_LIMIT;
    read_until(client, &mut length[1..], deadline)?;
    let mut frame = vec![0; frame_length(length)?];
    read_until(client, &mut frame, deadline)?;
    Ok(Some(frame))
}

/// Like `read_exact`, with a deadline for the whole.
fn read_until(client: &mut UnixStream, mut bytes: &mut [u8], deadline: Instant) -> Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "a frame did not end within {FRAME_LIMIT:?}");
        client.set_read_timeout(Some(left))?;
        match client.read(bytes) {
            Ok(0) => bail!("the client left in the middle of a frame"),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read a frame"),
        }
    }
    Ok(())
}

/// Has a command carried out.
///
/// # Errors
/// The client went away; the command is carried out all the same.
fn run(client: &UnixStream, shared: &Shared, command: Command) -> Result<Answer> {
    let command = with_holder(shared, command);
    let id = CommandId(shared.next_command.fetch_add(1, Ordering::Relaxed));
    let (reply, answers) = sync_channel(1);
    if !shared.mailbox.post(News::Command { id, command, reply }) {
        return Ok(Err(ending()));
    }
    loop {
        match answers.recv_timeout(LOOK_INTERVAL) {
            Ok(Ok(Reply::Status(mut status))) => {
                fill_in(shared, &mut status);
                return Ok(Ok(Reply::Status(status)));
            }
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Timeout) => {
                ensure!(!has_left(client)?, "the client left before its answer");
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(Err(ending())),
        }
    }
}

/// Tells commands that a device in use forbids who uses it. ublk says nothing when a device is
/// opened: requests of somebody who opens it after this look and before the command is carried out
/// fail.
fn with_holder(shared: &Shared, command: Command) -> Command {
    let holder = || shared.users.certainly_of_any(shared.config.resource.volumes.len());
    match command {
        Command::Down { holder: _, force } => Command::Down { holder: holder(), force },
        Command::Secondary { holder: _ } => Command::Secondary { holder: holder() },
        other => other,
    }
}

fn fill_in(shared: &Shared, status: &mut Status) {
    status.node.clone_from(&shared.config.node);
    status.local = shared.config.local.to_string();
    status.remote = shared.config.remote.to_string();
    status.pid = std::process::id();
    for (index, volume) in status.volumes.iter_mut().enumerate() {
        volume.open = shared.users.of_volume(index).is_some();
        let backing = shared.config.backing.get(index).and_then(|backing| backing.disk.as_ref());
        volume.backing = backing.cloned().unwrap_or_default();
    }
}

fn has_left(client: &UnixStream) -> Result<bool> {
    let mut fds = [PollFd::new(client.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).context("look after the client")?;
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    Ok(fds[0].revents().is_some_and(|events| events.intersects(gone)))
}

fn refusal(text: String, advice: &str) -> Refusal {
    Refusal { code: 0, exit: EXIT_GONE, text, advice: advice.to_owned() }
}

fn ending() -> Refusal {
    refusal("the engine of this resource is ending".to_owned(), "start it again with `up`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::{Inbox, channel};

    fn config(dir: &Path) -> EngineConfig {
        crate::settings::tests::config(dir)
    }

    fn open(dir: &Path) -> (Socket, Inbox, PathBuf) {
        let (mailbox, inbox) = channel().unwrap();
        let socket = Socket::open(&config(dir), Arc::default(), mailbox).unwrap();
        (socket, inbox, dir.join("r0.sock"))
    }

    fn next(inbox: &Inbox) -> News {
        let mut fds = [PollFd::new(inbox.event(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 10_000_u16).unwrap(), 1);
        inbox.clear();
        inbox.next().unwrap()
    }

    fn answer(client: &mut UnixStream) -> Answer {
        let frame = read_frame(client).unwrap().unwrap();
        decode_frame(&frame).unwrap()
    }

    #[test]
    fn a_command_goes_to_the_engine_and_its_answer_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, inbox, path) = open(dir.path());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(&encode_frame(&Command::Status).unwrap()).unwrap();
        let News::Command { command: Command::Status, reply, .. } = next(&inbox) else {
            panic!("another command came")
        };
        let mut status = Status { name: "r0".to_owned(), ..Status::default() };
        status.volumes.push(replication_core::control::VolumeStatus::default());
        reply.send(Ok(Reply::Status(Box::new(status)))).unwrap();
        let Ok(Reply::Status(status)) = answer(&mut client) else { panic!("no status") };
        assert_eq!(status.pid, std::process::id());
        assert_eq!(status.local, "127.0.0.1:7788");
        assert!(status.volumes[0].backing.ends_with("disk") && !status.volumes[0].open);
        drop(client);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn demotion_is_told_who_holds_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, inbox, path) = open(dir.path());
        let user = crate::holders::User { client: 0, volume: 0, who: "client x".to_owned() };
        socket.shared.users.add(user);
        let mut client = UnixStream::connect(&path).unwrap();
        let secondary = Command::Secondary { holder: Some("a lie".to_owned()) };
        client.write_all(&encode_frame(&secondary).unwrap()).unwrap();
        let News::Command { command, reply, .. } = next(&inbox) else { panic!("no command") };
        let holder = Some("used by NBD client x".to_owned());
        assert_eq!(command, Command::Secondary { holder });
        drop(reply);
        let refused = answer(&mut client).unwrap_err();
        assert!(refused.text.contains("ending"), "{refused}");
    }

    #[test]
    fn garbage_is_refused_and_the_next_client_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let (_socket, inbox, path) = open(dir.path());
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(&[0, 0, 0, 3, 99, 1, 2]).unwrap();
        assert!(answer(&mut client).unwrap_err().text.contains("schema"));
        client.write_all(&[0xff; 4]).unwrap();
        assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)));
        let mut other = UnixStream::connect(&path).unwrap();
        other.write_all(&encode_frame(&Command::Outdate).unwrap()).unwrap();
        assert!(matches!(next(&inbox), News::Command { command: Command::Outdate, .. }));
    }
}
