//! What is damaged: the repository of a real cluster, with a basebackup on each side of a timeline switch and WAL.
//!
//! Everything is made once a test; each case begins by putting the pristine repository back in its place, so that
//! the configuration never changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Cluster, Options, Run, Site, Stop, Walden, wait_for};

/// A cluster, its Walden and a repository that is put back for every case.
#[derive(Debug)]
pub struct Source {
    // Dropped in this order: the server has to be gone before its folder.
    pub walden: Walden,
    pub cluster: Cluster,
    /// Their ids, the older one first.
    pub ids: [String; 2],
    /// A segment behind the second basebackup.
    pub segment: String,
    /// A segment behind that one.
    pub later_segment: String,
}

/// Rows that no recovery touches, larger than any one pack's share of them.
const TABLE: &str = "create table kept as select n, md5(n::text) as text from generate_series(1, 40000) n;
    alter table kept add primary key (n); vacuum freeze kept; checkpoint";

impl Source {
    /// Backs a cluster up on timeline 1 and on timeline 2; `adjust` says how the site is configured.
    pub fn create(adjust: impl Fn(Site) -> Site) -> Self {
        let mut cluster = Cluster::start_with(15, Options::default().initdb("--wal-segsize=1"));
        let site = Site::of(&cluster, cluster.data_directory())
            .bin_directory(&cluster.bin_directory())
            .lines("[sites.main.archive]\nfetch_wait = \"1s\"\n");
        let walden = Walden::configure(cluster.scratch(), &adjust(site));
        cluster.set_archive_command(&walden.archive_command());
        cluster.sql(TABLE);
        walden.run(&["backup", "--checkpoint", "fast"]);
        promote(&mut cluster);
        cluster.sql("create table late as select n from generate_series(1, 1000) n; vacuum freeze late");
        // Full, so that what is damaged of one is not the other's.
        walden.run(&["backup", "--full", "--checkpoint", "fast"]);
        cluster.sql("insert into late select n from generate_series(1, 1000) n");
        let segment = cluster.archive_wal();
        cluster.sql("insert into late select n from generate_series(1, 1000) n");
        let later_segment = cluster.archive_wal();
        let source = Self { ids: ids(&walden), segment, later_segment, walden, cluster };
        copy(&source.walden.repository(), &source.pristine());
        source
    }

    /// Puts the pristine objects in their places, in the folder that a running clone has open.
    pub fn restore(&self) {
        let repository = self.walden.repository();
        fs::remove_dir_all(self.site()).unwrap();
        copy(&self.pristine().join("main"), &repository.join("main"));
    }

    /// Returns the folder of the site in the repository.
    pub fn site(&self) -> PathBuf {
        self.walden.repository().join("main")
    }

    /// Returns the folder of a basebackup, 0 for the older.
    pub fn basebackup(&self, n: usize) -> PathBuf {
        self.site().join("basebackups").join(&self.ids[n])
    }

    /// Returns the packs of a basebackup in their order.
    pub fn packs(&self, n: usize) -> Vec<PathBuf> {
        files_below(&self.basebackup(n).join("packs"))
    }

    /// Returns the object of a file of the WAL archive.
    pub fn wal_object(&self, name: &str) -> PathBuf {
        let objects = files_below(&self.site().join("clusters"));
        let found = objects.into_iter().find(|object| object.file_name().is_some_and(|leaf| leaf == name));
        found.unwrap_or_else(|| panic!("{name} is not in the archive"))
    }

    fn pristine(&self) -> PathBuf {
        self.walden.repository().with_file_name("pristine")
    }
}

/// Lets the server end a recovery, which begins the next timeline and archives its history.
fn promote(cluster: &mut Cluster) {
    cluster.stop(Stop::Fast);
    fs::write(cluster.data_directory().join("standby.signal"), "").unwrap();
    cluster.start();
    cluster.sql("select pg_promote()");
    cluster.wait_until_archived("00000002.history");
}

fn ids(walden: &Walden) -> [String; 2] {
    let list = walden.json(&["list"]);
    let rows = list["basebackups"].as_array().unwrap().iter();
    let ids: Vec<String> = rows.map(|row| row["id"].as_str().unwrap().to_owned()).collect();
    ids.try_into().unwrap()
}

/// Lists the files below a folder, sorted by their paths.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            files.extend(files_below(&entry.path()));
        } else if entry.file_type().unwrap().is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    files
}

/// Copies a tree with its owners, as `cp -a` does.
fn copy(from: &Path, to: &Path) {
    // Into the folder where there is one: a mount that has just ended may still write the end of its lease.
    Run::of(Command::new("cp").args(["-a", "-T"]).arg(from).arg(to), "").expect_success();
}

/// Waits until nothing is mounted on a folder any more.
pub fn wait_until_unmounted(folder: &Path) {
    let is_mounted = || {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().any(|line| line.split(' ').nth(1).is_some_and(|point| Path::new(point) == folder))
    };
    wait_for("the mount to be gone", || (!is_mounted()).then_some(()));
}
