//! The command in the foreground and what it leaves to others: killed, it takes nothing along; without the background nothing
//! comes; whoever resumes what runs follows it.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::instant_scene::{Beside, Scene, Victim, word};
use crate::support::{Need, Options, require, wait_for};

/// So slow that no test waits for the end of it.
const SLOW: [&str; 2] = ["--hydrate-rate", "64KiB"];

#[test]
fn a_command_that_is_killed_or_interrupted_leaves_the_server_running() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = Scene::filled(Options::default());
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&SLOW);
    restored.wait_until_writable(&mut beside);
    let (supervisor, postmaster) = (restored.supervisor(), restored.postmaster());
    assert!(supervisor.is_some());
    beside.signal(Signal::SIGKILL);
    assert_eq!(restored.sql("select count(*) from later"), "1000");
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut beside = restored.resume_beside(&[]);
        wait_for("the command to follow", || beside.has_told("answer").then_some(()));
        let status = beside.signal(signal);
        assert!(!status.success(), "{signal} is no success: {status}");
        if signal == Signal::SIGINT {
            assert!(beside.told().contains("--resume"), "{}", beside.told());
        }
        assert_eq!((restored.supervisor(), restored.postmaster()), (supervisor, postmaster), "{signal}");
        restored.sql("insert into later values (0)");
    }
    assert_eq!(restored.sql("select count(*) from later where n = 0"), "3");
    assert_eq!(scene.holds().open_pins, 1);
    restored.stop();
}

/// Two who resume at once: one begins, both follow, one server.
#[test]
fn two_who_resume_at_once_come_to_one_server() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = Scene::filled(Options::default());
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("create table own as select n from generate_series(1, 1000) n");
    for victim in [Victim::Both, Victim::Host] {
        restored.kill(victim);
        let mut commands: Vec<_> = (0..3).map(|_| restored.resume_beside(&SLOW)).collect();
        wait_for("the server to answer", || {
            let ended = commands.iter_mut().map(Beside::has_ended).filter(|ended| *ended).count();
            let told = || commands.iter().map(Beside::told).collect::<Vec<_>>().join("\n");
            assert!(ended < 3 || restored.answers(), "all have ended: {}", told());
            restored.answers().then_some(())
        });
        assert!(restored.supervisor().is_some());
        assert_eq!(restored.mounts().iter().filter(|it| **it == restored.directory).count(), 1);
        assert!(commands.iter_mut().any(|command| !command.has_ended()), "nobody follows");
        for command in &mut commands {
            assert!(!command.has_ended() || command.told().contains("hint: "), "{}", command.told());
        }
        assert_eq!(restored.sql("select count(*) from own"), "1000");
    }
    restored.stop();
}

#[test]
fn what_is_not_hydrated_answers_and_comes_when_it_is_resumed() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = Scene::filled(Options::default());
    let (restored, report) = scene.answering("restored", &[]);
    assert_eq!(word(&report, "state"), "answering");
    assert!(report["plain_after_seconds"].is_null(), "{report}");
    let bytes = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name}: {report}"));
    assert!(bytes("hydrated_bytes") < bytes("total_bytes"), "{report}");
    let beneath = scene.beneath();
    let seen = beneath.path(&restored.directory);
    assert!(!seen.join("PG_VERSION").exists() && !seen.join("global/pg_control").exists());
    assert!(restored.directory.join("PG_VERSION").is_file() && !restored.directory.join(".walden").exists());
    assert_eq!(restored.sql("select count(*), sum(n) from cold"), "200000|20000100000");
    // Who follows what does not come is told how it is, and nothing changes.
    assert_eq!(word(&restored.resume(), "state"), "answering");
    restored.finish();
    assert!(seen.join("PG_VERSION").is_file());
    restored.stop();
    restored.assert_plain();
}

/// A person watches: one line, drawn over itself, from the first answer on.
#[test]
fn on_a_terminal_one_line_tells_how_far_it_is() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = Scene::filled(Options::default());
    let restored = scene.place("restored");
    let mut command = scene.walden().command();
    command.args(["restore", "--instant", "--hydrate-rate", "2MiB", "--target-dir"]).arg(&restored.directory);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    // None of them has to be quoted: a test's folder has a plain name.
    let words: Vec<&str> = words.map(|word| word.to_str().unwrap()).collect();
    let typescript = scene.source.scratch().path().join("typescript");
    // It gives a command a terminal of its own.
    let mut script = Command::new("script");
    script.args(["--quiet", "--flush", "--return", "--command", &words.join(" ")]).arg(&typescript);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => script.env(name, value),
            None => script.env_remove(name),
        };
    }
    let mut script = script.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let shown = || String::from_utf8_lossy(&fs::read(&typescript).unwrap_or_default()).into_owned();
    let line = "plain directory: ";
    wait_for("the line to tell how long it takes", || {
        let ended = script.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {}", shown());
        shown().contains(" left\r").then_some(())
    });
    let told = shown();
    assert!(told.split(line).next().unwrap().contains("answering queries after"), "{told}");
    let drawn = told.split('\r').rfind(|drawn| drawn.ends_with(" left")).unwrap();
    assert!(drawn.contains(line) && drawn.contains(" of ") && drawn.contains(" %), "), "{drawn}");
    let lines = told.lines().filter(|shown| shown.contains(line)).count();
    assert_eq!(lines, 1, "it is not drawn over itself: {told}");
    script.kill().unwrap();
    script.wait().unwrap();
    restored.finish();
    restored.stop();
    restored.assert_plain();
}

#[test]
fn a_rate_of_nothing_is_refused_with_the_option_that_says_so() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::start(Options::default());
    let refused = scene.place("refused").try_begin(&["--hydrate-rate", "0B"]);
    assert_eq!(refused.code(), Some(2), "{}", refused.stderr);
    assert!(refused.stderr.contains("--no-hydrate"), "{}", refused.stderr);
}
