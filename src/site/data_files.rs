//! The files of a data directory and its tablespaces: whether Walden may read them, tried by opening some.
//!
//! A basebackup opens every file and fails at the first that it may not. To open millions for a check would take long,
//! so the number is bounded: every directory that a basebackup reads is listed, all files are opened where PostgreSQL
//! has one of a kind (directly in PGDATA, in `global/`, `PG_VERSION`, `pg_filenode.map`), and of the others as many of
//! each directory, the first in its listing, as the bound allows. Deliberately absent: what is in a file.

use std::collections::{HashSet, VecDeque};
use std::ffi::OsString;
use std::fs::{self, DirEntry, File};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk::Owner;
use crate::pg::{BackupRule, BackupRules, DataPath, InitForks};
use crate::site::item::Item;

/// The name of the line.
pub(super) const NAME: &str = "data files";

/// Files that are opened besides those of a kind: a second or two where the host has to look each of them up on a disk.
const FILES_MAX: u64 = 20_000;
/// Directories that are listed: a cluster of ten thousand databases is rare, and says so in the line.
const DIRECTORIES_MAX: usize = 10_000;
/// What the server itself writes to: relations, which are nobody else's. Configuration may well be root's.
const SERVERS_OWN: [&[u8]; 3] = [b"base/", b"global/", b"pg_tblspc/"];
/// The server has to read and write its files.
const SERVERS_MODE: u32 = 0o600;

/// A directory that a basebackup reads.
struct Folder {
    real: PathBuf,
    /// What the server calls it, relative to PGDATA; PGDATA itself is empty.
    path: Vec<u8>,
    /// Files in it that are not of a kind.
    files: u64,
}

/// A file or directory in one.
struct Child {
    real: PathBuf,
    path: Vec<u8>,
    is_directory: bool,
}

/// What was tried, and how it went.
#[derive(Debug, Default)]
struct Tried {
    found: u64,
    opened: u64,
    in_tablespaces: u64,
    /// How many files and directories refused, and what the first one said.
    refused: (u64, Option<String>),
    /// The same for files that the server itself may not read and write.
    unfit: (u64, Option<String>),
    /// Directories were left out.
    more: bool,
}

/// Opens files of a data directory as a basebackup would; `version_directory` is the cluster's in each tablespace.
pub(super) fn check_data_files(data_directory: &Path, version_directory: &str) -> Item {
    let server = match Owner::of(data_directory) {
        Ok(owner) => owner,
        Err(error) => return Item::failed(NAME, error.to_string(), "Name the server's own data directory."),
    };
    item_of(&try_files(data_directory, version_directory, server), server, Owner::current())
}

fn item_of(tried: &Tried, server: Owner, walden: Owner) -> Item {
    let Tried { opened, found, in_tablespaces, .. } = tried;
    let all = format!("{opened} of {found} files were opened, {in_tablespaces} of them in tablespaces");
    let all = if tried.more { format!("{all}; in the first {DIRECTORIES_MAX} directories") } else { all };
    let who = format!("the server runs as user {} and walden as user {}", server.user(), walden.user());
    match (&tried.refused, &tried.unfit) {
        ((0, _), (0, _)) => Item::ok(NAME, all),
        ((count @ 1.., first), _) => {
            let first = first.as_deref().unwrap_or_default();
            let detail = format!("{first}; {count} could not be opened; {all}");
            let hint = format!(
                "A basebackup fails there, and {who}: run walden as the server's user or as root, and give that user \
                 its files with chown and chmod."
            );
            Item::failed(NAME, detail, hint)
        }
        (_, (count, first)) => {
            let first = first.as_deref().unwrap_or_default();
            let hint = format!(
                "A basebackup can be taken, but {who}: give the server its files with chown and chmod."
            );
            Item::warning(NAME, format!("{first}, as are {count} files of the server's in all; {all}"), hint)
        }
    }
}

fn try_files(data_directory: &Path, version_directory: &str, server: Owner) -> Tried {
    let rules = BackupRules::new(version_directory);
    let mut tried = Tried::default();
    let folders = find_folders(data_directory, &rules, &mut tried);
    let share = share(folders.iter().map(|folder| folder.files).collect(), FILES_MAX);
    for folder in &folders {
        // What is gone by now was a table that has been dropped.
        let children = list(folder, &rules).unwrap_or_default();
        let mut room = share;
        for child in children.iter().filter(|child| !child.is_directory) {
            if !is_of_a_kind(&child.path) {
                if room == 0 {
                    continue;
                }
                room -= 1;
            }
            tried.open(child, server);
        }
    }
    tried
}

/// Lists PGDATA and what is below it, a level at a time; what a link leads back to is listed once.
fn find_folders(data_directory: &Path, rules: &BackupRules, tried: &mut Tried) -> Vec<Folder> {
    let mut folders = Vec::new();
    let mut seen = HashSet::new();
    let top = Folder { real: data_directory.to_owned(), path: Vec::new(), files: 0 };
    let mut pending = VecDeque::from([top]);
    while let Some(folder) = pending.pop_front() {
        if folders.len() == DIRECTORIES_MAX {
            tried.more = true;
            break;
        }
        let new = |metadata: fs::Metadata| seen.insert((metadata.dev(), metadata.ino()));
        if !fs::metadata(&folder.real).is_ok_and(new) {
            continue;
        }
        let children = match list(&folder, rules) {
            Ok(children) => children,
            Err(error) => {
                tried.refuse("list", &folder.real, &error);
                continue;
            }
        };
        let of_a_kind = |child: &&Child| !child.is_directory && !is_of_a_kind(&child.path);
        let files = children.iter().filter(of_a_kind).count() as u64;
        tried.found += children.iter().filter(|child| !child.is_directory).count() as u64;
        let directories = children.into_iter().filter(|child| child.is_directory);
        pending.extend(directories.map(|child| Folder { real: child.real, path: child.path, files: 0 }));
        folders.push(Folder { files, ..folder });
    }
    folders
}

/// Returns what a basebackup takes of a directory; links are followed as it follows them.
fn list(folder: &Folder, rules: &BackupRules) -> io::Result<Vec<Child>> {
    let entries: Vec<DirEntry> = fs::read_dir(&folder.real)?.collect::<io::Result<_>>()?;
    let names: Vec<OsString> = entries.iter().map(DirEntry::file_name).collect();
    let init_forks = InitForks::of(names.iter().map(|name| name.as_bytes()));
    let child = |(entry, name): (&DirEntry, &OsString)| {
        let between: &[u8] = if folder.path.is_empty() { b"" } else { b"/" };
        let path = [&folder.path[..], between, name.as_bytes()].concat();
        let rule = rules.rule(&DataPath::new(path.as_slice()).ok()?, &init_forks);
        let mut kind = entry.file_type().ok()?;
        if kind.is_symlink() {
            kind = fs::metadata(entry.path()).ok()?.file_type();
        }
        let taken = match rule {
            BackupRule::Take => kind.is_file() || kind.is_dir(),
            BackupRule::SkipContents | BackupRule::Skip => false,
        };
        taken.then(|| Child { real: entry.path(), path, is_directory: kind.is_dir() })
    };
    Ok(entries.iter().zip(&names).filter_map(child).collect())
}

/// Tells whether a path is one of the few without which nothing starts, or a database is not read.
fn is_of_a_kind(path: &[u8]) -> bool {
    let (folder, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => return true,
    };
    folder == b"global" || name == b"PG_VERSION" || name == b"pg_filenode.map"
}

/// Returns how many files of each directory make `max` at most in all, for directories with so many files.
fn share(mut counts: Vec<u64>, max: u64) -> u64 {
    counts.sort_unstable();
    let mut left = max;
    for (n, count) in counts.iter().enumerate() {
        let directories = (counts.len() - n) as u64;
        if count.saturating_mul(directories) > left {
            // One at least: a directory whose files are another's is seen by any of them.
            return (left / directories).max(1);
        }
        left -= count;
    }
    max
}

impl Tried {
    fn open(&mut self, child: &Child, server: Owner) {
        let opened = File::open(&child.real).and_then(|file| file.metadata());
        let metadata = match opened {
            Err(error) if error.kind() == ErrorKind::NotFound => return,
            Err(error) => return self.refuse("open", &child.real, &error),
            Ok(metadata) => metadata,
        };
        self.opened += 1;
        self.in_tablespaces += u64::from(child.path.starts_with(b"pg_tblspc/"));
        let own = SERVERS_OWN.iter().any(|folder| child.path.starts_with(folder));
        let fit = metadata.uid() == server.uid && metadata.mode() & SERVERS_MODE == SERVERS_MODE;
        if own && !fit {
            self.unfit.0 += 1;
            let (path, mode) = (child.real.display(), metadata.mode() & 0o7777);
            let user = Owner { uid: metadata.uid(), gid: metadata.gid() }.user();
            self.unfit.1.get_or_insert_with(|| {
                format!(
                    "\"{path}\" belongs to user {user} with mode {mode:04o}, and the server cannot use it"
                )
            });
        }
    }

    fn refuse(&mut self, action: &str, path: &Path, error: &io::Error) {
        // Dropped meanwhile.
        if error.kind() != ErrorKind::NotFound {
            self.refused.0 += 1;
            let message = || format!("could not {action} \"{}\": {error}", path.display());
            self.refused.1.get_or_insert_with(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const VERSION: &str = "PG_15_202209061";

    fn file(top: &Path, path: &str) {
        let path = top.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    #[test]
    fn what_a_basebackup_reads_is_opened_and_nothing_else() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("data");
        for path in ["PG_VERSION", "global/pg_control", "base/5/16384", "base/5/PG_VERSION", "pg_xact/0000"] {
            file(&data, path);
        }
        for left_out in ["postmaster.pid", "base/5/pg_internal.init", "base/5/t3_16390", "pg_wal/0001"] {
            file(&data, left_out);
        }
        file(scratch.path(), &format!("space/{VERSION}/5/16400"));
        file(scratch.path(), "space/PG_14_202107181/5/16400");
        fs::create_dir(data.join("pg_tblspc")).unwrap();
        symlink(scratch.path().join("space"), data.join("pg_tblspc/16399")).unwrap();
        // Where a link leads back there is no end.
        symlink(&data, data.join("base/5/back")).unwrap();
        symlink("nowhere", data.join("base/5/dangling")).unwrap();
        let tried = try_files(&data, VERSION, Owner::of(&data).unwrap());
        assert_eq!((tried.found, tried.opened, tried.in_tablespaces), (6, 6, 1), "{tried:?}");
        assert_eq!((tried.refused.0, tried.unfit.0, tried.more), (0, 0, false), "{tried:?}");
        let item = item_of(&tried, Owner { uid: 1, gid: 1 }, Owner { uid: 2, gid: 2 });
        assert_eq!(item.detail, "6 of 6 files were opened, 1 of them in tablespaces");

        let other = Owner { uid: u32::MAX - 1, gid: 0 };
        let tried = try_files(&data, VERSION, other);
        assert_eq!(tried.unfit.0, 4, "relations are the server's: {tried:?}");
    }

    #[test]
    fn the_bound_is_shared_by_the_directories_and_small_ones_leave_theirs_to_the_others() {
        for (counts, max, expected) in [
            (vec![], 100, 100),
            (vec![3, 5, 90], 100, 100),
            (vec![3, 5, 1000], 100, 92),
            (vec![1000, 3, 1000], 100, 48),
            (vec![1000; 50], 100, 2),
            (vec![1000; 500], 100, 1),
        ] {
            let share = share(counts.clone(), max);
            assert_eq!(share, expected, "{counts:?}");
            let opened: u64 = counts.iter().map(|count| share.min(*count)).sum();
            assert!(opened <= max.max(counts.len() as u64), "{counts:?}");
        }
    }

    #[test]
    fn files_of_a_kind_are_few_and_outside_the_share() {
        for path in
            ["PG_VERSION", "postgresql.conf", "global/1260", "base/5/PG_VERSION", "base/5/pg_filenode.map"]
        {
            assert!(is_of_a_kind(path.as_bytes()), "{path}");
        }
        for path in ["base/5/1259", "pg_xact/0000", "globals/1"] {
            assert!(!is_of_a_kind(path.as_bytes()), "{path}");
        }
    }
}
