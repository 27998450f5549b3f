//! Putting a tree at a path and taking it away again.
//!
//! Root mounts by the system call; others ask `fusermount3`. Unmounting is ours too: fuser 0.18 cannot tell an
//! unmounted device from a mounted one and would unmount whatever lies at the path by then
//! (docs/decisions/0101-own-mount-call.md). A mount that ends never leaves a dead mount point behind: it is unmounted
//! when nothing holds it, and detached as a last resort.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::disk::Owner;
use crate::mount::fuse::{Access, Loop};
use crate::mount::holders::{self, Holder};
use crate::mount::tree::Tree;

/// How often, and in what steps, a killed mount is looked at for processes that still use it: for twice the five
/// seconds after which PostgreSQL kills those of its own that an immediate shutdown did not end.
const SURVIVOR_LOOKS: u32 = 100;
const SURVIVOR_INTERVAL: Duration = Duration::from_millis(100);

/// What the kernel lists our mounts as.
const TYPE: &str = "fuse.walden";

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// What `mount` and `df` show as the device; commas and backslashes are replaced.
    pub name: String,
    pub read_only: bool,
    /// Lets other users in, under the permissions of the files; as an ordinary user this needs
    /// `user_allow_other` in /etc/fuse.conf.
    pub allow_other: bool,
    /// Mounts over a directory that is not empty: an instant restore over its own upper.
    pub over_content: bool,
    /// Directories that must stay reachable: the local repository, the state folder. Mounting over one of them, or
    /// over a directory above one, is refused: the mount would wait for itself (failure 33).
    pub must_not_cover: Vec<PathBuf>,
    /// The very directory that root mounts over, whatever its path leads to by then.
    pub at: Option<Arc<File>>,
}

impl MountOptions {
    /// Creates the options of an ordinary mount: others let in if root mounts.
    pub fn new(name: impl Into<String>, read_only: bool) -> Self {
        Self {
            name: name.into(),
            read_only,
            allow_other: Owner::current().is_root(),
            over_content: false,
            must_not_cover: Vec::new(),
            at: None,
        }
    }
}

/// Why mounting or unmounting failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("could not {action} \"{}\": {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("\"{}\" is not a directory", path.display())]
    NotADirectory { path: PathBuf },
    #[error("directory \"{}\" is not empty", path.display())]
    NotEmpty { path: PathBuf },
    #[error("mounting on \"{}\" would cover \"{}\", which the mount itself reads", path.display(), covered.display())]
    WouldCover { path: PathBuf, covered: PathBuf },
    #[error("something is mounted on \"{}\" already", path.display())]
    AlreadyMounted { path: PathBuf },
    #[error("nothing is mounted on \"{}\"", path.display())]
    NotMounted { path: PathBuf },
    #[error("\"{}\" is in use by {}", path.display(), describe(holders))]
    Busy { path: PathBuf, holders: Vec<Holder> },
    #[error("fusermount3 could not act on \"{}\": {detail}", path.display())]
    Fusermount { path: PathBuf, detail: String },
}

impl MountError {
    /// Returns what the user should do.
    pub fn hint(&self) -> Option<String> {
        let Self::Busy { holders, .. } = self else { return None };
        let processes = holders.iter().filter_map(|holder| match holder {
            Holder::Process { pid, .. } => Some(pid.to_string()),
            Holder::Mount { .. } => None,
        });
        let processes: Vec<String> = processes.collect();
        (!processes.is_empty()).then(|| {
            let plural = if processes.len() > 1 { "es" } else { "" };
            format!("End process{plural} {}: what it has open it can still change.", processes.join(", "))
        })
    }
}

/// A mounted tree, served until it is unmounted.
///
/// Dropping it detaches the mount: it is gone from the path at once and from the kernel when the last file closes.
#[derive(Debug)]
pub struct Mounted {
    path: PathBuf,
    serving: Option<Loop>,
}

/// Mounts a tree and returns when it can be used.
pub fn mount(
    tree: Arc<Tree>,
    path: &Path,
    options: &MountOptions,
    runtime: &tokio::runtime::Handle,
) -> Result<Mounted, MountError> {
    let path = prepare(path, options)?;
    raise_descriptor_limit();
    let device = if Owner::current().is_root() {
        mount_as_root(&path, options)?
    } else {
        mount_as_user(&path, options)?
    };
    let access = Access { anyone: options.allow_other, writable: !options.read_only };
    match Loop::start(tree, device, access, runtime.clone()) {
        Ok(serving) => Ok(Mounted { path, serving: Some(serving) }),
        Err(source) => {
            let _ = detach(&path);
            Err(MountError::Io { action: "start serving", path, source })
        }
    }
}

impl Mounted {
    /// Returns the mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts if nothing holds the mount; otherwise says who does, and goes on serving.
    pub fn unmount(&mut self) -> Result<(), MountError> {
        if !is_own(&self.path) {
            // Somebody else has unmounted it, and what he mounts a directory on is his.
            self.serving.take();
            return Err(MountError::NotMounted { path: self.path.clone() });
        }
        unmount(&self.path)?;
        self.finish();
        Ok(())
    }

    /// Takes the mount off its path whoever holds it, and answers what is still open until it is closed.
    ///
    /// A detached file system lives on until then; the process that serves it must not wait for that.
    pub fn detach(mut self) -> Result<(), MountError> {
        self.serving.take();
        if is_own(&self.path) { detach(&self.path) } else { Ok(()) }
    }

    /// Waits until somebody unmounts it.
    pub fn wait(&mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        if let Some(serving) = self.serving.take()
            && let Err(error) = serving.join()
        {
            tracing::error!(path = %self.path.display(), "the mount ended with an error: {error}");
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.serving.take().is_some()
            && is_own(&self.path)
            && let Err(error) = detach(&self.path)
        {
            tracing::error!("{error}");
        }
    }
}

/// Unmounts what is mounted on `path`, whichever process serves it; says who holds it when it is busy.
pub fn unmount(path: &Path) -> Result<(), MountError> {
    let path = absolute(path)?;
    if !is_mount_point(&path) {
        return Err(MountError::NotMounted { path });
    }
    match unmount_with(&path, MntFlags::empty()) {
        Err(MountError::Io { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
            let holders = holders::find(&path);
            Err(MountError::Busy { path, holders })
        }
        outcome => outcome,
    }
}

/// Takes a mount off its path even while it is in use: the last resort.
pub fn detach(path: &Path) -> Result<(), MountError> {
    unmount_with(&absolute(path)?, MntFlags::MNT_DETACH)
}

/// Takes away a writable mount that a killed process left behind, as soon as no process has anything of it open.
///
/// What is passed through can be read and written without the process that served it, so nobody else may use the same
/// local files before. A server whose mount was killed needs a moment to end; whoever does not is named.
pub fn detach_dead(path: &Path) -> Result<(), MountError> {
    let path = absolute(path)?;
    let mut looks_left = SURVIVOR_LOOKS;
    loop {
        let mut holders = holders::find(&path);
        holders.retain(|holder| matches!(holder, Holder::Process { .. }));
        looks_left -= 1;
        if holders.is_empty() {
            return detach(&path);
        }
        if looks_left == 0 {
            return Err(MountError::Busy { path, holders });
        }
        std::thread::sleep(SURVIVOR_INTERVAL);
    }
}

/// Tells whether the process that served a mount has died and left it behind (failure 38).
///
/// Of a root whose attributes the kernel remembers it goes on to tell them; how much room there is it always asks.
pub fn is_dead(path: &Path) -> bool {
    fs::metadata(path).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
        || nix::sys::statfs::statfs(path).is_err_and(|errno| errno == Errno::ENOTCONN)
}

/// Tells whether something is mounted on exactly this path.
///
/// The kernel lists mounts without the links on the way there. The last part is not looked at: it may be a mount that is
/// dead, or waits for its store.
pub fn is_mount_point(path: &Path) -> bool {
    let path = as_listed(path);
    holders::mount_points().contains(&path)
}

/// Tells whether a mount of Walden's lies at exactly this path, dead or alive.
pub fn is_own(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    holders::mounted_at(&table, &as_listed(path)).is_some_and(|kind| kind == TYPE)
}

/// Tells whether such a mount takes writes.
pub fn is_own_writable(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    is_own(path) && holders::is_writable_at(&table, &as_listed(path))
}

fn as_listed(path: &Path) -> PathBuf {
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    let real = folder.zip(path.file_name()).map(|(folder, name)| folder.join(name));
    real.unwrap_or_else(|| path.to_owned())
}

/// Checks the mount point and returns it absolute and without links.
fn prepare(path: &Path, options: &MountOptions) -> Result<PathBuf, MountError> {
    if is_dead(path) {
        tracing::warn!(path = %path.display(), "detaching a mount whose process has died");
        // Of a read-only mount nothing is left that could be written.
        if options.read_only { detach(path)? } else { detach_dead(path)? }
    }
    let path = absolute(path)?;
    let metadata = fs::metadata(&path).map_err(io_error("stat", &path))?;
    if !metadata.is_dir() {
        return Err(MountError::NotADirectory { path });
    }
    for covered in &options.must_not_cover {
        if covered.canonicalize().is_ok_and(|covered| covered.starts_with(&path)) {
            return Err(MountError::WouldCover { path, covered: covered.clone() });
        }
    }
    if is_mount_point(&path) && is_fuse(&path) {
        return Err(MountError::AlreadyMounted { path });
    }
    let mut content = fs::read_dir(&path).map_err(io_error("open directory", &path))?;
    if !options.over_content && content.next().is_some() {
        return Err(MountError::NotEmpty { path });
    }
    Ok(path)
}

fn is_fuse(path: &Path) -> bool {
    const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
    nix::sys::statfs::statfs(path).is_ok_and(|figures| figures.filesystem_type().0 == FUSE_SUPER_MAGIC)
}

fn mount_as_root(path: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(io_error("open /dev/fuse for", path))?;
    let metadata = fs::metadata(path).map_err(io_error("stat", path))?;
    let owner = Owner::current();
    let mut data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        metadata.mode(),
        owner.uid,
        owner.gid
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOATIME;
    if options.read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    let at = options.at.as_ref().map_or_else(|| path.to_owned(), |at| path_of(at));
    nix::mount::mount(Some(safe_name(options).as_str()), &at, Some(TYPE), flags, Some(data.as_str()))
        .map_err(|errno| io_error("mount on", path)(errno.into()))?;
    Ok(device.into())
}

/// Lets the set-uid helper mount, and receives the device over a socket.
#[expect(unsafe_code, reason = "the helper's socket must stay open across exec")]
fn mount_as_user(path: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let (ours, theirs) = UnixStream::pair().map_err(io_error("make a socket for", path))?;
    let access = if options.read_only { "ro" } else { "rw" };
    let others = if options.allow_other { ",allow_other" } else { "" };
    let list = format!(
        "fsname={},subtype=walden,default_permissions,nodev,nosuid,noatime,{access}{others}",
        safe_name(options)
    );
    let descriptor = theirs.as_raw_fd();
    let mut command = Command::new("fusermount3");
    command.args(["-o", &list, "--"]).arg(path).env("_FUSE_COMMFD", descriptor.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: between fork and exec only fcntl is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || match libc::fcntl(descriptor, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let child = command.spawn().map_err(io_error("run fusermount3 for", path))?;
    drop(theirs);
    let received = receive_device(&ours);
    let output = child.wait_with_output().map_err(io_error("run fusermount3 for", path))?;
    received.ok_or_else(|| MountError::Fusermount {
        path: path.to_owned(),
        detail: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

#[expect(unsafe_code, reason = "the descriptor arrives as a number")]
fn receive_device(socket: &UnixStream) -> Option<OwnedFd> {
    let mut byte = [0u8];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            outcome => break outcome.ok()?,
        }
    };
    let rights = message.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    })?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Some(unsafe { OwnedFd::from_raw_fd(rights) })
}

fn unmount_with(path: &Path, flags: MntFlags) -> Result<(), MountError> {
    if Owner::current().is_root() {
        return nix::mount::umount2(path, flags).map_err(|errno| io_error("unmount", path)(errno.into()));
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if flags.contains(MntFlags::MNT_DETACH) {
        command.arg("-z");
    }
    let output = command.arg("--").arg(path).stdin(Stdio::null()).output();
    let output = output.map_err(io_error("run fusermount3 for", path))?;
    if output.status.success() {
        return Ok(());
    }
    let detail = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if detail.contains("busy") {
        return Err(io_error("unmount", path)(io::Error::from_raw_os_error(libc::EBUSY)));
    }
    Err(MountError::Fusermount { path: path.to_owned(), detail })
}

/// Resolves links in all but the last part, which may be a dead mount that cannot be looked at.
fn absolute(path: &Path) -> Result<PathBuf, MountError> {
    if let Ok(resolved) = path.canonicalize() {
        return Ok(resolved);
    }
    let whole = std::path::absolute(path).map_err(io_error("resolve", path))?;
    match (whole.parent(), whole.file_name()) {
        (Some(parent), Some(name)) => {
            Ok(parent.canonicalize().map_err(io_error("resolve", path))?.join(name))
        }
        _ => Ok(whole),
    }
}

fn safe_name(options: &MountOptions) -> String {
    options.name.chars().map(|c| if c == ',' || c == '\\' || c.is_control() { '_' } else { c }).collect()
}

/// Lets this process open as many files as it is allowed to: an upper keeps one open for each that a client has, and the
/// usual soft limit of 1024 is less than a server with many tables opens.
#[expect(unsafe_code, reason = "no wrapper for the resource limits among our dependencies")]
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read or write the structure they are given, which outlives them.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
        }
    };
    if !raised {
        tracing::warn!("could not raise the limit of open files: {}", io::Error::last_os_error());
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MountError {
    move |source| MountError::Io { action, path: path.to_owned(), source }
}

fn describe(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "a process this user cannot see".to_owned();
    }
    holders.iter().map(Holder::to_string).collect::<Vec<_>>().join("; ")
}

/// Shows an open directory, such as one beneath a mount, at a path as well, which is no link; only root can.
pub fn bind(directory: &File, path: &Path) -> Result<(), MountError> {
    // Not opened in earnest: of a mount of ours that would ask this process.
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let at = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let at = at.map_err(io_error("open directory", path))?;
    nix::mount::mount(Some(&path_of(directory)), &path_of(&at), None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|errno| io_error("show a directory at", path)(errno.into()))
}

/// Takes away what [`bind`] has shown; true where nothing is in the way.
pub fn unbind(path: &Path) -> Result<bool, MountError> {
    match nix::mount::umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(Errno::EBUSY) => Ok(false),
        Err(errno) => Err(io_error("unmount", path)(errno.into())),
    }
}

/// Keeps the directory beneath a mount reachable: opened before mounting, it still names what is below. Not through a
/// link: its owner could have put one there for root to follow.
pub fn open_beneath(path: &Path) -> Result<File, MountError> {
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    opened.map_err(io_error("open directory", path))
}

/// Returns a path that leads to an open directory, wherever that is by now.
pub fn path_of(directory: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_that_would_cover_the_repository_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let repository = scratch.path().join("mnt/repo");
        fs::create_dir_all(&repository).unwrap();
        let mut options = MountOptions::new("walden", true);
        options.must_not_cover = vec![repository.clone()];
        for point in [&repository, repository.parent().unwrap()] {
            assert!(matches!(prepare(point, &options), Err(MountError::WouldCover { .. })));
        }
        let beside = scratch.path().join("beside");
        fs::create_dir(&beside).unwrap();
        prepare(&beside, &options).unwrap();
    }

    #[test]
    fn content_is_not_covered_unasked() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("file"), b"x").unwrap();
        let mut options = MountOptions::new("walden", true);
        assert!(matches!(prepare(scratch.path(), &options), Err(MountError::NotEmpty { .. })));
        let file = scratch.path().join("file");
        assert!(matches!(prepare(&file, &options), Err(MountError::NotADirectory { .. })));
        options.over_content = true;
        prepare(scratch.path(), &options).unwrap();
    }

    #[test]
    fn a_mount_point_is_looked_up_without_the_links_above_it() {
        let scratch = tempfile::tempdir().unwrap();
        let real = scratch.path().canonicalize().unwrap().join("real");
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, scratch.path().join("link")).unwrap();
        assert_eq!(as_listed(&scratch.path().join("link/data")), real.join("data"));
        assert_eq!(as_listed(Path::new("/")), Path::new("/"));
        assert!(!is_own(&real) && !is_own(Path::new("/")));
    }

    #[test]
    fn whoever_is_in_the_way_is_named_and_told_what_to_do_about() {
        let process = |pid| Holder::Process { pid, command: "tail".into(), what: "open \"/mnt/f\"".into() };
        let busy = |holders| MountError::Busy { path: "/mnt".into(), holders };
        let one = busy(vec![process(7), Holder::Mount { path: "/mnt/inside".into() }]);
        assert!(one.to_string().contains("process 7 (tail): open"), "{one}");
        assert!(one.hint().unwrap().starts_with("End process 7: "));
        assert!(busy(vec![process(7), process(8)]).hint().unwrap().starts_with("End processes 7, 8: "));
        assert_eq!(busy(Vec::new()).hint(), None);
    }

    #[test]
    fn what_is_not_mounted_cannot_be_unmounted() {
        let scratch = tempfile::tempdir().unwrap();
        assert!(matches!(unmount(scratch.path()), Err(MountError::NotMounted { .. })));
        assert!(!is_dead(scratch.path()));
    }

    #[test]
    fn a_mount_is_seen_through_a_link_on_the_way_to_it() {
        let scratch = tempfile::tempdir().unwrap();
        let link = scratch.path().join("link");
        std::os::unix::fs::symlink("/", &link).unwrap();
        assert!(is_mount_point(Path::new("/proc")) && is_mount_point(&link.join("proc")));
        assert!(!is_mount_point(&link.join("nonexistent")) && !is_mount_point(scratch.path()));
    }
}
