//! A store, a line to it that can be disturbed, and the binary at the near end.

use std::path::Path;

use crate::support::{
    Checksums, Cluster, Options, Proxy, Run, S3, Scratch, Server, Site, Sql, Walden, s3_storage, wait_for,
};

/// Where nothing is heard for two seconds nothing will be; a call is tried again for a while longer.
pub const IMPATIENT: &str = "timeout = \"2s\"\nretry = \"30s\"\n";

/// Where a store that stays silent is given up soon.
pub const HASTY: &str = "timeout = \"1s\"\nretry = \"3s\"\n";

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

    /// Changes the lines of `[storage]` from now on.
    pub fn reach(&self, storage: &str) {
        let site = Site::of(&self.cluster, self.cluster.data_directory()).storage(storage);
        self.walden.reconfigure(self.cluster.scratch(), &site);
    }

    /// Names a data directory that is not there yet.
    pub fn place(&self, name: &str) -> String {
        self.cluster.scratch().path().join(name).to_str().unwrap().to_owned()
    }

    /// Starts a server on a restored directory, lets it recover to the end and compares every row with the source's.
    #[track_caller]
    pub fn assert_recovers(&self, directory: &str) {
        let mut server = Server::new(15, Path::new(directory), &self.cluster.scratch().folder("run"));
        server.set("archive_mode", "off").start();
        wait_for("recovery to end", || {
            server.try_sql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f").then_some(())
        });
        Checksums::of(&self.cluster).assert_same(&Checksums::of(&server));
    }

    /// Runs `walden check`, which has to find nothing wrong, and returns the names of its items.
    #[track_caller]
    pub fn checked(&self) -> Vec<String> {
        let items = self.walden.json(&["check"]);
        let items = items.as_array().unwrap();
        assert!(items.iter().all(|item| item["status"] != "failed"), "{items:#?}");
        items.iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Reads what `walden info` says, without what only the moment of asking decides.
    #[track_caller]
    pub fn info(&self) -> serde_json::Value {
        let mut info = self.walden.json(&["info"]);
        forget_ages(&mut info);
        info
    }
}

fn forget_ages(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            fields.remove("age_seconds");
            fields.values_mut().for_each(forget_ages);
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(forget_ages),
        _ => {}
    }
}
