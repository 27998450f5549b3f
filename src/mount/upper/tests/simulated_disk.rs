//! A disk in memory that loses power at a chosen system call.
//!
//! It keeps what a journalling file system with ordered data and delayed allocation keeps: changes of names and
//! attributes, and cuts, survive as a prefix of what was done, at least as far as the last sync of anything. Each
//! written block of 4 KiB and each growth of a file by writing survives by itself or not, unless that file was synced;
//! only a growth brings the blocks with it that it allocated. From the log of changes and a seed a state after the cut
//! is made, on which the upper is opened again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use crate::disk::Owner;
use crate::mount::fs::{Attributes, Capacity, FileKind, IO_BYTES_USUAL, NewNode, SetTime};
use crate::mount::upper::local_disk::{LocalDirectory, LocalDisk, LocalFile, LocalStat, Times};

const BLOCK: u64 = 4096;
const ROOT: u64 = 1;

/// The disk; clones are the same disk.
#[derive(Debug, Clone)]
pub(crate) struct SimulatedDisk {
    inner: Arc<Mutex<Inner>>,
    hold: Arc<Hold>,
    write_hold: Arc<Hold>,
}

/// Keeps calls waiting.
#[derive(Debug, Default)]
struct Hold {
    is_on: AtomicBool,
    waiting: AtomicUsize,
}

impl Hold {
    /// Waits while it is on; no longer than somebody who is kept waiting by that would believe.
    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        for _ in 0..10_000 {
            if !self.is_on.load(Ordering::SeqCst) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct Inner {
    state: State,
    log: Vec<Logged>,
    /// Changes of names, sizes and attributes before this one are on the disk.
    forced: usize,
    calls_left: u64,
    next_inode: u64,
    full: bool,
    /// Blocks of 1000 that are free, where it tells.
    told_free: Option<u64>,
    /// What the next syncs fail with; each is told once.
    lost: VecDeque<i32>,
    write_failures: u32,
}

#[derive(Debug, Clone)]
struct Logged {
    change: Change,
    /// A block or a growth that was synced.
    forced: bool,
    /// The growth that may only be on the disk together with this block, because it allocated it.
    growth: Option<usize>,
}

#[derive(Debug, Clone)]
enum Change {
    Create { inode: u64, directory: u64, name: Vec<u8>, kind: FileKind, mode: u32, target: Vec<u8> },
    Remove { directory: u64, name: Vec<u8> },
    Rename { from: (u64, Vec<u8>), to: (u64, Vec<u8>) },
    Link { inode: u64, directory: u64, name: Vec<u8> },
    Size { inode: u64, size: u64 },
    Growth { inode: u64, size: u64 },
    Origin { inode: u64, origin: Vec<u8> },
    Mode { inode: u64, mode: u32 },
    Modified { inode: u64, at: SystemTime },
    Hole { inode: u64, blocks: std::ops::Range<u64> },
    Block { inode: u64, block: u64, bytes: Vec<u8> },
}

#[derive(Debug, Clone, Default)]
struct State {
    inodes: BTreeMap<u64, Inode>,
}

#[derive(Debug, Clone)]
struct Inode {
    kind: FileKind,
    mode: u32,
    size: u64,
    links: u32,
    modified: SystemTime,
    origin: Option<Vec<u8>>,
    target: Vec<u8>,
    blocks: BTreeMap<u64, Vec<u8>>,
    /// Reserved and in the cache, so that it counts as data; after a power cut it does not.
    reserved: BTreeSet<u64>,
    entries: BTreeMap<Vec<u8>, u64>,
}

#[derive(Debug)]
struct SimulatedFile {
    disk: SimulatedDisk,
    inode: u64,
}

impl SimulatedDisk {
    /// Creates a disk with an upper's private area on it, which loses power after this many calls.
    pub(crate) fn new(calls: u64) -> Self {
        let mut state = State::default();
        state.inodes.insert(ROOT, Inode::new(FileKind::Directory, 0o700, Vec::new()));
        let disk = Self::holding(state, u64::MAX);
        for path in [".walden", ".walden/held", ".walden/tmp"] {
            disk.make_directory(Path::new(path), 0o700).unwrap();
        }
        let mut inner = disk.lock();
        inner.log.clear();
        inner.calls_left = calls;
        drop(inner);
        disk
    }

    fn holding(state: State, calls_left: u64) -> Self {
        let next_inode = state.inodes.keys().max().map_or(ROOT, |last| last + 1);
        let (log, lost, write_failures) = (Vec::new(), VecDeque::new(), 0);
        let (full, told_free) = (false, None);
        let inner =
            Inner { state, log, forced: 0, calls_left, next_inode, full, told_free, lost, write_failures };
        Self { inner: Arc::new(Mutex::new(inner)), hold: Arc::default(), write_hold: Arc::default() }
    }

    /// Takes away, or gives back, the room for new blocks and new files.
    pub(crate) fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// Tells of so many free blocks of 1000 from now on, whatever is written.
    pub(crate) fn tell_free(&self, blocks: u64) {
        self.lock().told_free = Some(blocks);
    }

    /// Keeps syncs of files and directories waiting from now on, or lets them go on.
    pub(crate) fn hold_syncs(&self, is_on: bool) {
        self.hold.is_on.store(is_on, Ordering::SeqCst);
    }

    /// Tells whether a sync is kept waiting.
    pub(crate) fn is_syncing(&self) -> bool {
        self.hold.waiting.load(Ordering::SeqCst) > 0
    }

    /// Keeps writes waiting from now on, or lets them go on.
    pub(crate) fn hold_writes(&self, is_on: bool) {
        self.write_hold.is_on.store(is_on, Ordering::SeqCst);
    }

    /// Tells whether a write is kept waiting.
    pub(crate) fn is_writing(&self) -> bool {
        self.write_hold.waiting.load(Ordering::SeqCst) > 0
    }

    /// Loses a write, which the next sync of anything but a directory tells, and no other.
    pub(crate) fn lose_a_write(&self, number: i32) {
        self.lock().lost.push_back(number);
    }

    /// Makes the next writes fail.
    pub(crate) fn fail_writes(&self, count: u32) {
        self.lock().write_failures = count;
    }

    /// Tells whether the power is gone.
    pub(crate) fn is_dead(&self) -> bool {
        self.lock().calls_left == 0
    }

    /// Returns the disk as it is found after the cut; `chance` decides what of the rest survived.
    pub(crate) fn after_power_cut(&self, start: &Self, mut chance: impl FnMut() -> u64) -> Self {
        let inner = self.lock();
        let open = (inner.log.len() - inner.forced) as u64;
        let cut = inner.forced + (chance() % (open + 1)) as usize;
        let mut state = start.lock().state.clone();
        let coins: Vec<bool> =
            inner.log.iter().map(|logged| logged.forced || chance().is_multiple_of(2)).collect();
        for (at, logged) in inner.log.iter().enumerate() {
            let survives = match logged.change {
                Change::Block { .. } => coins[at] || logged.growth.is_some_and(|growth| coins[growth]),
                Change::Growth { .. } => coins[at],
                _ => at < cut,
            };
            if survives {
                state.apply(&logged.change);
            }
        }
        for found in state.inodes.values_mut() {
            // A block that was written but never counted lies beyond the end, and nobody ever sees it.
            found.cut(found.size);
        }
        let disk = Self::holding(state, u64::MAX);
        for (name, _) in disk.list(Path::new(".walden/tmp")).unwrap() {
            let left = Path::new(".walden/tmp").join(std::str::from_utf8(&name).unwrap());
            disk.remove_file(&left).or_else(|_| disk.remove_directory(&left)).unwrap();
        }
        disk
    }

    /// Returns a disk in the same state that starts counting anew.
    pub(crate) fn copy(&self) -> Self {
        Self::holding(self.lock().state.clone(), u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Counts a system call; after the cut none succeeds.
    fn call(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let mut inner = self.lock();
        inner.calls_left = inner.calls_left.saturating_sub(1);
        if inner.calls_left == 0 { Err(os(libc::EIO)) } else { Ok(inner) }
    }

    fn make(&self, path: &Path, kind: FileKind, mode: u32, target: &[u8]) -> io::Result<u64> {
        let mut inner = self.call()?;
        let (directory, name) = inner.parent(path)?;
        if inner.full {
            return Err(os(libc::ENOSPC));
        }
        if inner.state.inodes[&directory].entries.contains_key(&name) {
            return Err(os(libc::EEXIST));
        }
        let inode = inner.next_inode;
        inner.next_inode += 1;
        inner.change(Change::Create { inode, directory, name, kind, mode, target: target.to_vec() });
        Ok(inode)
    }

    fn remove(&self, path: &Path, directories: bool) -> io::Result<()> {
        let mut inner = self.call()?;
        let (directory, name) = inner.parent(path)?;
        let inode = *inner.state.inodes[&directory].entries.get(&name).ok_or_else(|| os(libc::ENOENT))?;
        let found = &inner.state.inodes[&inode];
        match (found.kind == FileKind::Directory, directories) {
            (true, false) => return Err(os(libc::EISDIR)),
            (false, true) => return Err(os(libc::ENOTDIR)),
            (true, true) if !found.entries.is_empty() => return Err(os(libc::ENOTEMPTY)),
            _ => {}
        }
        inner.change(Change::Remove { directory, name });
        Ok(())
    }
}

impl Inner {
    fn change(&mut self, change: Change) -> usize {
        self.state.apply(&change);
        self.log.push(Logged { change, forced: false, growth: None });
        self.log.len() - 1
    }

    fn find(&self, path: &Path) -> io::Result<u64> {
        path.components().try_fold(ROOT, |at, name| {
            let name = name.as_os_str().as_encoded_bytes();
            self.state.inodes[&at].entries.get(name).copied().ok_or_else(|| os(libc::ENOENT))
        })
    }

    fn parent(&self, path: &Path) -> io::Result<(u64, Vec<u8>)> {
        let directory = self.find(path.parent().unwrap_or(Path::new("")))?;
        let name = path.file_name().ok_or_else(|| os(libc::EINVAL))?;
        Ok((directory, name.as_encoded_bytes().to_vec()))
    }

    fn sync(&mut self, file: Option<u64>) -> io::Result<()> {
        if let Some(number) = self.lost.pop_front() {
            return Err(os(number));
        }
        self.force(file);
        Ok(())
    }

    /// Everything so far but blocks is on the disk, and the blocks of one file, or of all.
    fn force(&mut self, file: Option<u64>) {
        self.forced = self.log.len();
        for logged in &mut self.log {
            if let Change::Block { inode, .. } | Change::Growth { inode, .. } = logged.change {
                logged.forced |= file.is_none_or(|file| file == inode);
            }
        }
    }

    fn stat(&self, inode: u64) -> LocalStat {
        let found = &self.state.inodes[&inode];
        let attributes = Attributes {
            kind: found.kind,
            mode: found.mode,
            owner: Owner::current(),
            size: found.size,
            blocks: found.blocks.len() as u64 * 8,
            links: found.links,
            atime: found.modified,
            mtime: found.modified,
            ctime: found.modified,
            io_bytes: IO_BYTES_USUAL,
        };
        LocalStat { inode, attributes }
    }
}

impl Inode {
    fn new(kind: FileKind, mode: u32, target: Vec<u8>) -> Self {
        Self {
            kind,
            mode,
            size: 0,
            links: 0,
            modified: SystemTime::UNIX_EPOCH,
            origin: None,
            target,
            blocks: BTreeMap::new(),
            reserved: BTreeSet::new(),
            entries: BTreeMap::new(),
        }
    }
}

impl Inode {
    /// Sets the size; what lies beyond it is gone.
    fn cut(&mut self, size: u64) {
        self.blocks.retain(|block, _| block * BLOCK < size);
        self.reserved.retain(|block| block * BLOCK < size);
        if let Some(bytes) = self.blocks.get_mut(&(size / BLOCK)) {
            bytes[(size % BLOCK) as usize..].fill(0);
        }
        self.size = size;
    }
}

impl State {
    /// Applies a change as far as what it is about is there.
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Create { inode, directory, name, kind, mode, target } => {
                self.inodes.insert(*inode, Inode::new(*kind, *mode, target.clone()));
                self.enter(*directory, name, *inode);
            }
            Change::Remove { directory, name } => drop(self.leave(*directory, name)),
            Change::Rename { from, to } => {
                if let Some(inode) = self.leave(from.0, &from.1) {
                    self.leave(to.0, &to.1);
                    self.enter(to.0, &to.1, inode);
                }
            }
            Change::Link { inode, directory, name } => self.enter(*directory, name, *inode),
            Change::Size { inode, size } => {
                if let Some(found) = self.inodes.get_mut(inode) {
                    found.cut(*size);
                }
            }
            Change::Growth { inode, size } => {
                if let Some(found) = self.inodes.get_mut(inode) {
                    found.size = found.size.max(*size);
                }
            }
            Change::Hole { inode, blocks } => {
                if let Some(found) = self.inodes.get_mut(inode) {
                    found.blocks.retain(|block, _| !blocks.contains(block));
                    found.reserved.retain(|block| !blocks.contains(block));
                }
            }
            Change::Block { inode, block, bytes } => {
                if let Some(found) = self.inodes.get_mut(inode) {
                    found.blocks.insert(*block, bytes.clone());
                }
            }
            Change::Origin { inode, origin } => {
                if let Some(found) = self.inodes.get_mut(inode) {
                    found.origin = Some(origin.clone());
                }
            }
            Change::Mode { inode, mode } => {
                if let Some(found) = self.inodes.get_mut(inode) {
                    found.mode = *mode;
                }
            }
            Change::Modified { inode, at } => {
                if let Some(found) = self.inodes.get_mut(inode) {
                    found.modified = *at;
                }
            }
        }
    }

    fn enter(&mut self, directory: u64, name: &[u8], inode: u64) {
        if let Some(directory) = self.inodes.get_mut(&directory) {
            directory.entries.insert(name.to_vec(), inode);
        }
        if let Some(found) = self.inodes.get_mut(&inode) {
            found.links += 1;
        }
    }

    fn leave(&mut self, directory: u64, name: &[u8]) -> Option<u64> {
        let inode = self.inodes.get_mut(&directory)?.entries.remove(name)?;
        // An inode without names stays here for who has it open; nobody else can find it.
        self.inodes.get_mut(&inode)?.links -= 1;
        Some(inode)
    }
}

impl LocalDisk for SimulatedDisk {
    fn stat(&self, path: &Path) -> io::Result<Option<LocalStat>> {
        let inner = self.call()?;
        Ok(inner.find(path).ok().map(|inode| inner.stat(inode)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn LocalFile>> {
        let inode = self.call()?.find(path)?;
        Ok(Arc::new(SimulatedFile { disk: self.clone(), inode }))
    }

    fn create(&self, path: &Path, mode: u32) -> io::Result<Arc<dyn LocalFile>> {
        let inode = self.make(path, FileKind::File, mode, b"")?;
        Ok(Arc::new(SimulatedFile { disk: self.clone(), inode }))
    }

    fn make_directory(&self, path: &Path, mode: u32) -> io::Result<()> {
        self.make(path, FileKind::Directory, mode, b"").map(drop)
    }

    fn make_node(&self, path: &Path, what: NewNode, mode: u32) -> io::Result<()> {
        let kind = match what {
            NewNode::File => FileKind::File,
            NewNode::Fifo => FileKind::Fifo,
            NewNode::Socket => FileKind::Socket,
        };
        self.make(path, kind, mode, b"").map(drop)
    }

    fn make_symlink(&self, target: &[u8], path: &Path) -> io::Result<()> {
        self.make(path, FileKind::Symlink, 0o777, target).map(drop)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.call()?;
        let inode = inner.find(from)?;
        let (directory, name) = inner.parent(to)?;
        inner.change(Change::Link { inode, directory, name });
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.call()?;
        inner.find(from)?;
        let (from, to) = (inner.parent(from)?, inner.parent(to)?);
        inner.change(Change::Rename { from, to });
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.remove(path, false)
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        self.remove(path, true)
    }

    fn read_link(&self, path: &Path) -> io::Result<Vec<u8>> {
        let inner = self.call()?;
        Ok(inner.state.inodes[&inner.find(path)?].target.clone())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(Vec<u8>, FileKind)>> {
        let inner = self.call()?;
        let entries = &inner.state.inodes[&inner.find(path)?].entries;
        Ok(entries.iter().map(|(name, inode)| (name.clone(), inner.state.inodes[inode].kind)).collect())
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        let mut inner = self.call()?;
        let inode = inner.find(path)?;
        inner.change(Change::Mode { inode, mode });
        Ok(())
    }

    fn set_owner(&self, _: &Path, _: Option<u32>, _: Option<u32>) -> io::Result<()> {
        self.call().map(drop)
    }

    fn set_times(&self, path: &Path, times: Times) -> io::Result<()> {
        let mut inner = self.call()?;
        let inode = inner.find(path)?;
        if let Some(SetTime::At(at)) = times.mtime {
            inner.change(Change::Modified { inode, at });
        }
        Ok(())
    }

    fn origin(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        let inner = self.call()?;
        Ok(inner.state.inodes[&inner.find(path)?].origin.clone())
    }

    fn set_origin(&self, path: &Path, origin: &[u8]) -> io::Result<()> {
        let mut inner = self.call()?;
        let inode = inner.find(path)?;
        inner.change(Change::Origin { inode, origin: origin.to_vec() });
        Ok(())
    }

    fn open_directory(&self, path: &Path) -> io::Result<Box<dyn LocalDirectory>> {
        let inode = self.call()?.find(path)?;
        Ok(Box::new(SimulatedFile { disk: self.clone(), inode }))
    }

    fn sync_all(&self) -> io::Result<()> {
        self.call()?.sync(None)
    }

    fn capacity(&self) -> io::Result<Capacity> {
        let Some(free) = self.lock().told_free else { return Ok(Capacity::default()) };
        let block_size = u32::try_from(BLOCK).expect("a block is small");
        Ok(Capacity { block_size, blocks: 1000, blocks_available: free, ..Capacity::default() })
    }
}

impl LocalDirectory for SimulatedFile {
    fn sync(&self) -> io::Result<()> {
        self.disk.hold.pass();
        self.disk.call()?.force(Some(self.inode));
        Ok(())
    }
}

impl LocalFile for SimulatedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let inner = self.disk.call()?;
        let found = &inner.state.inodes[&self.inode];
        let length = (buffer.len() as u64).min(found.size.saturating_sub(offset)) as usize;
        for (at, byte) in (offset..).zip(&mut buffer[..length]) {
            *byte = found.blocks.get(&(at / BLOCK)).map_or(0, |block| block[(at % BLOCK) as usize]);
        }
        Ok(length)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.disk.write_hold.pass();
        let mut inner = self.disk.call()?;
        if inner.write_failures > 0 {
            inner.write_failures -= 1;
            return Err(os(libc::EIO));
        }
        let end = offset + data.len() as u64;
        let mut written = Vec::new();
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let old = inner.state.inodes[&self.inode].blocks.get(&block).cloned();
            let allocated = old.is_none();
            if allocated && inner.full {
                return Err(os(libc::ENOSPC));
            }
            let mut bytes = old.unwrap_or_else(|| vec![0; BLOCK as usize]);
            for at in (block * BLOCK).max(offset)..((block + 1) * BLOCK).min(end) {
                bytes[(at % BLOCK) as usize] = data[(at - offset) as usize];
            }
            let change = inner.change(Change::Block { inode: self.inode, block, bytes });
            written.extend(allocated.then_some(change));
        }
        if end > inner.state.inodes[&self.inode].size {
            let growth = inner.change(Change::Growth { inode: self.inode, size: end });
            for block in written {
                inner.log[block].growth = Some(growth);
            }
        }
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.disk.call()?.change(Change::Size { inode: self.inode, size: length });
        Ok(())
    }

    fn allocate(&self, offset: u64, length: u64, keep_size: bool) -> io::Result<()> {
        let mut inner = self.disk.call()?;
        if !keep_size && offset + length > inner.state.inodes[&self.inode].size {
            inner.change(Change::Size { inode: self.inode, size: offset + length });
        }
        if let Some(found) = inner.state.inodes.get_mut(&self.inode) {
            found.reserved.extend(offset / BLOCK..(offset + length).div_ceil(BLOCK));
        }
        Ok(())
    }

    fn make_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let blocks = offset.div_ceil(BLOCK)..(offset + length).div_ceil(BLOCK);
        self.disk.call()?.change(Change::Hole { inode: self.inode, blocks });
        Ok(())
    }

    fn sync(&self, _data_only: bool) -> io::Result<()> {
        self.disk.hold.pass();
        self.disk.call()?.sync(Some(self.inode))
    }

    fn stat(&self) -> io::Result<LocalStat> {
        Ok(self.disk.call()?.stat(self.inode))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let inner = self.disk.call()?;
        let found = &inner.state.inodes[&self.inode];
        let from = offset / BLOCK..;
        let written = found.blocks.range(from.clone()).next().map(|(block, _)| *block);
        let next = written.into_iter().chain(found.reserved.range(from).next().copied()).min();
        Ok(next.map(|block| (block * BLOCK).max(offset)).filter(|at| *at < found.size))
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        let inner = self.disk.call()?;
        let found = &inner.state.inodes[&self.inode];
        let mut block = offset / BLOCK;
        while found.blocks.contains_key(&block) || found.reserved.contains(&block) {
            block += 1;
        }
        Ok((block * BLOCK).max(offset).min(found.size))
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.disk.call()?.change(Change::Mode { inode: self.inode, mode });
        Ok(())
    }

    fn set_owner(&self, _: Option<u32>, _: Option<u32>) -> io::Result<()> {
        self.disk.call().map(drop)
    }

    fn set_times(&self, times: Times) -> io::Result<()> {
        let mut inner = self.disk.call()?;
        if let Some(SetTime::At(at)) = times.mtime {
            inner.change(Change::Modified { inode: self.inode, at });
        }
        Ok(())
    }

    fn set_origin(&self, origin: &[u8]) -> io::Result<()> {
        self.disk.call()?.change(Change::Origin { inode: self.inode, origin: origin.to_vec() });
        Ok(())
    }

    fn read_ahead(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn descriptor(&self) -> io::Result<OwnedFd> {
        Err(os(libc::EOPNOTSUPP))
    }
}

fn os(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
