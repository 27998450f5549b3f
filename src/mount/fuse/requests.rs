//! Each of the kernel's requests: which operation on the tree it is, and how the outcome is answered.
//!
//! `getxattr`, `listxattr` and `flush` answer ENOSYS on purpose: the kernel then stops asking, once a write and once
//! a close. `fsync`, `fsyncdir`, `fallocate`, `lseek` and `link` never do: the kernel would take ENOSYS from an fsync
//! for success, for ever (failure 37). Of a file that is passed through these still come here, and `setattr` too; reads,
//! writes and mappings do not.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use fuser::{
    BsdFileFlags, Errno as FuseErrno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use nix::errno::Errno;

use crate::clock::{Clock, SystemClock};
use crate::mount::fs::{NewNode, RenameMode, Seek, SetAttributes, SetTime};
use crate::mount::fuse::adapter::Adapter;
use crate::mount::fuse::modes::OLD_KERNEL;
use crate::mount::fuse::reply::{
    file_type, reply_attributes, reply_capacity, reply_created, reply_empty, reply_entry, reply_opened,
};
use crate::mount::tree::{HandleId, Ino, Tree};

/// Requests the kernel keeps under way by itself (readahead, WILLNEED): enough to hide 20 ms behind prefetch.
const MAX_BACKGROUND: u16 = 256;

/// The largest request; the kernel's own limit is 256 pages.
const REQUEST_BYTES_MAX: u32 = 1024 * 1024;

/// What files are passed through to may not itself stand on another file system; none of those an upper takes does.
const STACK_DEPTH: u32 = 1;

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted =
            InitFlags::FUSE_PARALLEL_DIROPS | InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_CACHE_SYMLINKS;
        // An older kernel lacks some; each only makes things faster.
        let _ = config.add_capabilities(wanted & config.capabilities());
        config.set_max_background(MAX_BACKGROUND).map_err(refused)?;
        // Beyond the threshold, which is lower by default, the kernel drops what is only read ahead.
        config.set_congestion_threshold(MAX_BACKGROUND).map_err(refused)?;
        config.set_max_write(REQUEST_BYTES_MAX).map_err(refused)?;
        if self.is_writable {
            match config.add_capabilities(InitFlags::FUSE_PASSTHROUGH) {
                Ok(()) => {
                    config.set_max_stack_depth(STACK_DEPTH).map_err(refused)?;
                }
                Err(_) => self.modes.lacks(OLD_KERNEL),
            }
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        self.with_tree(
            request,
            |tree, caller| async move { tree.lookup(&caller, Ino(parent.0), &name).await },
            |found| reply_entry(reply, found),
        );
    }

    fn forget(&self, _: &Request, ino: INodeNo, references: u64) {
        self.tree.forget(Ino(ino.0), references);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        if let Some(handle) = handle {
            self.used(handle);
        }
        self.with_tree(
            request,
            |tree, caller| async move { tree.attributes(&caller, Ino(ino.0)).await },
            |found| reply_attributes(reply, found),
        );
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let time = |time: TimeOrNow| match time {
            TimeOrNow::Now => SetTime::Now,
            TimeOrNow::SpecificTime(at) => SetTime::At(at),
        };
        let mode = mode.map(|mode| mode & 0o7777);
        let set = SetAttributes { mode, uid, gid, size, atime: atime.map(time), mtime: mtime.map(time) };
        self.with_tree(
            request,
            |tree, caller| async move { tree.set_attributes(&caller, Ino(ino.0), set).await },
            |found| reply_attributes(reply, found),
        );
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        self.with_tree(
            request,
            |tree, caller| async move { tree.read_link(&caller, Ino(ino.0)).await },
            |target| match target {
                Ok(target) => reply.data(&target),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let what = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => NewNode::File,
            libc::S_IFIFO => NewNode::Fifo,
            libc::S_IFSOCK => NewNode::Socket,
            _ => return reply.error(FuseErrno::EPERM),
        };
        let name = name.as_bytes().to_vec();
        self.with_tree(
            request,
            move |tree, caller| async move {
                tree.make_node(&caller, Ino(parent.0), &name, what, mode & 0o7777).await
            },
            |made| reply_entry(reply, made),
        );
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let name = name.as_bytes().to_vec();
        self.with_tree(
            request,
            move |tree, caller| async move {
                tree.make_directory(&caller, Ino(parent.0), &name, mode & 0o7777).await
            },
            |made| reply_entry(reply, made),
        );
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        self.with_tree(
            request,
            |tree, caller| async move { tree.unlink(&caller, Ino(parent.0), &name).await },
            |done| reply_empty(reply, done),
        );
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        self.with_tree(
            request,
            |tree, caller| async move { tree.remove_directory(&caller, Ino(parent.0), &name).await },
            |done| reply_empty(reply, done),
        );
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        let target = target.as_os_str().as_bytes().to_vec();
        self.with_tree(
            request,
            |tree, caller| async move { tree.make_symlink(&caller, Ino(parent.0), &name, &target).await },
            |made| reply_entry(reply, made),
        );
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = if flags.is_empty() {
            RenameMode::Replace
        } else if flags == RenameFlags::RENAME_NOREPLACE {
            RenameMode::NoReplace
        } else {
            return reply.error(FuseErrno::EINVAL);
        };
        let (name, new_name) = (name.as_bytes().to_vec(), new_name.as_bytes().to_vec());
        self.with_tree(
            request,
            move |tree, caller| async move {
                tree.rename(&caller, (Ino(parent.0), &name), (Ino(new_parent.0), &new_name), mode).await
            },
            |done| reply_empty(reply, done),
        );
    }

    fn link(&self, request: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        self.with_tree(
            request,
            |tree, caller| async move { tree.link(&caller, Ino(ino.0), Ino(parent.0), &name).await },
            |made| reply_entry(reply, made),
        );
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writable = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let is_synced = is_synced(flags.0);
        let (tree, modes) = (self.tree.clone(), self.modes.clone());
        self.with_tree(
            request,
            move |tree, caller| async move {
                let opened = tree.open(&caller, Ino(ino.0), writable).await?;
                if is_synced {
                    settle_name(&tree, opened.0).await?;
                }
                Ok(opened)
            },
            move |opened| {
                let opened = opened.map(|(handle, mode)| {
                    let make = || reply.open_backing(backing_file(&tree, handle)?);
                    (handle, modes.open(Ino(ino.0), handle, mode, SystemClock.monotonic(), make))
                });
                reply_opened(reply, opened);
            },
        );
    }

    fn read(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if self.used(handle) && owner.is_none() {
            // Reads of what is passed through do not come here, but WILLNEED does, as a read for the page cache in
            // which nobody looks. An answer with fewer bytes would make the file shorter, an error is dropped.
            if let Ok(file) = self.tree.file(HandleId(handle.0)) {
                file.will_need(offset, size);
            }
            return reply.error(FuseErrno::EAGAIN);
        }
        self.with_tree(
            request,
            move |tree, caller| async move { tree.file(HandleId(handle.0))?.read(&caller, offset, size).await },
            |read| match read {
                Ok(bytes) => reply.data(&bytes),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn write(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.used(handle);
        // Of a direct write the kernel leaves also this to us.
        let sync_data_only = is_synced(flags.0).then_some(flags.0 & libc::O_SYNC != libc::O_SYNC);
        let data = Bytes::copy_from_slice(data);
        // A request is at most REQUEST_BYTES_MAX long.
        let length = data.len() as u32;
        self.with_tree(
            request,
            move |tree, caller| async move {
                let file = tree.file(HandleId(handle.0))?;
                file.write(&caller, offset, data).await?;
                match sync_data_only {
                    Some(data_only) => file.sync(data_only).await,
                    None => Ok(()),
                }
            },
            move |written| match written {
                Ok(()) => reply.written(length),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(FuseErrno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        // Before the file: while it has an id, it has to be known that it is wholly local.
        self.modes.release(HandleId(handle.0));
        self.tree.release(HandleId(handle.0));
        reply.ok();
    }

    fn fsync(&self, request: &Request, _: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        self.used(handle);
        self.with_tree(
            request,
            move |tree, _| async move { tree.file(HandleId(handle.0))?.sync(data_only).await },
            |done| reply_empty(reply, done),
        );
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.with_tree(
            request,
            move |tree, _| async move { tree.open_directory(Ino(ino.0)).await },
            |opened| match opened {
                Ok(handle) => reply.opened(FileHandle(handle.0), FopenFlags::empty()),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn readdir(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.with_tree(
            request,
            move |tree, caller| async move {
                let listing = tree.directory(HandleId(handle.0))?;
                let outcome = listing
                    .read(&caller, offset, |next, entry| {
                        let name = OsStr::from_bytes(&entry.name);
                        !reply.add(INodeNo(entry.id.0), next, file_type(entry.kind), name)
                    })
                    .await;
                // The buffer goes along with the outcome, because replying consumes it.
                Ok((reply, outcome))
            },
            |listed| match listed {
                Ok((reply, Ok(()))) => reply.ok(),
                Ok((reply, Err(errno))) => reply.error(FuseErrno::from_i32(errno as i32)),
                // The buffer was dropped, which answers EIO.
                Err(_) => {}
            },
        );
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.tree.release(HandleId(handle.0));
        reply.ok();
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.with_tree(
            request,
            move |tree, _| async move { tree.sync_directory(Ino(ino.0)).await },
            |done| reply_empty(reply, done),
        );
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.with_tree(
            request,
            move |tree, _| async move { tree.capacity(Ino(ino.0)) },
            |capacity| reply_capacity(reply, capacity),
        );
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(FuseErrno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(FuseErrno::ENOSYS);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = name.as_bytes().to_vec();
        let exclusive = flags & libc::O_EXCL != 0;
        let (tree, modes) = (self.tree.clone(), self.modes.clone());
        self.with_tree(
            request,
            move |tree, caller| async move {
                tree.create(&caller, Ino(parent.0), &name, mode & 0o7777, exclusive).await
            },
            move |created| {
                let created = created.map(|(entry, handle, mode)| {
                    let make = || reply.open_backing(backing_file(&tree, handle)?);
                    (entry, handle, modes.open(entry.id, handle, mode, SystemClock.monotonic(), make))
                });
                reply_created(reply, created);
            },
        );
    }

    fn fallocate(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.used(handle);
        let keep_size = match mode {
            0 => false,
            libc::FALLOC_FL_KEEP_SIZE => true,
            _ => return reply.error(FuseErrno::EOPNOTSUPP),
        };
        self.with_tree(
            request,
            move |tree, _| async move { tree.file(HandleId(handle.0))?.allocate(offset, length, keep_size).await },
            |done| reply_empty(reply, done),
        );
    }

    fn lseek(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.used(handle);
        // The kernel answers the other kinds by itself.
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(FuseErrno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(FuseErrno::ENXIO) };
        self.with_tree(
            request,
            move |tree, _| async move { tree.file(HandleId(handle.0))?.seek(offset, what).await },
            |found| match found.map(i64::try_from) {
                Ok(Ok(found)) => reply.offset(found),
                Ok(Err(_)) => reply.error(FuseErrno::EOVERFLOW),
                Err(errno) => reply.error(errno),
            },
        );
    }
}

/// Returns the local file behind an open one.
fn backing_file(tree: &Tree, handle: HandleId) -> io::Result<OwnedFd> {
    Ok(tree.file(handle)?.backing()?)
}

/// Tells whether what is written has to be on stable storage when the write returns (`O_SYNC` has `O_DSYNC` in it).
fn is_synced(flags: i32) -> bool {
    flags & libc::O_DSYNC != 0
}

/// Puts on stable storage where a just opened file is found.
///
/// For one whose writes the kernel syncs without an fsync that we would see. Its data is left alone: the disk tells of a
/// failed write once, and that is for the next fsync to hear.
async fn settle_name(tree: &Tree, handle: HandleId) -> Result<(), Errno> {
    let settled = match tree.file(handle) {
        Ok(file) => file.sync_name().await,
        Err(errno) => Err(errno),
    };
    settled.inspect_err(|_| tree.release(handle))
}

fn refused<T>(_: T) -> io::Error {
    io::Error::other("fuser refused a constant")
}
