//! The engine's loop: what ended becomes events for the core, what the core wants becomes
//! operations.
//!
//! One turn: take the completions, let the core know, carry out its actions until there are none,
//! read what sockets have brought, send what was queued, and enter the kernel once to submit all of
//! it and to wait. The ring thread owns everything; other threads post news.
//!
//! The end: the core's `Stop` takes devices and sockets away, then the loop ends. Its `Leave` ends
//! the loop at once: block devices stay, and the kernel keeps their requests. A first SIGTERM
//! stops the resource like a forced `down`, unless a block device is in use: then the process ends
//! as it is, and the device waits for the next engine with all its requests. A second SIGTERM ends
//! it at once in any case.
//!
//! Invariants kept: ORD-7 (packets in the order of their stream), LV-3 (time is monotonic), LV-2.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use replication_core::action::Action;
use replication_core::config::{
    EngineConfig, Frontend as Choice, ResourceConfig, VolumeConfig, known_sizes_path,
};
use replication_core::control::{Command, Refusal, Reply};
use replication_core::event::{CommandId, DiskInfo, Event, OpId, VolumeIx};
use replication_core::meta::MetaKind;
use replication_core::resource::{Entropy, Resource};
use replication_core::units::{Sector, Span, Time, VolumeNr};

use crate::arena::Layout;
use crate::control::Socket;
use crate::disk::{self, Disks, Opened};
use crate::frontend::{self, Frontend, Shape};
use crate::handler::{Handlers, HostMounts};
use crate::holders::Users;
use crate::log::CoreLog;
use crate::net::Net;
use crate::process::{self, Heartbeat};
use crate::ring::{Completion, Fd, Op, Owner, Ring};
use crate::service::{Notice, Service};
use crate::settings;
use crate::stream::StreamId;
use crate::worker::{Answer, Inbox, Mailbox, News, channel};

/// Commands that the engine gives by itself are numbered from here.
const OWN_COMMANDS: u64 = 1 << 63;
/// How long devices and sockets may take to go at the end.
const STOP_LIMIT: Span = Span::from_secs(30);
/// How long a forced `down` may take until devices and sockets are taken away without its answer.
/// Twice as long as the core waits for a disk.
const DOWN_LIMIT: Span = Span::from_secs(10);
/// Actions that one event may lead to without memory being asked for: everything that waits for
/// the activity log is begun at once. As many as the peer may have requests.
const ACTIONS: usize = 4096;
/// Rounds of actions and packets in one turn; what is left waits for the next turn, after the
/// kernel was entered.
const ROUNDS_MAX: u32 = 64;

/// What every part of the engine works with.
pub struct Shared {
    /// The ring, with the arena.
    pub ring: Ring,
    /// The core.
    pub core: Resource,
    actions: Vec<Action>,
    origin: Instant,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({:?}, {:?})", self.ring, self.core)
    }
}

impl Shared {
    /// A ring with its arena, and the core that nothing has happened to yet.
    ///
    /// # Errors
    /// There is no ring, or the core cannot work with these options.
    pub fn new(config: &EngineConfig) -> Result<Self> {
        let volumes = config.resource.volumes.len();
        let buffers = config.resource.net.max_buffers;
        let layout = Layout::new(volumes, config.queue_depth, config.max_io_size, buffers)?;
        let ring = Ring::new(layout)?;
        let core = Resource::new(config.resource.clone(), layout.memory(), Box::new(OsEntropy))
            .with_context(|| format!("start resource {}", config.resource.name))?;
        Ok(Self { ring, core, actions: Vec::with_capacity(ACTIONS), origin: Instant::now() })
    }

    /// Monotonic time since the start of the engine.
    #[must_use]
    pub fn now(&self) -> Time {
        let nanos = self.origin.elapsed().as_nanos();
        Time(u64::try_from(nanos).expect("584 years have not passed"))
    }

    /// Lets time pass.
    #[cfg(test)]
    pub(crate) fn pass(&mut self, time: Duration) {
        self.origin = self.origin.checked_sub(time).expect("the system runs for longer");
    }

    /// Lets the core know. What it wants done is carried out later in the same turn.
    pub fn tell(&mut self, event: Event<'_>) {
        let now = self.now();
        self.core.handle(now, event, &mut self.actions);
    }
}

/// Randomness from the system.
#[derive(Debug)]
struct OsEntropy;

impl Entropy for OsEntropy {
    fn fill(&mut self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the system gives randomness after boot");
    }
}

/// Where the answer to a command goes.
#[derive(Debug)]
struct Waiting {
    reply: SyncSender<Answer>,
    /// Options that hold from the answer on, if it is a good one.
    adjust: Option<Box<EngineConfig>>,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Running,
    /// A signal came; whether a device is in use is being found out.
    Asked,
    /// The core was told to put everything away.
    Ending,
    /// Devices and sockets are going; at this time they have gone for certain.
    Stopping(Time),
    /// Done, or done with.
    Over,
}

struct Engine {
    shared: Shared,
    config: EngineConfig,
    disks: Disks,
    found: Vec<Option<DiskInfo>>,
    net: Net,
    frontend: Frontend,
    mailbox: Mailbox,
    inbox: Inbox,
    inbox_fd: Fd,
    signals: SignalFd,
    signals_fd: Fd,
    users: Arc<Users>,
    handlers: Handlers,
    waiting: BTreeMap<CommandId, Waiting>,
    /// The command that the frontend has asked for.
    own_command: Option<CommandId>,
    own_commands: u64,
    log: CoreLog,
    heartbeat: Heartbeat,
    watchdog: Option<Span>,
    watchdog_at: Time,
    life: Life,
    /// A forced `down` is under way; at this time it is over in any case.
    down_limit: Option<(CommandId, Time)>,
    /// The last turn ended with work left.
    has_more: bool,
    service: Service,
    completions: Vec<Completion>,
    batch: Vec<Action>,
}

/// Runs the engine of a resource until it is told to end, by a command or by one of `signals`. With
/// `up`, disks are attached and the peer is connected at once.
///
/// # Errors
/// The engine cannot start, or the ring fails.
pub fn run(config: EngineConfig, up: bool, signals: SignalFd) -> Result<()> {
    let name = config.resource.name.clone();
    let run_dir = Path::new(&config.run_dir);
    let lock = process::lock_resource(run_dir, &name).context("start engine")?;
    // No thread shall keep the file system busy from which the engine was started.
    std::env::set_current_dir("/").context("change to the root directory")?;
    let mut mounts = HostMounts::default();
    let mut needed = None;
    if config.frontend == Choice::Ublk {
        mounts = HostMounts::remember()?;
        needed = Some(needed_paths(&config));
    }
    process::harden(needed.as_deref());
    let users = Arc::new(Users::default());
    let mut engine = Engine::new(config, signals, Arc::clone(&users), mounts)?;
    let mailbox = engine.mailbox.clone();
    let socket = Socket::open(&engine.config, users, mailbox)?;
    engine.service.tell(Notice::Ready);
    tracing::info!("drbd {name}: engine {} started", env!("CARGO_PKG_VERSION"));
    if up {
        engine.command(Command::Up);
    }
    let served = engine.serve();
    engine.service.tell(Notice::Stopping);
    // Whoever still waits for an answer gets one.
    drop(engine);
    socket.finish();
    lock.keep_until_exit();
    tracing::info!("drbd {name}: engine ended");
    served
}

/// Removes what an engine that died has left in the kernel: its block devices, unless they are in
/// use.
///
/// # Errors
/// An engine of the resource lives, or a device cannot be removed.
pub fn clear(config: &EngineConfig) -> Result<()> {
    let run_dir = Path::new(&config.run_dir);
    let _lock = process::lock_resource(run_dir, &config.resource.name)?;
    frontend::clear(config)
}

/// The paths that a running engine opens or has to see. Links are followed: what counts is where
/// the file lies.
fn needed_paths(config: &EngineConfig) -> Vec<PathBuf> {
    let backing = config.backing.iter().flat_map(|b| [b.disk.as_deref(), b.meta_disk.as_deref()]);
    let own = [Some(config.run_dir.as_str()), Some("/proc/self/exe")];
    let sizes = config.resource.volumes.iter().map(|volume| sizes_path(config, volume.nr));
    let paths = backing.chain(own).flatten().map(PathBuf::from).chain(sizes);
    // A file that is not there yet will be in a directory that is.
    let existing = |path: &Path| path.ancestors().find_map(|part| std::fs::canonicalize(part).ok());
    paths.map(|path| existing(&path).unwrap_or(path)).collect()
}

/// Takes over the signals that ask for an end. To be called before the first thread is started, so
/// that all of them leave these signals alone.
///
/// # Errors
/// There are no descriptors left.
pub fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block().context("block signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    SignalFd::with_flags(&set, flags).context("make a signalfd")
}

fn sizes_path(config: &EngineConfig, volume: VolumeNr) -> PathBuf {
    known_sizes_path(Path::new(&config.run_dir), &config.resource.name, volume)
}

fn has_same_volumes(one: &ResourceConfig, other: &ResourceConfig) -> bool {
    let fixed = |volume: &VolumeConfig| (volume.nr, volume.minor, volume.meta);
    one.volumes.iter().map(fixed).eq(other.volumes.iter().map(fixed))
}

fn duplicate(fd: &impl AsFd) -> Result<Fd> {
    let fd = fd.as_fd().try_clone_to_owned().context("duplicate a descriptor")?;
    Ok(Rc::new(fd))
}

impl Engine {
    fn new(
        config: EngineConfig,
        signals: SignalFd,
        users: Arc<Users>,
        mounts: HostMounts,
    ) -> Result<Self> {
        let volumes = config.resource.volumes.len();
        let mut shared = Shared::new(&config)?;
        let (mailbox, inbox) = channel()?;
        let frontend = Frontend::new(&config, Arc::clone(&users), &mailbox, &mut shared.ring)?;
        let inbox_fd = duplicate(&inbox.event())?;
        let signals_fd = duplicate(&signals)?;
        shared.ring.push(&inbox_fd, Op::Readable, Owner::Wake);
        shared.ring.push(&signals_fd, Op::Readable, Owner::Signal);
        let mut micros = 0;
        let watchdog = sd_notify::watchdog_enabled(false, &mut micros);
        let completions = shared.ring.room_for_completions();
        let watchdog = watchdog.then(|| Span(micros.saturating_mul(1000) / 2));
        Ok(Self {
            shared,
            disks: Disks::new(volumes),
            found: vec![None; volumes],
            net: Net::new(config.local, config.remote, &config.resource.net),
            frontend,
            mailbox,
            inbox,
            inbox_fd,
            signals,
            signals_fd,
            users,
            handlers: Handlers::new(mounts),
            waiting: BTreeMap::new(),
            own_command: None,
            own_commands: OWN_COMMANDS,
            log: CoreLog::new(&config.resource),
            heartbeat: Heartbeat::start()?,
            watchdog,
            watchdog_at: Time::ZERO,
            life: Life::Running,
            down_limit: None,
            has_more: false,
            service: Service::start()?,
            completions,
            batch: Vec::with_capacity(ACTIONS),
            config,
        })
    }

    fn serve(&mut self) -> Result<()> {
        loop {
            self.turn();
            if let Some(error) = self.frontend.failure() {
                return Err(error);
            }
            if self.life == Life::Over {
                return Ok(());
            }
            let limit = self.next_wait();
            self.shared.ring.wait(Some(limit))?;
        }
    }

    /// Everything that can be done without waiting.
    fn turn(&mut self) {
        self.heartbeat.beat();
        let mut completions = std::mem::take(&mut self.completions);
        self.shared.ring.completions(&mut completions);
        for completion in completions.drain(..) {
            self.on_completion(completion);
        }
        self.completions = completions;
        self.on_timers();
        self.has_more = true;
        for _ in 0..ROUNDS_MAX {
            self.act();
            let mut progress = self.net.pump(&mut self.shared);
            progress |= self.net.reap(&mut self.shared);
            progress |= self.frontend.pump(&mut self.shared);
            if let Some(command) = self.frontend.next_command(&self.shared) {
                let id = self.command(command);
                self.own_command = Some(id);
                progress = true;
            }
            if !progress && self.shared.actions.is_empty() {
                self.has_more = false;
                break;
            }
        }
        self.act();
        self.net.flush(&mut self.shared.ring);
        self.frontend.flush(&mut self.shared);
        if let Life::Stopping(limit) = self.life {
            let gone = self.net.is_empty() && self.frontend.is_stopped();
            if !gone && self.shared.now() >= limit {
                tracing::error!("devices or sockets did not go in time; ending all the same");
            }
            if gone || self.shared.now() >= limit {
                self.life = Life::Over;
            }
        }
    }

    fn on_timers(&mut self) {
        let now = self.shared.now();
        if self.shared.core.next_deadline().is_some_and(|at| at <= now) {
            self.shared.tell(Event::Tick);
        }
        self.net.on_tick(&mut self.shared);
        if let Some((id, _)) = self.down_limit.filter(|(_, at)| *at <= now) {
            tracing::error!("a forced down was not done in time (a disk that hangs?); ending");
            self.reply(id, Ok(Reply::Done));
            self.stop();
        }
        if let Some(interval) = self.watchdog
            && self.watchdog_at <= now
        {
            self.service.tell(Notice::Watchdog);
            self.watchdog_at = now + interval;
        }
    }

    /// How long the kernel may be waited for.
    fn next_wait(&self) -> Duration {
        if self.has_more || !self.shared.actions.is_empty() {
            return Duration::ZERO;
        }
        let now = self.shared.now();
        let stop = match self.life {
            Life::Stopping(limit) => Some(limit),
            Life::Running | Life::Asked | Life::Ending | Life::Over => None,
        };
        let deadlines = [
            self.shared.core.next_deadline(),
            self.net.next_deadline(),
            self.frontend.next_deadline(),
            self.watchdog.map(|_| self.watchdog_at),
            self.down_limit.map(|(_, at)| at),
            stop,
        ];
        let wait = deadlines.into_iter().flatten().min().map(|at| at.since(now));
        wait.map_or(Heartbeat::INTERVAL, |span| Duration::from_nanos(span.0))
            .min(Heartbeat::INTERVAL)
    }

    fn on_completion(&mut self, completion: Completion) {
        let shared = &mut self.shared;
        let outcome = completion.outcome();
        match completion.owner {
            Owner::Disk(job) => self.disks.on_done(shared, job, outcome),
            Owner::Meta(job) => {
                let (result, keep) = (outcome, completion.keep);
                self.disks.on_meta_done(shared, job, result, keep);
            }
            Owner::Received(StreamId::Peer(sock)) => {
                self.net.on_received(shared, sock, completion);
            }
            Owner::Sent(StreamId::Peer(sock)) => self.net.on_sent(shared, sock, completion),
            Owner::PeerAccept(count) => self.net.on_accepted(shared, count, completion),
            Owner::Dial(dial) => self.net.on_dialled(shared, dial, &completion),
            Owner::Received(StreamId::Client(id)) => match &mut self.frontend {
                Frontend::Nbd(server) => server.on_received(shared, id, completion),
                Frontend::Ublk(_) => panic!("block devices have no clients"),
            },
            Owner::Sent(StreamId::Client(id)) => match &mut self.frontend {
                Frontend::Nbd(server) => server.on_sent(shared, id, completion),
                Frontend::Ublk(_) => panic!("block devices have no clients"),
            },
            Owner::NbdAccept => match &mut self.frontend {
                Frontend::Nbd(server) => server.on_accepted(shared, completion),
                Frontend::Ublk(_) => panic!("block devices have no listening socket"),
            },
            Owner::Ublk { volume, tag } => {
                self.frontend.on_command(shared, volume, tag, &completion);
            }
            Owner::Wake => self.on_wake(),
            Owner::Signal => self.on_signal(),
        }
    }

    fn on_wake(&mut self) {
        self.inbox.clear();
        self.shared.ring.push(&self.inbox_fd, Op::Readable, Owner::Wake);
        while let Some(news) = self.inbox.next() {
            match news {
                News::Opened { id, volume, result } => self.on_opened(id, volume, result),
                News::Probed { id, volume, result } => {
                    if let Ok(info) = &result {
                        self.found[volume.at()] = Some(*info);
                    }
                    self.shared.tell(Event::DiskOpened { id, result });
                }
                News::Command { id, command, reply } => self.on_command(id, command, reply),
                News::Device(news) => self.frontend.on_news(&mut self.shared, news),
                News::InUse(holder) => self.on_in_use(holder),
            }
        }
    }

    fn on_opened(&mut self, id: OpId, volume: VolumeIx, result: Result<Opened, String>) {
        let result = result.and_then(|opened| {
            self.frontend.set_was_primary(volume, opened.was_primary());
            self.frontend.check_block_size(volume, opened.info.logical_block_size)?;
            let info = self.disks.attach(volume, opened);
            self.found[volume.at()] = Some(info);
            Ok(info)
        });
        self.shared.tell(Event::DiskOpened { id, result });
    }

    fn on_command(&mut self, id: CommandId, mut command: Command, reply: SyncSender<Answer>) {
        if command == Command::Status {
            let mut status = self.shared.core.status(self.shared.now());
            for (index, volume) in (0_u8..).zip(&mut status.volumes) {
                volume.is_serving = self.frontend.is_serving(VolumeIx(index));
            }
            // A client that left does not want to know.
            let _ = reply.try_send(Ok(Reply::Status(Box::new(status))));
            return;
        }
        let adjust = match &mut command {
            Command::Adjust(config) => {
                settings::complete(config);
                if let Some(refusal) = self.refuse_adjust(config) {
                    let _ = reply.try_send(Err(refusal));
                    return;
                }
                Some(config.clone())
            }
            Command::Status
            | Command::Up
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
            | Command::NewCurrentUuid { .. } => None,
        };
        if matches!(command, Command::Down { force: true, .. }) {
            self.down_limit = Some((id, self.shared.now() + DOWN_LIMIT));
        }
        self.waiting.insert(id, Waiting { reply, adjust });
        self.shared.tell(Event::Command { id, command });
    }

    /// What an engine that runs cannot take over.
    fn refuse_adjust(&self, new: &EngineConfig) -> Option<Refusal> {
        let old = &self.config;
        let what = if new.resource.name != old.resource.name {
            "the resource's name"
        } else if !has_same_volumes(&new.resource, &old.resource) {
            "the set of volumes, a minor number or the place of metadata"
        } else if new.backing != old.backing {
            "a backing device"
        } else if (new.local, new.remote) != (old.local, old.remote) {
            "an address"
        } else if new.frontend != old.frontend {
            "the frontend"
        } else if (new.queue_depth, new.max_io_size) != (old.queue_depth, old.max_io_size) {
            "the queue depth or the largest request"
        } else if new.resource.net.max_buffers > old.resource.net.max_buffers {
            "max-buffers, which can only shrink"
        } else {
            return None;
        };
        Some(Refusal {
            code: 0,
            exit: 10,
            text: format!("{what} cannot change while the engine runs"),
            advice: "take the resource down and up again".to_owned(),
        })
    }

    /// A command of the engine itself.
    fn command(&mut self, command: Command) -> CommandId {
        let id = CommandId(self.own_commands);
        self.own_commands += 1;
        self.shared.tell(Event::Command { id, command });
        id
    }

    fn on_signal(&mut self) {
        self.shared.ring.push(&self.signals_fd, Op::Readable, Owner::Signal);
        while let Ok(Some(info)) = self.signals.read_signal() {
            let again = self.life != Life::Running;
            tracing::info!(
                "signal {} from pid {}: {}",
                info.ssi_signo,
                info.ssi_pid,
                if again { "ending at once" } else { "ending" }
            );
            if again {
                self.life = Life::Over;
                continue;
            }
            self.service.tell(Notice::Stopping);
            self.life = Life::Asked;
            self.ask_use();
        }
    }

    /// Finds out whether a block device is in use; NBD clients are sent away in any case.
    fn ask_use(&mut self) {
        let volumes = match self.config.frontend {
            Choice::Ublk => self.config.resource.volumes.len(),
            Choice::Nbd(_) => 0,
        };
        let users = Arc::clone(&self.users);
        let ask = move || News::InUse(users.certainly_of_any(volumes));
        if let Err(error) = self.mailbox.spawn("in use?", ask) {
            tracing::error!("{error:#}");
            self.life = Life::Over;
        }
    }

    fn on_in_use(&mut self, holder: Option<String>) {
        if self.life != Life::Asked {
            return;
        }
        if let Some(holder) = holder {
            tracing::warn!(
                "a device is in use ({holder}): it waits for the next engine with its requests"
            );
            self.life = Life::Over;
            return;
        }
        self.life = Life::Ending;
        let id = self.command(Command::Down { holder: None, force: true });
        self.down_limit = Some((id, self.shared.now() + DOWN_LIMIT));
    }

    /// Carries out what the core wants, as far as it has said so until now.
    fn act(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        std::mem::swap(&mut batch, &mut self.shared.actions);
        for action in batch.drain(..) {
            self.perform(action);
        }
        self.batch = batch;
    }

    fn perform(&mut self, action: Action) {
        let shared = &mut self.shared;
        match action {
            Action::OpenDisk { id, volume } => self.open_disk(id, volume),
            Action::ProbeDisk { id, volume } => self.probe_disk(id, volume),
            Action::CloseDisk { volume } => self.disks.close(volume),
            Action::Disk { id, volume, op, range, buf } => {
                self.disks.start(shared, id, volume, op, range, buf);
            }
            Action::MetaRead { id, volume, sector, pages } => {
                self.disks.read_meta(shared, id, volume, sector, pages);
            }
            Action::MetaWrite { id, volume, sector, page, durable } => {
                self.disks.write_meta(shared, id, volume, sector, page, durable);
            }
            Action::Listen(wanted) => self.net.listen(shared, wanted),
            Action::Dial { dial } => self.net.dial(shared, dial),
            Action::Send { sock, volume, packet, payload, kind } => {
                self.net.send(shared, sock, volume, &packet, payload, kind);
            }
            Action::Close { sock } => self.net.close(shared, sock),
            Action::Complete { volume, tag, result } => {
                self.frontend.complete(shared, volume, tag, result);
            }
            Action::SetSize { volume, sectors } => self.set_size(volume, sectors),
            Action::Reply { id, result } => self.reply(id, result),
            Action::Log { level, scope, text } => {
                self.log.write(shared.now(), level, scope, &text);
            }
            Action::RunHandler { handler, volume } => {
                if let Err(error) = self.handlers.start(handler, volume, &self.config) {
                    tracing::error!("run handler {}: {error:#}", handler.name());
                }
            }
            Action::Stop => self.stop(),
            Action::Leave => self.life = Life::Over,
        }
    }

    fn open_disk(&mut self, id: OpId, volume: VolumeIx) {
        let backing = self.config.backing[volume.at()].clone();
        let config = &self.config.resource.volumes[volume.at()];
        let (kind, configured) = (config.meta, config.disk.size);
        let sizes = self.sizes_path(volume);
        let open = move || {
            let kind = kind.context("this node has no metadata for the volume");
            let opened = kind.and_then(|kind| disk::open(&backing, kind));
            if let (Ok(opened), Some(sizes)) = (&opened, sizes)
                && let Err(error) = disk::remember_seen(&sizes, opened, configured)
            {
                tracing::warn!("metadata will not be found if the disk grows offline: {error:#}");
            }
            News::Opened { id, volume, result: opened.map_err(|error| format!("{error:#}")) }
        };
        if let Err(error) = self.mailbox.spawn("open disk", open) {
            self.shared.tell(Event::DiskOpened { id, result: Err(format!("{error:#}")) });
        }
    }

    fn probe_disk(&mut self, id: OpId, volume: VolumeIx) {
        let found = self.found[volume.at()].expect("only open disks are looked at again");
        let sizes = self.sizes_path(volume);
        let started = self.disks.descriptors(volume).and_then(|(data, meta)| {
            self.mailbox.spawn("probe disk", move || {
                let result = disk::probe(found, &data, &meta).and_then(|info| {
                    if let Some(sizes) = sizes {
                        disk::remember_expected(&sizes, info.data_sectors)?;
                    }
                    Ok(info)
                });
                News::Probed { id, volume, result: result.map_err(|error| format!("{error:#}")) }
            })
        });
        if let Err(error) = started {
            self.shared.tell(Event::DiskOpened { id, result: Err(format!("{error:#}")) });
        }
    }

    /// The file with the sizes of a volume's disk, if they tell where its metadata is.
    fn sizes_path(&self, volume: VolumeIx) -> Option<PathBuf> {
        let config = &self.config.resource.volumes[volume.at()];
        (config.meta == Some(MetaKind::Internal)).then(|| sizes_path(&self.config, config.nr))
    }

    fn set_size(&mut self, volume: VolumeIx, sectors: Sector) {
        // Without a disk, the peer's is served: every peer takes sectors.
        let found = self.found[volume.at()];
        let shape = Shape {
            sectors,
            logical_block: found.map_or(512, |info| info.logical_block_size),
            physical_block: found.map_or(4096, |info| info.physical_block_size),
            discard: found.is_none_or(|info| info.discard),
        };
        self.frontend.set_shape(volume, shape);
    }

    fn reply(&mut self, id: CommandId, result: Result<Reply, Refusal>) {
        if self.down_limit.is_some_and(|(down, _)| down == id) {
            self.down_limit = None;
        }
        if self.own_command == Some(id) {
            self.own_command = None;
            let result = result.map(|_| ()).map_err(|refusal| refusal.text);
            self.frontend.on_reply(&mut self.shared, result);
            return;
        }
        if id.0 >= OWN_COMMANDS {
            if let Err(refusal) = result {
                tracing::error!("drbd {}: {refusal}", self.config.resource.name);
                if self.life == Life::Ending {
                    self.life = Life::Over;
                }
            }
            return;
        }
        let Some(waiting) = self.waiting.remove(&id) else {
            tracing::warn!("an answer to a command that nobody gave was dropped");
            return;
        };
        if let (Ok(_), Some(config)) = (&result, waiting.adjust) {
            self.net.adjust(&config.resource.net);
            self.config = *config;
        }
        // A client that left does not want to know.
        let _ = waiting.reply.try_send(result);
    }

    fn stop(&mut self) {
        if matches!(self.life, Life::Stopping(_) | Life::Over) {
            return;
        }
        self.frontend.stop(&mut self.shared.ring);
        self.net.stop(&mut self.shared);
        self.life = Life::Stopping(self.shared.now() + STOP_LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(dir: &Path) -> Engine {
        let config = settings::tests::config(dir);
        let signals = block_signals().unwrap();
        Engine::new(config, signals, Arc::default(), HostMounts::default()).unwrap()
    }

    /// Whatever the core waits for, a forced `down` is answered and the end begins.
    #[test]
    fn a_forced_down_that_takes_too_long_is_over_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = engine(dir.path());
        let (reply, answers) = std::sync::mpsc::sync_channel(1);
        let id = CommandId(1);
        engine.waiting.insert(id, Waiting { reply, adjust: None });
        engine.down_limit = Some((id, engine.shared.now() + Span::from_secs(1000)));
        engine.turn();
        assert_eq!((engine.life, answers.try_recv().is_err()), (Life::Running, true));
        assert!(engine.next_wait() <= Heartbeat::INTERVAL);
        engine.down_limit = Some((id, engine.shared.now()));
        assert_eq!(engine.next_wait(), Duration::ZERO);
        engine.turn();
        assert_eq!(answers.try_recv(), Ok(Ok(Reply::Done)));
        assert_eq!(engine.life, Life::Over);
    }

    /// Only a forced `down` has a limit, and only until its answer.
    #[test]
    fn the_limit_of_a_forced_down_goes_with_its_answer() {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = engine(dir.path());
        let (reply, answers) = std::sync::mpsc::sync_channel(2);
        let down = |force| Command::Down { holder: Some("somebody".to_owned()), force };
        engine.on_command(CommandId(1), down(false), reply.clone());
        assert_eq!(engine.down_limit, None);
        engine.on_command(CommandId(2), down(true), reply);
        assert!(engine.down_limit.is_some());
        engine.act();
        assert!(answers.try_recv().unwrap().is_err() && answers.try_recv().unwrap().is_err());
        assert_eq!((engine.down_limit, engine.life), (None, Life::Running));
    }
}
