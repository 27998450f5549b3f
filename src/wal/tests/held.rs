//! Fetches from an archive that is held open and read ahead, as a prefetcher's are.

use super::{
    Arc, Archive, Error, ErrorKind, Fault, Fetched, MIB, ObjectKey, Repository, Rule, STANDBY_SIGNAL, Server,
    SystemClock, fs, name, repo, segment,
};

impl Server {
    /// Describes the archive as a prefetcher holds it, with room for eight segments to come.
    pub(super) fn held(&self) -> Archive<impl AsyncFn() -> Result<Repository, repo::Error>> {
        Archive::reading_ahead(async || self.open().await, Arc::new(SystemClock), 9 * MIB)
    }

    /// Fetches a segment and checks what came.
    async fn restore_from<O>(&self, archive: &Archive<O>, timeline: u32, number: u64)
    where
        O: AsyncFn() -> Result<Repository, repo::Error>,
    {
        let name = name(timeline, number);
        assert_eq!(self.fetch_from(archive, &name).await.unwrap(), Fetched::Restored, "{name}");
        assert_eq!(fs::read(self.path("pg_wal/RECOVERYXLOG")).unwrap(), segment(timeline, number), "{name}");
    }

    fn tamper(&self, object: &str, damage: impl FnOnce(Option<bytes::Bytes>) -> Option<bytes::Bytes>) {
        self.store.inner().tamper(&ObjectKey::parse(&format!("main/{object}")).unwrap(), damage);
    }

    fn object(timeline: u32, number: u64) -> String {
        format!("clusters/{}/wal/{timeline:08X}/00000000/{}", Self::cluster(), name(timeline, number))
    }
}

/// Lets what is read ahead come to its end: nothing here waits for anything but its turn.
pub(super) async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

/// Failure 2: prefetch raced with recovery at a timeline switch and ended it early.
#[tokio::test]
async fn what_is_read_ahead_crosses_timelines_and_is_given_out_in_any_order() {
    let server = Server::new();
    server.push_segments(1, 2..=6).await;
    server.push("00000002.history", b"1\t0/500100\tx\n").await.unwrap();
    server.push_segments(2, 5..=8).await;
    let archive = server.held();
    server.restore_from(&archive, 1, 2).await;
    settle().await;
    server.store.inject(Rule::always(Fault::Before(ErrorKind::Unreachable)));
    for (timeline, number) in [(1, 4), (1, 3), (2, 5), (2, 8), (2, 6), (2, 7), (2, 6), (1, 4)] {
        server.restore_from(&archive, timeline, number).await;
    }
    // What was not read ahead is neither there nor absent, but for what lies behind the plan.
    assert!(server.fetch_from(&archive, &name(1, 5)).await.is_err());
    assert!(server.fetch_from(&archive, "00000002.history").await.is_err());
    assert_eq!(server.fetch_from(&archive, &name(2, 9)).await.unwrap(), Fetched::Absent);
    server.store.heal();
    for (timeline, number) in [(2, 8), (1, 2), (1, 5), (2, 5), (1, 6)] {
        server.restore_from(&archive, timeline, number).await;
        settle().await;
    }
}

#[tokio::test]
async fn damage_that_was_met_while_reading_ahead_is_neither_served_nor_absent() {
    let server = Server::new();
    server.push_segments(1, 2..=6).await;
    server.tamper(&Server::object(1, 4), |bytes| bytes.map(|bytes| bytes.slice(..bytes.len() - 1)));
    server.tamper(&Server::object(1, 5), |_| None);
    let archive = server.held();
    server.restore_from(&archive, 1, 2).await;
    settle().await;
    server.restore_from(&archive, 1, 3).await;
    let error = server.fetch_from(&archive, &name(1, 4)).await.unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
    let error = server.fetch_from(&archive, &name(1, 5)).await.unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    // Repaired, it is there, and so is what had been read before.
    server.push_segments(1, [5]).await;
    server.restore_from(&archive, 1, 5).await;
    server.restore_from(&archive, 1, 6).await;
}

#[tokio::test]
async fn a_standby_is_given_what_has_come_since_and_nothing_is_read_past_it() {
    let server = Server::new();
    fs::write(server.path(STANDBY_SIGNAL), "").unwrap();
    server.push_segments(1, [2, 3, 5]).await;
    let archive = server.held();
    server.restore_from(&archive, 1, 2).await;
    settle().await;
    server.store.inject(Rule::always(Fault::Before(ErrorKind::Unreachable)));
    server.restore_from(&archive, 1, 3).await;
    assert!(server.fetch_from(&archive, &name(1, 5)).await.is_err(), "4 is not there, and 5 lies behind it");
    server.store.heal();
    assert_eq!(server.fetch_from(&archive, &name(1, 4)).await.unwrap(), Fetched::Absent);
    server.push_segments(1, [4]).await;
    server.restore_from(&archive, 1, 4).await;
    server.restore_from(&archive, 1, 5).await;
    assert_eq!(server.fetch_from(&archive, &name(1, 6)).await.unwrap(), Fetched::Absent);
}

/// Failure 1: in a site that is gone everything is absent, and nothing proven; who opened it before knows no better.
#[tokio::test]
async fn an_archive_that_is_held_open_says_absent_only_while_its_site_is_there() {
    for standby in [false, true] {
        let server = Server::new();
        server.push_segments(1, 2..=3).await;
        if standby {
            fs::write(server.path(STANDBY_SIGNAL), "").unwrap();
        }
        let archive = server.held();
        server.restore_from(&archive, 1, 2).await;
        assert_eq!(server.fetch_from(&archive, "00000009.history").await.unwrap(), Fetched::Absent);
        let mut site = None;
        server.tamper("site.json", |bytes| {
            site = bytes;
            None
        });
        assert!(server.fetch_from(&archive, "00000009.history").await.is_err());
        let other = br#"{"format":1,"site":"00000000-0000-0000-0000-000000000001","required":[]}"#;
        server.tamper("site.json", |_| Some(bytes::Bytes::from_static(other)));
        assert!(server.fetch_from(&archive, &name(1, 3)).await.is_err(), "another site's is not this one's");
        server.tamper("site.json", |_| site);
        assert_eq!(server.fetch_from(&archive, "00000009.history").await.unwrap(), Fetched::Absent);
    }
}
