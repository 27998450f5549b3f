//! The writable mount once files are wholly local: the kernel reads and writes them by itself, and nothing is lost.
//!
//! Whether an open file is passed through is told by mapping it shared, which a direct one refuses.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Whence, lseek};
use walden::disk::Owner;
use walden::mount::memory_lower::MemoryLower;
use walden::mount::mounting;

use crate::exercise::RELATION;
use crate::harness::{can_mount, can_pass_through, maps_shared, run};
use crate::writable::{Writable, lower, scratch};

fn is_passed_through(file: &File) -> bool {
    match maps_shared(file) {
        Ok(()) => true,
        Err(libc::ENODEV) => false,
        Err(other) => panic!("mapping it failed with {other}"),
    }
}

fn read_write() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options
}

/// A mount whose file `relation` was read to its end.
struct Whole {
    writable: Writable,
    scratch: tempfile::TempDir,
    content: Vec<u8>,
}

impl Whole {
    fn mount() -> Option<Self> {
        if !can_pass_through() {
            return None;
        }
        let (scratch, lower) = (scratch(), lower());
        let content = lower.content(lower.at("relation"), 0..RELATION);
        let writable = Writable::mount(scratch.path(), lower, Owner::current());
        let whole = Self { writable, scratch, content };
        assert!(fs::read(whole.at("relation")).unwrap() == whole.content);
        Some(whole)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.writable.data().join(name)
    }

    /// Opens `relation`, which has to be passed through.
    fn open(&self) -> File {
        let file = read_write().open(self.at("relation")).unwrap();
        assert!(is_passed_through(&file));
        file
    }

    /// Returns the file behind it.
    fn local(&self) -> PathBuf {
        self.scratch.path().join("upper/relation")
    }

    fn is_content(&self) -> bool {
        fs::read(self.at("relation")).unwrap() == self.content
    }
}

#[test]
fn a_file_read_to_its_end_is_passed_through_from_its_next_open_and_both_show_the_same() {
    if !can_pass_through() {
        return;
    }
    let (scratch, lower) = (scratch(), lower());
    let writable = Writable::mount(scratch.path(), lower.clone(), Owner::current());
    let path = writable.data().join("relation");
    let early = read_write().open(&path).unwrap();
    let mut content = vec![0; RELATION as usize];
    early.read_exact_at(&mut content[..100_000], 0).unwrap();
    let half = read_write().open(&path).unwrap();
    assert!(!is_passed_through(&early) && !is_passed_through(&half));
    half.read_exact_at(&mut content, 0).unwrap();
    let late = read_write().open(&path).unwrap();
    assert!(is_passed_through(&late) && !is_passed_through(&early));
    assert!(content == lower.content(lower.at("relation"), 0..RELATION));

    late.write_all_at(&[1; 8192], 8192).unwrap();
    late.write_all_at(b"ragged", 20_001).unwrap();
    early.write_all_at(&[2; 8192], 65_536).unwrap();
    content[8192..16_384].fill(1);
    content[20_001..20_007].copy_from_slice(b"ragged");
    content[65_536..73_728].fill(2);
    for file in [&early, &half, &late] {
        let mut shown = vec![0; RELATION as usize];
        file.read_exact_at(&mut shown, 0).unwrap();
        assert!(shown == content);
    }
    assert!(fs::read(&path).unwrap() == content);
    assert!(fs::read(scratch.path().join("upper/relation")).unwrap() == content);
}

#[test]
fn what_stat_says_of_a_file_that_was_written_past_us_is_right_and_stays_so() {
    let Some(mut whole) = Whole::mount() else { return };
    let file = whole.open();
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_500_000_000);
    file.set_modified(old).unwrap();
    assert_eq!(file.metadata().unwrap().modified().unwrap(), old);
    let shown = |whole: &Whole| {
        let script = "stat -c '%s %Y' relation; ls -l --time-style=full-iso relation";
        String::from_utf8(run(&whole.writable.data(), script).stdout).unwrap()
    };
    let before = shown(&whole);
    file.write_all_at(&[7; 100_000], RELATION).unwrap();
    let after = file.metadata().unwrap();
    assert_eq!(after.len(), RELATION + 100_000);
    assert!(after.modified().unwrap() > old);
    assert!(after.blocks() * 512 >= after.len());
    assert_ne!(shown(&whole), before);
    // Others see it as well, by name and by handle, and at the end that they seek.
    let other = whole.open();
    assert_eq!(fs::metadata(whole.at("relation")).unwrap().len(), after.len());
    assert_eq!(lseek(&other, 0, Whence::SeekEnd).unwrap() as u64, after.len());
    other.set_len(after.len() - 50_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), after.len() - 50_000);
    whole.content.resize(RELATION as usize + 50_000, 7);
    assert!(whole.is_content());
    file.sync_all().unwrap();
    let last = shown(&whole);
    drop((file, other));
    assert_eq!(shown(&whole), last);
    whole.writable.remount();
    assert_eq!(shown(&whole), last);
    assert!(whole.is_content());
    let local = fs::metadata(whole.local()).unwrap();
    assert_eq!(local.len(), RELATION + 50_000);
}

#[test]
fn a_whole_file_is_passed_through_after_mounting_anew_and_a_part_is_not() {
    let Some(mut whole) = Whole::mount() else { return };
    let mut part = vec![0; 100_000];
    File::open(whole.at("mapped")).unwrap().read_exact_at(&mut part, 0).unwrap();
    let file = whole.open();
    file.write_all_at(b"written past us", 12_345).unwrap();
    whole.content[12_345..12_360].copy_from_slice(b"written past us");
    drop(file);
    whole.writable.remount();
    drop(whole.open());
    assert!(whole.is_content());
    assert_eq!(whole.writable.upper().stats().fetches, 0);
    assert!(!is_passed_through(&File::open(whole.at("mapped")).unwrap()));
    // It has been read again, and the rest of it now.
    let mapped = fs::read(whole.at("mapped")).unwrap();
    assert!(mapped[..part.len()] == part);
    assert!(is_passed_through(&File::open(whole.at("mapped")).unwrap()));
}

#[test]
fn what_is_cut_off_stays_off() {
    let Some(mut whole) = Whole::mount() else { return };
    let file = whole.open();
    file.set_len(5001).unwrap();
    file.write_all_at(b"end", RELATION - 3).unwrap();
    whole.content[5001..].fill(0);
    whole.content.truncate(RELATION as usize - 3);
    whole.content.extend(b"end");
    assert!(whole.is_content());
    drop(file);
    whole.writable.remount();
    assert!(whole.is_content());
    assert_eq!(whole.writable.upper().stats().fetches, 0);
    // By its name while nobody has it open, and by opening it.
    File::create(whole.at("relation")).unwrap().write_all(b"short").unwrap();
    whole.writable.remount();
    assert_eq!(fs::read(whole.at("relation")).unwrap(), b"short");
}

#[test]
fn what_is_made_on_the_mount_is_passed_through_at_once() {
    let Some(mut whole) = Whole::mount() else { return };
    let created = read_write().create_new(true).open(whole.at("created")).unwrap();
    assert!(is_passed_through(&created));
    mknod(&whole.at("made"), SFlag::S_IFREG, Mode::from_bits_truncate(0o600), 0).unwrap();
    let made = read_write().open(whole.at("made")).unwrap();
    assert!(is_passed_through(&made));
    let mut log = OpenOptions::new().append(true).read(true).open(whole.at("made")).unwrap();
    assert!(is_passed_through(&log));
    for turn in 0..100 {
        writeln!(log, "turn {turn}").unwrap();
        made.write_all_at(b"T", 0).unwrap();
    }
    fallocate(&created, FallocateFlags::empty(), 0, 65_536).unwrap();
    created.write_all_at(&[5; 100], 65_536).unwrap();
    assert_eq!(created.metadata().unwrap().len(), 65_636);
    // Renamed and removed while they are open, they stay what they are.
    fs::rename(whole.at("made"), whole.at("log")).unwrap();
    fs::remove_file(whole.at("created")).unwrap();
    let mut content = vec![0; 65_636];
    created.read_exact_at(&mut content, 0).unwrap();
    assert!(content[..65_536].iter().all(|byte| *byte == 0) && content[65_536..] == [5u8; 100]);
    assert_eq!(created.metadata().unwrap().nlink(), 0);
    let text: String = (0..100).map(|turn| format!("turn {turn}\n")).collect();
    let text = text.replacen('t', "T", 1);
    assert_eq!(fs::read_to_string(whole.at("log")).unwrap(), text);
    log.sync_all().unwrap();
    drop((created, made, log));
    whole.writable.remount();
    assert_eq!(fs::read_to_string(whole.at("log")).unwrap(), text);
    assert!(is_passed_through(&File::open(whole.at("log")).unwrap()));
}

#[test]
fn holes_and_room_of_a_file_that_is_passed_through() {
    let Some(whole) = Whole::mount() else { return };
    let mut file = whole.open();
    let far = 2 * RELATION / 4096 * 4096;
    file.write_all_at(&[1; 4096], far).unwrap();
    assert_eq!(lseek(&file, 0, Whence::SeekData).unwrap(), 0);
    let hole = lseek(&file, 0, Whence::SeekHole).unwrap() as u64;
    assert!((RELATION..far).contains(&hole), "{hole}");
    assert_eq!(lseek(&file, hole as i64, Whence::SeekData).unwrap() as u64, far);
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), far + 4096);
    fallocate(&file, FallocateFlags::empty(), 0, (far + 100_000) as i64).unwrap();
    assert_eq!(file.metadata().unwrap().len(), far + 100_000);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    // A hole in it would be fetched again after mounting anew.
    assert_eq!(fallocate(&file, punch, 0, 8192), Err(nix::errno::Errno::EOPNOTSUPP));
    let mut content = vec![0; RELATION as usize];
    file.read_exact_at(&mut content, 0).unwrap();
    assert!(content == whole.content);
}

#[test]
fn a_file_opened_for_synced_writes_is_passed_through_too() {
    let Some(mut whole) = Whole::mount() else { return };
    let synced = read_write().custom_flags(libc::O_DSYNC).open(whole.at("relation")).unwrap();
    assert!(is_passed_through(&synced));
    synced.write_all_at(b"for ever", 100).unwrap();
    whole.content[100..108].copy_from_slice(b"for ever");
    drop(synced);
    whole.writable.remount();
    assert!(whole.is_content());
}

#[test]
fn a_hint_does_no_harm() {
    let Some(whole) = Whole::mount() else { return };
    let file = whole.open();
    let before = whole.writable.upper().stats();
    for page in (0..RELATION / 8192).rev() {
        posix_fadvise(&file, page as i64 * 8192, 8192, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
    }
    // Each is handed on to the local file, and not a byte is copied for it.
    let deadline = Instant::now() + Duration::from_secs(20);
    while whole.writable.upper().stats().hints < before.hints + RELATION / 8192 {
        assert!(Instant::now() < deadline, "{:?}", whole.writable.upper().stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(whole.is_content());
    assert_eq!(whole.writable.upper().stats().reads, before.reads);
    assert_eq!(file.metadata().unwrap().len(), RELATION);
    assert_eq!(lseek(&file, 0, Whence::SeekEnd).unwrap() as u64, RELATION);
    // Of one that has yet to be fetched it fetches, and side by side.
    let mapped = File::open(whole.at("mapped")).unwrap();
    posix_fadvise(&mapped, 0, 262_144, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while whole.writable.upper().stats().filled_bytes < RELATION + 262_144 {
        assert!(Instant::now() < deadline, "{:?}", whole.writable.upper().stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The kernel's own limit is twelve at once: who hints at more would wait for a store of many milliseconds.
#[test]
fn two_hundred_hints_are_on_their_way_at_once() {
    const HINTS: u64 = 200;
    // None follows another, and no two are one fetch.
    const APART: u64 = 2 * 65_536;
    if !can_mount() {
        return;
    }
    let (scratch, lower) = (scratch(), MemoryLower::build(&[("cold", HINTS * APART), ("PG_VERSION", 3)]));
    let lower = Arc::new(lower);
    let writable = Writable::mount(scratch.path(), lower.clone(), Owner::current());
    let file = File::open(writable.data().join("cold")).unwrap();
    let store_is_slow = lower.gate.clone().try_write_owned().unwrap();
    let before = lower.fetches();
    let hinted = file.try_clone().unwrap();
    // Whoever hints waits where the kernel's limit is met.
    let hinting = std::thread::spawn(move || {
        for hint in (0..HINTS).rev() {
            posix_fadvise(&hinted, (hint * APART) as i64, 4096, PosixFadviseAdvice::POSIX_FADV_WILLNEED)
                .unwrap();
        }
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while lower.fetches() < before + HINTS && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (under_way, read_aheads) = (lower.fetches() - before, writable.upper().stats().read_aheads);
    drop(store_is_slow);
    hinting.join().unwrap();
    assert_eq!((under_way, read_aheads), (HINTS, 0), "on their way, and fetches that nobody has hinted");
    let mut page = [0; 4096];
    for hint in [0, HINTS - 1] {
        file.read_exact_at(&mut page, hint * APART).unwrap();
        assert!(page[..] == lower.content(lower.at("cold"), hint * APART..hint * APART + 4096));
    }
}

/// Opens race with the read that makes the file whole; the kernel would fail one that does not fit the others.
#[test]
fn no_open_fails_while_a_file_becomes_whole() {
    if !can_pass_through() {
        return;
    }
    let (scratch, lower) = (scratch(), lower());
    let writable = Writable::mount(scratch.path(), lower.clone(), Owner::current());
    for name in ["relation", "mapped", "small", "folder/inside"] {
        let path = writable.data().join(name);
        let size = fs::metadata(&path).unwrap().len();
        let openers: Vec<_> = (0..4u64)
            .map(|seed| {
                let path = path.clone();
                std::thread::spawn(move || {
                    for turn in 0..200u64 {
                        let file = read_write().open(&path).unwrap();
                        let mut byte = [0];
                        file.read_exact_at(&mut byte, (seed * 7919 + turn * 65_536) % size).unwrap();
                        assert_ne!(byte, [0], "no byte of it is zero");
                    }
                })
            })
            .collect();
        openers.into_iter().for_each(|opener| opener.join().unwrap());
        assert!(fs::read(&path).unwrap() == lower.content(lower.at(name), 0..size));
        assert!(is_passed_through(&File::open(&path).unwrap()), "{name}");
    }
}

/// Who has a file open that is passed through can write it without us: nobody else may take the upper before.
#[test]
fn a_mount_that_was_left_behind_stays_while_somebody_has_it_open() {
    let Some(whole) = Whole::mount() else { return };
    let script = "exec 3<>relation; echo open; read";
    let mut holder = Command::new("bash")
        .args(["-c", script])
        .current_dir(whole.writable.data())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "open\n");
    let has_ended = Arc::new(AtomicBool::new(false));
    let point = whole.scratch.path().join("mnt");
    let detaching = std::thread::spawn({
        let (has_ended, point) = (has_ended.clone(), point.clone());
        move || {
            mounting::detach_dead(&point).unwrap();
            assert!(has_ended.load(Ordering::SeqCst), "it was taken away under a process that uses it");
        }
    });
    // Time in which it would go wrong.
    std::thread::sleep(Duration::from_millis(300));
    has_ended.store(true, Ordering::SeqCst);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    detaching.join().unwrap();
    assert!(!mounting::is_mount_point(&point.canonicalize().unwrap()));
}

/// Run by `ordinary_user`; root can.
#[test]
fn who_may_not_pass_through_reads_and_writes_all_the_same() {
    if !can_mount() || Owner::current().is_root() {
        return;
    }
    let (scratch, lower) = (scratch(), lower());
    let mut writable = Writable::mount(scratch.path(), lower.clone(), Owner::current());
    let path = writable.data().join("relation");
    let mut content = fs::read(&path).unwrap();
    assert!(content == lower.content(lower.at("relation"), 0..RELATION));
    for path in [path.clone(), writable.data().join("new")] {
        let file = read_write().create(true).truncate(false).open(&path).unwrap();
        assert!(!is_passed_through(&file));
        file.write_all_at(b"written", 4000).unwrap();
        file.sync_all().unwrap();
    }
    content[4000..4007].copy_from_slice(b"written");
    writable.remount();
    assert!(fs::read(&path).unwrap() == content);
    assert_eq!(fs::metadata(writable.data().join("new")).unwrap().len(), 4007);
}
