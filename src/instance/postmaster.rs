//! A postmaster that is a child of this process: started through `launch`, watched, signalled, stopped.
//! Deliberately absent: pg_ctl, which would hide the exit status; and what the server is asked, which needs a session.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::instance::launch::Launch;
use crate::instance::replay_processor::ReplayProcessor;
use crate::instance::server::{ServerError, StopMode};

/// A postmaster that was started here.
#[derive(Debug)]
pub(super) struct Postmaster {
    child: Child,
    pid: Pid,
    _replay: ReplayProcessor,
}

impl Postmaster {
    /// Starts one; it may still have to recover before it lets anybody in.
    pub(super) async fn start(launch: &Launch) -> Result<Self, ServerError> {
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
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| ServerError::Spawn(io::Error::other("it ended at once")))?;
        let pid = Pid::from_raw(pid);
        Ok(Self { child, pid, _replay: ReplayProcessor::watch(pid) })
    }

    /// Returns its process id.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Returns how it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until it ends.
    pub(super) async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Asks it to stop and waits; after `deadline` it is told to end at once.
    pub(super) async fn stop(&mut self, mode: StopMode, deadline: Duration) -> Result<(), ServerError> {
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
