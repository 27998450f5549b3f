//! Who the daemon works for, and what a caller does where there is none.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::unistd::User;

use crate::scene::Scene;
use crate::support::{Need, Run, require, wait_for};

#[test]
fn without_a_daemon_push_works_by_itself_and_a_second_daemon_is_refused() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(4);
    let alone = scene.pushed(&segments[0]);
    assert_eq!(alone.stderr.matches("daemon").count(), 0, "{}", alone.stderr);
    let daemon = scene.daemon();
    let refused = scene.walden.try_run(&["daemon"]).expect_code(1);
    assert!(refused.stderr.contains("another daemon is running"), "{}", refused.stderr);
    scene.pushed(&segments[1]);
    assert!(daemon.log().contains(&format!("archived {}", segments[1])), "{}", daemon.log());
    // What a killed one leaves is a socket that refuses, and no obstacle to the next one.
    daemon.kill();
    assert!(scene.socket().exists());
    let alone = scene.pushed(&segments[2]);
    assert_eq!(alone.stderr.matches("daemon").count(), 0, "{}", alone.stderr);
    let daemon = scene.daemon();
    scene.pushed(&segments[3]);
    assert!(daemon.log().contains(&format!("archived {}", segments[3])), "{}", daemon.log());
    segments.iter().for_each(|segment| scene.assert_archived(segment));
}

#[test]
fn push_asks_the_daemon_on_the_one_thread_that_it_begins_with() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(1);
    fs::create_dir_all(scene.socket().parent().unwrap()).unwrap();
    let listener = UnixListener::bind(scene.socket()).unwrap();
    listener.set_nonblocking(true).unwrap();
    fs::set_permissions(scene.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let mut push = scene.push(&segments[0]).spawn().unwrap();
    let stream = wait_for("the command to ask", || listener.accept().ok()).0;
    stream.set_nonblocking(false).unwrap();
    let mut request = String::new();
    BufReader::new(&stream).read_line(&mut request).unwrap();
    assert!(request.contains(&segments[0]), "{request}");
    // PostgreSQL starts it for every segment: a runtime and its threads would be most of what that takes.
    let threads = fs::read_dir(format!("/proc/{}/task", push.id())).unwrap().count();
    (&stream).write_all(b"{\"archived\":{\"name\":\"x\",\"cluster\":\"x\",\"created\":true}}\n").unwrap();
    assert!(push.wait().unwrap().success());
    assert_eq!(threads, 1);
}

#[test]
fn what_the_daemon_cannot_do_is_the_commands_failure() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(1);
    let _daemon = scene.daemon();
    let configuration = scene.walden.configuration_file();
    let text = fs::read_to_string(&configuration).unwrap();
    // The command knows a site that the daemon has not been told of.
    fs::write(&configuration, text.replace("[sites.main", "[sites.renamed")).unwrap();
    let refused = Run::of(&mut scene.push(&segments[0]), "").expect_code(2);
    assert!(refused.stderr.contains("the daemon has no site \"renamed\""), "{}", refused.stderr);
    fs::write(&configuration, text).unwrap();
    let refused = Run::of(&mut scene.push("000000010000000000000BAD"), "").expect_code(1);
    assert!(refused.stderr.contains("could not read"), "{}", refused.stderr);
    scene.pushed(&segments[0]);
}

/// The configuration was changed and the daemon not started again: what it archived would lie where nobody looks.
#[test]
fn a_daemon_that_was_started_with_another_configuration_acknowledges_nothing() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(3);
    let elsewhere = scene.scratch().folder("elsewhere");
    let daemon = scene.daemon();
    let configuration = scene.walden.configuration_file();
    let text = fs::read_to_string(&configuration).unwrap();
    let moved = text.replace(&scene.walden.storage(), &format!("url = \"file://{}\"", elsewhere.display()));
    assert_ne!(moved, text);
    fs::write(&configuration, &moved).unwrap();
    let alone = scene.pushed(&segments[0]);
    assert!(alone.stderr.contains("started with another storage"), "{}", alone.stderr);
    assert!(!daemon.log().contains(&format!("archived {}", segments[0])), "{}", daemon.log());
    scene.assert_archived(&segments[0]);
    // Who could read it is another question than where it is.
    fs::write(&configuration, text.replace("recipients = [\"test\"]", "recipients = []")).unwrap();
    let alone = scene.pushed(&segments[1]);
    assert!(alone.stderr.contains("other recipients"), "{}", alone.stderr);
    assert!(!daemon.log().contains(&format!("archived {}", segments[1])), "{}", daemon.log());
    drop(daemon);
    fs::write(&configuration, &moved).unwrap();
    let daemon = scene.daemon();
    let through = scene.pushed(&segments[2]);
    assert_eq!(through.stderr.matches("daemon").count(), 0, "{}", through.stderr);
    assert!(daemon.log().contains(&format!("archived {}", segments[2])), "{}", daemon.log());
    scene.assert_archived(&segments[2]);
}

#[test]
fn the_owner_of_the_site_has_its_wal_archived_and_a_stranger_nothing() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Folder);
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(2);
    let daemon = scene.daemon();
    let stranger = User::from_name("nobody").unwrap().expect("every Linux has this user");
    let run = scene.socket().parent().unwrap().to_owned();
    for folder in [run.as_path(), run.parent().unwrap()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    }
    // A directory of the stranger's own that looks like the server's, with a segment that the server never wrote.
    let own = scene.scratch().path().join("strangers");
    let mut copy = Command::new("cp");
    Run::of(copy.args(["-r"]).arg(scene.data_directory()).arg(&own), "").expect_success();
    let mut chown_all = Command::new("chown");
    Run::of(chown_all.args(["-R", "nobody"]).arg(&own), "").expect_success();
    let configuration = scene.scratch().path().join("strangers.toml");
    let lines = format!(
        "[paths]\nrun = \"{}\"\nstate = \"{}\"\n[storage]\n{}\n[sites.main]\n",
        run.display(),
        own.join("state").display(),
        scene.walden.storage()
    );
    fs::write(&configuration, lines).unwrap();
    fs::set_permissions(&configuration, fs::Permissions::from_mode(0o644)).unwrap();
    chown(&configuration, Some(stranger.uid.as_raw()), None).unwrap();
    let push_with = |uid: u32, path: &Path, options: &[&str]| {
        let mut command = Command::new(scene.walden.command().get_program());
        command.arg("--config").arg(&configuration).args(["wal", "push"]).arg(path).args(options);
        Run::of(command.env_clear().uid(uid).current_dir("/"), "")
    };
    let push = |uid: u32, path: &Path| push_with(uid, path, &[]);
    for directory in [scene.data_directory(), &own] {
        let path = directory.join("pg_wal").join(&segments[0]);
        let refused = push(stranger.uid.as_raw(), &path).expect_code(1);
        assert!(refused.stderr.contains("may not have the daemon archive"), "{}", refused.stderr);
    }
    assert!(!daemon.log().contains("archived 0"), "{}", daemon.log());
    drop(daemon);
    let daemon = scene.daemon_of_root();
    let owner = fs::metadata(scene.data_directory()).unwrap().uid();
    assert_ne!(owner, 0, "PostgreSQL does not run as root");
    push(owner, &scene.segment(&segments[0])).expect_success();
    assert!(daemon.log().contains(&format!("archived {}", segments[0])), "{}", daemon.log());
    // Nor does the server reach what is archived already.
    let refused = push_with(owner, &scene.segment(&segments[0]), &["--force"]).expect_code(1);
    assert!(refused.stderr.contains("may not have the daemon supersede"), "{}", refused.stderr);
    push(0, &scene.segment(&segments[1])).expect_success();
    segments.iter().for_each(|segment| scene.assert_archived(segment));
}
