//! A PostgreSQL cluster of a test's own: initialised, configured, started, and gone when dropped.
//!
//! Quick before durable: `fsync` is off unless a test asks for it, memory is small. Killing processes loses nothing
//! that was written even so; only a test that cuts the power needs more.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

use super::needs::bin_directory;
use super::server::Server;
use super::{Account, Run, Scratch};

/// Settings of every cluster, before those a test gives.
const SETTINGS: [(&str, &str); 8] = [
    ("fsync", "off"),
    ("shared_buffers", "16MB"),
    ("max_connections", "40"),
    ("max_wal_size", "256MB"),
    ("archive_mode", "on"),
    ("log_line_prefix", "%m [%p] "),
    ("log_checkpoints", "off"),
    ("timezone", "UTC"),
];

/// What a cluster is made with.
#[derive(Debug, Clone, Default)]
pub struct Options {
    no_checksums: bool,
    initdb: Vec<String>,
    settings: Vec<(String, String)>,
}

impl Options {
    /// Leaves the page checksums off, which are on otherwise.
    pub fn without_checksums(mut self) -> Self {
        self.no_checksums = true;
        self
    }

    /// Adds an option of initdb, such as `--wal-segsize=1`.
    pub fn initdb(mut self, option: &str) -> Self {
        self.initdb.push(option.to_owned());
        self
    }

    /// Adds a line to `postgresql.conf`.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A cluster in a folder of its own.
#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order: the server has to be gone before its folder.
    server: Server,
    scratch: Scratch,
}

impl Deref for Cluster {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl DerefMut for Cluster {
    fn deref_mut(&mut self) -> &mut Server {
        &mut self.server
    }
}

impl Cluster {
    /// Creates a cluster of a major version and starts it.
    #[track_caller]
    pub fn start(major: u32) -> Self {
        Self::start_with(major, Options::default())
    }

    /// Creates a cluster as `options` say and starts it.
    #[track_caller]
    pub fn start_with(major: u32, options: Options) -> Self {
        let scratch = Scratch::new();
        let data_directory = initdb(major, &scratch, &options);
        let run_directory = scratch.folder("run");
        let mut server = Server::new(major, &data_directory, &run_directory);
        server.start();
        Self { server, scratch }
    }

    /// Returns the folder the cluster is in, for what belongs to the same test.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }
}

#[track_caller]
fn initdb(major: u32, scratch: &Scratch, options: &Options) -> PathBuf {
    let data_directory = scratch.folder("data");
    let bin = bin_directory(major).unwrap_or_else(|| panic!("there is no PostgreSQL {major}"));
    let mut command = Account::of_postgresql().command(bin.join("initdb"));
    command.arg("-D").arg(&data_directory).args([
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--locale=C",
        "--no-sync",
    ]);
    if !options.no_checksums {
        command.arg("--data-checksums");
    } else if major >= 18 {
        command.arg("--no-data-checksums");
    }
    Run::of(command.args(&options.initdb), "").expect_success();
    let given = options.settings.iter().map(|(name, value)| (&**name, &**value));
    let lines = SETTINGS
        .into_iter()
        .chain(given)
        .map(|(name, value)| format!("{name} = '{}'\n", value.replace('\'', "''")));
    let path = data_directory.join("postgresql.conf");
    let conf = std::fs::read_to_string(&path).unwrap() + &lines.collect::<String>();
    std::fs::write(path, conf).unwrap();
    data_directory
}
