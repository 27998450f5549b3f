//! What this kernel makes of one file that is open in several modes at once: the facts that `mount::fuse` stands on.
//!
//! A file system of one file answers each open as the test says, right or wrong. A kernel on which one of these fails is
//! one on which writable mounts have to be looked at again (docs/decisions/2001-io-modes.md).

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fuser::{
    BackingId, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{Whence, lseek};

use crate::harness::{can_pass_through, maps_shared};

/// How an open is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Direct,
    Cached,
    Passthrough,
    /// Reads and writes direct, mappings passed through.
    PassthroughDirect,
    /// By an id of its own for the same local file.
    PassthroughElsewhere,
}

use Mode::{Cached, Direct, Passthrough, PassthroughDirect, PassthroughElsewhere};

const SIZE: u64 = 1 << 20;
const FOREVER: Duration = Duration::from_secs(3600);
const FILE: INodeNo = INodeNo(2);

/// What came to the file system.
#[derive(Debug, Default)]
struct Seen {
    passthrough_offered: AtomicBool,
    open: AtomicI64,
    /// Reads that a process waits for, and those that only fill the page cache.
    reads: AtomicU64,
    reads_ahead: AtomicU64,
    writes: AtomicU64,
    syncs: AtomicU64,
    allocations: AtomicU64,
    seeks: AtomicU64,
    cuts: AtomicU64,
}

/// A file system of one file.
struct OneFile {
    local: File,
    next: Arc<Mutex<Mode>>,
    seen: Arc<Seen>,
    ids: Mutex<Vec<BackingId>>,
}

impl OneFile {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let found = self.local.metadata().unwrap();
        let is_file = ino == FILE;
        let time = found.modified().unwrap();
        FileAttr {
            ino,
            size: if is_file { found.len() } else { 0 },
            blocks: found.blocks(),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::SeqCst);
}

impl Filesystem for OneFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
            self.seen.passthrough_offered.store(true, Ordering::SeqCst);
            config.set_max_stack_depth(1).unwrap();
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "file" {
            reply.entry(&FOREVER, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(ino));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            count(&self.seen.cuts);
            self.local.set_len(size).unwrap();
        }
        reply.attr(&FOREVER, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.seen.open.fetch_add(1, Ordering::SeqCst);
        let mode = *self.next.lock().unwrap();
        let flags = match mode {
            Direct => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            PassthroughDirect => FopenFlags::FOPEN_DIRECT_IO,
            Cached | Passthrough | PassthroughElsewhere => FopenFlags::empty(),
        };
        if matches!(mode, Direct | Cached) {
            return reply.opened(FileHandle(1), flags);
        }
        let mut ids = self.ids.lock().unwrap();
        if ids.is_empty() || mode == PassthroughElsewhere {
            ids.push(reply.open_backing(&self.local).unwrap());
        }
        let id = if mode == PassthroughElsewhere { ids.last() } else { ids.first() };
        reply.opened_passthrough(FileHandle(1), flags, id.unwrap());
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // In the mode in which the last open was answered.
        if owner.is_none() {
            count(&self.seen.reads_ahead);
            if *self.next.lock().unwrap() == Passthrough {
                return reply.error(Errno::EAGAIN);
            }
        } else {
            count(&self.seen.reads);
        }
        let mut content = vec![0; size as usize];
        let read = self.local.read_at(&mut content, offset).unwrap();
        reply.data(&content[..read]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        count(&self.seen.writes);
        self.local.write_all_at(data, offset).unwrap();
        reply.written(data.len() as u32);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.seen.open.fetch_sub(1, Ordering::SeqCst);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        count(&self.seen.syncs);
        reply.ok();
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        count(&self.seen.allocations);
        reply.ok();
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, offset: i64, _: i32, reply: ReplyLseek) {
        count(&self.seen.seeks);
        reply.offset(offset);
    }
}

/// The file system, mounted.
struct Bench {
    next: Arc<Mutex<Mode>>,
    seen: Arc<Seen>,
    scratch: tempfile::TempDir,
}

impl Bench {
    fn mount() -> Option<Self> {
        if !can_pass_through() {
            return None;
        }
        let scratch = tempfile::Builder::new().prefix("walden-mount-").tempdir().unwrap();
        let local = scratch.path().join("local");
        std::fs::write(&local, vec![b'a'; SIZE as usize]).unwrap();
        let local = File::options().read(true).write(true).open(local).unwrap();
        let point = scratch.path().join("mnt");
        std::fs::create_dir(&point).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data =
            format!("fd={},rootmode=40755,user_id=0,group_id=0,default_permissions", device.as_raw_fd());
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        mount(Some("walden-test"), &point, Some("fuse.walden"), flags, Some(data.as_str())).unwrap();
        let (next, seen) = (Arc::new(Mutex::new(Direct)), Arc::<Seen>::default());
        let bench = Self { next: next.clone(), seen: seen.clone(), scratch };
        let files = OneFile { local, next, seen, ids: Mutex::default() };
        let session = Session::from_fd(files, device.into(), SessionACL::Owner, Config::default()).unwrap();
        // It ends when the file system is gone.
        std::thread::spawn(move || session.run());
        assert!(bench.seen.passthrough_offered.load(Ordering::SeqCst), "the kernel does not offer it");
        Some(bench)
    }

    fn path(&self) -> PathBuf {
        self.scratch.path().join("mnt/file")
    }

    /// Opens the file, answered in this mode.
    fn open(&self, mode: Mode) -> io::Result<File> {
        *self.next.lock().unwrap() = mode;
        File::options().read(true).write(true).open(self.path())
    }

    fn outcome(&self, mode: Mode) -> Result<(), i32> {
        self.open(mode).map(drop).map_err(|error| error.raw_os_error().unwrap())
    }

    /// Waits until the file system has heard of every close.
    fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.seen.open.load(Ordering::SeqCst) > 0 {
            assert!(Instant::now() < deadline, "a close was never heard of");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn seen(&self, counter: impl Fn(&Seen) -> &AtomicU64) -> u64 {
        counter(&self.seen).load(Ordering::SeqCst)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = umount2(&self.scratch.path().join("mnt"), MntFlags::MNT_DETACH);
    }
}

#[test]
fn an_open_has_to_fit_those_before_it_on_the_same_file() {
    let Some(bench) = Bench::mount() else { return };
    const NO: Result<(), i32> = Err(libc::EIO);
    for (held, second, expected) in [
        (Direct, Direct, Ok(())),
        (Direct, Passthrough, Ok(())),
        (Direct, Cached, Ok(())),
        (Passthrough, Passthrough, Ok(())),
        (Passthrough, PassthroughElsewhere, NO),
        (Passthrough, PassthroughDirect, Ok(())),
        (Passthrough, Direct, NO),
        (Passthrough, Cached, NO),
        (Cached, Cached, Ok(())),
        (Cached, Direct, Ok(())),
        (Cached, Passthrough, NO),
    ] {
        let first = bench.open(held).unwrap();
        assert_eq!(bench.outcome(second), expected, "{held:?}, then {second:?}");
        drop(first);
        bench.settle();
        assert_eq!(bench.outcome(second), Ok(()), "{second:?} after {held:?} was closed");
        bench.settle();
    }
}

#[test]
fn direct_and_passed_through_show_the_same_file() {
    let Some(bench) = Bench::mount() else { return };
    let (direct, passed) = (bench.open(Direct).unwrap(), bench.open(Passthrough).unwrap());
    let mut four = [0; 4];
    passed.write_all_at(b"past", 0).unwrap();
    direct.read_exact_at(&mut four, 0).unwrap();
    assert_eq!(&four, b"past");
    direct.write_all_at(b"here", 4).unwrap();
    passed.read_exact_at(&mut four, 4).unwrap();
    assert_eq!(&four, b"here");
    let sizes = || {
        let by_name = std::fs::metadata(bench.path()).unwrap().len();
        let ends = [&direct, &passed].map(|file| lseek(file, 0, Whence::SeekEnd).unwrap() as u64);
        [direct.metadata().unwrap().len(), passed.metadata().unwrap().len(), by_name, ends[0], ends[1]]
    };
    assert_eq!(sizes(), [SIZE; 5]);
    passed.write_all_at(b"longer", SIZE).unwrap();
    assert_eq!(sizes(), [SIZE + 6; 5]);
    direct.write_all_at(b"still", SIZE + 6).unwrap();
    assert_eq!(sizes(), [SIZE + 11; 5]);
    passed.set_len(5000).unwrap();
    assert_eq!(sizes(), [5000; 5]);
    assert_eq!(bench.seen(|seen| &seen.writes), 2);
    assert_eq!(bench.seen(|seen| &seen.reads), 1);
}

#[test]
fn only_what_is_passed_through_can_be_mapped_by_several() {
    let Some(bench) = Bench::mount() else { return };
    let direct = bench.open(Direct).unwrap();
    assert_eq!(maps_shared(&direct), Err(libc::ENODEV));
    let passed = bench.open(Passthrough).unwrap();
    assert_eq!(maps_shared(&passed), Ok(()));
    assert_eq!(maps_shared(&direct), Err(libc::ENODEV));
    assert_eq!(bench.seen(|seen| &seen.reads) + bench.seen(|seen| &seen.reads_ahead), 0);
}

#[test]
fn of_a_file_that_is_passed_through_all_but_reads_and_writes_still_comes() {
    let Some(bench) = Bench::mount() else { return };
    let passed = bench.open(Passthrough).unwrap();
    passed.write_all_at(&[1; 8192], 0).unwrap();
    passed.sync_all().unwrap();
    passed.sync_data().unwrap();
    fallocate(&passed, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 4096).unwrap();
    lseek(&passed, 0, Whence::SeekData).unwrap();
    passed.set_len(100).unwrap();
    let seen = [
        bench.seen(|seen| &seen.syncs),
        bench.seen(|seen| &seen.allocations),
        bench.seen(|seen| &seen.seeks),
        bench.seen(|seen| &seen.cuts),
        bench.seen(|seen| &seen.writes),
        bench.seen(|seen| &seen.reads),
    ];
    assert_eq!(seen, [2, 1, 1, 1, 0, 0]);
    // A write that has to be on stable storage at its end is synced past us.
    let synced = File::options().write(true).custom_flags(libc::O_DSYNC).open(bench.path()).unwrap();
    synced.write_all_at(&[2; 100], 0).unwrap();
    assert_eq!(bench.seen(|seen| &seen.syncs), 2);
}

/// Such a hint comes as a read that nobody waits for. Refused, it does no harm; answered short it would cut the file.
#[test]
fn a_hint_on_a_file_that_is_passed_through_comes_as_a_read_and_may_be_refused() {
    let Some(bench) = Bench::mount() else { return };
    let hint = |file: &File, offset: i64| {
        posix_fadvise(file, offset, 32_768, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
    };
    let wait_for = |count: u64| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while bench.seen(|seen| &seen.reads_ahead) < count {
            assert!(Instant::now() < deadline, "the hint never came");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let passed = bench.open(Passthrough).unwrap();
    hint(&passed, 65_536);
    wait_for(1);
    hint(&passed, SIZE as i64 - 4096);
    wait_for(2);
    let mut content = [0; 8192];
    passed.read_exact_at(&mut content, 65_536).unwrap();
    assert_eq!(content, [b'a'; 8192]);
    assert_eq!(passed.metadata().unwrap().len(), SIZE);
    assert_eq!(lseek(&passed, 0, Whence::SeekEnd).unwrap() as u64, SIZE);
    passed.sync_all().unwrap();
    drop(passed);
    bench.settle();
    // On a direct one too, and there the reads of processes can be told from it by their owner.
    let direct = bench.open(Direct).unwrap();
    hint(&direct, 131_072);
    wait_for(3);
    direct.read_exact_at(&mut content, 131_072).unwrap();
    assert_eq!(bench.seen(|seen| &seen.reads), 1);
}
