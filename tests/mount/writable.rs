//! The writable mount: it behaves as a local directory does, and keeps everything when it is mounted anew.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use walden::disk::{self, Binding, Owner};
use walden::mount::lower::Lower;
use walden::mount::memory_lower::MemoryLower;
use walden::mount::upper::{OpenError, Upper, UpperOptions};
use walden::mount::virtual_dir::{Item, StaticDir};
use walden::mount::{MountOptions, Mounted, Tree, mount};

use crate::exercise::{RELATION, exercise};
use crate::harness::{can_mount, run};

/// A writable mount with its upper beside it.
pub struct Writable {
    // Dropped in this order: the mount goes before the runtime that answers it.
    mounted: Option<Mounted>,
    pub runtime: tokio::runtime::Runtime,
    upper: Option<Upper>,
    lower: Arc<dyn Lower>,
    scratch: PathBuf,
    owner: Owner,
}

impl Writable {
    pub fn mount(scratch: &Path, lower: Arc<dyn Lower>, owner: Owner) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        for name in ["upper", "mnt"] {
            let _ = fs::create_dir(scratch.join(name));
        }
        let mut writable =
            Self { mounted: None, runtime, upper: None, lower, scratch: scratch.to_owned(), owner };
        writable.remount();
        writable
    }

    /// Unmounts, opens the upper anew, as another process would, and mounts again.
    pub fn remount(&mut self) {
        self.unmount();
        let upper = self.open_upper();
        let root = StaticDir::default().with("data", Item::Volume(Arc::new(upper.clone())));
        let tree = Tree::new(Item::Directory(Arc::new(root)), self.owner);
        let point = self.scratch.join("mnt");
        let options = MountOptions::new("walden-test", false);
        self.mounted = Some(mount(tree, &point, &options, self.runtime.handle()).unwrap());
        self.upper = Some(upper);
    }

    /// Opens the upper; what was being fetched ahead in the last one may hold it for a moment longer.
    fn open_upper(&self) -> Upper {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let options = UpperOptions {
                directory: self.scratch.join("upper"),
                binding: Binding {
                    basebackup: "id".into(),
                    manifest_digest: "ab".into(),
                    part: "data".into(),
                },
                owner: self.owner,
                holds_back: true,
            };
            match self.runtime.block_on(Upper::open(self.lower.clone(), options)) {
                Err(OpenError::Disk(disk::Error::Locked { .. })) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                opened => return opened.unwrap(),
            }
        }
    }

    pub fn unmount(&mut self) {
        if let Some(mut mounted) = self.mounted.take() {
            mounted.unmount().unwrap();
        }
        self.upper = None;
    }

    pub fn data(&self) -> PathBuf {
        self.scratch.join("mnt/data")
    }

    pub fn upper(&self) -> &Upper {
        self.upper.as_ref().unwrap()
    }
}

pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("walden-mount-").tempdir().unwrap()
}

pub fn lower() -> Arc<MemoryLower> {
    Arc::new(MemoryLower::build(&[
        ("relation", RELATION),
        ("mapped", RELATION),
        ("small", 100),
        ("folder/inside", 20_000),
        ("PG_VERSION", 3),
    ]))
}

/// Copies what a lower holds into a local directory.
fn copy_of(lower: &MemoryLower, place: &Path) {
    fs::create_dir_all(place.join("folder")).unwrap();
    for (name, size) in [
        ("relation", RELATION),
        ("mapped", RELATION),
        ("small", 100),
        ("folder/inside", 20_000),
        ("PG_VERSION", 3),
    ] {
        fs::write(place.join(name), lower.content(lower.at(name), 0..size)).unwrap();
    }
    run(place, "chmod 600 relation mapped small folder/inside PG_VERSION; chmod 700 folder .");
}

/// Names, kinds, modes, owners, link counts of files, sizes and contents of all there is.
fn tree(place: &Path) -> String {
    let script = "find . -mindepth 1 ! -type d -printf '%p %y %m %U:%G %n %s %l\\n' | sort;
                  find . -mindepth 1 -type d -printf '%p %m %U:%G\\n' | sort;
                  find . -type f -print0 | sort -z | xargs -0 sha256sum";
    String::from_utf8(run(place, script).stdout).unwrap()
}

#[test]
fn it_behaves_as_a_local_directory_does_and_keeps_everything() {
    if !can_mount() {
        return;
    }
    let scratch = scratch();
    let lower = lower();
    let mut writable = Writable::mount(scratch.path(), lower.clone(), Owner::current());
    let native = scratch.path().join("native");
    copy_of(&lower, &native);
    assert_eq!(tree(&writable.data()), tree(&native));
    writable.remount();
    let (got, expected) = (exercise(&writable.data()), exercise(&native));
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!(got, expected);
    }
    assert_eq!(got.len(), expected.len());
    assert_eq!(tree(&writable.data()), tree(&native));
    writable.remount();
    assert_eq!(tree(&writable.data()), tree(&native));
    // A clean copy by ordinary tools, sparse files and all.
    let copied = scratch.path().join("copied");
    run(scratch.path(), "cp -a mnt/data copied && rm -r copied/fifo copied/socket");
    run(&native, "rm fifo socket");
    assert_eq!(tree(&copied).replace(" 2 ", " 1 "), tree(&native).replace(" 2 ", " 1 "));
}

#[test]
fn what_the_mount_does_not_do_it_says() {
    if !can_mount() {
        return;
    }
    let scratch = scratch();
    let writable = Writable::mount(scratch.path(), lower(), Owner::current());
    let (small, relation) = (writable.data().join("small"), writable.data().join("relation"));
    let exchanged = renameat2(AT_FDCWD, &small, AT_FDCWD, &relation, RenameFlags::RENAME_EXCHANGE);
    assert_eq!(exchanged, Err(Errno::EINVAL));
    let file = File::options().write(true).open(&relation).unwrap();
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&file, punch, 0, 4096), Err(Errno::EOPNOTSUPP));
    assert!(File::open(writable.data().join(".walden")).is_err());
    // The room there is, is the upper's.
    let (mount, upper) =
        (run(&writable.data(), "stat -f -c %b ."), run(scratch.path(), "stat -f -c %b upper"));
    assert_eq!(mount.stdout, upper.stdout);
}

/// The data directory keeps its inode: PostgreSQL derives the key of its shared memory from it.
#[test]
fn inodes_of_the_lower_are_the_same_after_mounting_anew() {
    if !can_mount() {
        return;
    }
    let scratch = scratch();
    let mut writable = Writable::mount(scratch.path(), lower(), Owner::current());
    let inodes = |writable: &Writable| run(&writable.data(), "stat -c %i . relation folder/inside").stdout;
    let before = inodes(&writable);
    run(&writable.data(), "touch new; mv relation r; mv new n; mv r relation");
    writable.remount();
    assert_eq!(inodes(&writable), before);
}

#[test]
fn a_writer_and_a_reader_that_wait_for_the_store_can_be_killed() {
    if !can_mount() {
        return;
    }
    let scratch = scratch();
    let lower = lower();
    let writable = Writable::mount(scratch.path(), lower.clone(), Owner::current());
    let path = writable.data().join("relation").display().to_string();
    let store_is_away = lower.gate.clone().try_write_owned().unwrap();
    for script in ["exec cat {} >/dev/null", "exec dd if=/dev/zero of={} bs=100 count=1 seek=77 conv=notrunc"]
    {
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            let before = lower.fetches();
            let script = script.replace("{}", &path);
            let mut child = Command::new("bash").args(["-c", &script]).stderr(Stdio::null()).spawn().unwrap();
            while lower.fetches() == before {
                std::thread::yield_now();
            }
            nix::sys::signal::kill(Pid::from_raw(child.id() as i32), signal).unwrap();
            assert_eq!(child.wait().unwrap().signal(), Some(signal as i32), "{script}");
        }
    }
    drop(store_is_away);
    let mut content = vec![0; RELATION as usize];
    File::open(&path).unwrap().read_exact_at(&mut content, 0).unwrap();
    assert!(content == lower.content(lower.at("relation"), 0..RELATION));
}
