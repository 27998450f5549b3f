//! A folder for one test, and the account PostgreSQL runs as.
//!
//! Whatever a test leaves in its folder when it fails (a server, a mount, a `walden` in the background) is
//! found by the folder's unique name and ended, so that a red test does not make the next one red.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use tempfile::TempDir;

use super::needs::{is_root, program};

/// Who runs PostgreSQL: user postgres when the test is root, for PostgreSQL refuses root; else the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
}

impl Account {
    /// Returns the account servers run as.
    pub fn of_postgresql() -> Self {
        let name = "postgres";
        let postgres = || User::from_name(name).unwrap().unwrap_or_else(|| panic!("there is no user {name}"));
        let user =
            if is_root() { postgres() } else { User::from_uid(nix::unistd::geteuid()).unwrap().unwrap() };
        Self { uid: user.uid.as_raw(), gid: user.gid.as_raw() }
    }

    /// Makes a command that runs as this account.
    pub fn command(self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        if is_root() {
            command.uid(self.uid).gid(self.gid);
        }
        command.current_dir("/");
        command
    }

    /// Gives a file or folder to this account.
    pub fn own(self, path: &Path) {
        if is_root() {
            chown(path, Some(self.uid), Some(self.gid)).unwrap();
        }
    }
}

/// A fresh folder below `/tmp`, with a short name because sockets live in it, owned by PostgreSQL's account.
#[derive(Debug)]
pub struct Scratch {
    folder: TempDir,
    account: Account,
}

impl Scratch {
    /// Creates the folder.
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("walden-test-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let account = Account::of_postgresql();
        account.own(folder.path());
        Self { folder, account }
    }

    /// Returns where the folder is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the account that owns it.
    pub fn account(&self) -> Account {
        self.account
    }

    /// Creates a folder in it, only its owner's, as PostgreSQL wants its own.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        self.account.own(&path);
        path
    }

    /// Writes a file in it that only its owner reads.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        self.account.own(&path);
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Servers first, the mounts under them next, then what served those.
        end_processes(|process| works_in(process, self.path()) && !serves(process));
        for mount in mounts_below(self.path()) {
            unmount(&mount);
        }
        end_processes(|process| works_in(process, self.path()) || names(process, self.path()));
    }
}

/// Lists the mounts at or below a folder, the deepest first.
pub fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(folder)).collect();
    below.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    below
}

/// Takes a mount away at once; what still holds it sees errors.
pub fn unmount(mount: &Path) {
    let gone = is_root() && umount2(mount, MntFlags::MNT_DETACH).is_ok();
    if let Some(fusermount) = program("fusermount3").filter(|_| !gone) {
        let _ = Command::new(fusermount).arg("-uz").arg(mount).status();
    }
}

/// Lets every user open `/dev/fuse`, as udev's rule does; containers often make it root's alone.
pub fn open_fuse_to_users() {
    if is_root() {
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
    }
}

/// Lists the processes whose working directory is in a folder: for a data directory, its server.
pub fn processes_in(folder: &Path) -> Vec<Pid> {
    processes().filter(|(_, process)| works_in(process, folder)).map(|(pid, _)| pid).collect()
}

fn processes() -> impl Iterator<Item = (Pid, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let own = std::process::id() as i32;
    let numbered = entries.filter_map(|e| Some((e.file_name().to_str()?.parse::<i32>().ok()?, e.path())));
    numbered.filter(move |(pid, _)| *pid != own).map(|(pid, path)| (Pid::from_raw(pid), path))
}

fn end_processes(belongs: impl Fn(&Path) -> bool) {
    for (pid, process) in processes() {
        if belongs(&process) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

fn works_in(process: &Path, folder: &Path) -> bool {
    fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
}

fn names(process: &Path, folder: &Path) -> bool {
    let command_line = fs::read(process.join("cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command_line).contains(&*folder.to_string_lossy())
}

fn serves(process: &Path) -> bool {
    fs::read_to_string(process.join("comm")).is_ok_and(|name| name.starts_with("walden"))
}
