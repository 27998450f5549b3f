//! Ends what a postmaster that was killed leaves behind.
//!
//! Its backends notice by themselves only when they wait; until then they go on writing into a mount that is about to
//! go. The supervisor adopts them (`PR_SET_CHILD_SUBREAPER`), so they are its children once their parent is dead.
//! Deliberately absent: asking them kindly; after a crash the next start recovers anyway.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// Makes orphans of this process's descendants its own children.
pub fn adopt() {
    if let Err(errno) = nix::sys::prctl::set_child_subreaper(true) {
        tracing::warn!("processes of a server that is killed will not be ended: {errno}");
    }
}

/// As deep as what a server starts may be nested: an archiver has a shell, and that has a program.
const GENERATIONS_MAX: usize = 16;

/// Kills every child of this process and waits until it is gone, and then what those have left.
pub fn end() {
    for _ in 0..GENERATIONS_MAX {
        let children = children();
        if children.is_empty() {
            return;
        }
        for child in children {
            if kill(child, Signal::SIGKILL).is_ok() {
                let _ = waitpid(child, None);
            }
        }
    }
}

fn children() -> Vec<Pid> {
    let own = std::process::id().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_child = |process: &i32| {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // The name before may hold anything; after it come state and parent.
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        parent == Some(own.as_str())
    };
    processes.filter(is_child).map(Pid::from_raw).collect()
}
