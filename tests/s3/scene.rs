//! A store, a line to it that can be disturbed, and the binary at the near end.

use std::path::Path;

use crate::support::{Cluster, Options, Proxy, Run, S3, Scratch, Site, Sql, Walden, s3_storage};

/// Where nothing is heard for two seconds nothing will be; a call is tried again for a while longer.
pub const IMPATIENT: &str = "timeout = \"2s\"\nretry = \"30s\"\n";

/// A store in a folder behind a line.
pub struct Store {
    pub line: Proxy,
    pub s3: S3,
    // The folder goes last.
    pub scratch: Scratch,
}

impl Store {
    pub fn start() -> Self {
        let scratch = Scratch::new();
        let s3 = S3::over(&scratch.folder("objects"));
        Self { line: Proxy::to(&s3.endpoint()), s3, scratch }
    }

    /// Configures a binary for this store that has no server, with these lines of `[storage]`.
    pub fn walden(&self, storage: &str) -> Walden {
        let nowhere = Path::new("/nonexistent");
        let site = Site::of(&Sql::at(nowhere, 5432), nowhere).unencrypted().storage(storage);
        Walden::configure(&self.scratch, &site)
    }
}

/// A server whose backups go over a line.
pub struct Scene {
    pub cluster: Cluster,
    pub walden: Walden,
}

impl Scene {
    /// Starts a server that does not archive by itself; `adjust` says how the site is configured.
    pub fn start(storage: &str, adjust: impl Fn(Site) -> Site) -> Self {
        let cluster = Cluster::start_with(15, Options::default().initdb("--wal-segsize=1"));
        let site = Site::of(&cluster, cluster.data_directory())
            .storage(storage)
            .lines("[sites.main.archive]\nfetch_wait = \"4s\"\n");
        let walden = Walden::configure(cluster.scratch(), &adjust(site));
        Self { cluster, walden }
    }

    /// Starts a server behind a line.
    pub fn behind(line: &Proxy) -> Self {
        Self::start(&(s3_storage(&line.endpoint()) + IMPATIENT), |site| site)
    }

    /// Fetches a file of the archive as PostgreSQL does, from within its data directory.
    pub fn fetch(&self, name: &str, target: &Path) -> Run {
        let mut command = self.walden.command();
        command.args(["wal", "fetch", name]).arg(target).current_dir(self.cluster.data_directory());
        Run::of(&mut command, "")
    }

    /// Ends the current segment of WAL and returns its name.
    pub fn finished_segment(&self) -> String {
        self.cluster.sql("select pg_logical_emit_message(true, 'test', repeat(md5(random()::text), 8000))");
        self.cluster.sql("select pg_walfile_name(pg_switch_wal())")
    }

    /// Returns the path of a segment in the data directory.
    pub fn path(&self, segment: &str) -> String {
        self.cluster.data_directory().join("pg_wal").join(segment).to_str().unwrap().to_owned()
    }
}
