//! What happened: the steps with their times and bytes, and the figures that `--output json` promises.
//!
//! Bytes and requests are those of the store, counted at its edge, where a command says them; what has no price there
//! leaves the columns empty.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// A step of the demonstration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Folder, keys and configuration.
    Prepare,
    /// The scratch cluster.
    Initdb,
    /// Its data.
    Fill,
    /// A basebackup while pgbench runs.
    Backup,
    /// More load, and WAL to the last record.
    Archive,
    /// The read-only mount.
    Mount,
    /// A clone, up to its first answer.
    Clone,
    /// Every table of source and clone.
    Compare,
    /// A write in the clone.
    Write,
    /// The end of clone, mount and server.
    CleanUp,
}

/// A step that is done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    /// The step.
    pub step: Step,
    /// How long it took.
    pub seconds: f64,
    /// Bytes to or from the store, or of what was made.
    pub bytes: Option<u64>,
    /// Requests to the store.
    pub requests: Option<u64>,
    /// What was done, in words.
    pub what: String,
}

/// The whole demonstration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DemoReport {
    /// Always true: a demonstration that fails has no report.
    pub ok: bool,
    /// The server's version.
    pub postgresql: String,
    /// Size of the databases when they were backed up.
    pub database_bytes: u64,
    /// The basebackup.
    pub backup: BackupFigures,
    /// The archive at the end.
    pub wal: WalFigures,
    /// What the mount showed.
    pub mount: MountFigures,
    /// The clone.
    pub clone: CloneFigures,
    /// Tables that were compared.
    pub tables: u64,
    /// Whether source and clone hold the same rows.
    pub checksums_equal: bool,
    /// The steps in order.
    pub steps: Vec<StepReport>,
    /// The folder, where it was kept.
    pub folder: Option<PathBuf>,
}

/// Figures of the basebackup.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct BackupFigures {
    /// From the command's start to its end.
    #[serde(serialize_with = "millis")]
    pub seconds: f64,
    /// Bytes written to the store.
    pub stored_bytes: u64,
    /// Requests to the store, where the command says.
    pub requests: Option<u64>,
    /// Transactions that were committed meanwhile.
    pub transactions: u64,
}

/// Figures of the WAL archive.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct WalFigures {
    /// Segments in the archive.
    pub segments: u64,
    /// Their bytes as PostgreSQL wrote them.
    pub bytes: u64,
    /// Their bytes in the store.
    pub stored_bytes: u64,
}

/// What the read-only mount showed of the basebackup.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct MountFigures {
    /// From the command's start until it had returned.
    #[serde(serialize_with = "millis")]
    pub seconds: f64,
    /// Files of the basebackup's data directory.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Segments in its WAL directory.
    pub wal_segments: u64,
}

/// Figures of the clone.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct CloneFigures {
    /// From the start of `clone create` to the first answer of an index look-up, recovery ended.
    #[serde(serialize_with = "millis")]
    pub seconds_to_first_query: f64,
    /// Bytes read from the store until then, manifest, keys and WAL included.
    pub bytes_fetched: u64,
    /// Requests to the store until then.
    pub requests: u64,
}

impl StepReport {
    /// Creates the report of a step without bytes.
    pub(super) fn new(step: Step, took: Duration, what: impl Into<String>) -> Self {
        let seconds = rounded(took.as_secs_f64());
        Self { step, seconds, bytes: None, requests: None, what: what.into() }
    }

    /// Adds bytes, and requests where they are known.
    pub(super) fn with(self, bytes: u64, requests: Option<u64>) -> Self {
        Self { bytes: Some(bytes), requests, ..self }
    }

    /// Returns how long it took.
    pub fn took(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

impl Step {
    /// Returns the word for the table and for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Initdb => "initdb",
            Self::Fill => "fill",
            Self::Backup => "backup",
            Self::Archive => "archive",
            Self::Mount => "mount",
            Self::Clone => "clone",
            Self::Compare => "compare",
            Self::Write => "write",
            Self::CleanUp => "clean up",
        }
    }

    /// Says what is about to happen.
    pub fn intention(self) -> &'static str {
        match self {
            Self::Prepare => "making keys and a configuration",
            Self::Initdb => "initializing a scratch cluster",
            Self::Fill => "filling it with pgbench's tables and a table of text",
            Self::Backup => "backing it up while pgbench runs",
            Self::Archive => "loading it further, then archiving its WAL to the last record",
            Self::Mount => "mounting the repository and listing the basebackup",
            Self::Clone => "starting a clone on the basebackup, at the end of the archive",
            Self::Compare => "comparing every table of source and clone",
            Self::Write => "writing in the clone",
            Self::CleanUp => "deleting the clone, unmounting, stopping the server",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Nothing here is measured more finely than a millisecond.
fn rounded(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

fn millis<S: Serializer>(seconds: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(rounded(*seconds))
}
