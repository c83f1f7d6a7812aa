//! The source of a resync: it answers requests, clears bits when the target has written, and ends
//! when the target says so.
//!
//! The reads themselves are [`crate::peer_request`]s. Source: protocol notes, section 12.9.

use crate::action::{Level, Scope};
use crate::connect::Then;
use crate::peer_request::Wrong;
use crate::resource::Resource;
use crate::resync::target::Ending;
use crate::state::{Conn, Disk, State};
use crate::volume::MetaTask;
use crate::wire::BlockAck;

impl Resource {
    /// The target has written a block.
    pub(crate) fn on_resync_written(&mut self, at: usize, ack: &BlockAck) -> Result<(), Wrong> {
        let range = self.checked_range(at, ack.sector, ack.size)?;
        if self.volumes[at].is_syncing() {
            self.volumes[at].set_in_sync(range);
        }
        Ok(())
    }

    /// The target is done: make sure that its last acknowledgements were seen, then end.
    pub(crate) fn begin_source_end(&mut self, at: usize) {
        if let Some(resync) = self.volumes[at].resync.as_mut() {
            resync.ending = Ending::Pinging { pongs: self.link.pings + 1 };
        }
        self.send_ping();
    }

    /// Ends the resync on the source.
    pub(crate) fn finish_source(&mut self, at: usize) {
        let volume = &mut self.volumes[at];
        let state = volume.state;
        let Some(disk) = volume.disk.as_mut() else { return };
        if disk.bitmap.count() > 0 {
            self.refuse_source_end(at);
            return;
        }
        disk.uuids.sync_finish_source();
        // The marks are gone from the disk first: without a resync nobody looks at them again.
        self.save_bitmap(at);
        self.log_resync_end(at, 0);
        let state = State { conn: Conn::Connected, pdsk: Disk::UpToDate, ..state };
        self.set_state(at, state, "resync done");
        self.push_meta(at, MetaTask::Superblock);
        self.start_grow_sync(at);
    }

    /// The target is UpToDate, so what failed there has been overwritten since, but blocks are
    /// marked here: of a write that failed on this disk only. Both nodes must know of them (RS-4,
    /// ST-3), as they will when the bitmaps are merged again.
    pub(crate) fn refuse_source_end(&mut self, at: usize) {
        let left = self.volumes[at].out_of_sync();
        let ix = self.volumes[at].ix;
        let text = format!("the peer ended the resync, but {left} blocks are marked here");
        self.log(Level::Error, Scope::PeerDevice(ix), text);
        self.lose_link(Conn::ProtocolError, Then::Reconnect, "resync ends too early");
    }

    /// Tells how the resync went.
    pub(crate) fn log_resync_end(&mut self, at: usize, failed: u64) {
        let now = self.now;
        let volume = &mut self.volumes[at];
        let ix = volume.ix;
        let Some(resync) = volume.resync.take() else { return };
        let (total, paused) = resync.times(now);
        let kib = resync.total_blocks.saturating_sub(failed) * 4;
        let rate = kib * 1000 / (total.as_ms() - paused.as_ms()).max(1);
        let text = format!(
            "Resync done (total {} sec; paused {} sec; {rate} K/sec)",
            total.as_ms() / 1000,
            paused.as_ms() / 1000
        );
        self.log(Level::Info, Scope::PeerDevice(ix), text);
        if failed > 0 {
            let text = format!("{failed} blocks could not be synced and stay marked");
            self.log(Level::Error, Scope::PeerDevice(ix), text);
        }
    }
}
