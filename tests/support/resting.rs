//! A cluster that writes nothing by itself and changes from round to round: what incremental basebackups are taken of.
//!
//! No vacuum of its own, no page written in the background: once a basebackup has begun with its checkpoint, the files of
//! the cluster stay as they are until the next change, so that a restore is compared with them byte by byte, whatever the
//! catalog knows of them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use super::{Cluster, Options, Run, Site, Source};

/// The cluster, its Walden and how often it was changed.
#[derive(Debug)]
pub struct Resting {
    source: Source,
    rounds: Cell<u32>,
}

/// A basebackup that was just taken, and the files that the cluster had then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    pub id: String,
    /// The basebackup whose chunks it names; none for a full one.
    pub parent: Option<String>,
    /// Why it is full, as it said itself; nothing where it is not, or where nobody heard it.
    pub full_because: String,
    pub stored_bytes: u64,
    pub files: Files,
}

/// What files hold, by their paths below a data directory.
pub type Files = BTreeMap<PathBuf, [u8; 32]>;

/// What changes, and what does not: more than the catalogs, which the start-up set takes along when it is written again.
const TABLES: &str = "create table kept as select n, md5(n::text) as text from generate_series(1, 40000) n;
    alter table kept add primary key (n); vacuum kept;
    create table noise as select string_agg(md5(n::text), '') as text from generate_series(1, 480000) n group by n / 8;";
/// Relations, their maps and the status of transactions.
const FOLDERS: [&str; 3] = ["base", "global", "pg_xact"];

impl Deref for Resting {
    type Target = Source;

    fn deref(&self) -> &Source {
        &self.source
    }
}

impl Resting {
    /// Starts a cluster with small segments that archives; `adjust` says how the site is configured.
    #[track_caller]
    pub fn start(adjust: impl FnOnce(&Cluster, Site) -> Site) -> Self {
        let options = Options::default().initdb("--wal-segsize=1");
        let options = options.setting("autovacuum", "off").setting("bgwriter_lru_maxpages", "0");
        let source = Source::configured(15, options, adjust);
        source.sql(TABLES);
        source.archive();
        Self { source, rounds: Cell::new(0) }
    }

    /// Changes some pages here and there, and adds, empties and removes relations.
    #[track_caller]
    pub fn change(&self) {
        let round = self.rounds.get();
        self.rounds.set(round + 1);
        let mut script = format!(
            "update kept set text = md5(text) where n % 401 = {round};
             delete from kept where n % 997 = {round};
             insert into kept select n, md5(n::text) from generate_series({0}, {0} + 199) n;
             create table round_{round} as select n, md5(n::text) as text from generate_series(1, 3000) n;\n",
            1_000_000 + round * 200,
        );
        if round >= 1 {
            script += &format!("truncate round_{};\n", round - 1);
        }
        if round >= 2 {
            script += &format!("drop table round_{};\n", round - 2);
        }
        if round % 3 == 2 {
            script += "vacuum kept;\n";
        }
        self.sql(&script);
    }

    /// Takes a basebackup.
    #[track_caller]
    pub fn back_up(&self) -> Taken {
        let report = self.walden.json(&["backup"]);
        let full_because = report["full_because"].as_str().unwrap_or_default().to_owned();
        let taken = Taken { full_because, ..self.taken(report["id"].as_str().unwrap()) };
        assert_eq!(taken.parent.is_none(), !taken.full_because.is_empty(), "{report}");
        assert_eq!(taken.parent.as_deref(), report["parent"].as_str(), "{report}");
        taken
    }

    /// Returns a basebackup that is listed and of which nothing has changed in the cluster since.
    #[track_caller]
    pub fn taken(&self, id: &str) -> Taken {
        let list = self.walden.json(&["list"]);
        let rows = list["basebackups"].as_array().unwrap();
        let row =
            rows.iter().find(|row| row["id"] == id).unwrap_or_else(|| panic!("{id} is not in {rows:?}"));
        Taken {
            id: id.to_owned(),
            parent: row["parent"].as_str().map(str::to_owned),
            full_because: String::new(),
            stored_bytes: row["stored_bytes"].as_u64().unwrap(),
            files: files_of(self.data_directory()),
        }
    }

    /// Restores a basebackup and compares every file with the cluster's of that time.
    #[track_caller]
    pub fn assert_exact(&self, taken: &Taken) {
        let directory = self.scratch().path().join(format!("restored-{}", taken.id));
        let restore = ["restore", &taken.id, "--target-dir", directory.to_str().unwrap()];
        Run::of(self.walden.command().args(restore), "").expect_success();
        let restored = files_of(&directory);
        let names = |files: &Files| files.keys().cloned().collect::<Vec<PathBuf>>();
        assert_eq!(names(&restored), names(&taken.files), "{}", taken.id);
        let different: Vec<&PathBuf> = taken
            .files
            .iter()
            .filter(|(path, hash)| restored[*path] != **hash)
            .map(|(path, _)| path)
            .collect();
        assert!(different.is_empty(), "{} restores others of {different:?}", taken.id);
        fs::remove_dir_all(&directory).unwrap();
    }
}

/// Returns what the files of a data directory hold, but for those that a server writes whenever it likes.
#[track_caller]
pub fn files_of(data_directory: &Path) -> Files {
    let mut files = Files::new();
    let mut waiting: Vec<PathBuf> = FOLDERS.iter().map(|folder| data_directory.join(folder)).collect();
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            if entry.file_type().unwrap().is_dir() {
                waiting.push(entry.path());
            } else if name != "pg_control" && !name.starts_with("pg_internal.init") {
                let below = entry.path().strip_prefix(data_directory).unwrap().to_owned();
                files.insert(below, *blake3::hash(&fs::read(entry.path()).unwrap()).as_bytes());
            }
        }
    }
    files
}
