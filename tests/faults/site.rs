//! A cluster with a table whose content is known, its site, and what a test asks of both.

use std::fs;
use std::path::Path;

use serde_json::Value;
use walden::catalog::PLAN_FILE_NAME;

use crate::support::{Cluster, Options, Run, Server, Site, Source, wait_for};

/// A cluster with the table, and its Walden; nothing is archived yet.
pub type Faulted = Source;

const TABLE: &str = "create table kept as select n, md5(n::text) as text from generate_series(1, 20000) n";
const CONTENT: &str = "select count(*) || ' ' || md5(string_agg(text, ',' order by n)) from kept";

impl Faulted {
    /// Starts a cluster with small segments; `adjust` says how the site is configured, knowing the cluster's folder.
    #[track_caller]
    pub fn start(adjust: impl FnOnce(&Cluster, Site) -> Site) -> Self {
        let source = Self::configured(15, Options::default().initdb("--wal-segsize=1"), adjust);
        source.sql(TABLE);
        source
    }

    /// Lists the basebackups that count.
    #[track_caller]
    pub fn listed(&self) -> Vec<String> {
        let list = self.walden.json(&["list"]);
        let id = |row: &Value| row["id"].as_str().unwrap().to_owned();
        list["basebackups"].as_array().unwrap().iter().map(id).collect()
    }

    /// Restores a basebackup, starts PostgreSQL on it and compares the table with the source's.
    #[track_caller]
    pub fn assert_restores(&self, id: &str) {
        let directory = self.scratch().path().join(format!("restored-{id}"));
        self.walden.run(&["restore", id, "--target-dir", directory.to_str().unwrap()]);
        assert_eq!(content_of(&self.started(&directory)), self.content());
    }

    /// Starts PostgreSQL on a restored directory and waits until it takes writes.
    #[track_caller]
    pub fn started(&self, directory: &Path) -> Server {
        let mut server = Server::new(15, directory, &self.scratch().folder("run"));
        server.set("archive_mode", "off").start();
        wait_for("recovery to end", || {
            server.try_sql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f").then_some(())
        });
        server
    }

    /// Returns what tells the table's content from any other.
    #[track_caller]
    pub fn content(&self) -> String {
        content_of(self)
    }

    /// Ends a segment while nothing archives it; returns its name.
    #[track_caller]
    pub fn end_segment(&self) -> String {
        self.sql("select pg_logical_emit_message(false, 'test', 'a record')");
        self.sql("select pg_walfile_name(pg_switch_wal())")
    }

    /// Returns the content that the archive has for a segment.
    #[track_caller]
    pub fn fetched(&self, segment: &str) -> Vec<u8> {
        let data = self.data_directory();
        let mut command = self.walden.command();
        command.args(["wal", "fetch", segment, "fetched"]).current_dir(data);
        Run::of(&mut command, "").expect_success();
        let content = fs::read(data.join("fetched")).unwrap();
        // The plan pins the end of the archive for a recovery; here each fetch is one of its own.
        for file in ["fetched", PLAN_FILE_NAME] {
            fs::remove_file(data.join(file)).unwrap();
        }
        content
    }
}

/// Returns what tells the content of the table on a server from any other.
#[track_caller]
pub fn content_of(server: &Server) -> String {
    server.sql(CONTENT)
}

/// Counts the files at or below a folder; what goes away meanwhile does not count.
pub fn files_below(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|it| if it.path().is_dir() { files_below(&it.path()) } else { 1 }).sum()
}
