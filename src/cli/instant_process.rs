//! The supervisor of an instant restore as a process: how a command starts it, and learns why it is gone.
//!
//! It is this binary executed again. While it serves it answers for itself; before, and after, there are its log and the
//! last words that it leaves in the directory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use crate::control::RestoreStatus;
use crate::disk::LockFile;
use crate::instance::instant::unfinished::{LastWords, name_of};
use crate::restore::target::resolve;

use super::clone::HandedOver;
use super::context::Context;
use super::detached;
use super::error::CommandError;
use super::exit::ExitKind;
use super::instant_report::InstantReport;

/// How much of a log is looked at for what was said last.
const LOG_TAIL_BYTES: u64 = 4096;

/// A supervisor that was started here.
pub(super) struct Spawned {
    process: Child,
    /// Keeps others from starting one until it answers.
    pub lock: Option<LockFile>,
    log: PathBuf,
    /// How long the log was before.
    log_begins: u64,
}

impl Spawned {
    /// Tells whether it has ended.
    pub(super) fn has_ended(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(Some(_)))
    }

    /// Returns the last line that it has logged.
    pub(super) fn said(&self) -> Option<String> {
        let mut log = File::open(&self.log).ok()?;
        let begins = self.log_begins.max(log.metadata().ok()?.len().saturating_sub(LOG_TAIL_BYTES));
        log.seek(SeekFrom::Start(begins)).ok()?;
        let mut tail = Vec::new();
        log.take(LOG_TAIL_BYTES).read_to_end(&mut tail).ok()?;
        let tail = String::from_utf8_lossy(&tail);
        tail.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
    }
}

/// Starts the supervisor of a restore.
pub(super) fn spawn(
    context: &Context,
    target: &Path,
    no_start: bool,
    spent: &HandedOver,
) -> Result<Spawned, CommandError> {
    let path = supervisor_log(context, target)?;
    let log: File = detached::open_log(&path)?;
    let log_begins = log.metadata().map_or(0, |metadata| metadata.len());
    let mut command = detached::command(context)?;
    command.args(["internal", "serve-restore"]).arg(resolve(target));
    command.args(no_start.then_some("--no-start"));
    command.args(["--spent-seconds", &spent.spent_seconds.to_string()]);
    command.args(["--spent-requests", &spent.spent_requests.to_string()]);
    command.args(["--spent-bytes", &spent.spent_bytes.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    match command.spawn() {
        Ok(process) => Ok(Spawned { process, lock: None, log: path, log_begins }),
        Err(error) => Err(CommandError::failed(format!("could not start the restore's supervisor: {error}"))),
    }
}

/// Says why a supervisor is gone: that it had nothing left to do, what it wrote down, or where to look.
pub(super) fn ended_without_a_word(
    context: &Context,
    target: &Path,
    last: Option<&RestoreStatus>,
) -> Result<InstantReport, CommandError> {
    let log = supervisor_log(context, target)?;
    let see = format!(
        "See \"{}\". \"walden restore --resume --target-dir {}\" goes on with it.",
        log.display(),
        target.display()
    );
    let (kind, message, hint) = match LastWords::read(target) {
        Some(words) => {
            let hint = words.hint.map_or_else(|| see.clone(), |hint| format!("{hint} {see}"));
            (ExitKind::from_name(&words.kind).unwrap_or(ExitKind::Failed), words.message, hint)
        }
        None if last.is_some() => (ExitKind::Failed, "its process was told to end".to_owned(), see),
        None => (ExitKind::Failed, "its process ended before it served".to_owned(), see),
    };
    Err(CommandError::new(kind, format!("the restore in \"{}\" stopped: {message}", target.display()))
        .hint(hint))
}

/// Returns where the server of a restore logs before it has a log of its own.
pub(super) fn server_log(context: &Context, target: &Path) -> Result<PathBuf, CommandError> {
    let log = supervisor_log(context, target)?;
    Ok(log.with_extension("server.log"))
}

fn supervisor_log(context: &Context, target: &Path) -> Result<PathBuf, CommandError> {
    detached::log_file(context, &format!("restore-{}", name_of(target)))
}
