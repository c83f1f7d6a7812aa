//! Stands between the two engines on all their sockets, and does to them what the plan says.
//!
//! An engine only talks to the address of its configured peer. So each node has a network name
//! space of its own as neighbour, in which the peer's address is that of the relay: what a node
//! dials ends there, and what the relay dials comes from there. Neither configuration differs from
//! that of a production pair.
//!
//! Each direction of each connection is a thread with a stream of chance of its own, derived from
//! the seed, the number of the connection and the direction.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::libc::linger;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};
use replication_core::wire::{Command, Stream};

use super::frames::{Frames, Span};
use super::plan::{Class, Due, Ends, Fault, Kind, Mix, pick_bit};
use crate::sim::rng::{Rng, mix};

/// How long a thread waits for its socket before it looks around.
const LOOK: Duration = Duration::from_millis(10);
/// Longest wait for a connection that the relay dials.
const DIAL: Duration = Duration::from_secs(2);
/// Lines that are kept of what was done.
const JOURNAL: usize = 300;

/// The place of the relay on one side.
#[derive(Clone, Debug)]
pub struct Side {
    /// The name space beside the node.
    pub space: PathBuf,
    /// The peer's address, held by the relay there.
    pub own: SocketAddr,
    /// The node's address.
    pub node: SocketAddr,
}

/// What becomes of connections that the nodes dial.
#[derive(Debug)]
enum Mode {
    /// They are passed on to the other node.
    Through,
    /// They are reset.
    Closed,
    /// Those of one side are given away, the other ones are reset.
    Given(usize, mpsc::Sender<TcpStream>),
}

/// The relay: what its threads share.
#[derive(Debug)]
pub struct Relay {
    sides: [Side; 2],
    seed: u64,
    begun: Instant,
    mode: Mutex<Mode>,
    mix: Mutex<Mix>,
    /// Counts changes of the mix.
    mixed: AtomicU64,
    /// Counts orders to reset everything.
    cuts: AtomicU64,
    /// Payload is to be changed this many times, whatever the mix is.
    payload_flips: AtomicU64,
    connections: AtomicU64,
    done: Mutex<Vec<(Kind, u64)>>,
    journal: Mutex<VecDeque<String>>,
}

/// A lock that nobody holds while something can fail.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread of the relay panics with a lock held")
}

/// Puts this thread into a network name space.
///
/// # Errors
/// The name space is not there, or this process may not enter it.
pub fn enter(space: &PathBuf) -> Result<()> {
    let file = File::open(space).with_context(|| format!("open {}", space.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", space.display()))
}

/// Makes the end of a socket a reset.
pub fn end_by_reset(socket: &TcpStream) {
    let at_once = linger { l_onoff: 1, l_linger: 0 };
    // A socket that cannot take the option is gone already.
    let _ = setsockopt(socket, sockopt::Linger, &at_once);
}

impl Relay {
    /// Listens on both sides; nothing is disturbed yet.
    ///
    /// # Errors
    /// The name spaces or addresses are not there.
    pub fn start(sides: [Side; 2], seed: u64) -> Result<Arc<Self>> {
        let relay = Arc::new(Self {
            sides,
            seed,
            begun: Instant::now(),
            mode: Mutex::new(Mode::Through),
            mix: Mutex::new(Mix::default()),
            mixed: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            payload_flips: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            done: Mutex::new(Kind::ALL.map(|kind| (kind, 0)).to_vec()),
            journal: Mutex::new(VecDeque::new()),
        });
        for side in 0..2 {
            let (ready, is_ready) = mpsc::channel();
            let of_thread = Arc::clone(&relay);
            std::thread::spawn(move || of_thread.listen(side, &ready));
            is_ready.recv().context("the listening thread ended")??;
        }
        Ok(relay)
    }

    /// The side of a node.
    #[must_use]
    pub const fn side(&self, node: usize) -> &Side {
        &self.sides[node]
    }

    /// From now on these faults happen; none of an earlier mix goes on.
    pub fn disturb(&self, kinds: &[Kind]) {
        *lock(&self.mix) = Mix::of(kinds);
        self.mixed.fetch_add(1, Ordering::SeqCst);
    }

    /// Changes one bit of bulk data as soon as there is any, this many times.
    pub fn flip_payload(&self, times: u64) {
        self.payload_flips.fetch_add(times, Ordering::SeqCst);
    }

    /// Resets every connection.
    pub fn cut(&self) {
        self.cuts.fetch_add(1, Ordering::SeqCst);
        self.say("every connection is reset");
    }

    /// Passes connections on.
    pub fn open(&self) {
        *lock(&self.mode) = Mode::Through;
    }

    /// Resets every connection, and every new one.
    pub fn close(&self) {
        *lock(&self.mode) = Mode::Closed;
        self.cut();
    }

    /// The same, but what `node` dials comes out of the channel.
    pub fn give(&self, node: usize) -> mpsc::Receiver<TcpStream> {
        let (sender, receiver) = mpsc::channel();
        *lock(&self.mode) = Mode::Given(node, sender);
        self.cut();
        receiver
    }

    /// How often each kind of fault happened.
    #[must_use]
    pub fn tally(&self) -> Vec<(Kind, u64)> {
        lock(&self.done).clone()
    }

    /// Connections passed on so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }

    /// Notes what happens, for whoever has to find out why.
    pub fn say(&self, text: &str) {
        let mut journal = lock(&self.journal);
        if journal.len() == JOURNAL {
            journal.pop_front();
        }
        journal.push_back(format!("{:9.3} {text}", self.begun.elapsed().as_secs_f64()));
    }

    /// What happened last.
    #[must_use]
    pub fn journal(&self) -> Vec<String> {
        lock(&self.journal).iter().cloned().collect()
    }

    fn count(&self, kind: Kind) {
        for (counted, times) in lock(&self.done).iter_mut() {
            *times += u64::from(*counted == kind);
        }
    }

    fn listen(self: Arc<Self>, side: usize, ready: &mpsc::Sender<Result<()>>) {
        let own = self.sides[side].own;
        let listener = enter(&self.sides[side].space)
            .and_then(|()| TcpListener::bind(own).with_context(|| format!("listen on {own}")));
        let listener = match listener {
            Ok(listener) => listener,
            Err(error) => {
                // Whoever waits says so.
                let _ = ready.send(Err(error));
                return;
            }
        };
        if ready.send(Ok(())).is_err() {
            return;
        }
        for socket in listener.incoming() {
            let Ok(socket) = socket else { continue };
            match &*lock(&self.mode) {
                Mode::Through => {
                    let relay = Arc::clone(&self);
                    std::thread::spawn(move || relay.pass_on(side, socket));
                }
                Mode::Given(node, taker) if *node == side => {
                    // Nobody takes it any more: it ends here.
                    let _ = taker.send(socket);
                }
                Mode::Closed | Mode::Given(..) => end_by_reset(&socket),
            }
        }
    }

    /// Connects what the node of `side` has dialed to the other node.
    fn pass_on(self: Arc<Self>, side: usize, caller: TcpStream) {
        let other = &self.sides[1 - side];
        let callee = enter(&other.space).and_then(|()| {
            TcpStream::connect_timeout(&other.node, DIAL).context("the other node does not listen")
        });
        let Ok(callee) = callee else {
            end_by_reset(&caller);
            return;
        };
        for socket in [&caller, &callee] {
            let result = socket
                .set_nodelay(true)
                .and_then(|()| socket.set_read_timeout(Some(LOOK)))
                .and_then(|()| socket.set_write_timeout(Some(LOOK)));
            if result.is_err() {
                return;
            }
        }
        let number = self.connections.fetch_add(1, Ordering::SeqCst);
        let cuts = self.cuts.load(Ordering::SeqCst);
        let link = Arc::new(Link {
            name: format!("connection {number} of {}", ["alice", "bob"][side]),
            sockets: [caller, callee],
            stream: AtomicU8::new(0),
            is_over: AtomicBool::new(false),
            is_half: AtomicBool::new(false),
            stalled: Mutex::new(None),
            cuts,
        });
        let back = Pipe::new(&self, &link, 1, number);
        std::thread::spawn(move || back.run());
        Pipe::new(&self, &link, 0, number).run();
    }
}

/// A connection and its two sockets, which close when both directions are done.
#[derive(Debug)]
struct Link {
    name: String,
    /// Of whoever dialed, and of whoever was dialed.
    sockets: [TcpStream; 2],
    /// 1 data, 2 meta, as its first packet says.
    stream: AtomicU8,
    is_over: AtomicBool,
    /// One direction was ended by a fault: with the other one, everything ends.
    is_half: AtomicBool,
    stalled: Mutex<Option<Instant>>,
    cuts: u64,
}

impl Link {
    fn reset(&self, ends: Ends) {
        let [caller, callee] = &self.sockets;
        if ends != Ends::Callee {
            end_by_reset(caller);
        }
        if ends != Ends::Caller {
            end_by_reset(callee);
        }
        self.is_over.store(true, Ordering::SeqCst);
    }

    fn stream(&self) -> Option<Stream> {
        match self.stream.load(Ordering::SeqCst) {
            1 => Some(Stream::Data),
            2 => Some(Stream::Meta),
            _ => None,
        }
    }

    fn learn(&self, spans: &[Span]) {
        for span in spans {
            let number = match span.head.kind() {
                Some(Command::InitialData) => 1,
                Some(Command::InitialMeta) => 2,
                _ => continue,
            };
            self.stream.store(number, Ordering::SeqCst);
        }
    }
}

/// One direction of a connection.
#[derive(Debug)]
struct Pipe {
    relay: Arc<Relay>,
    link: Arc<Link>,
    /// The socket that is read: 0 or 1.
    from: usize,
    frames: Frames,
    rng: Rng,
    /// The mix that `due` was drawn from.
    mixed: u64,
    due: Option<(Due, Instant)>,
    passed: u64,
    /// Bytes that still go one by one.
    trickle: u32,
    /// Nothing is passed on any more: what comes is drained, or left.
    half_closed: Option<bool>,
}

impl Pipe {
    fn new(relay: &Arc<Relay>, link: &Arc<Link>, from: usize, number: u64) -> Self {
        let direction = u64::try_from(from).expect("0 or 1");
        Self {
            relay: Arc::clone(relay),
            link: Arc::clone(link),
            from,
            frames: Frames::default(),
            rng: Rng::new(mix(relay.seed ^ mix(2 * number + direction))),
            mixed: u64::MAX,
            due: None,
            passed: 0,
            trickle: 0,
            half_closed: None,
        }
    }

    fn run(mut self) {
        let mut buffer = vec![0; 1 << 16];
        while !self.is_over() {
            self.renew();
            if self.half_closed == Some(false) {
                std::thread::park_timeout(LOOK);
                continue;
            }
            match (&self.link.sockets[self.from]).read(&mut buffer) {
                Ok(0) => {
                    // The end passes like everything else; the other direction may go on. An error
                    // means that there is nobody left to hear of it.
                    let _ = self.link.sockets[1 - self.from].shutdown(Shutdown::Write);
                    if self.link.is_half.load(Ordering::SeqCst) {
                        self.link.is_over.store(true, Ordering::SeqCst);
                    }
                    return;
                }
                Ok(_) if self.half_closed.is_some() => {}
                Ok(count) => self.pass(&mut buffer[..count]),
                Err(e) if is_timeout(&e) => self.strike_in_time(),
                Err(_) => self.link.reset(Ends::Both),
            }
        }
    }

    fn is_over(&self) -> bool {
        if self.relay.cuts.load(Ordering::SeqCst) != self.link.cuts {
            self.link.reset(Ends::Both);
        }
        self.link.is_over.load(Ordering::SeqCst)
    }

    /// Draws the next fault if the mix has changed.
    fn renew(&mut self) {
        let mixed = self.relay.mixed.load(Ordering::SeqCst);
        if mixed != self.mixed {
            self.mixed = mixed;
            self.trickle = 0;
            self.draw();
        }
    }

    fn draw(&mut self) {
        let due = lock(&self.relay.mix).draw(&mut self.rng, self.passed);
        self.due = due.map(|due| (due, Instant::now() + due.within));
    }

    /// Passes bytes on, with what happens among them.
    fn pass(&mut self, chunk: &mut [u8]) {
        let spans = self.frames.take(chunk);
        self.link.learn(&spans);
        self.flip_if_ordered(chunk, &spans);
        let count = u64::try_from(chunk.len()).expect("a chunk is small");
        let at = match &self.due {
            Some((due, by)) if due.at < self.passed + count || Instant::now() >= *by => {
                due.at.saturating_sub(self.passed).min(count)
            }
            Some(_) | None => {
                self.send(chunk);
                return;
            }
        };
        let at = usize::try_from(at).expect("within the chunk");
        if let Some((Due { kind, fault: Fault::Flip(class), .. }, _)) = self.due {
            if self.flip(class, chunk, &spans) {
                self.relay.count(kind);
                self.draw();
            }
            self.send(chunk);
            return;
        }
        self.send(&chunk[..at]);
        self.strike();
        if self.half_closed.is_none() {
            self.send(&chunk[at..]);
        }
    }

    /// No byte has come for a while: what does not need one happens when its time has come.
    fn strike_in_time(&mut self) {
        let is_flip = |due: &Due| matches!(due.fault, Fault::Flip(_));
        if self.due.is_some_and(|(due, by)| !is_flip(&due) && Instant::now() >= by) {
            self.strike();
        }
    }

    fn strike(&mut self) {
        let Some((due, _)) = self.due.take() else { return };
        if self.is_over() {
            return;
        }
        self.note(&due.fault.to_string());
        self.relay.count(due.kind);
        match due.fault {
            Fault::Reset(ends) => self.link.reset(ends),
            Fault::HalfClose { drain } => {
                // An error means that the socket has ended anyway.
                let _ = self.link.sockets[1 - self.from].shutdown(Shutdown::Write);
                self.link.is_half.store(true, Ordering::SeqCst);
                self.half_closed = Some(drain);
            }
            Fault::Trickle { bytes } => self.trickle = bytes,
            Fault::Stall { time, both } => {
                let until = Instant::now() + time;
                if both {
                    *lock(&self.link.stalled) = Some(until);
                } else {
                    self.wait_until(until);
                }
            }
            Fault::Flip(_) => unreachable!("flips wait for their byte"),
        }
        self.draw();
    }

    fn flip_if_ordered(&mut self, chunk: &mut [u8], spans: &[Span]) {
        let orders = &self.relay.payload_flips;
        if orders.load(Ordering::SeqCst) > 0 && self.flip(Class::Payload, chunk, spans) {
            self.relay.payload_flips.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn flip(&mut self, class: Class, chunk: &mut [u8], spans: &[Span]) -> bool {
        let Some(stream) = self.link.stream() else { return false };
        let Some((at, bit)) = pick_bit(class, stream, spans, &mut self.rng) else { return false };
        chunk[at] ^= 1 << bit;
        let of = spans.iter().find(|span| span.at.contains(&at)).map(|span| {
            let name = span.head.kind().map_or("an unknown packet", Command::name);
            let into = u64::try_from(at - span.at.start).expect("a small number");
            format!("{name}, byte {}", span.offset + into)
        });
        let of = of.unwrap_or_default();
        self.note(&format!("flip of {class:?} on the {stream} socket: {of}, bit {bit}"));
        true
    }

    fn note(&self, text: &str) {
        let direction = if self.from == 0 { "forth" } else { "back" };
        let (name, passed) = (&self.link.name, self.passed);
        self.relay.say(&format!("{name}, {direction}, after {passed} bytes: {text}"));
    }

    /// Waits, unless the connection ends or the faults do.
    fn wait_until(&self, until: Instant) {
        while Instant::now() < until && !self.is_over() && !self.is_new_mix() {
            std::thread::park_timeout(LOOK);
        }
    }

    fn is_new_mix(&self) -> bool {
        self.relay.mixed.load(Ordering::SeqCst) != self.mixed
    }

    fn send(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.is_over() {
            let stalled = *lock(&self.link.stalled);
            if let Some(until) = stalled {
                self.wait_until(until);
                *lock(&self.link.stalled) = None;
            }
            let count = if self.trickle > 0 && !self.is_new_mix() {
                std::thread::park_timeout(Duration::from_millis(self.rng.below(4)));
                self.trickle -= 1;
                1
            } else {
                bytes.len()
            };
            match (&self.link.sockets[1 - self.from]).write(&bytes[..count]) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    self.passed += u64::try_from(count).expect("a chunk is small");
                }
                Err(e) if is_timeout(&e) => {}
                Err(_) => self.link.reset(Ends::Both),
            }
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
