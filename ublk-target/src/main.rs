//! The engine of one resource: `ublk-target run --config FILE`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use nix::sys::signalfd::SignalFd;
use ublk_target::{engine, log, settings};

/// Serves, stores and mirrors one replicated block device.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Run the engine of a resource until it is told to end.
    Run {
        /// The configuration, in JSON, as written by drbdctl.
        #[arg(long)]
        config: PathBuf,
        /// Attach the disks and connect at once, as if told so by `drbdctl up`.
        #[arg(long)]
        up: bool,
    },
    /// Remove the block devices that an engine which died has left, unless they are in use.
    Clear {
        /// The configuration that the engine had.
        #[arg(long)]
        config: PathBuf,
    },
    /// Check a configuration and say what is wrong with it.
    Check {
        /// The configuration.
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let start = || Ok::<_, anyhow::Error>((engine::block_signals()?, log::start()?));
    let (signals, guard) = match start() {
        Ok(started) => started,
        Err(error) => {
            eprintln!("ublk-target: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let result = run(arguments.command, signals);
    if let Err(error) = &result {
        tracing::error!("{error:#}");
    }
    drop(guard);
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(action: Action, signals: SignalFd) -> Result<()> {
    match action {
        Action::Run { config, up } => engine::run(settings::load(&config)?, up, signals),
        Action::Clear { config } => engine::clear(&settings::load(&config)?),
        Action::Check { config } => settings::load(&config).map(|_| ()),
    }
}
