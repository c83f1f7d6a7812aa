//! Runs seeds of the simulator: `simulate --seeds 1000 --from 0`.
//!
//! A failing seed prints its last events, the states of both nodes and the command that replays
//! it; the exit code is 1 if any seed failed, and 2 if the runs could not be made.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use tests::random::{Case, Kinds, Theme};
use tests::runner::{Order, run, worker};
use tests::sim::replay::Show;

/// Two simulated nodes, faults, and what must hold all the same.
#[derive(Parser)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// What the runs are about: mixed, resync, al, split-brain, connect, admin, or lying-disk,
    /// which has to fail. Without it, every seed chooses.
    #[arg(long)]
    focus: Option<String>,
    /// Go on after a finding.
    #[arg(long)]
    keep_going: bool,
    /// Print a line for every seed.
    #[arg(long)]
    verbose: bool,
    /// Look for a shorter run that fails in the same way.
    #[arg(long)]
    shrink: bool,
    /// Seeds at a time; without it, one for each processor.
    #[arg(long)]
    threads: Option<usize>,
    /// Only these rounds of the run, by number.
    #[arg(long, value_delimiter = ',')]
    rounds: Option<Vec<u32>>,
    /// Without these kinds of faults.
    #[arg(long, default_value = "")]
    without: String,
    /// Runs seeds for another process.
    #[arg(long, hide = true)]
    worker: bool,
    /// What a run for another process shows.
    #[arg(long, hide = true, value_delimiter = ',')]
    show: Vec<u64>,
}

fn main() -> ExitCode {
    match try_main() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("simulate: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn try_main() -> anyhow::Result<bool> {
    let arguments = Arguments::parse();
    if arguments.worker {
        let show = match arguments.show[..] {
            [from_line, before_step] => Some(Show { from_line, before_step }),
            _ => None,
        };
        worker::serve(show)?;
        return Ok(true);
    }
    let theme = arguments.focus.as_deref().map(str::parse::<Theme>).transpose()?;
    let without: Kinds = arguments.without.parse()?;
    let first = Case { seed: arguments.from, theme, rounds: arguments.rounds, without };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    run(&Order {
        first,
        seeds: arguments.seeds,
        threads: arguments.threads.unwrap_or(processors),
        keep_going: arguments.keep_going,
        shrink: arguments.shrink,
        verbose: arguments.verbose,
    })
}
