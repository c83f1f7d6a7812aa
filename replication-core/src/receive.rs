//! Packets of an established pair of sockets: which handler each one belongs to.
//!
//! Bytes from the peer are checked here and in the handlers before anything relies on them (WP-4);
//! what does not fit is a protocol error, which drops the connection and nothing else (WP-1).
//!
//! Source: protocol notes, sections 4 and 17.4.

use crate::action::{Level, Scope};
use crate::connect::Then;
use crate::limits;
use crate::peer_request::Wrong;
use crate::request::AckKind;
use crate::resource::Resource;
use crate::state::{Conn, StateChange};
use crate::units::{Buf, SectorRange, VolumeNr};
use crate::wire::{BlockAck, BlockId, Packet};

impl Resource {
    /// Takes in a packet of one of the two sockets.
    pub(crate) fn receive(
        &mut self,
        is_data: bool,
        volume: VolumeNr,
        packet: Packet,
        payload: Option<Buf>,
    ) {
        let name = packet.name();
        let mut payload = payload;
        let is_early = self.link.waits_for_protocol()
            && !matches!(packet, Packet::Protocol(_) | Packet::AuthChallenge(_));
        let result = if is_early {
            Err(String::from("before P_PROTOCOL"))
        } else if packet.is_connection_level() {
            self.receive_for_connection(&packet)
        } else {
            match self.find_volume(volume) {
                Some(at) if is_data => self.receive_data(at, packet, &mut payload),
                Some(at) => self.receive_meta(at, &packet),
                None => self.receive_for_unknown(volume, &packet),
            }
        };
        if let Some(buf) = payload {
            self.free_buf(buf);
        }
        if let Err(wrong) = result {
            let text = format!("peer broke the protocol: {name}: {wrong}");
            let cause = if is_data { Conn::ProtocolError } else { Conn::NetworkFailure };
            self.lose_link(cause, Then::Reconnect, &text);
        }
    }

    fn receive_for_connection(&mut self, packet: &Packet) -> Result<(), Wrong> {
        match packet {
            Packet::Ping => {
                if self.link.unread_acks() >= 2 * limits::MAX_UNREAD_ACKS {
                    return Err(String::from("the peer reads no answers"));
                }
                self.send_meta(VolumeNr(0), Packet::PingAck);
                Ok(())
            }
            Packet::PingAck => {
                self.on_ping_ack();
                Ok(())
            }
            Packet::Barrier { barrier } => {
                self.epochs.barrier(*barrier);
                self.again = true;
                Ok(())
            }
            Packet::BarrierAck { barrier, set_size } => {
                self.on_barrier_ack(barrier.0, *set_size);
                Ok(())
            }
            Packet::Protocol(theirs) => {
                self.link.protocol_came();
                self.on_protocol(theirs);
                Ok(())
            }
            Packet::ProtocolUpdate(theirs) => self.on_protocol_update(theirs),
            Packet::ConnStChgReq { mask, value } => {
                let change = parse_change(*mask, *value)?;
                self.on_connection_change(&change);
                Ok(())
            }
            Packet::ConnStChgReply(code) => {
                self.on_change_reply(None, *code);
                Ok(())
            }
            Packet::UnplugRemote | Packet::DelayProbe => Ok(()),
            Packet::AuthChallenge(_) if self.is_handshaking() => {
                let text = "the peer has a cram-hmac-alg and a shared-secret configured, this \
                            node has none";
                self.refuse_peer(text);
                Ok(())
            }
            other => Err(format!("{} is out of place on a working connection", other.name())),
        }
    }

    /// A volume that only the peer has: it may be added here later (4.3).
    fn receive_for_unknown(&mut self, volume: VolumeNr, packet: &Packet) -> Result<(), Wrong> {
        match packet {
            Packet::SyncParam(_) | Packet::Sizes(_) | Packet::Uuids(_) | Packet::State(_) => {
                let text = format!("{} for volume {volume}, unknown here: ignored", packet.name());
                self.log(Level::Warn, Scope::Connection, text);
                Ok(())
            }
            _ => Err(format!("volume {volume} is not configured here")),
        }
    }

    fn receive_data(
        &mut self,
        at: usize,
        packet: Packet,
        payload: &mut Option<Buf>,
    ) -> Result<(), Wrong> {
        let is_ready = self.volumes[at].state.conn >= Conn::Connected;
        match &packet {
            Packet::SyncParam(params) => self.on_sync_param(at, params),
            Packet::Sizes(sizes) => {
                self.on_sizes(at, sizes);
                Ok(())
            }
            Packet::Uuids(uuids) => {
                self.on_uuids(at, uuids);
                Ok(())
            }
            Packet::State(word) => self.on_state(at, *word),
            Packet::StateChgReq { mask, value } => {
                let change = parse_change(*mask, *value)?;
                self.on_volume_change(at, &change);
                Ok(())
            }
            _ if !is_ready => Err(String::from("before the handshake of the volume is complete")),
            Packet::Data(_) => self.on_peer_write(at, &packet, payload),
            Packet::Trim(_) | Packet::Zeroes(_) => self.on_peer_write(at, &packet, payload),
            Packet::DataReply(header) => {
                if self.on_data_reply(header, *payload) {
                    *payload = None;
                    Ok(())
                } else {
                    Err(String::from("an answer to a read that was not asked for"))
                }
            }
            Packet::RsDataReply(header) => self.on_resync_data(at, header, payload),
            Packet::DataRequest(block) => self.on_data_request(at, block),
            // A thin request may always be answered with the data.
            Packet::RsDataRequest(block) | Packet::RsThinRequest(block) => {
                self.on_resync_request(at, block)
            }
            Packet::Bitmap(_) | Packet::CompressedBitmap(_) => self.on_bitmap_packet(at, &packet),
            Packet::SyncUuid(uuid) => self.on_sync_uuid(at, *uuid),
            Packet::OutOfSync(desc) => {
                let range = self.checked_range(at, desc.sector, desc.size)?;
                self.volumes[at].set_out_of_sync(range);
                Ok(())
            }
            Packet::OvRequest(_)
            | Packet::OvReply { .. }
            | Packet::CsumRsRequest { .. }
            | Packet::RsDeallocated(_) => {
                Err(String::from("needs a feature that this node did not offer"))
            }
            other => Err(format!("{} does not belong on the data socket", other.name())),
        }
    }

    fn receive_meta(&mut self, at: usize, packet: &Packet) -> Result<(), Wrong> {
        let write_ack = |this: &mut Self, ack: &BlockAck, kind| {
            if this.on_write_ack(at, ack, kind) {
                Ok(())
            } else {
                Err(format!("an acknowledgement for sector {} fits no write", ack.sector.0))
            }
        };
        match packet {
            Packet::RecvAck(ack) => write_ack(self, ack, AckKind::Received),
            Packet::WriteAck(ack) => write_ack(self, ack, AckKind::Written { in_sync: false }),
            Packet::RsWriteAck(ack) if ack.block_id == BlockId::SYNCER => {
                self.on_resync_written(at, ack)
            }
            Packet::RsWriteAck(ack) => write_ack(self, ack, AckKind::Written { in_sync: true }),
            Packet::NegAck(ack) => self.on_neg_ack(at, ack),
            Packet::NegDReply(ack) => {
                if self.on_neg_data_reply(ack) {
                    Ok(())
                } else {
                    Err(String::from("an answer to a read that was not asked for"))
                }
            }
            Packet::NegRsDReply(ack) => self.on_resync_refused(at, ack, true),
            Packet::RsCancel(ack) => self.on_resync_refused(at, ack, false),
            Packet::StateChgReply(code) => {
                self.on_change_reply(Some(at), *code);
                Ok(())
            }
            Packet::Superseded(_) | Packet::RetryWrite(_) => {
                Err(String::from("a conflict of two Primaries, which this node does not allow"))
            }
            Packet::OvResult(_) | Packet::RsIsInSync(_) => {
                Err(String::from("needs a feature that this node did not offer"))
            }
            other => Err(format!("{} does not belong on the meta socket", other.name())),
        }
    }

    /// The peer could not write: the block differs, whichever write it was (BM-5).
    fn on_neg_ack(&mut self, at: usize, ack: &BlockAck) -> Result<(), Wrong> {
        if ack.block_id == BlockId::SYNCER {
            let range = self.checked_range(at, ack.sector, ack.size)?;
            self.resync_failed(at, range);
            return Ok(());
        }
        if !self.on_write_ack(at, ack, AckKind::Failed) {
            let bytes = u64::from(ack.size);
            let range = SectorRange::from_bytes(ack.sector, bytes).unwrap_or_default();
            self.volumes[at].set_out_of_sync(range);
        }
        Ok(())
    }
}

fn parse_change(mask: u32, value: u32) -> Result<StateChange, Wrong> {
    StateChange::from_mask_value(mask, value).map_err(|e| e.to_string())
}
