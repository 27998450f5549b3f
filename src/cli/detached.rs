//! A process of ours in the background: `walden internal …`, started again from the binary that runs.
//!
//! Not forked, because a process with threads may not go on after that. The child is told everything by arguments,
//! logs to a file below the state folder, and prints one JSON document when it serves, or why it cannot: the
//! parent waits for that and no longer. In a session of its own it survives the terminal.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::disk::durable::{Create, create_dir_all};

use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;

/// Logs of background processes, below the state folder.
const LOG_FOLDER: &str = "log";
/// How much of a log is shown when its process ended without a word.
const LOG_TAIL_LINES: usize = 5;

/// Returns where a background process called `name` logs; the folder is made if need be.
pub(super) fn log_file(context: &Context, name: &str) -> Result<PathBuf, CommandError> {
    let state = context.config()?.paths.open_state()?;
    let folder = state.path.join(LOG_FOLDER);
    create_dir_all(&folder, Create::PRIVATE_DIRECTORY.owned_by(state.owner))?;
    let path = folder.join(format!("{name}.log"));
    if !path.exists() {
        open_log(&path)?;
        state.owner.give(&path)?;
    }
    Ok(path)
}

/// Starts `walden internal <arguments>` and returns what it prints once it serves.
pub(super) fn start(context: &Context, arguments: &[OsString], log: &Path) -> Result<Value, CommandError> {
    let mut command = command(context)?;
    command.arg("internal").args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(open_log(log)?);
    let mut child = command
        .spawn()
        .map_err(|error| CommandError::failed(format!("could not start a background process: {error}")))?;
    let stdout = child.stdout.take().expect("standard output is a pipe");
    let mut documents = serde_json::Deserializer::from_reader(stdout).into_iter::<Value>();
    match documents.next() {
        Some(Ok(document)) => match document.get("error") {
            Some(error) => {
                // It has told everything; its exit is a matter of moments.
                let _ = child.wait();
                Err(failure_of(error))
            }
            None => Ok(document),
        },
        Some(Err(_)) | None => Err(ended(&mut child, log)),
    }
}

/// Returns a command that runs this binary again with the same global options, anywhere.
pub(super) fn command(context: &Context) -> Result<Command, CommandError> {
    let program = std::env::current_exe()
        .map_err(|error| CommandError::failed(format!("could not find the running binary: {error}")))?;
    let mut command = Command::new(program);
    command.arg("--config").arg(absolute(&context.config()?.file)?);
    command.arg("--site").arg(&context.site()?.name).args(["--output", "json", "--no-progress"]);
    if context.global.quiet {
        command.arg("-q");
    }
    command.args((0..context.global.verbose).map(|_| "-v"));
    command.current_dir("/");
    Ok(command)
}

/// Leaves the session of the terminal; the background process calls this first.
pub(super) fn leave_session() {
    // Fails only where there is nothing to leave.
    let _ = nix::unistd::setsid();
}

/// Makes a path absolute without looking at what it names.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, CommandError> {
    std::path::absolute(path)
        .map_err(|error| CommandError::usage(format!("\"{}\" is not a path: {error}", path.display())))
}

/// Opens a log to be written on.
pub(super) fn open_log(path: &Path) -> Result<fs::File, CommandError> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map_err(|error| {
        CommandError::failed(format!("could not open the log \"{}\": {error}", path.display()))
    })
}

/// Turns the failure that a process printed into ours.
fn failure_of(error: &Value) -> CommandError {
    let text = |field: &str| error.get(field).and_then(Value::as_str);
    let kind = text("kind").and_then(ExitKind::from_name).unwrap_or(ExitKind::Failed);
    let failure = CommandError::new(kind, text("message").unwrap_or("the background process failed"));
    match text("hint") {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

fn ended(child: &mut Child, log: &Path) -> CommandError {
    let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("; ");
    CommandError::failed(format!("the background process ended before it served ({status}): {tail}"))
        .hint(format!("Its log is \"{}\".", log.display()))
}
