//! A scratch folder, a mount in it, and a shell to poke at it with.
//!
//! The shell is another process on purpose: a test that reads its own mount from a runtime thread can deadlock.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use walden::mount::{MountOptions, Mounted, Tree, mount};

/// A mounted tree in a scratch folder.
pub struct Fixture {
    // Dropped in this order: the mount goes before the runtime that answers it and the folder it lies in.
    pub mounted: Option<Mounted>,
    _runtime: tokio::runtime::Runtime,
    scratch: tempfile::TempDir,
}

impl Fixture {
    /// Mounts a tree, or returns `None` after saying why it cannot be done here.
    pub fn mount(tree: impl FnOnce(&Path) -> Arc<Tree>, read_only: bool) -> Option<Self> {
        if !can_mount() {
            return None;
        }
        let scratch = tempfile::Builder::new().prefix("walden-mount-").tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let point = scratch.path().join("mnt");
        std::fs::create_dir(&point).unwrap();
        let options = MountOptions::new("walden-test", read_only);
        let mounted = mount(tree(scratch.path()), &point, &options, runtime.handle()).unwrap();
        Some(Self { mounted: Some(mounted), _runtime: runtime, scratch })
    }

    pub fn point(&self) -> PathBuf {
        self.scratch.path().join("mnt")
    }

    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Runs a shell script in the mount point and returns its output; a failure fails the test.
    pub fn shell(&self, script: &str) -> String {
        let output = run(&self.point(), script);
        assert!(
            output.status.success(),
            "{script}\n{}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a script that must fail and returns what it said.
    pub fn shell_fails(&self, script: &str) -> String {
        let output = run(&self.point(), script);
        assert!(!output.status.success(), "{script} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

/// Runs a script somewhere.
pub fn run(place: &Path, script: &str) -> Output {
    Command::new("bash").args(["-euo", "pipefail", "-c", script]).current_dir(place).output().unwrap()
}

/// Tells whether this user can mount here; fails where it must be possible.
pub fn can_mount() -> bool {
    let helper = ["/usr/bin/fusermount3", "/bin/fusermount3"].iter().any(|path| Path::new(path).exists());
    if Path::new("/dev/fuse").exists() && (walden::disk::Owner::current().is_root() || helper) {
        return true;
    }
    skip("mount tests need /dev/fuse, and root or fusermount3")
}

/// Tells whether files can be passed through here; fails where it must be possible.
pub fn can_pass_through() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if !can_mount() {
        return false;
    }
    if version >= (6, 9) && walden::disk::Owner::current().is_root() {
        return true;
    }
    skip("passing files through needs Linux 6.9 and root")
}

/// Maps the start of a file shared: of files on a mount that does not cache, only one that is passed through can be.
#[expect(unsafe_code, reason = "there is no safe way to map a file")]
pub fn maps_shared(file: &File) -> Result<(), i32> {
    const LENGTH: usize = 4096;
    // SAFETY: a mapping that nobody reads, of an open file, unmapped at once.
    unsafe {
        let (protection, shared) = (libc::PROT_READ, libc::MAP_SHARED);
        let address = libc::mmap(std::ptr::null_mut(), LENGTH, protection, shared, file.as_raw_fd(), 0);
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
        }
        libc::munmap(address, LENGTH);
    }
    Ok(())
}

/// Says loudly what is not tested; fails where everything must be.
pub fn skip(why: &str) -> bool {
    assert!(std::env::var_os("CI").is_none(), "{why}, and CI is set");
    eprintln!("SKIPPED: {why}");
    false
}
