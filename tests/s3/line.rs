//! Commands over a line that breaks: in mid-request, in mid-answer, after the store has done it; and one that is dead.

use std::fs;

use crate::scene::{HASTY, Scene, Store};
use crate::support::{Checksums, Fault, Need, Sql, require, s3_storage};

/// Failure 43, throttling, resets in mid-body and bodies changed on the way: the segment is stored once, whole.
#[test]
fn a_push_survives_what_happens_to_one_request() {
    require!(Need::PostgreSQL(15));
    let store = Store::start();
    let scene = Scene::behind(&store.line);
    let first = scene.finished_segment();
    scene.walden.run(&["wal", "push", &scene.path(&first)]);
    let mut pushed = Vec::new();
    for (fault, puts) in [
        (Fault::LoseAnswer, 2),
        (Fault::CutAnswer, 2),
        (Fault::CutRequest, 2),
        (Fault::Silence, 2),
        (Fault::refusal("503 Slow Down", "retry-after: 1\r\n", "SlowDown"), 2),
        (Fault::refusal("429 Too Many Requests", "", "TooManyRequests"), 2),
        (Fault::refusal("409 Conflict", "", "ConditionalRequestConflict"), 2),
        (Fault::refusal("400 Bad Request", "", "XAmzContentSHA256Mismatch"), 2),
        (Fault::answer("502 Bad Gateway", "content-type: text/html\r\n", "<html>no <Error> at all"), 2),
    ] {
        let segment = scene.finished_segment();
        store.line.inject("PUT", &segment, 1, fault.clone());
        store.line.take_requests();
        scene.walden.run(&["wal", "push", &scene.path(&segment)]);
        let requests = store.line.take_requests();
        let of_segment = |head: &&String| head.starts_with("PUT") && head.contains(&segment);
        assert_eq!(requests.iter().filter(of_segment).count(), puts, "{fault:?}: {requests:#?}");
        assert_eq!(store.line.heal(), 1, "{fault:?}");
        pushed.push((segment, fault));
    }
    for (segment, fault) in pushed {
        let target = store.scratch.path().join(&segment);
        scene.fetch(&segment, &target).expect_success();
        assert_eq!(fs::read(&target).unwrap(), fs::read(scene.path(&segment)).unwrap(), "{fault:?}");
    }
}

/// Failure 39 from the side of the archiver, and failure 1 from the side of recovery.
#[test]
fn a_dead_line_fails_a_push_and_is_no_absence_to_a_fetch() {
    require!(Need::PostgreSQL(15));
    let store = Store::start();
    let scene = Scene::behind(&store.line);
    let segment = scene.finished_segment();
    let path = scene.path(&segment);
    scene.walden.run(&["wal", "push", &path]);
    let target = store.scratch.path().join("walden-fetched");
    let page = Fault::answer("404 Not Found", "content-type: text/html\r\n", "<html>no such page</html>");
    for fault in [
        Fault::Silence,
        Fault::CutAnswer,
        Fault::EndAnswer,
        Fault::refusal("503 Slow Down", "retry-after: 3600\r\n", "SlowDown"),
        Fault::refusal("403 Forbidden", "", "AccessDenied"),
        Fault::refusal("404 Not Found", "", "NoSuchBucket"),
        page,
    ] {
        store.line.inject("", "", usize::MAX, fault.clone());
        let failed = scene.fetch(&segment, &target);
        assert_eq!(failed.code(), Some(200), "{fault:?}: {}", failed.stderr);
        assert!(failed.stderr.contains(&store.line.endpoint()), "{fault:?}: {}", failed.stderr);
        assert!(!target.exists(), "{fault:?}");
        store.line.heal();
    }
    // Broken once, it is tried again.
    for fault in [Fault::CutAnswer, Fault::EndAnswer] {
        store.line.inject("GET", &segment, 1, fault);
        scene.fetch(&segment, &target).expect_success();
        assert_eq!(store.line.heal(), 1);
        assert_eq!(fs::read(&target).unwrap(), fs::read(&path).unwrap());
        fs::remove_file(&target).unwrap();
    }
    // What is not there is absent on a line that works.
    scene.fetch("0000000100000000000000FF", &target).expect_code(1);

    let next = scene.finished_segment();
    scene.reach(&(s3_storage(&store.line.endpoint()) + HASTY));
    store.line.inject("", "", usize::MAX, Fault::Silence);
    let failed = scene.walden.try_run(&["wal", "push", &scene.path(&next)]).expect_code(4);
    assert!(failed.stderr.contains(&store.line.endpoint()), "{}", failed.stderr);
    scene.walden.try_run(&["list"]).expect_code(4);
    store.line.heal();
    scene.walden.run(&["wal", "push", &scene.path(&next)]);
}

/// Every so many requests break in one way or the other, for a whole life: backup, WAL, clone.
#[test]
fn a_backup_and_its_clone_over_a_bad_line_equal_their_source() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let store = Store::start();
    let scene = Scene::behind(&store.line);
    let slow_down = || Fault::refusal("503 Slow Down", "", "SlowDown");
    store
        .line
        .disturb(4, [Fault::LoseAnswer, Fault::CutAnswer, Fault::CutRequest, slow_down(), Fault::EndAnswer]);
    scene.cluster.set_archive_command(&scene.walden.archive_command());
    scene.cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 50000) n");
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    scene.cluster.sql("update t set md5 = md5(md5) where n % 7 = 0; create table late (n int)");
    scene.cluster.archive_wal();
    assert!(store.line.heal() >= 5, "the line was good");

    store.line.disturb(3, [Fault::CutAnswer, slow_down(), Fault::EndAnswer, Fault::LoseAnswer]);
    let walden = scene.walden.as_root();
    let status = walden.json(&["clone", "create", "bad-line"]);
    let port = u16::try_from(status["port"].as_u64().unwrap()).unwrap();
    let clone = Sql::at(status["socket_directory"].as_str().unwrap().as_ref(), port);
    Checksums::of(&scene.cluster).assert_same(&Checksums::of(&clone));
    assert!(store.line.heal() >= 5, "the line was good");
    walden.run(&["clone", "delete", "bad-line"]);
}

/// What a restore writes, what `info` says and what `check` finds is the same over a line that breaks every third request.
#[test]
fn restore_info_and_check_over_a_bad_line_are_those_of_a_good_one() {
    require!(Need::PostgreSQL(15));
    let store = Store::start();
    let scene = Scene::behind(&store.line);
    scene.cluster.set_archive_command(&scene.walden.archive_command());
    scene.cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 50000) n");
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    scene.cluster.sql("update t set md5 = md5(md5) where n % 7 = 0; create table late (n int)");
    let checked = scene.checked();
    // What `check` lets the server archive is there before what comes after it.
    scene.cluster.archive_wal();
    let said = scene.info();

    let breaking = || {
        let slow_down = Fault::refusal("503 Slow Down", "", "SlowDown");
        store.line.disturb(3, [Fault::CutAnswer, slow_down, Fault::EndAnswer, Fault::LoseAnswer]);
    };
    let broken = |what: &str, least: usize| {
        let broken = store.line.heal();
        assert!(broken >= least, "{what} met {broken} faults, not {least}: the line was good");
    };
    breaking();
    // Before `check`, which lets the server archive more.
    assert_eq!(scene.info(), said);
    broken("info", 2);
    breaking();
    assert_eq!(scene.checked(), checked);
    broken("check", 2);
    breaking();
    let directory = scene.place("restored");
    scene.walden.run(&["restore", "--target-dir", &directory]);
    broken("restore", 2);
    breaking();
    scene.assert_recovers(&directory);
    broken("recovery", 1);
}
