//! The whole path on moto, a server in a process of its own that shares no code with ours.

use std::fs;

use crate::scene::Scene;
use crate::support::{Checksums, Fault, Moto, Need, Proxy, Sql, header, require, s3_storage};

#[test]
fn backup_wal_mount_and_clone_work_on_moto() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Program("moto_server"));
    let moto = Moto::start();
    let scene = Scene::start(&(moto.storage() + "retry = \"30s\"\n"), |site| site);
    scene.cluster.set_archive_command(&scene.walden.archive_command());
    scene.cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 20000) n");
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    scene.cluster.sql("delete from t where n % 3 = 0");
    let segment = scene.cluster.archive_wal();
    let second = scene.walden.json(&["backup", "--checkpoint", "fast"]);

    let listed = scene.walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 2, "{listed:#}");
    assert_eq!(listed["basebackups"][1]["id"], second["id"], "{listed:#}");
    let target = scene.cluster.scratch().path().join("fetched");
    scene.fetch(&segment, &target).expect_success();
    let fetched = fs::read(&target).unwrap();
    assert_eq!(fetched.len(), 1 << 20);

    // What a mount shows comes by other ways: listings, ranges of packs, WAL by its name.
    let root = scene.walden.as_root();
    let mounted = root.mount(&scene.cluster.scratch().folder("mnt"));
    let version = mounted.path().join("basebackups/latest/data/PG_VERSION");
    assert_eq!(fs::read_to_string(version).unwrap(), "15\n");
    assert!(fs::read(mounted.path().join("wal").join(&segment)).unwrap() == fetched, "{segment} differs");
    drop(mounted);

    let status = root.json(&["clone", "create", "moto"]);
    let port = u16::try_from(status["port"].as_u64().unwrap()).unwrap();
    let clone = Sql::at(status["socket_directory"].as_str().unwrap().as_ref(), port);
    Checksums::of(&scene.cluster).assert_same(&Checksums::of(&clone));
    root.run(&["clone", "delete", "moto"]);
}

/// What `info` says of moto comes from its listings, what `check` proves from puts and gets of its own.
#[test]
fn restore_info_and_check_work_on_moto() {
    require!(Need::PostgreSQL(15), Need::Program("moto_server"));
    let moto = Moto::start();
    let scene = Scene::start(&(moto.storage() + "retry = \"30s\"\n"), |site| site);
    scene.cluster.set_archive_command(&scene.walden.archive_command());
    scene.cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 20000) n");
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    scene.cluster.sql("delete from t where n % 3 = 0; create table late as select 1 as n");
    let id = scene.walden.json(&["backup", "--checkpoint", "fast"])["id"].clone();
    scene.cluster.sql("insert into late values (2)");
    scene.cluster.archive_wal();

    let checked = scene.checked();
    for name in ["store", "WAL round trip"] {
        assert!(checked.iter().any(|item| item.contains(name)), "no {name} in {checked:?}");
    }
    let info = scene.info();
    let cluster = &info["clusters"][0];
    assert_eq!(cluster["basebackups"].as_array().unwrap().len(), 2, "{info:#}");
    assert_eq!(cluster["newest_basebackup"]["name"], id, "{info:#}");
    assert_eq!(cluster["timelines"][0]["holes"].as_array().unwrap().len(), 0, "{info:#}");
    assert!(cluster["stored_bytes"].as_u64().unwrap() > 0, "{info:#}");

    // The older one too: its packs are shared, and its recovery reads more WAL.
    for backup in ["latest", "latest~1"] {
        let directory = scene.place(&format!("restored-{backup}"));
        scene.walden.run(&["restore", backup, "--target-dir", &directory]);
        scene.assert_recovers(&directory);
    }
}

/// Failures 40 and 42: no checksum header is sent that a store might not know, and one that ignores the condition of a
/// create is found out before anything is written to it.
#[test]
fn a_store_that_overwrites_is_refused_and_none_is_asked_for_checksums() {
    require!(Need::PostgreSQL(15), Need::Program("moto_server"));
    let moto = Moto::start();
    let line = Proxy::to(&moto.endpoint());
    let scene = Scene::start(&s3_storage(&line.endpoint()), |site| site);
    line.inject("PUT", "", usize::MAX, Fault::Unconditional);
    let refused = scene.walden.try_run(&["backup"]).expect_code(1);
    assert!(refused.stderr.contains("refuse a second put of the same key"), "{}", refused.stderr);
    assert!(refused.stderr.contains("conditional puts"), "{}", refused.stderr);
    let written: Vec<_> = line.take_requests().into_iter().filter(|head| head.starts_with("PUT")).collect();
    assert!(!written.is_empty() && written.iter().all(|head| head.contains("probe")), "{written:#?}");

    line.heal();
    scene.walden.run(&["wal", "push", &scene.path(&scene.finished_segment())]);
    let requests = line.take_requests();
    for head in &requests {
        let lower = head.to_ascii_lowercase();
        for name in ["x-amz-checksum", "x-amz-sdk", "x-amz-trailer", "content-md5", "aws-chunked"] {
            assert!(!lower.contains(name), "{head}");
        }
    }
    let mut puts = requests.iter().filter(|head| head.starts_with("PUT"));
    assert!(puts.all(|head| header(head, "if-none-match") == Some("*")), "{requests:#?}");
}
