//! What of a data directory belongs into a physical backup.
//!
//! The lists are those of the server's `basebackup.c`: what a server removes or rebuilds when it starts is left
//! out, and so is what would make the copy believe it were something else (an old `backup_label`, `standby.signal`).
//! Where the server excludes a directory's contents wherever its name appears, Walden does so only where PostgreSQL
//! has that directory; an extension may call its own as it likes.
//!
//! Deliberately absent: sockets, devices and links (what an entry is, not what it is called), and `global/pg_control`,
//! which is taken, but last.

use std::collections::HashSet;

use super::data_path::DataPath;
use super::oid::Oid;
use super::relation_file::{DatabaseFolder, FileName, Fork};

/// What a backup does with one entry of the data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupRule {
    Take,
    /// The directory is taken, what is in it is not.
    SkipContents,
    Skip,
}

/// The rules for one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRules {
    tablespace_folder: String,
}

/// The unlogged relations of one directory: those that have an init fork there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InitForks(HashSet<Oid>);

/// Directories below PGDATA whose contents a starting server does not need or must not have.
const SKIP_CONTENTS: [&[u8]; 10] = [
    b"pg_dynshmem",
    b"pg_notify",
    b"pg_replslot",
    b"pg_serial",
    b"pg_snapshots",
    b"pg_stat_tmp",
    b"pg_subtrans",
    // The log is replayed from the archive; the two directories are expected to exist.
    b"pg_wal",
    b"pg_wal/archive_status",
    b"pg_wal/summaries",
];

/// Files directly below PGDATA.
const SKIP_FILES: [&[u8]; 9] = [
    b"postmaster.pid",
    b"postmaster.opts",
    b"postgresql.auto.conf.tmp",
    b"current_logfiles.tmp",
    b"backup_label",
    b"tablespace_map",
    b"backup_manifest",
    b"standby.signal",
    b"recovery.signal",
];

/// Beginnings of names that are left out wherever they appear: caches, and files and folders of running queries.
const SKIP_PREFIXES: [&[u8]; 2] = [b"pg_internal.init", b"pgsql_tmp"];

impl BackupRules {
    /// Creates the rules for a cluster whose folder in every tablespace is `tablespace_folder`
    /// (`PG_15_202209061`).
    pub fn new(tablespace_folder: impl Into<String>) -> Self {
        Self { tablespace_folder: tablespace_folder.into() }
    }

    /// Decides about one entry.
    ///
    /// `init_forks` are those of the directory the entry is in. Entries below a skipped directory are skipped
    /// themselves, except that nothing is asked about what lies below a skipped file.
    pub fn rule(&self, path: &DataPath, init_forks: &InitForks) -> BackupRule {
        if SKIP_CONTENTS.contains(&path.as_bytes()) {
            return BackupRule::SkipContents;
        }
        let excluded = |component: &[u8]| SKIP_PREFIXES.iter().any(|prefix| component.starts_with(prefix));
        let skip = SKIP_FILES.contains(&path.as_bytes())
            || SKIP_CONTENTS.iter().any(|folder| path.is_within(folder))
            || path.components().any(excluded)
            || self.is_of_another_version(path)
            || is_rebuilt_relation(path, init_forks);
        if skip { BackupRule::Skip } else { BackupRule::Take }
    }

    /// Tells whether a path in a tablespace is not this cluster's: `pg_upgrade` leaves the old version's folder beside
    /// the new one, and a tablespace may be a mount point with `lost+found`.
    fn is_of_another_version(&self, path: &DataPath) -> bool {
        let mut components = path.components();
        match (components.next(), components.next(), components.next()) {
            (Some(b"pg_tblspc"), Some(_), Some(folder)) => folder != self.tablespace_folder.as_bytes(),
            _ => false,
        }
    }
}

/// Tells whether a starting server would remove the file: a temporary relation, or an unlogged one, which it makes
/// anew from the init fork.
fn is_rebuilt_relation(path: &DataPath, init_forks: &InitForks) -> bool {
    let Some(folder) = DatabaseFolder::of(path) else { return false };
    let Some(name) = FileName::parse(path.file_name()) else { return false };
    let in_database = folder.database != Oid::INVALID;
    in_database && (name.temporary || name.fork != Fork::Init && init_forks.contains(name.relfilenode))
}

impl InitForks {
    /// Collects them from the names in one directory.
    pub fn of<N: AsRef<[u8]>>(names: impl IntoIterator<Item = N>) -> Self {
        let parsed = names.into_iter().filter_map(|name| FileName::parse(name.as_ref()));
        let init = parsed.filter(|name| name.fork == Fork::Init && !name.temporary && name.segment == 0);
        Self(init.map(|name| name.relfilenode).collect())
    }

    /// Returns those of a directory without unlogged relations.
    pub fn none() -> Self {
        Self::default()
    }

    /// Tells whether the relation is unlogged.
    pub fn contains(&self, relfilenode: Oid) -> bool {
        self.0.contains(&relfilenode)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(path: &str, init_forks: &InitForks) -> BackupRule {
        BackupRules::new("PG_15_202209061").rule(&DataPath::new(path).unwrap(), init_forks)
    }

    #[test]
    fn every_entry_of_the_list_has_its_rule() {
        use BackupRule::{Skip, SkipContents, Take};
        let cases = [
            ("PG_VERSION", Take),
            ("postgresql.conf", Take),
            ("postgresql.auto.conf", Take),
            ("postgresql.auto.conf.tmp", Skip),
            ("conf.d/x.auto.conf.tmp", Take),
            ("current_logfiles", Take),
            ("current_logfiles.tmp", Skip),
            ("postmaster.pid", Skip),
            ("postmaster.opts", Skip),
            ("backup_label", Skip),
            ("backup_label.old", Take),
            ("tablespace_map", Skip),
            ("backup_manifest", Skip),
            ("standby.signal", Skip),
            ("recovery.signal", Skip),
            ("mine/recovery.signal", Take),
            ("pg_wal", SkipContents),
            ("pg_wal/000000010000000000000001", Skip),
            ("pg_wal/00000002.history", Skip),
            ("pg_wal/archive_status", SkipContents),
            ("pg_wal/archive_status/000000010000000000000001.ready", Skip),
            ("pg_wal/summaries", SkipContents),
            ("pg_wal/summaries/x.summary", Skip),
            ("pg_replslot", SkipContents),
            ("pg_replslot/standby", Skip),
            ("pg_replslot/standby/state", Skip),
            ("pg_dynshmem", SkipContents),
            ("pg_notify/0000", Skip),
            ("pg_serial/0000", Skip),
            ("pg_snapshots/0", Skip),
            ("pg_stat_tmp/global.stat", Skip),
            ("pg_subtrans/0000", Skip),
            ("extension/pg_notify/queue", Take),
            ("pg_notify_not", Take),
            ("pg_twophase/0000000A", Take),
            ("pg_logical/mappings/map-x", Take),
            ("pg_xact/0000", Take),
            ("pg_stat/pgstat.stat", Take),
            ("global/pg_control", Take),
            ("global/pg_filenode.map", Take),
            ("global/pg_internal.init", Skip),
            ("base/5/pg_internal.init", Skip),
            ("base/5/pg_internal.init.123", Skip),
            ("base/pgsql_tmp", Skip),
            ("base/pgsql_tmp/pgsql_tmp1.0", Skip),
            ("base/pgsql_tmp/pgsql_tmp1.0.fileset/x", Skip),
            ("base/5/16384", Take),
            ("base/5/t3_16384", Skip),
            ("base/5/t3_16384_vm.1", Skip),
            ("base/5/t3_16384.sql", Take),
            ("log/t3_16384", Take),
            ("pg_tblspc", Take),
            ("pg_tblspc/16390", Take),
            ("pg_tblspc/16390/PG_15_202209061", Take),
            ("pg_tblspc/16390/PG_15_202209061/5/16391", Take),
            ("pg_tblspc/16390/PG_15_202209061/5/t3_16391", Skip),
            ("pg_tblspc/16390/PG_15_202209061/pgsql_tmp/pgsql_tmp1.0", Skip),
            ("pg_tblspc/16390/PG_14_202107181", Skip),
            ("pg_tblspc/16390/PG_14_202107181/5/16391", Skip),
            ("pg_tblspc/16390/lost+found", Skip),
        ];
        for (path, expected) in cases {
            assert_eq!(rule(path, &InitForks::none()), expected, "{path}");
        }
    }

    #[test]
    fn of_an_unlogged_relation_only_the_init_fork_is_taken() {
        let names = [
            "16384",
            "16384_init",
            "16384.1",
            "16384_fsm",
            "16385",
            "x_init",
            "t1_16386_init",
            "16387_init.1",
        ];
        let init_forks = InitForks::of(names);
        for (name, expected) in [
            ("16384", BackupRule::Skip),
            ("16384.1", BackupRule::Skip),
            ("16384_fsm", BackupRule::Skip),
            ("16384_init", BackupRule::Take),
            ("16385", BackupRule::Take),
            ("16386", BackupRule::Take),
            ("16387", BackupRule::Take),
        ] {
            assert_eq!(rule(&format!("base/5/{name}"), &init_forks), expected, "{name}");
        }
        assert_eq!(rule("global/16384", &init_forks), BackupRule::Take);
        assert_eq!(rule("mine/16384", &init_forks), BackupRule::Take);
        assert_eq!(InitForks::of([b"16384_init\xff"]), InitForks::none());
    }

    proptest! {
        #[test]
        fn what_lies_below_a_skipped_directory_is_skipped(
            folder in prop::sample::select(&SKIP_CONTENTS[..]),
            name in prop::collection::vec(1u8.., 1..20),
        ) {
            let Ok(path) = DataPath::new(folder).unwrap().join(&name) else { return Ok(()) };
            let below = BackupRules::new("PG_15_202209061").rule(&path, &InitForks::none());
            let nested = SKIP_CONTENTS.contains(&path.as_bytes());
            prop_assert_eq!(below, if nested { BackupRule::SkipContents } else { BackupRule::Skip });
        }
    }
}
