//! What each command does, step by step.
//!
//! A step looks at the state, does what is possible, and says whether it has to wait; it is called
//! again after every event.

use super::{
    End, Ending, Job, NOBODY, Outcome, Phase, failure, held_open, refusal, requests_suspended,
};
use crate::action::{Level, Scope};
use crate::config::ResourceConfig;
use crate::connect::Then;
use crate::control::{Command, Refusal, Reply};
use crate::mutant::Mutant;
use crate::resource::Resource;
use crate::state::{
    Conn, Disk, OnNoData, Refused, Role, State, StateChange, has_no_data, soft_change,
};
use crate::units::{Sector, VolumeNr};
use crate::volume::MetaTask;
use crate::wire::UuidFlags;

impl Resource {
    pub(super) fn step_up(&mut self, job: &mut Job) -> Outcome {
        match self.step_attach(job) {
            Outcome::Done(_) => {}
            other => return other,
        }
        if self.link_is_down() && self.link.conn == Conn::StandAlone {
            self.start_link(false);
        }
        Outcome::Done(Reply::Done)
    }

    pub(super) fn start_link(&mut self, discard_my_data: bool) {
        self.link.discard_my_data = discard_my_data;
        self.link.split_brain = false;
        self.set_link_state(Conn::Unconnected, "connect");
        // A socket that was dialled for the connection before may still be closing.
        self.link.begin_anew();
        self.run_link();
    }

    pub(super) fn step_attach(&mut self, job: &mut Job) -> Outcome {
        if job.phase == Phase::Start {
            if job.todo.iter().any(|at| self.disk_is_busy(*at)) {
                // What an earlier disk still has under way must not be taken for the new one's.
                return Outcome::Wait;
            }
            job.phase = Phase::Settle;
            let wants = |r: &Self, at: usize| r.volumes[at].config.meta.is_some();
            job.todo.retain(|at| wants(self, *at));
            for at in job.todo.clone() {
                if self.volumes[at].state.disk != Disk::Diskless || self.volumes[at].disk.is_some()
                {
                    let text = "Device is attached to a disk (use detach first)";
                    return Outcome::Refuse(failure(124, text, "detach it first"));
                }
            }
            for at in job.todo.clone() {
                self.begin_attach(at);
            }
            return Outcome::Again;
        }
        if !job.todo.is_empty() {
            return Outcome::Wait;
        }
        match job.failure.take() {
            Some(refusal) => Outcome::Refuse(refusal),
            None => Outcome::Done(Reply::Done),
        }
    }

    /// An attach ended.
    pub(crate) fn admin_attached(&mut self, at: usize, result: Result<(), (i32, String)>) {
        self.again = true;
        let nr = self.volumes[at].config.nr;
        let Some(job) = self.admin.job.as_mut() else { return };
        if !matches!(job.command, Command::Up | Command::Attach(_)) {
            return;
        }
        job.todo.retain(|todo| *todo != at);
        if let Err((code, text)) = result {
            let advice = match code {
                119 => "create metadata with: drbdctl create-md",
                104 => "check the disk path in the configuration, and who else uses the disk",
                150 => "attach the disk with the data in use, or make this node Secondary first",
                _ => "see the engine's log",
            };
            let text = format!("volume {nr}: {text}");
            job.failure.get_or_insert_with(|| failure(code, text, advice));
        }
    }

    pub(super) fn step_detach(&mut self, job: &mut Job, force: bool) -> Outcome {
        let Some(at) = job.todo.front().copied() else { return Outcome::Done(Reply::Done) };
        let state = self.volumes[at].state;
        match job.phase {
            Phase::Start => {
                if state.disk == Disk::Diskless {
                    job.todo.pop_front();
                    return Outcome::Again;
                }
                if force {
                    job.phase = Phase::Settle;
                    self.set_state(at, State { disk: Disk::Failed, ..state }, "forced detach");
                    return Outcome::Again;
                }
                let change = StateChange { disk: Some(Disk::Failed), ..StateChange::default() };
                self.ask_or_apply(job, at, &change, |this| this.put_disk_away(at))
            }
            Phase::Asked => {
                let change = StateChange { disk: Some(Disk::Failed), ..StateChange::default() };
                self.take_answer(job, at, &change, |this| this.put_disk_away(at))
            }
            Phase::Settle | Phase::Disconnecting | Phase::Detaching => {
                // LV-5: a disk that hangs is put away when it answers, whenever that is.
                let is_over = force && self.now >= job.began + super::TRANSIENT_WAIT;
                let is_over = is_over && !self.mutant.is_on(Mutant::WaitForHungDisk);
                if self.volumes[at].disk.is_some() && !is_over {
                    return Outcome::Wait;
                }
                job.todo.pop_front();
                job.phase = Phase::Start;
                Outcome::Again
            }
        }
    }

    pub(super) fn step_connect(&mut self, discard_my_data: bool) -> Outcome {
        if !self.link_is_down() {
            let text = "Device has a net-config (use disconnect first)";
            return Outcome::Refuse(failure(125, text, "it is connected, or trying to connect"));
        }
        if discard_my_data && self.role() == Role::Primary {
            let text = "--discard-my-data not allowed when primary";
            return Outcome::Refuse(failure(123, text, "make this node Secondary first"));
        }
        self.start_link(discard_my_data);
        Outcome::Done(Reply::Done)
    }

    pub(super) fn step_disconnect(&mut self, job: &mut Job, force: bool) -> Outcome {
        if self.link_is_down() {
            let reply = if job.phase == Phase::Start { Reply::NothingToDo } else { Reply::Done };
            return Outcome::Done(reply);
        }
        let is_connected = self.link.conn == Conn::Connected;
        match job.phase {
            Phase::Start if is_connected && !force => {
                let change =
                    StateChange { conn: Some(Conn::Disconnecting), ..StateChange::default() };
                for at in 0..self.volumes.len() {
                    let old = self.volumes[at].state;
                    if let Err(refused) = soft_change(&old, &change, &self.rules(at)) {
                        return self.refuse_or_wait(job, refused);
                    }
                }
                self.ask(None, &change);
                job.phase = Phase::Asked;
                Outcome::Wait
            }
            Phase::Asked if is_connected => match self.peers_answer() {
                None => Outcome::Wait,
                Some(code) if code >= 1 => {
                    self.lose_link(Conn::Disconnecting, Then::StandAlone, "");
                    job.phase = Phase::Settle;
                    Outcome::Again
                }
                Some(_) => Outcome::Refuse(refusal(Refused::ByPeer)),
            },
            Phase::Start | Phase::Asked => {
                self.lose_link(Conn::Disconnecting, Then::StandAlone, "");
                job.phase = Phase::Settle;
                Outcome::Again
            }
            Phase::Settle | Phase::Disconnecting | Phase::Detaching => Outcome::Wait,
        }
    }

    pub(super) fn step_secondary(&mut self, job: &mut Job, holder: Option<&str>) -> Outcome {
        match job.phase {
            Phase::Start => {
                if self.role() != Role::Primary {
                    return Outcome::Done(Reply::NothingToDo);
                }
                if let Some(holder) = holder {
                    return Outcome::Refuse(held_open(holder));
                }
                self.close_epoch();
                job.phase = Phase::Asked;
                Outcome::Again
            }
            Phase::Asked => {
                // AL-10: nothing is in flight, on either side.
                if !self.is_quiet() {
                    return self.wait_until_quiet();
                }
                for at in 0..self.volumes.len() {
                    let state = State { role: Role::Secondary, ..self.volumes[at].state };
                    self.save_bitmap(at);
                    self.set_state(at, state, "secondary");
                }
                job.phase = Phase::Settle;
                Outcome::Again
            }
            Phase::Settle | Phase::Disconnecting | Phase::Detaching => self.when_durable(),
        }
    }

    /// Whether nothing of the host is in flight, here or on the way to the peer.
    fn is_quiet(&self) -> bool {
        let mut all = 0..self.volumes.len();
        all.all(|at| self.is_host_idle(at)) && self.transfer_log.is_empty()
    }

    /// What is suspended is not waited for: it may be the next command that lets it go on (LV-1).
    fn wait_until_quiet(&self) -> Outcome {
        let is_stuck =
            |at: &usize| self.volumes[*at].state.is_suspended() && !self.is_host_idle(*at);
        match (0..self.volumes.len()).find(is_stuck) {
            Some(at) => Outcome::Refuse(requests_suspended(&self.volumes[at].state)),
            None => Outcome::Wait,
        }
    }

    /// Done when no metadata work is left.
    pub(super) fn when_durable(&self) -> Outcome {
        let is_busy = |v: &crate::volume::Volume| {
            v.disk.as_ref().is_some_and(|disk| !disk.meta.tasks.is_empty())
        };
        if self.volumes.iter().any(is_busy) { Outcome::Wait } else { Outcome::Done(Reply::Done) }
    }

    pub(super) fn step_sync(&mut self, job: &mut Job, conn: Conn) -> Outcome {
        let Some(at) = job.todo.front().copied() else { return Outcome::Done(Reply::Done) };
        let change = StateChange { conn: Some(conn), ..StateChange::default() };
        let apply = |this: &mut Self| {
            let state = State { conn, ..this.volumes[at].state };
            this.set_state(at, state, "full sync on request");
        };
        let state = self.volumes[at].state;
        let outcome = if job.phase == Phase::Start {
            if state.conn < Conn::Connected {
                return Outcome::Refuse(refusal(Refused::NeedConnection));
            }
            self.ask_or_apply(job, at, &change, apply)
        } else {
            self.take_answer(job, at, &change, apply)
        };
        if matches!(outcome, Outcome::Again) && job.phase == Phase::Settle {
            job.todo.pop_front();
            job.phase = Phase::Start;
        }
        outcome
    }

    pub(super) fn step_outdate(&mut self, job: &mut Job) -> Outcome {
        if job.phase == Phase::Settle {
            return self.when_durable();
        }
        let change = StateChange { disk: Some(Disk::Outdated), ..StateChange::default() };
        let mut below = None;
        let mut wanted = Vec::new();
        for at in 0..self.volumes.len() {
            match soft_change(&self.volumes[at].state, &change, &self.rules(at)) {
                Ok(_) => wanted.push(at),
                // It is as old as wanted, or worse.
                Err(refused @ Refused::LowerThanOutdated) => below = Some(refused),
                Err(refused) => return Outcome::Refuse(refusal(refused)),
            }
        }
        if let Some(refused) = below.filter(|_| wanted.is_empty()) {
            return Outcome::Refuse(refusal(refused));
        }
        for at in wanted {
            let state = State { disk: Disk::Outdated, ..self.volumes[at].state };
            self.set_state(at, state, "outdate");
        }
        job.phase = Phase::Settle;
        Outcome::Again
    }

    pub(super) fn step_pause(&mut self, pause: bool) -> Outcome {
        let mut changed = false;
        for at in 0..self.volumes.len() {
            let state = self.volumes[at].state;
            if state.user_isp != pause {
                changed = true;
                self.set_state(at, State { user_isp: pause, ..state }, "pause-sync");
            }
        }
        if changed {
            return Outcome::Done(Reply::Done);
        }
        let (code, text) = if pause {
            (134, "Sync-pause flag is already set")
        } else {
            (135, "Sync-pause flag is already cleared")
        };
        Outcome::Refuse(failure(code, text, ""))
    }

    pub(super) fn step_new_uuid(&mut self, job: &mut Job, clear_bitmap: bool) -> Outcome {
        if job.phase == Phase::Settle {
            return self.when_durable();
        }
        for at in job.todo.clone() {
            let volume = &self.volumes[at];
            let state = volume.state;
            let Some(uuids) = volume.uuids().filter(|_| volume.has_usable_disk()) else {
                return Outcome::Refuse(refusal(Refused::Diskless));
            };
            let is_fresh = uuids.current == crate::gi::Uuid::FRESH
                && state.conn == Conn::Connected
                && state.pdsk == Disk::Inconsistent
                && state.disk == Disk::Inconsistent;
            if clear_bitmap && !is_fresh {
                let text = "only two connected nodes with fresh metadata can skip the initial sync";
                let advice = "create-md on both nodes, up on both, wait-connect, then try again";
                return Outcome::Refuse(failure(140, text, advice));
            }
            if !clear_bitmap && state.conn != Conn::StandAlone {
                // The peer would stay behind in the generation that both have (GI-1).
                let text = "Need to be StandAlone";
                return Outcome::Refuse(failure(151, text, "disconnect first"));
            }
            if !clear_bitmap && state.disk != Disk::UpToDate {
                return Outcome::Refuse(refusal(Refused::NoUpToDateDisk));
            }
        }
        job.phase = Phase::Settle;
        for at in job.todo.clone() {
            if clear_bitmap {
                self.skip_initial_sync(at);
            } else {
                if let Some(disk) = self.volumes[at].disk.as_mut() {
                    // A peer that is away may be of the generation that the bitmap counts from.
                    disk.uuids.clear_bitmap();
                }
                self.new_current_uuid(at);
                self.send_uuids(at, false);
            }
        }
        Outcome::Again
    }

    pub(super) fn skip_initial_sync(&mut self, at: usize) {
        let random = self.random();
        let volume = &mut self.volumes[at];
        let state = volume.state;
        let Some(disk) = volume.disk.as_mut() else { return };
        disk.uuids.skip_initial_sync(random, state.role == Role::Primary);
        disk.bitmap.clear_all();
        self.send_uuids_with(at, false, UuidFlags::SKIP_INITIAL_SYNC);
        if let Some(disk) = self.volumes[at].disk.as_mut() {
            disk.uuids.drop_bitmap();
        }
        let state = State { disk: Disk::UpToDate, pdsk: Disk::UpToDate, ..state };
        self.push_meta(at, MetaTask::Bitmap);
        self.set_state(at, state, "initial sync skipped");
        self.push_meta(at, MetaTask::Superblock);
    }

    pub(super) fn step_resize(
        &mut self,
        job: &mut Job,
        size: Option<Sector>,
        clean: bool,
        alone: bool,
    ) -> Outcome {
        let is_asked = job.id != NOBODY;
        match job.phase {
            Phase::Start => {
                for at in job.todo.clone() {
                    if let Some(refusal) = self.check_resize(at, alone, is_asked) {
                        return Outcome::Refuse(refusal);
                    }
                }
                for at in job.todo.clone() {
                    // Nothing may be in flight while the metadata moves.
                    self.volumes[at].is_paused = true;
                }
                self.close_epoch();
                job.phase = Phase::Asked;
                Outcome::Again
            }
            Phase::Asked => {
                let Some(at) = job.todo.front().copied() else {
                    job.phase = Phase::Settle;
                    return Outcome::Again;
                };
                if let Some(refusal) = self.check_resize(at, alone, is_asked) {
                    // It was possible when the command came.
                    return self.give_up_resize(job, refusal);
                }
                self.release_waiting(at);
                if !self.may_move_metadata(at) {
                    return Outcome::Wait;
                }
                self.probe_disk(at);
                job.phase = Phase::Detaching;
                Outcome::Wait
            }
            Phase::Detaching => {
                let at = *job.todo.front().expect("a probe is under way");
                if !self.may_move_metadata(at) {
                    return Outcome::Wait;
                }
                let Some(probed) = self.take_probe(at) else { return Outcome::Wait };
                let applied = probed
                    .and_then(|info| self.apply_resize(at, info, size, clean, alone, is_asked));
                if let Err(text) = applied {
                    let refusal = failure(111, text, "check the sizes of both disks");
                    return self.give_up_resize(job, refusal);
                }
                self.volumes[at].is_paused = false;
                job.todo.pop_front();
                job.phase = Phase::Asked;
                Outcome::Again
            }
            Phase::Settle | Phase::Disconnecting => self.when_durable(),
        }
    }

    fn give_up_resize(&mut self, job: &mut Job, refusal: Refusal) -> Outcome {
        for at in job.todo.drain(..) {
            self.volumes[at].is_paused = false;
        }
        Outcome::Refuse(refusal)
    }

    /// Whether nothing is under way that the metadata must not move under.
    fn may_move_metadata(&self, at: usize) -> bool {
        let is_quiet = self.volumes[at]
            .disk
            .as_ref()
            .is_none_or(|disk| disk.log.is_quiet() && disk.meta.tasks.is_empty());
        is_quiet && (!self.is_connected() || self.transfer_log.is_empty())
    }

    /// The rules for whom a resize may begin with do not apply to the node that follows.
    fn check_resize(&self, at: usize, alone: bool, is_asked: bool) -> Option<Refusal> {
        let volume = &self.volumes[at];
        let state = volume.state;
        if !volume.has_usable_disk() {
            return Some(refusal(Refused::Diskless));
        }
        if state.conn > Conn::Connected {
            let text = "Resize not allowed during resync.";
            return Some(failure(130, text, "wait with: drbdctl wait-sync"));
        }
        if is_asked
            && state.conn == Conn::Connected
            && state.role == Role::Secondary
            && state.peer == Role::Secondary
        {
            let text = "Need one Primary node to resize.";
            return Some(failure(131, text, "make one node Primary first"));
        }
        if state.conn < Conn::Connected && !alone {
            let text = "the peer is not connected, its disk may be smaller";
            let advice = "connect first, or use --assume-peer-has-space";
            return Some(failure(0, text, advice));
        }
        None
    }

    pub(super) fn step_adjust(&mut self, new: &ResourceConfig) -> Outcome {
        if *new == self.config {
            return Outcome::Done(Reply::NothingToDo);
        }
        if let Err(e) = crate::resource::check(new, &self.memory) {
            return Outcome::Refuse(failure(0, e.to_string(), "correct the configuration"));
        }
        let shape = |c: &ResourceConfig| -> Vec<(VolumeNr, u32, bool)> {
            c.volumes.iter().map(|v| (v.nr, v.minor, v.meta.is_some())).collect()
        };
        if new.name != self.config.name || shape(new) != shape(&self.config) {
            let text = "volumes were added, removed or changed";
            return Outcome::Refuse(failure(159, text, "take the resource down and up again"));
        }
        let protocol = self.config.net.protocol != new.net.protocol;
        let old = std::mem::replace(&mut self.config, new.clone());
        for ((volume, old), new) in self.volumes.iter_mut().zip(&old.volumes).zip(&new.volumes) {
            let size = volume.config.disk.size;
            volume.config = new.clone();
            if old.disk.size == new.disk.size {
                // Agreed upon since by a resize: this is no wish to change it.
                volume.config.disk.size = size;
            }
        }
        self.transfer_log.set_max_epoch_size(new.net.max_epoch_size);
        for at in 0..self.volumes.len() {
            let state = self.volumes[at].state;
            // What waits for a good copy fails from now on, or waits from now on (ACK-3).
            let susp_nod = match new.on_no_data {
                OnNoData::IoError => false,
                OnNoData::SuspendIo => state.susp_nod || has_no_data(&state),
            };
            if susp_nod != state.susp_nod {
                let state = State { susp_nod, ..state };
                self.set_state(at, state, "on-no-data-accessible changed");
            }
        }
        if self.link.is_established() && self.link.agreed().version >= 100 {
            if protocol {
                self.close_epoch();
            }
            self.send_protocol_update();
        }
        self.log(Level::Info, Scope::Resource, "options changed");
        Outcome::Done(Reply::Done)
    }

    pub(super) fn step_down(
        &mut self,
        job: &mut Job,
        holder: Option<&str>,
        force: bool,
    ) -> Outcome {
        match job.phase {
            Phase::Start => {
                // Also with force: I/O errors under a mounted file system help nobody.
                if let Some(holder) = holder {
                    return Outcome::Refuse(held_open(holder));
                }
                job.phase = Phase::Asked;
                if self.role() == Role::Primary {
                    self.close_epoch();
                }
                Outcome::Again
            }
            Phase::Asked => {
                // Otherwise this end is that of a node that crashed (AL-10).
                let is_clean = self.is_quiet();
                if !force && !is_clean {
                    return self.wait_until_quiet();
                }
                for at in 0..self.volumes.len() {
                    let state = self.volumes[at].state;
                    if is_clean && state.role == Role::Primary {
                        self.save_bitmap(at);
                        self.set_state(at, State { role: Role::Secondary, ..state }, "down");
                    }
                }
                job.phase = Phase::Settle;
                Outcome::Again
            }
            Phase::Settle => {
                if self.link.conn == Conn::Connected && !force {
                    let change =
                        StateChange { conn: Some(Conn::Disconnecting), ..StateChange::default() };
                    self.ask(None, &change);
                }
                job.phase = Phase::Disconnecting;
                Outcome::Again
            }
            Phase::Disconnecting => {
                let waits = self.link.conn == Conn::Connected && self.admin.asked.is_some();
                if waits && self.peers_answer().is_none() {
                    return Outcome::Wait;
                }
                if !self.link_is_down() {
                    self.lose_link(Conn::Disconnecting, Then::StandAlone, "");
                    self.run_link();
                    if !self.link_is_down() && !force {
                        return Outcome::Wait;
                    }
                }
                for at in 0..self.volumes.len() {
                    self.put_disk_away(at);
                }
                job.phase = Phase::Detaching;
                Outcome::Again
            }
            Phase::Detaching => {
                let is_over = force && self.now >= job.began + super::TRANSIENT_WAIT;
                if self.volumes.iter().any(|volume| volume.disk.is_some()) && !is_over {
                    return Outcome::Wait;
                }
                for at in 0..self.volumes.len() {
                    self.set_size(at, Sector(0));
                }
                self.admin.ending = Ending::Due(End::Stop);
                Outcome::Done(Reply::Done)
            }
        }
    }
}
