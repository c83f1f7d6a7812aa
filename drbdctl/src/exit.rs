//! Exit codes, and the error that carries one.
//!
//! The numbers are those that agents and scripts know; sections 6.3, 7.2 and 8 of the notes on
//! the user's surface name where each one is looked at.

use std::fmt;
use std::io;

use replication_core::control::Refusal;

use crate::conf::ConfError;

/// Done, or there was nothing to do.
pub const DONE: u8 = 0;
/// Wrong usage, an unknown name, or an operation that was not confirmed.
pub const USAGE: u8 = 1;
/// The command line is malformed.
pub const SYNTAX: u8 = 2;
/// A wait ran into its limit.
pub const TIMEOUT: u8 = 5;
/// The configuration is wrong, or does not allow what was asked for.
pub const FAILURE: u8 = 10;
/// Nobody answers, a program cannot be run, or an operation of the system failed.
pub const SYSTEM: u8 = 20;
/// Metadata would destroy what a device carries.
pub const WOULD_DESTROY: u8 = 40;
/// There is no metadata on the device.
pub const NO_METADATA: u8 = 255;

/// Why a verb failed for one object.
///
/// **Shape** (`Display`): complete lines for the operator, without a final line end. The text
/// names the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub exit: u8,
    /// The lines.
    pub text: String,
}

impl Failure {
    /// A failure with this exit code.
    pub fn new(exit: u8, text: impl Into<String>) -> Self {
        Self { exit, text: text.into() }
    }

    /// The operator asked for something that makes no sense.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::new(USAGE, text)
    }

    /// The system failed: `act` names what was tried with which object.
    pub fn system(act: impl fmt::Display, error: &dyn fmt::Display) -> Self {
        Self::new(SYSTEM, format!("{act}: {error}"))
    }

    /// An engine refused a command for `object`.
    ///
    /// **Shape**: the line with the number that operators know; then what to do.
    #[must_use]
    pub fn refused(object: &str, refusal: &Refusal) -> Self {
        let Refusal { code, exit, text, advice } = refusal;
        let mut lines = match *code {
            0 => format!("{object}: {text}"),
            ..0 => format!("{object}: State change failed: ({code}) {text}"),
            1.. => format!("{object}: Failure: ({code}) {text}"),
        };
        if !advice.is_empty() {
            lines.push_str("\n  what to do: ");
            lines.push_str(&advice.replace('\n', "\n  "));
        }
        // An engine that refuses and says "done" would hide the refusal.
        let exit = if *exit == DONE { SYSTEM } else { *exit };
        Self::new(exit, lines)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

impl From<ConfError> for Failure {
    fn from(error: ConfError) -> Self {
        Self::new(error.exit_code(), error.to_string())
    }
}

impl From<io::Error> for Failure {
    /// Only for the streams of this program; everything else names its object.
    fn from(error: io::Error) -> Self {
        Self::system("write the output", &error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three kinds of refusals, and what to do about them.
    #[test]
    fn refusals() {
        let refusal = |code, exit, advice: &str| Refusal {
            code,
            exit,
            text: "Need access to UpToDate data".to_owned(),
            advice: advice.to_owned(),
        };
        let table = [
            (
                refusal(-2, 17, "connect first"),
                17,
                "r0: State change failed: (-2) Need access to UpToDate data\n  \
                 what to do: connect first",
            ),
            (refusal(119, 10, ""), 10, "r0: Failure: (119) Need access to UpToDate data"),
            (refusal(0, 20, ""), 20, "r0: Need access to UpToDate data"),
            (refusal(0, 0, ""), 20, "r0: Need access to UpToDate data"),
        ];
        for (refusal, exit, text) in table {
            assert_eq!(Failure::refused("r0", &refusal), Failure::new(exit, text));
        }
    }
}
