//! `restore --resume` while the store is silent, as after a reboot of everything at once: whoever asks is told why it does not
//! go on, what boots the host waits, and what is told to end meanwhile does.

use std::fs;

use nix::sys::signal::{Signal, kill};

use crate::instant_scene::{Scene, Victim, word};
use crate::source::wait_until_writable;
use crate::support::{Fault, Need, Options, Proxy, S3, Site, require, s3_storage, wait_for};

/// The line by which a scene reaches its store from now on.
pub struct Line {
    pub line: Proxy,
    // There as long as the line leads to it.
    _store: S3,
}

impl Line {
    /// Leads to what the scene has stored; each call is tried again for so long.
    pub fn of(scene: &Scene, retry: &str) -> Self {
        let source = &scene.source;
        let store = S3::over(&source.walden.repository());
        let line = Proxy::to(&store.endpoint());
        let storage = s3_storage(&line.endpoint()) + &format!("retry = \"{retry}\"\ntimeout = \"1s\"\n");
        let described = Site::of(source, source.data_directory()).bin_directory(&source.bin_directory());
        source.walden.reconfigure(source.scratch(), &described.storage(&storage));
        Self { line, _store: store }
    }
}

fn scene() -> Scene {
    let scene = Scene::start(Options::default());
    scene.source.sql("create table kept as select n from generate_series(1, 1000) n");
    scene.source.backup();
    scene.source.archive_wal();
    scene
}

const ROWS: &str = "select count(*) from kept";

#[test]
fn it_says_that_the_store_is_away_and_not_what_ended_it_before() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let store = Line::of(&scene, "2s");
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("insert into kept values (0)");
    restored.kill(Victim::Host);
    let older = r#"{"kind":"damaged","message":"an older reason","hint":null}"#;
    fs::write(restored.directory.join(".walden/last.json"), older).unwrap();
    store.line.inject_only(Fault::Silence);
    let refused = restored.try_resume();
    assert_eq!(refused.code(), Some(4), "{}", refused.stderr);
    assert!(refused.stderr.contains(&store.line.endpoint()), "what is away is not named: {}", refused.stderr);
    assert!(!refused.stderr.contains("older reason"), "{}", refused.stderr);
    assert!(refused.stderr.contains("\"walden restore --resume --target-dir"), "{}", refused.stderr);
    assert!(restored.supervisor().is_none() && restored.mounts().is_empty());
    restored.assert_bare_refuses();
    store.line.heal();
    restored.finish();
    assert_eq!(restored.sql(ROWS), "1001");
    restored.stop();
    restored.assert_plain();
}

/// The unit of a boot calls once, and the server's own comes after it.
#[test]
fn what_only_mounts_waits_for_the_store() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let store = Line::of(&scene, "2s");
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("insert into kept values (0)");
    restored.kill(Victim::Host);
    store.line.inject_only(Fault::Silence);
    let mut beside = restored.resume_beside(&["--no-start"]);
    wait_for("the store to be missed", || {
        assert!(!beside.has_ended(), "it does not wait: {}", beside.told());
        beside.has_told("the store is waited for").then_some(())
    });
    assert!(restored.mounts().is_empty());
    store.line.heal();
    assert_eq!(word(&beside.report(), "state"), "mounted");
    restored.start();
    wait_until_writable(&restored);
    assert_eq!(restored.sql(ROWS), "1001");
    restored.stop();
}

/// It would ask the store for ten minutes.
#[test]
fn a_supervisor_that_opens_the_repository_ends_when_it_is_told_to() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let store = Line::of(&scene, "10min");
    let (restored, _) = scene.answering("restored", &[]);
    restored.kill(Victim::Host);
    store.line.inject_only(Fault::Silence);
    let mut beside = restored.resume_beside(&[]);
    wait_for("the silence to be told", || {
        assert!(!beside.has_ended(), "{}", beside.told());
        beside.has_told("nothing is mounted after").then_some(())
    });
    assert!(beside.has_told("trying again"), "what is waited for is not told: {}", beside.told());
    kill(restored.supervisor().expect("it asks the store"), Signal::SIGTERM).unwrap();
    wait_for("the supervisor to end", || restored.supervisor().is_none().then_some(()));
    let status = beside.wait();
    assert_eq!(status.code(), Some(1), "{}", beside.told());
    assert!(restored.mounts().is_empty(), "a mount is left");
    store.line.heal();
    restored.finish();
    assert_eq!(restored.sql(ROWS), "1000");
    restored.stop();
    restored.assert_plain();
}
