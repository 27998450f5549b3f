//! Two hosts, which are two processes with state of their own, that write one site at the same time (failure 21).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::site::Faulted;
use crate::support::{Account, Need, Resting, Taken, require, wait_for};

/// Makes the configuration of a second host: the same site and keys, its own state.
fn second_host(site: &Faulted) -> PathBuf {
    let first = fs::read_to_string(site.walden.configuration_file()).unwrap();
    let scratch = site.scratch();
    for folder in ["walden/state-2", "walden/run-2", "walden/clones-2"] {
        scratch.folder(folder);
    }
    let second = first
        .replace("/state\"", "/state-2\"")
        .replace("/run\"", "/run-2\"")
        .replace("/clones\"", "/clones-2\"");
    assert_ne!(first, second);
    scratch.file("walden/second.toml", &second)
}

fn start(site: &Faulted, configuration: &Path, directory: &Path, arguments: &[&str]) -> Child {
    let mut command: Command = Account::of_postgresql().command(site.walden.binary());
    command.arg("--config").arg(configuration).args(arguments).current_dir(directory);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Runs a command on both hosts at once, each in a data directory of its own.
fn both(site: &Faulted, second: &Path, directories: [&Path; 2], arguments: &[&str]) -> [Output; 2] {
    let first = site.walden.configuration_file();
    let hosts = [(first.as_path(), directories[0]), (second, directories[1])];
    let running = hosts.map(|(configuration, directory)| start(site, configuration, directory, arguments));
    running.map(|process| process.wait_with_output().unwrap())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn failure_21_two_hosts_back_up_one_site_at_once_and_both_basebackups_are_whole() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    site.archive();
    let second = second_host(&site);
    let data = site.data_directory();
    for output in both(&site, &second, [data, data], &["backup"]) {
        assert!(output.status.success(), "{}", text(&output));
    }
    let ids = site.listed();
    let [first, second] = &ids[..] else { panic!("two basebackups, not {ids:?}") };
    assert_ne!(first, second);
    for id in &ids {
        site.assert_restores(id);
    }
}

/// Takes what a basebackup that has ended printed for what the cluster has now.
#[track_caller]
fn taken_by(site: &Resting, output: &Output) -> Taken {
    assert!(output.status.success(), "{}", text(output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    site.taken(report["id"].as_str().unwrap())
}

const BACKUP: [&str; 3] = ["--output", "json", "backup"];

#[test]
fn two_hosts_take_incrementals_of_one_site_each_upon_its_own_state() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    let hosts = [site.walden.configuration_file(), second_host(&site)];
    let data = site.data_directory();
    let mut last = [None, None];
    for _ in 0..3 {
        for (host, last) in hosts.iter().zip(&mut last) {
            site.change();
            let taken = taken_by(&site, &start(&site, host, data, &BACKUP).wait_with_output().unwrap());
            // What the other host has written meanwhile is none of its business.
            assert_eq!(taken.parent, *last);
            site.assert_exact(&taken);
            *last = Some(taken.id);
        }
    }
    site.change();
    let outputs = both(&site, &hosts[1], [data, data], &BACKUP);
    for (output, last) in outputs.iter().zip(last) {
        let taken = taken_by(&site, output);
        assert_eq!(taken.parent, last, "both at once");
        site.assert_exact(&taken);
    }
}

#[test]
fn a_second_basebackup_of_a_site_on_one_host_is_refused_while_the_first_runs() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    let (host, data) = (site.walden.configuration_file(), site.data_directory());
    site.back_up();
    site.change();
    let basebackups = site.walden.repository().join("main/basebackups");
    let attempts = || fs::read_dir(&basebackups).unwrap().count();
    let before = attempts();
    let first = start(&site, &host, data, &BACKUP);
    let signal = |name: &str| {
        let status = Command::new("kill").args([name, &first.id().to_string()]).status().unwrap();
        assert!(status.success(), "{name}");
    };
    wait_for("the first to begin", || (attempts() > before).then_some(()));
    signal("-STOP");
    let second = start(&site, &host, data, &BACKUP).wait_with_output().unwrap();
    signal("-CONT");
    let told = text(&second);
    assert!(!second.status.success() && told.contains("another basebackup of this site"), "{told}");
    assert!(told.contains("hint: "), "{told}");
    site.assert_exact(&taken_by(&site, &first.wait_with_output().unwrap()));
}

#[test]
fn two_hosts_that_push_one_segment_agree_or_the_second_is_refused() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    let second = second_host(&site);
    let data = site.data_directory();
    for _ in 0..3 {
        let segment = site.end_segment();
        let path = format!("pg_wal/{segment}");
        for output in both(&site, &second, [data, data], &["wal", "push", &path]) {
            assert!(output.status.success(), "{}", text(&output));
        }
        assert!(site.fetched(&segment) == fs::read(data.join(path)).unwrap());
    }

    // A copy of the server that went its own way: the same name, another end.
    let segment = site.end_segment();
    let path = format!("pg_wal/{segment}");
    let copy = site.scratch().folder("copy");
    for folder in ["copy/global", "copy/pg_wal"] {
        site.scratch().folder(folder);
    }
    let mut other = fs::read(data.join(&path)).unwrap();
    *other.last_mut().unwrap() ^= 1;
    fs::copy(data.join("global/pg_control"), copy.join("global/pg_control")).unwrap();
    fs::write(copy.join(&path), &other).unwrap();
    for file in ["global/pg_control", &path] {
        site.scratch().account().own(&copy.join(file));
    }
    let outputs = both(&site, &second, [data, &copy], &["wal", "push", &path]);
    let won: Vec<usize> = (0..2).filter(|n| outputs[*n].status.success()).collect();
    let [winner] = won[..] else {
        panic!("one has to win, not {won:?}: {}", outputs.each_ref().map(text).concat())
    };
    let loser = text(&outputs[1 - winner]);
    assert!(loser.contains(&segment) && loser.contains("already exists with different content"), "{loser}");
    assert!(loser.contains("Another cluster or another host archives into this site"), "{loser}");
    let kept = fs::read([data, &*copy][winner].join(&path)).unwrap();
    assert!(site.fetched(&segment) == kept, "what was accepted first is what is there");
}

/// Runs clones of both hosts as root, where the test is root.
fn clone_command(site: &Faulted, configuration: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(site.walden.binary());
    command.arg("--config").arg(configuration).arg("clone").args(arguments);
    command.env("HOME", site.scratch().path()).env_remove("WALDEN_CONFIG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn rows(site: &Faulted, configuration: &Path, name: &str) -> Output {
    let sql = ["psql", name, "--", "-XAtc", "select count(*) from kept"];
    clone_command(site, configuration, &sql).output().unwrap()
}

#[test]
fn two_hosts_clone_one_site_while_it_is_written_to_and_neither_touches_the_others() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    site.archive_wal();
    let hosts = [site.walden.configuration_file(), second_host(&site)];
    let create = |host: &PathBuf| clone_command(&site, host, &["create", "twin"]).spawn().unwrap();
    let running = hosts.each_ref().map(create);
    site.walden.run(&["backup"]);
    site.archive_wal();
    for process in running {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
    }
    for host in &hosts {
        assert_eq!(rows(&site, host, "twin").stdout, b"20000\n");
    }
    let deleted = clone_command(&site, &hosts[0], &["delete", "twin"]).output().unwrap();
    assert!(deleted.status.success(), "{}", text(&deleted));
    assert_eq!(rows(&site, &hosts[1], "twin").stdout, b"20000\n", "the other host's clone goes on");
    let deleted = clone_command(&site, &hosts[1], &["delete", "twin"]).output().unwrap();
    assert!(deleted.status.success(), "{}", text(&deleted));

    // On one host a name is somebody's: the second is told, and the first is as it was.
    let running = [&hosts[0], &hosts[0]].map(create);
    let outputs = running.map(|process| process.wait_with_output().unwrap());
    let won = outputs.iter().filter(|output| output.status.success()).count();
    let texts = outputs.each_ref().map(text).concat();
    assert_eq!(won, 1, "{texts}");
    let is_told = texts.contains("exists") || texts.contains("clone \"twin\" is being made by process");
    assert!(is_told && texts.contains("hint:"), "{texts}");
    assert_eq!(rows(&site, &hosts[0], "twin").stdout, b"20000\n");
    let deleted = clone_command(&site, &hosts[0], &["delete", "twin"]).output().unwrap();
    assert!(deleted.status.success(), "{}", text(&deleted));
}
