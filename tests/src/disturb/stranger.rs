//! Somebody who is not the peer, at the peer's address: noise, crowds, half packets, wrong
//! secrets; and, with the right secret, a peer that has gone mad (WP-1, WP-2, WP-4).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use replication_core::units::VolumeNr;
use replication_core::wire::{
    Agreed, Command, Features, FeaturesPacket, HeaderKind, HmacAlg, Packet, auth, encode,
};

use super::frames::Head;
use super::madness::Session;
use super::relay::{Relay, end_by_reset, enter};
use crate::fuzz::Bytes;
use crate::fuzz::peer::{framed, packet};
use crate::sim::rng::Rng;

/// How long an engine may take for the next step of a handshake.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long the stranger waits for something that may not come.
const SHORT: Duration = Duration::from_millis(20);
/// Connections of a crowd.
const CROWD: u64 = 40;

/// Where the stranger is, and what it knows.
#[derive(Debug)]
pub struct Place {
    /// The name space in which it has the peer's address.
    pub space: PathBuf,
    /// The engine.
    pub target: SocketAddr,
    /// The secret of the pair.
    pub secret: &'static str,
}

/// Whom it plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Somebody without the secret.
    Nobody,
    /// The peer, as Secondary.
    Secondary,
    /// The peer, as Primary.
    Primary,
}

/// What came of the attempts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    /// Attempts of any kind.
    pub attempts: u64,
    /// Handshakes that came to an end: the engine took the stranger for its peer.
    pub accepted: u64,
    /// Packets sent behind such a handshake.
    pub packets: u64,
}

/// Somebody at the peer's address.
#[derive(Debug)]
pub struct Stranger<'a> {
    place: Place,
    mask: Mask,
    rng: Rng,
    /// What the engine dials.
    incoming: Receiver<TcpStream>,
    relay: &'a Relay,
    score: Score,
}

/// Both sockets of a handshake that has come so far.
#[derive(Debug)]
struct Pair {
    data: TcpStream,
    meta: TcpStream,
}

fn agreed() -> Agreed {
    Agreed { version: 101, features: Features::OURS, ..Agreed::NOTHING }
}

pub(super) fn wire(packet: &Packet, kind: HeaderKind) -> Vec<u8> {
    let mut out = Vec::new();
    encode(packet, VolumeNr(0), &agreed(), kind, &mut out);
    out
}

/// Reads a packet: its head and body.
fn receive(socket: &mut TcpStream) -> Result<(Head, Vec<u8>)> {
    let mut header = vec![0; 8];
    socket.read_exact(&mut header)?;
    if header.starts_with(&[0x86]) {
        header.resize(16, 0);
        socket.read_exact(&mut header[8..])?;
    }
    let head = Head::parse(&header).context("no packet")?;
    ensure!(head.length <= 2 << 20, "a packet of {} bytes", head.length);
    let mut body = vec![0; usize::try_from(head.length)?];
    socket.read_exact(&mut body)?;
    Ok((head, body))
}

impl<'a> Stranger<'a> {
    /// Somebody who takes what the engine dials out of `incoming`.
    #[must_use]
    pub fn new(
        place: Place,
        mask: Mask,
        seed: u64,
        incoming: Receiver<TcpStream>,
        relay: &'a Relay,
    ) -> Self {
        Self { place, mask, rng: Rng::new(seed), incoming, relay, score: Score::default() }
    }

    /// Annoys the engine until told to stop.
    ///
    /// # Errors
    /// The name space is not there.
    pub fn annoy(mut self, stop: &AtomicBool) -> Result<Score> {
        enter(&self.place.space)?;
        let mut crowd = Vec::new();
        while !stop.load(Ordering::SeqCst) {
            self.score.attempts += 1;
            // What comes of an attempt does not matter: most end by the engine's refusal.
            let result = match (self.mask, self.rng.below(6)) {
                (Mask::Nobody, 0) => self.noise(),
                (Mask::Nobody, 1) => {
                    crowd = self.crowd();
                    Ok(())
                }
                (Mask::Nobody, 2) => self.half_packets(),
                (Mask::Nobody, 3) => self.bad_features(),
                (Mask::Nobody, _) => self.bad_secret(),
                (Mask::Secondary | Mask::Primary, _) => self.false_peer(stop),
            };
            if let Err(error) = result {
                self.relay.say(&format!("the stranger: {error:#}"));
            }
            if self.rng.chance(50) {
                crowd.clear();
            }
        }
        Ok(self.score)
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let length = self.rng.between(1, most);
        (0..length).map(|_| self.rng.next().to_le_bytes()[0]).collect()
    }

    fn dial(&self) -> Result<TcpStream> {
        let socket = TcpStream::connect_timeout(&self.place.target, PATIENCE);
        let socket = socket.context("the engine does not listen")?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(socket)
    }

    /// Drops what the engine has dialed.
    fn hang_up(&self) {
        for socket in self.incoming.try_iter() {
            end_by_reset(&socket);
        }
    }

    /// Random bytes, in connections of either direction.
    fn noise(&mut self) -> Result<()> {
        for _ in 0..self.rng.between(1, 8) {
            let bytes = self.bytes(5000);
            let mut socket = match self.incoming.recv_timeout(SHORT) {
                Ok(socket) => socket,
                Err(_) => self.dial()?,
            };
            if self.rng.chance(50) {
                let first = [Packet::InitialData, Packet::InitialMeta];
                let first = &first[usize::from(self.rng.chance(50))];
                socket.write_all(&wire(first, HeaderKind::H80))?;
            }
            socket.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Many connections that say nothing, or the same.
    fn crowd(&mut self) -> Vec<TcpStream> {
        let first = wire(&Packet::InitialData, HeaderKind::H80);
        let mut crowd = Vec::new();
        for _ in 0..CROWD {
            let Ok(mut socket) = self.dial() else { break };
            if self.rng.chance(30) && socket.write_all(&first).is_err() {
                continue;
            }
            crowd.push(socket);
        }
        crowd
    }

    /// Beginnings of packets, and packets that announce a lot.
    fn half_packets(&mut self) -> Result<()> {
        let mut pair = self.pair()?;
        let command = Command::ALL[usize::try_from(self.rng.below(40))? % Command::ALL.len()];
        let mut header = vec![0x83, 0x5a];
        header.extend_from_slice(&command.code().to_be_bytes());
        header.extend_from_slice(&u32::MAX.to_be_bytes());
        if self.rng.chance(50) {
            header = wire(&Packet::Ping, HeaderKind::H80);
            header.truncate(usize::try_from(self.rng.between(1, 7))?);
        }
        let socket = if self.rng.chance(50) { &mut pair.data } else { &mut pair.meta };
        socket.write_all(&header)?;
        let body = self.bytes(3000);
        let socket = if self.rng.chance(50) { &mut pair.data } else { &mut pair.meta };
        socket.write_all(&body)?;
        self.wait_for_end(&mut pair);
        Ok(())
    }

    /// Versions that nobody has, and packets that are too early.
    fn bad_features(&mut self) -> Result<()> {
        let mut pair = self.pair()?;
        receive(&mut pair.data)?;
        let number = |rng: &mut Rng| u32::try_from(rng.next() >> (32 + rng.below(32))).expect("32");
        let packet = match self.rng.below(4) {
            0 => {
                let low = number(&mut self.rng);
                let high = number(&mut self.rng);
                let features = Features(number(&mut self.rng));
                let packet = FeaturesPacket { protocol_min: low, features, protocol_max: high };
                wire(&Packet::ConnectionFeatures(packet), HeaderKind::H80)
            }
            1 => {
                let mut packet = self.features();
                let at = usize::try_from(self.rng.below(u64::try_from(packet.len())?))?;
                packet[at] ^= 1 << self.rng.below(8);
                packet
            }
            2 => {
                let bytes = self.bytes(200);
                framed(Command::Data, 0, &bytes)
            }
            _ => self.bytes(500),
        };
        pair.data.write_all(&packet)?;
        let more = self.bytes(2000);
        pair.data.write_all(&more)?;
        self.wait_for_end(&mut pair);
        Ok(())
    }

    fn features(&self) -> Vec<u8> {
        wire(&Packet::ConnectionFeatures(replication_core::wire::features::ours()), HeaderKind::H80)
    }

    /// A wrong answer, the engine's own challenge, or everything that comes after the secret.
    fn bad_secret(&mut self) -> Result<()> {
        let mut pair = self.pair()?;
        receive(&mut pair.data)?;
        let features = self.features();
        pair.data.write_all(&features)?;
        let (_, theirs) = receive(&mut pair.data)?;
        let reflects = self.rng.chance(30);
        let ours = if reflects { theirs.clone() } else { self.challenge() };
        pair.data.write_all(&framed(Command::AuthChallenge, 0, &ours))?;
        let guess = match self.rng.below(3) {
            0 => auth::respond(HmacAlg::Sha256, b"another secret", &theirs).to_vec(),
            1 if !reflects => receive(&mut pair.data)?.1,
            _ => self.bytes(64),
        };
        pair.data.write_all(&framed(Command::AuthResponse, 0, &guess))?;
        // As if the answer had been right.
        for _ in 0..20 {
            let bytes = self.bytes(300);
            let packet = packet(&mut Bytes(&bytes));
            pair.data.write_all(&packet)?;
        }
        self.wait_for_end(&mut pair);
        Ok(())
    }

    fn challenge(&mut self) -> Vec<u8> {
        (0..64).map(|_| self.rng.next().to_le_bytes()[0]).collect()
    }

    /// Waits for the engine to hang up, for a while.
    fn wait_for_end(&mut self, pair: &mut Pair) {
        if self.rng.chance(50) {
            return;
        }
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE && receive(&mut pair.data).is_ok() {}
    }

    /// A pair of sockets that the engine has taken for its own.
    fn pair(&mut self) -> Result<Pair> {
        let begun = Instant::now();
        loop {
            self.hang_up();
            let result = self.try_pair();
            if result.is_ok() || begun.elapsed() > PATIENCE {
                return result;
            }
            std::thread::park_timeout(SHORT);
        }
    }

    fn try_pair(&self) -> Result<Pair> {
        let mut data = self.dial()?;
        data.write_all(&wire(&Packet::InitialData, HeaderKind::H80))?;
        let mut meta = self.dial()?;
        meta.write_all(&wire(&Packet::InitialMeta, HeaderKind::H80))?;
        // The engine's version comes when it has looked at the pair for a while.
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            self.hang_up();
            data.set_read_timeout(Some(SHORT))?;
            let mut first = [0; 1];
            match data.peek(&mut first) {
                Ok(0) => break,
                Ok(_) => {
                    data.set_read_timeout(Some(PATIENCE))?;
                    return Ok(Pair { data, meta });
                }
                Err(_) => {}
            }
        }
        anyhow::bail!("the engine did not take the pair")
    }

    /// The whole handshake as the peer would do it, and then anything.
    fn false_peer(&mut self, stop: &AtomicBool) -> Result<()> {
        let mut pair = self.pair()?;
        receive(&mut pair.data)?;
        let features = self.features();
        pair.data.write_all(&features)?;
        let (_, theirs) = receive(&mut pair.data)?;
        let ours = self.challenge();
        pair.data.write_all(&framed(Command::AuthChallenge, 0, &ours))?;
        receive(&mut pair.data)?;
        let response = auth::respond(HmacAlg::Sha256, self.place.secret.as_bytes(), &theirs);
        pair.data.write_all(&framed(Command::AuthResponse, 0, &response))?;
        let leads = self.mask == Mask::Primary && self.rng.chance(50);
        let mut blocks = 0;
        loop {
            let (head, body) = receive(&mut pair.data).context("the engine's parameters")?;
            let kind = head.kind().context("an unknown packet")?;
            if let (Command::Sizes, Some(field)) = (kind, body.first_chunk::<8>()) {
                blocks = u64::from_be_bytes(*field) / 8;
            }
            let reply = self.mirrored(kind, body, leads);
            pair.data.write_all(&framed(kind, 0, &reply))?;
            if kind == Command::State {
                break;
            }
        }
        self.score.accepted += 1;
        let Pair { data, meta } = pair;
        let mut session = Session::new(data, meta, self.mask, self.rng.split(), blocks)?;
        if leads {
            session.lead();
        }
        self.score.packets += session.run(stop);
        Ok(())
    }

    /// The engine's own words, said by its peer.
    fn mirrored(&mut self, kind: Command, mut body: Vec<u8>, leads: bool) -> Vec<u8> {
        match kind {
            Command::State => {
                let role = if self.mask == Mask::Primary { 1 } else { 2 };
                // Waiting for a connection, with a good disk, and the peer's unknown.
                let word: u32 = role | 8 << 4 | 8 << 9 | 6 << 13;
                body = word.to_be_bytes().to_vec();
            }
            Command::Uuids if body.len() == 48 && leads => {
                // What the engine has is old.
                body.copy_within(0..8, 8);
                let new = self.rng.next() | 1;
                body[0..8].copy_from_slice(&new.to_be_bytes());
            }
            Command::Uuids if body.len() == 48 && self.mask == Mask::Secondary => {
                match self.rng.below(4) {
                    // The peer has missed something, in this way or that.
                    0 => body[8..16].fill(0),
                    1 if body[8..16] != [0; 8] => body.copy_within(8..16, 0),
                    _ => {}
                }
            }
            _ => {}
        }
        body
    }
}
