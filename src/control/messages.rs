//! What is asked and what is answered. Field names of the status are those of `clone status --output json`.
//! Deliberately absent: versions; both ends are the same binary, and an unknown field or request is refused.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A request to a clone's supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Tell how you are.
    Status,
    /// Stop PostgreSQL, sync, unmount and end.
    Stop,
    /// End recovery.
    Promote,
    /// Read the configuration files again.
    Reload,
    /// Fetch what is missing, whatever it was told of the rate; stop once nothing is.
    Finalize,
    /// Fetch again what could not come.
    Hydrate,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// How the clone is.
    Status(Box<CloneStatus>),
    /// What was asked has been done.
    Done,
    /// It is on its way, and may be asked for again.
    NotYet { message: String },
    /// It could not be done.
    Failed { message: String },
}

/// The state of a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CloneState {
    /// Its folder is being made.
    Creating,
    /// PostgreSQL replays WAL.
    Recovering,
    /// Recovery waits at its target.
    Paused,
    /// PostgreSQL takes connections.
    Running,
    /// Nothing of it runs.
    Stopped,
    /// It ended by itself, and the message says why.
    Failed,
}

/// How a clone is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CloneStatus {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: CloneState,
    /// Why it failed.
    pub message: Option<String>,
    /// The site and the basebackup it was made from.
    pub site: String,
    /// The id of the basebackup.
    pub basebackup: String,
    /// Where recovery ends, or ended.
    pub target: String,
    /// The port in the socket's name.
    pub port: u16,
    /// Where the socket is.
    pub socket_directory: PathBuf,
    /// PGDATA, within the mount.
    pub data_directory: PathBuf,
    /// The role that initdb created.
    pub superuser: String,
    /// The process that serves the mount.
    pub supervisor_pid: Option<u32>,
    /// The postmaster.
    pub server_pid: Option<u32>,
    /// What its user should know of it.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// When it is deleted, if ever, unless somebody is connected then.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// What its server is told in place of the source's configuration; empty before its first start.
    #[serde(default)]
    pub settings: Vec<CloneSetting>,
    /// Bytes of the basebackup that are local.
    pub hydrated_bytes: u64,
    /// Bytes of the basebackup.
    pub total_bytes: u64,
    /// How the rest of the basebackup comes.
    #[serde(default)]
    pub hydration: HydrationStatus,
    /// Bytes read from the store, manifest, keys and WAL included.
    pub bytes_fetched: u64,
    /// Requests to the store.
    pub requests: u64,
    /// From the request to create or start it until it answered.
    pub seconds_to_ready: Option<f64>,
    /// What keeps the server's sessions from opening the files anew that are local by now; nothing where nothing does.
    #[serde(default)]
    pub cut_over_waits_for: Option<String>,
}

/// How the rest of a basebackup comes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HydrationStatus {
    /// What is done about it.
    pub state: HydrationState,
    /// What it waits for, or why it failed.
    pub reason: Option<String>,
    /// The most bytes that become local in a second.
    pub rate_limit: Option<u64>,
    /// Bytes that became local in a second, over the last seconds.
    pub bytes_per_second: u64,
    /// Time that the rest takes at this rate.
    pub seconds_left: Option<u64>,
    /// Files that could not be made local.
    pub failed_files: u64,
}

/// What is done about the rest of a basebackup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HydrationState {
    /// Nothing: what is read is fetched when it is read.
    #[default]
    Off,
    /// It is to come, and waits.
    Waiting,
    /// It is being fetched.
    Running,
    /// Everything is local and on stable storage.
    Done,
    /// Something could not be made local.
    Failed,
}

/// A setting of a clone's server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneSetting {
    /// Its name.
    pub name: String,
    /// Its value, not quoted.
    pub value: String,
    /// Why the clone needs it.
    pub reason: String,
}

impl std::fmt::Display for HydrationState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
        })
    }
}

impl std::fmt::Display for CloneState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Recovering => "recovering",
            Self::Paused => "paused",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        })
    }
}
