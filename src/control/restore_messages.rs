//! What the supervisor of an instant restore is asked and what it answers.
//! Field names of the status are those of `restore --instant --output json` where both have them. Deliberately absent:
//! versions; both ends are the same binary, and what is not understood is refused.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::control::messages::HydrationStatus;

/// A request to a restore's supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RestoreRequest {
    /// Tell how you are.
    Status,
    /// Start PostgreSQL, unless it runs, and fetch again what could not come.
    Start,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreReply {
    /// How the restore is.
    Status(Box<RestoreStatus>),
    /// What was asked has been done.
    Done,
    /// It could not be done.
    Failed { message: String },
}

/// What the server of a restore does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoredServer {
    /// None runs: it was stopped, or nobody has started one.
    Stopped,
    /// None runs: it ended by itself, and the message says why.
    Failed,
    /// It starts, or replays WAL on its way to the target.
    Recovering,
    /// It answers and lets readers in; whether it has come to its target, it does not tell Walden.
    Readable,
    /// Recovery waits at its target.
    Paused,
    /// It takes connections, and its recovery is over.
    Running,
}

/// Where a tablespace is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredTablespace {
    /// Its OID.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// Its directory.
    pub directory: PathBuf,
}

/// A setting that a restored server was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredSetting {
    /// Its name.
    pub name: String,
    /// Its value, not quoted.
    pub value: String,
}

/// How an instant restore is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreStatus {
    /// The site.
    pub site: String,
    /// The basebackup.
    pub basebackup: String,
    /// PGDATA.
    pub target_directory: PathBuf,
    /// Its tablespaces.
    pub tablespaces: Vec<RestoredTablespace>,
    /// The timeline that recovery follows.
    pub timeline: u32,
    /// Where recovery ends.
    pub target: Option<String>,
    /// What was added to `postgresql.auto.conf`.
    pub settings: Vec<RestoredSetting>,
    /// What was added to a configuration outside PGDATA.
    pub config_settings: Vec<RestoredSetting>,
    /// What the server that runs has on its command line, where it was started here.
    pub command_line_settings: Vec<RestoredSetting>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Whether the rest comes in the background.
    pub hydrates: bool,
    /// What the server does.
    pub server: RestoredServer,
    /// Why it failed.
    pub message: Option<String>,
    /// Whether it is an ordinary data directory now, though mounted as long as the server runs.
    pub is_plain: bool,
    /// What became of opening files anew, where that was asked for: `done`, `waits: ` or `not done: ` and why.
    pub cut_over: Option<String>,
    /// Whether the cut-over is asked for and has not been tried to its end.
    pub is_cutting_over: bool,
    /// The process that serves the mounts.
    pub supervisor_pid: u32,
    /// The postmaster.
    pub server_pid: Option<u32>,
    /// From the request until the server answered.
    pub answered_after_seconds: Option<f64>,
    /// From the request until it was an ordinary data directory.
    pub plain_after_seconds: Option<f64>,
    /// Bytes of the basebackup that are local.
    pub hydrated_bytes: u64,
    /// Bytes of the basebackup.
    pub total_bytes: u64,
    /// How the rest of it comes.
    pub hydration: HydrationStatus,
    /// Bytes read from the store.
    pub bytes_fetched: u64,
    /// Requests to the store.
    pub requests: u64,
}

impl RestoredServer {
    /// Tells whether it answers queries as it was asked to: at its target, as far as it can be told.
    pub fn answers(self) -> bool {
        match self {
            Self::Readable | Self::Paused | Self::Running => true,
            Self::Stopped | Self::Failed | Self::Recovering => false,
        }
    }
}

impl std::fmt::Display for RestoredServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Recovering => "recovering",
            Self::Readable => "readable",
            Self::Paused => "paused",
            Self::Running => "running",
        })
    }
}
