//! `upgrade`: this process ends in mid-service and another one goes on.
//!
//! What the next process finds must be what a crash could have left, because it recovers as from a
//! crash: this node stays Primary on the disk, and "needs crash recovery" stays set (AL-10), for
//! the requests that wait in the devices are carried out by the next process alone. But nothing is
//! in flight any more, so the recovery has nothing to do: the host's requests that have begun are
//! ended and answered (ACK-3; those that have not are left to the devices), the peer has
//! confirmed every write, data and bitmap are durable, and only then the activity log is emptied
//! (AL-1, AL-3).
//! Nothing is written by the host from there on, so this step cannot be taken back: a command that
//! has come so far ends the process.
//!
//! The peer is told last. This node's own state does not follow that: it writes nothing that the
//! peer will not have, so there is no new generation to begin (GI-1).
//!
//! All of it has [`LIMIT`]. After that the process ends as it is, as if killed; what it has done
//! until then is right for a crash at any moment.

use super::{End, Ending, Job, Outcome, Phase, failure};
use crate::action::{Level, Scope};
use crate::control::{Command, Reply};
use crate::resource::Resource;
use crate::state::{Conn, Role, StateChange};
use crate::units::Span;
use crate::volume::{MetaTask, Volume};

/// Time for what has begun to come to its end. The host waits meanwhile.
pub(super) const LIMIT: Span = Span::from_secs(10);

impl Resource {
    /// Whether the process is about to make way for another one; nothing stops that.
    pub(super) fn is_upgrading(&self) -> bool {
        let job = self.admin.job.as_ref();
        job.is_some_and(|job| job.command == Command::Upgrade)
    }

    /// Whether the driver was told to end the process: nothing is begun any more.
    pub(crate) fn has_left(&self) -> bool {
        matches!(self.admin.ending, Ending::Due(End::Leave) | Ending::Told(End::Leave))
    }

    pub(super) fn step_upgrade(&mut self, job: &mut Job) -> Outcome {
        if self.now >= job.began + LIMIT {
            let text = "what was under way did not end in time: leaving as if killed";
            self.log(Level::Warn, Scope::Resource, text);
            return self.leave();
        }
        match job.phase {
            Phase::Start => self.begin_upgrade(job),
            Phase::Asked => {
                for at in 0..self.volumes.len() {
                    self.release_waiting(at);
                }
                if !self.is_quiet_for_upgrade() {
                    return Outcome::Wait;
                }
                for at in 0..self.volumes.len() {
                    self.empty_log(at);
                }
                job.phase = Phase::Settle;
                Outcome::Again
            }
            Phase::Settle => {
                if let Outcome::Wait = self.when_durable() {
                    return Outcome::Wait;
                }
                if self.link.conn == Conn::Connected {
                    let conn = Some(Conn::Disconnecting);
                    let change = StateChange { conn, ..StateChange::default() };
                    self.ask(None, &change);
                }
                job.phase = Phase::Disconnecting;
                Outcome::Again
            }
            Phase::Disconnecting | Phase::Detaching => {
                let waits = self.link.conn == Conn::Connected && self.admin.asked.is_some();
                if waits && self.peers_answer().is_none() {
                    return Outcome::Wait;
                }
                // The connection may have broken instead, which has consequences of its own.
                if let Outcome::Wait = self.when_durable() {
                    return Outcome::Wait;
                }
                self.log(Level::Info, Scope::Resource, "leaving for the next engine");
                self.leave()
            }
        }
    }

    fn begin_upgrade(&mut self, job: &mut Job) -> Outcome {
        let forgets = |v: &Volume| v.state.role == Role::Primary && !v.has_usable_disk();
        if let Some(volume) = self.volumes.iter().find(|volume| forgets(volume)) {
            let text = format!(
                "volume {}: a Primary without its disk leaves no trace of its role for the next \
                 engine",
                volume.config.nr
            );
            let advice = "attach the disk first, or take the resource down and up again";
            return Outcome::Refuse(failure(0, text, advice));
        }
        for volume in &mut self.volumes {
            volume.is_paused = true;
        }
        self.close_epoch();
        job.phase = Phase::Asked;
        Outcome::Again
    }

    /// Whether every request of the host that has begun is answered and known to be on both nodes,
    /// and no metadata work is left.
    fn is_quiet_for_upgrade(&self) -> bool {
        let has_begun = |v: &Volume| {
            let waiting = u64::try_from(v.waiting.len()).expect("bounded by the slots");
            v.counters.upper_pending > waiting
        };
        let is_busy = |v: &Volume| {
            let is_primary = v.state.role == Role::Primary;
            let log_is_busy = |d: &crate::volume::LocalDisk| is_primary && !d.log.is_quiet();
            has_begun(v)
                || v.gate > 0
                || v.disk.as_ref().is_some_and(|d| log_is_busy(d) || !d.meta.tasks.is_empty())
        };
        self.transfer_log.is_empty() && !self.volumes.iter().any(is_busy)
    }

    /// Makes what the log stands for durable, then empties it. A log that the peer's writes may
    /// need stays as it is.
    fn empty_log(&mut self, at: usize) {
        let volume = &self.volumes[at];
        if !volume.has_usable_disk() {
            return;
        }
        let is_own = volume.state.role == Role::Primary;
        self.push_meta(at, MetaTask::FlushData);
        self.push_meta(at, MetaTask::Bitmap);
        if is_own {
            self.push_meta(at, MetaTask::InitLog);
        }
    }

    fn leave(&mut self) -> Outcome {
        self.admin.ending = Ending::Due(End::Leave);
        Outcome::Done(Reply::Done)
    }
}
