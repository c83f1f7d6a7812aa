//! A peer that says anything, to a core with an attached disk (WP-1, WP-2, WP-4).
//!
//! [`connection`] begins before the handshake with raw bytes on two sockets; [`session`] takes
//! over an established connection in one of several states and speaks in packets, so that lengths
//! and checksums of the framing do not stand in the way. Between packets, disk operations end,
//! time passes, the host writes. Whatever is said, the core lives on, and comes to rest.

use replication_core::control::Command;
use replication_core::event::{HostOp, SockId};
use replication_core::state::Conn;
use replication_core::wire::Command as Code;

use super::Bytes;
use crate::crash::history::{History, extents, fresh, setup};
use crate::crash::pair::Pair;

/// Steps of the core between two pieces of input.
const STEPS: usize = 40;

/// Raw bytes to a core that waits for its peer.
pub fn connection(data: &[u8]) {
    let mut bytes = Bytes(data);
    let setup = setup(extents(1));
    let node = setup.nodes[0].clone();
    let image = fresh(&node);
    let mut pair = Pair::new(u64::from(bytes.u8()), vec![(node, image)]);
    pair.tell(0, Command::Up);
    run(&mut pair, 200);
    let socks = [pair.knock(0), pair.knock(0)];
    run(&mut pair, STEPS);
    while !bytes.is_empty() {
        let head = bytes.u8();
        match head % 16 {
            0..=7 => {
                let length = usize::from(bytes.u16());
                pair.inject(0, socks[usize::from(head % 2)], bytes.take(length));
            }
            8 => pair.end(0, socks[0]),
            9 => pair.end(0, socks[1]),
            10 => drop(pair.tell(0, Command::Primary { force: true })),
            11 => drop(pair.tell(0, Command::Disconnect { force: false })),
            12..=13 => run(&mut pair, usize::from(bytes.u8())),
            _ => host(&mut pair, 0, &mut bytes),
        }
        run(&mut pair, STEPS);
    }
    rest(&mut pair);
}

/// Packets within an established connection.
pub fn session(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (state, seed) = (bytes.u8(), u64::from(bytes.u8()));
    let victim = usize::from(state % 2);
    let mut pair = taken_over(state / 2, seed);
    let socks: Vec<SockId> = pair.nodes[victim].socks().collect();
    while !bytes.is_empty() {
        let head = bytes.u8();
        match head % 16 {
            0..=9 => {
                let node = &pair.nodes[victim];
                let packet = match head / 16 % 4 {
                    0 => answer(&mut bytes, &node.wanted),
                    _ => packet(&mut bytes),
                };
                let socks = socks.get(usize::from(head % 2)).or_else(|| socks.first());
                if let Some(sock) = socks {
                    pair.inject(victim, *sock, &packet);
                }
            }
            10 => run(&mut pair, 1),
            11 => drop(pair.tell(victim, Command::Secondary { holder: None })),
            12 => drop(pair.tell(victim, Command::Detach { volume: None, force: head > 127 })),
            13 => drop(pair.tell(victim, Command::Attach(None))),
            _ => host(&mut pair, victim, &mut bytes),
        }
        if head < 192 {
            run(&mut pair, STEPS);
        }
    }
    rest(&mut pair);
}

/// Two nodes in a state to begin with; nothing gets from one to the other any more.
fn taken_over(state: u8, seed: u64) -> Pair {
    let mut history = History::synced(seed, &setup(extents(1)));
    if !state.is_multiple_of(4) {
        history.link(false);
        for start in 0..8 {
            history.write_and_wait(0, start * 512, 16);
        }
        history.link(true);
        let wanted = match state % 4 {
            1 => Conn::WFBitMapS,
            2 => Conn::SyncSource,
            _ => Conn::Connected,
        };
        history.until("the state", |pair| pair.nodes[0].state().conn >= wanted);
    }
    history.pair.part();
    history.pair
}

/// A packet of the newest header format.
pub(crate) fn framed(code: Code, volume: u16, body: &[u8]) -> Vec<u8> {
    let mut out = 0x8620_ec20_u32.to_be_bytes().to_vec();
    out.extend_from_slice(&volume.to_be_bytes());
    out.extend_from_slice(&code.code().to_be_bytes());
    let length = u32::try_from(body.len()).expect("a short body");
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(body);
    out
}

fn code(bytes: &mut Bytes<'_>) -> Code {
    Code::ALL[usize::from(bytes.u8()) % Code::ALL.len()]
}

/// A packet: a command, a volume, and any body.
pub(crate) fn packet(bytes: &mut Bytes<'_>) -> Vec<u8> {
    let code = code(bytes);
    let volume = u16::from(bytes.u8() / 250);
    let length = usize::from(bytes.u8()) + if bytes.u8() > 250 { 4096 } else { 0 };
    framed(code, volume, bytes.take(length))
}

/// A packet that answers to something the core asked for, or nearly so.
pub(crate) fn answer(bytes: &mut Bytes<'_>, wanted: &[(u64, u64, u32)]) -> Vec<u8> {
    let code = code(bytes);
    let (which, twist) = (usize::from(bytes.u8()), bytes.u8());
    let last = wanted.len().checked_sub(1).map(|last| last - which % wanted.len());
    let (mut sector, mut id, mut size) = last.map_or((0, 0, 4096), |at| wanted[at]);
    match twist {
        0..=15 => sector += u64::from(twist),
        16..=31 => id ^= u64::from(twist),
        32..=47 => size = u32::from(twist) * 512,
        48.. => {}
    }
    let mut body = Vec::new();
    match code {
        Code::BarrierAck => {
            body.extend_from_slice(&id.to_ne_bytes()[..4]);
            body.extend_from_slice(&u32::from(bytes.u8()).to_be_bytes());
        }
        Code::DataReply | Code::RsDataReply | Code::Data => {
            body.extend_from_slice(&sector.to_be_bytes());
            body.extend_from_slice(&id.to_ne_bytes());
            body.extend_from_slice(&[0; 8]);
            body.resize(24 + usize::try_from(size).expect("32 bits fit"), bytes.u8());
        }
        _ => {
            body.extend_from_slice(&sector.to_be_bytes());
            body.extend_from_slice(&id.to_ne_bytes());
            body.extend_from_slice(&size.to_be_bytes());
            body.extend_from_slice(&bytes.u32().to_be_bytes());
        }
    }
    framed(code, 0, &body)
}

/// A request of the host, if there is a device and a free slot.
fn host(pair: &mut Pair, n: usize, bytes: &mut Bytes<'_>) {
    let (what, start, sectors) = (bytes.u8(), u64::from(bytes.u16()), u64::from(bytes.u8() % 64));
    let op = match what % 4 {
        0 => HostOp::Read,
        1 => HostOp::Flush,
        2 => HostOp::Write { fua: what > 127 },
        _ => HostOp::WriteZeroes { unmap: what > 127 },
    };
    let range = if op == HostOp::Flush { (0, 0) } else { (start, sectors + 1) };
    if pair.nodes[n].asked.iter().any(Option::is_none) && range.0 + range.1 <= pair.nodes[n].size {
        pair.host(n, op, range.0, range.1);
    }
}

fn run(pair: &mut Pair, steps: usize) {
    for _ in 0..steps {
        if !pair.step(false) {
            return;
        }
    }
}

/// The core comes to rest, and disk operations do not go on for ever.
fn rest(pair: &mut Pair) {
    for n in 0..pair.nodes.len() {
        for sock in pair.nodes[n].socks().collect::<Vec<_>>() {
            pair.end(n, sock);
        }
    }
    let mut steps = 0;
    while pair.step(false) {
        steps += 1;
        assert!(steps < 1_000_000, "the core never comes to rest");
    }
    assert!(pair.nodes.iter().all(|node| node.jobs() == 0));
}
