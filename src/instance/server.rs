//! One PostgreSQL of a clone: started as the owner of its folder, watched, stopped.
//!
//! The postmaster is a child of the supervisor, started through `launch` so that it sees nothing writable but its
//! own directories. Ready means that a session was let in: with `hot_standby=off` that is the end of recovery.
//! Deliberately absent: pg_ctl, which would hide the exit status, and restarting, which the supervisor decides.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::instance::launch::Launch;
use crate::replication::{self, ConnectOptions, Session};

/// How clients reach a clone's server.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Where its socket is.
    pub socket_directory: PathBuf,
    /// The port in the socket's name.
    pub port: u16,
    /// The role that may do everything.
    pub superuser: String,
}

/// A postmaster that was started here.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pid: Pid,
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
    /// Returns how to connect to a database of the clone.
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
        match Session::connect(&self.connect_options(usual)).await {
            Err(error) if error.kind() != replication::ErrorKind::Retry => {
                Session::connect(&self.connect_options(always)).await
            }
            other => other,
        }
    }
}

impl Server {
    /// Starts a postmaster; it may still have to recover before it lets anybody in.
    pub async fn start(launch: &Launch, endpoint: Endpoint) -> Result<Self, ServerError> {
        let binary = std::env::current_exe().map_err(ServerError::Spawn)?;
        let mut child = Command::new(binary)
            .args(["internal", "run-postgres"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(ServerError::Spawn)?;
        let order = serde_json::to_vec(launch).map_err(|error| ServerError::Spawn(error.into()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&order).await.map_err(ServerError::Spawn)?;
        }
        let pid_file = launch.pid_file.clone();
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| ServerError::Spawn(std::io::Error::other("it ended at once")))?;
        Ok(Self { child, pid: Pid::from_raw(pid), endpoint, log_file: launch.log_file.clone(), pid_file })
    }

    /// Returns the postmaster's process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Returns how clients reach it.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Asks it to read its configuration files again.
    pub fn reload(&self) -> Result<(), nix::errno::Errno> {
        kill(self.pid, Signal::SIGHUP)
    }

    /// Waits until a session is let in, however long recovery takes.
    async fn ready(&mut self) -> Result<Session, ServerError> {
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
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
        match self.child.wait().await {
            Ok(status) => ServerError::Ended { status, log: tail(&self.log_file) },
            Err(error) => ServerError::Spawn(error),
        }
    }

    /// Asks it to stop and waits; after `deadline` it is told to end at once.
    pub async fn stop(&mut self, mode: StopMode, deadline: Duration) -> Result<(), ServerError> {
        let signal = match mode {
            StopMode::Fast => Signal::SIGINT,
            StopMode::Immediate => Signal::SIGQUIT,
        };
        let _ = kill(self.pid, signal);
        if tokio::time::timeout(deadline, self.child.wait()).await.is_ok() {
            return Ok(());
        }
        if mode == StopMode::Fast {
            tracing::warn!("PostgreSQL did not stop within {deadline:?}; it is told to end at once");
            let _ = kill(self.pid, Signal::SIGQUIT);
            if tokio::time::timeout(deadline, self.child.wait()).await.is_ok() {
                return Ok(());
            }
        }
        let _ = kill(self.pid, Signal::SIGKILL);
        Err(ServerError::StillRunning(deadline))
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

fn last_words(log: &[String]) -> String {
    if log.is_empty() { "its log is empty".to_owned() } else { log.join("; ") }
}
