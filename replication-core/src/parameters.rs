//! What the volumes tell each other when a connection is made, and whenever it changes: settings,
//! sizes, generations, states.
//!
//! Each node decides for itself from what it was told; the pure decisions are in
//! [`crate::handshake`], here they are carried out. A difference that only a person can resolve
//! ends in `StandAlone` with the option or the reason named (WP-8, GI-5, GI-6).
//!
//! Source: protocol notes, sections 3.3 to 3.9, 8 and 14.4.

use crate::action::{Action, Handler, Level, Scope};
use crate::connect::Then;
use crate::gi::{PeerUuids, UuidFlags as GiFlags, Uuids};
use crate::handshake::{
    AgreedSize, Conclusion, Handshake, HandshakeFailure, PeerReport, Pending, ProtocolSettings,
    Sizes as SizeInput, SizesDiskless, SyncDecision, Verdict, WrongData, agree_size,
    agree_size_diskless, agree_user, check_exposed_data, check_protocol, is_skip_initial_sync,
};
use crate::limits;
use crate::mutant::{self, Mutant};
use crate::peer_request::Wrong;
use crate::resource::Resource;
use crate::split_brain::{AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, Policies};
use crate::state::{Conn, Disk, Role, State};
use crate::units::{SECTORS_PER_BLOCK, Sector, VolumeNr};
use crate::volume::{After, LocalDisk, MetaTask, PeerSizes, Stage};
use crate::wire::{
    AlgName, Features, Packet, Protocol, QueueLimits, ResyncController, Sizes, SizesFlags,
    SyncParam, UuidFlags, UuidsPacket,
};

impl Resource {
    /// Everything that a new connection begins with.
    pub(crate) fn report_everything(&mut self) {
        let packet = Packet::Protocol(self.protocol_packet());
        self.send_data(VolumeNr(0), packet, None, None);
        for at in 0..self.volumes.len() {
            self.volumes[at].seq = 0;
            self.send_sync_param(at);
            self.send_sizes(at, false, SizesFlags::NONE);
            self.send_uuids(at, false);
            // The peer expects the state of the moment before.
            let state = State { conn: Conn::WFConnection, ..self.volumes[at].state };
            self.send_state(at, state);
        }
    }

    fn protocol_packet(&self) -> Protocol {
        let net = &self.config.net;
        Protocol {
            protocol: net.protocol,
            after_sb_0pri: net.after_sb_0pri.code(),
            after_sb_1pri: net.after_sb_1pri.code(),
            after_sb_2pri: net.after_sb_2pri.code(),
            discard_my_data: self.link.discard_my_data,
            dry_run: false,
            two_primaries: false,
            integrity_alg: AlgName::new(),
        }
    }

    fn own_settings(&self) -> ProtocolSettings {
        let net = &self.config.net;
        ProtocolSettings {
            protocol: net.protocol.code(),
            after_sb_0pri: net.after_sb_0pri,
            after_sb_1pri: net.after_sb_1pri,
            after_sb_2pri: net.after_sb_2pri,
            discard_my_data: self.link.discard_my_data,
            dry_run: false,
            two_primaries: false,
            integrity_alg: String::new(),
        }
    }

    pub(crate) fn on_protocol(&mut self, theirs: &Protocol) {
        let settings = match settings_of(theirs) {
            Ok(settings) => settings,
            Err(text) => {
                self.refuse_peer(&text);
                return;
            }
        };
        let is_ignored = self.mutant.is_on(Mutant::IgnoreOptions);
        if let Err(e) = check_protocol(&self.own_settings(), &settings)
            && !is_ignored
        {
            self.refuse_peer(&e.to_string());
            return;
        }
        if theirs.dry_run {
            self.refuse_peer("the peer asks for a dry run, which this node does not do");
            return;
        }
        self.link.peer_discards = theirs.discard_my_data;
    }

    /// The peer's operator changed settings of the running connection.
    pub(crate) fn on_protocol_update(&mut self, theirs: &Protocol) -> Result<(), Wrong> {
        let settings = settings_of(theirs)?;
        if settings.two_primaries || !settings.integrity_alg.is_empty() {
            let text = "the peer switched on allow-two-primaries or data-integrity-alg, which \
                        this node does not have";
            self.refuse_peer(text);
            return Ok(());
        }
        self.close_epoch();
        let net = &mut self.config.net;
        net.protocol = theirs.protocol;
        net.after_sb_0pri = settings.after_sb_0pri.mirrored();
        net.after_sb_1pri = settings.after_sb_1pri.mirrored();
        net.after_sb_2pri = settings.after_sb_2pri.mirrored();
        let text = format!("peer changed the settings: protocol {:?}", theirs.protocol);
        self.log(Level::Info, Scope::Connection, text);
        Ok(())
    }

    /// Tells the peer that settings changed.
    pub(crate) fn send_protocol_update(&mut self) {
        let packet = Packet::ProtocolUpdate(self.protocol_packet());
        self.send_data(VolumeNr(0), packet, None, None);
        for at in 0..self.volumes.len() {
            self.send_sync_param(at);
        }
    }

    fn send_sync_param(&mut self, at: usize) {
        let rate = &self.volumes[at].config.disk.rate;
        let verify_alg = AlgName::from(&self.config.net.verify_alg).unwrap_or_default();
        let params = SyncParam {
            rate: rate.resync_rate_kib,
            verify_alg,
            csums_alg: AlgName::new(),
            controller: Some(ResyncController {
                plan_ahead: rate.plan_ahead,
                delay_target: rate.delay_target,
                fill_target: rate.fill_target_sectors,
                max_rate: rate.max_rate_kib,
            }),
        };
        let nr = self.number_of(at);
        self.send_data(nr, Packet::SyncParam(params), None, None);
    }

    pub(crate) fn on_sync_param(&mut self, at: usize, theirs: &SyncParam) -> Result<(), Wrong> {
        let is_first = self.volumes[at].state.conn == Conn::WFReportParams;
        let verify = &self.config.net.verify_alg;
        let differs = [
            ("verify-alg", verify.as_str(), theirs.verify_alg.as_str()),
            ("csums-alg", "", theirs.csums_alg.as_str()),
        ]
        .into_iter()
        .find(|(_, ours, theirs)| ours != theirs);
        if let Some((name, ours, theirs)) = differs {
            let text = format!("incompatible {name}: {ours:?} here, {theirs:?} on the peer");
            if is_first {
                self.refuse_peer(&text);
            } else {
                self.log(Level::Warn, Scope::Connection, text);
            }
            return Ok(());
        }
        // As with the in-kernel driver, the last one who speaks sets the speed of both.
        let rate = &mut self.volumes[at].config.disk.rate;
        rate.resync_rate_kib = theirs.rate.clamp(1, 8_388_608);
        if let Some(c) = theirs.controller {
            rate.plan_ahead = c.plan_ahead.min(300);
            rate.delay_target = c.delay_target.clamp(1, 100);
            rate.fill_target_sectors = c.fill_target.min(1_048_576);
            rate.max_rate_kib = c.max_rate.min(4_194_304);
        }
        Ok(())
    }

    pub(crate) fn send_sizes(&mut self, at: usize, ask: bool, flags: SizesFlags) {
        let agreed = self.link.agreed();
        let volume = &self.volumes[at];
        let disk = volume.disk.as_ref().filter(|disk| disk.stage >= Stage::Settling);
        let user = volume.config.disk.size.map_or(0, |size| size.0);
        let limits = disk.map(|disk| QueueLimits {
            physical_block: disk.info.physical_block_size,
            logical_block: disk.info.logical_block_size,
            io_min: disk.info.logical_block_size,
            discard: disk.info.discard,
            ..QueueLimits::default()
        });
        let packet = Sizes {
            disk_sectors: disk.map_or(0, |disk| capacity_of(disk.geometry.capacity)),
            user_sectors: user,
            current_sectors: if ask { 0 } else { volume.size.0 },
            max_request: agreed.max_payload(),
            queue_order: 0,
            flags,
            limits: agreed.features.contains(Features::WSAME).then(|| limits.unwrap_or_default()),
        };
        let nr = volume.config.nr;
        self.send_data(nr, Packet::Sizes(packet), None, None);
    }

    /// The size of a volume from what is known (metadata notes 8.1).
    pub(crate) fn agreed_size(&self, at: usize, peer_capacity: u64) -> Result<Sector, String> {
        self.size_input(at, peer_capacity, None)
            .and_then(|input| agree_size(&input).map_err(|e| e.to_string()))
            .map(|agreed| agreed.size)
    }

    fn size_input(
        &self,
        at: usize,
        peer_capacity: u64,
        peer_user: Option<u64>,
    ) -> Result<SizeInput, String> {
        let volume = &self.volumes[at];
        let Some(disk) = volume.disk.as_ref() else {
            return Err(String::from("no disk"));
        };
        let is_ignored = self.mutant.is_on(Mutant::ExposeOwnSize);
        let peer_capacity = Sector(if is_ignored { 0 } else { capacity_of(Sector(peer_capacity)) });
        Ok(SizeInput {
            own_capacity: Sector(capacity_of(disk.geometry.capacity)),
            peer_capacity,
            last_agreed: disk.superblock.la_size,
            own_user: volume.config.disk.size.unwrap_or(Sector(0)),
            peer_user: peer_user.map(Sector),
            current: volume.size,
            disk: volume.state.disk,
            handshaking: volume.state.conn <= Conn::WFReportParams,
            peer_was_diskless: volume.state.pdsk == Disk::Diskless,
        })
    }

    pub(crate) fn on_sizes(&mut self, at: usize, theirs: &Sizes) {
        let before = self.volumes[at].peer_sizes.map_or(0, |sizes| sizes.disk);
        self.volumes[at].peer_sizes = Some(PeerSizes {
            disk: theirs.disk_sectors,
            user: theirs.user_sectors,
            current: theirs.current_sectors,
        });
        let has_disk = self.volumes[at].state.disk >= Disk::Negotiating;
        let state = self.volumes[at].state;
        let capacity = self.volumes[at].disk.as_ref().map_or(0, |d| d.geometry.capacity.0);
        // Without a current size of its own the packet asks: the operator has called for a resize,
        // and the disk here may have grown, too, however large it is known to be.
        let asks = theirs.current_sectors == 0;
        let is_larger = theirs.disk_sectors > before && theirs.disk_sectors > capacity;
        if has_disk && state.conn == Conn::Connected && (asks || is_larger) {
            let clean = theirs.flags.contains(SizesFlags::NO_RESYNC);
            self.volumes[at].unseen_size = Some(clean);
            self.look_at_own_size(at, clean);
        }
        if has_disk {
            let input = self.size_input(at, theirs.disk_sectors, Some(theirs.user_sectors));
            match input.and_then(|input| agree_size(&input).map_err(|e| e.to_string())) {
                Ok(agreed) => self.take_size(at, &agreed, theirs),
                Err(text) => self.refuse_peer(&text),
            }
            return;
        }
        // For the disk to come: what was asked for meanwhile (ours; the notes are silent).
        let handshaking = state.conn <= Conn::WFReportParams;
        let own = self.volumes[at].config.disk.size.unwrap_or(Sector(0));
        let user = agree_user(own, Some(Sector(theirs.user_sectors)), handshaking);
        self.volumes[at].config.disk.size = (user != Sector(0)).then_some(user);
        let is_question = theirs.current_sectors == 0 && !handshaking;
        if is_question && self.volumes[at].size != Sector(0) {
            // What the peer's disk holds may be more than both had room for; if its device has
            // another size now than ours, its answer to ours says which (FE-1).
            self.send_sizes(at, false, theirs.flags);
            return;
        }
        let input = SizesDiskless {
            peer_capacity: Sector(theirs.disk_sectors),
            peer_user: Sector(theirs.user_sectors),
            peer_current: Sector(theirs.current_sectors),
            current: self.volumes[at].size,
            role: state.role,
        };
        match agree_size_diskless(&input) {
            Ok(None) => {}
            Ok(Some(size)) if size.0 <= limits::MAX_DEVICE_SECTORS => self.set_size(at, size),
            Ok(Some(size)) => self.refuse_peer(&format!("a device of {size} is above 16 TiB")),
            Err(e) => self.refuse_peer(&e.to_string()),
        }
    }

    fn take_size(&mut self, at: usize, agreed: &AgreedSize, theirs: &Sizes) {
        let ix = self.volumes[at].ix;
        if agreed.user_is_too_large {
            let text = format!("Requested disk size is too big ({}), ignored", agreed.user);
            self.log(Level::Error, Scope::Device(ix), text);
        }
        let old = self.volumes[at].size;
        let handshaking = self.volumes[at].state.conn <= Conn::WFReportParams;
        let clean = theirs.flags.contains(SizesFlags::NO_RESYNC);
        let state = self.volumes[at].state;
        let in_use = state.role == Role::Primary && agreed.size < old;
        if agreed.size != old && !handshaking && (state.conn > Conn::Connected || in_use) {
            let text = format!("the peer changes the size to {} while it is in use", agreed.size);
            self.lose_link(Conn::ProtocolError, Then::Reconnect, &text);
            return;
        }
        // What either operator asked for is known on both nodes from here on.
        self.volumes[at].config.disk.size = (agreed.user != Sector(0)).then_some(agreed.user);
        let grows = agreed.size > old && old != Sector(0);
        // What the handshake over a connection or an attach decides is known before either grows.
        let attaching = state.disk == Disk::Negotiating || state.pdsk < Disk::Inconsistent;
        let settling = handshaking || attaching;
        let waits = grows && settling;
        if !waits && agreed.size != old {
            self.resize_to(at, agreed.size, clean);
        }
        let waited = self.volumes[at].grows_to.is_some();
        self.volumes[at].grows_to = waits.then_some((agreed.size, clean));
        let is_news = theirs.current_sectors != self.volumes[at].size.0 || (waits && !waited);
        if !handshaking && is_news {
            self.send_sizes(at, false, theirs.flags);
        }
        // A peer that grows now needs the new part, too: this node may have grown in a connection
        // that was lost before the resync began.
        let peer_grows = settling
            && theirs.disk_sectors != 0
            && theirs.current_sectors != 0
            && theirs.current_sectors < agreed.size.0;
        if (grows || peer_grows) && !clean {
            self.volumes[at].resync_after_grow = true;
        }
        if !handshaking {
            self.start_grow_sync(at);
        }
    }

    /// The size that both disks have room for, but did not have in the last connection, is taken
    /// into use together with what the handshake has decided. So the superblock that says so is
    /// that of the generation in which the source of the new part begins its resync: should both
    /// nodes die before, that part is not forgotten (BM-8, RS-1).
    fn grow_as_agreed(&mut self, at: usize, result: State) {
        let agreed = self.volumes[at].grows_to.take();
        let have_disks = result.disk.min(result.pdsk) >= Disk::Inconsistent;
        if let Some((size, clean)) = agreed.filter(|_| have_disks) {
            self.resize_to(at, size, clean);
        }
    }

    /// Takes a new size into use: the bitmap follows, and the superblock, with a full sync in
    /// between should we crash (metadata notes 8.2).
    pub(crate) fn resize_to(&mut self, at: usize, size: Sector, new_part_is_clean: bool) {
        if size.0 > limits::MAX_DEVICE_SECTORS {
            self.refuse_peer(&format!("a device of {size} is above 16 TiB"));
            return;
        }
        let volume = &mut self.volumes[at];
        volume.grows_to = None;
        let Some(disk) = volume.disk.as_mut() else { return };
        disk.superblock.la_size = size;
        let differs = !new_part_is_clean && !self.mutant.is_on(Mutant::GrowUnmarked);
        disk.bitmap.resize(size.0.div_ceil(SECTORS_PER_BLOCK), differs);
        disk.bitmap.mark_all_dirty();
        self.volumes[at].gate += 1;
        self.push_meta(at, MetaTask::Superblock);
        self.push_meta(at, MetaTask::Bitmap);
        self.push_meta(at, MetaTask::Then(After::Resized));
        self.push_meta(at, MetaTask::Superblock);
        self.push_meta(at, MetaTask::Then(After::OpenGate));
        self.set_size(at, size);
    }

    /// Sends this node's generations, if it has a disk. `attaching`: the disk waits for the
    /// handshake. A Primary without a disk hears of one that is on disk: it answers its host.
    pub(crate) fn send_uuids(&mut self, at: usize, attaching: bool) {
        if !self.is_connected() {
            return;
        }
        let volume = &mut self.volumes[at];
        let is_bare = volume.state.peer == Role::Primary && volume.state.pdsk < Disk::Negotiating;
        let is_on_disk = |d: &LocalDisk| d.durable_uuid.same(d.uuids.current);
        volume.uuids_due = is_bare && !volume.disk.as_ref().is_none_or(is_on_disk);
        if volume.uuids_due {
            return;
        }
        self.send_uuids_with(at, attaching, UuidFlags::NONE);
    }

    pub(crate) fn send_uuids_with(&mut self, at: usize, attaching: bool, extra: UuidFlags) {
        let volume = &self.volumes[at];
        let Some(disk) = volume.disk.as_ref().filter(|d| d.stage == Stage::Attached) else {
            return;
        };
        let mut flags = extra;
        if self.link.discard_my_data {
            flags = flags | UuidFlags::DISCARD_MY_DATA;
        }
        if disk.crashed_primary {
            flags = flags | UuidFlags::CRASHED_PRIMARY;
        }
        if attaching && disk.found == Disk::Inconsistent {
            flags = flags | UuidFlags::INCONSISTENT;
        }
        let [current, bitmap, younger, older] = disk.uuids.slots();
        let packet = UuidsPacket {
            current,
            bitmap,
            history: [younger, older],
            bits_set: disk.bitmap.count(),
            flags,
        };
        let nr = volume.config.nr;
        self.send_data(nr, Packet::Uuids(packet), None, None);
    }

    pub(crate) fn on_uuids(&mut self, at: usize, theirs: &UuidsPacket) {
        let [younger, older] = theirs.history;
        let peer = PeerUuids {
            uuids: Uuids::from_slots([theirs.current, theirs.bitmap, younger, older]),
            bits_set: theirs.bits_set,
            flags: GiFlags::from_word(theirs.flags.0),
        };
        let state = self.volumes[at].state;
        let first = state.conn < Conn::Connected || state.pdsk == Disk::Diskless;
        if first && let Err(e) = self.check_offered_data(at, &peer) {
            self.refuse_peer(&e.to_string());
            return;
        }
        self.volumes[at].peer_uuids = Some(peer);
        let own = self.volumes[at].uuids();
        if let Some(own) = own
            && is_skip_initial_sync(state.conn, &own, &peer)
        {
            self.adopt_skipped_sync(at, &peer);
        }
        let volume = &mut self.volumes[at];
        let serves = state.role == Role::Primary || state.conn >= Conn::Connected;
        if state.disk < Disk::Inconsistent && serves {
            volume.expose(&peer.uuids);
        }
        if state.conn >= Conn::Connected && !volume.source_uuid.is_zero() {
            volume.source_uuid = peer.uuids.current;
        }
    }

    /// Whether a peer that has come, or has attached its disk, holds the data that this node uses
    /// if it has none of its own (RD-1).
    fn check_offered_data(&self, at: usize, peer: &PeerUuids) -> Result<(), WrongData> {
        let volume = &self.volumes[at];
        let exposed = volume.exposed_uuid;
        if exposed.is_zero() || volume.is_in_use(peer.uuids.current) {
            return Ok(());
        }
        check_exposed_data(volume.state.role, volume.state.disk, exposed, peer)
    }

    /// The peer's operator declared both fresh disks equal.
    fn adopt_skipped_sync(&mut self, at: usize, peer: &PeerUuids) {
        let volume = &mut self.volumes[at];
        let is_primary = volume.state.role == Role::Primary;
        let Some(disk) = volume.disk.as_mut() else { return };
        disk.uuids.adopt_skipped_sync(&peer.uuids, is_primary);
        disk.bitmap.clear_all();
        let ix = volume.ix;
        let mut state = volume.state;
        state.disk = Disk::UpToDate;
        state.pdsk = Disk::UpToDate;
        self.log(Level::Info, Scope::Device(ix), "Accepted new current UUID, no initial sync");
        self.push_meta(at, MetaTask::Bitmap);
        self.set_state(at, state, "initial sync skipped");
        // An earlier state word of ours may reach the peer only now.
        let state = self.volumes[at].state;
        self.send_state(at, state);
        self.push_meta(at, MetaTask::Superblock);
    }

    /// The peer's state word.
    pub(crate) fn on_state(&mut self, at: usize, word: u32) -> Result<(), Wrong> {
        let packet = State::from_word(word).map_err(|e| e.to_string())?;
        if packet.conn == Conn::Ahead && self.volumes[at].state.role == Role::Primary {
            // It would make the data of the only writer old.
            return Err(String::from("the peer claims to be ahead, but this node is Primary"));
        }
        if let Some(text) = self.too_small(at, &packet) {
            self.refuse_peer(&text);
            return Ok(());
        }
        let volume = &self.volumes[at];
        // Sent before the peer heard of our disk: what it says to that follows.
        let is_earlier = if packet.disk >= Disk::Negotiating {
            volume.peer_uuids.is_none()
        } else {
            packet.pdsk < Disk::Negotiating
        };
        let negotiates = volume.state.disk == Disk::Negotiating;
        if negotiates && is_earlier {
            return Ok(());
        }
        if negotiates && packet.disk < Disk::Negotiating {
            self.attach_without_peer(at);
        }
        if let Err(e) = self.check_coming_disk(at, &packet) {
            self.refuse_peer(&e.to_string());
            return Ok(());
        }
        let volume = &mut self.volumes[at];
        let peer_forced = std::mem::take(&mut volume.peer_was_forced);
        let report = PeerReport {
            old: volume.state,
            packet,
            peer_flags: volume.peer_uuids.map(|peer| peer.flags),
            bits_set: volume.out_of_sync(),
            negotiating: volume.disk.as_ref().map(|disk| disk.found),
            peer_forced,
            new_uuid_pending: false,
        };
        match report.judge() {
            Verdict::Dropped => {}
            Verdict::ResyncEnd { finish } => {
                // Another one may follow before the end is settled here (ST-3).
                let state = State { peer: packet.role, ..self.volumes[at].state };
                self.set_state(at, state, "peer's role");
                if finish {
                    self.begin_source_end(at);
                } else {
                    self.refuse_source_end(at);
                }
            }
            Verdict::VerifyEnd => {}
            Verdict::Pending(pending) => self.conclude_state(at, pending),
        }
        let state = self.volumes[at].state;
        let is_bare = state.peer == Role::Primary && state.pdsk == Disk::Diskless;
        if is_bare && packet.conn >= Conn::Connected && state.conn >= Conn::Connected {
            // It has a flush to answer perhaps, and waits for the generation.
            self.serve_bare_primary(at);
        }
        Ok(())
    }

    /// The peer has lost the disk that would have brought the one that waits here up to date.
    fn attach_without_peer(&mut self, at: usize) {
        let Err((_, text)) = self.check_data_in_use(at) else { return };
        let volume = &self.volumes[at];
        let (ix, state) = (volume.ix, State { disk: Disk::Failed, ..volume.state });
        self.log(Level::Error, Scope::PeerDevice(ix), format!("attach refused: {text}"));
        self.set_state(at, state, "attach refused");
    }

    /// The identifiers of a disk that comes were compared with those of the disk here, if there was
    /// one. It may have gone since.
    fn check_coming_disk(&self, at: usize, packet: &State) -> Result<(), WrongData> {
        let volume = &self.volumes[at];
        let comes = volume.state.conn < Conn::Connected || volume.state.pdsk < Disk::Inconsistent;
        let peer = volume.peer_uuids.filter(|_| comes && packet.disk >= Disk::Negotiating);
        peer.map_or(Ok(()), |peer| self.check_offered_data(at, &peer))
    }

    /// The peer's data does not fit here: it will refuse this node, which can tell why.
    fn too_small(&self, at: usize, theirs: &State) -> Option<String> {
        let volume = &self.volumes[at];
        let is_first = volume.state.conn == Conn::WFReportParams;
        let used = volume.peer_sizes.map_or(0, |sizes| sizes.current);
        let own = volume.grows_to.map_or(volume.size, |(size, _)| size).0;
        let is_short = own != 0 && used > own && volume.disk.is_some();
        (is_first && is_short && theirs.disk >= Disk::Outdated && theirs.disk != Disk::DUnknown)
            .then(|| {
                format!(
                    "the peer's device has {used} sectors, this node's disk is too small: {own}"
                )
            })
    }

    fn conclude_state(&mut self, at: usize, pending: Pending) {
        let decision = pending.needs_handshake().then(|| self.decide_sync(at, &pending));
        let rules = self.rules(at);
        let decision = decision.map(|result| match result {
            // Who has the device open is not known here: a Primary is not demoted behind its back.
            Ok(decision) if decision.demote_first => Err(HandshakeFailure::SplitBrain),
            other => other,
        });
        let conclusion = pending.conclude(decision, &rules);
        match conclusion {
            Conclusion::Enter { state, establishes: _, answer, attach_refused } => {
                self.grow_as_agreed(at, state);
                if let Some(failure) = attach_refused {
                    let ix = self.volumes[at].ix;
                    let text = format!("attach refused by the handshake: {failure}");
                    self.log(Level::Error, Scope::PeerDevice(ix), text);
                }
                if let Some(Ok(decision)) = decision {
                    self.apply_decision(at, &decision);
                }
                self.set_state(at, state, "handshake");
                // Without an answer a refused attach would wait for ever.
                if answer || attach_refused.is_some() {
                    self.send_uuids(at, false);
                    let state = self.volumes[at].state;
                    self.send_state(at, state);
                }
                if let Some(Ok(decision)) = decision {
                    self.correct_own_uuids(at, &decision);
                    self.sync_marks_of_equals(at);
                }
                self.start_grow_sync(at);
            }
            Conclusion::Failed(failure) => self.fail_handshake(failure),
            Conclusion::Refused(refused) => {
                self.refuse_peer(&format!("the peer's state is not acceptable: {refused}"));
            }
            Conclusion::PeerRestarted => {
                let text = "the peer may have restarted while I/O was frozen";
                self.lose_link(Conn::ProtocolError, Then::Reconnect, text);
            }
        }
    }

    fn decide_sync(
        &mut self,
        at: usize,
        pending: &Pending,
    ) -> Result<SyncDecision, HandshakeFailure> {
        let net = &self.config.net;
        let volume = &self.volumes[at];
        let disk = volume.disk.as_ref().expect("a handshake needs a disk");
        let peer = volume.peer_uuids.as_ref().expect("a handshake needs the peer's identifiers");
        let agreed = self.link.agreed();
        let handshake = Handshake {
            own: &disk.uuids,
            own_bits_set: disk.bitmap.count(),
            own_crashed: disk.crashed_primary,
            own_role: volume.state.role,
            own_disk: pending.own_disk(),
            own_attaching: pending.own_attaching(),
            own_discard: self.link.discard_my_data,
            own_resolver: self.link.is_resolver,
            peer,
            peer_role: if pending.peer_is_primary() { Role::Primary } else { Role::Secondary },
            peer_disk: pending.peer_disk(),
            agreed_version: agreed.version,
            wsame_feature: agreed.features.contains(Features::WSAME),
            policies: Policies {
                after_sb_0pri: net.after_sb_0pri,
                after_sb_1pri: net.after_sb_1pri,
                after_sb_2pri: net.after_sb_2pri,
            },
            always_asbp: net.always_asbp,
            rr_conflict: net.rr_conflict,
            dry_run: false,
        };
        let mut result = handshake.decide();
        let comparison = handshake.compare();
        let merges = match result {
            Err(HandshakeFailure::SplitBrain) => self.mutant.is_on(Mutant::MergeSplitBrain),
            Err(HandshakeFailure::Unrelated) => self.mutant.is_on(Mutant::AcceptUnrelated),
            Ok(_) | Err(_) => false,
        };
        if merges {
            result = Ok(mutant::merge(comparison, self.link.is_resolver));
        }
        if let Ok(decision) = &mut result {
            let is_unheard = matches!(comparison.rule, 51 | 53);
            decision.full |= is_unheard && self.mutant.is_on(Mutant::ForgetLostStart);
            decision.full &= !self.mutant.is_on(Mutant::TrustOldBitmap);
        }
        let ix = volume.ix;
        let text = format!(
            "uuid_compare(): self {} bits:{} peer {} bits:{} = {:?} by rule={}",
            disk.uuids,
            disk.bitmap.count(),
            peer.uuids,
            peer.bits_set,
            comparison.outcome,
            comparison.rule
        );
        self.log(Level::Info, Scope::PeerDevice(ix), text);
        result
    }

    /// What the decision changes besides the state.
    fn apply_decision(&mut self, at: usize, decision: &SyncDecision) {
        let ix = self.volumes[at].ix;
        if let Some(solved) = decision.solved {
            self.log(Level::Warn, Scope::PeerDevice(ix), solved.to_string());
            let handler = Handler::InitialSplitBrain;
            self.out.push(Action::RunHandler { handler, volume: Some(ix) });
        }
        if decision.overwrites_primary {
            let text = "this Primary's data is being overwritten, as rr-conflict allows";
            self.log(Level::Error, Scope::PeerDevice(ix), text);
        }
        let volume = &mut self.volumes[at];
        if let (Some(corrected), Some(peer)) =
            (decision.comparison.peer_correction, &mut volume.peer_uuids)
        {
            peer.uuids = corrected;
        }
        if let Some(disk) = volume.disk.as_mut() {
            disk.failed_blocks = 0;
            if decision.full {
                disk.bitmap.set_all();
            }
        }
    }

    /// Takes over what the comparison has learned about lost messages. What was announced before
    /// is what was compared here: a peer that is told only now compares the same (GI-3).
    fn correct_own_uuids(&mut self, at: usize, decision: &SyncDecision) {
        let disk = self.volumes[at].disk.as_mut();
        if let (Some(own), Some(disk)) = (decision.comparison.own_correction, disk) {
            disk.uuids = own;
            self.push_meta(at, MetaTask::Superblock);
        }
    }

    fn fail_handshake(&mut self, failure: HandshakeFailure) {
        self.link.split_brain = failure == HandshakeFailure::SplitBrain;
        if self.link.split_brain {
            for handler in [Handler::InitialSplitBrain, Handler::SplitBrain] {
                self.out.push(Action::RunHandler { handler, volume: None });
            }
        }
        let text = failure.to_string();
        if failure.may_retry() {
            self.lose_link(Conn::Disconnecting, Then::ReconnectLater, &text);
        } else {
            self.refuse_peer(&text);
        }
    }
}

/// A capacity within what this node can handle.
fn capacity_of(capacity: Sector) -> u64 {
    capacity.0.min(limits::MAX_DEVICE_SECTORS)
}

fn settings_of(packet: &Protocol) -> Result<ProtocolSettings, String> {
    let unknown = |name: &str, code: u32| format!("incompatible {name}: the peer's is {code}");
    let zero = AfterSb0Pri::from_code(packet.after_sb_0pri)
        .ok_or_else(|| unknown("after-sb-0pri", packet.after_sb_0pri))?;
    let one = AfterSb1Pri::from_code(packet.after_sb_1pri)
        .ok_or_else(|| unknown("after-sb-1pri", packet.after_sb_1pri))?;
    let two = AfterSb2Pri::from_code(packet.after_sb_2pri)
        .ok_or_else(|| unknown("after-sb-2pri", packet.after_sb_2pri))?;
    Ok(ProtocolSettings {
        protocol: packet.protocol.code(),
        after_sb_0pri: zero,
        after_sb_1pri: one,
        after_sb_2pri: two,
        discard_my_data: packet.discard_my_data,
        dry_run: packet.dry_run,
        two_primaries: packet.two_primaries,
        integrity_alg: packet.integrity_alg.to_string(),
    })
}
