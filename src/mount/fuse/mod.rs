//! The FUSE adapter: translates kernel requests to operations on the tree, and answers them.
//!
//! The only folder that names fuser. Every request becomes a future; it is polled once on the dispatcher's thread, so
//! what needs no waiting is answered there and then, and handed to tokio otherwise. Requests under way are bounded
//! by the kernel: [`MAX_BACKGROUND`] and one for each waiting thread.
//!
//! `getxattr`, `listxattr` and `flush` answer ENOSYS on purpose: the kernel then stops asking, once a write and once
//! a close. `fsync`, `fsyncdir`, `fallocate`, `lseek` and `link` never do: the kernel would take ENOSYS from an fsync
//! for success, for ever (failure 37).

mod reply;

use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use bytes::Bytes;
use fuser::{
    BsdFileFlags, Config, Errno as FuseErrno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use futures::FutureExt;
use nix::errno::Errno;

use crate::disk::Owner;
use crate::mount::caller::Caller;
use crate::mount::fs::{NewNode, RenameMode, Seek, SetAttributes, SetTime};
use crate::mount::fuse::reply::{
    file_attr, file_type, open_flags, reply_attributes, reply_capacity, reply_empty, reply_entry,
    time_to_live,
};
use crate::mount::tree::{HandleId, Ino, Tree};

/// Requests the kernel keeps under way by itself (readahead, WILLNEED): enough to hide 20 ms behind prefetch.
const MAX_BACKGROUND: u16 = 256;

/// The largest request; the kernel's own limit is 256 pages.
const REQUEST_BYTES_MAX: u32 = 1024 * 1024;

/// Threads that read requests: more than two gain nothing, since whatever waits is handed to tokio.
const DISPATCHERS: usize = 2;

/// A mount's loop: it answers requests until the file system is unmounted.
#[derive(Debug)]
pub(crate) struct Loop {
    thread: std::thread::JoinHandle<io::Result<()>>,
}

impl Loop {
    /// Shakes hands with the kernel over an already mounted device and starts answering.
    pub(crate) fn start(
        tree: Arc<Tree>,
        device: OwnedFd,
        anyone: bool,
        runtime: tokio::runtime::Handle,
    ) -> io::Result<Self> {
        let acl = if anyone { SessionACL::All } else { SessionACL::Owner };
        let mut config = Config::default();
        config.acl = acl;
        config.n_threads = Some(DISPATCHERS);
        let session = Session::from_fd(Adapter { tree, runtime }, device, acl, config)?;
        let thread = std::thread::Builder::new().name("walden-fuse".into()).spawn(move || session.run())?;
        Ok(Self { thread })
    }

    /// Waits until the file system is unmounted.
    pub(crate) fn join(self) -> io::Result<()> {
        self.thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that answers FUSE requests panicked")))
    }
}

#[derive(Debug)]
struct Adapter {
    tree: Arc<Tree>,
    runtime: tokio::runtime::Handle,
}

impl Adapter {
    /// Runs `work` here as far as it goes without waiting, and the rest on tokio; then replies.
    fn answer<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Errno>> + Send + 'static,
        reply: impl FnOnce(Result<T, FuseErrno>) + Send + 'static,
    ) {
        let outcome = |caught: std::thread::Result<Result<T, Errno>>| match caught {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(errno)) => Err(FuseErrno::from_i32(errno as i32)),
            Err(_) => {
                tracing::error!("a file system operation panicked");
                Err(FuseErrno::EIO)
            }
        };
        let mut work = Box::pin(AssertUnwindSafe(work).catch_unwind());
        let _runtime = self.runtime.enter();
        match work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(caught) => reply(outcome(caught)),
            // Polled again at once by tokio, so no wake-up is lost on the waker that does nothing.
            Poll::Pending => drop(self.runtime.spawn(async move { reply(outcome(work.await)) })),
        }
    }

    /// Runs an operation on the tree for a caller; see [`Self::answer`].
    fn with_tree<T, F>(
        &self,
        request: &Request,
        operation: impl FnOnce(Arc<Tree>, Caller) -> F,
        reply: impl FnOnce(Result<T, FuseErrno>) + Send + 'static,
    ) where
        T: Send + 'static,
        F: Future<Output = Result<T, Errno>> + Send + 'static,
    {
        let pid = Some(request.pid()).filter(|pid| *pid != 0);
        let owner = Owner { uid: request.uid(), gid: request.gid() };
        let caller = Caller { pid, owner, is_background: false };
        self.answer(operation(self.tree.clone(), caller), reply);
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted =
            InitFlags::FUSE_PARALLEL_DIROPS | InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_CACHE_SYMLINKS;
        // An older kernel lacks some; each only makes things faster.
        let _ = config.add_capabilities(wanted & config.capabilities());
        let refused = |_| io::Error::other("fuser refused a constant");
        config.set_max_background(MAX_BACKGROUND).map_err(refused)?;
        config.set_max_write(REQUEST_BYTES_MAX).map_err(|_| io::Error::other("fuser refused a constant"))?;
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

    fn getattr(&self, request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
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
        self.with_tree(
            request,
            move |tree, caller| async move { tree.open(&caller, Ino(ino.0), writable).await },
            |opened| match opened {
                Ok((handle, mode)) => reply.opened(FileHandle(handle.0), open_flags(mode)),
                Err(errno) => reply.error(errno),
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
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
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
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = Bytes::copy_from_slice(data);
        // A request is at most REQUEST_BYTES_MAX long.
        let length = data.len() as u32;
        self.with_tree(
            request,
            move |tree, caller| async move { tree.file(HandleId(handle.0))?.write(&caller, offset, data).await },
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
        self.tree.release(HandleId(handle.0));
        reply.ok();
    }

    fn fsync(&self, request: &Request, _: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
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
        self.with_tree(
            request,
            move |tree, caller| async move {
                tree.create(&caller, Ino(parent.0), &name, mode & 0o7777, exclusive).await
            },
            |created| match created {
                Ok((entry, handle, mode)) => reply.created(
                    &time_to_live(entry.lifetime),
                    &file_attr(&entry),
                    Generation(0),
                    FileHandle(handle.0),
                    open_flags(mode),
                ),
                Err(errno) => reply.error(errno),
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
