//! Starts a postmaster that sees nothing writable but its own directories.
//!
//! `walden internal run-postgres` reads an order from its standard input and becomes the postmaster: private mount
//! namespace, stand-ins over foreign paths, everything else read-only, privileges dropped, exec. A process of its own,
//! because namespaces are entered before there are threads. Replay of CREATE TABLESPACE writes to the absolute path
//! that stands in the WAL (failure 27b: it destroyed rows of the running source); here another folder stands there.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid};
use serde::{Deserialize, Serialize};

/// What is to be started.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// The `postgres` program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Where it runs.
    pub data_directory: PathBuf,
    /// The user and group it runs as.
    pub owner: (u32, u32),
    /// What it may write to.
    pub isolation: Isolation,
    /// Where its output goes.
    pub log_file: PathBuf,
    /// Its whole environment.
    pub environment: Vec<(String, String)>,
    /// The process that waits for it: when that one dies, it dies too.
    pub supervisor: u32,
}

/// What a postmaster may write to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Isolation {
    /// Directories that stay writable, and mounts below them.
    pub writable: Vec<PathBuf>,
    /// Absolute paths, each with the folder that stands in for it.
    pub stand_ins: Vec<(PathBuf, PathBuf)>,
}

/// Why a postmaster could not be started in isolation.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The order could not be read.
    #[error("the order is not understood: {0}")]
    Order(io::Error),
    /// A step failed.
    #[error("could not {step}: {source}")]
    Step { step: String, source: io::Error },
    /// Somebody else's path would be written to, and nothing here can prevent it.
    #[error("replay writes to \"{}\", and this process may not make a private mount namespace", path.display())]
    NotIsolated { path: PathBuf },
    /// A stand-in has no place to stand.
    #[error("replay writes to \"{}\", which does not exist on this host", path.display())]
    NoPlace { path: PathBuf },
}

const ORDER_BYTES_MAX: u64 = 1 << 20;
/// From linux/mount.h; an interface of the kernel, never changed.
const MOUNT_ATTR_RDONLY: u64 = 1;

/// Reads the order and becomes the postmaster; returns only why it could not.
pub fn run() -> LaunchError {
    let mut order = Vec::new();
    let launch = io::stdin()
        .take(ORDER_BYTES_MAX)
        .read_to_end(&mut order)
        .and_then(|_| serde_json::from_slice::<Launch>(&order).map_err(io::Error::other));
    match launch {
        Ok(launch) => become_postgres(&launch).unwrap_or_else(|error| error),
        Err(error) => LaunchError::Order(error),
    }
}

fn become_postgres(launch: &Launch) -> Result<LaunchError, LaunchError> {
    let log = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&launch.log_file)
        .map_err(step(format!("open \"{}\"", launch.log_file.display())))?;
    let errors = log.try_clone().map_err(step("use the log twice"))?;
    isolate(&launch.isolation)?;
    drop_privileges(launch.owner)?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGQUIT)
        .map_err(|errno| step("follow the supervisor")(errno.into()))?;
    if nix::unistd::getppid().as_raw().unsigned_abs() != launch.supervisor {
        return Err(step("follow the supervisor")(io::Error::other("it is gone already")));
    }
    nix::unistd::setsid().ok();
    std::env::set_current_dir(&launch.data_directory).map_err(step("enter the data directory"))?;
    let error = Command::new(&launch.program)
        .args(&launch.arguments)
        .env_clear()
        .envs(launch.environment.iter().map(|(name, value)| (name, value)))
        .stdin(File::open("/dev/null").map_err(step("open /dev/null"))?)
        .stdout(log)
        .stderr(errors)
        .exec();
    Ok(step(format!("execute \"{}\"", launch.program.display()))(error))
}

fn isolate(isolation: &Isolation) -> Result<(), LaunchError> {
    if let Err(errno) = enter_namespaces() {
        return match isolation.stand_ins.first() {
            Some((path, _)) => Err(LaunchError::NotIsolated { path: path.clone() }),
            None => {
                tracing::warn!(
                    "no private mount namespace ({errno}): the clone's server can write where its user can"
                );
                Ok(())
            }
        };
    }
    // From here on nothing that is mounted reaches the rest of the host.
    change_mount(None, Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    for directory in &isolation.writable {
        change_mount(Some(directory), directory, MsFlags::MS_BIND | MsFlags::MS_REC)?;
    }
    for (path, folder) in &isolation.stand_ins {
        make_place(path)?;
        change_mount(Some(folder), path, MsFlags::MS_BIND)?;
    }
    set_read_only(Path::new("/"), true)?;
    let places = isolation.stand_ins.iter().map(|(path, _)| path);
    for directory in isolation.writable.iter().chain(places) {
        set_read_only(directory, false)?;
    }
    // Dynamic shared memory: private and writable.
    mount(Some("tmpfs"), "/dev/shm", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=1777"))
        .map_err(|errno| step("mount /dev/shm")(errno.into()))
}

/// As root a mount namespace; as an ordinary user one within a user namespace, where the host allows it.
fn enter_namespaces() -> nix::Result<()> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    if uid.is_root() {
        return unshare(CloneFlags::CLONE_NEWNS);
    }
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    let write = |path, text: String| std::fs::write(path, text).map_err(|_| nix::errno::Errno::EPERM);
    write("/proc/self/setgroups", "deny".to_owned())?;
    write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

/// Makes sure that something can be mounted at `path`, without changing anything outside this namespace.
fn make_place(path: &Path) -> Result<(), LaunchError> {
    if path.is_dir() {
        return Ok(());
    }
    let existing = path.ancestors().find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("/"));
    // Over the root nothing can be laid without hiding what the server needs.
    if existing == Path::new("/") {
        return Err(LaunchError::NoPlace { path: path.to_owned() });
    }
    // A file system in memory whose first layer is what is there: it stays visible, and what is made is made in memory.
    let layers = format!("lowerdir={},upperdir=/dev/shm/up,workdir=/dev/shm/work", existing.display());
    mount(Some("tmpfs"), "/dev/shm", Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .map_err(|errno| step("mount /dev/shm")(errno.into()))?;
    for folder in ["/dev/shm/up", "/dev/shm/work"] {
        std::fs::create_dir(folder).map_err(step(format!("make \"{folder}\"")))?;
    }
    mount(Some("overlay"), existing, Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
        .map_err(|_| LaunchError::NoPlace { path: path.to_owned() })?;
    std::fs::create_dir_all(path).map_err(step(format!("make \"{}\"", path.display())))
}

fn change_mount(source: Option<&Path>, target: &Path, flags: MsFlags) -> Result<(), LaunchError> {
    mount(source, target, None::<&str>, flags, None::<&str>)
        .map_err(|errno| step(format!("mount \"{}\"", target.display()))(errno.into()))
}

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

#[expect(unsafe_code, reason = "no wrapper for mount_setattr")]
fn set_read_only(path: &Path, read_only: bool) -> Result<(), LaunchError> {
    let c_path = CString::new(path.as_os_str().as_bytes())
        .map_err(|error| step("name a mount")(io::Error::other(error)))?;
    let (attr_set, attr_clr) = if read_only { (MOUNT_ATTR_RDONLY, 0) } else { (0, MOUNT_ATTR_RDONLY) };
    let attributes = MountAttr { attr_set, attr_clr, propagation: 0, userns_fd: 0 };
    // SAFETY: path and attributes outlive the call, and the size is that of the structure.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c_path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if outcome == 0 {
        return Ok(());
    }
    let what = if read_only { "read-only" } else { "writable" };
    Err(step(format!("make \"{}\" {what}", path.display()))(io::Error::last_os_error()))
}

fn drop_privileges(owner: (u32, u32)) -> Result<(), LaunchError> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
    let dropped = || -> nix::Result<()> {
        match nix::unistd::User::from_uid(uid)? {
            Some(user) => {
                let name = CString::new(user.name).map_err(|_| nix::errno::Errno::EINVAL)?;
                nix::unistd::initgroups(&name, gid)?;
            }
            None => nix::unistd::setgroups(&[gid])?,
        }
        nix::unistd::setgid(gid)?;
        nix::unistd::setuid(uid)
    };
    dropped().map_err(|errno| step(format!("become user {uid}"))(errno.into()))
}

fn step(step: impl Into<String>) -> impl FnOnce(io::Error) -> LaunchError {
    let step = step.into();
    move |source| LaunchError::Step { step, source }
}
