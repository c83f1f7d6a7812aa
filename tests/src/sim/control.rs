//! The operator: commands, and questions about the states.

use std::net::SocketAddr;

use replication_core::config::{
    EngineConfig, Frontend, HandlersConfig, NbdAddress, ResourceConfig,
};
use replication_core::control::{Command, Refusal, Reply, Status};
use replication_core::event::{CommandId, Event, VolumeIx};
use replication_core::state::{Conn, Disk, State};
use replication_core::units::Span;

use super::world::World;
use super::{A, B};

/// The longest that a command may take.
const COMMAND_LIMIT: Span = Span::from_secs(60);

/// `resize` as most operators type it: all volumes take up what their disks have gained.
pub const RESIZE: Command =
    Command::Resize { volume: None, size: None, assume_clean: false, assume_peer_has_space: false };

fn ix(volume: usize) -> VolumeIx {
    VolumeIx(u8::try_from(volume).expect("few volumes"))
}

impl World {
    /// Gives a command without waiting for the answer.
    pub fn tell(&mut self, n: usize, command: Command) -> u64 {
        self.next_command += 1;
        let id = self.next_command;
        self.watch_command(n, id, &command);
        self.command_began = self.trace.count();
        self.handle(n, Event::Command { id: CommandId(id), command });
        self.command_began = u64::MAX;
        id
    }

    /// The answer to a command, if it has come.
    pub fn reply(&self, n: usize, id: u64) -> Option<Result<Reply, Refusal>> {
        self.nodes[n].replies.get(&id).cloned()
    }

    /// Gives a command and waits for the answer.
    ///
    /// # Errors
    /// The refusal.
    pub fn ask(&mut self, n: usize, command: Command) -> Result<Reply, Refusal> {
        let what = format!("answer to {command:?} on node {n}");
        let id = self.tell(n, command);
        self.run_until(&what, COMMAND_LIMIT, |w| w.reply(n, id).is_some());
        self.reply(n, id).expect("it was just seen")
    }

    /// Gives a command that has to be carried out.
    pub fn must(&mut self, n: usize, command: Command) {
        let words = format!("{command:?}");
        if let Err(refusal) = self.ask(n, command) {
            panic!("{words} on node {n} was refused: {refusal:?}");
        }
    }

    /// The command that gives a running node other options.
    #[must_use]
    pub fn adjust(&self, n: usize, resource: ResourceConfig) -> Command {
        Command::Adjust(Box::new(EngineConfig {
            resource,
            node: String::from("node"),
            backing: Vec::new(),
            handlers: HandlersConfig::default(),
            local: SocketAddr::from(([127, 0, 0, 1], 7788)),
            remote: SocketAddr::from(([127, 0, 0, 1], 7789)),
            frontend: Frontend::Nbd(NbdAddress::Unix(String::from("nbd"))),
            queue_depth: self.nodes[n].setup.queue_depth,
            max_io_size: 1 << 17,
            run_dir: String::new(),
        }))
    }

    /// Gives a command that has to be refused, and returns the refusal.
    pub fn must_not(&mut self, n: usize, command: Command) -> Refusal {
        let words = format!("{command:?}");
        match self.ask(n, command) {
            Ok(reply) => panic!("{words} on node {n} was not refused but answered {reply:?}"),
            Err(refusal) => refusal,
        }
    }

    /// Whether the process runs.
    #[must_use]
    pub fn is_alive(&self, n: usize) -> bool {
        self.nodes[n].resource.is_some()
    }

    /// The state of a volume.
    ///
    /// # Panics
    /// If no process runs.
    #[must_use]
    pub fn state(&self, n: usize, volume: usize) -> State {
        let resource = self.nodes[n].resource.as_ref().expect("a process runs");
        resource.state(ix(volume)).expect("a volume of the setup")
    }

    /// The connection state of the first volume.
    #[must_use]
    pub fn conn(&self, n: usize) -> Conn {
        self.state(n, 0).conn
    }

    /// The status of a node.
    ///
    /// # Panics
    /// If no process runs.
    #[must_use]
    pub fn status(&self, n: usize) -> Status {
        let now = self.local(n);
        self.nodes[n].resource.as_ref().expect("a process runs").status(now)
    }

    /// Whether both nodes live and all volumes have the state on both.
    pub fn all(&self, mut wanted: impl FnMut(State) -> bool) -> bool {
        [A, B].iter().all(|n| {
            self.is_alive(*n) && (0..self.volumes()).all(|volume| wanted(self.state(*n, volume)))
        })
    }

    /// Whether all volumes are connected and up to date on both nodes.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        (0..self.volumes()).all(|volume| self.is_volume_synced(volume))
    }

    /// Whether a volume is connected and up to date on both nodes.
    #[must_use]
    pub fn is_volume_synced(&self, volume: usize) -> bool {
        [A, B].iter().all(|n| {
            self.is_alive(*n) && {
                let s = self.state(*n, volume);
                s.conn == Conn::Connected && s.disk == Disk::UpToDate && s.pdsk == Disk::UpToDate
            }
        })
    }

    /// Starts both nodes with `up` and waits until they are connected.
    pub fn up_both(&mut self) {
        for n in [A, B] {
            self.boot(n);
            self.must(n, Command::Up);
        }
        self.wait_connected();
    }

    /// Starts a node again after a crash, with `up`.
    pub fn restart(&mut self, n: usize) {
        self.boot(n);
        self.check_resize(n);
        self.must(n, Command::Up);
    }

    /// Waits until both nodes are connected.
    pub fn wait_connected(&mut self) {
        let limit = Span::from_secs(60);
        self.run_until("both nodes connected", limit, |w| w.all(|s| s.conn >= Conn::Connected));
    }

    /// Waits until both nodes are connected and up to date, and holds the checks of that state.
    pub fn wait_synced(&mut self) {
        let limit = Span::from_secs(600);
        self.run_until("both nodes UpToDate and at rest", limit, |w| w.is_synced() && w.is_quiet());
        self.check_synced();
    }

    /// Both nodes up, the fresh disks declared equal without a resync, the first one Primary.
    pub fn start_synced(&mut self) {
        self.up_both();
        self.must(A, Command::NewCurrentUuid { volume: None, clear_bitmap: true });
        self.wait_synced();
        self.must(A, Command::Primary { force: false });
        self.settle();
    }

    /// Waits until nothing is under way.
    pub fn settle(&mut self) {
        self.run_until("rest", Span::from_secs(60), |w| w.is_quiet());
    }

    /// Waits until a log line of the node contains the words.
    pub fn wait_log(&mut self, n: usize, words: &str) {
        let what = format!("log line \"{words}\" on node {n}");
        self.run_until(&what, Span::from_secs(60), |w| w.has_logged(n, words));
    }

    /// Whether a log line of the node contains the words.
    #[must_use]
    pub fn has_logged(&self, n: usize, words: &str) -> bool {
        self.nodes[n].log.iter().any(|line| line.contains(words))
    }

    /// Cuts the link in both directions, silently.
    pub fn cut(&mut self) {
        self.note(A, "=== link cut");
        self.net.cut_towards(A);
        self.net.cut_towards(B);
    }

    /// Heals the link.
    pub fn heal(&mut self) {
        self.note(A, "=== link healed");
        self.net.heal(self.now);
    }
}
