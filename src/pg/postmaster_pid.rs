//! `postmaster.pid`: who serves a data directory, since when, and how far its start has come.
//!
//! Eight lines (`src/include/utils/pidfile.h`): process, data directory, start time in seconds, port, socket directory,
//! listen address, shared memory key, status. The postmaster adds them one by one while it starts, so all but the
//! first may be missing. A file left by a crash looks the same: whether the process lives is another question.

use std::path::PathBuf;

/// No such file is longer.
const LENGTH_MAX: usize = 16 * 1024;

/// The content of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostmasterPid {
    /// The postmaster, or a single-user backend.
    pub pid: i32,
    pub data_directory: Option<PathBuf>,
    /// Seconds since 1970 at which the postmaster began to start.
    pub start_time: Option<i64>,
    pub port: Option<u16>,
    /// The first socket directory; `None` where the server has no Unix socket.
    pub socket_directory: Option<PathBuf>,
    pub listen_address: Option<String>,
    pub status: Option<PostmasterStatus>,
}

/// What the postmaster says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostmasterStatus {
    Starting,
    Stopping,
    /// Connections are accepted.
    Ready,
    /// Recovery goes on and reading connections are not accepted.
    Standby,
}

/// A text that is no `postmaster.pid`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("postmaster.pid does not begin with the number of a process")]
pub struct NoPostmasterPid;

impl PostmasterPid {
    /// Reads the text of the file, as far as it goes.
    pub fn parse(text: &str) -> Result<Self, NoPostmasterPid> {
        let text = text.get(..LENGTH_MAX).unwrap_or(text);
        let mut lines = text.lines().map(str::trim_end);
        let number: i32 = lines.next().and_then(|line| line.trim().parse().ok()).ok_or(NoPostmasterPid)?;
        // A single-user backend writes its number negated.
        let pid = number.checked_abs().filter(|pid| *pid > 0).ok_or(NoPostmasterPid)?;
        let mut next = || lines.next().filter(|line| !line.is_empty());
        let data_directory = next().map(PathBuf::from);
        let start_time = next().and_then(|line| line.trim().parse().ok());
        let port = next().and_then(|line| line.trim().parse().ok());
        let socket_directory = next().map(PathBuf::from);
        let listen_address = next().map(str::to_owned);
        let _shared_memory_key = next();
        let status = next().and_then(|line| match line.trim() {
            "starting" => Some(PostmasterStatus::Starting),
            "stopping" => Some(PostmasterStatus::Stopping),
            "ready" => Some(PostmasterStatus::Ready),
            "standby" => Some(PostmasterStatus::Standby),
            _ => None,
        });
        Ok(Self { pid, data_directory, start_time, port, socket_directory, listen_address, status })
    }

    /// Returns true once connections are accepted.
    pub fn is_ready(&self) -> bool {
        self.status == Some(PostmasterStatus::Ready)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RUNNING: &str = "4711\n/var/lib/postgresql/15/main\n1763700000\n5432\n/var/run/postgresql\nlocalhost\n  1234567    65538\nready   \n";

    #[test]
    fn a_running_server_says_all() {
        let file = PostmasterPid::parse(RUNNING).unwrap();
        assert_eq!(file.pid, 4711);
        assert_eq!(file.data_directory.as_deref(), Some("/var/lib/postgresql/15/main".as_ref()));
        assert_eq!(file.start_time, Some(1_763_700_000));
        assert_eq!(file.port, Some(5432));
        assert_eq!(file.socket_directory.as_deref(), Some("/var/run/postgresql".as_ref()));
        assert_eq!(file.listen_address.as_deref(), Some("localhost"));
        assert!(file.is_ready());
    }

    #[test]
    fn a_starting_server_says_what_it_can() {
        let file = PostmasterPid::parse("17\n/data\n1763700000\n5432\n/run\n\n").unwrap();
        assert_eq!((file.port, file.listen_address, file.status), (Some(5432), None, None));
        let standby = RUNNING.replace("ready", "standby");
        assert_eq!(PostmasterPid::parse(&standby).unwrap().status, Some(PostmasterStatus::Standby));
    }

    #[test]
    fn single_user_mode_is_negated_and_nonsense_refused() {
        assert_eq!(PostmasterPid::parse("-99\n/data\n").unwrap().pid, 99);
        for text in ["", "\n", "x\n", "0\n", "-2147483648\n"] {
            assert_eq!(PostmasterPid::parse(text), Err(NoPostmasterPid), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "(?s).*") {
            let _ = PostmasterPid::parse(&text);
        }
    }
}
