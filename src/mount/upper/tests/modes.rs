//! Which files the kernel may read and write without the upper, and that the upper stays right when it does.
//!
//! What the kernel writes past the upper is written here into the local file. The rest of the rules, which open gets
//! which answer, is the adapter's.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

use crate::mount::caller::Caller;
use crate::mount::fs::{IoMode, NewNode, OpenFile, Opened, RenameMode, Seek, Volume};
use crate::mount::upper::local_disk::{LocalDisk, Times};
use crate::mount::upper::tests::simulated_disk::SimulatedDisk;
use crate::mount::upper::tests::world::{World, caller, open, same};

/// Several chunks and an edge.
const LARGE: &str = "base/1/16384";
/// One page of two units.
const SMALL: &str = "base/1/16385";

async fn opened(world: &World, path: &str, writable: bool) -> Opened {
    let found = world.find(path).await.unwrap();
    world.upper.open(&caller(), found.id, writable).await.unwrap()
}

async fn modes(world: &World, path: &str) -> [IoMode; 2] {
    [opened(world, path, false).await.mode, opened(world, path, true).await.mode]
}

async fn anew(world: World, scratch: &tempfile::TempDir) -> World {
    let lower = world.lower.clone();
    drop(world);
    World { upper: open(&lower, scratch.path()).await.unwrap(), lower }
}

#[tokio::test]
async fn a_file_is_passed_through_from_the_first_open_after_all_of_it_was_read() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let size = world.attributes(LARGE).await.size;
    let early = opened(&world, LARGE, true).await;
    assert_eq!(early.mode, IoMode::Direct);
    early.file.read(&caller(), 0, 65_536).await.unwrap();
    assert_eq!(modes(&world, LARGE).await, [IoMode::Direct; 2]);
    early.file.read(&caller(), 65_536, (size - 65_536) as u32).await.unwrap();
    assert_eq!(modes(&world, LARGE).await, [IoMode::Passthrough; 2]);
    drop(early);
    assert_eq!(modes(&world, LARGE).await, [IoMode::Passthrough; 2]);
}

#[tokio::test]
async fn what_an_earlier_process_fetched_counts() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.read_all(SMALL).await.unwrap();
    world.read(LARGE, 0, 10).await.unwrap();
    let fetches = world.lower.fetches();
    let world = anew(world, &scratch).await;
    assert_eq!(modes(&world, SMALL).await, [IoMode::Passthrough; 2]);
    assert_eq!(modes(&world, LARGE).await, [IoMode::Direct; 2]);
    assert_eq!(world.lower.fetches(), fetches);
}

#[tokio::test]
async fn what_was_written_whole_or_cut_to_what_is_local_is_passed_through_unfetched() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.write(SMALL, 0, &[1; 4096]).await.unwrap();
    assert_eq!(modes(&world, SMALL).await, [IoMode::Direct; 2]);
    world.write(SMALL, 4096, &[2; 4096]).await.unwrap();
    assert_eq!(modes(&world, SMALL).await, [IoMode::Passthrough; 2]);
    world.write(LARGE, 0, &[3; 8192]).await.unwrap();
    world.truncate(LARGE, 8192).await.unwrap();
    assert_eq!(modes(&world, LARGE).await, [IoMode::Passthrough; 2]);
    world.truncate("base/2/16384", 0).await.unwrap();
    assert_eq!(modes(&world, "base/2/16384").await, [IoMode::Passthrough; 2]);
    // Made longer again it has zeros there, which are nobody's to fetch.
    world.truncate(LARGE, 100_000).await.unwrap();
    assert_eq!(modes(&world, LARGE).await, [IoMode::Passthrough; 2]);
    let world = anew(world, &scratch).await;
    assert_eq!(modes(&world, LARGE).await, [IoMode::Passthrough; 2]);
    assert_eq!(world.lower.fetches(), 0);
}

#[tokio::test]
async fn what_is_made_here_is_passed_through_at_once() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let root = world.upper.root();
    let (_, created) = world.upper.create(&caller(), root, b"created", 0o600, true).await.unwrap();
    assert_eq!(created.mode, IoMode::Passthrough);
    world.upper.make_node(&caller(), root, b"made", NewNode::File, 0o600).await.unwrap();
    assert_eq!(modes(&world, "made").await, [IoMode::Passthrough; 2]);
    // What is there already is created by opening it, and is what it was.
    let (_, again) = world.upper.create(&caller(), root, b"top", 0o600, false).await.unwrap();
    assert_eq!(again.mode, IoMode::Direct);
    drop((created, again));
    let world = anew(world, &scratch).await;
    for path in ["created", "made"] {
        assert_eq!(modes(&world, path).await, [IoMode::Passthrough; 2], "{path}");
    }
}

#[tokio::test]
async fn an_empty_file_of_the_lower_gets_its_place_when_it_is_opened_for_writing() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    assert_eq!(opened(&world, "empty", false).await.mode, IoMode::Direct);
    assert!(!scratch.path().join("empty").exists());
    assert_eq!(modes(&world, "empty").await, [IoMode::Direct, IoMode::Passthrough]);
    assert_eq!(modes(&world, "empty").await, [IoMode::Passthrough; 2]);
    assert!(scratch.path().join("empty").exists());

    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::on(&disk).await;
    disk.set_full(true);
    assert_eq!(modes(&world, "empty").await, [IoMode::Direct; 2]);
    disk.set_full(false);
    assert_eq!(modes(&world, "empty").await, [IoMode::Direct, IoMode::Passthrough]);
}

/// Also one that was removed: who has it open goes on, and no other file gets its number.
#[tokio::test]
async fn an_open_file_stays_whole_whatever_becomes_of_its_name_and_length() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.read_all(SMALL).await.unwrap();
    let id = world.find(SMALL).await.unwrap().id;
    let held = opened(&world, SMALL, true).await;
    world.truncate(SMALL, 5000).await.unwrap();
    world.truncate(SMALL, 50_000).await.unwrap();
    world.rename(SMALL, "base/1/moved", RenameMode::Replace).await.unwrap();
    assert_eq!(modes(&world, "base/1/moved").await, [IoMode::Passthrough; 2]);
    world.unlink("base/1/moved").await.unwrap();
    assert_eq!(world.upper.open(&caller(), id, true).await.unwrap().mode, IoMode::Passthrough);
    let local = world.local_file(id).unwrap();
    local.write_at(b"past the upper", 4990).unwrap();
    assert_eq!(&held.file.read(&caller(), 4990, 14).await.unwrap()[..], b"past the upper");
    world.create(SMALL).await.unwrap();
    assert_ne!(world.find(SMALL).await.unwrap().id, id);
}

#[tokio::test]
async fn nothing_remembers_what_was_before_a_write_past_the_upper() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let early = opened(&world, SMALL, true).await;
    early.file.read(&caller(), 0, 8192).await.unwrap();
    let before = world.attributes(SMALL).await;
    assert_eq!(opened(&world, SMALL, true).await.mode, IoMode::Passthrough);
    let id = world.find(SMALL).await.unwrap().id;
    let local = world.local_file(id).unwrap();
    local.write_at(&[9; 100], 50_000).unwrap();
    local.write_at(&[8; 10], 5).unwrap();
    let later = SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000);
    local.set_times(Times::modified(later)).unwrap();
    let after = world.attributes(SMALL).await;
    assert_eq!((before.size, after.size, after.mtime), (8192, 50_100, later));
    // The open that was direct sees all of it, and what it does now is right.
    assert_eq!(early.file.read(&caller(), 50_000, 1000).await.unwrap(), vec![9u8; 100]);
    assert_eq!(early.file.read(&caller(), 5, 10).await.unwrap(), vec![8u8; 10]);
    assert_eq!(early.file.seek(8192, Seek::Data).await, Ok(49_152));
    assert_eq!(early.file.seek(50_100, Seek::Data).await, Err(Errno::ENXIO));
    early.file.allocate(50_000, 100_000, false).await.unwrap();
    assert_eq!(world.attributes(SMALL).await.size, 150_000);
    early.file.write(&caller(), 150_000, vec![7; 3].into()).await.unwrap();
    early.file.sync(true).await.unwrap();
    drop((early, local));
    let world = anew(world, &scratch).await;
    let mut content = world.lower.content(world.lower.at(SMALL), 0..8192);
    content.resize(150_003, 0);
    content[5..15].fill(8);
    content[50_000..50_100].fill(9);
    content[150_000..].fill(7);
    same(&world.read_all(SMALL).await.unwrap(), &content, "after a new start");
}

/// Cutting it has to come down to the upper: what was cut off must not come back from the lower.
#[tokio::test]
async fn what_is_cut_off_a_file_that_is_passed_through_never_comes_back() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.read_all(SMALL).await.unwrap();
    let held = opened(&world, SMALL, true).await;
    assert_eq!(held.mode, IoMode::Passthrough);
    world.truncate(SMALL, 100).await.unwrap();
    let id = world.find(SMALL).await.unwrap().id;
    world.local_file(id).unwrap().write_at(b"end", 8189).unwrap();
    drop(held);
    let world = anew(world, &scratch).await;
    let mut content = world.lower.content(world.lower.at(SMALL), 0..100);
    content.resize(8189, 0);
    content.extend(b"end");
    same(&world.read_all(SMALL).await.unwrap(), &content, SMALL);
}

#[tokio::test]
async fn the_kernel_gets_the_local_file_and_a_hint_goes_there() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let created = world.create("new").await.unwrap();
    created.write(&caller(), 0, vec![1; 4096].into()).await.unwrap();
    let backing = std::fs::File::from(created.backing().unwrap());
    let local = std::fs::metadata(scratch.path().join("new")).unwrap();
    let found = backing.metadata().unwrap();
    let identity = |stat: &std::fs::Metadata| {
        use std::os::unix::fs::MetadataExt;
        (stat.dev(), stat.ino())
    };
    assert_eq!(identity(&found), identity(&local));
    created.will_need(0, 8192);
    created.will_need(u64::MAX, 8192);
    let stats = world.upper.stats();
    assert_eq!((stats.hints, stats.reads, stats.fetches), (2, 0, 0));
    let other: Arc<dyn OpenFile> = Arc::new(Plain);
    assert_eq!(other.backing().map(drop), Err(Errno::EOPNOTSUPP));
}

/// A file of a volume that has no local files.
#[derive(Debug)]
struct Plain;

#[async_trait::async_trait]
impl OpenFile for Plain {
    async fn read(&self, _: &Caller, _: u64, _: u32) -> Result<bytes::Bytes, Errno> {
        Ok(bytes::Bytes::new())
    }

    async fn seek(&self, _: u64, _: Seek) -> Result<u64, Errno> {
        Err(Errno::ENXIO)
    }
}

/// The kernel syncs some writes by itself, and then nobody but the adapter asks for the file's name to be kept.
#[tokio::test]
async fn a_name_that_was_synced_is_there_after_a_power_cut() {
    for is_synced in [true, false] {
        let disk = SimulatedDisk::new(u64::MAX);
        let start = disk.copy();
        let world = World::on(&disk).await;
        let file = opened(&world, SMALL, true).await.file;
        file.write(&caller(), 0, vec![6; 8192].into()).await.unwrap();
        if is_synced {
            file.sync_name().await.unwrap();
        }
        // Of names only those that were synced.
        let after = disk.after_power_cut(&start, || 0);
        assert_eq!(after.stat(Path::new(SMALL)).unwrap().is_some(), is_synced);
    }
}

/// PostgreSQL writes its control file over and over.
#[tokio::test]
async fn the_files_held_back_are_passed_through_too() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.read_all("global/pg_control").await.unwrap();
    assert_eq!(modes(&world, "global/pg_control").await, [IoMode::Passthrough; 2]);
    world.write("global/pg_control", 0, &[4; 512]).await.unwrap();
    let held = std::fs::read(scratch.path().join(".walden/held/pg_control")).unwrap();
    same(&held[..512], &[4; 512], "held back");
}
