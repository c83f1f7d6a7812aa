//! Runs many seeds, on all processors, and tells what came of them.
//!
//! Every seed runs in a process of its own kind, the *worker*: a release build ends at a panic
//! without unwinding, and a run that hangs has to be ended from outside. A worker runs one seed
//! after the other until one fails. The supervisor gives out seeds, takes the outcomes in the
//! order of the seeds (so that its output depends on the seeds alone), and for a finding runs the
//! seed again to show its end, and shrinks it if wanted.
//!
//! | room | question it answers |
//! |---|---|
//! | [`worker`] | how does one seed end? |
//! | `shrink` | what of a failing run is needed for it to fail? |
//! | `table` | what did all runs meet, and what never? |

mod shrink;
mod table;
pub mod worker;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::random::{Case, Outcome};
use crate::sim::coverage::Coverage;
use crate::sim::replay::Show;
use crate::sim::rng::mix;
use worker::{End, Failure, Worker};

/// Lines of trace that a finding shows.
const SHOWN_LINES: u64 = 100;
/// Time between two lines of progress, if nobody watches.
const PROGRESS_TIME: Duration = Duration::from_secs(10);

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Order {
    /// The first case; the others differ from it in the seed only.
    pub first: Case,
    /// How many seeds.
    pub seeds: u64,
    /// How many at a time.
    pub threads: usize,
    /// Go on after a finding.
    pub keep_going: bool,
    /// Look for a shorter run that fails in the same way.
    pub shrink: bool,
    /// A line for every seed.
    pub verbose: bool,
}

/// What came of all seeds.
#[derive(Debug, Default)]
struct Summary {
    seeds: u64,
    steps: u64,
    requests: u64,
    time_ms: u64,
    hash: u64,
    coverage: Coverage,
    failed: Vec<u64>,
}

impl Summary {
    fn add(&mut self, seed: u64, end: &End) {
        self.seeds += 1;
        match end {
            End::Done(outcome) => {
                self.steps += outcome.steps;
                self.requests += outcome.requests;
                self.time_ms += outcome.time_ms;
                self.hash = mix(self.hash ^ outcome.hash);
                self.coverage.merge(&outcome.coverage);
            }
            End::Failed(failure) => {
                self.hash = mix(self.hash ^ failure.at.steps);
                self.failed.push(seed);
            }
        }
    }
}

/// Runs the seeds and reports to the standard output, progress to the standard error. Returns
/// whether there was no finding.
///
/// # Errors
/// A worker cannot be started, or nobody reads the output.
pub fn run(order: &Order) -> anyhow::Result<bool> {
    let next = AtomicU64::new(order.first.seed);
    let stop = AtomicBool::new(false);
    let (sender, receiver) = channel();
    std::thread::scope(|scope| {
        for _ in 0..order.threads.max(1) {
            let sender = sender.clone();
            let (next, stop) = (&next, &stop);
            scope.spawn(move || run_some(order, next, stop, &sender));
        }
        drop(sender);
        let result = collect(order, &receiver);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

type Ended = (u64, anyhow::Result<End>);

/// One thread: takes seeds and lets its worker run them.
fn run_some(order: &Order, next: &AtomicU64, stop: &AtomicBool, ended: &Sender<Ended>) {
    let mut worker = None;
    while !stop.load(Ordering::Relaxed) {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed - order.first.seed >= order.seeds {
            return;
        }
        let case = Case { seed, ..order.first.clone() };
        let end = run_one(&mut worker, &case);
        let is_over = end.is_err() || ended.send((seed, end)).is_err();
        if is_over {
            return;
        }
    }
}

/// Runs a case in a worker, which is started if there is none, and dropped after a failure.
fn run_one(worker: &mut Option<Worker>, case: &Case) -> anyhow::Result<End> {
    let mut runs = match worker.take() {
        Some(runs) => runs,
        None => Worker::start(None)?,
    };
    let end = runs.run(case)?;
    if matches!(end, End::Done(_)) {
        *worker = Some(runs);
    }
    Ok(end)
}

fn collect(order: &Order, receiver: &Receiver<Ended>) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    let begin = Instant::now();
    let mut progress = Progress::new(begin, order.seeds);
    let mut early = BTreeMap::new();
    let mut summary = Summary::default();
    let mut due = order.first.seed;
    'all: for (seed, end) in receiver {
        early.insert(seed, end?);
        while let Some(end) = early.remove(&due) {
            summary.add(due, &end);
            let case = Case { seed: due, ..order.first.clone() };
            match &end {
                End::Done(outcome) if order.verbose => tell_outcome(&mut out, due, outcome)?,
                End::Done(_) => {}
                End::Failed(failure) => tell_finding(&mut out, order, &case, failure)?,
            }
            due += 1;
            progress.tell(&summary);
            if !summary.failed.is_empty() && !order.keep_going {
                break 'all;
            }
        }
    }
    progress.end(&summary);
    table::print(&mut out, &summary.coverage)?;
    let Summary { seeds, steps, requests, hash, time_ms, .. } = summary;
    writeln!(
        out,
        "{seeds} seeds, {steps} steps, {requests} requests, {} s of virtual time, trace hash \
         {hash:016x}",
        time_ms / 1000
    )?;
    writeln!(out, "findings: {:?}", summary.failed)?;
    Ok(summary.failed.is_empty())
}

fn tell_outcome(out: &mut impl Write, seed: u64, outcome: &Outcome) -> std::io::Result<()> {
    let Outcome { hash, steps, requests, time_ms, .. } = outcome;
    writeln!(
        out,
        "seed {seed} hash {hash:016x}: {} ({}), {} rounds, {steps} steps, {requests} requests, \
         {time_ms} ms",
        outcome.theme.name(),
        outcome.kinds,
        outcome.rounds,
    )
}

fn tell_finding(
    out: &mut impl Write,
    order: &Order,
    case: &Case,
    failure: &Failure,
) -> anyhow::Result<()> {
    let (case, failure) = if order.shrink {
        shrink::shrink(case, failure, |words| eprintln!("{words}"))?
    } else {
        (case.clone(), failure.clone())
    };
    let show = Show {
        from_line: failure.at.lines.saturating_sub(SHOWN_LINES),
        before_step: failure.at.steps,
    };
    let mut replay = Worker::start(Some(show))?;
    let again = replay.run(&case)?;
    writeln!(out, "=== FINDING at seed {}", case.seed)?;
    writeln!(out, "{}", replay.shown())?;
    if !matches!(&again, End::Failed(other) if *other == failure) {
        writeln!(out, "!!! the replay ended otherwise (LV-4): {again:?}")?;
    }
    let at = failure.at;
    writeln!(out, "seed {} fails after {} steps at {}:", case.seed, at.steps, failure.place)?;
    writeln!(out, "{}", failure.message)?;
    writeln!(out, "replay: {}", case.command())?;
    Ok(())
}

/// How fast it goes.
struct Progress {
    begin: Instant,
    told: Instant,
    seeds: u64,
    on_terminal: bool,
}

impl Progress {
    fn new(begin: Instant, seeds: u64) -> Self {
        Self { begin, told: begin, seeds, on_terminal: std::io::stderr().is_terminal() }
    }

    fn words(&self, summary: &Summary) -> String {
        let seconds = self.begin.elapsed().as_secs_f64().max(0.001);
        // Far below the 2^53 up to which this is exact.
        let rate = f64::from(u32::try_from(summary.seeds).unwrap_or(u32::MAX)) / seconds;
        let (done, all, findings) = (summary.seeds, self.seeds, summary.failed.len());
        format!("{done} of {all} seeds in {seconds:.1} s, {rate:.1} seeds/s, {findings} findings")
    }

    fn tell(&mut self, summary: &Summary) {
        let wait = if self.on_terminal { Duration::from_millis(200) } else { PROGRESS_TIME };
        if self.told.elapsed() < wait {
            return;
        }
        self.told = Instant::now();
        let words = self.words(summary);
        if self.on_terminal {
            eprint!("\r{words} ");
        } else {
            eprintln!("{words}");
        }
    }

    fn end(&self, summary: &Summary) {
        let line = if self.on_terminal { "\r" } else { "" };
        eprintln!("{line}{}", self.words(summary));
    }
}
