//! The process behind a call, and waits that end when it is being killed.
//!
//! A process that waits for a FUSE answer cannot be killed: the kernel asks the mount to give up (FUSE_INTERRUPT),
//! and fuser answers that for us with ENOSYS. So a wait that may be long looks into `/proc` once a second and ends
//! with `EINTR` when a deadly signal is pending for the caller. Only waits for the store or for somebody else's
//! fetch are wrapped; a change to the upper that has begun always runs to its end.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::time::Duration;

use nix::errno::Errno;

use crate::disk::Owner;

/// How often a waiting call looks whether its caller is being killed.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The signals that end a wait.
const DEADLY: [i32; 4] = [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGQUIT];

/// The process a call came from.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// The thread's id in our pid namespace; `None` for calls of our own and from other namespaces.
    pub pid: Option<u32>,
    /// Who new files belong to.
    pub owner: Owner,
    /// Nobody waits for what is done for it: it gives way to all others.
    pub is_background: bool,
}

impl Caller {
    /// Returns the caller for work this process does by itself.
    pub fn internal() -> Self {
        Self { pid: None, owner: Owner::current(), is_background: false }
    }

    /// Returns the caller for work of this process that nobody waits for.
    pub fn background() -> Self {
        Self { is_background: true, ..Self::internal() }
    }

    /// Waits for `work`, but no longer than the caller lives.
    pub async fn killable<T>(&self, work: impl Future<Output = Result<T, Errno>>) -> Result<T, Errno> {
        let Some(pid) = self.pid else { return work.await };
        let mut work = pin!(work);
        loop {
            match tokio::time::timeout(LOOK_INTERVAL, work.as_mut()).await {
                Ok(outcome) => return outcome,
                Err(_) if is_dying(pid) => return Err(Errno::EINTR),
                Err(_) => {}
            }
        }
    }
}

/// Tells whether a caller is being killed or is gone already.
///
/// Who reads through the page cache can be killed while it waits for the page, and leaves its request behind; the
/// page stays locked for every other reader until the request is answered.
fn is_dying(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => has_deadly_signal(&status),
        Err(error) => error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH),
    }
}

/// Tells from `/proc/<pid>/status` whether a deadly signal is pending and not blocked.
fn has_deadly_signal(status: &str) -> bool {
    let mask = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let pending = mask("SigPnd:").unwrap_or(0) | mask("ShdPnd:").unwrap_or(0);
    let deliverable = pending & !mask("SigBlk:").unwrap_or(0);
    DEADLY.iter().any(|signal| deliverable & (1 << (signal - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(own: u64, shared: u64, blocked: u64) -> String {
        format!(
            "Name:\tcat\nSigQ:\t1/2\nSigPnd:\t{own:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\n"
        )
    }

    #[test]
    fn only_deadly_and_deliverable_signals_end_a_wait() {
        let bit = |signal: i32| 1u64 << (signal - 1);
        assert!(!has_deadly_signal(&status(0, 0, 0)));
        assert!(!has_deadly_signal(&status(bit(libc::SIGCHLD), bit(libc::SIGUSR1), 0)));
        for signal in DEADLY {
            assert!(has_deadly_signal(&status(bit(signal), 0, 0)));
            assert!(has_deadly_signal(&status(0, bit(signal), 0)));
        }
        assert!(!has_deadly_signal(&status(0, bit(libc::SIGTERM), bit(libc::SIGTERM))));
        assert!(!has_deadly_signal("garbage"));
    }

    #[tokio::test]
    async fn a_living_caller_gets_its_answer() {
        let caller = Caller { pid: Some(std::process::id()), ..Caller::internal() };
        assert_eq!(caller.killable(async { Ok(7) }).await, Ok(7));
        assert_eq!(caller.killable(async { Err::<(), _>(Errno::EIO) }).await, Err(Errno::EIO));
    }
}
