//! Promotion, of all volumes or of none.
//!
//! Every volume is checked here first, then the peer is asked about one after the other, and only
//! when it has agreed to all of them is anything changed. A refusal so leaves no volume promoted,
//! demoted or in a new generation (ST-4, ST-7); what the peer had agreed to is taken back.
//!
//! Source: protocol notes, sections 6.1, 9.7 and 14.7.

use super::{Heard, Job, Outcome, Phase, refusal};
use crate::action::{Level, Scope};
use crate::control::Reply;
use crate::mutant::Mutant;
use crate::resource::Resource;
use crate::state::{Conn, Disk, Refused, Role, StateChange, soft_change};

impl Resource {
    pub(super) fn step_primary(&mut self, job: &mut Job, force: bool) -> Outcome {
        match job.phase {
            Phase::Start => self.begin_promotion(job, force),
            Phase::Asked => match self.hear() {
                Heard::Nothing => Outcome::Wait,
                Heard::Lost => {
                    // The questions are other ones now.
                    job.phase = Phase::Start;
                    Outcome::Again
                }
                Heard::Agreed => {
                    job.agreed.extend(job.todo.pop_front());
                    self.ask_for_promotion(job, force)
                }
                Heard::Refused(refusal) => {
                    self.take_back_promotion(job, force);
                    Outcome::Refuse(refusal)
                }
            },
            Phase::Settle | Phase::Disconnecting | Phase::Detaching => {
                let is_settled = self.volumes.iter().all(|volume| volume.gate == 0);
                if is_settled { Outcome::Done(Reply::Done) } else { Outcome::Wait }
            }
        }
    }

    /// What a promotion changes of a volume; `None`: nothing.
    fn promotion_of(&self, at: usize, force: bool) -> Option<StateChange> {
        let state = self.volumes[at].state;
        // Better data in reach needs no force, and must not be given up for it.
        let is_peer_good = state.pdsk == Disk::UpToDate && state.conn >= Conn::Connected;
        let is_poor = state.disk >= Disk::Inconsistent && state.disk < Disk::UpToDate;
        let forces = force && is_poor && !is_peer_good;
        (state.role != Role::Primary || forces).then(|| StateChange {
            role: Some(Role::Primary),
            disk: forces.then_some(Disk::UpToDate),
            ..StateChange::default()
        })
    }

    /// The first rule against the promotion of one of these volumes.
    fn check_promotion(&self, volumes: &[usize], force: bool) -> Result<(), Refused> {
        let is_lax = self.mutant.is_on(Mutant::PromoteAnything);
        for at in volumes.iter().filter(|_| !is_lax) {
            if let Some(change) = self.promotion_of(*at, force) {
                soft_change(&self.volumes[*at].state, &change, &self.rules(*at))?;
            }
        }
        Ok(())
    }

    fn begin_promotion(&mut self, job: &mut Job, force: bool) -> Outcome {
        let all = 0..self.volumes.len();
        job.agreed.clear();
        job.todo = all.filter(|at| self.promotion_of(*at, force).is_some()).collect();
        let is_connected = |at: &usize| self.volumes[*at].state.conn >= Conn::Connected;
        if job.began == self.now && job.todo.iter().any(is_connected) {
            self.send_ping();
        }
        if let Err(refused) = self.check_promotion(job.todo.make_contiguous(), force) {
            let outcome = self.refuse_or_wait(job, refused);
            let is_refused = matches!(outcome, Outcome::Refuse(_));
            if is_refused && self.mutant.is_on(Mutant::RefuseTooLate) {
                self.new_current_uuid(0);
            }
            return outcome;
        }
        job.phase = Phase::Asked;
        self.ask_for_promotion(job, force)
    }

    /// Asks about the next volume; when the peer has agreed to all of them, promotes them.
    fn ask_for_promotion(&mut self, job: &mut Job, force: bool) -> Outcome {
        while let Some(at) = job.todo.front().copied() {
            let change = self.promotion_of(at, force);
            if let Some(change) = change
                && self.volumes[at].state.conn >= Conn::Connected
            {
                self.ask(Some(at), &change);
                return Outcome::Wait;
            }
            job.agreed.extend(job.todo.pop_front());
        }
        if let Err(refused) = self.check_promotion(&job.agreed, force) {
            self.take_back_promotion(job, force);
            return Outcome::Refuse(refusal(refused));
        }
        for at in job.agreed.clone() {
            if let Some(change) = self.promotion_of(at, force) {
                self.become_primary(at, change.disk.is_some());
            }
        }
        job.phase = Phase::Settle;
        Outcome::Again
    }

    pub(super) fn take_back_promotion(&mut self, job: &Job, force: bool) {
        for at in &job.agreed {
            if let Some(change) = self.promotion_of(*at, force) {
                self.take_back(*at, &change);
            }
        }
    }

    fn become_primary(&mut self, at: usize, forced: bool) {
        let mut state = self.volumes[at].state;
        state.role = Role::Primary;
        if forced {
            state.disk = Disk::UpToDate;
            let ix = self.volumes[at].ix;
            self.log(Level::Warn, Scope::Device(ix), "Forced to consider local data as UpToDate!");
        }
        let is_alone = state.conn < Conn::Connected || state.pdsk <= Disk::Failed;
        let may_be_shared = self.volumes[at].uuids().is_some_and(|u| u.may_be_shared());
        let has_disk = self.volumes[at].uuids().is_some() && state.disk == Disk::UpToDate;
        let renew = has_disk && (forced || (is_alone && may_be_shared));
        if renew {
            // The role bit of the new identifier follows from the role.
            self.new_current_uuid(at);
            if state.conn >= Conn::Connected {
                self.send_uuids_as(at, true);
            }
        }
        self.set_state(at, state, "primary");
    }

    fn send_uuids_as(&mut self, at: usize, primary: bool) {
        if let Some(disk) = self.volumes[at].disk.as_mut() {
            disk.uuids.set_role(primary);
        }
        self.send_uuids(at, false);
    }
}
