//! One PostgreSQL of a clone: started as the owner of its folder, asked, stopped.
//!
//! The postmaster is a child of the supervisor (`postmaster`), which sees nothing writable but its own directories.
//! Ready means that a session was let in: with `hot_standby=off` that is the end of recovery.
//! Deliberately absent: restarting, which the supervisor decides.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::disk::Owner;
use crate::instance::as_user::as_user;
use crate::instance::launch::Launch;
use crate::instance::postmaster::Postmaster;
use crate::replication::{self, ConnectOptions, Session};

/// How Walden reaches a server of this host.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Where its socket is.
    pub socket_directory: PathBuf,
    /// The port in the socket's name.
    pub port: u16,
    /// The role that may do everything.
    pub superuser: String,
    /// The user as whom Walden connects, where another one than its own is believed.
    pub user: Option<Owner>,
}

/// A postmaster that was started here.
#[derive(Debug)]
pub struct Server {
    postmaster: Postmaster,
    endpoint: Endpoint,
    log_file: PathBuf,
    pid_file: PathBuf,
}

/// How a server is asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Ends sessions, writes a checkpoint.
    Fast,
    /// Ends at once; the next start recovers.
    Immediate,
}

/// Why a server is not there.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The process could not be started.
    #[error("could not start PostgreSQL: {0}")]
    Spawn(std::io::Error),
    /// It ended before it let anybody in.
    #[error("PostgreSQL ended while it was starting ({status}): {}", last_words(log))]
    EndedAtStart { status: ExitStatus, log: Vec<String> },
    /// It ended, and nobody here had asked it to.
    #[error("PostgreSQL ended by itself ({status}): {}", last_words(log))]
    Ended { status: ExitStatus, log: Vec<String> },
    /// It did not stop in time.
    #[error("PostgreSQL did not stop within {0:?}")]
    StillRunning(Duration),
    /// A statement failed.
    #[error(transparent)]
    Session(#[from] replication::Error),
}

/// Where sessions of Walden's own are: not in template1 where that can be, for a session there is in the way of every
/// CREATE DATABASE; but `postgres` may have been dropped, and template1 is in every cluster.
const DATABASES: [&str; 2] = ["postgres", "template1"];
/// Where postmaster.pid says how the server is, counted from 0 (pidfile.h).
const PID_FILE_STATUS_LINE: usize = 7;
/// How often a starting server's pid file is looked at.
const READY_POLL: Duration = Duration::from_millis(20);
/// The end of the log that is looked through for the reason of a failure.
const LOG_TAIL_BYTES: u64 = 16 << 10;

impl Endpoint {
    /// Returns how a clone's server is reached: whoever comes to its socket is believed.
    pub fn of_clone(socket_directory: PathBuf, port: u16, superuser: String) -> Self {
        Self { socket_directory, port, superuser, user: None }
    }

    /// Returns how to connect to a database of the server.
    pub fn connect_options(&self, database: &str) -> ConnectOptions {
        let quote = |text: &str| text.replace('\\', r"\\").replace('\'', r"\'");
        ConnectOptions::new(format!(
            "host='{}' port={} user='{}' dbname='{}' application_name=walden connect_timeout=10",
            quote(&self.socket_directory.display().to_string()),
            self.port,
            quote(&self.superuser),
            quote(database)
        ))
    }

    /// Opens a session of Walden's own.
    pub async fn connect(&self) -> Result<Session, replication::Error> {
        let [usual, always] = DATABASES;
        match self.connect_to(usual).await {
            Err(error) if error.kind() != replication::ErrorKind::Retry => self.connect_to(always).await,
            other => other,
        }
    }

    async fn connect_to(&self, database: &str) -> Result<Session, replication::Error> {
        let options = self.connect_options(database);
        match self.user {
            None => Session::connect(&options).await,
            Some(user) => as_user(user, async move { Session::connect(&options).await }).await?,
        }
    }
}

impl Server {
    /// Starts a postmaster; it may still have to recover before it lets anybody in.
    pub async fn start(launch: &Launch, endpoint: Endpoint) -> Result<Self, ServerError> {
        let postmaster = Postmaster::start(launch).await?;
        let (log_file, pid_file) = (launch.log_file.clone(), launch.pid_file.clone());
        Ok(Self { postmaster, endpoint, log_file, pid_file })
    }

    /// Returns the postmaster's process id.
    pub fn pid(&self) -> u32 {
        self.postmaster.pid().as_raw().unsigned_abs()
    }

    /// Returns how clients reach it.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Asks it to read its configuration files again.
    pub fn reload(&self) -> Result<(), nix::errno::Errno> {
        kill(self.postmaster.pid(), Signal::SIGHUP)
    }

    /// Waits until a session is let in, however long recovery takes.
    async fn ready(&mut self) -> Result<Session, ServerError> {
        loop {
            if let Some(status) = self.postmaster.ended() {
                return Err(ServerError::EndedAtStart { status, log: tail(&self.log_file) });
            }
            if self.lets_in() {
                match self.endpoint.connect().await {
                    Ok(session) => return Ok(session),
                    Err(error) if error.kind() == replication::ErrorKind::Retry => {}
                    Err(error) => return Err(error.into()),
                }
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }

    /// Returns whether the postmaster says in its pid file that it takes connections; asking it costs it a fork.
    /// `standby` there means that it recovers and takes none until it has.
    fn lets_in(&self) -> bool {
        let text = std::fs::read_to_string(&self.pid_file).unwrap_or_default();
        text.lines().nth(PID_FILE_STATUS_LINE).map(str::trim) == Some("ready")
    }

    /// Waits for what comes next: that it lets somebody in, if it is starting, or that it ends.
    pub async fn next(&mut self, starting: bool) -> Result<Session, ServerError> {
        if starting { self.ready().await } else { Err(self.ended().await) }
    }

    async fn ended(&mut self) -> ServerError {
        match self.postmaster.wait().await {
            Ok(status) => ServerError::Ended { status, log: tail(&self.log_file) },
            Err(error) => ServerError::Spawn(error),
        }
    }

    /// Asks it to stop and waits; after `deadline` it is told to end at once.
    pub async fn stop(&mut self, mode: StopMode, deadline: Duration) -> Result<(), ServerError> {
        self.postmaster.stop(mode, deadline).await
    }
}

/// Returns the last lines of a server's log that say why it ended, oldest first.
pub fn tail(log_file: &Path) -> Vec<String> {
    let mut text = Vec::new();
    if let Ok(mut file) = std::fs::File::open(log_file) {
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)));
        let _ = file.take(LOG_TAIL_BYTES).read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    let said = |line: &&str| ["FATAL:", "PANIC:", "ERROR:", "HINT:"].iter().any(|level| line.contains(level));
    let mut lines: Vec<String> = text.lines().filter(said).map(str::to_owned).collect();
    if lines.is_empty() {
        lines = text.lines().map(str::to_owned).collect();
    }
    lines.split_off(lines.len().saturating_sub(4))
}

pub(super) fn last_words(log: &[String]) -> String {
    if log.is_empty() { "its log is empty".to_owned() } else { log.join("; ") }
}
