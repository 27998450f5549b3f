//! A mount's whole tree: virtual directories with volumes hung into them, under one set of inode numbers.
//!
//! An inode number is a slot and a number within it. Slot 0 holds the virtual items, which are remembered while the
//! kernel knows them; each volume has a slot of its own from the first look-up of its name until the mount ends,
//! and numbers its nodes by itself. The root, inode 1, is a virtual directory or a volume. File handles are counted
//! up and never reused (failure 35: descriptor numbers as handles raced on reuse).
//!
//! Operations on names go to the volume the directory is in; between volumes, rename and link are `EXDEV`.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use bytes::Bytes;
use nix::errno::Errno;

use crate::disk::Owner;
use crate::mount::caller::Caller;
use crate::mount::errno;
use crate::mount::fs::{
    Attributes, Capacity, Entry, FileKind, IO_BYTES_USUAL, IoMode, Lifetime, LocalId, NewNode, OpenFile,
    Opened, RenameMode, Seek, SetAttributes, Volume,
};
use crate::mount::listing::{DirectorySource, ListingHandle};
use crate::mount::lower::LowerError;
use crate::mount::virtual_dir::{Found, Item, VirtualFile, VirtualReader};

/// The bits of an inode number that count within a slot.
const SLOT_BITS: u32 = 40;

/// An inode number of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ino(pub u64);

impl Ino {
    /// The mount's root.
    pub const ROOT: Self = Self(1);
}

/// A handle of an open file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// A mount's whole tree.
#[derive(Debug)]
pub struct Tree {
    root: Item,
    owner: Owner,
    items: Mutex<Items>,
    handles: Mutex<HashMap<HandleId, Handle>>,
    next_handle: AtomicU64,
}

#[derive(Debug, Clone)]
enum Handle {
    File(Arc<dyn OpenFile>),
    Directory(Arc<ListingHandle>),
}

/// The virtual items the kernel knows, and the volumes it ever looked at.
#[derive(Debug, Default)]
struct Items {
    known: HashMap<u64, KnownItem>,
    numbers: HashMap<ItemKey, u64>,
    next_number: u64,
    volumes: Vec<Arc<dyn Volume>>,
    slots: HashMap<(u64, Vec<u8>), u64>,
}

/// What makes two look-ups find the same item.
type ItemKey = (u64, Vec<u8>, u64);

#[derive(Debug)]
struct KnownItem {
    item: Item,
    lifetime: Lifetime,
    key: ItemKey,
    references: u64,
}

/// Where an inode number leads.
enum Place {
    Virtual(Item, Lifetime),
    Volume { slot: u64, volume: Arc<dyn Volume>, id: LocalId },
}

impl Tree {
    /// Creates a tree; virtual items belong to `owner`.
    pub fn new(root: Item, owner: Owner) -> Arc<Self> {
        let mut items = Items { next_number: Ino::ROOT.0 + 1, ..Items::default() };
        if let Item::Volume(volume) = &root {
            items.volumes.push(volume.clone());
        }
        Arc::new(Self {
            root,
            owner,
            items: Mutex::new(items),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
        })
    }

    /// Finds a name in a directory.
    pub async fn lookup(&self, caller: &Caller, parent: Ino, name: &[u8]) -> Result<Entry<Ino>, Errno> {
        match self.place(parent)? {
            Place::Volume { slot, volume, id } => Ok(globally(slot, volume.lookup(caller, id, name).await?)),
            Place::Virtual(Item::Directory(directory), _) => {
                let found = caller.killable(async { errno_of(directory.lookup(caller, name).await) }).await?;
                self.enter(caller, parent, name, found.ok_or(Errno::ENOENT)?).await
            }
            Place::Virtual(..) => Err(Errno::ENOTDIR),
        }
    }

    /// Takes back references the kernel no longer holds.
    pub fn forget(&self, ino: Ino, references: u64) {
        if slot_of(ino) == 0 {
            return self.lock_items().forget(ino.0, references);
        }
        if let Ok(Place::Volume { volume, id, .. }) = self.place(ino) {
            volume.forget(id, references);
        }
    }

    /// Returns what `stat` shows.
    pub async fn attributes(&self, caller: &Caller, ino: Ino) -> Result<Entry<Ino>, Errno> {
        match self.place(ino)? {
            Place::Volume { slot, volume, id } => Ok(globally(slot, volume.attributes(caller, id).await?)),
            Place::Virtual(item, lifetime) => {
                Ok(Entry { id: ino, attributes: self.attributes_of(&item), lifetime })
            }
        }
    }

    /// Changes attributes.
    pub async fn set_attributes(
        &self,
        caller: &Caller,
        ino: Ino,
        set: SetAttributes,
    ) -> Result<Entry<Ino>, Errno> {
        let (slot, volume, id) = self.in_volume(ino)?;
        Ok(globally(slot, volume.set_attributes(caller, id, set).await?))
    }

    /// Returns where a symbolic link points.
    pub async fn read_link(&self, caller: &Caller, ino: Ino) -> Result<Vec<u8>, Errno> {
        match self.place(ino)? {
            Place::Volume { volume, id, .. } => volume.read_link(caller, id).await,
            Place::Virtual(Item::Symlink(target), _) => Ok(target),
            Place::Virtual(..) => Err(Errno::EINVAL),
        }
    }

    /// Opens a file.
    pub async fn open(&self, caller: &Caller, ino: Ino, writable: bool) -> Result<(HandleId, IoMode), Errno> {
        let opened = match self.place(ino)? {
            Place::Volume { volume, id, .. } => volume.open(caller, id, writable).await?,
            Place::Virtual(Item::File(_), _) if writable => return Err(Errno::EROFS),
            Place::Virtual(Item::File(file), _) => {
                let (reader, mode) = caller.killable(async { errno_of(file.open().await) }).await?;
                Opened { file: Arc::new(OpenVirtualFile { file, reader }), mode }
            }
            Place::Virtual(..) => return Err(Errno::EISDIR),
        };
        Ok((self.add_handle(Handle::File(opened.file)), opened.mode))
    }

    /// Opens a directory for listing.
    pub async fn open_directory(&self, ino: Ino) -> Result<HandleId, Errno> {
        let source = match self.place(ino)? {
            Place::Volume { slot, volume, id } => {
                DirectorySource::Volume { volume, id, first_number: slot << SLOT_BITS }
            }
            Place::Virtual(Item::Directory(directory), _) => DirectorySource::Virtual(directory),
            Place::Virtual(..) => return Err(Errno::ENOTDIR),
        };
        Ok(self.add_handle(Handle::Directory(Arc::new(ListingHandle::new(ino, source)))))
    }

    /// Returns an open file.
    pub fn file(&self, handle: HandleId) -> Result<Arc<dyn OpenFile>, Errno> {
        match self.lock_handles().get(&handle) {
            Some(Handle::File(file)) => Ok(file.clone()),
            _ => Err(Errno::EBADF),
        }
    }

    /// Returns an open directory.
    pub fn directory(&self, handle: HandleId) -> Result<Arc<ListingHandle>, Errno> {
        match self.lock_handles().get(&handle) {
            Some(Handle::Directory(listing)) => Ok(listing.clone()),
            _ => Err(Errno::EBADF),
        }
    }

    /// Closes a file or directory; calls still under way finish first.
    pub fn release(&self, handle: HandleId) {
        // Dropped outside the lock: closing a file may take a system call.
        let closed = self.lock_handles().remove(&handle);
        drop(closed);
    }

    /// Returns the room there is.
    pub fn capacity(&self, ino: Ino) -> Result<Capacity, Errno> {
        match self.place(ino)? {
            Place::Volume { volume, .. } => volume.capacity(),
            Place::Virtual(..) => Ok(Capacity { block_size: 4096, ..Capacity::default() }),
        }
    }

    /// Creates a file and opens it.
    pub async fn create(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        exclusive: bool,
    ) -> Result<(Entry<Ino>, HandleId, IoMode), Errno> {
        let (slot, volume, id) = self.in_volume(parent)?;
        let (entry, opened) = volume.create(caller, id, name, mode, exclusive).await?;
        Ok((globally(slot, entry), self.add_handle(Handle::File(opened.file)), opened.mode))
    }

    /// Creates a file, fifo or socket.
    pub async fn make_node(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        what: NewNode,
        mode: u32,
    ) -> Result<Entry<Ino>, Errno> {
        let (slot, volume, id) = self.in_volume(parent)?;
        Ok(globally(slot, volume.make_node(caller, id, name, what, mode).await?))
    }

    /// Creates a directory.
    pub async fn make_directory(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
    ) -> Result<Entry<Ino>, Errno> {
        let (slot, volume, id) = self.in_volume(parent)?;
        Ok(globally(slot, volume.make_directory(caller, id, name, mode).await?))
    }

    /// Creates a symbolic link.
    pub async fn make_symlink(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> Result<Entry<Ino>, Errno> {
        let (slot, volume, id) = self.in_volume(parent)?;
        Ok(globally(slot, volume.make_symlink(caller, id, name, target).await?))
    }

    /// Gives a file another name.
    pub async fn link(
        &self,
        caller: &Caller,
        ino: Ino,
        parent: Ino,
        name: &[u8],
    ) -> Result<Entry<Ino>, Errno> {
        let (slot, volume, id) = self.in_volume(ino)?;
        let (other, _, directory) = self.in_volume(parent)?;
        if slot != other {
            return Err(Errno::EXDEV);
        }
        Ok(globally(slot, volume.link(caller, id, directory, name).await?))
    }

    /// Removes a name that is not a directory's.
    pub async fn unlink(&self, caller: &Caller, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        let (_, volume, id) = self.in_volume(parent)?;
        volume.unlink(caller, id, name).await
    }

    /// Removes an empty directory.
    pub async fn remove_directory(&self, caller: &Caller, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        let (_, volume, id) = self.in_volume(parent)?;
        volume.remove_directory(caller, id, name).await
    }

    /// Renames within a volume.
    pub async fn rename(
        &self,
        caller: &Caller,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        mode: RenameMode,
    ) -> Result<(), Errno> {
        let (slot, volume, source) = self.in_volume(from.0)?;
        let (other, _, target) = self.in_volume(to.0)?;
        if slot != other {
            return Err(Errno::EXDEV);
        }
        volume.rename(caller, (source, from.1), (target, to.1), mode).await
    }

    /// Puts a directory's names on stable storage.
    pub async fn sync_directory(&self, ino: Ino) -> Result<(), Errno> {
        match self.place(ino)? {
            Place::Volume { volume, id, .. } => volume.sync_directory(id).await,
            Place::Virtual(..) => Ok(()),
        }
    }

    /// Numbers a found item for the kernel.
    async fn enter(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        found: Found,
    ) -> Result<Entry<Ino>, Errno> {
        if let Item::Volume(volume) = &found.item {
            let (slot, volume) = self.lock_items().slot_for(parent, name, volume)?;
            let root = volume.attributes(caller, volume.root()).await?;
            return Ok(globally(slot, Entry { lifetime: found.lifetime, ..root }));
        }
        let attributes = self.attributes_of(&found.item);
        let lifetime = found.lifetime;
        let id = self.lock_items().number(parent, name, found);
        Ok(Entry { id, attributes, lifetime })
    }

    fn place(&self, ino: Ino) -> Result<Place, Errno> {
        let items = self.lock_items();
        let slot = match (ino, &self.root) {
            (Ino::ROOT, Item::Volume(volume)) => {
                return Ok(Place::Volume { slot: 1, volume: volume.clone(), id: volume.root() });
            }
            (Ino::ROOT, item) => return Ok(Place::Virtual(item.clone(), Lifetime::Forever)),
            _ => slot_of(ino),
        };
        if slot == 0 {
            let known = items.known.get(&ino.0).ok_or(Errno::ESTALE)?;
            return Ok(Place::Virtual(known.item.clone(), known.lifetime));
        }
        let volume = items.volumes.get(slot as usize - 1).ok_or(Errno::ESTALE)?.clone();
        Ok(Place::Volume { slot, volume, id: LocalId(ino.0 & ((1 << SLOT_BITS) - 1)) })
    }

    fn in_volume(&self, ino: Ino) -> Result<(u64, Arc<dyn Volume>, LocalId), Errno> {
        match self.place(ino)? {
            Place::Volume { slot, volume, id } => Ok((slot, volume, id)),
            Place::Virtual(..) => Err(Errno::EROFS),
        }
    }

    fn attributes_of(&self, item: &Item) -> Attributes {
        let (mode, size, modified) = match item {
            Item::Directory(directory) => (0o500, 0, directory.modified()),
            // A volume answers for its own root; this is what is shown before it is asked.
            Item::Volume(_) => (0o500, 0, jiff::Timestamp::UNIX_EPOCH),
            Item::File(file) => (file.mode() & 0o7777, file.size(), file.modified()),
            Item::Symlink(target) => (0o777, target.len() as u64, jiff::Timestamp::UNIX_EPOCH),
        };
        let io_bytes = if let Item::File(file) = item { file.io_bytes() } else { IO_BYTES_USUAL };
        let time = SystemTime::from(modified);
        let kind = item.kind();
        let blocks = if kind == FileKind::File { size.div_ceil(512) } else { 0 };
        Attributes {
            kind,
            mode,
            owner: self.owner,
            size,
            blocks,
            links: 1,
            atime: time,
            mtime: time,
            ctime: time,
            io_bytes,
        }
    }

    fn add_handle(&self, handle: Handle) -> HandleId {
        let id = HandleId(self.next_handle.fetch_add(1, Ordering::Relaxed));
        self.lock_handles().insert(id, handle);
        id
    }

    fn lock_items(&self) -> std::sync::MutexGuard<'_, Items> {
        self.items.lock().expect("no holder of this lock panics")
    }

    fn lock_handles(&self) -> std::sync::MutexGuard<'_, HashMap<HandleId, Handle>> {
        self.handles.lock().expect("no holder of this lock panics")
    }
}

impl Items {
    fn number(&mut self, parent: Ino, name: &[u8], found: Found) -> Ino {
        let identity = match &found.item {
            Item::File(file) => file.identity(),
            // The kernel keeps what it has read of a link, so another target is another node.
            Item::Symlink(target) => BuildHasherDefault::<DefaultHasher>::default().hash_one(target),
            Item::Directory(_) | Item::Volume(_) => 0,
        };
        let key = (parent.0, name.to_vec(), identity);
        let number = *self.numbers.entry(key.clone()).or_insert_with(|| {
            self.next_number += 1;
            self.next_number - 1
        });
        let known = self.known.entry(number).or_insert_with(|| KnownItem {
            item: found.item.clone(),
            lifetime: found.lifetime,
            key,
            references: 0,
        });
        known.references += 1;
        (known.item, known.lifetime) = (found.item, found.lifetime);
        Ino(number)
    }

    fn forget(&mut self, number: u64, references: u64) {
        let Some(known) = self.known.get_mut(&number) else { return };
        known.references = known.references.saturating_sub(references);
        if known.references == 0 {
            self.numbers.remove(&known.key);
            self.known.remove(&number);
        }
    }

    fn slot_for(
        &mut self,
        parent: Ino,
        name: &[u8],
        volume: &Arc<dyn Volume>,
    ) -> Result<(u64, Arc<dyn Volume>), Errno> {
        if let Some(slot) = self.slots.get(&(parent.0, name.to_vec())) {
            return Ok((*slot, self.volumes[*slot as usize - 1].clone()));
        }
        let slot = self.volumes.len() as u64 + 1;
        if slot >= 1 << (64 - SLOT_BITS) {
            return Err(Errno::ENFILE);
        }
        self.volumes.push(volume.clone());
        self.slots.insert((parent.0, name.to_vec()), slot);
        Ok((slot, volume.clone()))
    }
}

/// An open virtual file as the adapter wants it.
#[derive(Debug)]
struct OpenVirtualFile {
    file: Arc<dyn VirtualFile>,
    reader: Arc<dyn VirtualReader>,
}

#[async_trait::async_trait]
impl OpenFile for OpenVirtualFile {
    async fn read(&self, caller: &Caller, offset: u64, length: u32) -> Result<Bytes, Errno> {
        caller.killable(async { errno_of(self.reader.read(offset, length).await) }).await
    }

    async fn seek(&self, offset: u64, what: Seek) -> Result<u64, Errno> {
        match what {
            _ if offset >= self.file.size() => Err(Errno::ENXIO),
            Seek::Data => Ok(offset),
            Seek::Hole => Ok(self.file.size()),
        }
    }
}

fn slot_of(ino: Ino) -> u64 {
    ino.0 >> SLOT_BITS
}

fn globally(slot: u64, entry: Entry) -> Entry<Ino> {
    Entry { id: Ino(slot << SLOT_BITS | entry.id.0), attributes: entry.attributes, lifetime: entry.lifetime }
}

fn errno_of<T>(outcome: Result<T, LowerError>) -> Result<T, Errno> {
    outcome.map_err(|error| errno::of_lower(&error))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use jiff::Timestamp;

    use super::*;
    use crate::mount::lower_volume::LowerVolume;
    use crate::mount::memory_lower::MemoryLower;
    use crate::mount::virtual_dir::{StaticDir, StaticFile};

    fn file(content: &'static str) -> Item {
        Item::File(Arc::new(StaticFile::new(content, Timestamp::UNIX_EPOCH)))
    }

    fn volume() -> Item {
        let lower = Arc::new(MemoryLower::build(&[("base/1/16384", 100)]));
        Item::Volume(Arc::new(LowerVolume::new(lower, Owner::current())))
    }

    fn tree() -> Arc<Tree> {
        let inner = StaticDir::default().with("data", volume());
        let root = StaticDir::default()
            .with("one", volume())
            .with("two", volume())
            .with("file", file("hello"))
            .with("inner", Item::Directory(Arc::new(inner)));
        Tree::new(Item::Directory(Arc::new(root)), Owner::current())
    }

    async fn find(tree: &Tree, path: &str) -> Result<Entry<Ino>, Errno> {
        let mut at = tree.attributes(&Caller::internal(), Ino::ROOT).await?;
        for name in path.split('/') {
            at = tree.lookup(&Caller::internal(), at.id, name.as_bytes()).await?;
        }
        Ok(at)
    }

    #[tokio::test]
    async fn every_path_has_a_number_of_its_own_and_keeps_it() {
        let tree = tree();
        let paths = ["one", "two", "file", "inner", "inner/data", "one/base", "two/base", "one/base/1/16384"];
        let mut seen = BTreeSet::from([Ino::ROOT.0]);
        for path in paths {
            let found = find(&tree, path).await.unwrap();
            assert!(seen.insert(found.id.0), "{path}");
            assert_eq!(find(&tree, path).await.unwrap(), found, "{path}");
            assert_eq!(tree.attributes(&Caller::internal(), found.id).await.unwrap(), found, "{path}");
        }
        assert_eq!(find(&tree, "nowhere").await, Err(Errno::ENOENT));
        assert_eq!(find(&tree, "file/below").await, Err(Errno::ENOTDIR));
    }

    #[tokio::test]
    async fn what_the_kernel_forgot_is_forgotten() {
        let tree = tree();
        let found = find(&tree, "file").await.unwrap();
        find(&tree, "file").await.unwrap();
        tree.forget(found.id, 1);
        assert!(tree.attributes(&Caller::internal(), found.id).await.is_ok());
        tree.forget(found.id, 1);
        assert_eq!(tree.attributes(&Caller::internal(), found.id).await, Err(Errno::ESTALE));
        assert!(tree.lock_items().known.is_empty() && tree.lock_items().numbers.is_empty());
    }

    /// A partial WAL segment and the final one share a name; the kernel must not show one's pages for the other.
    #[tokio::test]
    async fn another_file_under_a_name_has_another_number() {
        #[derive(Debug)]
        struct Changing(std::sync::atomic::AtomicU64);

        #[derive(Debug)]
        struct Version(u64);

        #[async_trait::async_trait]
        impl VirtualFile for Version {
            fn identity(&self) -> u64 {
                self.0
            }
            fn size(&self) -> u64 {
                self.0
            }
            async fn open(&self) -> Result<(Arc<dyn VirtualReader>, IoMode), LowerError> {
                Ok((Arc::new(StaticFile::new("", Timestamp::UNIX_EPOCH)), IoMode::Direct))
            }
        }

        #[async_trait::async_trait]
        impl crate::mount::virtual_dir::DynamicDir for Changing {
            async fn lookup(&self, _: &Caller, _: &[u8]) -> Result<Option<Found>, LowerError> {
                let version = Version(self.0.load(Ordering::Relaxed));
                Ok(Some(Found { item: Item::File(Arc::new(version)), lifetime: Lifetime::Once }))
            }
            async fn list(&self, _: Option<&[u8]>, _: usize) -> Result<Vec<(Vec<u8>, FileKind)>, LowerError> {
                Ok(Vec::new())
            }
        }

        let directory = Arc::new(Changing(AtomicU64::new(1)));
        let tree = Tree::new(Item::Directory(directory.clone()), Owner::current());
        let partial = find(&tree, "x").await.unwrap();
        directory.0.store(2, Ordering::Relaxed);
        let whole = find(&tree, "x").await.unwrap();
        assert_ne!(partial.id, whole.id);
        assert_eq!(tree.attributes(&Caller::internal(), partial.id).await.unwrap().attributes.size, 1);
        assert_eq!(whole.attributes.size, 2);
    }

    /// Failure 35: handles that were used again raced.
    #[tokio::test]
    async fn a_closed_handle_stays_closed_whatever_is_opened_next() {
        let tree = tree();
        let id = find(&tree, "file").await.unwrap().id;
        let (first, _) = tree.open(&Caller::internal(), id, false).await.unwrap();
        let held = tree.file(first).unwrap();
        tree.release(first);
        let (second, _) = tree.open(&Caller::internal(), id, false).await.unwrap();
        assert_ne!(first, second);
        assert_eq!(tree.file(first).map(drop), Err(Errno::EBADF));
        assert_eq!(tree.directory(second).map(drop), Err(Errno::EBADF));
        // A read under way when the file was closed ends well.
        assert_eq!(held.read(&Caller::internal(), 1, 3).await.unwrap(), "ell");
    }

    #[tokio::test]
    async fn changes_stop_at_the_edge_of_a_volume() {
        let tree = tree();
        let caller = Caller::internal();
        let (one, two) = (find(&tree, "one").await.unwrap().id, find(&tree, "two").await.unwrap().id);
        let renamed = tree.rename(&caller, (one, b"base"), (two, b"base"), RenameMode::Replace).await;
        assert_eq!(renamed, Err(Errno::EXDEV));
        assert_eq!(tree.unlink(&caller, Ino::ROOT, b"file").await, Err(Errno::EROFS));
        assert_eq!(tree.make_directory(&caller, one, b"x", 0o700).await.map(drop), Err(Errno::EROFS));
    }

    #[tokio::test]
    async fn a_large_directory_is_listed_in_steps_and_from_the_start_again() {
        let count = 2500;
        let empty = StaticDir::default();
        let directory = (0..count).fold(empty, |dir, number| dir.with(&format!("{number:05}"), file("")));
        let tree = Tree::new(Item::Directory(Arc::new(directory)), Owner::current());
        let handle = tree.open_directory(Ino::ROOT).await.unwrap();
        let listing = tree.directory(handle).unwrap();
        for _ in 0..2 {
            let mut names: Vec<String> = Vec::new();
            let mut offset = 0;
            loop {
                let before = names.len();
                let caller = Caller::internal();
                let step = listing.read(&caller, offset, |next, entry| {
                    if names.len() - before == 700 {
                        return false;
                    }
                    offset = next;
                    names.push(String::from_utf8(entry.name.clone()).unwrap());
                    true
                });
                step.await.unwrap();
                if names.len() == before {
                    break;
                }
            }
            let expected = [".".to_owned(), "..".to_owned()];
            let expected: Vec<String> =
                expected.into_iter().chain((0..count).map(|number| format!("{number:05}"))).collect();
            assert_eq!(names, expected);
        }
    }

    #[tokio::test]
    async fn a_volume_can_be_the_whole_tree() {
        let tree = Tree::new(volume(), Owner::current());
        let root = tree.attributes(&Caller::internal(), Ino::ROOT).await.unwrap();
        assert_eq!(root.attributes.kind, FileKind::Directory);
        assert_ne!(root.id, Ino::ROOT, "the root shows the volume's own number");
        let found = find(&tree, "base/1/16384").await.unwrap();
        assert_eq!(found.attributes.size, 100);
        let (handle, _) = tree.open(&Caller::internal(), found.id, false).await.unwrap();
        let bytes = tree.file(handle).unwrap().read(&Caller::internal(), 0, 200).await.unwrap();
        assert_eq!(bytes.len(), 100);
    }
}
