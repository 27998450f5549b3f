//! Answers in FUSE's terms: entries, attributes, flags and times to live.
//!
//! An error reply carries no time to live, so the kernel never remembers that a name is absent; what cannot change
//! behind its back it may remember for as long as it likes.

use std::time::Duration;

use fuser::{
    BackingId, Errno as FuseErrno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo,
    ReplyAttr, ReplyCreate, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
};

use crate::mount::fs::{Capacity, Entry, FileKind, IoMode, Lifetime};
use crate::mount::fuse::modes::Granted;
use crate::mount::tree::{HandleId, Ino};

/// How long the kernel may trust what cannot change behind its back.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

pub(super) fn reply_entry(reply: ReplyEntry, found: Result<Entry<Ino>, FuseErrno>) {
    match found {
        Ok(entry) => {
            let ttl = time_to_live(entry.lifetime);
            reply.entry_with_ttls(&ttl, &ttl, &file_attr(&entry), Generation(0));
        }
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_attributes(reply: ReplyAttr, found: Result<Entry<Ino>, FuseErrno>) {
    match found {
        Ok(entry) => reply.attr(&time_to_live(entry.lifetime), &file_attr(&entry)),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_opened(reply: ReplyOpen, opened: Result<(HandleId, Granted<BackingId>), FuseErrno>) {
    match opened {
        Ok((handle, Granted::Plain(mode))) => reply.opened(FileHandle(handle.0), open_flags(mode)),
        Ok((handle, Granted::Passthrough(id))) => {
            reply.opened_passthrough(FileHandle(handle.0), FopenFlags::empty(), &id);
        }
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_created(
    reply: ReplyCreate,
    created: Result<(Entry<Ino>, HandleId, Granted<BackingId>), FuseErrno>,
) {
    match created {
        Ok((entry, handle, granted)) => {
            let (ttl, shown) = (time_to_live(entry.lifetime), file_attr(&entry));
            let (generation, handle) = (Generation(0), FileHandle(handle.0));
            match granted {
                Granted::Plain(mode) => reply.created(&ttl, &shown, generation, handle, open_flags(mode)),
                Granted::Passthrough(id) => {
                    reply.created_passthrough(&ttl, &shown, generation, handle, FopenFlags::empty(), &id);
                }
            }
        }
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_empty(reply: ReplyEmpty, done: Result<(), FuseErrno>) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

pub(super) fn reply_capacity(reply: ReplyStatfs, found: Result<Capacity, FuseErrno>) {
    const NAME_BYTES_MAX: u32 = 255;
    match found {
        Ok(c) => reply.statfs(
            c.blocks,
            c.blocks_free,
            c.blocks_available,
            c.files,
            c.files_free,
            c.block_size,
            NAME_BYTES_MAX,
            c.block_size,
        ),
        Err(errno) => reply.error(errno),
    }
}

fn time_to_live(lifetime: Lifetime) -> Duration {
    match lifetime {
        Lifetime::Forever => FOREVER,
        Lifetime::Once => Duration::ZERO,
    }
}

fn open_flags(mode: IoMode) -> FopenFlags {
    match mode {
        IoMode::Cached => FopenFlags::FOPEN_KEEP_CACHE,
        // Also what is answered for a file that cannot be passed through on this mount.
        IoMode::Direct | IoMode::Passthrough => {
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        }
    }
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::File => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

fn file_attr(entry: &Entry<Ino>) -> FileAttr {
    let shown = &entry.attributes;
    FileAttr {
        ino: INodeNo(entry.id.0),
        size: shown.size,
        blocks: shown.blocks,
        atime: shown.atime,
        mtime: shown.mtime,
        ctime: shown.ctime,
        crtime: shown.ctime,
        kind: file_type(shown.kind),
        // Permission bits fit: they were masked where they came from.
        perm: (shown.mode & 0o7777) as u16,
        nlink: shown.links,
        uid: shown.owner.uid,
        gid: shown.owner.gid,
        rdev: 0,
        blksize: shown.io_bytes,
        flags: 0,
    }
}
