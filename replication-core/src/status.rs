//! The state of a resource in the words that operators and monitoring tools know.
//!
//! Only a rendering of what is known: nothing is decided here.

use crate::control::{ResyncStatus, Status, VolumeStatus};
use crate::resource::Resource;
use crate::resync::rate::RateController;
use crate::state::{Conn, Role};
use crate::units::{SECTORS_PER_BLOCK, Time};
use crate::volume::Volume;

impl Resource {
    /// The state of everything. Paths, addresses and openers are filled in by the engine.
    #[must_use]
    pub fn status(&self, now: Time) -> Status {
        let any = |f: fn(&Volume) -> bool| self.volumes.iter().any(f);
        let rs_in_flight = self.volumes.iter().filter_map(|v| v.resync.as_ref());
        Status {
            name: self.config.name.clone(),
            peer: self.config.peer.clone(),
            role: self.role().name().to_owned(),
            suspended_user: any(|v| v.state.susp),
            suspended_no_data: any(|v| v.state.susp_nod),
            suspended_fencing: any(|v| v.state.susp_fen),
            write_ordering: self.epochs.ordering().word().to_owned(),
            connection: connection_word(self.link.conn).to_owned(),
            peer_role: self.peer_role().name().to_owned(),
            agreed_version: if self.is_connected() { self.link.agreed().version } else { 0 },
            ap_in_flight: self.mirrored_in_flight(),
            rs_in_flight: rs_in_flight
                .filter_map(|resync| resync.rate.as_ref())
                .map(RateController::in_flight)
                .sum(),
            split_brain: self.link.split_brain,
            volumes: self.volumes.iter().map(|volume| self.volume_status(volume, now)).collect(),
            ..Status::default()
        }
    }

    fn mirrored_in_flight(&self) -> u64 {
        let requests = self.transfer_log.iter().filter_map(|key| self.requests.get(key));
        requests.map(|request| request.range.sectors()).sum()
    }

    fn volume_status(&self, volume: &Volume, now: Time) -> VolumeStatus {
        let state = volume.state;
        let counters = volume.counters;
        let is_syncing = volume.is_syncing();
        VolumeStatus {
            nr: volume.config.nr.0,
            minor: volume.config.minor,
            disk: state.disk.name().to_owned(),
            peer_disk: state.pdsk.name().to_owned(),
            cstate: state.conn.name().to_owned(),
            replication: replication_word(state.conn).to_owned(),
            size_kib: volume.size.0 / 2,
            read_kib: counters.read_sectors / 2,
            written_kib: counters.written_sectors / 2,
            received_kib: counters.received_sectors / 2,
            sent_kib: counters.sent_sectors / 2,
            out_of_sync_kib: volume.out_of_sync() * 4,
            al_writes: counters.al_writes,
            bm_writes: counters.bm_writes,
            upper_pending: counters.upper_pending,
            lower_pending: counters.lower_pending,
            pending: self.pending_of(volume.ix),
            unacked: counters.unacked,
            uuids: volume.uuids().map_or([0; 4], |uuids| uuids.slots()),
            was_degraded: volume.disk.as_ref().is_some_and(|disk| disk.was_degraded),
            resync_suspended: suspended_words(volume),
            resync: volume.resync.as_ref().filter(|_| is_syncing).map(|resync| {
                let (elapsed, paused) = resync.times(now);
                let (window, blocks) = resync.last_window;
                let failed = volume.disk.as_ref().map_or(0, |disk| disk.failed_blocks);
                ResyncStatus {
                    total_sectors: resync.total_blocks * SECTORS_PER_BLOCK,
                    left_sectors: volume.out_of_sync() * SECTORS_PER_BLOCK,
                    failed_sectors: failed * SECTORS_PER_BLOCK,
                    elapsed_ms: elapsed.as_ms() - paused.as_ms(),
                    paused_ms: paused.as_ms(),
                    window_ms: window.as_ms(),
                    window_sectors: blocks * SECTORS_PER_BLOCK,
                    want_kib: resync.rate.as_ref().map_or(0, RateController::wanted_kib),
                }
            }),
            ..VolumeStatus::default()
        }
    }

    /// Whether some volume is Primary, for the driver's decisions about its devices.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        self.role() == Role::Primary
    }
}

fn suspended_words(volume: &Volume) -> String {
    let state = volume.state;
    let flags =
        [(state.user_isp, "user"), (state.peer_isp, "peer"), (state.aftr_isp, "dependency")];
    let words: Vec<&str> = flags.iter().filter(|(on, _)| *on).map(|(_, word)| *word).collect();
    if words.is_empty() { String::from("no") } else { words.join(",") }
}

/// The name of a connection state in today's tools.
fn connection_word(conn: Conn) -> &'static str {
    match conn {
        Conn::WFConnection | Conn::WFReportParams => "Connecting",
        conn if conn >= Conn::Connected => "Connected",
        conn => conn.name(),
    }
}

/// The replication part of a connection state.
fn replication_word(conn: Conn) -> &'static str {
    match conn {
        conn if conn < Conn::Connected => "Off",
        Conn::Connected => "Established",
        conn => conn.name(),
    }
}
