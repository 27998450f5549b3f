//! A view of the host in which a clone's server can write nothing but its own directories.
//!
//! ```text
//! private mounts → forget other clones' mounts → stand-ins → own directories → everything else read-only
//! ```
//!
//! Replay of CREATE TABLESPACE writes to the absolute path that stands in the WAL, on the source's host that of the
//! source itself (failure 27b: 13 and 14 even empty it first). Here a folder of the clone's stands at that path, made
//! up where the host has no such path, so replay succeeds and touches nobody else's files (seen on 13, 15 and 18).
//! Deliberately absent: dropping privileges and exec, which come after.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Uid, fork, pivot_root};

use crate::mount::mounting;

/// A directory with more entries is not rebuilt to make room for a missing path in it: each costs a mount.
const REBUILT_ENTRIES_MAX: usize = 1000;
/// Where dynamic shared memory is; covered by a file system of our own in the end, so free to build in before.
const SHARED_MEMORY: &str = "/dev/shm";
/// The type under which the kernel lists mounts of `walden mount` and of clones.
const OWN_MOUNT_TYPE: &str = "fuse.walden";
/// From linux/mount.h.
const MOUNT_ATTR_RDONLY: u64 = 1;

/// Why there is no such view.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The kernel or an administrator's setting does not let this user have one; nothing was changed.
    #[error("this host does not allow a private mount namespace: {source}")]
    Unavailable { source: io::Error },
    /// A path that replay writes to cannot be made to exist.
    #[error("no place can be made for \"{}\": {detail}", path.display())]
    NoPlace { path: PathBuf, detail: String },
    /// A step failed; the process must not go on.
    #[error("could not {step} \"{}\": {source}", path.display())]
    Step { step: &'static str, path: PathBuf, source: io::Error },
}

/// Gives the calling thread, and what it executes, the view.
///
/// `writable` directories stay as they are, with the mounts below them; each of `stand_ins` is a path with the folder
/// that appears there instead; all else can be read only. As an ordinary user the process must have a single thread.
pub fn enter(writable: &[PathBuf], stand_ins: &[(PathBuf, PathBuf)]) -> Result<(), NamespaceError> {
    if !Uid::effective().is_root() {
        try_in_a_child()?;
    }
    unshare_mounts().map_err(|source| NamespaceError::Unavailable { source })?;
    forget_other_clones(writable);
    for (path, folder) in stand_ins {
        make_place(path)?;
        change(path, Some(folder), MsFlags::MS_BIND | MsFlags::MS_REC, "put a folder at")?;
    }
    // What is a mount already can be made writable as it is, and goes when the host unmounts it.
    for directory in writable.iter().filter(|directory| !mounting::is_mount_point(directory)) {
        change(directory, Some(directory), MsFlags::MS_BIND | MsFlags::MS_REC, "keep")?;
    }
    set_read_only(Path::new("/"), true)?;
    for directory in writable.iter().chain(stand_ins.iter().map(|(path, _)| path)) {
        set_read_only(directory, false)?;
    }
    private_shared_memory()
}

/// As root a mount namespace; as an ordinary user one within a user namespace in which the user stays who it is.
fn unshare_mounts() -> io::Result<()> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    if uid.is_root() {
        unshare(CloneFlags::CLONE_NEWNS)?;
    } else {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
        fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    }
    // Ours never reach the host; the host's unmounts reach us, so that we pin nobody's file system.
    Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?)
}

/// Finds out whether an ordinary user may do it, in a process that can be thrown away: some hosts allow the user
/// namespace and then nothing in it, and who has entered one cannot go back and do without.
#[allow(unsafe_code, reason = "fork, from a process of one thread")]
fn try_in_a_child() -> Result<(), NamespaceError> {
    let unavailable = |source: io::Error| NamespaceError::Unavailable { source };
    // SAFETY: the caller's process has a single thread, as the kernel demands of it anyway; the child makes its few
    // system calls and ends without running anything of ours.
    match unsafe { fork() }.map_err(|errno| unavailable(errno.into()))? {
        ForkResult::Child => {
            let status = unshare_mounts().err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EPERM));
            // SAFETY: nothing is left to be run at the end of this process.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            Ok(WaitStatus::Exited(_, errno)) => Err(unavailable(io::Error::from_raw_os_error(errno))),
            Ok(_) => Err(unavailable(io::Error::other("the attempt ended early"))),
            Err(errno) => Err(unavailable(errno.into())),
        },
    }
}

/// Drops the mounts of other clones, which would otherwise live on here after they were unmounted on the host, and
/// keep their processes waiting. In a user namespace the kernel forbids it, and lets the host's unmounts through.
fn forget_other_clones(writable: &[PathBuf]) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The kernel lists mounts without the links on the way there.
    let own: Vec<PathBuf> =
        writable.iter().map(|path| path.canonicalize().unwrap_or_else(|_| path.clone())).collect();
    for path in foreign_mounts(&mounts, &own) {
        if let Err(errno) = umount2(&path, MntFlags::MNT_DETACH) {
            tracing::debug!(path = %path.display(), %errno, "another clone's mount stays in the namespace");
        }
    }
}

/// Lists Walden's mounts in the text of a mountinfo file that are in none of the directories.
fn foreign_mounts(mountinfo: &str, own: &[PathBuf]) -> Vec<PathBuf> {
    let mounts = mountinfo.lines().filter_map(|line| {
        // 36 35 98:0 /root /mount/point options - type source super-options
        let (before, after) = line.split_once(" - ")?;
        let is_ours = after.split(' ').next() == Some(OWN_MOUNT_TYPE);
        is_ours.then(|| before.split(' ').nth(4)).flatten().map(unescape)
    });
    mounts.filter(|path| !own.iter().any(|directory| path.starts_with(directory))).collect()
}

/// Resolves the octal escapes the kernel writes for space, tab, newline and backslash.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(u8::is_ascii_digit));
        match digits.and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))
}

/// Makes sure that a directory is at `path` in this view, changing nothing outside it.
fn make_place(path: &Path) -> Result<(), NamespaceError> {
    let refuse = |detail: String| NamespaceError::NoPlace { path: path.to_owned(), detail };
    if path.is_dir() {
        return Ok(());
    }
    if !path.is_absolute() || path.components().any(|part| part.as_os_str() == "..") {
        return Err(refuse("it is not a plain absolute path".into()));
    }
    let existing = path.ancestors().find(|ancestor| ancestor.symlink_metadata().is_ok());
    let existing = existing.unwrap_or(Path::new("/"));
    if !existing.is_dir() {
        return Err(refuse(format!("\"{}\" is in the way", existing.display())));
    }
    rebuild(existing).map_err(|error| refuse(error.to_string()))?;
    fs::create_dir_all(path).map_err(|error| refuse(error.to_string()))
}

/// Replaces a directory by one in memory with the same entries, so that others can be added.
fn rebuild(directory: &Path) -> io::Result<()> {
    let is_root = directory == Path::new("/");
    let metadata = fs::metadata(directory)?;
    let entries: Vec<fs::DirEntry> = fs::read_dir(directory)?.collect::<io::Result<_>>()?;
    if entries.len() > REBUILT_ENTRIES_MAX {
        return Err(io::Error::other(format!("its parent has {} entries", entries.len())));
    }
    // What is there stays reachable through this descriptor once the new directory covers it.
    let old = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(directory)?;
    let seen = PathBuf::from(format!("/proc/self/fd/{}", old.as_raw_fd()));
    // Over the root nothing can be laid; it is built elsewhere and changed places with.
    let new = if is_root { Path::new(SHARED_MEMORY) } else { directory };
    let options = format!("mode={:o}", metadata.permissions().mode() & 0o7777);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), new, Some("tmpfs"), flags, Some(options.as_str()))?;
    // Without the rights to give it away it stays the caller's, who is then the only user of this view.
    let _ = std::os::unix::fs::chown(new, Some(metadata.uid()), Some(metadata.gid()));
    for entry in entries {
        repeat(&entry, &seen.join(entry.file_name()), &new.join(entry.file_name()))?;
    }
    if is_root {
        pivot_root(new, new)?;
        umount2("/", MntFlags::MNT_DETACH)?;
        std::env::set_current_dir("/")?;
    }
    Ok(())
}

fn repeat(entry: &fs::DirEntry, old: &Path, new: &Path) -> io::Result<()> {
    let kind = entry.file_type()?;
    if kind.is_symlink() {
        return std::os::unix::fs::symlink(fs::read_link(old)?, new);
    }
    if kind.is_dir() {
        fs::create_dir(new)?;
    } else {
        File::create_new(new)?;
    }
    Ok(mount(Some(old), new, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?)
}

/// Dynamic shared memory of the server's own, writable and seen by nobody else.
fn private_shared_memory() -> Result<(), NamespaceError> {
    let place = Path::new(SHARED_MEMORY);
    if !place.is_dir() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), place, Some("tmpfs"), flags, Some("mode=1777"))
        .map_err(|errno| failed("mount shared memory at", place)(errno.into()))
}

fn change(
    target: &Path,
    source: Option<&PathBuf>,
    flags: MsFlags,
    step: &'static str,
) -> Result<(), NamespaceError> {
    mount(source, target, None::<&str>, flags, None::<&str>)
        .map_err(|errno| failed(step, target)(errno.into()))
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NamespaceError {
    let path = path.to_owned();
    move |source| NamespaceError::Step { step, path, source }
}

/// The argument of mount_setattr(2), version 0.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Makes the mount at `path`, and all mounts below it, read-only or writable again (Linux 5.12).
#[allow(unsafe_code, reason = "nix has no mount_setattr")]
fn set_read_only(path: &Path, read_only: bool) -> Result<(), NamespaceError> {
    let step = if read_only { "make read-only" } else { "make writable" };
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|error| failed(step, path)(io::Error::other(error)))?;
    let (set, clear) = if read_only { (MOUNT_ATTR_RDONLY, 0) } else { (0, MOUNT_ATTR_RDONLY) };
    let attributes = MountAttributes { set, clear, propagation: 0, user_namespace: 0 };
    // SAFETY: the path is terminated, both pointers outlive the call, and the size is that of the structure.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            name.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if outcome == 0 { Ok(()) } else { Err(failed(step, path)(io::Error::last_os_error())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `look` on a thread whose view is the one asked for; the test's own stays as it is.
    fn within<T: Send>(
        writable: &[PathBuf],
        stand_ins: &[(PathBuf, PathBuf)],
        look: impl FnOnce() -> T + Send,
    ) -> Result<T, NamespaceError> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| enter(writable, stand_ins).map(|()| look()));
            inside.join().unwrap()
        })
    }

    /// Only root may have a second namespace in a process of several threads; others meet it as `Unavailable`.
    fn is_available(result: &Result<(), NamespaceError>) -> bool {
        match result {
            Err(NamespaceError::Unavailable { source }) => {
                assert!(!Uid::effective().is_root(), "{source}");
                false
            }
            _ => true,
        }
    }

    #[test]
    fn only_what_is_named_can_be_written() {
        let scratch = tempfile::tempdir().unwrap();
        let [own, other] = ["own", "other"].map(|name| {
            let path = scratch.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        });
        let result = within(std::slice::from_ref(&own), &[], || {
            fs::write(own.join("a"), "x").unwrap();
            let refused = fs::write(other.join("a"), "x").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
            assert!(fs::write("/walden-test", "x").is_err() && fs::write("/etc/walden-test", "x").is_err());
            fs::write("/dev/shm/walden-test", "x").unwrap();
            fs::write("/dev/null", "x").unwrap();
        });
        if is_available(&result) {
            result.unwrap();
            assert!(own.join("a").exists() && !other.join("a").exists());
            assert!(!Path::new("/dev/shm/walden-test").exists());
            fs::write(other.join("b"), "x").expect("outside nothing has changed");
        }
    }

    #[test]
    fn failure_27b_a_stand_in_takes_the_writes_meant_for_another_place() {
        let scratch = tempfile::tempdir().unwrap();
        let [source, own] = ["source", "own"].map(|name| {
            let path = scratch.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        });
        fs::write(source.join("rows"), "the source's").unwrap();
        // One that is there, one whose parent is not, one that is missing at the very top.
        let top = PathBuf::from(format!("/walden-test-{}/space", std::process::id()));
        let places = [source.clone(), scratch.path().join("gone/deep"), top.clone()];
        let stand_ins: Vec<(PathBuf, PathBuf)> = places
            .iter()
            .enumerate()
            .map(|(number, place)| {
                let folder = own.join(number.to_string());
                fs::create_dir(&folder).unwrap();
                (place.clone(), folder)
            })
            .collect();
        let result = within(std::slice::from_ref(&own), &stand_ins, || {
            for place in &places {
                assert_eq!(fs::read_dir(place).unwrap().count(), 0, "{}", place.display());
                fs::write(place.join("rows"), "the clone's").unwrap();
                fs::set_permissions(place, fs::Permissions::from_mode(0o700)).unwrap();
            }
            fs::write(own.join("a"), "x").unwrap();
            assert!(fs::write(scratch.path().join("a"), "x").is_err());
            assert!(fs::create_dir(top.parent().unwrap().join("more")).is_err());
            assert!(Path::new("/proc/self/status").exists() && Path::new("/usr/bin").is_dir());
            assert_eq!(fs::metadata("/").unwrap().mode() & 0o777, 0o755);
        });
        if is_available(&result) {
            result.unwrap();
            assert_eq!(fs::read_to_string(source.join("rows")).unwrap(), "the source's");
            for (_, folder) in &stand_ins {
                assert_eq!(fs::read_to_string(folder.join("rows")).unwrap(), "the clone's");
            }
            assert!(!top.parent().unwrap().exists() && !scratch.path().join("gone").exists());
        }
    }

    #[test]
    fn what_cannot_be_made_a_place_is_refused_by_name() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        fs::write(&file, "x").unwrap();
        for place in [file.join("below"), scratch.path().join("a/../b"), PathBuf::from("relative")] {
            let stand_ins = [(place.clone(), scratch.path().to_owned())];
            let result = within(&[], &stand_ins, || ());
            if is_available(&result) {
                let error = result.unwrap_err();
                assert!(matches!(&error, NamespaceError::NoPlace { path, .. } if *path == place), "{error}");
            }
        }
    }

    #[test]
    fn mounts_of_other_clones_are_found_in_the_kernels_list() {
        let list = "36 35 0:50 / /clones/a\\040b/mnt rw,nosuid - fuse.walden walden rw,user_id=0\n\
                    37 35 0:51 / /clones/own/mnt rw shared:5 - fuse.walden walden rw\n\
                    38 35 0:52 / /mnt rw - fuse.sshfs host rw\n\
                    39 35 8:1 / / rw - ext4 /dev/vda rw\nnonsense\n";
        let foreign = foreign_mounts(list, &["/clones/own".into()]);
        assert_eq!(foreign, [PathBuf::from("/clones/a b/mnt")]);
        assert_eq!(unescape("a\\134b\\9"), PathBuf::from("a\\b\\9"));
    }
}
