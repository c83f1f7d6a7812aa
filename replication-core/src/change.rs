//! State changes of a volume and what follows from them.
//!
//! A change is adjusted ([`sanitize`]), entered, logged, and then its consequences are started:
//! new generations, packets to the peer, bitmap transfer, end of a resync. Every change of any
//! volume's state goes through [`Resource::set_state`], so the state always is a fixed point of
//! `sanitize` (ST-2). Whoever makes a change that the rules may refuse asks
//! [`crate::state::soft_change`] first.
//!
//! Invariants: GI-1 (a new generation is durable before anything that the peer will miss is
//! acknowledged), ST-2, ST-3. Source: protocol notes, sections 6.4, 7 and 9.2.

use crate::action::{Action, Handler, Level, Scope};
use crate::mutant::Mutant;
use crate::resource::Resource;
use crate::state::{Conn, Disk, Role, Rules, State, log_line, peer_was_forced, sanitize};
use crate::units::Sector;
use crate::volume::{After, BegunGeneration, MetaTask};
use crate::wire::Packet;

impl Resource {
    /// The rules that apply to a volume now.
    pub(crate) fn rules(&self, at: usize) -> Rules {
        let net = &self.config.net;
        let elsewhere = self.volumes.iter().enumerate();
        let peer_primary_elsewhere =
            elsewhere.filter(|(i, _)| *i != at).any(|(_, v)| v.state.peer == Role::Primary);
        let negotiating = self.volumes[at]
            .disk
            .as_ref()
            .filter(|_| self.volumes[at].state.disk == Disk::Negotiating)
            .map(|disk| (disk.found, disk.found_peer));
        Rules {
            two_primaries: self.mutant.is_on(Mutant::AllowTwoPrimaries),
            fencing: net.fencing,
            on_no_data: self.config.on_no_data,
            has_verify_alg: !net.verify_alg.is_empty(),
            agreed_version: self.link.agreed().version,
            device_open: false,
            peer_primary_elsewhere,
            handshaking: self.is_handshaking(),
            negotiating: negotiating.filter(|_| self.negotiated_data_matches(at)),
        }
    }

    /// Whether a disk that waits for the handshake holds the data that was served meanwhile.
    fn negotiated_data_matches(&self, at: usize) -> bool {
        let volume = &self.volumes[at];
        volume.disk.as_ref().is_some_and(|d| volume.is_in_use(d.uuids.current))
    }

    /// Whether the parameters of a connection are being exchanged.
    pub(crate) fn is_handshaking(&self) -> bool {
        self.volumes.iter().any(|v| v.state.conn == Conn::WFReportParams)
    }

    /// Enters the connection-level state of all volumes.
    pub(crate) fn set_link_state(&mut self, conn: Conn, tag: &str) {
        assert!(conn <= Conn::WFReportParams, "{conn} is a state of one volume");
        let old = self.link.conn;
        self.link.conn = conn;
        if self.volumes.is_empty() && old != conn {
            let text = format!("conn( {old} -> {conn} )");
            self.log(Level::Info, Scope::Connection, text);
        }
        for at in 0..self.volumes.len() {
            let mut new = self.volumes[at].state;
            new.conn = conn;
            self.set_state(at, new, tag);
        }
    }

    /// A change that is a fact.
    pub(crate) fn set_state(&mut self, at: usize, wish: State, tag: &str) {
        let old = self.volumes[at].state;
        let new = sanitize(wish, &old, &self.rules(at));
        self.enter(at, new, tag);
    }

    fn enter(&mut self, at: usize, new: State, tag: &str) {
        let old = self.volumes[at].state;
        if old == new {
            return;
        }
        self.volumes[at].state = new;
        if let Some(mut line) = log_line(&old, &new) {
            if !tag.is_empty() {
                line.push_str(" [");
                line.push_str(tag);
                line.push(']');
            }
            let ix = self.volumes[at].ix;
            self.log(Level::Info, Scope::PeerDevice(ix), line);
        }
        self.again = true;
        self.after_change(at, &old, &new);
    }

    fn after_change(&mut self, at: usize, old: &State, new: &State) {
        if peer_was_forced(old, new) {
            self.volumes[at].peer_was_forced = true;
        }
        if old.role != new.role {
            let is_primary = new.role == Role::Primary;
            if let Some(disk) = self.volumes[at].disk.as_mut() {
                disk.uuids.set_role(is_primary);
            }
        }
        let is_in_sync = new.disk == Disk::UpToDate && new.pdsk == Disk::UpToDate;
        if is_in_sync && let Some(disk) = self.volumes[at].disk.as_mut() {
            disk.crashed_primary = false;
        }
        self.renew_generation(at, old, new);
        if old.pdsk >= Disk::Inconsistent && new.pdsk < Disk::Inconsistent {
            self.peer_lost_its_disk(at);
        }
        self.refresh_flags(at);
        self.tell_peer(at, old, new);
        self.follow_connection(at, old, new);
        if new.disk <= Disk::Failed && old.disk > Disk::Failed {
            self.begin_leaving(at, old.disk != Disk::Negotiating);
        }
        if is_stranded(new) && !is_stranded(old) {
            let volume = Some(self.volumes[at].ix);
            self.out.push(Action::RunHandler { handler: Handler::PriOnInconDegr, volume });
        }
        if new.disk == Disk::UpToDate || new.role != Role::Primary {
            self.volumes[at].awaits_generation = false;
        }
        let now = self.volumes[at].state;
        let is_peer_good = now.pdsk == Disk::UpToDate && now.conn >= Conn::Connected;
        if now.susp_nod && (now.disk == Disk::UpToDate || is_peer_good) {
            self.set_state(at, State { susp_nod: false, ..now }, "a good copy is back");
        }
    }

    /// A new data generation, when the peer no longer gets what is written (GI-1).
    fn renew_generation(&mut self, at: usize, old: &State, new: &State) {
        let had = matches!(old.pdsk, Disk::Inconsistent | Disk::Consistent | Disk::UpToDate);
        let has = matches!(new.pdsk, Disk::Inconsistent | Disk::Consistent | Disk::UpToDate);
        let is_bad = matches!(new.pdsk, Disk::Diskless | Disk::Failed | Disk::Outdated);
        // What an Inconsistent peer said of itself need not be durable there: it may come back in
        // the common generation and call its data good.
        let is_out_of_reach = old.conn >= Conn::Connected
            && new.conn < Conn::Connected
            && new.pdsk == Disk::Inconsistent;
        let lost = (had && !has) || is_out_of_reach;
        let written = new.role == Role::Primary || new.peer == Role::Primary;
        let is_missing = old.pdsk == Disk::DUnknown && is_bad && new.role == Role::Primary;
        // A disk that comes back to a Primary which is alone: the peer may have gone on since.
        let is_back = old.disk != Disk::UpToDate && new.role == Role::Primary && !has;
        let wanted = (lost && written) || is_missing || is_back;
        if !wanted || new.disk != Disk::UpToDate {
            return;
        }
        let Some(uuids) = self.volumes[at].uuids() else { return };
        // A target that was not told to start has not ended anything.
        let is_unheard = old.conn == Conn::WFBitMapS;
        if uuids.bitmap.is_zero() || (uuids.may_be_shared() && !is_unheard) {
            self.new_current_uuid(at);
            self.send_uuids(at, false);
        }
    }

    /// The peer has no disk and uses the data here alone: that is a generation of its own (GI-1),
    /// which begins with the peer's word that it is connected, and with its first write at the
    /// latest. Not when the two meet: a Primary without a disk that has been using newer data may
    /// be about to refuse this node, and nothing new is here then.
    pub(crate) fn serve_bare_primary(&mut self, at: usize) {
        let volume = &self.volumes[at];
        let is_shared = volume.uuids().is_some_and(|uuids| uuids.may_be_shared());
        if volume.state.disk == Disk::UpToDate && is_shared {
            self.new_current_uuid(at);
            self.send_uuids(at, false);
        }
    }

    /// Starts a new generation; data writes and their completions wait until it is durable.
    pub(crate) fn new_current_uuid(&mut self, at: usize) {
        let random = self.random();
        let volume = &mut self.volumes[at];
        let is_primary = volume.state.role == Role::Primary;
        let Some(disk) = volume.disk.as_mut() else { return };
        let before = disk.uuids;
        disk.uuids.rotate_new_current(random, is_primary);
        volume.begun = Some(BegunGeneration { current: disk.uuids.current, before });
        let text = format!("new current UUID: {}", disk.uuids.current);
        let ix = volume.ix;
        self.log(Level::Info, Scope::Device(ix), text);
        if self.mutant.is_on(Mutant::RotateLate) {
            self.push_meta(at, MetaTask::Superblock);
        } else {
            self.save_superblock_gated(at);
        }
    }

    /// Writes the superblock; until it is durable no data write is submitted or acknowledged.
    pub(crate) fn save_superblock_gated(&mut self, at: usize) {
        if self.volumes[at].disk.is_none() {
            return;
        }
        self.volumes[at].gate += 1;
        self.push_meta(at, MetaTask::Superblock);
        self.push_meta(at, MetaTask::Then(After::OpenGate));
    }

    /// Packets that a change causes by itself (section 6.4).
    fn tell_peer(&mut self, at: usize, old: &State, new: &State) {
        if !self.link.is_established() || new.conn < Conn::WFReportParams {
            return;
        }
        if old.conn == Conn::WFReportParams && new.conn >= Conn::Connected {
            self.send_state(at, *new);
            return;
        }
        if new.conn < Conn::Connected {
            return;
        }
        if old.disk == Disk::Attaching && new.disk == Disk::Negotiating {
            self.send_sizes(at, false, crate::wire::SizesFlags::NONE);
            self.send_uuids(at, true);
            self.send_state(at, *new);
            return;
        }
        if old.pdsk == Disk::Diskless && new.pdsk > Disk::Diskless {
            self.send_uuids(at, false);
            self.send_state(at, *new);
            return;
        }
        let role = old.role != new.role && !self.mutant.is_on(Mutant::HideRole);
        let pause = old.aftr_isp != new.aftr_isp || old.user_isp != new.user_isp;
        let ahead = old.conn != Conn::Ahead && new.conn == Conn::Ahead;
        let disk_failed = old.disk != Disk::Failed && new.disk == Disk::Failed;
        let disk_gone = old.disk != Disk::Diskless && new.disk == Disk::Diskless;
        let disk_bad = old.disk == Disk::UpToDate
            && new.disk == Disk::Inconsistent
            && old.conn == Conn::Connected
            && new.conn == Conn::Connected;
        let synced = old.conn > Conn::Connected
            && new.conn == Conn::Connected
            && old.disk < Disk::UpToDate
            && old.disk > Disk::Failed;
        if role || pause || ahead || disk_failed || disk_gone || disk_bad || synced {
            self.send_state(at, *new);
        }
    }

    fn follow_connection(&mut self, at: usize, old: &State, new: &State) {
        let volume = &mut self.volumes[at];
        if is_target(new.conn)
            && !is_target(old.conn)
            && let Some(peer) = volume.peer_uuids
        {
            volume.source_uuid = peer.uuids.current;
        }
        let in_exchange = |conn| matches!(conn, Conn::WFBitMapS | Conn::WFBitMapT);
        if in_exchange(old.conn) && !in_exchange(new.conn) && self.link.bitmap_volume != Some(at) {
            // A map that has not begun to go out is not wanted any more.
            self.volumes[at].bitmap_out = false;
        }
        if old.conn != Conn::WFBitMapS && new.conn == Conn::WFBitMapS {
            self.begin_bitmap_out(at);
        }
        if old.conn != Conn::WFBitMapT && new.conn == Conn::WFBitMapT {
            self.begin_bitmap_in(at);
        }
        if matches!(new.conn, Conn::StartingSyncS | Conn::StartingSyncT) && old.conn != new.conn {
            self.begin_full_sync(at);
        }
        let exchanges = matches!(
            new.conn,
            Conn::WFBitMapS | Conn::WFBitMapT | Conn::StartingSyncS | Conn::StartingSyncT
        );
        if exchanges || (old.conn > Conn::Connected && self.volumes[at].out_of_sync() == 0) {
            // The new part of a device that grew is marked: this resync has it, too.
            self.volumes[at].resync_after_grow = false;
        }
        let was_syncing = old.conn > Conn::Connected;
        if was_syncing && new.conn <= Conn::Connected {
            self.volumes[at].resync = None;
            self.volumes[at].forget_sync_steps();
            self.save_bitmap(at);
        }
        if old.conn != Conn::Connected
            && new.conn == Conn::Connected
            && let Some(clean) = self.volumes[at].unseen_size
        {
            // A resync was in the way, that of what the disk had room for at once (BM-8).
            self.look_at_own_size(at, clean);
        }
        let paused = |conn| matches!(conn, Conn::PausedSyncS | Conn::PausedSyncT);
        if paused(old.conn) != paused(new.conn) {
            let now = self.now;
            if let Some(resync) = self.volumes[at].resync.as_mut() {
                resync.set_paused(now, paused(new.conn));
            }
        }
        if old.conn < Conn::Connected && new.conn >= Conn::Connected {
            if let Some(disk) = self.volumes[at].disk.as_mut() {
                disk.was_degraded = false;
            }
            self.link.conn = self.link.conn.max(Conn::WFReportParams);
            if self.volumes.iter().all(|v| v.state.conn >= Conn::Connected) {
                self.link.conn = Conn::Connected;
                self.link.discard_my_data = false;
                self.link.split_brain = false;
            }
            self.serve_without_disk(at);
        }
    }

    /// Without a local disk, the peer's data is what the host sees.
    fn serve_without_disk(&mut self, at: usize) {
        let volume = &mut self.volumes[at];
        if volume.state.disk == Disk::Diskless
            && let Some(peer) = volume.peer_uuids
        {
            volume.expose(&peer.uuids);
        }
    }

    /// Sends this node's state word.
    pub(crate) fn send_state(&mut self, at: usize, state: State) {
        let nr = self.volumes[at].config.nr;
        // A disk that is still being read is none for the peer.
        let disk = if state.disk == Disk::Attaching { Disk::Diskless } else { state.disk };
        let word = State { disk, ..state }.word();
        self.send_data(nr, Packet::State(word), None, None);
    }

    /// Sets the exposed size and tells the frontend.
    pub(crate) fn set_size(&mut self, at: usize, size: Sector) {
        let volume = &mut self.volumes[at];
        if volume.size == size {
            return;
        }
        let old = volume.size;
        volume.size = size;
        let ix = volume.ix;
        if old != Sector(0) || size != Sector(0) {
            let text = format!("size = {} KB (was {} KB)", size.0 / 2, old.0 / 2);
            self.log(Level::Info, Scope::Device(ix), text);
        }
        self.out.push(Action::SetSize { volume: ix, sectors: size });
    }
}

/// Whether a node in this state gets what it lacks from its peer.
const fn is_target(conn: Conn) -> bool {
    matches!(
        conn,
        Conn::StartingSyncT
            | Conn::WFBitMapT
            | Conn::WFSyncUUID
            | Conn::SyncTarget
            | Conn::PausedSyncT
    )
}

/// A Primary without a peer whose disk is not good.
fn is_stranded(state: &State) -> bool {
    let is_alone = state.conn < Conn::Connected;
    state.role == Role::Primary && state.disk == Disk::Inconsistent && is_alone
}
