//! The README, executed: its tour runs on a real cluster with its own configuration, and every other command parses.
//!
//! A block marked `console` holds lines that begin with `$ `, and what they print. The tour's are run in order by a
//! shell; paths and the connection are replaced by those of the test. To see what they print now, for the README: run
//! with `--no-capture`.

#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::{Cluster, Need, Pgbench, Run, Scratch, Walden, require};

/// The heading of the section that is run; the next heading of that rank ends it.
const TOUR: &str = "## A tour in five minutes";

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

/// The blocks of a document that are marked so.
fn blocks<'a>(document: &'a str, mark: &str) -> Vec<&'a str> {
    let opening = format!("```{mark}\n");
    let after = document.split(&*opening).skip(1);
    after.map(|rest| rest.split("\n```").next().unwrap_or(rest)).collect()
}

/// The commands of all `console` blocks; a backslash at the end of a line continues it.
fn commands(document: &str) -> Vec<String> {
    let text = blocks(document, "console").join("\n").replace("\\\n", " ");
    text.lines().filter_map(|line| line.strip_prefix("$ ")).map(str::to_owned).collect()
}

/// Whether the binary knows every word of a command line: help is given only for what has parsed so far.
fn parses(command: &str) -> bool {
    let words = format!("set -- {}; printf '%s\\n' \"$@\"", command.split(" | ").next().unwrap());
    let words = Run::of(Command::new("sh").args(["-c", &words]), "").expect_success().stdout;
    let arguments = words.lines().skip(1).take_while(|word| *word != "--").map(str::to_owned);
    let mut walden = Command::new(env!("CARGO_BIN_EXE_walden"));
    Run::of(walden.args(arguments).arg("--help"), "").success()
}

fn tour() -> String {
    let readme = readme();
    let section = readme.split(TOUR).nth(1).unwrap_or_else(|| panic!("README.md has no section {TOUR}"));
    section.split("\n## ").next().unwrap().to_owned()
}

#[test]
fn every_command_of_the_readme_parses() {
    let commands = commands(&readme());
    let ours: Vec<_> = commands.iter().filter(|command| command.starts_with("walden ")).collect();
    assert!(ours.len() >= 8, "{ours:?}");
    let wrong: Vec<_> = ours.iter().filter(|command| !parses(command)).collect();
    assert!(wrong.is_empty(), "walden does not know {wrong:?}");
}

#[test]
fn a_command_that_walden_does_not_have_is_noticed() {
    for command in ["walden wal list", "walden backup --label 'a b' | cat", "walden key create --id x -- y"] {
        assert!(parses(command), "{command}");
    }
    for command in ["walden bakcup", "walden wal list --colour", "walden wal lisst", "walden mount --on /mnt"]
    {
        assert!(!parses(command), "{command}");
    }
}

#[test]
fn the_tour_runs_as_written() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let cluster = Cluster::start(15);
    Pgbench::initialize(&cluster, 1);
    let scratch = cluster.scratch();
    let stage = Stage::set(scratch, &cluster);
    // The configuration stands between the commands; here it is there from the beginning.
    scratch.folder("etc");
    scratch.file("etc/walden.toml", &stage.here(&blocks(&tour(), "toml").concat()));
    let archive_command =
        tour().lines().find_map(|line| line.strip_prefix("archive_command = ").map(str::to_owned));
    let archive_command = archive_command.expect("the tour says how WAL is archived");
    cluster.set_archive_command(&stage.in_environment(archive_command.trim_matches('\'')));
    stage.run(&commands(&tour()));
    let clones = fs::read_dir(scratch.path().join("state/clones")).unwrap().count();
    assert_eq!(clones, 0, "the tour leaves no clone");
}

/// Where the tour's paths really are.
struct Stage<'a> {
    scratch: &'a Scratch,
    cluster: &'a Cluster,
    programs: String,
}

impl<'a> Stage<'a> {
    fn set(scratch: &'a Scratch, cluster: &'a Cluster) -> Self {
        for folder in ["mnt", "bin"] {
            scratch.folder(folder);
        }
        let binary = Walden::new(scratch).binary().to_owned();
        std::os::unix::fs::symlink(binary, scratch.path().join("bin/walden")).unwrap();
        let programs =
            format!("{}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", scratch.path().display());
        Self { scratch, cluster, programs }
    }

    /// Replaces the places of the README by those of the test.
    fn here(&self, text: &str) -> String {
        let scratch = self.scratch.path().display().to_string();
        text.replace("/var/lib/postgresql/15/main", &self.cluster.data_directory().display().to_string())
            .replace("/usr/lib/postgresql/15/bin", &self.cluster.bin_directory().display().to_string())
            .replace("host=/run/postgresql user=postgres", &self.cluster.connection())
            .replace("/var/lib/walden", &format!("{scratch}/state"))
            .replace("/run/walden", &format!("{scratch}/run"))
            .replace("/etc/walden", &format!("{scratch}/etc"))
            .replace("/mnt/walden", &format!("{scratch}/mnt"))
    }

    /// Makes a command of the server find binary and configuration, as an installed Walden would.
    fn in_environment(&self, command: &str) -> String {
        let configuration = self.scratch.path().join("etc/walden.toml");
        format!("PATH={} WALDEN_CONFIG={} {command}", self.programs, configuration.display())
    }

    /// Runs commands in one shell, which says each before it runs it and ends at the first that fails.
    fn run(&self, commands: &[String]) {
        let script: Vec<String> = commands.iter().map(|command| self.here(command)).collect();
        let run = Run::of(&mut self.shell(&script.join("\n")), "");
        println!("{}{}", run.stdout, run.stderr);
        run.expect_success();
    }

    fn shell(&self, script: &str) -> Command {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-euxc", script]).env_clear().env("PATH", &self.programs).env("LC_ALL", "C");
        shell.env("HOME", self.scratch.path()).env("TZ", "UTC");
        shell.env("WALDEN_CONFIG", self.scratch.path().join("etc/walden.toml"));
        shell.env("PGHOST", &self.cluster.host).env("PGPORT", self.cluster.port.to_string());
        shell.env("PGUSER", "postgres").current_dir(self.scratch.path());
        shell
    }
}
