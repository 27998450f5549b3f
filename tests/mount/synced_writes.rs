//! Writes that have to be on stable storage when they return, through handles that are not passed through.
//!
//! With each write comes what its file was opened with; the kernel does not ask for the sync by itself.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use bytes::Bytes;
use nix::errno::Errno;
use walden::disk::Owner;
use walden::mount::Tree;
use walden::mount::caller::Caller;
use walden::mount::fs::{
    Attributes, Capacity, Entry, FileKind, IoMode, Lifetime, ListEntry, LocalId, OpenFile, Opened, Seek,
    Volume,
};
use walden::mount::virtual_dir::Item;

use crate::harness::Fixture;

const ROOT: LocalId = LocalId(1);
const FILE: LocalId = LocalId(2);

/// A volume with one file, which takes note of what is asked of it.
#[derive(Debug, Clone, Default)]
struct OneFile {
    calls: Arc<Mutex<Vec<&'static str>>>,
}

impl OneFile {
    fn note(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }
}

fn entry(id: LocalId) -> Entry {
    let (kind, mode) = if id == ROOT { (FileKind::Directory, 0o700) } else { (FileKind::File, 0o600) };
    let at = SystemTime::UNIX_EPOCH;
    let attributes = Attributes {
        kind,
        mode,
        owner: Owner::current(),
        size: 4096,
        blocks: 8,
        links: 1,
        atime: at,
        mtime: at,
        ctime: at,
        io_bytes: 4096,
    };
    Entry { id, attributes, lifetime: Lifetime::Once }
}

#[async_trait::async_trait]
impl Volume for OneFile {
    fn root(&self) -> LocalId {
        ROOT
    }

    async fn lookup(&self, _: &Caller, _: LocalId, name: &[u8]) -> Result<Entry, Errno> {
        if name == b"file" { Ok(entry(FILE)) } else { Err(Errno::ENOENT) }
    }

    async fn attributes(&self, _: &Caller, node: LocalId) -> Result<Entry, Errno> {
        Ok(entry(node))
    }

    async fn read_link(&self, _: &Caller, _: LocalId) -> Result<Vec<u8>, Errno> {
        Err(Errno::EINVAL)
    }

    async fn list(&self, _: &Caller, _: LocalId) -> Result<Vec<ListEntry>, Errno> {
        Ok(Vec::new())
    }

    async fn open(&self, _: &Caller, _: LocalId, _: bool) -> Result<Opened, Errno> {
        Ok(Opened { file: Arc::new(self.clone()), mode: IoMode::Direct })
    }

    fn capacity(&self) -> Result<Capacity, Errno> {
        Ok(Capacity::default())
    }
}

#[async_trait::async_trait]
impl OpenFile for OneFile {
    async fn read(&self, _: &Caller, _: u64, _: u32) -> Result<Bytes, Errno> {
        Ok(Bytes::new())
    }

    async fn write(&self, _: &Caller, _: u64, _: Bytes) -> Result<(), Errno> {
        self.note("write");
        Ok(())
    }

    async fn sync(&self, data_only: bool) -> Result<(), Errno> {
        self.note(if data_only { "sync data" } else { "sync" });
        Ok(())
    }

    async fn seek(&self, _: u64, _: Seek) -> Result<u64, Errno> {
        Err(Errno::ENXIO)
    }
}

#[test]
fn a_synced_write_through_a_direct_handle_is_synced_before_it_returns() {
    let volume = OneFile::default();
    let item = Item::Volume(Arc::new(volume.clone()));
    let Some(fixture) = Fixture::mount(|_| Tree::new(item, Owner::current()), false) else { return };
    let path = fixture.point().join("file");
    let expected: [(i32, &[&str]); 3] =
        [(0, &["write"]), (libc::O_DSYNC, &["write", "sync data"]), (libc::O_SYNC, &["write", "sync"])];
    for (flags, calls) in expected {
        let file = OpenOptions::new().write(true).custom_flags(flags).open(&path).unwrap();
        for _ in 0..2 {
            file.write_all_at(&[7; 512], 100).unwrap();
            assert_eq!(std::mem::take(&mut *volume.calls.lock().unwrap()), calls, "{flags:#o}");
        }
    }
}
