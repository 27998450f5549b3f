//! A source with a repository that archives, and restores of it as servers.

use std::path::PathBuf;

use crate::support::{Options, Server, Sql, wait_for};

pub use crate::support::Source;

impl Source {
    /// Starts a cluster that archives with `walden wal push`.
    #[track_caller]
    pub fn start(options: Options) -> Self {
        Self::start_major(15, options)
    }

    #[track_caller]
    pub fn start_major(major: u32, options: Options) -> Self {
        let fetch_wait = "[sites.main.archive]\nfetch_wait = \"2s\"\n";
        let source = Self::configured(major, options, |_, site| site.lines(fetch_wait));
        source.archive();
        source
    }

    /// Takes a basebackup and returns its id.
    #[track_caller]
    pub fn backup(&self) -> String {
        self.walden.json(&["backup"])["id"].as_str().unwrap().to_owned()
    }

    /// A directory that is not there yet.
    pub fn place(&self, name: &str) -> PathBuf {
        self.scratch().path().join(name)
    }

    /// Restores into a new directory and returns the report.
    #[track_caller]
    pub fn restore(&self, name: &str, options: &[&str]) -> serde_json::Value {
        let directory = self.place(name);
        let command = ["restore", "--target-dir", directory.to_str().unwrap()];
        self.walden.json(&[&command[..], options].concat())
    }

    /// Makes a server of a restored directory, not yet started, that does not archive.
    pub fn server(&self, name: &str) -> Server {
        let mut server = Server::new(15, &self.place(name), &self.scratch().folder("run"));
        server.set("archive_mode", "off");
        server
    }

    /// Restores, starts, and waits until recovery has ended.
    #[track_caller]
    pub fn recovered(&self, name: &str, options: &[&str]) -> Server {
        self.restore(name, options);
        let mut server = self.server(name);
        server.start();
        wait_until_writable(&server);
        server
    }
}

/// Waits until a server takes writes.
#[track_caller]
pub fn wait_until_writable(server: &Sql) {
    wait_for("recovery to end", || {
        server.try_sql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f").then_some(())
    });
}
