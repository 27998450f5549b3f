//! The command line: one file per command, and the only module that prints.
//!
//! arguments → clap → [`Context`] → the command's `run` → a report on standard output, or `error: …` and `hint: …`
//! on standard error → an exit status. To add a command: a file with its arguments and `run`, and a line each in
//! `mod`, [`Command`] and [`Command::run`]; then `WALDEN_UPDATE_DOCS=1 cargo nextest run reference`. A command whose time
//! has not come is absent.

mod arguments;
mod backup;
mod backup_dry_run;
mod check;
mod clone;
mod context;
mod daemon;
mod demo;
mod detached;
mod error;
mod exit;
mod info;
mod info_text;
mod instant;
mod instant_process;
mod instant_report;
mod instant_shown;
mod internal;
mod key;
mod list;
mod logging;
mod module_errors;
mod mount;
mod output;
mod prefetch;
mod priority;
mod progress;
mod recovery_target;
#[cfg(test)]
mod reference;
mod repository;
mod restore;
mod restore_report;
mod screen;
mod serve_clone;
mod serve_restore;
mod show;
mod site;
#[cfg(test)]
mod tests;
mod text;
mod unmount;
mod wal;
mod wal_check;
mod wal_head;
mod wal_list;
mod wal_queue;
mod wal_receive;

use std::ffi::OsString;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, Subcommand};

use crate::config::Environment;

pub use context::{Context, GlobalOptions};
pub use error::CommandError;
pub use exit::{ExitKind, ExitPolicy};
pub use output::{Format, Output, Report};
pub use text::{Align, TextStyle, TextTable};

/// PostgreSQL backups that are file systems you can start PostgreSQL on
#[derive(Debug, Parser)]
#[command(name = "walden", version, disable_help_subcommand = true, max_term_width = 110)]
struct CommandLine {
    #[command(flatten)]
    global: GlobalOptions,
    #[command(subcommand)]
    command: Command,
}

const WHERE_HELP_IS: &str = "`walden --help` and `walden COMMAND --help` tell what there is.";

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Demo),
    Site(site::Site),
    Check(check::Check),
    Backup(backup::Backup),
    Key(key::Key),
    List(list::List),
    Show(show::Show),
    Info(info::Info),
    Wal(wal::Wal),
    Daemon(daemon::Daemon),
    Mount(mount::Mount),
    Unmount(unmount::Unmount),
    Clone(clone::Clone),
    Restore(Box<restore::Restore>),
    #[command(hide = true)]
    Internal(internal::Internal),
}

impl Command {
    /// Returns how its outcome becomes a status; until a command line has parsed, `arguments` guesses.
    fn exit_policy(&self) -> ExitPolicy {
        match self {
            Self::Demo(_) | Self::Backup(_) | Self::Key(_) => ExitPolicy::Usual,
            Self::List(_) | Self::Show(_) | Self::Info(_) => ExitPolicy::Usual,
            Self::Site(_) | Self::Check(_) | Self::Daemon(_) => ExitPolicy::Usual,
            Self::Mount(_) | Self::Unmount(_) | Self::Clone(_) | Self::Restore(_) | Self::Internal(_) => {
                ExitPolicy::Usual
            }
            Self::Wal(command) => command.exit_policy(),
        }
    }

    fn run(&self, context: &Context) -> Result<(), CommandError> {
        match self {
            Self::Demo(command) => command.run(context),
            Self::Site(command) => command.run(context),
            Self::Check(command) => command.run(context),
            Self::Backup(command) => command.run(context),
            Self::Key(command) => command.run(context),
            Self::List(command) => command.run(context),
            Self::Show(command) => command.run(context),
            Self::Info(command) => command.run(context),
            Self::Wal(command) => command.run(context),
            Self::Daemon(command) => command.run(context),
            Self::Mount(command) => command.run(context),
            Self::Unmount(command) => command.run(context),
            Self::Clone(command) => command.run(context),
            Self::Restore(command) => command.run(context),
            Self::Internal(command) => command.run(context),
        }
    }
}

/// Runs the command line and returns the exit status.
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(|panic| report_panic(&mut io::stderr().lock(), panic)));
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let status = run(&arguments, Environment::of_process(), Box::new(io::stdout()), &mut io::stderr());
    ExitCode::from(status)
}

/// Runs one command line; whatever happens, a panic included, ends in a status of its policy.
fn run(
    arguments: &[OsString],
    environment: Environment,
    stdout: Box<dyn Write + Send>,
    stderr: &mut dyn Write,
) -> u8 {
    let policy = arguments::exit_policy(arguments);
    let style = TextStyle { time_zone: environment.time_zone.clone() };
    let format = if arguments::wants_json(arguments) { Format::Json } else { Format::Text };
    let command_line = match CommandLine::try_parse_from(arguments) {
        Ok(command_line) => command_line,
        Err(error) => {
            let output = Output::new(format, style, stdout);
            return conclude(&output, policy, Some(answer_clap(&output, &error)), stderr);
        }
    };
    let policy = command_line.command.exit_policy();
    let output = Output::new(command_line.global.format(), style, stdout);
    let context = Context::new(command_line.global, environment, output);
    let outcome = guarded(|| {
        logging::start(&context)?;
        command_line.command.run(&context)
    });
    context.end_progress();
    conclude(&context.output, policy, outcome, stderr)
}

/// Runs a command; `None` if it panicked.
fn guarded(command: impl FnOnce() -> Result<(), CommandError>) -> Option<Result<(), CommandError>> {
    panic::catch_unwind(AssertUnwindSafe(command)).ok()
}

/// Tells of a failure and returns the status; of a panic the hook has told already.
fn conclude(
    output: &Output,
    policy: ExitPolicy,
    outcome: Option<Result<(), CommandError>>,
    stderr: &mut dyn Write,
) -> u8 {
    let (outcome, stderr): (_, &mut dyn Write) = match outcome {
        Some(outcome) => (outcome, stderr),
        None => (Err(CommandError::panicked()), &mut io::sink()),
    };
    if let Err(error) = &outcome {
        output::write_failure(stderr, &error.message(), error.hint.as_deref());
        output.print_failure(error, policy);
    }
    policy.status(outcome.map_err(|error| error.kind))
}

/// Prints the help that clap was asked for, or turns its complaint into ours.
fn answer_clap(output: &Output, error: &clap::Error) -> Result<(), CommandError> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => output.print_plain(&error.render().to_string()),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            Err(CommandError::usage("a command is missing").hint(WHERE_HELP_IS))
        }
        _ => Err(complaint_of(error)),
    }
}

/// Brings clap's complaint into the form `error: …`, `hint: …`.
fn complaint_of(error: &clap::Error) -> CommandError {
    let rendered = error.render().to_string();
    let mut paragraphs = rendered.split("\n\n").map(str::trim);
    let message = paragraphs.next().unwrap_or_default();
    let message = message.strip_prefix("error: ").unwrap_or(message);
    // A list of missing arguments comes on lines of its own.
    let message = message.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let suggestion =
        [ContextKind::SuggestedSubcommand, ContextKind::SuggestedArg, ContextKind::SuggestedValue]
            .into_iter()
            .find_map(|kind| match error.get(kind)? {
                ContextValue::String(word) => Some(word.clone()),
                // The likeliest comes last.
                ContextValue::Strings(words) => words.last().cloned(),
                _ => None,
            });
    let hint = match suggestion {
        Some(word) => format!("Did you mean \"{word}\"?"),
        None => WHERE_HELP_IS.to_owned(),
    };
    CommandError::usage(message).hint(hint)
}

fn report_panic(stderr: &mut dyn Write, panic: &panic::PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("no message");
    let place = panic.location().map_or_else(String::new, |place| format!(" ({place})"));
    let hint =
        format!("This is a bug in walden {}; the command stopped where it was.", env!("CARGO_PKG_VERSION"));
    output::write_failure(stderr, &format!("internal error: {message}{place}"), Some(&hint));
}
