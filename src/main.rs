//! The `walden` binary: hands the command line to `cli` and exits with its status.

use std::process::ExitCode;

fn main() -> ExitCode {
    walden::cli::main()
}
