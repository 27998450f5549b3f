//! What must never happen to an upper, one test each.
//!
//! Where the rule comes from a failure seen elsewhere, its number stands beside it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;

use crate::disk;
use crate::mount::fs::{FileKind, RenameMode, Seek, SetAttributes, SetTime, Volume};
use crate::mount::memory_lower::MemoryLower;
use crate::mount::upper::tests::simulated_disk::SimulatedDisk;
use crate::mount::upper::tests::world::{TREE, World, binding, caller, open, same};
use crate::mount::upper::{OpenError, UpperStats};

const RELATION: &str = "base/1/16384";

fn expected(world: &World, path: &str, range: std::ops::Range<u64>) -> Vec<u8> {
    world.lower.content(world.lower.at(path), range)
}

#[tokio::test]
async fn reading_changes_nothing_anyone_can_see() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let (file, directory) = (world.attributes(RELATION).await, world.attributes("base/1").await);
    let whole = world.read_all(RELATION).await.unwrap();
    same(&whole, &expected(&world, RELATION, 0..file.size), "whole");
    let (after, directory_after) = (world.attributes(RELATION).await, world.attributes("base/1").await);
    assert_eq!(
        (file.size, file.mode, file.mtime, file.owner),
        (after.size, after.mode, after.mtime, after.owner)
    );
    assert_eq!((directory.mode, directory.mtime), (directory_after.mode, directory_after.mtime));
    assert!(after.blocks * 512 >= after.size);
}

#[tokio::test]
async fn what_was_fetched_is_not_fetched_again_not_even_by_the_next_process() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.read_all(RELATION).await.unwrap();
    let fetches = world.lower.fetches();
    world.read_all(RELATION).await.unwrap();
    assert_eq!(world.lower.fetches(), fetches);
    let lower = world.lower.clone();
    drop(world);
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    world.read_all(RELATION).await.unwrap();
    assert_eq!(world.lower.fetches(), fetches);
    assert_eq!(world.upper.stats().fetches, 0);
}

#[tokio::test]
async fn a_page_that_is_written_whole_is_never_fetched_and_a_ragged_edge_once() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.write(RELATION, 8192, &[7; 8192]).await.unwrap();
    assert_eq!(world.lower.fetches(), 0);
    world.write(RELATION, 100, &[8; 10]).await.unwrap();
    assert_eq!(world.lower.fetches(), 1);
    let mut content = expected(&world, RELATION, 0..32768);
    content[8192..16384].fill(7);
    content[100..110].fill(8);
    same(&world.read(RELATION, 0, 32768).await.unwrap(), &content, "mixed");
    // The chunk that came for the edge covered all of this; only what was not local was taken from it.
    assert_eq!(world.lower.fetches(), 1);
    assert_eq!(world.upper.stats().filled_bytes, 65536 - 8192);
}

/// Failure 36: a chunk marked present after a partial read served zeros.
#[tokio::test]
async fn a_partial_fetch_marks_nothing_it_did_not_bring() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.lower.short.store(true, Ordering::SeqCst);
    assert_eq!(world.read(RELATION, 60_000, 5000).await, Err(Errno::EIO));
    // The first half came whole and counts.
    same(&world.read(RELATION, 0, 4096).await.unwrap(), &expected(&world, RELATION, 0..4096), "first half");
    world.lower.short.store(false, Ordering::SeqCst);
    let whole = world.read_all(RELATION).await.unwrap();
    same(&whole, &expected(&world, RELATION, 0..whole.len() as u64), "whole");
}

#[tokio::test]
async fn a_failed_fetch_is_an_error_and_then_tried_again() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.lower.fail_next_fetches(2);
    assert_eq!(world.read(RELATION, 0, 10).await, Err(Errno::EIO));
    assert_eq!(world.write(RELATION, 5, b"x").await, Err(Errno::EIO));
    assert_eq!(world.read(RELATION, 0, 10).await.unwrap(), expected(&world, RELATION, 0..10));
    world.lower.damage(RELATION);
    assert_eq!(world.read(RELATION, 100_000, 10).await, Err(Errno::EIO));
    assert_eq!(world.read(RELATION, 0, 10).await.unwrap(), expected(&world, RELATION, 0..10));
}

#[tokio::test]
async fn a_chunk_is_fetched_once_for_all_who_want_it() {
    let scratch = tempfile::tempdir().unwrap();
    let world = Arc::new(World::new(scratch.path()).await);
    let file = world.open_file(RELATION).await.unwrap();
    let readers = (0..32u64).map(|page| {
        let file = file.clone();
        tokio::spawn(async move { file.read(&caller(), page % 8 * 8192, 8192).await.unwrap().len() })
    });
    for reader in readers.collect::<Vec<_>>() {
        assert_eq!(reader.await.unwrap(), 8192);
    }
    assert_eq!(world.lower.fetches(), 1);
}

#[tokio::test]
async fn a_reader_that_gives_up_leaves_the_others_unharmed() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let file = world.open_file(RELATION).await.unwrap();
    let away = world.lower.gate.clone().write_owned().await;
    let read = |offset| {
        let file = file.clone();
        tokio::spawn(async move { file.read(&caller(), offset, 100).await })
    };
    let (first, second) = (read(0), read(8192));
    while world.lower.fetches() == 0 {
        tokio::task::yield_now().await;
    }
    first.abort();
    assert!(first.await.is_err());
    drop(away);
    assert_eq!(second.await.unwrap().unwrap(), expected(&world, RELATION, 8192..8292));
}

#[tokio::test]
async fn what_was_cut_off_never_comes_back() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.truncate(RELATION, 70_001).await.unwrap();
    world.truncate(RELATION, 200_000).await.unwrap();
    let mut content = expected(&world, RELATION, 0..70_001);
    content.resize(200_000, 0);
    same(&world.read_all(RELATION).await.unwrap(), &content, RELATION);
    let lower = world.lower.clone();
    drop(world);
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    same(&world.read_all(RELATION).await.unwrap(), &content, RELATION);
}

#[tokio::test]
async fn fallocated_room_is_not_taken_for_content() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let size = world.attributes(RELATION).await.size;
    let file = world.open_file(RELATION).await.unwrap();
    file.allocate(0, size + 65536, false).await.unwrap();
    drop(file);
    let lower = world.lower.clone();
    drop(world);
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    let mut content = expected(&world, RELATION, 0..size);
    content.resize(size as usize + 65536, 0);
    same(&world.read_all(RELATION).await.unwrap(), &content, RELATION);
}

/// On ext4 room that is reserved counts as data once its page is cached.
#[tokio::test]
async fn room_is_never_reserved_where_content_has_yet_to_come() {
    let size = 3 * 65_536 + 8192 + 77;
    for (offset, length, keep_size, grown) in [
        (0, size, false, size),
        (8192, 8192, true, size),
        (0, size + 65_536, false, size + 65_536),
        (size - 50, 65_536, true, size),
        (size, 10, false, size + 10),
        (size + 9000, 100, false, size + 9100),
    ] {
        let disk = SimulatedDisk::new(u64::MAX);
        let world = World::on(&disk).await;
        world.read(RELATION, 70_000, 10).await.unwrap();
        let file = world.open_file(RELATION).await.unwrap();
        file.allocate(offset, length, keep_size).await.unwrap();
        drop(file);
        let world = world.anew_on(&disk).await;
        let mut content = expected(&world, RELATION, 0..size);
        content.resize(grown as usize, 0);
        same(&world.read_all(RELATION).await.unwrap(), &content, &format!("{offset} {length}"));
    }
}

#[tokio::test]
async fn what_has_yet_to_be_fetched_is_data_to_lseek() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let size = world.attributes(RELATION).await.size;
    let file = world.open_file(RELATION).await.unwrap();
    assert_eq!(file.seek(5, Seek::Data).await, Ok(5));
    assert_eq!(file.seek(5, Seek::Hole).await, Ok(size));
    assert_eq!(file.seek(size, Seek::Data).await, Err(Errno::ENXIO));
    let native = world.create("new").await.unwrap();
    native.write(&caller(), 1 << 20, vec![1; 4096].into()).await.unwrap();
    assert_eq!(native.seek(0, Seek::Data).await, Ok(1 << 20));
    assert_eq!(native.seek(0, Seek::Hole).await, Ok(0));
}

/// Failure 27a: a half-filled data directory was started.
#[tokio::test]
async fn the_bare_upper_has_nothing_to_start_from() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    assert_eq!(world.read_all("PG_VERSION").await.unwrap(), expected(&world, "PG_VERSION", 0..3));
    world.write("global/pg_control", 0, &[9; 8192]).await.unwrap();
    world.write("PG_VERSION", 0, b"99\n").await.unwrap();
    assert_eq!(world.names("").await, ["PG_VERSION", "base", "empty", "global", "link", "pg_stat", "top"]);
    assert_eq!(world.names("global").await, ["pg_control"]);
    for path in ["PG_VERSION", "global/pg_control"] {
        assert!(!scratch.path().join(path).exists(), "{path}");
    }
    same(&fs::read(scratch.path().join(".walden/held/pg_control")).unwrap(), &[9; 8192], "held back");
    // Replaced by rename, as PostgreSQL does with others of its files, they are still held back.
    world.create("new").await.unwrap().write(&caller(), 0, "15\n".into()).await.unwrap();
    world.rename("new", "PG_VERSION", RenameMode::Replace).await.unwrap();
    assert!(!scratch.path().join("PG_VERSION").exists());
    assert_eq!(world.read_all("PG_VERSION").await.unwrap(), b"15\n");
}

#[tokio::test]
async fn walden_s_own_folder_cannot_be_seen_or_touched() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    assert_eq!(world.find(".walden").await.unwrap_err(), Errno::ENOENT);
    assert_eq!(world.make_directory(".walden").await, Err(Errno::EPERM));
    assert_eq!(world.create(".walden").await.map(drop), Err(Errno::EPERM));
    assert_eq!(world.rename("top", ".walden", RenameMode::Replace).await, Err(Errno::EPERM));
    assert_eq!(world.remove_directory(".walden").await, Err(Errno::ENOENT));
    world.make_directory("base/.walden").await.unwrap();
}

#[tokio::test]
async fn on_a_full_disk_reads_go_on_and_writes_say_so() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::on(&disk).await;
    world.read(RELATION, 70_000, 10).await.unwrap();
    disk.set_full(true);
    // Of one file the upper has a part, of the other nothing.
    for path in [RELATION, "base/2/16384"] {
        let size = world.attributes(path).await.size;
        let whole = world.read_all(path).await.unwrap();
        same(&whole, &expected(&world, path, 0..size), path);
    }
    same(
        &world.read(RELATION, 65_500, 9_000).await.unwrap(),
        &expected(&world, RELATION, 65_500..74_500),
        "both",
    );
    assert!(world.upper.stats().read_through > 0);
    assert_eq!(world.write(RELATION, 8192, &[1; 8192]).await, Err(Errno::ENOSPC));
    assert_eq!(world.write(RELATION, 5, &[1; 5]).await, Err(Errno::ENOSPC));
    assert_eq!(world.create("new").await.map(drop), Err(Errno::ENOSPC));
    // What is local already can be written over.
    world.write(RELATION, 65_536, &[2; 4096]).await.unwrap();
    disk.set_full(false);
    let mut content = expected(&world, RELATION, 0..200_000);
    content[65_536..69_632].fill(2);
    same(&world.read(RELATION, 0, 200_000).await.unwrap(), &content, "with room again");
    world.write(RELATION, 8192, &[3; 100]).await.unwrap();
    content[8192..8292].fill(3);
    let world = world.anew_on(&disk).await;
    same(&world.read(RELATION, 0, 200_000).await.unwrap(), &content, "opened anew");
}

/// What is left of the disk is for what the server writes: a read takes none of it, and loses nothing by that.
#[tokio::test]
async fn on_a_disk_that_is_almost_full_reads_are_answered_and_not_kept() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::on(&disk).await;
    world.read(RELATION, 70_000, 10).await.unwrap();
    disk.tell_free(12);
    let before = world.upper.stats();
    for path in [RELATION, "base/2/16384"] {
        let size = world.attributes(path).await.size;
        // In the steps of a scan, which would be fetched ahead otherwise.
        let mut whole = Vec::new();
        while (whole.len() as u64) < size {
            whole.extend(world.read(path, whole.len() as u64, 8192).await.unwrap());
        }
        same(&whole, &expected(&world, path, 0..size), path);
    }
    let after = world.upper.stats();
    assert_eq!((after.filled_bytes, after.read_aheads), (before.filled_bytes, before.read_aheads));
    assert!(after.read_through > before.read_through);
    // What was local is, and what is not kept comes again.
    let bytes = world.lower.fetched_bytes();
    world.read(RELATION, 70_000, 10).await.unwrap();
    assert_eq!(world.lower.fetched_bytes(), bytes);
    world.read(RELATION, 0, 10).await.unwrap();
    assert!(world.lower.fetched_bytes() > bytes);
    // Writes have the room: whole pages, edges that have to be fetched, and what must never fail to be read.
    world.write(RELATION, 8192, &[1; 8192]).await.unwrap();
    world.write("base/2/16384", 5, &[2; 5]).await.unwrap();
    world.upper.make_local("global").await.unwrap();
    let (bytes, kept) = (world.lower.fetched_bytes(), world.upper.stats().filled_bytes);
    world.read("global/pg_control", 0, 8192).await.unwrap();
    assert_eq!(world.lower.fetched_bytes(), bytes);
    disk.tell_free(13);
    world.read(RELATION, 0, 10).await.unwrap();
    assert!(world.upper.stats().filled_bytes > kept);
    let mut content = expected(&world, RELATION, 0..200_000);
    content[8192..16_384].fill(1);
    let world = world.anew_on(&disk).await;
    same(&world.read(RELATION, 0, 200_000).await.unwrap(), &content, "opened anew");
}

/// The dispatcher itself needs the locks that such a sync would hold.
#[tokio::test]
async fn nobody_waits_for_a_sync_that_somebody_else_asked_for() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::on(&disk).await;
    world.unlink("base/1/16385").await.unwrap();
    let (file, other) = (world.open_file(RELATION).await.unwrap(), world.open_file(RELATION).await.unwrap());
    file.write(&caller(), 0, vec![1; 8192].into()).await.unwrap();
    let directory = world.find("base/1").await.unwrap().id;
    let cut = world.find(RELATION).await.unwrap().id;
    world.read("base/2/16384", 0, 10).await.unwrap();
    let above = world.find("base/2").await.unwrap().id;
    for turn in 0..5 {
        let (upper, file) = (world.upper.clone(), file.clone());
        disk.hold_syncs(true);
        let syncing = tokio::spawn(async move {
            match turn {
                0 => file.sync_name().await,
                1 => file.sync(true).await,
                2 => upper.sync_directory(directory).await,
                3 => upper.unlink(&caller(), above, b"16384").await,
                _ => {
                    let set = SetAttributes { size: Some(70_000), ..SetAttributes::default() };
                    upper.set_attributes(&caller(), cut, set).await.map(drop)
                }
            }
        });
        let begun = async {
            while !disk.is_syncing() && !syncing.is_finished() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), begun).await.unwrap();
        world.create(&format!("new{turn}")).await.unwrap();
        assert_eq!(world.attributes("top").await.size, 100);
        same(&other.read(&caller(), 0, 8192).await.unwrap(), &[1; 8192], "written");
        other.write(&caller(), 8192 * (turn + 1), vec![2; 8192].into()).await.unwrap();
        assert!(disk.is_syncing(), "{turn}: it was waited for");
        disk.hold_syncs(false);
        syncing.await.unwrap().unwrap();
    }
    assert_eq!(world.attributes(RELATION).await.size, 70_000);
}

#[tokio::test]
async fn another_basebackup_and_another_process_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let second = open(&world.lower, scratch.path()).await.unwrap_err();
    assert!(matches!(second, OpenError::Disk(disk::Error::Locked { .. })));
    drop(world);
    let lower = Arc::new(MemoryLower::build(&TREE));
    let options = crate::mount::upper::UpperOptions {
        directory: scratch.path().to_owned(),
        binding: disk::Binding { manifest_digest: "cd".into(), ..binding() },
        owner: disk::Owner::current(),
        holds_back: true,
    };
    let other = crate::mount::upper::Upper::open(lower, options).await.unwrap_err();
    assert!(matches!(other, OpenError::Disk(disk::Error::BoundElsewhere { .. })), "{other}");
}

#[tokio::test]
async fn an_unlinked_file_lives_while_it_is_open() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let (untouched, touched) =
        (world.open_file("base/1/16385").await.unwrap(), world.open_file(RELATION).await.unwrap());
    touched.write(&caller(), 0, vec![1; 8192].into()).await.unwrap();
    for path in ["base/1/16385", RELATION] {
        world.unlink(path).await.unwrap();
        assert_eq!(world.find(path).await.unwrap_err(), Errno::ENOENT);
    }
    assert_eq!(world.names("base/1").await, [""; 0]);
    // The first of them never had a place in the upper.
    same(
        &untouched.read(&caller(), 0, 8192).await.unwrap(),
        &expected(&world, "base/1/16385", 0..8192),
        "untouched",
    );
    untouched.write(&caller(), 10, vec![2; 5].into()).await.unwrap();
    assert_eq!(untouched.read(&caller(), 9, 3).await.unwrap()[1..], [2, 2]);
    assert_eq!(touched.read(&caller(), 8190, 4).await.unwrap()[..2], [1, 1]);
    assert_eq!(touched.read(&caller(), 8192, 9).await.unwrap(), expected(&world, RELATION, 8192..8201));
    drop((untouched, touched));
    assert_eq!(fs::read_dir(scratch.path().join(".walden/tmp")).unwrap().count(), 0);
}

#[tokio::test]
async fn attributes_of_the_lower_s_own_can_be_changed() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let at = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::new(1_800_000_000, 5);
    for path in [RELATION, "base", "link"] {
        let found = world.find(path).await.unwrap();
        let mode = (path != "link").then_some(0o640);
        let set = SetAttributes { mode, mtime: Some(SetTime::At(at)), ..SetAttributes::default() };
        world.upper.set_attributes(&caller(), found.id, set).await.unwrap();
    }
    let lower = world.lower.clone();
    drop(world);
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    for path in [RELATION, "base"] {
        assert_eq!(world.attributes(path).await.mode, 0o640, "{path}");
        assert_eq!(world.attributes(path).await.mtime, at, "{path}");
    }
    assert_eq!(
        (world.attributes("link").await.kind, world.attributes("link").await.mtime),
        (FileKind::Symlink, at)
    );
    assert_eq!(world.lower.fetches(), 0);
}

#[tokio::test]
async fn a_directory_of_the_lower_moves_with_all_that_is_in_it() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.unlink("base/1/16385").await.unwrap();
    world.rename("base/1", "base/3", RenameMode::Replace).await.unwrap();
    assert_eq!(world.names("base").await, ["2", "3"]);
    let lower = world.lower.clone();
    drop(world);
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    assert_eq!(world.names("base/3").await, ["16384"]);
    assert_eq!(
        world.read("base/3/16384", 66_000, 9).await.unwrap(),
        expected(&world, RELATION, 66_000..66_009)
    );
    world.make_directory("base/1").await.unwrap();
    assert_eq!(world.names("base/1").await, [""; 0]);
}

/// POSIX: two names of one file stay, which one is renamed to the other.
#[tokio::test]
async fn a_rename_between_two_names_of_one_node_changes_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    for (name, second) in [("link", "base/link"), ("top", "base/top")] {
        world.link(name, second).await.unwrap();
        world.rename(name, second, RenameMode::Replace).await.unwrap();
    }
    let lower = world.lower.clone();
    drop(world);
    // Nor does it where the two are only known to be one by what is on the disk.
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    for (name, second) in [("link", "base/link"), ("top", "base/top")] {
        world.rename(second, name, RenameMode::Replace).await.unwrap();
        let there = [name, second].map(|path| scratch.path().join(path));
        assert!(there.iter().all(|place| place.symlink_metadata().is_ok()), "{name}");
        let kinds = (world.attributes(name).await.kind, world.attributes(second).await.kind);
        assert_eq!(kinds.0, kinds.1, "{name}");
    }
}

#[tokio::test]
async fn nothing_is_remembered_about_what_the_kernel_forgot() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let root = world.upper.root();
    let base = world.upper.lookup(&caller(), root, b"base").await.unwrap();
    let one = world.upper.lookup(&caller(), base.id, b"1").await.unwrap();
    let file = world.upper.lookup(&caller(), one.id, b"16384").await.unwrap();
    let open = world.upper.open(&caller(), file.id, true).await.unwrap();
    // Out of order, as the kernel may: the directories stay for the sake of the file.
    world.upper.forget(base.id, 1);
    world.upper.forget(one.id, 1);
    world.upper.forget(file.id, 1);
    assert_eq!(open.file.read(&caller(), 0, 5).await.unwrap(), expected(&world, RELATION, 0..5));
    drop(open);
    assert_eq!(world.upper.shared.lock().table.len(), 1);
    assert_eq!(world.upper.stats(), UpperStats { fetches: 1, ..world.upper.stats() });
}
