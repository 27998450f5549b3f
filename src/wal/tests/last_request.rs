//! The history that a server asks for when it has removed its signal file, over a store that says nothing.

use std::fs;
use std::time::Duration;

use super::{ErrorKind, Fault, Fetched, PLAN_FILE_NAME, Repository, Rule, STANDBY_SIGNAL, Server, crc32c};

const HISTORY: &str = "1\t0/300100\tno recovery target specified\n";

impl Server {
    /// Makes the control file one of a server in archive recovery.
    fn begin_recovery(&self) {
        let path = self.path("global/pg_control");
        let mut bytes = fs::read(&path).unwrap();
        bytes[16] = 5;
        let crc = crc32c(&bytes[..288]);
        bytes[288..292].copy_from_slice(&crc.to_le_bytes());
        fs::write(path, bytes).unwrap();
    }

    fn silence(&self) {
        self.store.inject(Rule::always(Fault::Before(ErrorKind::Unreachable)));
    }
}

#[tokio::test]
async fn failure_12b_the_last_request_of_a_recovery_is_answered_by_the_server_s_own_or_by_nobody() {
    let server = Server::new();
    let (..) = Repository::open_or_create(server.options()).await.unwrap();
    server.silence();
    server.fetch("00000001.history").await.unwrap_err();
    server.begin_recovery();
    let faults = server.store.faults();
    assert_eq!(server.fetch("00000001.history").await.unwrap(), Fetched::Absent);
    assert_eq!(server.store.faults(), faults, "nobody needs to be asked");
    server.write_wal("00000002.history", HISTORY.as_bytes());
    assert_eq!(server.fetch("00000002.history").await.unwrap(), Fetched::Absent);
    // One that says so itself is not at its end, and asks again.
    fs::write(server.path(STANDBY_SIGNAL), "").unwrap();
    server.fetch("00000002.history").await.unwrap_err();
    assert!(!server.path(PLAN_FILE_NAME).exists());
}

#[tokio::test]
async fn a_history_that_the_server_lacks_is_waited_for_at_the_end_of_its_recovery() {
    let server = Server::new();
    server.push_segments(1, 2..=3).await;
    server.push("00000002.history", HISTORY.as_bytes()).await.unwrap();
    server.begin_recovery();
    // What it has is none.
    for own in ["", "garbage"] {
        fs::write(server.path("pg_wal/00000002.history"), own).unwrap();
        server.silence();
        let faults = server.store.faults();
        let store_is_back = async {
            while server.store.faults() < faults + 5 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            server.store.heal();
        };
        let (fetched, ()) = tokio::join!(server.fetch("00000002.history"), store_is_back);
        assert_eq!(fetched.unwrap(), Fetched::Restored);
        assert_eq!(fs::read(server.path("pg_wal/RECOVERYXLOG")).unwrap(), HISTORY.as_bytes());
    }
    assert!(!server.path(PLAN_FILE_NAME).exists());
}
