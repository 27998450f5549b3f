//! Who fetches what, and when: pieces that stream in, readers that share them, and what follows a scan.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use crate::disk::Owner;
use crate::mount::fs::{OpenFile, Volume};
use crate::mount::memory_lower::{MemoryLower, PIECE};
use crate::mount::repo_lower::RepoLower;
use crate::mount::upper::tests::simulated_disk::SimulatedDisk;
use crate::mount::upper::tests::world::{World, binding, caller, open, same};
use crate::mount::upper::{Upper, UpperFile, UpperOptions};
use crate::repo::builder::BasebackupBuilder;
use crate::repo::entry::TreePath;
use crate::repo::{Basebackup, FileReader, Urgency, testing};
use crate::storage::{MemoryStore, Recording, Verb};

const FILE: &str = "16384";
const SIZE: u64 = 128 * PIECE;
const PAGE: u64 = 8192;

/// A world with one file of 8 MiB.
async fn world(scratch: &Path) -> World {
    let lower = Arc::new(MemoryLower::build(&[(FILE, SIZE)]));
    World { upper: open(&lower, scratch).await.unwrap(), lower }
}

async fn open_file(world: &World) -> Arc<UpperFile> {
    let found = world.find(FILE).await.unwrap();
    world.upper.open_file(found.id).unwrap()
}

/// Reads one page and compares it.
async fn read_page(world: &World, file: &UpperFile, page: u64) {
    let range = page * PAGE..(page + 1) * PAGE;
    let got = file.read(&caller(), range.start, PAGE as u32).await.unwrap();
    same(&got, &world.lower.content(world.lower.at(FILE), range), &format!("page {page}"));
}

async fn read_all(world: &World) {
    let file = open_file(world).await;
    for page in 0..SIZE / PAGE {
        read_page(world, &file, page).await;
    }
}

/// Waits until nothing is being fetched.
async fn idle(world: &World) {
    let wait = async {
        while !world.upper.shared.flights.is_idle() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap();
}

#[tokio::test]
async fn a_piece_that_came_is_read_while_the_rest_is_under_way() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let file = open_file(&world).await;
    let held = world.lower.between.clone().write_owned().await;
    let all = tokio::spawn({
        let file = file.clone();
        async move { file.ensure_range_as(Urgency::Background, &caller(), 0..SIZE).await }
    });
    while world.upper.stats().filled_bytes < PIECE {
        tokio::task::yield_now().await;
    }
    read_page(&world, &file, 0).await;
    read_page(&world, &file, 7).await;
    assert!(!all.is_finished());
    drop(held);
    all.await.unwrap().unwrap();
    assert_eq!((world.lower.fetches(), world.lower.fetched_bytes()), (1, SIZE));
    assert_eq!(world.upper.stats().filled_bytes, SIZE);
    read_all(&world).await;
    assert_eq!(world.lower.fetches(), 1);
}

#[tokio::test]
async fn what_is_missing_in_several_places_is_one_fetch() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    for page in [1u64, 20, 21, 300] {
        world.write(FILE, page * PAGE, &[7; PAGE as usize]).await.unwrap();
    }
    open_file(&world).await.ensure_range(&caller(), 0..SIZE).await.unwrap();
    assert_eq!((world.lower.fetches(), world.lower.fetched_bytes()), (1, SIZE));
    assert_eq!(world.upper.stats().filled_bytes, SIZE - 4 * PAGE);
    same(&world.read(FILE, 300 * PAGE, 8192).await.unwrap(), &[7; PAGE as usize], "written");
}

#[tokio::test]
async fn a_store_that_goes_away_in_the_middle_leaves_what_came_and_no_zeros() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let file = open_file(&world).await;
    world.lower.fail_after_pieces(5);
    assert_eq!(file.ensure_range(&caller(), 0..SIZE).await, Err(Errno::EIO));
    assert!(world.upper.shared.flights.is_idle());
    assert_eq!(world.upper.stats().filled_bytes, 5 * PIECE);
    world.lower.fail_next_fetches(u32::MAX);
    read_page(&world, &file, 5 * PIECE / PAGE - 1).await;
    assert_eq!(file.read(&caller(), 5 * PIECE, 8192).await, Err(Errno::EIO));
    world.lower.fail_next_fetches(0);
    read_all(&world).await;
    assert_eq!(world.upper.stats().filled_bytes, SIZE);
}

#[tokio::test]
async fn a_long_fetch_that_is_given_up_keeps_what_came_and_frees_the_rest() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let file = open_file(&world).await;
    let held = world.lower.between.clone().write_owned().await;
    let all = tokio::spawn({
        let file = file.clone();
        async move { file.ensure_range(&caller(), 0..SIZE).await }
    });
    while world.upper.stats().filled_bytes == 0 {
        tokio::task::yield_now().await;
    }
    all.abort();
    assert!(all.await.unwrap_err().is_cancelled());
    assert!(world.upper.shared.flights.is_idle());
    assert_eq!(world.upper.stats().filled_bytes, PIECE);
    read_page(&world, &file, 9).await;
    assert_eq!(world.lower.fetches(), 2);
    drop(held);
    read_all(&world).await;
}

/// The kernel lets who writes too fast sleep, and there are few threads.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_slow_disk_under_what_nobody_waits_for_leaves_the_thread_to_others() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::of(Arc::new(MemoryLower::build(&[(FILE, SIZE)])), &disk).await;
    let file = open_file(&world).await;
    disk.hold_writes(true);
    let background =
        tokio::spawn(async move { file.ensure_range_as(Urgency::Background, &caller(), 0..SIZE).await });
    let writes = async {
        while !disk.is_writing() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), writes).await.unwrap();
    assert_eq!(tokio::spawn(async { 7 }).await.unwrap(), 7);
    assert!(disk.is_writing(), "it was waited for");
    disk.hold_writes(false);
    background.await.unwrap().unwrap();
    assert_eq!(world.upper.stats().filled_bytes, SIZE);
}

/// The patience of each counts from when it asks; one after the other they would wait for ever.
#[tokio::test]
async fn while_the_store_is_away_all_readers_of_a_page_wait_side_by_side() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let file = open_file(&world).await;
    let away = world.lower.gate.clone().write_owned().await;
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let file = file.clone();
            tokio::spawn(async move { file.read(&caller(), 0, PAGE as u32).await })
        })
        .collect();
    let all_ask = async {
        while world.lower.fetches() < 8 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all_ask).await.expect("each asks the lower");
    drop(away);
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    assert!(world.upper.shared.flights.is_idle());
    assert_eq!(world.upper.stats().filled_bytes, PIECE);
}

#[tokio::test]
async fn many_readers_of_overlapping_ranges_fetch_each_byte_once_and_those_who_leave_harm_nobody() {
    for leaving in [false, true] {
        let scratch = tempfile::tempdir().unwrap();
        let world = world(scratch.path()).await;
        let file = open_file(&world).await;
        let readers: Vec<_> = (0..60u64)
            .map(|n| {
                let file = file.clone();
                let start = n * 7919 * PAGE % (SIZE / 2);
                let range = start..start + SIZE / 3;
                let reader = tokio::spawn(async move { file.ensure_range(&caller(), range).await });
                (n, reader)
            })
            .collect();
        for (n, reader) in readers {
            if leaving && n % 3 == 0 {
                for _ in 0..n % 11 {
                    tokio::task::yield_now().await;
                }
                reader.abort();
                let _ = reader.await;
            } else {
                reader.await.unwrap().unwrap();
            }
        }
        assert!(world.upper.shared.flights.is_idle());
        assert!(leaving || world.lower.fetched_bytes() == world.upper.stats().filled_bytes);
        read_all(&world).await;
    }
}

#[tokio::test]
async fn a_scan_is_read_ahead_of_in_few_fetches() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let file = open_file(&world).await;
    for page in 0..SIZE / PAGE {
        read_page(&world, &file, page).await;
        // A reader that is slower than the line: one that is faster asks for what is under way itself, and the chunks' own
        // flights see to it that it is asked for once.
        tokio::task::yield_now().await;
        idle(&world).await;
    }
    // Two chunks until it is believed; then 256 KiB, and twice that each time until the end.
    let mut urgencies = world.lower.urgencies();
    urgencies.sort();
    assert_eq!(urgencies, [[Urgency::Ahead; 6].as_slice(), &[Urgency::Foreground; 2]].concat());
    assert_eq!(world.lower.fetched_bytes(), SIZE);
    assert_eq!((world.upper.stats().read_aheads, world.upper.stats().waits), (6, 2));
}

#[tokio::test]
async fn a_scan_of_a_basebackup_costs_a_request_for_each_window() {
    let scratch = tempfile::tempdir().unwrap();
    let store = Recording::new(MemoryStore::new());
    let repository = testing::site(store.clone(), testing::clock()).await;
    let content: Vec<u8> = (0..SIZE).map(|n| (n / 13 + n / PAGE) as u8 | 1).collect();
    let mut builder = BasebackupBuilder::begin(&repository, testing::basebackup(), None).await.unwrap();
    builder.directory("data").file("data/16384", &content).await.unwrap();
    let id = builder.finish().await.unwrap().id;
    let reader = FileReader::new(Arc::new(Basebackup::open(&repository, id).await.unwrap()), 1 << 20);
    let lower = RepoLower::new(Arc::new(reader), TreePath::new("data").unwrap());
    let options = UpperOptions {
        directory: scratch.path().to_owned(),
        binding: binding(),
        owner: Owner::current(),
        holds_back: false,
    };
    let upper = Upper::open(Arc::new(lower), options).await.unwrap();
    let found = upper.lookup(&caller(), upper.root(), FILE.as_bytes()).await.unwrap();
    let file = upper.open_file(found.id).unwrap();
    store.take_calls();
    for page in 0..SIZE / PAGE {
        let got = file.read(&caller(), page * PAGE, PAGE as u32).await.unwrap();
        let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
        same(&got, &content[range], &format!("page {page}"));
        tokio::task::yield_now().await;
    }
    // The page map, two chunks until the scan is believed, six windows; pages are stored as they are.
    let calls = store.take_calls();
    assert!(calls.iter().all(|call| call.verb == Verb::GetRange), "{calls:?}");
    assert_eq!((calls.len(), upper.stats().read_aheads), (1 + 2 + 6, 6), "{calls:?}");
    let bytes: u64 = calls.iter().map(|call| call.bytes).sum();
    assert!((SIZE..SIZE + (64 << 10)).contains(&bytes), "{bytes}");
}

#[tokio::test]
async fn scattered_reads_are_not_read_ahead_of() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let file = open_file(&world).await;
    for n in 0..100 {
        read_page(&world, &file, n * 389 % (SIZE / PAGE)).await;
    }
    assert_eq!(world.upper.stats().read_aheads, 0);
}

/// Reads up to where a scan is believed, while the store does not answer any more.
async fn begin_to_scan(world: &World, file: &UpperFile) -> tokio::sync::OwnedRwLockWriteGuard<()> {
    for page in 0..15 {
        read_page(world, file, page).await;
    }
    let fetches = world.lower.fetches();
    let away = world.lower.gate.clone().write_owned().await;
    read_page(world, file, 15).await;
    while world.lower.fetches() == fetches {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.upper.stats().read_aheads, 1);
    assert!(!world.upper.shared.flights.is_idle());
    away
}

#[tokio::test]
async fn what_follows_is_dropped_with_the_open_file() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let (file, other) = (open_file(&world).await, open_file(&world).await);
    let away = begin_to_scan(&world, &file).await;
    drop(file);
    idle(&world).await;
    drop(away);
    assert_eq!(world.upper.stats().filled_bytes, 2 * PIECE);
    for page in 16..SIZE / PAGE {
        read_page(&world, &other, page).await;
    }
}

#[tokio::test]
async fn what_follows_in_a_removed_file_is_not_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let file = open_file(&world).await;
    let away = begin_to_scan(&world, &file).await;
    world.unlink(FILE).await.unwrap();
    drop(away);
    idle(&world).await;
    assert_eq!(world.upper.stats().filled_bytes, 2 * PIECE);
    read_page(&world, &file, 20).await;
}

#[tokio::test]
async fn a_failure_ahead_of_a_reader_is_nobody_s_error() {
    let scratch = tempfile::tempdir().unwrap();
    let world = world(scratch.path()).await;
    let file = open_file(&world).await;
    let away = begin_to_scan(&world, &file).await;
    world.lower.fail_next_fetches(1);
    drop(away);
    idle(&world).await;
    for page in 16..SIZE / PAGE {
        read_page(&world, &file, page).await;
    }
}
