//! Why the demonstration did not come to its end.
//!
//! Whatever fails after the preparation is wrapped with the step it happened in, so that the message begins with where
//! the path from a cluster to its clone is broken.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use crate::disk;
use crate::instance::demo::report::Step;
use crate::replication;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// PostgreSQL is not installed, or not all of it.
    #[error("no PostgreSQL with {} was found in {}", wanted.join(", "), join(searched))]
    NoPostgresql { wanted: Vec<&'static str>, searched: Vec<PathBuf> },
    /// PostgreSQL refuses to run as root, and there is nobody else.
    #[error("there is no user \"{name}\" to run PostgreSQL as")]
    NoAccount { name: &'static str },
    /// The folder is closed to the user that PostgreSQL runs as.
    #[error("user \"{user}\" cannot reach \"{}\"", path.display())]
    ClosedFolder { user: String, path: PathBuf },
    /// Sockets would not fit.
    #[error("\"{}\" is too long for the sockets in it: a socket's path has at most {max} bytes", path.display())]
    LongFolder { path: PathBuf, max: usize },
    /// The disk is too full to begin.
    #[error("\"{}\" has {free_bytes} bytes free, and the demo needs about {needed_bytes}", path.display())]
    NoSpace { path: PathBuf, free_bytes: u64, needed_bytes: u64 },
    /// A step failed.
    #[error("step \"{step}\" failed: {source}")]
    Step { step: Step, source: Box<Self> },
    /// A program could not be started.
    #[error("could not run {command}: {source}")]
    Spawn { command: String, source: std::io::Error },
    /// A program failed.
    #[error("{command} failed ({status}): {}", last_words(said))]
    Command { command: String, status: ExitStatus, said: String },
    /// A command printed something else than its document.
    #[error("{command} printed no usable JSON: {detail}")]
    Document { command: String, detail: String },
    /// The scratch server did not come up, or went away.
    #[error("the scratch server {what}: {}", last_words(log))]
    Server { what: &'static str, log: String },
    /// The load broke off.
    #[error("pgbench ended by itself: {}", last_words(said))]
    LoadEnded { said: String },
    /// WAL stays in the scratch cluster.
    #[error("WAL segment {segment} was not archived ({failed_count} failures): {}", last_words(log))]
    NotArchived { segment: String, failed_count: i64, log: String },
    /// A statement failed.
    #[error(transparent)]
    Session(#[from] replication::Error),
    /// A local file could not be handled.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// Source and clone do not hold the same rows.
    #[error("source and clone differ in {}", tables.join("; "))]
    Different { tables: Vec<String> },
    /// What was written in the clone is not there, or is in the source.
    #[error("{0}")]
    Leaked(&'static str),
    /// A signal asked for the end.
    #[error("interrupted")]
    Interrupted,
    /// Something still runs or is mounted.
    #[error("could not clean up \"{}\": {}", folder.display(), left.join(", "))]
    LeftBehind { folder: PathBuf, left: Vec<String> },
}

/// Lines of a program's last words that are worth showing.
const LAST_LINES: usize = 4;

impl DemoError {
    /// Says in which step it happened.
    pub(super) fn in_step(self, step: Step) -> Self {
        match self {
            Self::Interrupted | Self::Step { .. } => self,
            error => Self::Step { step, source: Box::new(error) },
        }
    }

    /// Returns a closure for `map_err` that names a local file.
    pub(super) fn at(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| disk::Error::Io { action, path: path.to_owned(), source }.into()
    }

    /// Returns a sentence that says what to do, where there is one.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NoPostgresql { .. } => {
                "Install PostgreSQL's server; on Debian: apt-get install postgresql-15. scripts/demo does that."
            }
            Self::NoAccount { .. } => {
                "Installing PostgreSQL's server creates it, or run the demo as an ordinary user."
            }
            Self::ClosedFolder { .. } => "Choose another --dir, such as /var/tmp.",
            Self::LongFolder { .. } => "Choose a shorter --dir.",
            Self::NoSpace { .. } => "Choose another --dir, or a smaller --scale.",
            Self::LeftBehind { .. } => "Unmount and stop what is listed, then remove the folder.",
            Self::Interrupted => return None,
            Self::Session(error) => return error.hint(),
            Self::Step { source, .. } => {
                return source.hint().or_else(|| Some("With --keep its folder and logs stay.".to_owned()));
            }
            _ => "With --keep its folder and logs stay.",
        };
        Some(hint.to_owned())
    }
}

/// Returns the end of what a program said, on one line.
fn last_words(said: &str) -> String {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return "it said nothing".to_owned();
    }
    lines[lines.len().saturating_sub(LAST_LINES)..].join("; ")
}

fn join(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_its_step_once_and_the_last_words() {
        let said = "one\n\n two\nthree\nfour\nfive\n".to_owned();
        let error = DemoError::LoadEnded { said }.in_step(Step::Backup).in_step(Step::Mount);
        assert_eq!(
            error.to_string(),
            "step \"backup\" failed: pgbench ended by itself: two; three; four; five"
        );
        assert_eq!(error.hint().unwrap(), "With --keep its folder and logs stay.");
        let silent = DemoError::LoadEnded { said: " \n".to_owned() };
        assert_eq!(silent.to_string(), "pgbench ended by itself: it said nothing");
    }

    #[test]
    fn an_interruption_is_no_failure_of_a_step() {
        assert_eq!(DemoError::Interrupted.in_step(Step::Clone).to_string(), "interrupted");
    }
}
