//! The program `drbdctl`: hands its arguments and streams to the library.

#![forbid(unsafe_code)]

use std::io::{stderr, stdout};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = std::env::args_os().collect();
    ExitCode::from(drbdctl::run(arguments, &mut stdout().lock(), &mut stderr().lock()))
}
