//! Log lines on standard error: warnings by default, more with `-v`, errors alone with `-q`.
//!
//! `WALDEN_LOG` takes a filter in the syntax of `tracing` (`debug,walden::storage=trace`) and comes before both.

use tracing_subscriber::EnvFilter;

use super::context::{Context, GlobalOptions};
use super::error::CommandError;
use super::exit::ExitKind;
use super::screen::LogWriter;

/// Starts logging for the rest of the process.
pub(super) fn start(context: &Context) -> Result<(), CommandError> {
    let filter = match context.environment.log_filter()? {
        Some(filter) => EnvFilter::try_new(&filter).map_err(|error| {
            let message = format!("the environment variable WALDEN_LOG is not a log filter: {error}");
            CommandError::new(ExitKind::Configuration, message)
                .hint("Such as WALDEN_LOG=info or WALDEN_LOG=walden::storage=debug.")
        })?,
        None => EnvFilter::new(level(&context.global)),
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(LogWriter::default)
        .with_ansi(false)
        .with_target(false);
    // A second command in one process, as in tests, keeps the first one's logging.
    let _ = subscriber.try_init();
    Ok(())
}

fn level(global: &GlobalOptions) -> &'static str {
    match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info,walden=info",
        (false, 2) => "info,walden=debug",
        (false, _) => "debug,walden=trace",
    }
}
