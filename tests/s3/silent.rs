//! A store that accepts and never answers, from the first request on or in the middle of the work.
//!
//! Each command has to give up by itself, with a message that names the store, and the next one over a good line is right.

use std::path::Path;
use std::process::Stdio;

use crate::scene::{HASTY, Scene, Store};
use crate::support::{Checksums, Fault, Need, Run, Sql, Walden, mounts_below, require, s3_storage, wait_for};

/// Where silence begins: at once, at the first request after the store was found, and in the thick of it.
const POSITIONS: [usize; 3] = [0, 1, 6];

/// A scene with a basebackup and WAL behind it, whose commands give up soon.
fn scene(store: &Store) -> Scene {
    let scene = Scene::behind(&store.line);
    scene.cluster.set_archive_command(&scene.walden.archive_command());
    scene.cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 20000) n");
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    scene.cluster.sql("delete from t where n % 3 = 0");
    scene.cluster.archive_wal();
    scene.reach(&(s3_storage(&store.line.endpoint()) + HASTY));
    scene
}

/// Runs a command whose store falls silent; it has to end within the patience of all tests, unreachable and named.
#[track_caller]
fn assert_gives_up(store: &Store, walden: &Walden, position: usize, arguments: &[&str]) -> Run {
    let what = format!("{arguments:?} with silence from request {position} on");
    store.line.take_requests();
    store.line.inject_from(position, Fault::Silence);
    let mut command = walden.command();
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let status = wait_for(&format!("the end of {what}"), || process.try_wait().unwrap());
    let output = process.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(store.line.heal() > 0, "{what}: there were no so many requests: {stderr}");
    assert_eq!(status.code(), Some(4), "{what}: {stderr}");
    assert!(stderr.contains(&store.line.endpoint()), "{what}: no {} in {stderr}", store.line.endpoint());
    Run { command: what, status, stdout: String::new(), stderr }
}

#[test]
fn a_backup_gives_up_and_the_next_counts() {
    require!(Need::PostgreSQL(15));
    let store = Store::start();
    let scene = scene(&store);
    let count = || scene.walden.json(&["list"])["basebackups"].as_array().unwrap().len();
    for position in POSITIONS {
        scene.cluster.sql("update t set md5 = md5(md5)");
        assert_gives_up(&store, &scene.walden, position, &["backup", "--checkpoint", "fast"]);
        assert_eq!(count(), 1, "silence from request {position} on");
    }
    // The server is not left in the backup that was given up.
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    assert_eq!(count(), 2);
    scene.cluster.archive_wal();
    let directory = scene.place("restored");
    scene.walden.run(&["restore", "--target-dir", &directory]);
    scene.assert_recovers(&directory);
}

#[test]
fn a_restore_gives_up_and_goes_on_where_it_was() {
    require!(Need::PostgreSQL(15));
    let store = Store::start();
    let scene = scene(&store);
    for position in POSITIONS {
        let directory = scene.place(&format!("restored-{position}"));
        let restore = ["restore", "--target-dir", &directory];
        assert_gives_up(&store, &scene.walden, position, &restore);
        let begun = Path::new(&directory).read_dir().is_ok_and(|mut files| files.next().is_some());
        assert!(!Path::new(&directory).join("global/pg_control").exists(), "it could be started");
        if begun {
            scene.walden.run(&[&restore[..], &["--resume"]].concat());
        } else {
            scene.walden.run(&restore);
        }
        scene.assert_recovers(&directory);
    }
}

#[test]
fn a_clone_gives_up_and_leaves_nothing_mounted() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let store = Store::start();
    let scene = scene(&store);
    let walden = scene.walden.as_root();
    let clones = scene.cluster.scratch().path().join("walden/clones");
    for position in POSITIONS {
        let name = format!("silent-{position}");
        assert_gives_up(&store, &walden, position, &["clone", "create", &name, "--no-hydrate"]);
        assert!(mounts_below(&clones).is_empty(), "silence from request {position} on");
        // What there is of it can be deleted; what there is not need not be.
        if clones.join(&name).exists() {
            walden.run(&["clone", "delete", &name]);
        }
        let status = walden.json(&["clone", "create", &name]);
        let port = u16::try_from(status["port"].as_u64().unwrap()).unwrap();
        let clone = Sql::at(status["socket_directory"].as_str().unwrap().as_ref(), port);
        Checksums::of(&scene.cluster).assert_same(&Checksums::of(&clone));
        walden.run(&["clone", "delete", &name]);
    }
}
