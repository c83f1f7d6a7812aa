//! From a stream of bytes to packets: header, plan, fixed part, bulk data.
//!
//! Bulk data is never copied if it can be helped: what the staging buffer holds of it is moved,
//! the rest is received in place. Nothing here decides; the core says whether the next packet may
//! be read, how long it is, what it means, and where its bulk data goes.
//!
//! Invariants kept: WP-1 (any bytes give packets or an error; memory is bounded by the staging
//! buffer and one bulk buffer of the core), ORD-7 (packets come out in the order of the stream).

use replication_core::event::SockId;
use replication_core::resource::Resource;
use replication_core::units::{Buf, VolumeNr};
use replication_core::wire::{BodyPlan, DecodeError, Header, Packet};

use crate::ring::{Direct, Ring};
use crate::stream::Stream;

/// What the reader of a stream has to ask the core.
pub trait Framing {
    /// Whether the next packet may be read now.
    fn may_receive(&self, sock: SockId) -> bool;
    /// Bytes of its header.
    fn header_size(&self, sock: SockId) -> usize;
    /// The header, and the lengths of what follows.
    ///
    /// # Errors
    /// No header of a packet that may come on this socket.
    fn plan(&self, sock: SockId, header: &[u8]) -> Result<(Header, BodyPlan), DecodeError>;
    /// The packet.
    ///
    /// # Errors
    /// The fixed part is malformed.
    fn decode(&self, sock: SockId, header: &Header, fixed: &[u8]) -> Result<Packet, DecodeError>;
    /// Memory for the bulk data of a packet; `None`: not now.
    fn payload_buffer(&mut self, packet: &Packet) -> Option<Buf>;
}

impl Framing for Resource {
    fn may_receive(&self, sock: SockId) -> bool {
        Self::may_receive(self, sock)
    }

    fn header_size(&self, sock: SockId) -> usize {
        Self::header_size(self, sock)
    }

    fn plan(&self, sock: SockId, header: &[u8]) -> Result<(Header, BodyPlan), DecodeError> {
        Self::plan(self, sock, header)
    }

    fn decode(&self, sock: SockId, header: &Header, fixed: &[u8]) -> Result<Packet, DecodeError> {
        Self::decode(self, sock, header, fixed)
    }

    fn payload_buffer(&mut self, packet: &Packet) -> Option<Buf> {
        Self::payload_buffer(self, packet)
    }
}

/// How far the packet at the head of the stream was read.
#[derive(Debug, Default)]
enum Stage {
    /// Nothing of it.
    #[default]
    Header,
    /// Its header.
    Fixed { header: Header, plan: BodyPlan },
    /// All but the bulk data, for which there is no memory yet.
    Buffer { header: Header, packet: Packet, bytes: u32 },
    /// Bulk data is coming in.
    Bulk { header: Header, packet: Packet, direct: Direct },
}

/// What the reader came to.
#[derive(Debug)]
pub enum Step {
    /// A packet.
    Packet {
        /// The volume field of its header.
        volume: VolumeNr,
        /// The packet.
        packet: Packet,
        /// Its bulk data.
        payload: Option<Buf>,
    },
    /// More bytes are needed; with memory for bulk data, if some is expected.
    More(Option<Direct>),
    /// The core does not want more now.
    Blocked,
    /// The bytes are no packet.
    Garbage(DecodeError),
}

/// The reader of one socket.
#[derive(Debug)]
pub struct Reader {
    sock: SockId,
    stage: Stage,
}

impl Reader {
    /// At the beginning of a packet.
    #[must_use]
    pub fn new(sock: SockId) -> Self {
        Self { sock, stage: Stage::Header }
    }

    /// Reads on, as far as one packet. Must not be called while a receive operation is under way.
    pub fn next(&mut self, stream: &mut Stream, core: &mut impl Framing, ring: &Ring) -> Step {
        assert!(!stream.is_receiving(), "the staging buffer is the kernel's");
        // Each stage leads to the next one, so four rounds always come to an end.
        for _ in 0..4 {
            let (stage, step) = match std::mem::take(&mut self.stage) {
                Stage::Header => self.read_header(stream, core),
                Stage::Fixed { header, plan } => self.read_fixed(stream, core, header, plan),
                Stage::Buffer { header, packet, bytes } => find_buffer(core, header, packet, bytes),
                Stage::Bulk { header, packet, direct } => {
                    read_bulk(stream, ring, header, packet, direct)
                }
            };
            self.stage = stage;
            if let Some(step) = step {
                return step;
            }
        }
        panic!("a packet has four stages");
    }

    /// Takes note of bulk data that was received in place.
    ///
    /// # Panics
    /// If none was expected.
    pub fn on_bulk(&mut self, bytes: usize) {
        match &mut self.stage {
            Stage::Bulk { direct, .. } => {
                direct.have += bytes;
                assert!(direct.have <= direct.need, "more bulk data than announced");
            }
            Stage::Header | Stage::Fixed { .. } | Stage::Buffer { .. } => {
                assert!(bytes == 0, "bulk data where none was expected");
            }
        }
    }

    /// Whether the stream may end here.
    #[must_use]
    pub fn is_between_packets(&self) -> bool {
        matches!(self.stage, Stage::Header)
    }

    /// Gives up; returns memory that was taken from the core and not delivered.
    pub fn abandon(&mut self) -> Option<Buf> {
        match std::mem::take(&mut self.stage) {
            Stage::Bulk { direct, .. } => Some(direct.buf),
            Stage::Header | Stage::Fixed { .. } | Stage::Buffer { .. } => None,
        }
    }

    fn read_header(&self, stream: &mut Stream, core: &impl Framing) -> (Stage, Option<Step>) {
        if !core.may_receive(self.sock) {
            // With nothing staged, receiving goes on to learn about the end of the connection.
            let idle = stream.staged().is_empty();
            let step = if idle { Step::More(None) } else { Step::Blocked };
            return (Stage::Header, Some(step));
        }
        let size = core.header_size(self.sock);
        let Some(bytes) = stream.staged().get(..size) else {
            return (Stage::Header, Some(Step::More(None)));
        };
        match core.plan(self.sock, bytes) {
            Ok((header, plan)) => {
                stream.consume(size);
                (Stage::Fixed { header, plan }, None)
            }
            Err(error) => (Stage::Header, Some(Step::Garbage(error))),
        }
    }

    fn read_fixed(
        &self,
        stream: &mut Stream,
        core: &impl Framing,
        header: Header,
        plan: BodyPlan,
    ) -> (Stage, Option<Step>) {
        let Some(bytes) = stream.staged().get(..plan.fixed) else {
            return (Stage::Fixed { header, plan }, Some(Step::More(None)));
        };
        match core.decode(self.sock, &header, bytes) {
            Ok(packet) => {
                if plan.fixed > 0 {
                    stream.consume(plan.fixed);
                }
                if plan.payload == 0 {
                    let step = Step::Packet { volume: header.volume, packet, payload: None };
                    return (Stage::Header, Some(step));
                }
                (Stage::Buffer { header, packet, bytes: plan.payload }, None)
            }
            Err(error) => (Stage::Header, Some(Step::Garbage(error))),
        }
    }
}

fn find_buffer(
    core: &mut impl Framing,
    header: Header,
    packet: Packet,
    bytes: u32,
) -> (Stage, Option<Step>) {
    match core.payload_buffer(&packet) {
        Some(buf) => {
            let need = usize::try_from(bytes).expect("payload lengths have 32 bits");
            let direct = Direct { buf, have: 0, need };
            (Stage::Bulk { header, packet, direct }, None)
        }
        None => (Stage::Buffer { header, packet, bytes }, Some(Step::Blocked)),
    }
}

fn read_bulk(
    stream: &mut Stream,
    ring: &Ring,
    header: Header,
    packet: Packet,
    mut direct: Direct,
) -> (Stage, Option<Step>) {
    direct.have += stream.take_bulk(direct, ring);
    if direct.missing() > 0 {
        return (Stage::Bulk { header, packet, direct }, Some(Step::More(Some(direct))));
    }
    let payload = Some(direct.buf);
    (Stage::Header, Some(Step::Packet { volume: header.volume, packet, payload }))
}

#[cfg(test)]
mod tests;
