//! A primary and its standby, which have one system identifier, as two hosts of one site: neither's files are taken for
//! the other's (failure 21a), and both may back up at the same time (failure 21).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::site::Faulted;
use crate::support::{Account, Need, Run, Server, Sql, require, wait_for};

/// Restores a standby of the site's cluster and lets it stream.
fn start_standby(site: &Faulted) -> Server {
    site.walden.run(&["backup"]);
    let directory = site.scratch().path().join("standby");
    let primary = site.connection();
    let words = ["--standby", "--primary-conninfo", &primary, "--target-dir", directory.to_str().unwrap()];
    site.walden.run(&[&["restore"], &words[..]].concat());
    let mut standby = Server::new(15, &directory, &site.scratch().folder("run"));
    standby.start();
    wait_for("the standby to stream", || {
        (standby.sql("select count(*) from pg_stat_wal_receiver where status = 'streaming'") == "1")
            .then_some(())
    });
    standby
}

/// Writes the configuration of a host: the site and its keys, folders of its own, one directory, the first connection
/// its own server's.
fn host(site: &Faulted, name: &str, connections: &[&Sql], directory: &Path) -> PathBuf {
    let first = fs::read_to_string(site.walden.configuration_file()).unwrap();
    for folder in ["state", "run", "clones"] {
        site.scratch().folder(&format!("walden/{folder}-{name}"));
    }
    let node = |sql: &&Sql| {
        format!("[[sites.main.nodes]]\nconnection = \"{}\"\nprefer = \"standby\"\n", sql.connection())
    };
    let nodes: String = connections.iter().map(node).collect();
    let changes = [
        ("/state\"".to_owned(), format!("/state-{name}\"")),
        ("/run\"".to_owned(), format!("/run-{name}\"")),
        ("/clones\"".to_owned(), format!("/clones-{name}\"")),
        (format!("connection = \"{}\"\n", site.connection()), nodes),
        (
            format!("data_directory = \"{}\"", site.data_directory().display()),
            format!("data_directory = \"{}\"", directory.display()),
        ),
    ];
    let text = changes.iter().fold(first, |text, (from, to)| {
        assert_eq!(text.matches(from).count(), 1, "{from} in {text}");
        text.replace(from, to)
    });
    site.scratch().file(&format!("walden/{name}.toml"), &text)
}

fn backup(site: &Faulted, configuration: &Path) -> Command {
    let mut command: Command = Account::of_postgresql().command(site.walden.binary());
    command.arg("--config").arg(configuration).args(["--json", "backup"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[track_caller]
fn id_of(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let outcome: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    outcome["id"].as_str().unwrap().to_owned()
}

#[test]
fn failure_21a_a_connection_to_one_and_the_directory_of_the_other_is_refused() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    site.archive();
    let standby = start_standby(&site);
    let before = site.listed();
    for (name, connection, directory) in [
        ("of-primary", &**site.cluster, standby.data_directory()),
        ("of-standby", &*standby, site.data_directory()),
    ] {
        let configuration = host(&site, name, &[connection], directory);
        let refused = Run::of(&mut backup(&site, &configuration), "").expect_code(2);
        assert!(refused.stderr.contains("different servers"), "{name}: {}", refused.stderr);
        assert!(refused.stderr.contains("server role is a "), "{name}: {}", refused.stderr);
        assert!(refused.stderr.contains("hint: "), "{name}: {}", refused.stderr);
        assert_eq!(site.listed(), before, "{name}");
    }
    // Each with its own is right.
    for (name, connections, directory) in [
        ("primary", &[&**site.cluster][..], site.data_directory()),
        ("standby", &[&*standby, &**site.cluster], standby.data_directory()),
    ] {
        let configuration = host(&site, name, connections, directory);
        id_of(&backup(&site, &configuration).output().unwrap());
    }
    assert_eq!(site.listed().len(), before.len() + 2);
}

#[test]
fn failure_21_a_primary_and_its_standby_back_up_one_site_at_once() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    site.archive();
    let standby = start_standby(&site);
    let before = site.listed();
    // The second connection is asked to end the segment, which a standby cannot.
    let hosts = [
        host(&site, "primary", &[&**site.cluster], site.data_directory()),
        host(&site, "standby", &[&*standby, &**site.cluster], standby.data_directory()),
    ];
    site.sql("insert into kept select n, 'before' from generate_series(20001, 21000) n");
    let running = hosts.map(|configuration| backup(&site, &configuration).spawn().unwrap());
    site.sql("insert into kept select n, 'meanwhile' from generate_series(21001, 22000) n");
    let ids = running.map(|process| id_of(&process.wait_with_output().unwrap()));
    let mut expected = [&before[..], &ids].concat();
    let mut listed = site.listed();
    expected.sort();
    listed.sort();
    assert_eq!(listed, expected);
    site.sql("insert into kept values (30000, 'after')");
    site.archive_wal();
    for id in &ids {
        site.assert_restores(id);
    }
}
