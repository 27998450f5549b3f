//! What the server of a restore does, by what it says of itself, whoever has started it.
//!
//! `postmaster.pid` beneath the mount says whether sessions are let in, and where; `recovery.signal` whether recovery goes on.
//! Whether that waits at its target only a session can tell, and a server may let none of Walden's in: then one that lets
//! readers in is taken at its word.

use std::path::Path;
use std::time::Duration;

use crate::control::RestoredServer;
use crate::disk::{Owner, state_file};
use crate::instance::server::Endpoint;
use crate::pg::{PostmasterPid, PostmasterStatus, RECOVERY_SIGNAL};
use crate::replication;

/// How long the server is asked: its answer may need pages from the store.
const ASK_WAIT: Duration = Duration::from_secs(10);

/// Seven lines, of which two are paths.
const PID_FILE_BYTES_MAX: u64 = 64 << 10;

/// What a session was told of recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// It is over.
    Over,
    /// It waits at its target.
    Paused,
    /// It goes on.
    GoesOn,
}

/// Reads the server's word on itself; nothing where there is none, or not all of it yet.
///
/// Its owner may have put anything there, and who looks serves the mount: it waits for nobody.
pub(super) fn read_pid_file(beneath: &Path) -> Option<PostmasterPid> {
    let path = beneath.join("postmaster.pid");
    let text = state_file::read(&path, "the server's word on itself", PID_FILE_BYTES_MAX).ok()?;
    PostmasterPid::parse(str::from_utf8(&text).ok()?).ok()
}

/// Tells whether recovery has not ended: the server removes the file near its end. The checkpoint that comes then may take
/// minutes, in which readers are let in and nobody can write.
pub(super) fn is_recovering(beneath: &Path) -> bool {
    beneath.join(RECOVERY_SIGNAL).exists()
}

/// Tells whether a server is on its way to letting somebody in: it may recover from a crash, of which no file tells.
pub(super) fn is_starting(status: Option<PostmasterStatus>) -> bool {
    !matches!(status, Some(PostmasterStatus::Ready | PostmasterStatus::Stopping))
}

/// Decides what a server does that runs.
pub(super) fn decide(
    status: Option<PostmasterStatus>,
    is_recovering: bool,
    told: Option<Told>,
) -> RestoredServer {
    match (status, told) {
        (Some(PostmasterStatus::Ready), Some(Told::Over)) => RestoredServer::Running,
        (Some(PostmasterStatus::Ready), Some(Told::Paused)) => RestoredServer::Paused,
        (Some(PostmasterStatus::Ready), None) if !is_recovering => RestoredServer::Running,
        (Some(PostmasterStatus::Ready), None) => RestoredServer::Readable,
        _ => RestoredServer::Recovering,
    }
}

/// Returns what a cut-over that has not begun is told to be; nothing where it begins at once.
pub(super) fn before_cut_over(server: RestoredServer, is_plain: bool) -> Option<String> {
    match server {
        RestoredServer::Stopped | RestoredServer::Failed => Some("not done: no server runs".to_owned()),
        _ if !is_plain => Some("waits: not everything is local yet".to_owned()),
        RestoredServer::Running => None,
        RestoredServer::Recovering | RestoredServer::Readable | RestoredServer::Paused => {
            Some(format!("waits: the server is {server}"))
        }
    }
}

/// Returns how Walden connects to the server, as its owner: nobody else is believed by every configuration.
pub(super) fn endpoint(file: &PostmasterPid, superuser: &str, owner: Owner) -> Option<Endpoint> {
    let (Some(socket_directory), Some(port)) = (file.socket_directory.clone(), file.port) else {
        return None;
    };
    Some(Endpoint { socket_directory, port, superuser: superuser.to_owned(), user: Some(owner) })
}

/// Asks the server about its recovery; nothing where it does not let Walden in, or does not answer in time.
pub(super) async fn ask(endpoint: &Endpoint) -> Option<Told> {
    match tokio::time::timeout(ASK_WAIT, ask_session(endpoint)).await {
        Ok(Ok(told)) => told,
        Ok(Err(error)) => {
            tracing::debug!("the server does not tell how far its recovery is: {error}");
            None
        }
        Err(_) => Some(Told::GoesOn),
    }
}

async fn ask_session(endpoint: &Endpoint) -> Result<Option<Told>, replication::Error> {
    let session = match endpoint.connect().await {
        // It is about to let somebody in, or stops.
        Err(error) if error.kind() == replication::ErrorKind::Retry => return Ok(Some(Told::GoesOn)),
        connected => connected?,
    };
    let pause = match session.version().number() {
        ..=13 => "pg_is_wal_replay_paused()",
        _ => "pg_get_wal_replay_pause_state() = 'paused'",
    };
    let sql = format!(
        "select case when not pg_is_in_recovery() then 'over' when {pause} then 'paused' else 'goes on' end"
    );
    let rows = session.simple(&sql).await?;
    Ok(match rows.first().and_then(|row| row.first()?.as_deref()) {
        Some("over") => Some(Told::Over),
        Some("paused") => Some(Told::Paused),
        Some(_) => Some(Told::GoesOn),
        None => None,
    })
}

/// Tells whether a recovery has ended because the archive could not tell what is there, by the server's last words: a line that
/// names a file of WAL and the 200 of `wal fetch`, in whatever language.
pub(super) fn is_for_want_of_wal(last_words: &str) -> bool {
    let is_wal = |word: &str| word.len() == 24 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    last_words.split("; ").any(|line| {
        let words: Vec<&str> =
            line.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '.').collect();
        words.contains(&"200") && words.iter().any(|word| is_wal(word) || word.ends_with(".history"))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_server_answers_at_its_target_and_not_on_the_way_there() {
        use PostmasterStatus::{Ready, Standby, Starting, Stopping};
        for (status, is_recovering, told, expected) in [
            (None, true, None, RestoredServer::Recovering),
            (Some(Starting), false, None, RestoredServer::Recovering),
            (Some(Standby), true, Some(Told::GoesOn), RestoredServer::Recovering),
            (Some(Stopping), false, None, RestoredServer::Recovering),
            (Some(Ready), false, None, RestoredServer::Running),
            (Some(Ready), true, Some(Told::GoesOn), RestoredServer::Recovering),
            (Some(Ready), false, Some(Told::GoesOn), RestoredServer::Recovering),
            (Some(Ready), false, Some(Told::Over), RestoredServer::Running),
            (Some(Ready), true, Some(Told::Paused), RestoredServer::Paused),
            (Some(Ready), true, Some(Told::Over), RestoredServer::Running),
            (Some(Ready), true, None, RestoredServer::Readable),
        ] {
            assert_eq!(decide(status, is_recovering, told), expected, "{status:?} {is_recovering} {told:?}");
        }
    }

    #[test]
    fn a_server_starts_until_it_lets_somebody_in_or_is_stopped() {
        use PostmasterStatus::{Ready, Standby, Starting, Stopping};
        assert!([None, Some(Starting), Some(Standby)].into_iter().all(is_starting));
        // Who runs is told of a store that is away; who is to stop does not wait for it.
        assert!(![Some(Ready), Some(Stopping)].into_iter().any(is_starting));
    }

    #[test]
    fn a_cut_over_that_has_not_begun_is_told_unless_it_is_about_to() {
        let told = |server, is_plain| before_cut_over(server, is_plain).unwrap_or_default();
        assert_eq!(told(RestoredServer::Running, true), "");
        assert!(told(RestoredServer::Running, false).contains("not everything is local"));
        assert_eq!(told(RestoredServer::Paused, true), "waits: the server is paused");
        assert!(told(RestoredServer::Stopped, true).starts_with("not done: "));
    }

    #[test]
    fn a_server_is_reached_by_what_its_file_says() {
        let owner = Owner { uid: 113, gid: 120 };
        let file = PostmasterPid::parse("17\n/data\n1763700000\n5433\n/run/pg\n\n  1 2\nready\n").unwrap();
        let endpoint = endpoint(&file, "admin", owner).unwrap();
        assert_eq!((endpoint.port, &*endpoint.superuser, endpoint.user), (5433, "admin", Some(owner)));
        assert_eq!(endpoint.socket_directory, Path::new("/run/pg"));
        let none = PostmasterPid::parse("17\n/data\n1763700000\n5433\n\nlocalhost\n").unwrap();
        assert!(super::endpoint(&none, "admin", owner).is_none());
    }

    #[test]
    fn an_archive_that_could_not_tell_is_known_by_its_status() {
        let of = |words: &str| {
            is_for_want_of_wal(&format!("LOG:  starting; 2026-11-22 08:03:53 UTC [17] FATAL:  {words}"))
        };
        let file = "could not restore file \"000000010000000000000002\" from archive";
        assert!(of(&format!("{file}: child process exited with exit code 200")));
        assert!(of(
            "konnte Datei »00000002.history« nicht wiederherstellen: Kindprozess hat mit Code 200 beendet"
        ));
        assert!(!of(&format!("{file}: child process exited with exit code 127")));
        assert!(!of("archiver process 200 was terminated"));
    }

    #[test]
    fn files_that_are_not_there_say_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        assert!(read_pid_file(scratch.path()).is_none() && !is_recovering(scratch.path()));
        fs::write(scratch.path().join("postmaster.pid"), "4711\n").unwrap();
        fs::write(scratch.path().join(RECOVERY_SIGNAL), "").unwrap();
        let there = scratch.path().join("postmaster.pid");
        assert_eq!(read_pid_file(scratch.path()).unwrap().pid, 4711);
        assert!(is_recovering(scratch.path()));
        fs::remove_file(&there).unwrap();
        nix::unistd::mkfifo(&there, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(read_pid_file(scratch.path()).is_none(), "nobody waits for who writes into a pipe");
        fs::remove_file(&there).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &there).unwrap();
        assert!(read_pid_file(scratch.path()).is_none(), "and nobody reads for ever");
    }
}
