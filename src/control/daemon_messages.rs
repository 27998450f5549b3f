//! What a daemon is asked and what it answers.
//!
//! While it works it says so every second, so that whoever waits can tell a slow store from a daemon that hangs.
//! Deliberately absent: versions; both ends are the same binary, and what is not understood is refused.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A request to a daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DaemonRequest {
    /// Archive a file of `pg_wal`.
    Push {
        /// The site, by its name in the daemon's configuration.
        site: String,
        /// The file, from the root.
        path: PathBuf,
        /// Whether it is to supersede what stands under its name.
        force: bool,
    },
}

/// A line of a daemon's answer; all but the last are `Working`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DaemonAnswer {
    /// It is being done.
    Working,
    /// The archive has the file durably.
    Archived(ArchivedFile),
    /// It could not be done.
    Failed(Failure),
}

/// A file that was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchivedFile {
    /// Its name.
    pub name: String,
    /// The cluster that wrote it.
    pub cluster: String,
    /// Whether it was not there before.
    pub created: bool,
}

/// Why a request failed, as a command would say it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind of a command's failure, in its own word.
    pub kind: String,
    /// What went wrong, with its causes.
    pub message: String,
    /// What to do about it, as a sentence.
    pub hint: Option<String>,
}

/// How often a daemon says that it is at work.
pub(super) const WORKING_EVERY: Duration = Duration::from_secs(1);
/// A daemon that says nothing for so long hangs: ten times what it has to say in that time.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(10);
