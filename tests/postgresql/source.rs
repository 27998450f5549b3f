//! The server's side of a basebackup against real servers: facts, start, stop, and what happens when one end dies.

use std::time::Duration;

use walden::backup::{
    ArchiverStatus, BackupSession, Checkpoint, DirectoryIdentity, ServerFacts, SourceError, StartOptions,
    check_directory, switch_wal,
};
use walden::pg::{ControlFile, PostmasterPid};
use walden::replication::{ConnectOptions, Error, Session};

use crate::session::runtime;
use crate::support::{Cluster, DebianCluster, Need, Options, Stop, require, wait_for};

fn options(cluster: &Cluster) -> ConnectOptions {
    ConnectOptions::new(cluster.connection())
}

fn start_options() -> StartOptions {
    StartOptions { checkpoint: Checkpoint::Fast, label: "it's nightly".into() }
}

fn directory_identity(cluster: &Cluster) -> DirectoryIdentity {
    let data_directory = cluster.data_directory().to_owned();
    let control = std::fs::read(data_directory.join("global/pg_control")).unwrap();
    let control = ControlFile::parse(&control).unwrap();
    let pid = std::fs::read_to_string(data_directory.join("postmaster.pid")).ok();
    DirectoryIdentity {
        system_identifier: control.system_identifier,
        in_recovery: false,
        postmaster: pid.map(|text| PostmasterPid::parse(&text).unwrap()),
        data_directory,
    }
}

#[test]
fn a_basebackup_of_13_starts_and_stops() {
    starts_and_stops(13);
}

#[test]
fn a_basebackup_of_15_starts_and_stops() {
    starts_and_stops(15);
}

#[test]
fn a_basebackup_of_18_starts_and_stops() {
    starts_and_stops(18);
}

fn starts_and_stops(major: u32) {
    require!(Need::PostgreSQL(major));
    let cluster = Cluster::start_with(major, Options::default().initdb("--wal-segsize=1"));
    let place = cluster.scratch().folder("space");
    cluster.sql(&format!("create tablespace \"a space\" location '{}'", place.display()));
    runtime().block_on(async {
        let running = BackupSession::start(&options(&cluster), start_options()).await.unwrap();
        running.check_directory(&directory_identity(&cluster)).unwrap();
        let started = running.started().clone();
        let expected = cluster.sql(&format!("select pg_walfile_name('{}')", started.lsn));
        assert_eq!(started.segment.to_string(), expected);
        cluster.sql("create table t as select generate_series(1, 1000)");
        let stopped = running.stop().await.unwrap();
        assert!(stopped.lsn > started.lsn && stopped.at >= started.at);
        let label = &stopped.backup_label;
        assert!(
            label.starts_with(&format!("START WAL LOCATION: {} (file {})", started.lsn, started.segment))
        );
        assert!(label.contains("LABEL: it's nightly\n"), "{label}");
        assert!(stopped.tablespace_map.contains(place.to_str().unwrap()), "{}", stopped.tablespace_map);
        // The server switches to a new segment when a backup stops, so the name at the end is that of the segment
        // before `lsn` even where `lsn` is the boundary.
        let name = cluster.sql(&format!("select pg_walfile_name('{}'::pg_lsn)", stopped.lsn));
        assert_eq!(stopped.segment.to_string(), name);
    });
}

#[test]
fn the_facts_of_13_are_known() {
    facts_are_known(13);
}

#[test]
fn the_facts_of_15_are_known() {
    facts_are_known(15);
}

#[test]
fn the_facts_of_18_are_known() {
    facts_are_known(18);
}

fn facts_are_known(major: u32) {
    require!(Need::PostgreSQL(major));
    let cluster = Cluster::start_with(major, Options::default().initdb("--wal-segsize=4"));
    let place = cluster.scratch().folder("space");
    cluster.sql(&format!("create tablespace \"a space\" location '{}'", place.display()));
    cluster.sql("create database \"an odd | name\"");
    if major >= 15 {
        cluster.sql("set allow_in_place_tablespaces = on; create tablespace inside location ''");
    }
    let ask = async |options: &ConnectOptions| {
        ServerFacts::gather(&Session::connect(options).await.unwrap()).await.unwrap()
    };
    runtime().block_on(async {
        let facts = ask(&options(&cluster)).await;
        assert_eq!(facts.version.number(), major);
        assert_eq!(facts.data_directory(), cluster.data_directory());
        assert_eq!(facts.wal_segment_size.bytes(), 4 << 20);
        assert_eq!(facts.bootstrap_role, "postgres");
        assert!(facts.data_checksums && facts.archives());
        assert_eq!(facts.catalog_version, facts.version.catalog_version());
        let control = std::fs::read(cluster.data_directory().join("global/pg_control")).unwrap();
        assert_eq!(facts.identity.system_identifier, ControlFile::parse(&control).unwrap().system_identifier);
        let spaces: Vec<_> = facts.tablespaces.iter().map(|t| (&*t.name, t.in_place)).collect();
        let expected: &[_] =
            if major >= 15 { &[("a space", false), ("inside", true)] } else { &[("a space", false)] };
        assert_eq!(spaces, expected);
        assert_eq!(facts.tablespaces[0].location, place);
        let database = facts.databases.iter().find(|d| d.name == "an odd | name").unwrap();
        assert!(database.size_bytes.unwrap() > 1 << 20);
        // The scratch cluster knows no libc locale but C, which has no version; Debian's knows ICU.
        assert!(facts.icu_version.is_some() || major != 15);
        assert!(facts.configuration_files.contains(&cluster.data_directory().join("postgresql.conf")));
        assert!(facts.unreadable.is_empty(), "{:?}", facts.unreadable);
        // An ordinary monitoring role sees enough, and says what it does not see.
        cluster.sql("create role watcher login in role pg_monitor");
        let watcher = options(&cluster).with("user", "watcher").unwrap();
        let seen = ask(&watcher).await;
        assert_eq!(seen.identity.data_directory, facts.identity.data_directory);
        assert_eq!(seen.unreadable.len(), 1, "{:?}", seen.unreadable);
        let refused = BackupSession::start(&watcher, start_options()).await.unwrap_err();
        assert!(matches!(&refused, SourceError::NotPermitted { role, .. } if role == "watcher"), "{refused}");
        let long = StartOptions { label: "x".repeat(2000), ..start_options() };
        let refused = BackupSession::start(&options(&cluster), long).await.unwrap_err();
        assert!(matches!(refused, SourceError::Label { bytes: 2000, .. }));
    });
}

#[test]
fn configuration_outside_the_data_directory_is_found() {
    require!(Need::DebianCluster, Need::PostgreSQL(15));
    let cluster = DebianCluster::start(&[]);
    let etc = cluster.configuration_directory();
    std::fs::create_dir_all(etc.join("conf.d")).unwrap();
    std::fs::write(etc.join("conf.d/own.conf"), "work_mem = '6MB'\n").unwrap();
    cluster.control("restart");
    runtime().block_on(async {
        // As root against Debian's own pg_hba.conf, which wants the peer to be postgres.
        let session = Session::connect(&ConnectOptions::new(cluster.connection())).await.unwrap();
        let facts = ServerFacts::gather(&session).await.unwrap();
        for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf", "conf.d/own.conf"] {
            assert!(
                facts.configuration_files.contains(&etc.join(name)),
                "{name}: {:?}",
                facts.configuration_files
            );
        }
    });
}

#[test]
fn a_client_that_goes_away_ends_its_backup() {
    require!(Need::PostgreSQL(13));
    let cluster = Cluster::start(13);
    runtime().block_on(async {
        let running = BackupSession::start(&options(&cluster), start_options()).await.unwrap();
        let pid = running.session().backend_pid();
        drop(running);
        wait_for("the backend to be gone", || {
            let left = cluster.sql(&format!("select count(*) from pg_stat_activity where pid = {pid}"));
            (left == "0").then_some(())
        });
    });
    assert!(cluster.log().contains("aborting backup due to backend exiting"), "{}", cluster.log());
}

#[test]
fn a_server_that_goes_away_fails_the_backup() {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start(15);
    runtime().block_on(async {
        let options = options(&cluster);
        let running = BackupSession::start(&options, start_options()).await.unwrap();
        cluster.stop(Stop::Immediate);
        let lost = running.lost().await;
        assert!(matches!(lost, SourceError::Session(Error::Lost { .. })), "{lost}");
        cluster.start();
        let failed = running.stop().await.unwrap_err();
        assert!(matches!(failed, SourceError::Session(Error::Lost { .. })), "{failed}");
    });
}

#[test]
fn failure_21a_the_directory_of_another_server_is_refused() {
    require!(Need::PostgreSQL(15));
    let (cluster, other) = (Cluster::start(15), Cluster::start(15));
    runtime().block_on(async {
        let session = Session::connect(&options(&cluster)).await.unwrap();
        let identity = ServerFacts::gather(&session).await.unwrap().identity;
        check_directory(&identity, &directory_identity(&cluster)).unwrap();
        let mut foreign = directory_identity(&other);
        let error = check_directory(&identity, &foreign).unwrap_err();
        assert!(error.to_string().contains("system identifier"), "{error}");
        // A standby has the primary's identifier.
        foreign.system_identifier = identity.system_identifier;
        foreign.in_recovery = true;
        let error = check_directory(&identity, &foreign).unwrap_err();
        assert!(error.to_string().contains("server role is a standby, expected a primary"), "{error}");
    });
}

#[test]
fn an_idle_server_is_made_to_finish_its_segment() {
    require!(Need::PostgreSQL(18));
    let cluster = Cluster::start(18);
    let archive = cluster.scratch().folder("archive");
    cluster.set_archive_command(&format!("cp %p {}/%f", archive.display()));
    runtime().block_on(async {
        let session = Session::connect(&options(&cluster)).await.unwrap();
        let first = switch_wal(&session).await.unwrap();
        let second = switch_wal(&session).await.unwrap();
        let ended = [first, second].map(|lsn| cluster.sql(&format!("select pg_walfile_name('{lsn}')")));
        assert!(ended[0] < ended[1], "{ended:?}");
        let segment = cluster.sql(&format!("select pg_walfile_name('{second}')"));
        cluster.wait_until_archived(&segment);
        let status = wait_for("the archiver to report", || {
            std::thread::sleep(Duration::from_millis(20));
            let status = runtime_free(ArchiverStatus::ask(&session)).unwrap();
            (status.last_archived_wal.as_deref() == Some(&segment)).then_some(status)
        });
        assert!(status.archived_count >= 2 && status.last_archived_at.is_some());
    });
}

/// Waits for a future inside a closure that cannot be async.
fn runtime_free<T>(future: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(future))
}
