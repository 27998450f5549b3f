//! The beginning of the last segment: rows that are archived in pieces, or in a `.partial`, are there after recovery.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use walden::clock::SystemClock;
use walden::codec::Compression;
use walden::pg::{Lsn, TimelineId, WalSegmentName};
use walden::repo::wal_object::{ArchiveHead, WalKey, archive_head, archive_piece};
use walden::repo::{ClusterId, Repository};
use walden::storage::LocalStore;

use crate::site::{Source, listing};
use crate::support::repository::{keyring_in, site_options};
use crate::support::{Need, Options, Run, Server, Stop, require, wait_for};

const CLOCK: &str = "select pg_sleep(0.01); select clock_timestamp(); select pg_sleep(0.01)";

/// A source whose last segment is archived piece by piece, as a receiver does it.
struct Pieces {
    source: Source,
    segment: WalSegmentName,
    /// How far the pieces reach.
    end: Lsn,
}

impl Pieces {
    /// Takes a basebackup, and puts row 1 into a segment that is archived whole.
    fn make() -> Self {
        let source = Source::start(Options::default().initdb("--wal-segsize=1"));
        source.sql("create table rows (n int)");
        source.backup_at_rest();
        source.sql("insert into rows values (1)");
        let segment: WalSegmentName = source.archive_wal().parse().unwrap();
        let segment = segment.next(Self::cluster_of(&source).segment_size).unwrap();
        let end = segment.start_lsn(Self::cluster_of(&source).segment_size).unwrap();
        Self { source, segment, end }
    }

    fn cluster_of(source: &Source) -> ClusterId {
        let name = listing(&source.walden.repository())
            .into_keys()
            .find(|path| path.parent().is_some_and(|parent| parent.ends_with("clusters")));
        name.unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap()
    }

    /// Commits a row; returns its transaction and a time after it.
    fn row(&self, n: u32) -> (String, String) {
        let insert = format!("begin; insert into rows values ({n}); select pg_current_xact_id(); commit");
        (self.source.sql(&insert), self.source.sql(CLOCK).trim().to_owned())
    }

    /// The folder that the site's folder is in.
    fn store(&self) -> PathBuf {
        let files = listing(&self.source.walden.repository());
        let record = files.into_keys().find(|path| path.ends_with("main/site.json")).unwrap();
        record.parent().unwrap().parent().unwrap().to_owned()
    }

    /// Opens the repository with the keys of the configuration.
    async fn repository(&self) -> Repository {
        let keyring = keyring_in(self.source.walden.configuration_file().parent().unwrap());
        let store = LocalStore::open(&self.store(), &SystemClock).unwrap();
        Repository::open(site_options(store, keyring, SystemClock)).await.unwrap()
    }

    /// Runs something on the repository as root and gives what it made to the repository's owner.
    fn write<T>(&self, action: impl AsyncFnOnce(Repository) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let written = runtime.block_on(async { action(self.repository().await).await });
        let site = self.store().join("main");
        let owner = format!("--reference={}", site.join("site.json").display());
        Run::of(Command::new("chown").args(["-R", &owner]).arg(&site), "").expect_success();
        written
    }

    /// Archives what the server has flushed since the last piece.
    fn archive(&mut self) -> Lsn {
        let cluster = Self::cluster_of(&self.source);
        let begin = self.segment.start_lsn(cluster.segment_size).unwrap();
        let flushed: Lsn = self.source.sql("select pg_current_wal_flush_lsn()").parse().unwrap();
        assert_eq!(
            WalSegmentName::containing(TimelineId::FIRST, flushed, cluster.segment_size),
            self.segment
        );
        let path = self.source.cluster.data_directory().join("pg_wal").join(self.segment.to_string());
        let mut bytes = vec![0; (flushed - self.end) as usize];
        fs::File::open(path).unwrap().read_exact_at(&mut bytes, self.end - begin).unwrap();
        let range = (self.end - begin) as u32..(flushed - begin) as u32;
        self.write(async |repository| {
            let key = WalKey::create(repository.keyring()).unwrap();
            let zstd = Compression::zstd(1);
            archive_piece(&repository, cluster, self.segment, range, &bytes, &key, zstd).await.unwrap();
        });
        self.end = flushed;
        flushed
    }

    #[track_caller]
    fn window(&self) -> Value {
        self.source.walden.json(&["info"])["clusters"][0]["timelines"][0]["windows"][0].clone()
    }

    #[track_caller]
    fn check(&self, name: &str, options: &[&str], expected: &str) {
        let clone = self.source.clone(name, options);
        assert_eq!(clone.sql(ROWS), expected, "{options:?}");
        clone.sql("insert into rows values (9)");
        clone.run("delete");
    }

    #[track_caller]
    fn refused(&self, options: &[&str]) -> String {
        let walden = self.source.walden.as_root();
        walden.try_run(&[&["clone", "create", "vain"], options].concat()).expect_code(1).stderr
    }
}

const ROWS: &str = "select string_agg(n::text, '' order by n) from rows";

#[test]
fn rows_in_the_pieces_of_the_last_segment_are_recovered_by_clone_and_restore() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut pieces = Pieces::make();
    let (second, _) = pieces.row(2);
    let first_end = pieces.archive();
    let (_, time) = pieces.row(3);
    pieces.row(4);
    let end = pieces.archive();
    pieces.row(5);
    let window = pieces.window();
    assert_eq!(window["end_lsn"], end.to_string(), "{window}");
    assert_eq!(window["pieces_end_lsn"], end.to_string());
    assert_eq!((&window["hole"], &window["partial"]), (&Value::Null, &Value::Null));
    let text = pieces.source.walden.run(&["info"]).stdout;
    assert!(text.contains(&format!("there are pieces, up to {end}")), "{text}");

    pieces.check("latest", &[], "1234");
    pieces.check("xid", &["--target-xid", &second], "12");
    pieces.check("lsn", &["--target-lsn", &first_end.to_string()], "12");
    pieces.check("time", &["--target-time", &time], "123");
    let refused = pieces.refused(&["--target-lsn", &end.to_string()]);
    assert!(refused.contains("the archive ends before"), "{refused}");

    let place = pieces.source.scratch().path().join("restored");
    pieces.source.walden.run(&["restore", "--target-dir", place.to_str().unwrap()]);
    let mut server = Server::new(15, &place, &pieces.source.scratch().folder("run"));
    server.set("archive_mode", "off");
    server.start();
    wait_for("recovery to end", || {
        server.try_sql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f").then_some(())
    });
    assert_eq!(server.sql(ROWS), "1234");
    drop(server);

    // The tail is cut off: nothing tells that there was more, but for a head.
    let layout = listing(&pieces.store());
    let is_last = |path: &PathBuf| {
        let leaf = path.file_name().unwrap().to_string_lossy();
        leaf.ends_with(".piece") && !leaf.contains(".00000000-")
    };
    let last = layout.into_keys().find(is_last).unwrap();
    let aside = pieces.source.scratch().path().join("piece");
    fs::rename(&last, &aside).unwrap();
    pieces.check("shorter", &[], "12");
    fs::rename(&aside, &last).unwrap();
    let cluster = Pieces::cluster_of(&pieces.source);
    pieces.write(async |repository| {
        let written_at = repository.clock().now();
        let head = ArchiveHead { timeline: TimelineId::FIRST, end, written_at };
        archive_head(&repository, cluster, &head).await.unwrap();
    });
    assert_eq!(pieces.window()["hole"], Value::Null);
    fs::remove_file(&last).unwrap();
    let window = pieces.window();
    assert_eq!(window["hole"]["missing"][0]["last"], pieces.segment.to_string(), "{window}");
    assert_eq!(window["end_lsn"], first_end.to_string());
    let refused = pieces.refused(&[]);
    assert!(refused.contains(&format!("WAL segment {} is missing", pieces.segment)), "{refused}");
    pieces.check("until", &["--until-hole"], "12");
}

/// A server that ends its recovery leaves the segment it was in as `.partial`: what is shown of it is served.
#[test]
fn rows_in_a_partial_are_recovered_while_the_new_timeline_has_none_of_its_own() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut pieces = Pieces::make();
    pieces.row(2);
    pieces.archive();
    pieces.row(3);
    pieces.source.cluster.stop(Stop::Immediate);
    pieces.source.scratch().file("data/recovery.signal", "");
    pieces.source.cluster.set("restore_command", "false");
    pieces.source.cluster.start();
    pieces.source.wait_until_archived("00000002.history");
    let partial = format!("{}.partial.", pieces.segment);
    wait_for("the partial segment to be archived", || {
        let leaf = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(&partial);
        listing(&pieces.store()).keys().any(leaf).then_some(())
    });
    let window = pieces.window();
    assert_eq!(window["partial"], pieces.segment.to_string(), "{window}");
    assert_eq!(window["pieces_end_lsn"], pieces.end.to_string(), "{window}");
    pieces.check("old", &["--target-timeline", "1"], "123");
    // The way to timeline 2 leaves timeline 1 in the segment, and what is before that is there.
    pieces.check("new", &[], "123");
    pieces.row(4);
    pieces.source.archive_wal();
    pieces.check("newer", &[], "1234");
    pieces.check("older", &["--target-timeline", "1"], "123");
}
