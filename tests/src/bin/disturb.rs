//! Disturbs the wire between two real engines: `tests/native/wire.sh` makes them and calls this.
//!
//! A finding prints what was done to the connections, the seed and the round; the exit code is 1.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tests::disturb::rounds::{Order, Round, run};

/// Faults on the wire, and strangers at its end.
#[derive(Parser)]
struct Arguments {
    /// The directory of the lab.
    #[arg(long)]
    lab: PathBuf,
    /// What everything follows from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// For how long rounds begin; each kind comes at least once.
    #[arg(long, default_value_t = 0)]
    seconds: u64,
    /// Only rounds of these kinds.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Round>,
}

fn main() -> ExitCode {
    let Arguments { lab, seed, seconds, only } = Arguments::parse();
    match run(&Order { lab, seed, time: Duration::from_secs(seconds), only }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("disturb: {error:#}");
            ExitCode::FAILURE
        }
    }
}
