//! What the two commands tell PostgreSQL by their exit, when they are called wrongly as well.

use std::fs;

use crate::prefetch::{prefetchers, wait_for_prefetcher};
use crate::scene::Scene;
use crate::support::{Need, Run, require};

#[test]
fn fetch_exits_with_0_1_and_200_alone_and_never_above_125_for_a_standby() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 1);
    let data = scene.cluster.scratch().path().join("copy");
    let fetch = |arguments: &[&str]| {
        Run::of(scene.walden.command().args(["wal", "fetch"]).args(arguments).current_dir(&data), "").code()
    };
    let segment = scene.segments[0].as_str();
    let elsewhere = scene.cluster.scratch().path().join("elsewhere.toml");
    let elsewhere = elsewhere.to_str().unwrap();
    let wrong: [&[&str]; 6] = [
        &[],
        &[segment],
        &[segment, "pg_wal/RECOVERYXLOG", "more"],
        &["--nonsense", segment, "pg_wal/RECOVERYXLOG"],
        &["not-a-name", "pg_wal/RECOVERYXLOG"],
        &[segment, "pg_wal/no/such/folder"],
    ];
    let unconfigured = |code: i32| {
        let mut command = scene.walden.command();
        command.args(["--site", "other", "wal", "fetch", segment, "pg_wal/RECOVERYXLOG"]);
        assert_eq!(Run::of(command.current_dir(&data), "").code(), Some(code));
    };
    // By itself, and then with a prefetcher, which the first segment that is restored leaves behind.
    for with_prefetcher in [false, true] {
        assert_eq!(fetch(&["00000002.history", "pg_wal/RECOVERYHISTORY"]), Some(1));
        assert_eq!(fetch(&["0000000100000001000000FF", "pg_wal/RECOVERYXLOG"]), Some(1));
        for arguments in wrong {
            assert_eq!(fetch(arguments), Some(200), "{arguments:?}");
        }
        unconfigured(200);
        assert_eq!(!prefetchers(&data).is_empty(), with_prefetcher);
        assert_eq!(fetch(&[segment, "pg_wal/RECOVERYXLOG"]), Some(0));
        wait_for_prefetcher(&scene.walden, &data);
    }
    fs::write(elsewhere, "[").unwrap();
    scene.cluster.scratch().file("copy/standby.signal", "");
    for arguments in wrong {
        assert_eq!(fetch(arguments), Some(1), "{arguments:?}");
    }
    unconfigured(1);
}

#[test]
fn push_never_exits_above_125() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 1);
    let data = scene.cluster.data_directory();
    let push = |arguments: &[&str]| {
        let mut command = scene.walden.command();
        Run::of(command.args(["wal", "push"]).args(arguments).current_dir(data), "").code().unwrap()
    };
    assert_eq!(push(&[&format!("pg_wal/{}", scene.segments[0])]), 0);
    let none = "pg_wal/0000000100000001000000FF";
    for arguments in [&[][..], &["--nonsense"], &["x"], &["pg_wal/x"], &[none], &["/"]] {
        let code = push(arguments);
        assert!((1..=125).contains(&code), "{arguments:?}: {code}");
    }
}
