//! `wait-connect` and `wait-sync`.
//!
//! The limit is that of the command line, else that of the `startup` section; it counts from the
//! start of the command for all its objects. An engine has no way to announce a change, so it is
//! asked again and again, on a terminal more often, for the sake of the progress bar.

use std::io::IsTerminal;
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
    /// The peer is connected and no resync runs.
    Sync,
}

/// How long to wait; `None`: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    normal: Option<Duration>,
    outdated: Option<Duration>,
    /// Go on in state StandAlone.
    after_split_brain: bool,
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
            if let Some(line) = display.show(&status, on) {
                writeln!(self.out, "{line}")?;
                self.out.flush()?;
            }
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

fn judge(status: &Status, on: &Named, goal: Goal, limits: Limits, waited: Duration) -> Verdict {
    let is_connected = status.connection == "Connected";
    let is_syncing = words::volumes(status, on.volume).any(is_syncing);
    let is_done = match goal {
        Goal::Connect => is_connected,
        Goal::Sync => is_connected && !is_syncing,
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
    let is_outdated = status.volumes.iter().all(|volume| volume.peer_disk == "Outdated");
    let limit = if is_outdated { limits.outdated } else { limits.normal };
    match limit {
        Some(limit) if waited >= limit => {
            let states: Vec<String> =
                words::volumes(status, on.volume).map(|volume| volume.cstate.clone()).collect();
            let (seconds, states) = (limit.as_secs(), states.join(", "));
            Verdict::Over(format!("{on}: not there after {seconds} s: {states}"))
        }
        Some(_) | None => Verdict::Wait,
    }
}

/// Tells how far things are: a bar on a terminal, else a line for each change.
struct Display {
    bar: Option<ProgressBar>,
    last: String,
}

impl Display {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{prefix} [{bar:30}] {percent:>3}% {msg}";
            let style = ProgressStyle::with_template(style);
            let style = style.expect("the template is a constant that a test has read");
            ProgressBar::new(100).with_style(style.progress_chars("=> "))
        });
        Self { bar, last: String::new() }
    }

    /// Shows a state; returns a line to print if it should be.
    fn show(&mut self, status: &Status, on: &Named) -> Option<String> {
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

    /// When a wait is over, and why.
    #[test]
    fn verdicts() {
        let limits = Limits {
            normal: Some(Duration::from_secs(10)),
            outdated: Some(Duration::from_secs(5)),
            after_split_brain: false,
        };
        let on = Named::whole("r0");
        let judged = |status: &Status, goal, seconds| match judge(
            status,
            &on,
            goal,
            limits,
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
            (state("Connecting", "Outdated", false), Goal::Connect, 5, "over"),
            (state("StandAlone", "DUnknown", false), Goal::Connect, 0, "over"),
        ];
        for (status, goal, seconds, verdict) in table {
            assert_eq!(judged(&status, goal, seconds), verdict, "{status:?} {goal:?} {seconds}");
        }
        let endless = Limits { normal: None, outdated: None, after_split_brain: true };
        let alone = state("StandAlone", "DUnknown", false);
        let verdict = judge(&alone, &on, Goal::Sync, endless, Duration::from_secs(1 << 30));
        assert_eq!(verdict, Verdict::Wait);
    }

    /// The template of the bar is one that the library reads.
    #[test]
    fn the_bar_can_be_made() {
        ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3}% {msg}").unwrap();
    }
}
