//! `wait-connect` and `wait-sync`.
//!
//! | the limit is that of | when |
//! |---|---|
//! | `outdated-wfc-timeout` | the peer's disk is known to be Outdated: it cannot become Primary |
//! | `degr-wfc-timeout` | the node was Primary without its peer before it went down |
//! | `wfc-timeout` | else |
//!
//! Each is taken from the command line, else from the `startup` section, and counts from the start
//! of the command for all its objects. Both cases are read off the metadata when the disk is
//! attached; they end with the next connection. Which one applies is told.
//!
//! `wait-sync` ends when the peer is connected and there is nothing to sync: no resync runs or is
//! about to, and no disk is Inconsistent. Where only an operator can go on, because the resync is
//! paused or because no node's data count yet, it says so and waits all the same: somebody may be
//! about to type just that on the other node.
//!
//! An engine has no way to announce a change, so it is
//! asked again and again, on a terminal more often, for the sake of the progress bar.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use replication_core::control::{Status, VolumeStatus};

use super::{Idle, Session, no_volume};
use crate::cli::{Wait, YesNo};
use crate::engine::pause;
use crate::exit::{self, Failure};
use crate::object::Named;
use crate::render::{progress, words};

/// Time between two questions.
const INTERVAL: Duration = Duration::from_millis(200);

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// The peer is connected.
    Connect,
    /// The peer is connected and there is nothing to sync.
    Sync,
}

/// Which of the limits applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Normal,
    Degraded,
    Outdated,
}

impl Case {
    fn of(status: &Status, on: &Named) -> Self {
        let mut volumes = words::volumes(status, on.volume);
        if volumes.all(|volume| volume.peer_disk == "Outdated") {
            return Self::Outdated;
        }
        let mut volumes = words::volumes(status, on.volume);
        if volumes.any(|volume| volume.was_degraded) { Self::Degraded } else { Self::Normal }
    }

    /// The option, and why it applies.
    fn words(self) -> &'static str {
        match self {
            Self::Normal => "wfc-timeout",
            Self::Degraded => {
                "degr-wfc-timeout: this node was Primary without its peer when it went down"
            }
            Self::Outdated => "outdated-wfc-timeout: the peer's disk is Outdated",
        }
    }
}

/// How long to wait; `None`: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    normal: Option<Duration>,
    degraded: Option<Duration>,
    outdated: Option<Duration>,
    /// Go on in state StandAlone.
    after_split_brain: bool,
}

impl Limits {
    fn of(&self, case: Case) -> Option<Duration> {
        match case {
            Case::Normal => self.normal,
            Case::Degraded => self.degraded,
            Case::Outdated => self.outdated,
        }
    }
}

fn limit(seconds: u32) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

impl Session<'_> {
    /// Waits for each object.
    pub(super) fn wait(&mut self, args: &Wait, goal: Goal) -> Result<u8, Failure> {
        let start = Instant::now();
        self.each_part(&args.on.objects, |me, on| {
            let limits = me.limits(args, on);
            if me.context.dry_run {
                writeln!(me.out, "{on}: would wait, {limits:?}")?;
                return Ok(());
            }
            me.wait_for(on, goal, limits, start)
        })
    }

    fn limits(&self, args: &Wait, on: &Named) -> Limits {
        // Without a configuration only the command line limits the wait.
        let startup = self.context.view(&on.resource).ok().map(|view| view.startup);
        let configured = startup.as_ref();
        let or =
            |given: Option<u32>, configured: Option<u32>| limit(given.or(configured).unwrap_or(0));
        Limits {
            normal: or(args.wfc_timeout, configured.map(|startup| startup.wfc_timeout_s)),
            degraded: or(
                args.degr_wfc_timeout.or(args.wfc_timeout),
                configured.map(|startup| startup.degr_wfc_timeout_s),
            ),
            outdated: or(
                args.outdated_wfc_timeout.or(args.wfc_timeout),
                configured.map(|startup| startup.outdated_wfc_timeout_s),
            ),
            after_split_brain: match args.wait_after_sb {
                Some(answer) => answer == YesNo::Yes,
                None => configured.is_some_and(|startup| startup.wait_after_sb),
            },
        }
    }

    fn wait_for(
        &mut self,
        on: &Named,
        goal: Goal,
        limits: Limits,
        start: Instant,
    ) -> Result<(), Failure> {
        let mut display = Display::new();
        loop {
            let client = self.engine(on, Idle::Needed)?;
            let status = client.ok_or_else(|| super::not_running(&on.resource))?.status()?;
            if words::volumes(&status, on.volume).next().is_none() {
                return Err(no_volume(on));
            }
            display.show(self.out, &status, on, limits, goal)?;
            match judge(&status, on, goal, limits, start.elapsed()) {
                Verdict::Done => {
                    display.end();
                    return Ok(());
                }
                Verdict::Over(text) => {
                    display.end();
                    return Err(Failure::new(exit::TIMEOUT, text));
                }
                Verdict::Wait => pause(INTERVAL),
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Done,
    Wait,
    /// Waiting is of no use, or has been long enough.
    Over(String),
}

/// Whether a resync runs or is about to.
fn is_syncing(volume: &VolumeStatus) -> bool {
    let words = [
        "StartingSyncS",
        "StartingSyncT",
        "WFBitMapS",
        "WFBitMapT",
        "WFSyncUUID",
        "SyncSource",
        "SyncTarget",
        "PausedSyncS",
        "PausedSyncT",
    ];
    volume.resync.is_some() || words.contains(&volume.replication.as_str())
}

/// Whether a disk waits for data, now or after the next `primary --force`.
fn is_inconsistent(volume: &VolumeStatus) -> bool {
    [&volume.disk, &volume.peer_disk].iter().any(|disk| *disk == "Inconsistent")
}

/// What only an operator can do so that the wait comes to its end.
fn advice(volume: &VolumeStatus, resource: &str) -> Option<String> {
    let paused = &volume.resync_suspended;
    if volume.replication.starts_with("PausedSync") {
        let place = if paused.contains("user") { "" } else { " on the peer" };
        let by = if paused.is_empty() || paused == "no" { "peer" } else { paused };
        return Some(format!(
            "resync is paused ({by}); go on with: drbdctl resume-sync {resource}{place}"
        ));
    }
    let is_idle = volume.replication == "Established";
    let neither = [&volume.disk, &volume.peer_disk].iter().all(|disk| *disk == "Inconsistent");
    (is_idle && neither).then(|| {
        format!(
            "both disks are Inconsistent; on the node whose data are to be kept: \
             drbdctl primary --force {resource}"
        )
    })
}

fn judge(status: &Status, on: &Named, goal: Goal, limits: Limits, waited: Duration) -> Verdict {
    let is_connected = status.connection == "Connected";
    let is_syncing = words::volumes(status, on.volume).any(is_syncing);
    let is_done = match goal {
        Goal::Connect => is_connected,
        Goal::Sync => {
            let lacks_data = words::volumes(status, on.volume).any(is_inconsistent);
            is_connected && !is_syncing && !lacks_data
        }
    };
    if is_done {
        return Verdict::Done;
    }
    if status.connection == "StandAlone" && !limits.after_split_brain {
        return Verdict::Over(format!(
            "{on}: StandAlone; nothing will connect it without: drbdctl connect {}",
            status.name
        ));
    }
    let case = Case::of(status, on);
    match limits.of(case) {
        Some(limit) if waited >= limit => {
            let states: Vec<String> =
                words::volumes(status, on.volume).map(words::cstate).collect();
            let (seconds, states, why) = (limit.as_secs(), states.join(", "), case.words());
            Verdict::Over(format!("{on}: not there after {seconds} s: {states} ({why})"))
        }
        Some(_) | None => Verdict::Wait,
    }
}

/// Tells how far things are: a bar on a terminal, else a line for each change.
struct Display {
    bar: Option<ProgressBar>,
    last: String,
    /// Remarks that were made.
    said: Vec<String>,
}

impl Display {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{prefix} [{bar:30}] {percent:>3}% {msg}";
            let style = ProgressStyle::with_template(style);
            let style = style.expect("the template is a constant that a test has read");
            ProgressBar::new(100).with_style(style.progress_chars("=> "))
        });
        Self { bar, last: String::new(), said: Vec::new() }
    }

    /// Shows a state, and each remark on it once.
    fn show(
        &mut self,
        out: &mut dyn Write,
        status: &Status,
        on: &Named,
        limits: Limits,
        goal: Goal,
    ) -> Result<(), Failure> {
        if let Some(line) = self.advance(status, on) {
            writeln!(out, "{line}")?;
        }
        for remark in remarks(status, on, limits, goal) {
            if !self.said.contains(&remark) {
                writeln!(out, "{on}: {remark}")?;
                self.said.push(remark);
            }
        }
        Ok(out.flush()?)
    }

    /// Moves the bar, or returns a line to print if there is something new.
    fn advance(&mut self, status: &Status, on: &Named) -> Option<String> {
        let Some(bar) = &self.bar else {
            let states: Vec<&str> =
                words::volumes(status, on.volume).map(|volume| volume.cstate.as_str()).collect();
            let line = format!("{on}: {}", states.join(" "));
            return (line != self.last).then(|| {
                self.last.clone_from(&line);
                line
            });
        };
        let resyncs = words::volumes(status, on.volume).filter_map(|volume| volume.resync.as_ref());
        let (mut total, mut left, mut rate, mut eta) = (0_u64, 0_u64, 0_u64, Some(0));
        for resync in resyncs {
            total = total.saturating_add(resync.total_sectors);
            left = left.saturating_add(resync.left_sectors);
            rate = rate.saturating_add(progress::window_rate(resync).0);
            eta = eta.max(progress::eta_seconds(resync));
        }
        bar.set_prefix(on.to_string());
        bar.set_length(total.max(1));
        bar.set_position(total.saturating_sub(left).min(total));
        let message = match (total, eta) {
            (0, _) => status.connection.clone(),
            (_, Some(seconds)) => {
                let rate = progress::Hundredths(rate);
                format!("{rate} MiB/s, {}:{:02} left", seconds / 60, seconds % 60)
            }
            (_, None) => "stalled".to_owned(),
        };
        bar.set_message(message);
        bar.tick();
        None
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// What the operator should know beside the state.
fn remarks(status: &Status, on: &Named, limits: Limits, goal: Goal) -> Vec<String> {
    let mut remarks = Vec::new();
    let case = Case::of(status, on);
    if case != Case::Normal && status.connection != "Connected" {
        let limit = limits.of(case).map_or_else(
            || "waiting without a limit".to_owned(),
            |limit| format!("waiting up to {} s", limit.as_secs()),
        );
        remarks.push(format!("{limit} ({})", case.words()));
    }
    if goal == Goal::Sync {
        let volumes = words::volumes(status, on.volume);
        remarks.extend(volumes.filter_map(|volume| advice(volume, &status.name)));
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_core::control::ResyncStatus;

    fn state(connection: &str, peer_disk: &str, resync: bool) -> Status {
        let volume = VolumeStatus {
            cstate: connection.to_owned(),
            peer_disk: peer_disk.to_owned(),
            resync: resync.then(ResyncStatus::default),
            ..VolumeStatus::default()
        };
        Status {
            name: "r0".to_owned(),
            connection: connection.to_owned(),
            volumes: vec![volume],
            ..Status::default()
        }
    }

    fn disks(disk: &str, peer_disk: &str, replication: &str, paused: &str) -> Status {
        let mut status = state("Connected", peer_disk, false);
        status.volumes[0].disk = disk.to_owned();
        status.volumes[0].replication = replication.to_owned();
        status.volumes[0].resync_suspended = paused.to_owned();
        status
    }

    fn degraded(connection: &str, peer_disk: &str) -> Status {
        let mut status = state(connection, peer_disk, false);
        status.volumes[0].was_degraded = true;
        status
    }

    const LIMITS: Limits = Limits {
        normal: Some(Duration::from_secs(10)),
        degraded: Some(Duration::from_secs(7)),
        outdated: Some(Duration::from_secs(5)),
        after_split_brain: false,
    };

    /// When a wait is over, and why.
    #[test]
    fn verdicts() {
        let on = Named::whole("r0");
        let judged = |status: &Status, goal, seconds| match judge(
            status,
            &on,
            goal,
            LIMITS,
            Duration::from_secs(seconds),
        ) {
            Verdict::Done => "done",
            Verdict::Wait => "wait",
            Verdict::Over(_) => "over",
        };
        let table = [
            (state("Connected", "UpToDate", false), Goal::Connect, 0, "done"),
            (state("Connected", "UpToDate", true), Goal::Connect, 99, "done"),
            (state("Connected", "UpToDate", true), Goal::Sync, 0, "wait"),
            (state("Connected", "UpToDate", true), Goal::Sync, 10, "over"),
            (state("Connected", "UpToDate", false), Goal::Sync, 10, "done"),
            (state("Connecting", "DUnknown", false), Goal::Connect, 9, "wait"),
            (state("Connecting", "DUnknown", false), Goal::Connect, 10, "over"),
            (state("Connecting", "Outdated", false), Goal::Connect, 4, "wait"),
            (state("Connecting", "Outdated", false), Goal::Connect, 5, "over"),
            (degraded("Connecting", "DUnknown"), Goal::Connect, 6, "wait"),
            (degraded("Connecting", "DUnknown"), Goal::Connect, 7, "over"),
            (degraded("Connecting", "Outdated"), Goal::Connect, 5, "over"),
            (state("StandAlone", "DUnknown", false), Goal::Connect, 0, "over"),
            (disks("Inconsistent", "Inconsistent", "Established", "no"), Goal::Connect, 0, "done"),
            (disks("Inconsistent", "Inconsistent", "Established", "no"), Goal::Sync, 0, "wait"),
            (disks("Inconsistent", "Inconsistent", "Established", "no"), Goal::Sync, 10, "over"),
            (disks("UpToDate", "Inconsistent", "Established", "no"), Goal::Sync, 0, "wait"),
            (disks("UpToDate", "Inconsistent", "PausedSyncS", "user"), Goal::Sync, 0, "wait"),
            (disks("UpToDate", "Diskless", "Established", "no"), Goal::Sync, 0, "done"),
            (disks("UpToDate", "UpToDate", "Established", "no"), Goal::Sync, 0, "done"),
        ];
        for (status, goal, seconds, verdict) in table {
            assert_eq!(judged(&status, goal, seconds), verdict, "{status:?} {goal:?} {seconds}");
        }
        let endless = Limits { normal: None, after_split_brain: true, ..LIMITS };
        let alone = state("StandAlone", "DUnknown", false);
        let verdict = judge(&alone, &on, Goal::Sync, endless, Duration::from_secs(1 << 30));
        assert_eq!(verdict, Verdict::Wait);
    }

    /// What is said beside the state: the case, and what only an operator can do.
    #[test]
    fn what_is_remarked() {
        let on = Named::whole("r0");
        let said = |status: &Status, goal| remarks(status, &on, LIMITS, goal).join("|");
        let table = [
            (state("Connecting", "DUnknown", false), Goal::Sync, ""),
            (
                degraded("Connecting", "DUnknown"),
                Goal::Connect,
                "waiting up to 7 s (degr-wfc-timeout: this node was Primary without its peer when \
                 it went down)",
            ),
            (
                state("Connecting", "Outdated", false),
                Goal::Connect,
                "waiting up to 5 s (outdated-wfc-timeout: the peer's disk is Outdated)",
            ),
            (
                disks("Inconsistent", "Inconsistent", "Established", "no"),
                Goal::Sync,
                "both disks are Inconsistent; on the node whose data are to be kept: \
                 drbdctl primary --force r0",
            ),
            (disks("Inconsistent", "Inconsistent", "Established", "no"), Goal::Connect, ""),
            (
                disks("UpToDate", "Inconsistent", "PausedSyncS", "user"),
                Goal::Sync,
                "resync is paused (user); go on with: drbdctl resume-sync r0",
            ),
            (
                disks("Inconsistent", "UpToDate", "PausedSyncT", "peer"),
                Goal::Sync,
                "resync is paused (peer); go on with: drbdctl resume-sync r0 on the peer",
            ),
            (disks("Inconsistent", "UpToDate", "SyncTarget", "no"), Goal::Sync, ""),
        ];
        for (status, goal, text) in table {
            assert_eq!(said(&status, goal), text, "{status:?}");
        }
    }

    /// The template of the bar is one that the library reads.
    #[test]
    fn the_bar_can_be_made() {
        ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3}% {msg}").unwrap();
    }
}
