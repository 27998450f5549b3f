//! Damaged WAL, as `cp` from the mount and `wal fetch` meet it: never the end of the archive (failure 1).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::damage::{At, Damage, write};
use crate::mounted::Mount;
use crate::source::Source;
use crate::support::{Need, Run, Site, require};

/// A segment that is damaged or missing in the middle has length 0 in the mount: PostgreSQL refuses that, and never
/// takes it for the end of the archive (failure 1).
#[test]
fn damaged_wal_is_empty_in_the_mount_and_stops_wal_fetch() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = Source::create(|site: Site| site);
    let data = copy_of_data(&source);
    let segment = source.wal_object(&source.segment);
    let size = 1 << 20;
    let mut damages = Damage::ALONE.to_vec();
    let later = source.later_segment.clone();
    damages.push(Damage::ReplaceBy(source.wal_object(&later)));
    damages.push(Damage::SwapWith(source.wal_object(&later)));
    for damage in damages {
        source.restore();
        damage.inflict(&segment);
        let mount = Mount::create(&source);
        let copied = source.cluster.scratch().path().join("copied");
        Run::of(Command::new("cp").arg(mount.path(&format!("wal/{}", source.segment))).arg(&copied), "")
            .expect_success();
        assert_eq!(fs::metadata(&copied).unwrap().size(), 0, "{damage:?}");
        assert!(mount.log().contains(&source.segment), "{damage:?}: {}", mount.log());
        assert!(!mount.path(&format!("wal/{}.absent", source.segment)).exists(), "{damage:?}");
        let swapped = matches!(damage, Damage::SwapWith(_));
        let expected = if swapped { 0 } else { size };
        assert_eq!(fs::read(mount.path(&format!("wal/{later}"))).unwrap().len(), expected, "{damage:?}");
        mount.end();
        let fetched = fetch(&source, &data, &source.segment).expect_code(200);
        assert!(fetched.stderr.contains(&source.segment), "{damage:?}: {}", fetched.stderr);
        assert!(!data.join("fetched").exists(), "{damage:?}");
    }
    source.restore();
    Damage::Flip(At::Middle).inflict(&source.wal_object("00000002.history"));
    let fetched = fetch(&source, &data, "00000002.history").expect_code(200);
    assert!(fetched.stderr.contains("00000002.history"), "{}", fetched.stderr);
    assert_history_is_waited_for(&source);
    source.restore();
    fetch(&source, &data, &source.segment).expect_code(0);
    assert_eq!(fs::metadata(data.join("fetched")).unwrap().size(), size as u64);
}

/// A superseding object that is damaged says that what it replaced is not to be read, and not what is.
#[test]
fn a_damaged_superseding_segment_is_not_passed_over_for_what_it_replaced() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = Source::create(|site: Site| site);
    let data = copy_of_data(&source);
    let own = source.cluster.data_directory().join("pg_wal").join(&source.segment);
    let force = || source.walden.try_run(&["wal", "push", own.to_str().unwrap(), "--force"]);
    Damage::Flip(At::Middle).inflict(&source.wal_object(&source.segment));
    force().expect_code(0);
    fetch_alone(&source, &data).expect_code(0);
    let standing = source.wal_object(&source.segment);
    let forced = forced_objects(&standing).remove(0);
    let pristine = fs::read(&forced).unwrap();
    let others =
        [Damage::ReplaceBy(source.wal_object(&source.later_segment)), Damage::ReplaceBy(standing.clone())];
    for damage in Damage::ALONE.into_iter().chain(others) {
        damage.inflict(&forced);
        let fetched = fetch_alone(&source, &data);
        assert_eq!(fetched.code(), Some(200), "{damage:?}: {}", fetched.stderr);
        assert!(fetched.stderr.contains(&source.segment), "{damage:?}: {}", fetched.stderr);
        assert!(!data.join("fetched").exists(), "{damage:?}");
        let mount = Mount::create(&source);
        assert_eq!(fs::read(mount.path(&format!("wal/{}", source.segment))).unwrap(), b"", "{damage:?}");
        mount.end();
        // It can be superseded like anything else.
        force().expect_code(0);
        fetch_alone(&source, &data).expect_code(0);
        assert_eq!(fs::read(data.join("fetched")).unwrap(), fs::read(&own).unwrap(), "{damage:?}");
        let again = forced_objects(&standing).into_iter().filter(|object| *object != forced);
        again.for_each(|object| fs::remove_file(object).unwrap());
        write(&forced, &pristine);
    }
}

/// Fetches the segment for a data directory that nobody has asked for: no prefetcher holds what it read before.
fn fetch_alone(source: &Source, data: &Path) -> Run {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    // Never the same path: the inode may be the same again.
    let name = format!("alone-{}", ASKED.fetch_add(1, Ordering::Relaxed));
    let fetched = data.join("fetched");
    fs::remove_file(&fetched).ok();
    let alone = source.cluster.scratch().folder(&name);
    let mut copy = Command::new("cp");
    copy.current_dir(data).args(["-a", "global", "recovery.signal", "walden.plan.json"]).arg(&alone);
    Run::of(&mut copy, "").expect_success();
    let run = fetch(source, &alone, &source.segment);
    if alone.join("fetched").exists() {
        fs::rename(alone.join("fetched"), &fetched).unwrap();
    }
    fs::remove_dir_all(&alone).unwrap();
    run
}

fn forced_objects(standing: &Path) -> Vec<PathBuf> {
    let objects = crate::source::files_below(&standing.with_file_name(""));
    objects.into_iter().filter(|object| object.to_string_lossy().contains(".forced.")).collect()
}

/// An empty history would be taken for a timeline without ancestors, an error for a timeline that is not there.
fn assert_history_is_waited_for(source: &Source) {
    let mount = Mount::create(source);
    let mut reader = Command::new("cat").arg(mount.path("wal/00000002.history")).spawn().unwrap();
    let deadline = Instant::now() + crate::support::PATIENCE;
    while !mount.log().contains("waiting for 00000002.history") {
        assert!(Instant::now() < deadline, "{}", mount.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(reader.try_wait().unwrap().is_none(), "it was answered");
    reader.kill().unwrap();
    reader.wait().unwrap();
    mount.end();
}

/// A data directory that is about to recover, as somebody would make one from the mount by hand.
fn copy_of_data(source: &Source) -> PathBuf {
    let mount = Mount::create(source);
    let data = source.cluster.scratch().folder("recovering");
    let from = mount.path("basebackups/latest/data/.");
    Run::of(Command::new("cp").arg("-a").arg(from).arg(&data), "").expect_success();
    mount.end();
    fs::write(data.join("recovery.signal"), "").unwrap();
    // The plan is made while everything can be read.
    fetch(source, &data, &source.segment).expect_code(0);
    fs::remove_file(data.join("fetched")).unwrap();
    data
}

fn fetch(source: &Source, data: &Path, name: &str) -> Run {
    Run::of(source.walden.command().current_dir(data).args(["wal", "fetch", name, "fetched"]), "")
}

/// The server removes its segment once it is told that the archive has it.
#[test]
fn a_push_takes_no_damaged_object_for_its_own_and_no_site_without_its_record_for_a_new_one() {
    require!(Need::PostgreSQL(15));
    let source = Source::create(|site: Site| site);
    let segment = source.cluster.data_directory().join("pg_wal").join(&source.later_segment);
    let push = || source.walden.try_run(&["wal", "push", segment.to_str().unwrap()]);
    push().expect_code(0);
    for damage in [Damage::Flip(At::Last), Damage::Truncate, Damage::Empty] {
        source.restore();
        damage.inflict(&source.wal_object(&source.later_segment));
        let refused = push().expect_code(3);
        assert!(refused.stderr.contains(&source.later_segment), "{damage:?}: {}", refused.stderr);
        assert!(refused.stderr.contains("--force"), "{damage:?}: {}", refused.stderr);
    }
    source.restore();
    let record = source.site().join("site.json");
    Damage::Remove.inflict(&record);
    let refused = push().expect_code(3);
    assert!(refused.stderr.contains("site.json is damaged: it is missing"), "{}", refused.stderr);
    assert!(!record.exists());
}
