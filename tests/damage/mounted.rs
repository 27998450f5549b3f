//! A mount of a damaged repository: files are what they were or cannot be read, and its log names the object.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use walden::codec::Digest;

use crate::damage::Damage;
use crate::matrix::Case;
use crate::source::{Source, wait_until_unmounted};
use crate::support::Mounted;

/// What a mount shows: the digest of every file, or the error number of a file or directory.
#[derive(Debug)]
pub struct Tree {
    files: BTreeMap<PathBuf, Digest>,
    errors: BTreeMap<PathBuf, i32>,
}

impl Tree {
    /// Mounts the repository as it is and reads all of it.
    pub fn of_mount(source: &Source) -> Self {
        let mount = Mount::create(source);
        let tree = mount.read();
        mount.end();
        assert_eq!(tree.errors, BTreeMap::new());
        assert!(tree.files.len() > 1000);
        tree
    }
}

/// A mount that tells its log.
pub struct Mount {
    mounted: Mounted,
    log: PathBuf,
}

impl Mount {
    pub fn create(source: &Source) -> Self {
        let folder = source.cluster.scratch().folder("mnt");
        // User postgres may not open /dev/fuse everywhere, and root may.
        let mounted = source.walden.as_root().mount(&folder);
        let log = source.walden.repository().with_file_name("state");
        let log = files_named(&log, "mount-");
        Self { mounted, log }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.mounted.path().join(name)
    }

    fn read(&self) -> Tree {
        let mut tree = Tree { files: BTreeMap::new(), errors: BTreeMap::new() };
        read_below(&self.path("basebackups"), self.mounted.path(), &mut tree);
        tree
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Unmounts it; the log begins empty for the next.
    pub fn end(self) {
        let folder = self.mounted.path().to_owned();
        drop(self.mounted);
        wait_until_unmounted(&folder);
        fs::write(&self.log, "").unwrap();
    }
}

fn files_named(folder: &Path, prefix: &str) -> PathBuf {
    let files = crate::source::files_below(folder);
    let named = |file: &PathBuf| file.file_name().unwrap().to_string_lossy().starts_with(prefix);
    files.into_iter().find(named).expect("a mount in the background has a log")
}

fn read_below(path: &Path, root: &Path, tree: &mut Tree) {
    let name = path.strip_prefix(root).unwrap().to_owned();
    let outcome = fs::symlink_metadata(path).and_then(|metadata| {
        if metadata.is_dir() {
            for entry in fs::read_dir(path)? {
                read_below(&entry?.path(), root, tree);
            }
        } else if metadata.is_file() {
            tree.files.insert(name.clone(), Digest::of(&fs::read(path)?));
        }
        Ok(())
    });
    if let Err(error) = outcome {
        tree.errors.insert(name, error.raw_os_error().unwrap_or(0));
    }
}

/// Mounts the damaged repository and reads all of it.
pub fn assert_mount_is_honest(source: &Source, case: &Case, pristine: &Tree) {
    let mount = Mount::create(source);
    let tree = mount.read();
    for (path, digest) in &tree.files {
        let right = pristine.files.get(path).unwrap_or_else(|| panic!("{case:?}: {path:?} came to be"));
        assert_eq!(digest, right, "{case:?}: {path:?} has other bytes");
    }
    let others: Vec<_> = tree.errors.iter().filter(|(_, number)| **number != libc::EIO).collect();
    assert!(others.is_empty(), "{case:?}: {others:?}");
    // An attempt without outcome is not shown; everything else that is not readable says so.
    let hidden = tree.files.len() < pristine.files.len() && tree.errors.is_empty();
    let (removed, log) = (case.damage == Damage::Remove, mount.log());
    assert!(!hidden || removed, "{case:?}: files are missing without an error");
    assert!(tree.errors.is_empty() || case.is_named_in(&log), "{case:?} is not in the log:\n{log}");
    let older = |path: &&PathBuf| path.to_string_lossy().contains(&source.ids[0]);
    let kept = tree.files.keys().filter(older).count();
    assert_eq!(kept, pristine.files.keys().filter(older).count(), "{case:?}: the other basebackup suffers");
    mount.end();
}
