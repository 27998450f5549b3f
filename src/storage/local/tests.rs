//! Tests of the store in a folder: what a crash, another process or an administrator leaves there.
//!
//! Three of them mount a small tmpfs; without the right to they say so, and fail where `CI` is set. One
//! runs this test binary again and kills it.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use super::super::conformance;
use super::super::error::ErrorKind;
use super::*;
use crate::clock::{ManualClock, SystemClock};

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

fn body(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn open(folder: &TempDir) -> LocalStore {
    LocalStore::open(folder.path(), &SystemClock).unwrap()
}

fn names(folder: PathBuf) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn keeps_the_contract() {
    let folder = TempDir::new().unwrap();
    conformance::check(Arc::new(open(&folder)), "site/conformance").await;
    assert_eq!(names(folder.path().to_owned()), [".staging"], "empty folders go with their last object");
    assert!(names(folder.path().join(".staging")).is_empty(), "no create leaves its staged file");
}

#[tokio::test]
async fn two_openings_keep_it_together() {
    let folder = TempDir::new().unwrap();
    let (one, other) = (open(&folder), open(&folder));
    // Each holds the folder open while the other empties it, which removes it.
    for round in 0..20 {
        let (first, second) = (key(&format!("a/b/{round}")), key(&format!("a/b/{round}-2")));
        one.create(&first, body("x")).await.unwrap();
        other.create(&second, body("y")).await.unwrap();
        other.delete(&first).await.unwrap();
        assert_eq!(one.get(&second, 1).await.unwrap(), "y");
        one.delete(&second).await.unwrap();
    }
    assert!(one.list("", None, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn creates_and_deletes_in_one_folder_do_not_lose_each_other() {
    let folder = TempDir::new().unwrap();
    let tasks: Vec<_> = (0..4)
        .map(|worker| {
            let store = open(&folder);
            tokio::spawn(async move {
                for round in 0..25 {
                    let key = key(&format!("site/folder/{worker}-{round}"));
                    store.create(&key, body("x")).await.unwrap();
                    assert_eq!(store.get(&key, 1).await.unwrap(), "x");
                    store.delete(&key).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn what_a_crash_left_is_hidden_and_swept_after_a_day() {
    let folder = TempDir::new().unwrap();
    open(&folder).create(&key("site/a"), body("a")).await.unwrap();
    let left = folder.path().join(".staging/4711-0");
    fs::write(&left, "half of an obj").unwrap();

    let store = open(&folder);
    assert!(left.exists(), "a create of today may still be running");
    assert_eq!(store.list("", None, 10).await.unwrap().len(), 1);
    assert_eq!(store.list_folder("").await.unwrap().folders, ["site"]);

    let clock = ManualClock::new(SystemClock.now());
    clock.advance(Duration::from_secs(25 * 3600));
    let store = LocalStore::open(folder.path(), &clock).unwrap();
    assert!(!left.exists());
    assert_eq!(store.get(&key("site/a"), 1).await.unwrap(), "a");
}

/// Names the folder to write to in the process that `a_killed_writer_leaves_whole_objects_only` kills.
const WRITER_FOLDER: &str = "WALDEN_TEST_WRITER_FOLDER";

/// Content that tells a part from the whole: its length and every byte follow from the number.
fn numbered(number: usize) -> Bytes {
    vec![(number % 251) as u8; 300_000 + number].into()
}

/// Failure 41: a store that wrote in place left part of an object under its name, and nothing of what stood there.
#[tokio::test]
async fn a_killed_writer_leaves_whole_objects_only() {
    if let Some(folder) = std::env::var_os(WRITER_FOLDER) {
        let store = LocalStore::open(Path::new(&folder), &SystemClock).unwrap();
        for number in 0..100_000 {
            store.create(&key(&format!("site/packs/{number}")), numbered(number)).await.unwrap();
        }
        unreachable!("is killed before it comes here");
    }
    let folder = TempDir::new().unwrap();
    let mut writer = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "storage::local::tests::a_killed_writer_leaves_whole_objects_only"])
        .env(WRITER_FOLDER, folder.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let store = open(&folder);
    while store.list("", None, 5).await.unwrap().len() < 5 {
        assert!(writer.try_wait().unwrap().is_none(), "the writer ended by itself");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    writer.kill().unwrap();
    writer.wait().unwrap();

    let found = open(&folder).list("", None, 100_000).await.unwrap();
    assert!(found.len() >= 5);
    for meta in &found {
        let number = meta.key.name().parse().unwrap();
        assert_eq!(meta.size, numbered(number).len() as u64, "{}", meta.key);
        assert!(store.get(&meta.key, u64::MAX).await.unwrap() == numbered(number), "{}", meta.key);
    }
    // Whoever comes next is in nobody's way.
    store.create(&key("site/packs/next"), body("next")).await.unwrap();
}

#[tokio::test]
async fn a_staged_name_left_by_an_earlier_process_of_our_number_is_passed_over() {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.path().join(".staging")).unwrap();
    for number in 0..50 {
        fs::write(folder.path().join(format!(".staging/{}-{number}", std::process::id())), "left").unwrap();
    }
    let store = open(&folder);
    store.create(&key("a"), body("mine")).await.unwrap();
    assert_eq!(store.get(&key("a"), 9).await.unwrap(), "mine");
    assert_eq!(names(folder.path().join(".staging")).len(), 50);
}

#[tokio::test]
async fn owner_and_mode_follow_the_root_folder() {
    for (root, wanted_folder, wanted_file) in
        [(0o700, 0o700, 0o600), (0o755, 0o750, 0o640), (0o2770, 0o2770, 0o640), (0o711, 0o710, 0o600)]
    {
        let folder = TempDir::new().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(root)).unwrap();
        if geteuid_is_root() {
            std::os::unix::fs::chown(folder.path(), Some(65_534), Some(65_533)).unwrap();
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(root)).unwrap();
        }
        open(&folder).create(&key("a/b/c"), body("c")).await.unwrap();
        let root = fs::metadata(folder.path()).unwrap();
        for (path, wanted) in [("a", wanted_folder), ("a/b", wanted_folder), ("a/b/c", wanted_file)] {
            let found = fs::metadata(folder.path().join(path)).unwrap();
            assert_eq!(found.mode() & 0o7777, wanted, "{path}");
            assert_eq!((found.uid(), found.gid()), (root.uid(), root.gid()), "{path}");
        }
    }
}

fn geteuid_is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn a_root_that_is_missing_or_no_folder_is_refused() {
    let folder = TempDir::new().unwrap();
    let missing = LocalStore::open(&folder.path().join("missing"), &SystemClock).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Invalid);
    assert!(missing.to_string().ends_with("does not exist"), "{missing}");
    fs::write(folder.path().join("file"), "").unwrap();
    let file = LocalStore::open(&folder.path().join("file"), &SystemClock).unwrap_err();
    assert!(file.to_string().ends_with("is not a folder"), "{file}");
}

#[tokio::test]
async fn a_root_removed_under_us_proves_nothing_absent() {
    let folder = TempDir::new().unwrap();
    let store = open(&folder);
    fs::remove_dir_all(folder.path()).unwrap();
    let key = key("site/a");
    assert_eq!(store.get(&key, 1).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.head(&key).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.list("", None, 1).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.list_folder("").await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.create(&key, body("x")).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.delete(&key).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn what_is_not_ours_is_passed_over_and_never_read() {
    let folder = TempDir::new().unwrap();
    let store = open(&folder);
    store.create(&key("site/a"), body("a")).await.unwrap();
    let site = folder.path().join("site");
    fs::write(site.join("a note.txt"), "").unwrap();
    fs::write(site.join(".hidden"), "").unwrap();
    fs::create_dir(site.join(".snapshot")).unwrap();
    fs::write(site.join(".snapshot/a"), "").unwrap();
    symlink("nowhere", site.join("dangling")).unwrap();
    nix::unistd::mkfifo(&site.join("fifo"), Mode::S_IRWXU).unwrap();
    assert!(fs::metadata(site.join("fifo")).unwrap().file_type().is_fifo());

    let found = store.list("", None, 100).await.unwrap();
    assert_eq!(found.iter().map(|meta| meta.key.as_str()).collect::<Vec<_>>(), ["site/a"]);
    let level = store.list_folder("site").await.unwrap();
    assert_eq!((level.folders.len(), level.objects.len()), (0, 1));
    // Would wait for a writer for ever if it were opened as one opens a file.
    assert_eq!(store.get(&key("site/fifo"), 10).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.head(&key("site")).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(store.get(&key("site"), 10).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn a_size_beyond_memory_is_refused() {
    let folder = TempDir::new().unwrap();
    let store = open(&folder);
    store.create(&key("site/a"), body("a")).await.unwrap();
    let file = fs::OpenOptions::new().write(true).open(folder.path().join("site/a")).unwrap();
    // As much as the file system can pretend to hold, all of it a hole.
    let size = [1u64 << 62, 1 << 46, 1 << 43].into_iter().find(|&size| file.set_len(size).is_ok()).unwrap();
    assert_eq!(store.get(&key("site/a"), 1 << 20).await.unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(store.get_range(&key("site/a"), 0..size).await.unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(store.get_range(&key("site/a"), 0..1).await.unwrap(), "a");
}

#[tokio::test]
async fn an_object_in_place_of_a_folder_is_said_to_be_that() {
    let folder = TempDir::new().unwrap();
    let store = open(&folder);
    store.create(&key("a/b"), body("b")).await.unwrap();
    for taken in ["a", "a/b/c", "a/b/c/d"] {
        let error = store.create(&key(taken), body("x")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    assert!(store.get(&key("a/b/c"), 1).await.unwrap_err().is_absent());
    assert!(names(folder.path().join(".staging")).is_empty(), "a refused create leaves nothing");
}

#[tokio::test]
async fn a_full_file_system_is_full_and_leaves_nothing() {
    let Some(small) = SmallFileSystem::mount() else {
        eprintln!("SKIPPED: a_full_file_system_is_full_and_leaves_nothing needs the right to mount a tmpfs");
        assert!(std::env::var_os("CI").is_none(), "needs the right to mount a tmpfs");
        return;
    };
    let store = LocalStore::open(small.folder.path(), &SystemClock).unwrap();
    let large = Bytes::from(vec![1; 2 << 20]);
    let error = store.create(&key("site/large"), large).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    assert!(store.get(&key("site/large"), 10).await.unwrap_err().is_absent());
    assert!(names(small.folder.path().join(".staging")).is_empty());
    store.create(&key("site/small"), body("fits")).await.unwrap();
}

/// A file system of one megabyte, unmounted when dropped.
struct SmallFileSystem {
    folder: TempDir,
}

impl SmallFileSystem {
    fn mount() -> Option<Self> {
        use nix::mount::{MsFlags, mount};
        let folder = TempDir::new().unwrap();
        let options = Some("size=1m,mode=700");
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), options).ok()?;
        Some(Self { folder })
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        nix::mount::umount2(self.folder.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

/// Failure 33: what is mounted over the root is not looked into.
#[tokio::test]
async fn a_mount_over_the_root_is_not_entered() {
    let folder = TempDir::new().unwrap();
    let store = open(&folder);
    store.create(&key("site/a"), body("a")).await.unwrap();
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    if mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m")).is_err() {
        eprintln!("SKIPPED: a_mount_over_the_root_is_not_entered needs the right to mount a tmpfs");
        assert!(std::env::var_os("CI").is_none(), "needs the right to mount a tmpfs");
        return;
    }
    let read = store.get(&key("site/a"), 1).await;
    let created = store.create(&key("site/b"), body("b")).await;
    umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
    assert_eq!(read.unwrap(), "a");
    created.unwrap();
    assert!(folder.path().join("site/b").exists());
}

#[tokio::test]
async fn another_file_system_below_the_root_is_refused_by_name() {
    let folder = TempDir::new().unwrap();
    let store = open(&folder);
    let site = folder.path().join("site");
    fs::create_dir(&site).unwrap();
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    if mount(Some("tmpfs"), &site, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).is_err() {
        eprintln!(
            "SKIPPED: another_file_system_below_the_root_is_refused_by_name needs the right to mount a tmpfs"
        );
        assert!(std::env::var_os("CI").is_none(), "needs the right to mount a tmpfs");
        return;
    }
    let error = store.create(&key("site/a"), body("a")).await.unwrap_err();
    drop(store);
    umount2(&site, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("another file system"), "{error}");
}
