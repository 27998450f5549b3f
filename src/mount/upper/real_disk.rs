//! The local file system behind [`LocalDisk`]: system calls relative to one open directory.
//!
//! Nothing here decides anything; every method is one call and the translation of its answer.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{
    AtFlags, FallocateFlags, OFlag, PosixFadviseAdvice, RenameFlags, fallocate, openat, posix_fadvise,
    readlinkat, renameat2,
};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, futimens, mkdirat, mknodat, utimensat,
};
use nix::sys::statvfs::fstatvfs;
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, Whence, fchownat, linkat, lseek, symlinkat, unlinkat};

use crate::disk::Owner;
use crate::mount::fs::{Attributes, Capacity, FileKind, IO_BYTES_USUAL, NewNode, SetTime};
use crate::mount::upper::local_disk::{LocalDirectory, LocalDisk, LocalFile, LocalStat, Times};

/// The extended attribute that holds a file's origin.
pub(super) const ORIGIN_ATTRIBUTE: &CStr = c"user.walden.origin";

/// No origin is longer: a base length and a path.
const ORIGIN_BYTES_MAX: usize = 4096;

/// A directory of the local file system, held open.
#[derive(Debug)]
pub(crate) struct RealDisk {
    directory: File,
}

#[derive(Debug)]
struct RealFile(File);

#[derive(Debug)]
struct RealDirectory(File);

impl RealDisk {
    /// Takes hold of a directory, before anything is mounted over it.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { directory: File::open(path)? })
    }

    fn open_at(&self, path: &Path, flags: OFlag, mode: u32) -> io::Result<OwnedFd> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        Ok(openat(&self.directory, here(path), flags, Mode::from_bits_truncate(mode))?)
    }

    fn is_anothers(&self, path: &Path) -> io::Result<bool> {
        Ok(self.stat(path)?.is_some_and(|found| found.attributes.owner.uid != Owner::current().uid))
    }

    /// Opens a file or directory just to look at its attributes.
    fn open_to_look(&self, path: &Path) -> io::Result<OwnedFd> {
        // Never blocks on a fifo; nothing else is opened that could.
        self.open_at(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK, 0)
    }
}

impl LocalDisk for RealDisk {
    fn stat(&self, path: &Path) -> io::Result<Option<LocalStat>> {
        match fstatat(&self.directory, here(path), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(LocalStat {
                inode: found.st_ino,
                attributes: Attributes {
                    kind: kind_of(SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()))?,
                    mode: found.st_mode & 0o7777,
                    owner: Owner { uid: found.st_uid, gid: found.st_gid },
                    // Sizes and counts the kernel gives are never negative.
                    size: found.st_size as u64,
                    blocks: found.st_blocks as u64,
                    links: u32::try_from(found.st_nlink).unwrap_or(u32::MAX),
                    atime: time(found.st_atime, found.st_atime_nsec),
                    mtime: time(found.st_mtime, found.st_mtime_nsec),
                    ctime: time(found.st_ctime, found.st_ctime_nsec),
                    io_bytes: IO_BYTES_USUAL,
                },
            })),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn LocalFile>> {
        Ok(Arc::new(RealFile(self.open_at(path, OFlag::O_RDWR, 0)?.into())))
    }

    fn create(&self, path: &Path, mode: u32) -> io::Result<Arc<dyn LocalFile>> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        let file = RealFile(self.open_at(path, flags, mode)?.into());
        // The process's umask has no say: the caller's has been applied by the kernel.
        file.set_mode(mode)?;
        Ok(Arc::new(file))
    }

    fn make_directory(&self, path: &Path, mode: u32) -> io::Result<()> {
        mkdirat(&self.directory, path, Mode::from_bits_truncate(mode))?;
        self.set_mode(path, mode)
    }

    fn make_node(&self, path: &Path, what: NewNode, mode: u32) -> io::Result<()> {
        let kind = match what {
            NewNode::File => SFlag::S_IFREG,
            NewNode::Fifo => SFlag::S_IFIFO,
            NewNode::Socket => SFlag::S_IFSOCK,
        };
        mknodat(&self.directory, path, kind, Mode::from_bits_truncate(mode), 0)?;
        self.set_mode(path, mode)
    }

    fn make_symlink(&self, target: &[u8], path: &Path) -> io::Result<()> {
        Ok(symlinkat(OsStr::from_bytes(target), &self.directory, path)?)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(linkat(&self.directory, from, &self.directory, to, AtFlags::empty())?)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(renameat2(&self.directory, from, &self.directory, to, RenameFlags::empty())?)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        Ok(unlinkat(&self.directory, path, UnlinkatFlags::NoRemoveDir)?)
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        Ok(unlinkat(&self.directory, path, UnlinkatFlags::RemoveDir)?)
    }

    fn read_link(&self, path: &Path) -> io::Result<Vec<u8>> {
        Ok(readlinkat(&self.directory, path)?.into_vec())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(Vec<u8>, FileKind)>> {
        let directory = self.open_at(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY, 0)?;
        let mut names = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let kind = if kind.is_dir() {
                FileKind::Directory
            } else if kind.is_symlink() {
                FileKind::Symlink
            } else if kind.is_fifo() {
                FileKind::Fifo
            } else if kind.is_socket() {
                FileKind::Socket
            } else {
                FileKind::File
            };
            names.push((entry.file_name().into_vec(), kind));
        }
        Ok(names)
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        let mode = Mode::from_bits_truncate(mode);
        Ok(fchmodat(&self.directory, here(path), mode, FchmodatFlags::FollowSymlink)?)
    }

    fn set_owner(&self, path: &Path, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        Ok(fchownat(&self.directory, here(path), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    fn set_times(&self, path: &Path, times: Times) -> io::Result<()> {
        let (atime, mtime) = time_specs(times);
        Ok(utimensat(&self.directory, here(path), &atime, &mtime, UtimensatFlags::NoFollowSymlink)?)
    }

    fn origin(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open_to_look(path) {
            // What is another user's and closed to us came from no lower: `lost+found`, or a key that root has put there.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && self.is_anothers(path)? => {
                return Ok(None);
            }
            opened => opened?,
        };
        get_attribute(&file, ORIGIN_ATTRIBUTE)
    }

    fn set_origin(&self, path: &Path, origin: &[u8]) -> io::Result<()> {
        let file = self.open_to_look(path)?;
        set_attribute(&file, ORIGIN_ATTRIBUTE, origin)
    }

    fn open_directory(&self, path: &Path) -> io::Result<Box<dyn LocalDirectory>> {
        let directory = self.open_at(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY, 0)?;
        Ok(Box::new(RealDirectory(directory.into())))
    }

    #[expect(unsafe_code, reason = "no wrapper for syncfs")]
    fn sync_all(&self) -> io::Result<()> {
        // SAFETY: syncfs only needs a descriptor that stays open during the call.
        match unsafe { libc::syncfs(self.directory.as_raw_fd()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn capacity(&self) -> io::Result<Capacity> {
        let figures = fstatvfs(&self.directory)?;
        Ok(Capacity {
            block_size: u32::try_from(figures.fragment_size()).unwrap_or(4096),
            blocks: figures.blocks(),
            blocks_free: figures.blocks_free(),
            blocks_available: figures.blocks_available(),
            files: figures.files(),
            files_free: figures.files_free(),
        })
    }
}

impl LocalDirectory for RealDirectory {
    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }
}

impl LocalFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.0.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(more) => filled += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn allocate(&self, offset: u64, length: u64, keep_size: bool) -> io::Result<()> {
        let keep = if keep_size { FallocateFlags::FALLOC_FL_KEEP_SIZE } else { FallocateFlags::empty() };
        reserve(&self.0, keep, offset, length)
    }

    fn make_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        reserve(&self.0, punch, offset, length)
    }

    fn sync(&self, data_only: bool) -> io::Result<()> {
        if data_only { self.0.sync_data() } else { self.0.sync_all() }
    }

    fn stat(&self) -> io::Result<LocalStat> {
        let found = self.0.metadata()?;
        Ok(LocalStat {
            inode: found.ino(),
            attributes: Attributes {
                kind: FileKind::File,
                mode: found.mode() & 0o7777,
                owner: Owner { uid: found.uid(), gid: found.gid() },
                size: found.size(),
                blocks: found.blocks(),
                links: u32::try_from(found.nlink()).unwrap_or(u32::MAX),
                atime: time(found.atime(), found.atime_nsec()),
                mtime: time(found.mtime(), found.mtime_nsec()),
                ctime: time(found.ctime(), found.ctime_nsec()),
                io_bytes: IO_BYTES_USUAL,
            },
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match seek(&self.0, offset, Whence::SeekData) {
            Ok(at) => Ok(Some(at)),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        seek(&self.0, offset, Whence::SeekHole)
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.0.set_permissions(PermissionsExt::from_mode(mode))
    }

    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        std::os::unix::fs::fchown(&self.0, uid, gid)
    }

    fn set_times(&self, times: Times) -> io::Result<()> {
        let (atime, mtime) = time_specs(times);
        Ok(futimens(&self.0, &atime, &mtime)?)
    }

    fn set_origin(&self, origin: &[u8]) -> io::Result<()> {
        set_attribute(&self.0, ORIGIN_ATTRIBUTE, origin)
    }

    fn read_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        let (offset, length) = signed(offset, length)?;
        Ok(posix_fadvise(&self.0, offset, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?)
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(posix_fadvise(&self.0, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
    }

    fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }
}

/// Returns a path that system calls take for the directory itself where it is empty.
fn here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

fn kind_of(format: SFlag) -> io::Result<FileKind> {
    match format {
        SFlag::S_IFDIR => Ok(FileKind::Directory),
        SFlag::S_IFREG => Ok(FileKind::File),
        SFlag::S_IFLNK => Ok(FileKind::Symlink),
        SFlag::S_IFIFO => Ok(FileKind::Fifo),
        SFlag::S_IFSOCK => Ok(FileKind::Socket),
        _ => Err(io::Error::other("a device in the upper")),
    }
}

fn reserve(file: &File, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = signed(offset, length)?;
    Ok(fallocate(file, flags, offset, length)?)
}

/// Returns a range as system calls take it.
fn signed(offset: u64, length: u64) -> io::Result<(i64, i64)> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EFBIG);
    Ok((offset.try_into().map_err(too_large)?, length.try_into().map_err(too_large)?))
}

fn seek(file: &File, offset: u64, whence: Whence) -> io::Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::ENXIO))?;
    // Nobody uses the file's position: every read and write names its offset.
    Ok(lseek(file, offset, whence)? as u64)
}

fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    // The kernel keeps nanoseconds within a second.
    let part = Duration::from_nanos(nanoseconds as u64);
    let whole = Duration::from_secs(seconds.unsigned_abs());
    if seconds >= 0 { SystemTime::UNIX_EPOCH + whole + part } else { SystemTime::UNIX_EPOCH - whole + part }
}

fn time_specs(times: Times) -> (TimeSpec, TimeSpec) {
    let spec = |time: Option<SetTime>| match time {
        None => TimeSpec::UTIME_OMIT,
        Some(SetTime::Now) => TimeSpec::UTIME_NOW,
        Some(SetTime::At(at)) => match at.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => TimeSpec::from_duration(since),
            Err(before) => -TimeSpec::from_duration(before.duration()),
        },
    };
    (spec(times.atime), spec(times.mtime))
}

#[expect(unsafe_code, reason = "no wrapper for extended attributes")]
fn get_attribute(file: &impl AsFd, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0u8; ORIGIN_BYTES_MAX];
    // SAFETY: the descriptor is open, the name ends in NUL, and the length is the buffer's own.
    let length = unsafe {
        libc::fgetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    match usize::try_from(length) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
            error => Err(error),
        },
    }
}

#[expect(unsafe_code, reason = "no wrapper for extended attributes")]
fn set_attribute(file: &impl AsFd, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: the descriptor is open, the name ends in NUL, and the length is the value's own.
    let outcome = unsafe {
        libc::fsetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_belong_to_the_file_and_move_with_it() {
        let scratch = tempfile::tempdir().unwrap();
        let disk = RealDisk::open(scratch.path()).unwrap();
        let (a, b) = (Path::new("a"), Path::new("b"));
        disk.create(a, 0o600).unwrap();
        assert_eq!(disk.origin(a).unwrap(), None);
        disk.set_origin(a, b"1 8192 base/1/1").unwrap();
        disk.rename(a, b).unwrap();
        assert_eq!(disk.origin(b).unwrap().unwrap(), b"1 8192 base/1/1");
        assert!(disk.stat(a).unwrap().is_none());
    }

    #[test]
    fn times_before_and_after_the_epoch_survive() {
        let scratch = tempfile::tempdir().unwrap();
        let disk = RealDisk::open(scratch.path()).unwrap();
        let file = disk.create(Path::new("f"), 0o640).unwrap();
        for at in [
            SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789),
            SystemTime::UNIX_EPOCH - Duration::new(5, 250_000_000),
        ] {
            file.set_times(Times::modified(at)).unwrap();
            assert_eq!(disk.stat(Path::new("f")).unwrap().unwrap().attributes.mtime, at);
        }
        assert_eq!(file.stat().unwrap().attributes.mode, 0o640);
    }

    /// A block that was reserved and whose write never came to its end is such room after a power cut.
    #[test]
    fn room_without_content_is_a_hole_again_once_the_cache_is_dropped() {
        let scratch = tempfile::tempdir().unwrap();
        let disk = RealDisk::open(scratch.path()).unwrap();
        let file = disk.create(Path::new("f"), 0o600).unwrap();
        file.set_length(1 << 20).unwrap();
        file.allocate(0, 65_536, true).unwrap();
        file.write_at(&[1; 4096], 0).unwrap();
        file.sync(true).unwrap();
        file.read_at(&mut [0; 65_536], 0).unwrap();
        file.drop_cache().unwrap();
        assert_eq!(file.next_data(0).unwrap(), Some(0));
        assert_eq!(file.next_hole(0).unwrap(), 4096);
        assert_eq!(file.next_data(4096).unwrap(), None);
    }

    #[test]
    fn what_lies_beneath_a_renamed_directory_s_old_path_is_still_reached() {
        let scratch = tempfile::tempdir().unwrap();
        let place = scratch.path().join("upper");
        std::fs::create_dir(&place).unwrap();
        let disk = RealDisk::open(&place).unwrap();
        std::fs::rename(&place, scratch.path().join("elsewhere")).unwrap();
        disk.make_directory(Path::new("d"), 0o750).unwrap();
        disk.make_symlink(b"../x", Path::new("d/l")).unwrap();
        assert_eq!(disk.read_link(Path::new("d/l")).unwrap(), b"../x");
        assert_eq!(disk.list(Path::new("")).unwrap(), [(b"d".to_vec(), FileKind::Directory)]);
        disk.sync_directory(Path::new("d")).unwrap();
        disk.sync_all().unwrap();
    }
}
