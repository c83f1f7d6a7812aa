//! A peer that knows the secret and the protocol, and does not keep to it: most of what it says is
//! what a peer would say, so that the conversation gets somewhere; the rest is near it (WP-4).

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use replication_core::wire::{BitmapSender, Command, HeaderKind, Packet, Stream};

use super::frames::Head;
use super::stranger::{Mask, wire};
use crate::fuzz::Bytes;
use crate::fuzz::peer::{answer, framed, packet};
use crate::sim::rng::Rng;

/// Longest conversation: there are more to be had.
const LONGEST: Duration = Duration::from_secs(3);
/// What is remembered of the engine's words.
const MEMORY: usize = 64;
/// Sector, block id and bytes of something that the engine wants an answer to.
type Wanted = (u64, u64, u32);

/// A conversation behind the handshake.
#[derive(Debug)]
pub struct Session {
    /// Data and meta.
    sockets: [TcpStream; 2],
    input: [Vec<u8>; 2],
    output: [Vec<u8>; 2],
    mask: Mask,
    rng: Rng,
    /// Blocks of the device.
    blocks: u64,
    wanted: Vec<Wanted>,
    heard: Vec<Vec<u8>>,
    /// The engine's writes since its last barrier, and the writes and barriers of this side.
    writes: u32,
    sent: u32,
    packets: u64,
}

impl Session {
    /// Takes over the sockets.
    ///
    /// # Errors
    /// They are gone.
    pub fn new(
        data: TcpStream,
        meta: TcpStream,
        mask: Mask,
        rng: Rng,
        blocks: u64,
    ) -> Result<Self> {
        data.set_nonblocking(true)?;
        meta.set_nonblocking(true)?;
        let none = || [Vec::new(), Vec::new()];
        Ok(Self {
            sockets: [data, meta],
            input: none(),
            output: none(),
            mask,
            rng,
            blocks,
            wanted: Vec::new(),
            heard: Vec::new(),
            writes: 0,
            sent: 0,
            packets: 0,
        })
    }

    /// Tells the engine that all it has is old, and that the resync begins.
    pub fn lead(&mut self) {
        let words = vec![u64::MAX; usize::try_from(self.blocks.div_ceil(64)).expect("a few")];
        let mut sender = BitmapSender::new(self.blocks);
        while let Some(packet) = sender.next_packet(&words, true, HeaderKind::H100) {
            self.say(&wire(&packet, HeaderKind::H100));
        }
        let uuid = self.rng.next();
        self.say(&wire(&Packet::SyncUuid(uuid), HeaderKind::H100));
    }

    /// Talks until the engine has enough. How many packets were said.
    pub fn run(mut self, stop: &AtomicBool) -> u64 {
        let end = Instant::now() + LONGEST;
        while !stop.load(Ordering::SeqCst) && Instant::now() < end {
            if !self.exchange() {
                break;
            }
            for at in 0..2 {
                self.listen(at);
            }
            match self.rng.below(100) {
                0 => self.say_anything(),
                1..8 => self.say_nearly_right(),
                8..40 if self.mask == Mask::Primary => self.write(),
                40..43 => self.say(&framed(Command::Ping, 0, &[])),
                _ => {}
            }
            std::thread::park_timeout(Duration::from_millis(self.rng.below(4)));
        }
        self.packets
    }

    /// Sends and receives what can be. Whether both sockets go on.
    fn exchange(&mut self) -> bool {
        let mut buffer = [0; 1 << 14];
        for at in 0..2 {
            let socket = &mut self.sockets[at];
            match socket.write(&self.output[at]) {
                Ok(count) => drop(self.output[at].drain(..count)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return false,
            }
            match socket.read(&mut buffer) {
                Ok(0) => return false,
                Ok(count) => self.input[at].extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Says a packet, mostly as it is, on the socket that it belongs to, or nearly so.
    fn say(&mut self, packet: &[u8]) {
        let mut packet = packet.to_vec();
        if self.rng.below(200) == 0 {
            self.change(&mut packet);
        }
        let kind = Head::parse(&packet).and_then(|head| head.kind());
        let belongs_to_meta = kind.is_some_and(|kind| !kind.is_on(Stream::Data));
        let at = usize::from(belongs_to_meta != (self.rng.below(1000) == 0));
        self.output[at].extend_from_slice(&packet);
        self.packets += 1;
    }

    fn change(&mut self, packet: &mut [u8]) {
        let most = u64::try_from(packet.len().min(64)).expect("short");
        let place = usize::try_from(self.rng.below(most)).expect("an index");
        packet[place] ^= 1 << self.rng.below(8);
    }

    /// Takes packets of the engine apart and answers, as a peer would.
    fn listen(&mut self, at: usize) {
        while let Some(head) = Head::parse(&self.input[at]) {
            let length = head.size + usize::try_from(head.length).expect("32 bits fit");
            if self.input[at].len() < length {
                return;
            }
            let packet: Vec<u8> = self.input[at].drain(..length).collect();
            if let Some(kind) = head.kind() {
                self.answer(kind, &packet[head.size..]);
            }
            if length < 256 {
                self.heard.push(packet);
            }
            let too_many = self.heard.len().saturating_sub(MEMORY);
            self.heard.drain(..too_many);
            let too_many = self.wanted.len().saturating_sub(MEMORY);
            self.wanted.drain(..too_many);
        }
    }

    fn answer(&mut self, kind: Command, body: &[u8]) {
        let field = |at: usize| body.get(at..at + 8).unwrap_or(&[0; 8]).to_vec();
        let short = |at: usize| body.get(at..at + 4).unwrap_or(&[0; 4]).to_vec();
        let number = |bytes: Vec<u8>| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let id = u64::from_ne_bytes(field(8).try_into().expect("eight bytes"));
        match kind {
            Command::Ping => self.say(&framed(Command::PingAck, 0, &[])),
            Command::Data | Command::Trim | Command::Zeroes => {
                self.writes += 1;
                let size = match kind {
                    Command::Data => u32::try_from(body.len().saturating_sub(24)).expect("short"),
                    _ => u32::try_from(number(short(24))).expect("four bytes"),
                };
                self.wanted.push((number(field(0)), id, size));
                let ack = [field(0), field(8), size.to_be_bytes().to_vec(), vec![0; 4]].concat();
                if !self.rng.chance(1) {
                    self.say(&framed(Command::WriteAck, 0, &ack));
                }
            }
            Command::Barrier => {
                let ack = [short(0), self.writes.to_be_bytes().to_vec()].concat();
                self.writes = 0;
                self.say(&framed(Command::BarrierAck, 0, &ack));
            }
            Command::RsDataRequest | Command::DataRequest => {
                let size = number(short(16));
                self.wanted.push((number(field(0)), id, u32::try_from(size).expect("32 bits")));
                let fill =
                    vec![self.rng.next().to_le_bytes()[0]; usize::try_from(size).expect("32")];
                let reply = [field(0), field(8), vec![0; 8], fill].concat();
                let kind = match kind {
                    Command::DataRequest => Command::DataReply,
                    _ => Command::RsDataReply,
                };
                self.say(&framed(kind, 0, &reply));
            }
            Command::StateChgReq => self.say(&framed(Command::StateChgReply, 0, &[0, 0, 0, 1])),
            _ => {}
        }
    }

    /// A write as a Primary sends it, sometimes with the end of its epoch.
    fn write(&mut self) {
        let sector = self.rng.below(self.blocks.max(1)) * 8;
        let size = usize::try_from(512 * self.rng.between(1, 16)).expect("short");
        let id = self.rng.next();
        self.sent += 1;
        let mut body = sector.to_be_bytes().to_vec();
        body.extend_from_slice(&id.to_ne_bytes());
        body.extend_from_slice(&self.sent.to_be_bytes());
        body.extend_from_slice(&0x102_u32.to_be_bytes());
        let fill = self.rng.next().to_le_bytes()[0];
        body.resize(24 + size, fill);
        self.say(&framed(Command::Data, 0, &body));
        if self.rng.chance(20) {
            let token = self.sent.to_ne_bytes();
            self.say(&framed(Command::Barrier, 0, &[token, [0; 4]].concat()));
        }
    }

    /// A packet in form, with a meaning, at the wrong time.
    fn say_nearly_right(&mut self) {
        let sector = self.rng.below(self.blocks.max(1)) * 8;
        let size = u32::try_from(4096 * self.rng.between(1, 4)).expect("small").to_be_bytes();
        let block = [&sector.to_be_bytes()[..], &[0xff; 8], &size, &[0; 4]].concat();
        let (kind, body) = match self.rng.below(12) {
            0..3 => (Command::State, self.state().to_be_bytes().to_vec()),
            3 => {
                let value = self.state().to_be_bytes();
                let mask = [0x03_u32, 0x1f0, 0x1e00, 0x1_e000, 0x1e03, 0x1ff0];
                let mask = mask[usize::try_from(self.rng.below(6)).expect("an index")];
                (Command::StateChgReq, [mask.to_be_bytes(), value].concat())
            }
            4 => (Command::Uuids, (0..6).flat_map(|_| self.identifier().to_be_bytes()).collect()),
            5 => (Command::OutOfSync, [&block[..8], &block[16..]].concat()),
            6 => (Command::SyncUuid, self.identifier().to_be_bytes().to_vec()),
            7 => (Command::RsDataRequest, block),
            8 => (Command::DataRequest, block),
            9 => (Command::NegAck, block),
            10 => (Command::RsWriteAck, block),
            _ => (Command::NegRsDReply, block),
        };
        let packet = framed(kind, 0, &body);
        if !self.is_kept_back(&packet) {
            self.say(&packet);
        }
    }

    /// A state word whose fields all have a meaning.
    fn state(&mut self) -> u32 {
        let mut field = |low, high| u32::try_from(self.rng.between(low, high)).expect("small");
        field(1, 2) | field(0, 2) << 2 | field(8, 23) << 4 | field(0, 8) << 9 | field(0, 8) << 13
    }

    fn identifier(&mut self) -> u64 {
        let new = self.rng.next();
        [0, 4, 1, new][usize::try_from(self.rng.below(4)).expect("an index")]
    }

    /// A near-answer, any packet, or a changed copy of one of the engine's own.
    fn say_anything(&mut self) {
        let bytes: Vec<u8> = (0..300).map(|_| self.rng.next().to_le_bytes()[0]).collect();
        let last = u64::try_from(self.heard.len()).expect("short");
        let packet = match self.rng.below(8) {
            0..4 => answer(&mut Bytes(&bytes), &self.wanted),
            4..7 if last > 0 => {
                let at = usize::try_from(self.rng.below(last)).expect("an index");
                let mut packet = self.heard[at].clone();
                self.change(&mut packet);
                packet
            }
            _ => packet(&mut Bytes(&bytes)),
        };
        if !self.is_kept_back(&packet) {
            self.say(&packet);
        }
    }

    /// A Secondary may ask a Primary to give up its disk, and it is done: no fault of the engine.
    fn is_kept_back(&self, packet: &[u8]) -> bool {
        let kind = Head::parse(packet).and_then(|head| head.kind());
        self.mask == Mask::Secondary
            && matches!(kind, Some(Command::StateChgReq | Command::ConnStChgReq))
    }
}
