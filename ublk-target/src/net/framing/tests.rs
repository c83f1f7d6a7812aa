//! The reader against a socket pair, with the real codec and a core that says what it is told.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use replication_core::units::Sector;
use replication_core::wire::{
    self, Agreed, DataHeader, Features, HeaderKind, Stream as WireStream, decode_header, plan_body,
};

use super::*;
use crate::arena::Layout;
use crate::ring::Owner;
use crate::stream::{Received, StreamId};

const SOCK: SockId = SockId(7);
const AGREED: Agreed = Agreed {
    version: 101,
    features: Features::OURS,
    integrity_digest: 0,
    verify_digest: 0,
    csums_digest: 0,
};

/// A core that follows a script.
struct Script {
    may_receive: bool,
    buffers: Vec<Buf>,
}

impl Framing for Script {
    fn may_receive(&self, _sock: SockId) -> bool {
        self.may_receive
    }

    fn header_size(&self, _sock: SockId) -> usize {
        HeaderKind::H100.size()
    }

    fn plan(&self, _sock: SockId, header: &[u8]) -> Result<(Header, BodyPlan), DecodeError> {
        let header = decode_header(HeaderKind::H100, header)?;
        Ok((header, plan_body(WireStream::Data, &header, &AGREED)?))
    }

    fn decode(&self, _sock: SockId, header: &Header, fixed: &[u8]) -> Result<Packet, DecodeError> {
        wire::decode(WireStream::Data, header, fixed, &AGREED)
    }

    fn payload_buffer(&mut self, _packet: &Packet) -> Option<Buf> {
        self.buffers.pop()
    }
}

struct Bed {
    ring: Ring,
    stream: Stream,
    peer: UnixStream,
    reader: Reader,
    core: Script,
}

impl Bed {
    fn new() -> Self {
        let (near, peer) = UnixStream::pair().unwrap();
        let ring = Ring::new(Layout::new(1, 64, 4096, 0).unwrap()).unwrap();
        let stream = Stream::new(StreamId::Peer(SOCK), Rc::new(near.into()));
        let core = Script { may_receive: true, buffers: vec![Buf(32), Buf(16), Buf(0)] };
        Self { ring, stream, peer, reader: Reader::new(SOCK), core }
    }

    fn step(&mut self) -> Step {
        self.reader.next(&mut self.stream, &mut self.core, &self.ring)
    }

    /// Receives once, where the last step wanted it.
    fn receive(&mut self, direct: Option<Direct>) -> Received {
        self.stream.start_receive(&mut self.ring, direct);
        let mut done = Vec::new();
        while done.is_empty() {
            self.ring.wait(Some(Duration::from_secs(10))).unwrap();
            self.ring.completions(&mut done);
        }
        let completion = done.pop().unwrap();
        assert!(matches!(completion.owner, Owner::Received(StreamId::Peer(SOCK))));
        let received = self.stream.on_received(completion);
        if let Received::Bytes { bulk } = received {
            self.reader.on_bulk(bulk);
        }
        received
    }

    /// Steps and receives until there is a packet.
    fn packet(&mut self) -> (Packet, Option<Buf>) {
        loop {
            match self.step() {
                Step::Packet { volume, packet, payload } => {
                    assert_eq!(volume, VolumeNr(3));
                    return (packet, payload);
                }
                Step::More(direct) => {
                    assert!(matches!(self.receive(direct), Received::Bytes { .. }));
                }
                step @ (Step::Blocked | Step::Garbage(_)) => panic!("{step:?}"),
            }
        }
    }

    fn bytes_of(&self, buf: Buf, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ring.arena().copy_out(buf, 0, &mut bytes);
        bytes
    }
}

fn small() -> (Packet, Vec<u8>) {
    encoded(Packet::UnplugRemote, &[])
}

fn bulk(payload: &[u8]) -> (Packet, Vec<u8>) {
    let len = u32::try_from(payload.len()).unwrap();
    let header = DataHeader { sector: Sector(8), len, ..DataHeader::default() };
    encoded(Packet::RsDataReply(header), payload)
}

fn encoded(packet: Packet, payload: &[u8]) -> (Packet, Vec<u8>) {
    let mut bytes = Vec::new();
    wire::encode(&packet, VolumeNr(3), &AGREED, HeaderKind::H100, &mut bytes);
    bytes.extend_from_slice(payload);
    (packet, bytes)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

#[test]
fn packets_come_out_in_order_with_their_payload() {
    let mut bed = Bed::new();
    let payload = pattern(8192);
    let ((unplug, one), (reply, two)) = (small(), bulk(&payload));
    bed.peer.write_all(&[one.clone(), two, one].concat()).unwrap();
    assert_eq!(bed.packet(), (unplug.clone(), None));
    assert_eq!(bed.packet(), (reply, Some(Buf(0))));
    assert_eq!(bed.bytes_of(Buf(0), 8192), payload);
    assert_eq!(bed.packet(), (unplug, None));
    assert!(bed.reader.is_between_packets());
}

#[test]
fn every_split_of_the_bytes_gives_the_same_packets() {
    let payload = pattern(512);
    let ((unplug, one), (reply, two)) = (small(), bulk(&payload));
    let bytes = [two, one].concat();
    for at in 1..bytes.len() {
        let mut bed = Bed::new();
        bed.peer.write_all(&bytes[..at]).unwrap();
        let Step::More(direct) = bed.step() else { panic!("nothing was received yet") };
        bed.receive(direct);
        // What is there now is taken in before the rest comes.
        let first = bed.step();
        bed.peer.write_all(&bytes[at..]).unwrap();
        match first {
            Step::Packet { packet, payload, .. } => {
                assert_eq!((packet, payload), (reply.clone(), Some(Buf(0))));
            }
            Step::More(direct) => {
                bed.receive(direct);
                assert_eq!(bed.packet(), (reply.clone(), Some(Buf(0))), "split at {at}");
            }
            step @ (Step::Blocked | Step::Garbage(_)) => panic!("split at {at}: {step:?}"),
        }
        assert_eq!(bed.bytes_of(Buf(0), 512), payload, "split at {at}");
        assert_eq!(bed.packet(), (unplug.clone(), None), "split at {at}");
    }
}

#[test]
fn a_core_that_does_not_want_more_is_not_given_more() {
    let mut bed = Bed::new();
    let (unplug, one) = small();
    bed.core.may_receive = false;
    bed.peer.write_all(&one).unwrap();
    let Step::More(None) = bed.step() else { panic!("the end of the stream has to be seen") };
    bed.receive(None);
    assert!(matches!(bed.step(), Step::Blocked));
    bed.core.may_receive = true;
    assert_eq!(bed.packet(), (unplug, None));
}

#[test]
fn without_memory_the_payload_waits() {
    let mut bed = Bed::new();
    let payload = pattern(4096);
    let (reply, bytes) = bulk(&payload);
    bed.core.buffers.clear();
    bed.peer.write_all(&bytes).unwrap();
    let Step::More(None) = bed.step() else { panic!("nothing was received yet") };
    bed.receive(None);
    assert!(matches!(bed.step(), Step::Blocked));
    assert_eq!(bed.reader.abandon(), None);
    let mut bed = Bed::new();
    bed.core.buffers.clear();
    bed.peer.write_all(&bytes).unwrap();
    let Step::More(None) = bed.step() else { panic!("nothing was received yet") };
    bed.receive(None);
    assert!(matches!(bed.step(), Step::Blocked));
    bed.core.buffers.push(Buf(5));
    assert_eq!(bed.packet(), (reply, Some(Buf(5))));
    assert_eq!(bed.bytes_of(Buf(5), 4096), payload);
}

#[test]
fn memory_of_an_unfinished_packet_is_given_back() {
    let mut bed = Bed::new();
    let (_, bytes) = bulk(&pattern(4096));
    bed.peer.write_all(&bytes[..1000]).unwrap();
    let Step::More(None) = bed.step() else { panic!("nothing was received yet") };
    bed.receive(None);
    let Step::More(Some(direct)) = bed.step() else { panic!("payload is missing") };
    assert_eq!(direct.need, 4096);
    bed.peer.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(bed.receive(Some(direct)), Received::EndOfFile);
    assert!(!bed.reader.is_between_packets());
    assert_eq!(bed.reader.abandon(), Some(Buf(0)));
}

#[test]
fn bytes_that_are_no_packet_are_an_error() {
    let mut bed = Bed::new();
    bed.peer.write_all(&[0x55; 16]).unwrap();
    let Step::More(None) = bed.step() else { panic!("nothing was received yet") };
    bed.receive(None);
    let magic = DecodeError::Magic { found: 0x5555_5555 };
    assert!(matches!(bed.step(), Step::Garbage(error) if error == magic));
}
