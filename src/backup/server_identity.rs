//! Which server a session speaks to, and whether a data directory is that server's.
//!
//! A backup_label taken from a primary with files copied from its standby is corrupt without an error (failure 21a),
//! and the system identifier cannot tell the two apart. So identities are compared when the basebackup starts and
//! again when it stops: the session's own answers with each other, and with what stands in the directory. A primary
//! and its standby always differ in their role; two primaries that share an identifier, in when they were started.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};

use super::source::SourceError;
use crate::pg::{PostmasterPid, SystemIdentifier, TimelineId};
use crate::replication::{Error as SessionError, Session};

/// A postmaster notes the time for its pid file when it begins, and for `pg_postmaster_start_time()` when it is ready
/// to serve; in between it may have to zero a large shared memory.
const START_DURATION_MAX: SignedDuration = SignedDuration::from_secs(120);
/// The pid file has whole seconds.
const ROUNDING: SignedDuration = SignedDuration::from_secs(1);

/// A server process as a session sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerIdentity {
    pub system_identifier: SystemIdentifier,
    pub data_directory: PathBuf,
    pub postmaster_start: Timestamp,
    pub in_recovery: bool,
    /// The timeline written to; in recovery, the one replayed to so far.
    pub timeline: TimelineId,
    /// The process that serves the session, in the server's own numbering.
    pub backend_pid: i64,
}

/// A data directory as its files describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryIdentity {
    /// Without links.
    pub data_directory: PathBuf,
    pub system_identifier: SystemIdentifier,
    /// From `pg_control`: the cluster is in archive recovery.
    pub in_recovery: bool,
    /// From `postmaster.pid`; `None` where there is no such file.
    pub postmaster: Option<PostmasterPid>,
}

/// One thing in which two identities differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub what: &'static str,
    pub expected: String,
    pub found: String,
}

impl Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}, expected {}", self.what, self.found, self.expected)
    }
}

const IDENTITY: &str = "SELECT system_identifier, \
     current_setting('data_directory') AS data_directory, \
     (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint AS postmaster_start, \
     pg_is_in_recovery() AS in_recovery, pg_backend_pid()::bigint AS backend_pid, \
     CASE WHEN pg_is_in_recovery() \
          THEN coalesce(nullif(min_recovery_end_timeline, 0), timeline_id)::bigint \
          ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint END AS timeline \
     FROM pg_control_system(), pg_control_recovery(), pg_control_checkpoint()";

impl ServerIdentity {
    /// Asks the server at the other end of a session who it is.
    pub async fn ask(session: &Session) -> Result<Self, SourceError> {
        let row = session.query_one(IDENTITY, &[]).await?;
        let unexpected = |detail: String| SessionError::Unexpected { detail };
        let timeline: u32 = row.unsigned("timeline")?;
        Ok(Self {
            system_identifier: SystemIdentifier(row.int("system_identifier")?.cast_unsigned()),
            data_directory: row.text("data_directory")?.into(),
            postmaster_start: row.timestamp("postmaster_start")?,
            in_recovery: row.bool("in_recovery")?,
            timeline: TimelineId::new(timeline).ok_or_else(|| unexpected(format!("timeline {timeline}")))?,
            backend_pid: row.int("backend_pid")?,
        })
    }

    /// Lists what is no longer as it was when `self` was asked.
    pub fn differences(&self, later: &Self) -> Vec<Difference> {
        let mut differences = Differences::default();
        differences.compare("system identifier", &self.system_identifier, &later.system_identifier);
        differences.compare(
            "data directory",
            &self.data_directory.display(),
            &later.data_directory.display(),
        );
        differences.compare("postmaster start time", &self.postmaster_start, &later.postmaster_start);
        differences.compare("server role", &role(self.in_recovery), &role(later.in_recovery));
        differences.compare("timeline", &self.timeline, &later.timeline);
        differences.compare("server process of the session", &self.backend_pid, &later.backend_pid);
        differences.0
    }

    /// Lists what speaks against `directory` being this server's.
    ///
    /// `backend_parent` is the parent of process `backend_pid` on this host, where there is such a process. If it is
    /// the directory's postmaster, a slow start is believed; it is no proof by itself, because another host may have
    /// given the same number, and its absence is none, because a container counts its processes its own way.
    pub fn differences_from(
        &self,
        directory: &DirectoryIdentity,
        backend_parent: Option<i32>,
    ) -> Vec<Difference> {
        let mut differences = Differences::default();
        differences.compare("system identifier", &self.system_identifier, &directory.system_identifier);
        let Some(postmaster) = &directory.postmaster else {
            differences.push("postmaster.pid", "that of a running server", "missing");
            return differences.0;
        };
        differences.compare("server role", &role(self.in_recovery), &role(directory.in_recovery));
        let is_parent = backend_parent == Some(postmaster.pid);
        match postmaster.start_time.and_then(|seconds| Timestamp::from_second(seconds).ok()) {
            Some(began) if self.began(began, is_parent) => {}
            Some(began) => differences.push("postmaster start time", self.postmaster_start, began),
            None => {
                differences.push("postmaster start time", self.postmaster_start, "not in postmaster.pid");
            }
        }
        // The directory may be reached by another path than the server's, through a link or a mount; the path the
        // server wrote into its own pid file may not differ from the one it tells.
        if let Some(written) = &postmaster.data_directory {
            let expected = self.data_directory.display();
            if *written != self.data_directory && directory.data_directory != self.data_directory {
                differences.push("data directory", expected, written.display());
            }
        }
        differences.0
    }

    /// Tells whether a postmaster that began then can be the one that says it started at `postmaster_start`.
    fn began(&self, began: Timestamp, is_parent: bool) -> bool {
        let took = self.postmaster_start.duration_since(began);
        took >= -ROUNDING && (is_parent || took <= START_DURATION_MAX)
    }
}

/// Returns the parent of a process of this host, where it can be seen.
pub fn parent_process(pid: i64) -> Option<i32> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything; the fourth is the parent.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

fn role(in_recovery: bool) -> &'static str {
    if in_recovery { "a standby" } else { "a primary" }
}

#[derive(Default)]
struct Differences(Vec<Difference>);

impl Differences {
    fn compare<T: Display + ?Sized>(&mut self, what: &'static str, expected: &T, found: &T) {
        if expected.to_string() != found.to_string() {
            self.push(what, expected, found);
        }
    }

    fn push(&mut self, what: &'static str, expected: impl Display, found: impl Display) {
        self.0.push(Difference { what, expected: expected.to_string(), found: found.to_string() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> ServerIdentity {
        ServerIdentity {
            system_identifier: SystemIdentifier(7),
            data_directory: "/data".into(),
            postmaster_start: "2026-11-20T10:15:00.25Z".parse().unwrap(),
            in_recovery: false,
            timeline: TimelineId::FIRST,
            backend_pid: 100,
        }
    }

    fn directory(start: &str) -> DirectoryIdentity {
        let start: Timestamp = start.parse().unwrap();
        let text = format!("50\n/data\n{}\n5432\n/run\n\n\nready\n", start.as_second());
        DirectoryIdentity {
            data_directory: "/data".into(),
            system_identifier: SystemIdentifier(7),
            in_recovery: false,
            postmaster: Some(PostmasterPid::parse(&text).unwrap()),
        }
    }

    fn whats(differences: &[Difference]) -> Vec<&str> {
        differences.iter().map(|difference| difference.what).collect()
    }

    #[test]
    fn a_server_is_itself_until_it_is_restarted_promoted_or_replaced() {
        let before = server();
        assert_eq!(before.differences(&server()), []);
        let promoted = ServerIdentity { timeline: TimelineId::new(2).unwrap(), ..server() };
        assert_eq!(whats(&before.differences(&promoted)), ["timeline"]);
        let restarted = ServerIdentity {
            postmaster_start: "2026-11-20T11:00:00Z".parse().unwrap(),
            backend_pid: 7,
            ..server()
        };
        let found = before.differences(&restarted);
        assert_eq!(whats(&found), ["postmaster start time", "server process of the session"]);
        assert!(found[0].to_string().contains("2026-11-20T11:00:00Z, expected 2026-11-20T10:15:00.25Z"));
    }

    #[test]
    fn failure_21a_a_standby_with_the_same_path_and_identifier_is_told_apart() {
        let standby = DirectoryIdentity { in_recovery: true, ..directory("2026-11-19T08:00:00Z") };
        let found = server().differences_from(&standby, None);
        assert_eq!(whats(&found), ["server role", "postmaster start time"]);
        let stopped = DirectoryIdentity { postmaster: None, ..directory("2026-11-20T10:15:00Z") };
        assert_eq!(whats(&server().differences_from(&stopped, None)), ["postmaster.pid"]);
        let other =
            DirectoryIdentity { system_identifier: SystemIdentifier(8), ..directory("2026-11-20T10:15:00Z") };
        assert_eq!(whats(&server().differences_from(&other, Some(50))), ["system identifier"]);
    }

    #[test]
    fn the_directorys_own_server_is_recognized() {
        for start in ["2026-11-20T10:15:00Z", "2026-11-20T10:14:10Z"] {
            assert_eq!(server().differences_from(&directory(start), None), []);
        }
        let slow = directory("2026-11-20T10:00:00Z");
        assert_eq!(whats(&server().differences_from(&slow, None)), ["postmaster start time"]);
        assert_eq!(server().differences_from(&slow, Some(50)), [], "its own child may have waited long");
        let later = directory("2026-11-20T10:15:02Z");
        assert_eq!(whats(&server().differences_from(&later, Some(50))), ["postmaster start time"]);
        let linked =
            DirectoryIdentity { data_directory: "/mnt/data".into(), ..directory("2026-11-20T10:15:00Z") };
        assert_eq!(server().differences_from(&linked, None), []);
    }

    #[test]
    fn the_parent_of_this_process_is_known() {
        let parent = nix::unistd::getppid().as_raw();
        assert_eq!(parent_process(std::process::id().into()), Some(parent));
        assert_eq!(parent_process(i64::MAX), None);
    }
}
