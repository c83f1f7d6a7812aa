//! The operator's commands: one at a time, done or refused, never half (ST-7).
//!
//! A command that needs the peer's consent sends a request and waits for the answer; when the
//! connection is lost meanwhile, the question is put again under the new circumstances (ST-4). A
//! command waits for conditions, never for time, except where a transient state may pass by
//! itself.

mod commands;
mod promotion;
mod upgrade;

use std::collections::VecDeque;

use crate::action::{Action, Level, Scope};
use crate::connect::{LeftOld, Then};
use crate::control::{Command, Refusal, Reply};
use crate::event::CommandId;
use crate::mutant::Mutant;
use crate::resource::Resource;
use crate::state::{Conn, Disk, Refused, State, StateChange, soft_change};
use crate::units::{Span, Time, VolumeNr};
use crate::wire::Packet;

/// Stands for the operator of a command that this node gives itself: nobody waits for an answer.
const NOBODY: CommandId = CommandId(u64::MAX);
/// Commands that may wait behind the one under way.
const MAX_QUEUED: usize = 16;
/// How long a command waits for a transient state to pass.
const TRANSIENT_WAIT: Span = Span::from_secs(5);

/// The commands of a resource.
#[derive(Debug, Default)]
pub(crate) struct Admin {
    job: Option<Job>,
    queue: VecDeque<(CommandId, Command)>,
    /// The question under way.
    asked: Option<Asked>,
    /// Earlier questions whose command was given up before the answer came, oldest first.
    abandoned: VecDeque<Asked>,
    /// Whether the process is to end.
    ending: Ending,
}

/// How far the end of the process has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Ending {
    /// It goes on.
    #[default]
    No,
    /// No command is begun any more. The driver is told when nothing else is to be done.
    Due(End),
    /// The driver was told.
    Told(End),
}

/// How the process is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Everything is put away.
    Stop,
    /// In mid-service.
    Leave,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    /// The volume; `None`: the whole connection.
    at: Option<usize>,
    change: StateChange,
    answer: Option<i32>,
}

/// A command under way.
#[derive(Debug)]
struct Job {
    id: CommandId,
    command: Command,
    /// Volumes still to be dealt with, by index.
    todo: VecDeque<usize>,
    /// Volumes of which the peer has agreed to the change, or need not be asked.
    agreed: Vec<usize>,
    phase: Phase,
    began: Time,
    /// First failure of a volume.
    failure: Option<Refusal>,
}

/// Where a command stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing was done yet for the volume at the front.
    Start,
    /// The peer was asked.
    Asked,
    /// The change is made; its consequences must become durable, or quiet.
    Settle,
    /// The last steps of `down`.
    Disconnecting,
    /// The disks are being put away.
    Detaching,
}

/// What a step of a command came to.
enum Outcome {
    /// It has to wait for something.
    Wait,
    /// It made progress; look again.
    Again,
    /// It is done.
    Done(Reply),
    /// It is refused.
    Refuse(Refusal),
}

/// What became of a question to the peer.
enum Heard {
    /// It has not answered.
    Nothing,
    /// The connection was lost with the question.
    Lost,
    /// Yes.
    Agreed,
    /// No.
    Refused(Refusal),
}

fn refusal(refused: Refused) -> Refusal {
    Refusal {
        code: refused.code(),
        exit: refused.exit_code(),
        text: refused.to_string(),
        advice: refused.advice().to_owned(),
    }
}

fn failure(code: i32, text: impl Into<String>, advice: &str) -> Refusal {
    Refusal { code, exit: 10, text: text.into(), advice: advice.to_owned() }
}

fn engine_is_ending() -> Refusal {
    failure(0, "the engine is ending", "start it again: up")
}

fn held_open(holder: &str) -> Refusal {
    Refusal { text: format!("{}: {holder}", Refused::DeviceInUse), ..refusal(Refused::DeviceInUse) }
}

fn requests_suspended(state: &State) -> Refusal {
    let why = crate::state::suspension(state);
    let advice = "give it a disk (attach) or its peer (connect) back first; \
                  `down --force` fails the requests";
    Refusal {
        text: format!("requests wait: I/O is suspended ({why})"),
        advice: advice.to_owned(),
        ..refusal(Refused::DeviceInUse)
    }
}

impl Resource {
    pub(crate) fn on_command(&mut self, id: CommandId, command: Command) {
        if command == Command::Status {
            let status = Reply::Status(Box::new(self.status(self.now)));
            self.out.push(Action::Reply { id, result: Ok(status) });
            return;
        }
        if self.is_ending() {
            self.out.push(Action::Reply { id, result: Err(engine_is_ending()) });
            return;
        }
        if is_forced(&command) && !self.is_upgrading() {
            if let Some(nr) = named_volume(&command).filter(|nr| self.find_volume(*nr).is_none()) {
                // A slip of the operator ends nothing (ST-7).
                let refusal = unknown_volume(nr);
                self.log_refusal(&refusal);
                self.out.push(Action::Reply { id, result: Err(refusal) });
                return;
            }
            // LV-5: it does not wait behind a command that may never end.
            if let Some(job) = self.admin.job.take() {
                self.abort_job(&job);
            }
            self.admin.queue.push_front((id, command));
            self.again = true;
            return;
        }
        if self.admin.queue.len() >= MAX_QUEUED {
            let text = "too many commands are waiting";
            let refusal = failure(0, text, "wait for the earlier commands to end");
            self.out.push(Action::Reply { id, result: Err(refusal) });
            return;
        }
        self.admin.queue.push_back((id, command));
        self.again = true;
    }

    /// The peer's disk has outgrown ours: maybe ours has grown, too, and nobody looked (BM-8).
    pub(crate) fn look_at_own_size(&mut self, at: usize, clean: bool) {
        let resize = Command::Resize {
            volume: Some(self.number_of(at)),
            size: None,
            assume_clean: clean,
            assume_peer_has_space: false,
        };
        if self.admin.queue.len() < MAX_QUEUED {
            self.admin.queue.push_back((NOBODY, resize));
            self.again = true;
        }
    }

    /// Goes on with the command under way, and with the next one.
    pub(crate) fn run_admin(&mut self) {
        while !self.is_ending() {
            let mut job = match self.admin.job.take() {
                Some(job) => job,
                None => match self.next_job() {
                    Some(job) => job,
                    None => return,
                },
            };
            match self.step_job(&mut job) {
                Outcome::Wait => {
                    self.admin.job = Some(job);
                    return;
                }
                Outcome::Again => self.admin.job = Some(job),
                Outcome::Done(reply) => self.end_job(job.id, Ok(reply)),
                Outcome::Refuse(refusal) => {
                    self.log_refusal(&refusal);
                    self.end_job(job.id, Err(refusal));
                }
            }
            self.again = true;
        }
    }

    /// Gives a command up in the middle; nothing of it may be left behind (ST-4, ST-7, LV-1).
    fn abort_job(&mut self, job: &Job) {
        if let Some(asked) = self.admin.asked.take() {
            match asked.answer {
                None => self.admin.abandoned.push_back(asked),
                Some(code) => self.take_back_answer(&asked, code),
            }
        }
        if let Command::Primary { force } = job.command {
            self.take_back_promotion(job, force);
        }
        for volume in &mut self.volumes {
            volume.is_paused = false;
        }
        self.end_job(job.id, Err(failure(0, "aborted by a forced command", "")));
    }

    fn log_refusal(&mut self, refusal: &Refusal) {
        let text = format!("State change failed: {} ({})", refusal.text, refusal.code);
        self.log(Level::Warn, Scope::Resource, text);
    }

    fn end_job(&mut self, id: CommandId, result: Result<Reply, Refusal>) {
        self.admin.asked = None;
        if id != NOBODY {
            self.out.push(Action::Reply { id, result });
        }
        if self.is_ending() {
            // What waits behind the last command is not begun any more.
            for (id, _) in std::mem::take(&mut self.admin.queue) {
                if id != NOBODY {
                    self.out.push(Action::Reply { id, result: Err(engine_is_ending()) });
                }
            }
        }
    }

    fn is_ending(&self) -> bool {
        self.admin.ending != Ending::No
    }

    /// The last word: tells the driver, once, that the process may end.
    pub(crate) fn tell_end(&mut self) {
        let Ending::Due(end) = self.admin.ending else { return };
        self.admin.ending = Ending::Told(end);
        self.out.push(match end {
            End::Stop => Action::Stop,
            End::Leave => Action::Leave,
        });
    }

    fn next_job(&mut self) -> Option<Job> {
        let (id, command) = self.admin.queue.pop_front()?;
        let wanted = named_volume(&command);
        let todo: VecDeque<usize> = match wanted {
            Some(nr) => self.find_volume(nr).into_iter().collect(),
            None => (0..self.volumes.len()).collect(),
        };
        let failure = wanted.filter(|_| todo.is_empty()).map(unknown_volume);
        let began = self.now;
        let (phase, agreed) = (Phase::Start, Vec::new());
        Some(Job { id, command, todo, agreed, phase, began, failure })
    }

    fn step_job(&mut self, job: &mut Job) -> Outcome {
        if job.phase == Phase::Start
            && let Some(refusal) = job.failure.take()
        {
            return Outcome::Refuse(refusal);
        }
        match job.command.clone() {
            Command::Status => unreachable!("answered at once"),
            Command::Up => self.step_up(job),
            Command::Upgrade => self.step_upgrade(job),
            Command::Attach(_) => self.step_attach(job),
            Command::Detach { force, .. } => self.step_detach(job, force),
            Command::Connect { discard_my_data } => self.step_connect(discard_my_data),
            Command::Disconnect { force } => self.step_disconnect(job, force),
            Command::Primary { force } => self.step_primary(job, force),
            Command::Secondary { holder } => self.step_secondary(job, holder.as_deref()),
            Command::Invalidate(_) => self.step_sync(job, Conn::StartingSyncT),
            Command::InvalidateRemote(_) => self.step_sync(job, Conn::StartingSyncS),
            Command::Resize { size, assume_clean, assume_peer_has_space, .. } => {
                self.step_resize(job, size, assume_clean, assume_peer_has_space)
            }
            Command::Outdate => self.step_outdate(job),
            Command::PauseSync(pause) => self.step_pause(pause),
            Command::NewCurrentUuid { clear_bitmap, .. } => self.step_new_uuid(job, clear_bitmap),
            Command::Adjust(config) => self.step_adjust(&config.resource),
            Command::Down { holder, force } => self.step_down(job, holder.as_deref(), force),
        }
    }

    pub(crate) fn admin_detached(&mut self, _at: usize) {
        self.again = true;
    }

    /// Checks a change here, then asks the peer if it is there, else carries it out.
    fn ask_or_apply(
        &mut self,
        job: &mut Job,
        at: usize,
        change: &StateChange,
        apply: impl FnOnce(&mut Self),
    ) -> Outcome {
        let old = self.volumes[at].state;
        if let Err(refused) = soft_change(&old, change, &self.rules(at)) {
            return self.refuse_or_wait(job, refused);
        }
        if old.conn >= Conn::Connected {
            self.ask(Some(at), change);
            job.phase = Phase::Asked;
            return Outcome::Wait;
        }
        apply(self);
        job.phase = Phase::Settle;
        Outcome::Again
    }

    /// Takes the peer's answer to a change.
    fn take_answer(
        &mut self,
        job: &mut Job,
        at: usize,
        change: &StateChange,
        apply: impl FnOnce(&mut Self),
    ) -> Outcome {
        match self.hear() {
            Heard::Nothing => Outcome::Wait,
            Heard::Lost => {
                // The question is another one now.
                job.phase = Phase::Start;
                Outcome::Again
            }
            Heard::Agreed => {
                let old = self.volumes[at].state;
                if let Err(refused) = soft_change(&old, change, &self.rules(at)) {
                    self.take_back(at, change);
                    return Outcome::Refuse(refusal(refused));
                }
                apply(self);
                job.phase = Phase::Settle;
                Outcome::Again
            }
            Heard::Refused(refusal) => Outcome::Refuse(refusal),
        }
    }

    /// What became of the question that was put to the peer.
    fn hear(&mut self) -> Heard {
        if self.admin.asked.is_none() {
            return Heard::Lost;
        }
        let Some(code) = self.peers_answer() else { return Heard::Nothing };
        self.admin.asked = None;
        if code >= 1 {
            return Heard::Agreed;
        }
        let refused = Refused::from_code(code).unwrap_or(Refused::ByPeer);
        let mut refusal = refusal(Refused::ByPeer);
        refusal.text = format!("{}: {refused} ({code})", refusal.text);
        if refused == Refused::TwoPrimaries {
            refusal.advice = refused.advice().to_owned();
        }
        Heard::Refused(refusal)
    }

    /// The peer has agreed to a change that is not made after all: it must not go on believing in
    /// it (ST-3, ST-4).
    fn take_back(&mut self, at: usize, change: &StateChange) {
        let state = self.volumes[at].state;
        // A disk that was to be put away may have gone another way.
        let is_made = change.disk == Some(Disk::Failed) && state.disk <= Disk::Failed;
        if state.conn < Conn::Connected || is_made {
            return;
        }
        let is_role_only = change.conn.is_none() && change.disk.is_none();
        if is_role_only {
            self.send_state(at, state);
        } else {
            let text = "a change that the peer had agreed to could not be made";
            self.lose_link(Conn::NetworkFailure, Then::Reconnect, text);
        }
    }

    fn refuse_or_wait(&mut self, job: &mut Job, refused: Refused) -> Outcome {
        let limit = if refused == Refused::TransientState {
            TRANSIENT_WAIT
        } else if refused == Refused::TwoPrimaries {
            // Word of the peer's demotion may be on its way.
            self.config.net.ping_timeout
        } else {
            Span::ZERO
        };
        if self.now < job.began + limit {
            return Outcome::Wait;
        }
        Outcome::Refuse(refusal(refused))
    }

    /// When a command that waits for a transient state gives up.
    pub(crate) fn admin_deadline(&self) -> Option<Time> {
        let job = self.admin.job.as_ref()?;
        if job.command == Command::Upgrade {
            return Some(job.began + upgrade::LIMIT);
        }
        let is_bounded = job.phase == Phase::Start || is_forced(&job.command);
        if !is_bounded {
            return None;
        }
        let limits = [self.config.net.ping_timeout, TRANSIENT_WAIT];
        limits.map(|limit| job.began + limit).into_iter().filter(|until| *until > self.now).min()
    }

    fn ask(&mut self, at: Option<usize>, change: &StateChange) {
        self.admin.asked = Some(Asked { at, change: *change, answer: None });
        let (mask, value) = change.mask_value();
        let (nr, packet) = match at {
            Some(at) => (self.number_of(at), Packet::StateChgReq { mask, value }),
            None => (VolumeNr(0), Packet::ConnStChgReq { mask, value }),
        };
        self.send_data(nr, packet, None, None);
    }

    fn peers_answer(&self) -> Option<i32> {
        self.admin.asked.and_then(|asked| asked.answer)
    }

    /// Whether the peer was asked to be the source of a full sync, and has not answered.
    pub(crate) fn asks_to_be_target(&self, at: usize) -> bool {
        let is_it = |a: &Asked| a.at == Some(at) && a.change.conn == Some(Conn::StartingSyncT);
        self.admin.asked.as_ref().is_some_and(is_it)
    }

    /// The peer's answer to a question. It answers in the order of the questions.
    pub(crate) fn on_change_reply(&mut self, at: Option<usize>, code: i32) {
        self.again = true;
        if self.admin.abandoned.front().is_some_and(|asked| asked.at == at) {
            let asked = self.admin.abandoned.pop_front().expect("it was just seen");
            self.take_back_answer(&asked, code);
        } else if let Some(asked) = self.admin.asked.as_mut().filter(|asked| asked.at == at) {
            asked.answer = Some(code);
        } else {
            self.ignored.stale_packets += 1;
        }
    }

    /// Nobody wants the answer to this question any more.
    fn take_back_answer(&mut self, asked: &Asked, code: i32) {
        if let Some(at) = asked.at.filter(|_| code >= 1) {
            self.take_back(at, &asked.change);
        }
    }

    pub(crate) fn admin_connection_lost(&mut self) {
        self.admin.asked = None;
        self.admin.abandoned.clear();
        self.again = true;
    }

    /// The peer asks for a change of one volume.
    pub(crate) fn on_volume_change(&mut self, at: usize, theirs: &StateChange) {
        let change = theirs.mirrored();
        if change.conn == Some(Conn::TearDown) {
            self.on_connection_change(theirs);
            return;
        }
        let is_busy = self.admin.asked.is_some_and(|asked| asked.answer.is_none());
        let old = self.volumes[at].state;
        let possible = matches!(
            change.conn,
            None | Some(Conn::StartingSyncS | Conn::StartingSyncT | Conn::Connected)
        );
        let decides = self.link.is_resolver && !self.mutant.is_on(Mutant::AgreeMeanwhile);
        let result = if is_busy && decides {
            Err(Refused::Concurrent)
        } else if !possible {
            Err(Refused::NotSupported)
        } else {
            soft_change(&old, &change, &self.rules(at))
        };
        let code = match &result {
            Ok(new) if *new == old => 2,
            Ok(_) => 1,
            Err(refused) => refused.code(),
        };
        let nr = self.number_of(at);
        self.send_meta(nr, Packet::StateChgReply(code));
        if let Ok(new) = result {
            self.set_state(at, new, "peer's request");
        }
    }

    /// Whether the peer may call this node's data old as it leaves: not while it is in use.
    fn may_be_outdated(&self) -> Result<(), Refused> {
        let (conn, disk) = (Some(Conn::TearDown), Some(Disk::Outdated));
        let change = StateChange { conn, disk, ..StateChange::default() };
        for at in 0..self.volumes.len() {
            match soft_change(&self.volumes[at].state, &change, &self.rules(at)) {
                // It is as old as wanted, or worse.
                Ok(_) | Err(Refused::LowerThanOutdated) => {}
                Err(refused) => return Err(refused),
            }
        }
        Ok(())
    }

    /// The peer wants to end the connection.
    pub(crate) fn on_connection_change(&mut self, theirs: &StateChange) {
        let is_busy = self.admin.asked.is_some_and(|asked| asked.answer.is_none());
        if is_busy && self.link.is_resolver {
            let code = Refused::Concurrent.code();
            self.send_meta(VolumeNr(0), Packet::ConnStChgReply(code));
            return;
        }
        if theirs.conn != Some(Conn::Disconnecting) {
            let code = Refused::ByPeer.code();
            self.send_meta(VolumeNr(0), Packet::ConnStChgReply(code));
            return;
        }
        let left_old = LeftOld {
            ours: theirs.pdsk == Some(Disk::Outdated),
            theirs: theirs.disk == Some(Disk::Outdated),
        };
        if left_old.ours
            && let Err(refused) = self.may_be_outdated()
        {
            self.send_meta(VolumeNr(0), Packet::ConnStChgReply(refused.code()));
            return;
        }
        self.send_meta(VolumeNr(0), Packet::ConnStChgReply(1));
        self.part_from_peer(left_old);
    }
}

fn is_forced(command: &Command) -> bool {
    matches!(
        command,
        Command::Down { force: true, .. }
            | Command::Disconnect { force: true }
            | Command::Detach { force: true, .. }
    )
}

/// The one volume that a command is about, if it names one.
const fn named_volume(command: &Command) -> Option<VolumeNr> {
    match command {
        Command::Attach(nr)
        | Command::Invalidate(nr)
        | Command::InvalidateRemote(nr)
        | Command::Detach { volume: nr, .. }
        | Command::Resize { volume: nr, .. }
        | Command::NewCurrentUuid { volume: nr, .. } => *nr,
        Command::Status
        | Command::Up
        | Command::Upgrade
        | Command::Down { .. }
        | Command::Connect { .. }
        | Command::Disconnect { .. }
        | Command::Primary { .. }
        | Command::Secondary { .. }
        | Command::Outdate
        | Command::PauseSync(_)
        | Command::Adjust(_) => None,
    }
}

fn unknown_volume(nr: VolumeNr) -> Refusal {
    failure(127, format!("volume {nr} is not configured"), "see: drbdctl dump")
}
