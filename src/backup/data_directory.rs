//! The walk: every directory, file and link below PGDATA and its tablespaces, as a list with sizes and modes.
//!
//! Names are bytes. What PostgreSQL makes anew is left out by the rules of `pg`. Tablespaces stand in trees of their
//! own; configuration outside PGDATA stands below `config/` under its full path. A link that leaves PGDATA is
//! replaced by what it points to, once; links that stay inside stay links (`links`). Special files are passed over
//! with a warning, vanished ones without: the server is running. Deliberately absent: reading, and any order.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::backup::error::Error;
use crate::backup::links::{LinkPlan, Links};
use crate::pg::{BackupRule, BackupRules, DataPath, InitForks, RelationFile};
use crate::repo::{
    entry::{Entry, Node, TreePath},
    manifest::{OutsideLink, Tablespace},
};

/// What to walk.
#[derive(Debug, Clone, Default)]
pub struct WalkOptions {
    /// PGDATA.
    pub data_directory: PathBuf,
    /// The directory of this version in a tablespace, `PG_15_202209061`.
    pub version_directory: String,
    /// Names of tablespaces by oid, as the server has them.
    pub tablespace_names: BTreeMap<u32, String>,
    /// Configuration files the server reads, in and outside PGDATA.
    pub configuration: Vec<PathBuf>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct SourceTree {
    /// Regular files to be copied, without `pg_control`.
    pub files: Vec<SourceFile>,
    /// Directories and links, complete.
    pub entries: Vec<Entry>,
    /// Where trees and followed links really are.
    pub roots: Vec<Root>,
    /// Tablespaces other than the built-in ones.
    pub tablespaces: Vec<Tablespace>,
    /// Links that were replaced by what they point to.
    pub links: Vec<OutsideLink>,
    /// Names below `config/` of the configuration files outside PGDATA, in the order of the options.
    pub outside_configuration: Vec<String>,
    /// What was passed over, for people.
    pub warnings: Vec<String>,
    /// Files and directories that were gone before they could be looked at.
    pub vanished: u64,
}

/// A regular file of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it will stand.
    pub path: TreePath,
    /// The root below which it is now; see [`SourceTree::source_path`].
    pub root: u32,
    /// Its size at the walk.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Time of last modification.
    pub modified: Timestamp,
    /// What tells whether it is still the one it was; none where the source has no inodes.
    pub identity: Option<FileIdentity>,
}

/// What tells whether a file is still the one it was, and was not written since: every write gives it another ctime,
/// which, unlike the time of last modification, nobody can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    /// The file system it is on.
    pub device: u64,
    /// Its inode there.
    pub inode: u64,
    /// Its ctime.
    pub changed: Timestamp,
}

/// A directory or file of the source whose place in the tree is not given by its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// Where it stands in the basebackup.
    pub tree: TreePath,
    /// Where it is.
    pub real: PathBuf,
}

/// `pg_control` is read last; what a restore left would mislead the next one, its private area above all, which a crash
/// may have left beside a server that was started; the others were renamed by a recovery and say nothing any more.
const LEFT_OUT: [&[u8]; 6] = [
    b"data/global/pg_control",
    b"data/.walden",
    b"data/walden.plan.json",
    b"data/walden.restore.json",
    b"data/backup_label.old",
    b"data/tablespace_map.old",
];
const TABLESPACE_LINKS: &[u8] = b"data/pg_tblspc";

impl SourceTree {
    /// Walks the data directory and everything that belongs to it.
    ///
    /// # Errors
    /// Where a directory cannot be read; what vanishes meanwhile is counted.
    pub fn walk(options: &WalkOptions) -> Result<Self, Error> {
        let real = fs::canonicalize(&options.data_directory)
            .map_err(Error::reading("find", &options.data_directory))?;
        let mut walker = Walker {
            options,
            rules: BackupRules::new(&options.version_directory),
            tree: Self::default(),
            links: Links::default(),
            pending: Vec::new(),
        };
        walker.root_directory("data", &real, b"")?;
        walker.finish_pending()?;
        walker.tablespaces()?;
        walker.configuration(&real)?;
        Ok(walker.tree)
    }

    /// Returns where `file` is.
    pub fn source_path(&self, file: &SourceFile) -> PathBuf {
        let root = &self.roots[file.root as usize];
        let below = file.path.strip(root.tree.as_bytes()).unwrap_or_default();
        if below.is_empty() { root.real.clone() } else { root.real.join(OsStr::from_bytes(below)) }
    }
}

impl SourceFile {
    /// Returns the relation whose file it is.
    pub fn relation(&self) -> Option<RelationFile> {
        RelationFile::classify(&DataPath::new(server_path(&self.path)?).ok()?)
    }
}

/// Returns what the server calls a file of the basebackup, relative to its data directory.
pub fn server_path(tree: &TreePath) -> Option<Vec<u8>> {
    if let Some(below) = tree.strip(b"tablespaces") {
        return Some([b"pg_tblspc/", below].concat());
    }
    Some(tree.strip(b"data")?.to_vec())
}

struct Walker<'a> {
    options: &'a WalkOptions,
    rules: BackupRules,
    tree: SourceTree,
    links: Links,
    /// Directories that are still to be listed.
    pending: Vec<Directory>,
}

/// A directory that is part of the tree and whose children are to be.
struct Directory {
    tree: TreePath,
    real: PathBuf,
    root: u32,
}

impl Walker<'_> {
    /// Begins a tree of its own at `top`, whose content the rules see below `pg_path`.
    fn root_directory(&mut self, top: &str, real: &Path, pg_path: &[u8]) -> Result<(), Error> {
        let tree = TreePath::new(top)?;
        let metadata = fs::metadata(real).map_err(Error::reading("look up", real))?;
        self.links.begin_tree(&tree, real, pg_path);
        self.push_entry(tree.clone(), &metadata, Node::Directory)?;
        let root = self.push_root(&tree, real);
        self.pending.push(Directory { tree, real: real.to_owned(), root });
        Ok(())
    }

    fn finish_pending(&mut self) -> Result<(), Error> {
        while let Some(directory) = self.pending.pop() {
            self.list(&directory)?;
        }
        Ok(())
    }

    fn list(&mut self, directory: &Directory) -> Result<(), Error> {
        let listing = match fs::read_dir(&directory.real) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.tree.vanished += 1;
                return Ok(());
            }
            other => other.map_err(Error::reading("list", &directory.real))?,
        };
        let names: Vec<OsString> = listing
            .map(|child| Ok(child.map_err(Error::reading("list", &directory.real))?.file_name()))
            .collect::<Result<_, Error>>()?;
        let init_forks = InitForks::of(names.iter().map(|name| name.as_bytes()));
        for name in names {
            let tree = directory.tree.join(name.as_bytes())?;
            let rule = self.rule(&tree, &init_forks);
            if rule != BackupRule::Skip && !LEFT_OUT.contains(&tree.as_bytes()) {
                self.child(directory.root, tree, directory.real.join(&name), rule)?;
            }
        }
        Ok(())
    }

    fn child(&mut self, root: u32, tree: TreePath, real: PathBuf, rule: BackupRule) -> Result<(), Error> {
        let Some(metadata) = self.look_up(&real)? else {
            return Ok(());
        };
        if metadata.file_type().is_symlink() {
            return self.symlink(tree, real, rule);
        }
        if metadata.is_file() {
            return self.push_file(tree, root, &metadata);
        }
        if !metadata.is_dir() {
            self.tree.warnings.push(format!("\"{}\" is a special file and is left out", real.display()));
            return Ok(());
        }
        if let Some(oid) = in_place_tablespace(&tree) {
            let name = self.options.tablespace_names.get(&oid).cloned().unwrap_or_default();
            self.tree.tablespaces.push(Tablespace { oid, location: Vec::new(), name });
        }
        // A followed link led above a place that is in the tree already: that place stands for it.
        if let Some(target) = self.links.place_of(&tree, &real) {
            return self.push_entry(tree, &metadata, Node::Symlink(target));
        }
        self.push_entry(tree.clone(), &metadata, Node::Directory)?;
        if rule == BackupRule::Take {
            self.pending.push(Directory { tree, real, root });
        }
        Ok(())
    }

    fn symlink(&mut self, tree: TreePath, real: PathBuf, rule: BackupRule) -> Result<(), Error> {
        let text = match fs::read_link(&real) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.tree.vanished += 1;
                return Ok(());
            }
            other => other.map_err(Error::reading("read the link", &real))?.into_os_string().into_vec(),
        };
        if let Some(oid) = tablespace_link(&tree) {
            let name = self.options.tablespace_names.get(&oid).cloned().unwrap_or_default();
            self.tree.tablespaces.push(Tablespace { oid, location: text, name });
            return Ok(());
        }
        match self.links.plan(&tree, &real, &text).map_err(Error::reading("follow the link", &real))? {
            LinkPlan::Keep(target) => {
                let metadata = fs::symlink_metadata(&real).map_err(Error::reading("look up", &real))?;
                self.push_entry(tree, &metadata, Node::Symlink(target))
            }
            LinkPlan::Dangling => {
                self.tree.warnings.push(format!(
                    "\"{}\" points to \"{}\", which does not exist, and is left out",
                    real.display(),
                    String::from_utf8_lossy(&text)
                ));
                Ok(())
            }
            LinkPlan::Follow(target) => self.follow(tree, text, target, rule),
        }
    }

    /// Puts what a link points to in its place.
    fn follow(
        &mut self,
        tree: TreePath,
        text: Vec<u8>,
        target: PathBuf,
        rule: BackupRule,
    ) -> Result<(), Error> {
        let Some(metadata) = self.look_up(&target)? else {
            return Ok(());
        };
        if !metadata.is_dir() && !metadata.is_file() {
            self.tree.warnings.push(format!("\"{}\" is a special file and is left out", target.display()));
            return Ok(());
        }
        self.tree.links.push(OutsideLink { path: tree.clone(), target: text });
        let root = self.push_root(&tree, &target);
        if metadata.is_file() {
            return self.push_file(tree, root, &metadata);
        }
        self.push_entry(tree.clone(), &metadata, Node::Directory)?;
        if rule == BackupRule::Take {
            self.links.followed(&tree, &target);
            self.pending.push(Directory { tree, real: target, root });
        }
        Ok(())
    }

    fn tablespaces(&mut self) -> Result<(), Error> {
        let linked: Vec<(u32, Vec<u8>)> = self
            .tree
            .tablespaces
            .iter()
            .filter(|tablespace| !tablespace.location.is_empty())
            .map(|tablespace| (tablespace.oid, tablespace.location.clone()))
            .collect();
        for (oid, location) in &linked {
            let links = self.options.data_directory.join("pg_tblspc");
            let location = links.join(OsStr::from_bytes(location));
            let real = match fs::canonicalize(&location) {
                Ok(real) => real,
                // Dropped since the link was read: WAL replay drops it as well.
                Err(_) if is_absent(&links.join(oid.to_string())) => {
                    self.tree.vanished += 1;
                    self.tree.tablespaces.retain(|tablespace| tablespace.oid != *oid);
                    continue;
                }
                Err(source) => return Err(Error::Tablespace { oid: *oid, path: location, source }),
            };
            if !self.tree.entries.iter().any(|entry| entry.path.as_bytes() == b"tablespaces") {
                self.push_made_directory("tablespaces")?;
            }
            self.root_directory(&format!("tablespaces/{oid}"), &real, format!("pg_tblspc/{oid}").as_bytes())?;
            self.finish_pending()?;
        }
        self.tree.tablespaces.sort_by_key(|tablespace| tablespace.oid);
        Ok(())
    }

    /// Adds the configuration files that are not below PGDATA, with the directories above them.
    fn configuration(&mut self, data_directory: &Path) -> Result<(), Error> {
        let mut made: Vec<TreePath> = Vec::new();
        for path in &self.options.configuration {
            let Ok(real) = fs::canonicalize(path) else {
                self.tree.warnings.push(format!("configuration file \"{}\" does not exist", path.display()));
                continue;
            };
            let name = path.strip_prefix("/").unwrap_or(path).to_string_lossy().into_owned();
            if real.starts_with(data_directory) || self.tree.outside_configuration.contains(&name) {
                continue;
            }
            let metadata = fs::metadata(&real).map_err(Error::reading("look up", &real))?;
            let mut above = TreePath::new("config")?;
            for part in Path::new(&name).parent().into_iter().flat_map(Path::components) {
                made.push(above.clone());
                above = above.join(part.as_os_str().as_bytes())?;
            }
            made.push(above.clone());
            let tree = TreePath::new(format!("config/{name}"))?;
            let root = self.push_root(&tree, &real);
            self.push_file(tree, root, &metadata)?;
            self.tree.outside_configuration.push(name);
        }
        made.sort();
        made.dedup();
        made.iter().try_for_each(|path| self.push_made_directory(&path.to_string()))
    }

    fn rule(&self, tree: &TreePath, init_forks: &InitForks) -> BackupRule {
        match DataPath::new(self.links.pg_path(tree)) {
            Ok(path) => self.rules.rule(&path, init_forks),
            // Longer than any path of PostgreSQL's.
            Err(_) => BackupRule::Take,
        }
    }

    fn look_up(&mut self, real: &Path) -> Result<Option<Metadata>, Error> {
        match fs::symlink_metadata(real) {
            Ok(metadata) => Ok(Some(metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.tree.vanished += 1;
                Ok(None)
            }
            Err(error) => Err(Error::reading("look up", real)(error)),
        }
    }

    fn push_root(&mut self, tree: &TreePath, real: &Path) -> u32 {
        self.tree.roots.push(Root { tree: tree.clone(), real: real.to_owned() });
        self.tree.roots.len() as u32 - 1
    }

    fn push_file(&mut self, path: TreePath, root: u32, metadata: &Metadata) -> Result<(), Error> {
        let (mode, modified) = mode_and_time(metadata);
        let identity = FileIdentity::of(metadata);
        self.tree.files.push(SourceFile { path, root, size: metadata.len(), mode, modified, identity });
        Ok(())
    }

    fn push_entry(&mut self, path: TreePath, metadata: &Metadata, node: Node) -> Result<(), Error> {
        let (mode, modified) = mode_and_time(metadata);
        self.tree.entries.push(Entry { path, mode, modified, node });
        Ok(())
    }

    /// Adds a directory of the tree that is none of the source.
    fn push_made_directory(&mut self, path: &str) -> Result<(), Error> {
        let path = TreePath::new(path)?;
        let modified = self.tree.entries.first().map_or(Timestamp::UNIX_EPOCH, |data| data.modified);
        self.tree.entries.push(Entry { path, mode: 0o700, modified, node: Node::Directory });
        Ok(())
    }
}

impl FileIdentity {
    /// Returns that of a file; none where its ctime is no time.
    pub fn of(metadata: &Metadata) -> Option<Self> {
        let nanoseconds = i32::try_from(metadata.ctime_nsec()).ok()?;
        let changed = Timestamp::new(metadata.ctime(), nanoseconds).ok()?;
        Some(Self { device: metadata.dev(), inode: metadata.ino(), changed })
    }
}

/// Returns permission bits and time of last modification.
pub fn mode_and_time(metadata: &Metadata) -> (u32, Timestamp) {
    let nanoseconds = i32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    // Times outside the years -9999 to 9999 are not worth a failed backup.
    let modified = Timestamp::new(metadata.mtime(), nanoseconds).unwrap_or(Timestamp::UNIX_EPOCH);
    (metadata.mode() & 0o7777, modified)
}

/// Returns whether nothing is at `path`, not even a link that leads nowhere.
fn is_absent(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Returns the oid where `tree` is `data/pg_tblspc/<oid>`.
fn tablespace_link(tree: &TreePath) -> Option<u32> {
    let (parent, name) = tree.split();
    (parent == TABLESPACE_LINKS).then(|| std::str::from_utf8(name).ok()?.parse().ok()).flatten()
}

/// Returns the oid where a directory (not a link) stands in `pg_tblspc`, as PostgreSQL 15 and later allow.
fn in_place_tablespace(tree: &TreePath) -> Option<u32> {
    tablespace_link(tree)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    struct Scratch {
        dir: tempfile::TempDir,
    }

    impl Scratch {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("pgdata")).unwrap();
            Self { dir }
        }

        fn path(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn write(&self, path: impl AsRef<Path>, len: usize) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![b'x'; len]).unwrap();
        }

        fn link(&self, path: &str, target: impl AsRef<Path>) {
            fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
            symlink(target, self.path(path)).unwrap();
        }

        fn options(&self) -> WalkOptions {
            WalkOptions {
                data_directory: self.path("pgdata"),
                version_directory: "PG_15_202209061".to_owned(),
                ..WalkOptions::default()
            }
        }

        fn walk(&self) -> SourceTree {
            SourceTree::walk(&self.options()).unwrap()
        }
    }

    fn files(tree: &SourceTree) -> Vec<String> {
        let mut names: Vec<String> = tree.files.iter().map(|file| file.path.to_string()).collect();
        names.sort();
        names
    }

    fn node<'a>(tree: &'a SourceTree, path: &str) -> Option<&'a Node> {
        tree.entries.iter().find(|entry| entry.path.to_string() == path).map(|entry| &entry.node)
    }

    fn target(tree: &SourceTree, path: &str) -> Option<String> {
        match node(tree, path)? {
            Node::Symlink(target) => Some(String::from_utf8(target.clone()).unwrap()),
            _ => None,
        }
    }

    #[test]
    fn names_are_bytes_and_modes_times_and_empty_directories_are_kept() {
        let scratch = Scratch::new();
        let odd = [&b"new\nline"[..], b"\xff\xfe", b"quote\"'", b" lead", b"caf\xc3\xa9"];
        for name in odd {
            scratch.write(Path::new("pgdata/base/5").join(OsStr::from_bytes(name)), 3);
        }
        fs::create_dir(scratch.path("pgdata/empty")).unwrap();
        fs::set_permissions(scratch.path("pgdata/empty"), fs::Permissions::from_mode(0o1750)).unwrap();
        let tree = scratch.walk();
        let mut found: Vec<&[u8]> = tree.files.iter().map(|file| file.path.split().1).collect();
        found.sort_unstable();
        let mut expected = odd.to_vec();
        expected.sort_unstable();
        assert_eq!(found, expected);
        for file in &tree.files {
            assert_eq!(fs::read(tree.source_path(file)).unwrap(), b"xxx");
            assert_eq!(file.size, 3);
        }
        let empty = tree.entries.iter().find(|entry| entry.path.to_string() == "data/empty").unwrap();
        assert_eq!((empty.mode, &empty.node), (0o1750, &Node::Directory));
        let metadata = fs::metadata(scratch.path("pgdata/empty")).unwrap();
        assert_eq!(mode_and_time(&metadata).1, empty.modified);
        assert!(tree.warnings.is_empty());
    }

    #[test]
    fn what_the_server_makes_anew_is_not_listed() {
        let scratch = Scratch::new();
        for path in [
            "PG_VERSION",
            "postmaster.pid",
            "backup_label",
            "walden.plan.json",
            "walden.restore.json",
            ".walden/complete",
            "pg_wal/000000010000000000000001",
            "pg_replslot/s/state",
            "global/pg_control",
            "global/pg_internal.init",
            "global/1262",
            "base/5/t1_2",
            "base/5/16400",
            "base/5/16400.1",
            "base/5/16400_fsm",
            "base/5/16400_init",
            "base/5/16401",
            "base/pgsql_tmp/x",
        ] {
            scratch.write(Path::new("pgdata").join(path), 10);
        }
        let tree = scratch.walk();
        assert_eq!(
            files(&tree),
            ["data/PG_VERSION", "data/base/5/16400_init", "data/base/5/16401", "data/global/1262"]
        );
        assert_eq!(node(&tree, "data/pg_wal"), Some(&Node::Directory));
        assert_eq!(node(&tree, "data/pg_replslot"), Some(&Node::Directory));
        assert_eq!(node(&tree, "data/pg_replslot/s"), None);
        assert_eq!(node(&tree, "data/base/pgsql_tmp"), None);
    }

    #[test]
    fn tablespaces_stand_in_trees_of_their_own_and_their_links_nowhere() {
        let scratch = Scratch::new();
        scratch.write("ts/PG_15_202209061/5/16400", 8192);
        scratch.write("ts/PG_15_202209061/pgsql_tmp/x", 1);
        scratch.write("ts/PG_14_202107181/5/16400", 8192);
        scratch.write("pgdata/pg_tblspc/16398/PG_15_202209061/5/1", 1);
        scratch.link("pgdata/pg_tblspc/16399", scratch.path("ts"));
        let options = WalkOptions {
            tablespace_names: BTreeMap::from([(16_399, "fast".to_owned())]),
            ..scratch.options()
        };
        let tree = SourceTree::walk(&options).unwrap();
        assert_eq!(
            files(&tree),
            ["data/pg_tblspc/16398/PG_15_202209061/5/1", "tablespaces/16399/PG_15_202209061/5/16400"]
        );
        let location = scratch.path("ts").into_os_string().into_vec();
        assert_eq!(
            tree.tablespaces,
            [
                Tablespace { oid: 16_398, location: Vec::new(), name: String::new() },
                Tablespace { oid: 16_399, location, name: "fast".to_owned() },
            ]
        );
        assert_eq!(node(&tree, "tablespaces/16399"), Some(&Node::Directory));
        assert_eq!(node(&tree, "tablespaces"), Some(&Node::Directory));
        assert_eq!(node(&tree, "data/pg_tblspc/16399"), None);
        let file = tree.files.iter().find(|file| file.size == 8192).unwrap();
        assert_eq!(fs::read(tree.source_path(file)).unwrap().len(), 8192);
    }

    /// Failure 13: a tablespace that is left out in silence.
    #[test]
    fn a_tablespace_that_cannot_be_seen_is_an_error_and_one_that_was_dropped_none() {
        let scratch = Scratch::new();
        scratch.write("pgdata/PG_VERSION", 3);
        scratch.link("pgdata/pg_tblspc/16400", scratch.path("unseen"));
        let unseen = SourceTree::walk(&scratch.options()).unwrap_err();
        assert!(matches!(unseen, Error::Tablespace { oid: 16_400, .. }), "{unseen}");
        // Dropped after its link was read.
        let options = scratch.options();
        let mut walker = Walker {
            options: &options,
            rules: BackupRules::new(&options.version_directory),
            tree: SourceTree::default(),
            links: Links::default(),
            pending: Vec::new(),
        };
        let location = scratch.path("unseen").into_os_string().into_vec();
        walker.tree.tablespaces.push(Tablespace { oid: 16_400, location, name: String::new() });
        fs::remove_file(scratch.path("pgdata/pg_tblspc/16400")).unwrap();
        walker.tablespaces().unwrap();
        assert_eq!((walker.tree.vanished, walker.tree.tablespaces.len()), (1, 0));
    }

    #[test]
    fn no_link_leaves_the_tree_and_no_loop_is_walked_twice() {
        let scratch = Scratch::new();
        scratch.write("pgdata/base/5/1", 1);
        scratch.write("outside/deep/file", 2);
        scratch.write("conf/server.key", 3);
        scratch.write("wal/000000010000000000000001", 4);
        for (path, target) in [
            ("pgdata/inside", PathBuf::from("base/5")),
            ("pgdata/base/up", PathBuf::from("../base/./5")),
            ("pgdata/absolute", scratch.path("pgdata/base/5")),
            ("pgdata/roundabout", PathBuf::from("../pgdata/base")),
            ("pgdata/self", PathBuf::from("self")),
            ("pgdata/gone", PathBuf::from("/no/such/place")),
            ("pgdata/server.key", scratch.path("conf/server.key")),
            ("pgdata/pg_wal", scratch.path("wal")),
            ("pgdata/z", scratch.path("outside")),
            ("outside/deep/back", scratch.path("outside")),
            ("outside/home", scratch.path("pgdata")),
            ("outside/above", scratch.dir.path().to_owned()),
        ] {
            scratch.link(path, target);
        }
        let tree = scratch.walk();
        for (path, expected) in [
            ("data/inside", "base/5"),
            ("data/base/up", "../base/./5"),
            ("data/absolute", "base/5"),
            ("data/roundabout", "base"),
            ("data/self", "self"),
            ("data/z/deep/back", ".."),
            ("data/z/home", ".."),
            ("data/z/above/pgdata", "../.."),
            ("data/z/above/outside", ".."),
        ] {
            assert_eq!(target(&tree, path).as_deref(), Some(expected), "{path}");
        }
        assert_eq!(
            files(&tree),
            [
                "data/base/5/1",
                "data/server.key",
                "data/z/above/conf/server.key",
                "data/z/above/wal/000000010000000000000001",
                "data/z/deep/file",
            ]
        );
        assert_eq!(node(&tree, "data/pg_wal"), Some(&Node::Directory));
        assert_eq!(tree.warnings.len(), 1, "{:?}", tree.warnings);
        assert!(tree.warnings[0].contains("/no/such/place"));
        let mut links: Vec<String> = tree.links.iter().map(|link| link.path.to_string()).collect();
        links.sort();
        assert_eq!(links, ["data/pg_wal", "data/server.key", "data/z", "data/z/above"]);
        let key = tree.files.iter().find(|file| file.size == 3).unwrap();
        assert_eq!(fs::read(tree.source_path(key)).unwrap(), b"xxx");
    }

    #[test]
    fn two_links_to_one_place_are_followed_once() {
        let scratch = Scratch::new();
        scratch.write("outside/file", 2);
        scratch.link("pgdata/one", scratch.path("outside"));
        scratch.link("pgdata/two", scratch.path("outside"));
        let tree = scratch.walk();
        assert_eq!(tree.files.len(), 1);
        let kept = [target(&tree, "data/one"), target(&tree, "data/two")];
        assert!(kept == [None, Some("one".to_owned())] || kept == [Some("two".to_owned()), None], "{kept:?}");
    }

    #[test]
    fn special_files_are_passed_over_with_a_warning() {
        let scratch = Scratch::new();
        let _socket = UnixListener::bind(scratch.path("pgdata/.s.PGSQL.5432")).unwrap();
        nix::unistd::mkfifo(&scratch.path("pgdata/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let tree = scratch.walk();
        assert!(tree.files.is_empty());
        assert_eq!(tree.warnings.len(), 2, "{:?}", tree.warnings);
    }

    #[test]
    fn configuration_outside_is_kept_under_its_full_path() {
        let scratch = Scratch::new();
        scratch.write("pgdata/pg_hba.conf", 1);
        scratch.write("etc/15/postgresql.conf", 20);
        scratch.write("etc/15/conf.d/a.conf", 30);
        let paths = ["etc/15/postgresql.conf", "pgdata/pg_hba.conf", "etc/15/conf.d/a.conf", "etc/missing"];
        let configuration: Vec<PathBuf> = paths.iter().map(|path| scratch.path(path)).collect();
        let tree = SourceTree::walk(&WalkOptions { configuration, ..scratch.options() }).unwrap();
        let base = scratch.dir.path().to_str().unwrap().trim_start_matches('/');
        let names = [format!("{base}/etc/15/postgresql.conf"), format!("{base}/etc/15/conf.d/a.conf")];
        assert_eq!(tree.outside_configuration, names);
        assert_eq!(tree.warnings.len(), 1);
        assert!(files(&tree).contains(&format!("config/{}", names[1])));
        assert_eq!(node(&tree, "config"), Some(&Node::Directory));
        assert_eq!(node(&tree, &format!("config/{base}/etc/15/conf.d")), Some(&Node::Directory));
        let file = tree.files.iter().find(|file| file.size == 30).unwrap();
        assert_eq!(fs::read(tree.source_path(file)).unwrap().len(), 30);
    }

    #[test]
    fn a_directory_that_cannot_be_found_is_named() {
        let options = WalkOptions { data_directory: "/no/such/pgdata".into(), ..WalkOptions::default() };
        let error = SourceTree::walk(&options).unwrap_err();
        assert!(error.to_string().contains("/no/such/pgdata"), "{error}");
    }
}
