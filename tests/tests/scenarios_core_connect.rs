//! How a pair of sockets comes about, one event at a time (WP-7).

use replication_core::action::Action;
use replication_core::config::{NetConfig, ResourceConfig};
use replication_core::control::Command;
use replication_core::event::{CommandId, DialId, Event, SockId};
use replication_core::resource::{Memory, Resource};
use replication_core::units::{Errno, Span, Time, VolumeNr};
use replication_core::wire::{AlgName, Packet, Protocol, ReplicationProtocol, features};
use tests::sim::A;
use tests::sim::rng::Rng;
use tests::sim::setup::Setup;

/// A node without disks, and the time.
struct Node {
    resource: Resource,
    now: Time,
}

impl Node {
    /// It looks for its peer; the first dial is under way.
    fn connecting(keeps_own_dial: bool) -> Self {
        Self::connecting_with(|net| net.keeps_own_dial = keeps_own_dial)
    }

    fn connecting_with(change: impl FnOnce(&mut NetConfig)) -> Self {
        let mut setup = Setup::default();
        setup.diskless(A);
        let mut config: ResourceConfig = setup.nodes[A].config.clone();
        change(&mut config.net);
        let memory = Memory { first_pool_page: 64, pool_pages: 1024, queue_depth: 4 };
        let resource = Resource::new(config, memory, Box::new(Rng::new(1))).expect("a valid setup");
        let mut node = Self { resource, now: Time(1_000_000_000) };
        let command = Command::Connect { discard_my_data: false };
        let out = node.handle(Event::Command { id: CommandId(1), command });
        assert_eq!(dialed(&out), Some(DialId(0)));
        node
    }

    fn handle(&mut self, event: Event<'_>) -> Vec<Action> {
        let mut out = Vec::new();
        self.resource.handle(self.now, event, &mut out);
        out
    }

    fn pass(&mut self, span: Span) -> Vec<Action> {
        self.now = self.now + span;
        self.handle(Event::Tick)
    }

    fn first_packet(&mut self, sock: SockId, packet: Packet) -> Vec<Action> {
        assert!(self.resource.may_receive(sock), "its first packet may be read");
        self.handle(Event::Packet { sock, volume: VolumeNr(0), packet, payload: None })
    }
}

fn dialed(out: &[Action]) -> Option<DialId> {
    out.iter().find_map(|action| match action {
        Action::Dial { dial } => Some(*dial),
        _ => None,
    })
}

fn closes(out: &[Action], wanted: SockId) -> bool {
    out.iter().any(|action| matches!(action, Action::Close { sock } if *sock == wanted))
}

fn sends(out: &[Action], name: &str) -> Option<SockId> {
    out.iter().find_map(|action| match action {
        Action::Send { sock, packet, .. } if packet.name() == name => Some(*sock),
        _ => None,
    })
}

/// This node's own attempt hangs, as when its packets are dropped on the way: the peer's sockets
/// are taken all the same, and the connection comes about.
#[test]
fn a_hanging_attempt_does_not_keep_the_peer_out() {
    let mut node = Node::connecting(true);
    node.handle(Event::Accepted { sock: SockId(1) });
    let out = node.pass(Span::from_ms(1_900));
    assert!(!closes(&out, SockId(1)));
    let out = node.first_packet(SockId(1), Packet::InitialData);
    assert!(!closes(&out, SockId(1)));
    node.pass(Span::from_secs(5));
    node.handle(Event::Accepted { sock: SockId(2) });
    node.first_packet(SockId(2), Packet::InitialMeta);
    let out = node.pass(Span::from_secs(1));
    assert_eq!(sends(&out, "P_CONNECTION_FEATURES"), Some(SockId(1)));
    let late = Event::DialDone { dial: DialId(0), result: Ok(SockId(3)) };
    assert!(closes(&node.handle(late), SockId(3)), "it comes too late");
}

/// What dials in and says nothing is closed, also while an attempt hangs.
#[test]
fn a_silent_stranger_is_closed_while_dialing() {
    let mut node = Node::connecting(true);
    node.handle(Event::Accepted { sock: SockId(1) });
    assert!(closes(&node.pass(Span::from_ms(2_100)), SockId(1)));
}

/// The peer's socket came first: this node's own attempt becomes the other one of the pair.
#[test]
fn an_own_attempt_that_ends_later_completes_the_pair() {
    let mut node = Node::connecting(true);
    node.handle(Event::Accepted { sock: SockId(1) });
    node.first_packet(SockId(1), Packet::InitialData);
    let out = node.handle(Event::DialDone { dial: DialId(0), result: Ok(SockId(2)) });
    assert_eq!(sends(&out, "P_INITIAL_META"), Some(SockId(2)));
    let out = node.pass(Span::from_secs(1));
    assert_eq!(sends(&out, "P_CONNECTION_FEATURES"), Some(SockId(1)));
}

/// Both dialed at once, and this node keeps its own: a peer that dials again has not got it, and
/// is not turned down a second time.
#[test]
fn a_peer_that_comes_again_is_taken() {
    let mut node = Node::connecting(true);
    let out = node.handle(Event::DialDone { dial: DialId(0), result: Ok(SockId(1)) });
    assert_eq!(sends(&out, "P_INITIAL_DATA"), Some(SockId(1)));
    node.handle(Event::Accepted { sock: SockId(2) });
    assert!(closes(&node.first_packet(SockId(2), Packet::InitialData), SockId(2)));
    node.handle(Event::Accepted { sock: SockId(3) });
    let out = node.first_packet(SockId(3), Packet::InitialData);
    assert!(closes(&out, SockId(1)) && !closes(&out, SockId(3)));
    let dial = dialed(&out).expect("the other socket is this node's to dial");
    let out = node.handle(Event::DialDone { dial, result: Err(Errno(111)) });
    assert!(!closes(&out, SockId(3)));
}

/// A pair of sockets, and the versions agreed upon; nothing was heard of the peer's options.
fn agreed(mut node: Node) -> Node {
    for (sock, packet) in [(1, Packet::InitialData), (2, Packet::InitialMeta)] {
        node.handle(Event::Accepted { sock: SockId(sock) });
        node.first_packet(SockId(sock), packet);
    }
    node.pass(Span::from_secs(1));
    let out = node.first_packet(SockId(1), Packet::ConnectionFeatures(features::ours()));
    assert_eq!(sends(&out, "P_PROTOCOL"), Some(SockId(1)));
    node
}

/// Whoever holds the meta socket is not heard, and told nothing, before the peer on the data socket
/// has said that it has agreed, too: it may have died with its half of the handshake said, and a
/// stranger's socket have become the other one of the pair (WP-2). He was pinged.
#[test]
fn the_meta_socket_waits_for_the_peers_consent() {
    let mut node = agreed(Node::connecting(true));
    assert!(!node.resource.may_receive(SockId(2)));
    let wanted = node.resource.next_deadline().expect("it does not wait for ever");
    let out = node.pass(wanted.since(node.now));
    assert!(closes(&out, SockId(1)) && closes(&out, SockId(2)), "{out:?}");
    assert_eq!(sends(&out, "P_PING"), None);
}

/// From the first word of the peer's options on the meta socket is what it is for, and silence is
/// asked about there (WP-6).
#[test]
fn the_meta_socket_is_in_use_after_the_peers_consent() {
    let mut node = agreed(Node::connecting(true));
    let options = Protocol {
        protocol: ReplicationProtocol::C,
        after_sb_0pri: 0,
        after_sb_1pri: 0,
        after_sb_2pri: 0,
        discard_my_data: false,
        dry_run: false,
        two_primaries: false,
        integrity_alg: AlgName::new(),
    };
    node.first_packet(SockId(1), Packet::Protocol(options));
    let out = node.first_packet(SockId(2), Packet::Ping);
    assert_eq!(sends(&out, "P_PING_ACK"), Some(SockId(2)));
    let wanted = node.resource.next_deadline().expect("silence is bounded");
    let out = node.pass(wanted.since(node.now));
    assert_eq!(sends(&out, "P_PING"), Some(SockId(2)));
}

/// What comes before the peer's options breaks the protocol.
#[test]
fn nothing_comes_before_the_peers_options() {
    let mut node = agreed(Node::connecting(true));
    let out = node.first_packet(SockId(1), Packet::State(0));
    assert!(closes(&out, SockId(1)) && closes(&out, SockId(2)), "{out:?}");
}

/// The system accepts nothing of what is said to the peer: it is given up when configured, although
/// its options might come for longer (WP-6). Nothing was done at that time, and it was asked for
/// again and again.
#[test]
fn a_peer_that_takes_no_options_is_given_up() {
    let impatient = |net: &mut NetConfig| (net.timeout, net.ko_count) = (Span::from_ms(600), 1);
    let mut node = agreed(Node::connecting_with(impatient));
    let wanted = node.resource.next_deadline().expect("it does not wait for ever");
    let wait = wanted.since(node.now);
    assert!(wait <= Span::from_ms(600), "{wait:?}");
    let out = node.pass(wait);
    assert!(closes(&out, SockId(1)) && closes(&out, SockId(2)), "{out:?}");
}
