//! Runs seeds of the simulator: `simulate --seeds 1000 --from 0`.
//!
//! A failing seed prints its report (last events, states of both nodes) and the command that
//! replays it; the exit code is 1 if any seed failed.

use std::panic::catch_unwind;
use std::process::ExitCode;

use clap::Parser;

/// Two simulated nodes, faults, and what must hold all the same.
#[derive(Parser)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
    /// Print a line for every seed.
    #[arg(long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut failed = Vec::new();
    let (mut lines, mut requests) = (0, 0);
    for seed in arguments.from..arguments.from + arguments.seeds {
        match catch_unwind(|| tests::random::run(seed)) {
            Ok(outcome) => {
                lines += outcome.lines;
                requests += outcome.requests;
                if arguments.verbose {
                    eprintln!("seed {seed}: {outcome:?}");
                }
            }
            Err(_) => {
                eprintln!("seed {seed} FAILED; replay: simulate --seeds 1 --from {seed}");
                failed.push(seed);
                if !arguments.keep_going {
                    break;
                }
            }
        }
    }
    eprintln!("{lines} lines of trace, {requests} requests, failed seeds: {failed:?}");
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
