//! WAL summaries of real servers: no page that changed is left out, and what did not change need not be read.

use std::collections::BTreeMap;
use std::time::Duration;

use walden::backup::changed_blocks::{ChangedBlocks, Hint};
use walden::backup::wal_summaries::{NoSummaries, Summaries, WalSpan, read_summaries};
use walden::clock::SystemClock;
use walden::pg::{DataPath, Fork, Lsn, MajorVersion, RelationFile, TimelineId};
use walden::replication::{ConnectOptions, Session};

use crate::session::runtime;
use crate::support::{Cluster, Need, Options, require};

const PAGE: usize = 8192;
const SEGMENT_PAGES: u32 = 131_072;

/// What the relation files of a cluster hold, by their path.
type Files = BTreeMap<String, Vec<u8>>;

#[test]
fn summaries_of_17_name_every_page_that_changed() {
    summaries_name_every_page_that_changed(17);
}

#[test]
fn summaries_of_18_name_every_page_that_changed() {
    summaries_name_every_page_that_changed(18);
}

fn cluster(major: u32) -> Cluster {
    // Nothing is to change but what the test changes.
    let options = Options::default().setting("summarize_wal", "on").setting("autovacuum", "off");
    Cluster::start_with(major, options)
}

fn checkpoint(cluster: &Cluster) -> Lsn {
    cluster.sql("checkpoint");
    cluster.sql("select redo_lsn from pg_control_checkpoint()").parse().unwrap()
}

fn relation_files(cluster: &Cluster) -> Files {
    let data = cluster.data_directory();
    let mut files = Files::new();
    let mut folders = vec!["global".to_owned()];
    for entry in std::fs::read_dir(data.join("base")).unwrap() {
        folders.push(format!("base/{}", entry.unwrap().file_name().to_str().unwrap()));
    }
    for folder in folders {
        for entry in std::fs::read_dir(data.join(&folder)).unwrap() {
            let path = format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap());
            if classify(&path).is_some() {
                files.insert(path.clone(), std::fs::read(data.join(&path)).unwrap());
            }
        }
    }
    files
}

fn classify(path: &str) -> Option<RelationFile> {
    RelationFile::classify(&DataPath::new(path).unwrap())
}

fn read(cluster: &Cluster, spans: &[WalSpan], patience: Duration) -> Summaries {
    runtime().block_on(async {
        let session = Session::connect(&ConnectOptions::new(cluster.connection())).await.unwrap();
        let summaries = read_summaries(&session, spans, &SystemClock, patience).await.unwrap();
        // No transaction is left open.
        let state = session.simple("SAVEPOINT none").await.unwrap_err();
        assert!(state.to_string().contains("transaction block"), "{state}");
        summaries
    })
}

fn hint(changed: &ChangedBlocks, path: &str, before: &Files, now: &Files) -> Hint {
    let pages = |files: &Files| files.get(path).map_or(0, |bytes| bytes.len() / PAGE) as u32;
    changed.hint(&classify(path).unwrap(), SEGMENT_PAGES, pages(before), pages(now))
}

fn summaries_name_every_page_that_changed(major: u32) {
    require!(Need::PostgreSQL(major));
    let cluster = cluster(major);
    cluster.sql("create table few (n int primary key, t text) with (fillfactor = 50)");
    cluster.sql("insert into few select n, repeat('x', 100) from generate_series(1, 20000) n");
    for table in ["still", "gone", "shrinks", "grows"] {
        cluster.sql(&format!("create table {table} as select generate_series(1, 50000) n"));
    }
    cluster.sql("create database template");
    cluster.sql("vacuum (freeze)");
    let from = checkpoint(&cluster);
    let before = relation_files(&cluster);
    let path = |table: &str| cluster.sql(&format!("select pg_relation_filepath('{table}')"));
    let (few, still, shrinks, grows) = (path("few"), path("still"), path("shrinks"), path("grows"));
    cluster.sql("update few set t = 'y' where n in (5, 9000)");
    cluster.sql("drop table gone");
    cluster.sql("delete from shrinks where n > 25000");
    cluster.sql("vacuum shrinks");
    cluster.sql("insert into shrinks select generate_series(1, 5000)");
    cluster.sql("insert into grows select generate_series(1, 50000)");
    cluster.sql("create table made as select generate_series(1, 5000) n");
    cluster.sql("create database copied template template strategy file_copy");
    cluster.sql("create database logged template template strategy wal_log");
    let to = checkpoint(&cluster);
    let now = relation_files(&cluster);

    let spans = [WalSpan { timeline: TimelineId::FIRST, from, to }];
    let Summaries::Known(changed) = read(&cluster, &spans, Duration::from_secs(60)) else {
        panic!("the summaries cover {spans:?}")
    };
    for (path, bytes) in &now {
        let old = before.get(path).map_or(&[][..], |bytes| bytes);
        let hint = hint(&changed, path, &before, &now);
        for (page, bytes) in bytes.chunks(PAGE).enumerate() {
            let same = old.get(page * PAGE..(page + 1) * PAGE) == Some(bytes);
            let named = match &hint {
                Hint::Unchanged => false,
                Hint::ReadAll => true,
                Hint::Blocks(ranges) => ranges.iter().any(|range| range.contains(&(page as u32))),
            };
            assert!(same || named, "page {page} of {path} has changed, and the summaries say {hint:?}");
        }
    }
    let said = |path: &str| hint(&changed, path, &before, &now);
    assert_eq!(said(&still), Hint::Unchanged);
    let Hint::Blocks(ranges) = said(&few) else {
        panic!("few pages of {few} have changed: {:?}", said(&few))
    };
    assert!(ranges.iter().map(|range| range.len()).sum::<usize>() <= 4, "{ranges:?}");
    assert!(matches!(said(&shrinks), Hint::Blocks(_)), "{:?}", said(&shrinks));
    assert!(matches!(said(&grows), Hint::Blocks(_)), "{:?}", said(&grows));
    let copied = cluster.sql("select oid from pg_database where datname = 'copied'");
    for path in now.keys().filter(|path| path.starts_with(&format!("base/{copied}/"))) {
        assert_eq!(said(path), Hint::ReadAll, "{path}");
    }
    // Why a visibility map is always read: its bits were cleared, which no summary says.
    let map = format!("{few}_vm");
    assert_eq!(classify(&map).unwrap().fork, Fork::VisibilityMap);
    assert_ne!(before[&map], now[&map], "the update has cleared bits of {map}");
    assert_eq!(said(&map), Hint::ReadAll);
}

#[test]
fn without_summaries_of_all_the_wal_there_is_no_hint() {
    require!(Need::PostgreSQL(18));
    let cluster = cluster(18);
    let from = checkpoint(&cluster);
    cluster.sql("create table t as select generate_series(1, 1000) n");
    let to = checkpoint(&cluster);
    let span = |from, to| [WalSpan { timeline: TimelineId::FIRST, from, to }];
    let patience = Duration::from_secs(60);
    assert!(matches!(read(&cluster, &span(from, to), patience), Summaries::Known(_)));
    // WAL that is not written yet.
    let beyond = Lsn(to.0 + (1 << 30));
    let behind = read(&cluster, &span(from, beyond), Duration::from_millis(50));
    assert!(matches!(behind, Summaries::None(NoSummaries::Behind { .. })), "{behind:?}");
    // Of another timeline there is none.
    let elsewhere = [WalSpan { timeline: TimelineId::new(7).unwrap(), from, to }, span(from, to)[0]];
    let gap = read(&cluster, &elsewhere, patience);
    assert!(matches!(gap, Summaries::None(NoSummaries::Gap { .. })), "{gap:?}");
    let summaries = cluster.data_directory().join("pg_wal/summaries");
    for entry in std::fs::read_dir(&summaries).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // Timeline, start and end, eight digits each half: the one that holds `from` goes.
        if name.len() == 40 + ".summary".len() && !name.starts_with('t') {
            let start = Lsn(u64::from_str_radix(&name[8..24], 16).unwrap());
            let end = Lsn(u64::from_str_radix(&name[24..40], 16).unwrap());
            if start <= from && from < end {
                std::fs::remove_file(&path).unwrap();
            }
        }
    }
    let gone = read(&cluster, &span(from, to), Duration::from_secs(1));
    assert!(
        matches!(gone, Summaries::None(NoSummaries::Gap { .. } | NoSummaries::Behind { .. })),
        "{gone:?}"
    );
    cluster.sql("alter system set summarize_wal = off");
    cluster.sql("select pg_reload_conf()");
    let off = read(&cluster, &span(from, to), patience);
    assert!(matches!(off, Summaries::None(NoSummaries::Off)), "{off:?}");
}

#[test]
fn a_server_without_summaries_gives_no_hint() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let spans = [WalSpan { timeline: TimelineId::FIRST, from: Lsn(1), to: Lsn(2) }];
    let none = read(&cluster, &spans, Duration::ZERO);
    assert!(matches!(none, Summaries::None(NoSummaries::TooOld(MajorVersion::V15))), "{none:?}");
}
