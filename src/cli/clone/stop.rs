//! `walden clone stop`: PostgreSQL stops, what it wrote is synced, the mount goes. The clone's data stays.
//! The answer comes when all of that has been done; a clone of which nothing runs is stopped already.

use std::time::Duration;

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::control::{self, Reply, Request};
use crate::disk;
use crate::instance::clone_folder::CloneFolder;

use super::super::context::Context;
use super::super::error::CommandError;
use super::chosen::Chosen;
use super::{is_supervised, status_of};

/// Stops a clone; "clone start" goes on with its data
#[derive(Debug, Args)]
pub(super) struct CloneStop {
    /// The name of the clone, or a pattern with * and ?
    #[arg(required_unless_present = "all")]
    name: Option<String>,

    /// Stops every clone of this host
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

/// Between the answer and the end of the process lie a few system calls.
const EXIT_POLL: Duration = Duration::from_millis(10);
const EXIT_POLLS_MAX: u32 = 3000;
/// One that has begun listens after some milliseconds, unless it waits for the store first.
const LISTEN_POLLS_MAX: u32 = 300;

impl CloneStop {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let chosen = match &self.name {
            Some(name) => Chosen::find(context, name)?,
            None => Chosen::all(context)?,
        };
        let stop_and_tell = |folder: &CloneFolder| {
            context.block_on_one_thread(async {
                stop(folder).await?;
                status_of(folder).await
            })?
        };
        chosen.each("stopped", stop_and_tell, |stopped| chosen.print(context, stopped))
    }
}

/// Stops a clone and waits until its supervisor is gone.
pub(super) async fn stop(folder: &CloneFolder) -> Result<(), CommandError> {
    for _ in 0..LISTEN_POLLS_MAX {
        match control::request(&folder.control_socket(), &Request::Stop).await {
            Ok(Reply::Failed { message }) => return Err(CommandError::failed(message)),
            // One that has only begun is about to listen.
            Err(control::Error::NotRunning { .. }) if is_supervised(folder)? => {
                tokio::time::sleep(EXIT_POLL).await;
            }
            // A supervisor that failed while stopping has closed the connection; its folder tells the rest.
            Ok(_)
            | Err(
                control::Error::NotRunning { .. }
                | control::Error::Io { .. }
                | control::Error::Stranger { .. }
                | control::Error::Malformed { .. },
            ) => return wait_for_end(folder).await,
        }
    }
    // It waits for the store first, perhaps for longer than anybody waits here.
    terminate(folder);
    wait_for_end(folder).await
}

/// Tells a supervisor that does not listen to end, as a service manager does.
fn terminate(folder: &CloneFolder) {
    let Err(disk::Error::Locked { holder: Some(holder), .. }) = folder.lock() else { return };
    let command = std::fs::read(format!("/proc/{holder}/cmdline")).unwrap_or_default();
    if is_supervisor(&command, folder.name())
        && let Err(errno) = kill(Pid::from_raw(holder), Signal::SIGTERM)
    {
        tracing::warn!("could not tell process {holder} to end: {errno}");
    }
}

/// Tells whether a command line is that of a clone's supervisor: who makes, resets or finalizes one holds its lock too.
fn is_supervisor(command: &[u8], name: &str) -> bool {
    let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| pair == [b"serve-clone".as_slice(), name.as_bytes()])
}

/// Waits until a supervisor that is about to end is gone.
pub(super) async fn wait_for_end(folder: &CloneFolder) -> Result<(), CommandError> {
    for _ in 0..EXIT_POLLS_MAX {
        if !is_supervised(folder)? {
            return Ok(());
        }
        tokio::time::sleep(EXIT_POLL).await;
    }
    Err(CommandError::failed(format!("the supervisor of clone \"{}\" does not end", folder.name()))
        .hint(format!("See \"{}\".", folder.mount_log().display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_supervisor_of_the_clone_is_told_to_end() {
        let line = |words: &[&str]| words.join("\0").into_bytes();
        let serves =
            ["walden", "--site", "main", "internal", "serve-clone", "one", "--spent-seconds", "0", ""];
        assert!(is_supervisor(&line(&serves), "one"));
        assert!(!is_supervisor(&line(&serves), "two"));
        assert!(!is_supervisor(&line(&["walden", "clone", "finalize", "one", ""]), "one"));
        assert!(!is_supervisor(b"", "one"));
    }
}
