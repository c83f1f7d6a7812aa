//! How does one seed end? The two ends of the pipe between supervisor and worker.
//!
//! The worker reads a case a line and answers with a line: `done` with the outcome, or `failed`
//! with the place, where the run stood, and the message. After `failed` it ends, and a worker that
//! ends without a word (stack overflow, killed) or does not end in time has failed as well.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::random::{Case, Kinds, Outcome, Theme};
use crate::sim::coverage::Family;
use crate::sim::replay::{self, Position, Show};

/// The longest that one seed may take. A fast machine needs a tenth of a second.
const LIMIT: Duration = Duration::from_secs(300);

/// How a run ended.
#[derive(Clone, Debug)]
pub enum End {
    /// Well.
    Done(Box<Outcome>),
    /// With a finding.
    Failed(Failure),
}

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Where in the source it was found: names the kind of the finding.
    pub place: String,
    /// Where the run stood.
    pub at: Position,
    /// The words of the check that failed.
    pub message: String,
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    orders: Option<ChildStdin>,
    answers: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
}

impl Worker {
    /// Starts this program again, as a worker.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(show: Option<Show>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        command.arg("--worker").stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(if show.is_some() { Stdio::piped() } else { Stdio::null() });
        if let Some(show) = show {
            command.arg(format!("--show={},{}", show.from_line, show.before_step));
        }
        let mut child = command.spawn().context("start a worker")?;
        let orders = child.stdin.take();
        let stdout = child.stdout.take().context("the worker's standard output")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let stderr = child.stderr.take().map(|mut stderr| {
            std::thread::spawn(move || {
                let mut words = Vec::new();
                match stderr.read_to_end(&mut words) {
                    Ok(_) => String::from_utf8_lossy(&words).into_owned(),
                    Err(e) => format!("what the worker shows cannot be read: {e}"),
                }
            })
        });
        Ok(Self { child, orders, answers, stderr })
    }

    /// Runs a case. After a failure the worker is of no more use.
    ///
    /// # Errors
    /// The worker does not understand, or does not speak.
    pub fn run(&mut self, case: &Case) -> anyhow::Result<End> {
        let orders = self.orders.as_mut().context("the worker has ended")?;
        writeln!(orders, "{}", case.words()).context("speak to the worker")?;
        match self.answers.recv_timeout(LIMIT) {
            Ok(line) => parse(&line),
            Err(why) => {
                let message = match why {
                    RecvTimeoutError::Timeout => format!("no end after {} s", LIMIT.as_secs()),
                    RecvTimeoutError::Disconnected => {
                        format!("the worker ended without a word: {:?}", self.child.wait())
                    }
                };
                let place = String::from("(no panic)");
                Ok(End::Failed(Failure { place, at: Position::default(), message }))
            }
        }
    }

    /// What the run showed; the worker ends.
    pub fn shown(&mut self) -> String {
        self.orders = None;
        let words = self.stderr.take().map(JoinHandle::join);
        match words {
            Some(Ok(words)) => words,
            Some(Err(_)) | None => String::new(),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.orders = None;
        // It may hang; what it would still say does not matter.
        if let Err(e) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            eprintln!("end a worker: {e}");
        }
    }
}

fn parse(line: &str) -> anyhow::Result<End> {
    let mut fields = line.split('\t');
    let mut field = || fields.next().with_context(|| format!("too short an answer: {line}"));
    let kind = field()?;
    if kind == "failed" {
        let place = String::from(field()?);
        let at = Position { steps: field()?.parse()?, lines: field()?.parse()? };
        let message = field()?.replace("\\n", "\n");
        return Ok(End::Failed(Failure { place, at, message }));
    }
    if kind != "done" {
        bail!("neither done nor failed: {line}");
    }
    let mut outcome = Outcome {
        hash: field()?.parse()?,
        steps: field()?.parse()?,
        requests: field()?.parse()?,
        time_ms: field()?.parse()?,
        rounds: field()?.parse()?,
        theme: field()?.parse()?,
        kinds: field()?.parse()?,
        ..Outcome::default()
    };
    for count in fields {
        let (family, rest) = count.split_once(':').context("a family")?;
        let (name, count) = rest.rsplit_once('=').context("a count")?;
        let family = Family::from_name(family).with_context(|| format!("family {family}"))?;
        outcome.coverage.add_many(family, name, count.parse()?);
    }
    Ok(End::Done(Box::new(outcome)))
}

fn words(outcome: &Outcome) -> String {
    let Outcome { hash, steps, requests, time_ms, rounds, .. } = outcome;
    let mut line = format!("done\t{hash}\t{steps}\t{requests}\t{time_ms}\t{rounds}");
    let theme: Theme = outcome.theme;
    let kinds: Kinds = outcome.kinds;
    line.push_str(&format!("\t{}\t{kinds}", theme.name()));
    for (family, name, count) in outcome.coverage.iter() {
        line.push_str(&format!("\t{}:{name}={count}", family.name()));
    }
    line
}

/// The worker: runs cases as they come in, until the pipe is closed.
///
/// # Errors
/// A line that is no case, or a closed pipe.
pub fn serve(show: Option<Show>) -> anyhow::Result<()> {
    if let Some(show) = show {
        replay::show(show);
    }
    std::panic::set_hook(Box::new(|info| {
        let message = match (info.payload().downcast_ref::<&str>(), info.payload().downcast_ref()) {
            (Some(words), _) => String::from(*words),
            (None, Some(words)) => String::clone(words),
            (None, None) => String::from("a panic without words"),
        };
        let place = info.location().map_or_else(String::new, ToString::to_string);
        let Position { steps, lines } = replay::position();
        let message = message.replace('\n', "\\n").replace('\t', " ");
        let line = format!("failed\t{place}\t{steps}\t{lines}\t{message}\n");
        let mut out = std::io::stdout();
        // If nobody listens any more, there is nobody to tell it either.
        drop(out.write_all(line.as_bytes()).and_then(|()| out.flush()));
        // Also where panics unwind: the report comes from a replay, and nothing else is to be run.
        std::process::abort();
    }));
    for line in std::io::stdin().lock().lines() {
        let case: Case = line?.parse()?;
        let outcome = crate::random::run(&case);
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", words(&outcome))?;
        out.flush()?;
    }
    Ok(())
}
