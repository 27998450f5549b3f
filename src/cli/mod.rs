//! The command line: one file per command, and the only module that prints.

use std::process::ExitCode;

/// Runs the command line and returns the exit status.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
