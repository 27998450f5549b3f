//! An upper in a scratch folder, driven by paths.
//!
//! What the kernel does between a program and the upper (following paths, refusing what makes no sense) is done here,
//! and so is what it does past the upper: what may be passed through is read and written in the local file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::errno::Errno;

use crate::disk::{Binding, Owner};
use crate::mount::caller::Caller;
use crate::mount::errno;
use crate::mount::fs::{
    Attributes, Entry, FileKind, IoMode, LocalId, OpenFile, RenameMode, SetAttributes, Volume,
};
use crate::mount::memory_lower::MemoryLower;
use crate::mount::upper::content::Content;
use crate::mount::upper::local_disk::LocalFile;
use crate::mount::upper::tests::model::Shape;
use crate::mount::upper::tests::simulated_disk::SimulatedDisk;
use crate::mount::upper::{OpenError, Upper, UpperOptions};

/// The tree most tests stand on: every size that has an edge in it.
pub(crate) const TREE: [(&str, u64); 9] = [
    ("PG_VERSION", 3),
    ("global/pg_control", 8192),
    ("base/1/16384", 3 * 65536 + 8192 + 77),
    ("base/1/16385", 8192),
    ("base/2/16384", 65536),
    ("top", 100),
    ("empty", 0),
    ("link -> top", 0),
    ("pg_stat/", 0),
];

pub(crate) fn caller() -> Caller {
    Caller::internal()
}

pub(crate) fn binding() -> Binding {
    Binding { basebackup: "20261120T101500Z-3fa9".into(), manifest_digest: "ab".into(), part: "data".into() }
}

fn options(directory: &Path) -> UpperOptions {
    UpperOptions {
        directory: directory.to_owned(),
        binding: binding(),
        owner: Owner::current(),
        holds_back: true,
    }
}

pub(crate) async fn open(lower: &Arc<MemoryLower>, directory: &Path) -> Result<Upper, OpenError> {
    Upper::open(lower.clone(), options(directory)).await
}

/// Compares contents, and says where they differ instead of showing them.
pub(crate) fn same(got: &[u8], expected: &[u8], what: &str) {
    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!((got.len(), differs), (expected.len(), None), "{what}: length and first difference");
}

/// An upper, driven by paths.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) lower: Arc<MemoryLower>,
    pub(crate) upper: Upper,
}

impl World {
    pub(crate) async fn new(directory: &Path) -> Self {
        let lower = Arc::new(MemoryLower::build(&TREE));
        let upper = open(&lower, directory).await.unwrap();
        Self { lower, upper }
    }

    /// Opens an upper on a simulated disk.
    pub(crate) async fn on(disk: &SimulatedDisk) -> Self {
        Self::of(Arc::new(MemoryLower::build(&TREE)), disk).await
    }

    /// Opens the same upper again.
    pub(crate) async fn anew_on(self, disk: &SimulatedDisk) -> Self {
        Self::of(self.lower.clone(), disk).await
    }

    /// Lets go of the upper, and waits until what was being fetched ahead in it has done so too: until then it is locked.
    pub(crate) async fn close(self) {
        let shared = Arc::downgrade(&self.upper.shared);
        drop(self);
        let closed = async {
            while shared.strong_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), closed)
            .await
            .expect("nothing holds the upper for long");
    }

    /// Opens an upper above a lower of one's own on a simulated disk.
    pub(crate) async fn of(lower: Arc<MemoryLower>, disk: &SimulatedDisk) -> Self {
        Self::try_of(lower, disk).await.unwrap()
    }

    /// Tries to open an upper that is not new on a simulated disk.
    pub(crate) async fn try_of(lower: Arc<MemoryLower>, disk: &SimulatedDisk) -> Result<Self, OpenError> {
        let options = options(Path::new("simulated"));
        let upper = Upper::over(lower.clone(), Arc::new(disk.clone()), &options, false, None).await?;
        Ok(Self { lower, upper })
    }

    /// Follows a path, without following links, and keeps no references.
    pub(crate) async fn find(&self, path: &str) -> Result<Entry, Errno> {
        let mut at = self.upper.attributes(&caller(), self.upper.root()).await?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            if at.attributes.kind != FileKind::Directory {
                return Err(Errno::ENOTDIR);
            }
            let next = self.upper.lookup(&caller(), at.id, name.as_bytes()).await?;
            // Not given back: a kernel would hold on to it too, and a path must go on working.
            at = next;
        }
        Ok(at)
    }

    pub(crate) async fn parent<'a>(&self, path: &'a str) -> Result<(LocalId, &'a [u8]), Errno> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let found = self.find(directory).await?;
        if found.attributes.kind != FileKind::Directory {
            return Err(Errno::ENOTDIR);
        }
        Ok((found.id, name.as_bytes()))
    }

    pub(crate) async fn open_file(&self, path: &str) -> Result<Arc<dyn OpenFile>, Errno> {
        let found = self.find(path).await?;
        Ok(self.upper.open(&caller(), found.id, true).await?.file)
    }

    /// Opens a file as a program does that reads and writes; with its local file if it may be passed through.
    async fn open_as_a_program(
        &self,
        path: &str,
    ) -> Result<(Arc<dyn OpenFile>, Option<Arc<dyn LocalFile>>), Errno> {
        let found = self.find(path).await?;
        let opened = self.upper.open(&caller(), found.id, true).await?;
        let local = match opened.mode {
            IoMode::Passthrough => Some(self.local_file(found.id)?),
            _ => None,
        };
        Ok((opened.file, local))
    }

    /// Returns the local file behind an open one, which is there if it may be passed through.
    pub(crate) fn local_file(&self, id: LocalId) -> Result<Arc<dyn LocalFile>, Errno> {
        let file = self.upper.open_file(id)?;
        Ok(file.node.content.as_ref().and_then(Content::file).expect("a file that is passed through is open"))
    }

    pub(crate) async fn read(&self, path: &str, offset: u64, length: u32) -> Result<Vec<u8>, Errno> {
        let (file, local) = self.open_as_a_program(path).await?;
        let Some(local) = local else { return Ok(file.read(&caller(), offset, length).await?.to_vec()) };
        let mut content = vec![0; length as usize];
        let read = local.read_at(&mut content, offset).map_err(|error| errno::of_io(&error))?;
        content.truncate(read);
        Ok(content)
    }

    pub(crate) async fn read_all(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.read(path, 0, 1 << 20).await
    }

    pub(crate) async fn write(&self, path: &str, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let (file, local) = self.open_as_a_program(path).await?;
        match local {
            Some(local) => local.write_at(data, offset).map_err(|error| errno::of_io(&error)),
            None => file.write(&caller(), offset, Bytes::copy_from_slice(data)).await,
        }
    }

    pub(crate) async fn truncate(&self, path: &str, size: u64) -> Result<(), Errno> {
        let found = self.find(path).await?;
        let set = SetAttributes { size: Some(size), ..SetAttributes::default() };
        self.upper.set_attributes(&caller(), found.id, set).await.map(drop)
    }

    pub(crate) async fn create(&self, path: &str) -> Result<Arc<dyn OpenFile>, Errno> {
        let (directory, name) = self.parent(path).await?;
        Ok(self.upper.create(&caller(), directory, name, 0o600, true).await?.1.file)
    }

    pub(crate) async fn make_directory(&self, path: &str) -> Result<(), Errno> {
        let (directory, name) = self.parent(path).await?;
        self.upper.make_directory(&caller(), directory, name, 0o700).await.map(drop)
    }

    pub(crate) async fn unlink(&self, path: &str) -> Result<(), Errno> {
        let (directory, name) = self.parent(path).await?;
        self.upper.unlink(&caller(), directory, name).await
    }

    pub(crate) async fn remove_directory(&self, path: &str) -> Result<(), Errno> {
        let (directory, name) = self.parent(path).await?;
        self.upper.remove_directory(&caller(), directory, name).await
    }

    pub(crate) async fn rename(&self, from: &str, to: &str, mode: RenameMode) -> Result<(), Errno> {
        let from = self.parent(from).await?;
        let to = self.parent(to).await?;
        self.upper.rename(&caller(), from, to, mode).await
    }

    pub(crate) async fn link(&self, from: &str, to: &str) -> Result<(), Errno> {
        let found = self.find(from).await?;
        let (directory, name) = self.parent(to).await?;
        self.upper.link(&caller(), found.id, directory, name).await.map(drop)
    }

    pub(crate) async fn sync_directory(&self, path: &str) -> Result<(), Errno> {
        let found = self.find(path).await?;
        self.upper.sync_directory(found.id).await
    }

    pub(crate) async fn attributes(&self, path: &str) -> Attributes {
        self.find(path).await.unwrap().attributes
    }

    pub(crate) async fn names(&self, path: &str) -> Vec<String> {
        let found = self.find(path).await.unwrap();
        let listed = self.upper.list(&caller(), found.id).await.unwrap();
        listed.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()).collect()
    }

    /// Walks the whole tree and reads everything in it.
    pub(crate) async fn shape(&self) -> BTreeMap<String, Shape> {
        let mut shape = BTreeMap::new();
        let mut rest = vec![String::new()];
        while let Some(directory) = rest.pop() {
            for name in self.names(&directory).await {
                let path = if directory.is_empty() { name } else { format!("{directory}/{name}") };
                let found =
                    self.find(&path).await.unwrap_or_else(|errno| panic!("{path} is listed: {errno}"));
                let shown = match found.attributes.kind {
                    FileKind::Directory => {
                        rest.push(path.clone());
                        Shape::Directory
                    }
                    FileKind::Symlink => {
                        Shape::Symlink(self.upper.read_link(&caller(), found.id).await.unwrap())
                    }
                    _ => {
                        let content = self.read_all(&path).await.unwrap();
                        assert_eq!(content.len() as u64, self.attributes(&path).await.size, "{path}");
                        Shape::File(content)
                    }
                };
                shape.insert(path, shown);
            }
        }
        shape
    }
}
