//! The hydrator: in the end everything is local and the upper an ordinary directory, whatever happened on the way.
//!
//! The property test lets clients and a hydrator work side by side, ends both at random points and begins anew. The
//! others are one rule each: who comes first, a store that is away, a full disk, damage, and what need not come.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use proptest::prelude::*;
use tokio::task::JoinHandle;

use crate::mount::fs::RenameMode;
use crate::mount::lower::{LowerError, NodeId};
use crate::mount::memory_lower::MemoryLower;
use crate::mount::upper::hydrate::share::BESIDE_READS;
use crate::mount::upper::hydrate::{HydrationReport, HydrationState, Hydrator, Place, StoredOrder};
use crate::mount::upper::tests::model::{Model, Shape};
use crate::mount::upper::tests::sequences::{Operation, Run, operation};
use crate::mount::upper::tests::simulated_disk::SimulatedDisk;
use crate::mount::upper::tests::world::{TREE, World, caller, open, same};
use crate::mount::upper::{OpenError, Upper};

const RELATION: &str = "base/1/16384";

/// Longer than any of this takes: only a defect reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A hydrator at work.
struct Hydrating {
    hydrator: Arc<Hydrator>,
    task: JoinHandle<()>,
}

impl Hydrating {
    fn start(upper: &Upper) -> Self {
        let hydrator = Hydrator::hasty(upper);
        Self { task: tokio::spawn(hydrator.clone().run()), hydrator }
    }

    /// Waits for its end.
    async fn end(self) -> HydrationReport {
        tokio::time::timeout(PATIENCE, self.task).await.expect("it comes to an end").unwrap();
        let report = self.hydrator.report();
        until(|| Arc::strong_count(&self.hydrator) == 1).await;
        report
    }

    /// Ends it wherever it is, and waits until nothing of it holds the upper.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        until(|| Arc::strong_count(&self.hydrator) == 1).await;
    }

    /// Waits until it says that it waits for something.
    async fn waits_for(&self, what: &str) {
        until(|| {
            let report = self.hydrator.report();
            report.state == HydrationState::Waiting && report.reason.is_some_and(|why| why.contains(what))
        })
        .await;
    }
}

async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it comes true");
}

/// What is in a directory without any mount, but for the private area.
fn bare(directory: &Path) -> BTreeMap<String, Shape> {
    let mut shape = BTreeMap::new();
    let mut rest = vec![String::new()];
    while let Some(above) = rest.pop() {
        for entry in fs::read_dir(directory.join(&above)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let path = if above.is_empty() { name } else { format!("{above}/{name}") };
            if path == ".walden" {
                continue;
            }
            let place = directory.join(&path);
            let metadata = fs::symlink_metadata(&place).unwrap();
            let found = if metadata.is_dir() {
                rest.push(path.clone());
                Shape::Directory
            } else if metadata.is_symlink() {
                Shape::Symlink(fs::read_link(&place).unwrap().into_os_string().into_encoded_bytes())
            } else {
                Shape::File(fs::read(&place).unwrap())
            };
            shape.insert(path, found);
        }
    }
    shape
}

/// What the model has outside the places that are held back.
fn bare_shape(model: &Model) -> BTreeMap<String, Shape> {
    let mut shape = model.shape();
    shape.retain(|path, _| !["PG_VERSION", "global/pg_control"].iter().any(|held| path.starts_with(held)));
    shape
}

#[tokio::test]
async fn everything_comes_and_what_is_left_is_an_ordinary_directory() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let model = Model::new(&world.lower);
    assert!(!world.upper.is_hydrated());
    let report = Hydrating::start(&world.upper).end().await;
    assert_eq!((report.state, report.reason), (HydrationState::Done, None));
    assert_eq!((report.missing_bytes, report.failed_files), (Some(0), 0));
    assert!(world.upper.is_hydrated());
    let _closed = world.lower.gate.clone().write_owned().await;
    assert!(bare(scratch.path()) == bare_shape(&model), "the bare directory differs");
    for (place, held) in [("PG_VERSION", "PG_VERSION"), ("global/pg_control", "pg_control")] {
        let bytes = fs::read(scratch.path().join(".walden/held").join(held)).unwrap();
        same(&bytes, &world.lower.content(world.lower.at(place), 0..10_000), place);
        assert!(!scratch.path().join(place).exists(), "{place}");
    }
    // All as it was in the lower, and nothing shows that it was only just written.
    let metadata = |path: &str| fs::symlink_metadata(scratch.path().join(path)).unwrap();
    let directories = ["base", "base/1", "base/2", "pg_stat"];
    for path in [RELATION, "base/1/16385", "top", "empty", "link"].into_iter().chain(directories) {
        let found = metadata(path);
        assert_eq!((found.mtime(), found.mtime_nsec()), (1_700_000_000, 123_456_789), "{path}");
        let mode = if directories.contains(&path) { 0o700 } else { 0o600 };
        assert!(found.is_symlink() || found.permissions().mode() & 0o7777 == mode, "{path}");
    }
}

#[tokio::test]
async fn a_whole_upper_is_known_to_be_so_by_the_next_process() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    Hydrating::start(&world.upper).end().await;
    let (lower, fetches) = (world.lower.clone(), world.lower.fetches());
    drop(world);
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    assert!(world.upper.is_hydrated());
    let hydrating = Hydrating::start(&world.upper);
    assert_eq!(hydrating.hydrator.report().state, HydrationState::Done);
    assert_eq!(hydrating.end().await.missing_bytes, Some(0));
    assert_eq!(world.lower.fetches(), fetches);
}

#[tokio::test]
async fn what_is_gone_is_not_brought_back_and_what_is_cut_comes_as_far_as_it_is_needed() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.unlink(RELATION).await.unwrap();
    world.truncate("base/2/16384", 0).await.unwrap();
    world.truncate("base/2/16384", 9000).await.unwrap();
    world.write("base/1/16385", 0, &[7; 8192]).await.unwrap();
    world.unlink("link").await.unwrap();
    let report = Hydrating::start(&world.upper).end().await;
    assert_eq!((report.state, report.missing_bytes), (HydrationState::Done, Some(0)));
    assert!(
        !scratch.path().join(RELATION).exists() && fs::symlink_metadata(scratch.path().join("link")).is_err()
    );
    same(&fs::read(scratch.path().join("base/2/16384")).unwrap(), &[0; 9000], "cut");
    same(&fs::read(scratch.path().join("base/1/16385")).unwrap(), &[7; 8192], "written over");
    // Of the files that are left only the small ones had to be fetched.
    assert_eq!(world.lower.fetched_bytes(), 3 + 8192 + 100);
}

#[tokio::test]
async fn few_requests_are_under_way_while_somebody_s_read_waits() {
    let scratch = tempfile::tempdir().unwrap();
    let world = of_relations(scratch.path()).await;
    let file = world.open_file("base/1/00").await.unwrap();
    let away = world.lower.gate.clone().write_owned().await;
    let reader = tokio::spawn(async move { file.read(&caller(), 0, 100).await });
    until(|| world.lower.fetches() == 1).await;
    let hydrating = Hydrating::start(&world.upper);
    until(|| world.lower.fetches() == 1 + BESIDE_READS as u64).await;
    // It has looked some hundred times by then.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(world.lower.fetches(), 1 + BESIDE_READS as u64);
    drop(away);
    assert_eq!(reader.await.unwrap().unwrap().len(), 100);
    assert_eq!(hydrating.end().await.state, HydrationState::Done);
}

/// Twelve files, each of which is a request of its own.
async fn of_relations(directory: &Path) -> World {
    let names: Vec<String> = (0..12).map(|n| format!("base/1/{n:02}")).collect();
    let mut tree: Vec<(&str, u64)> = names.iter().map(|name| (&**name, 5 * 65_536)).collect();
    tree.push(("PG_VERSION", 3));
    let lower = Arc::new(MemoryLower::build(&tree));
    World { upper: open(&lower, directory).await.unwrap(), lower }
}

/// Both of these somebody has begun to read, and of such files the names decide; the heat decides before them.
#[tokio::test]
async fn what_was_waited_for_most_is_brought_first() {
    let scratch = tempfile::tempdir().unwrap();
    let world = of_relations(scratch.path()).await;
    for (name, offset) in [("base/1/10", 131_072), ("base/1/10", 0), ("base/1/05", 0)] {
        world.read(name, offset, 100).await.unwrap();
    }
    let before = world.lower.asked().len();
    assert_eq!(Hydrating::start(&world.upper).end().await.state, HydrationState::Done);
    let mut order: Vec<NodeId> = world.lower.asked()[before..].iter().map(|(node, _)| *node).collect();
    let mut seen = HashSet::new();
    order.retain(|node| seen.insert(*node));
    let at = |name| world.lower.at(name);
    assert_eq!(order[..2], [at("base/1/10"), at("base/1/05")]);
}

#[tokio::test]
async fn a_store_that_was_away_is_gone_on_with_when_it_is_back() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.lower.fail_next_fetches(u32::MAX);
    let hydrating = Hydrating::start(&world.upper);
    hydrating.waits_for("the store does not answer").await;
    let asked = world.lower.fetches();
    until(|| world.lower.fetches() > asked + 20).await;
    assert!(!hydrating.task.is_finished());
    world.lower.fail_next_fetches(0);
    let report = hydrating.end().await;
    assert_eq!((report.state, report.failed_files), (HydrationState::Done, 0));
}

#[tokio::test]
async fn a_store_that_is_away_when_names_are_looked_up_is_waited_for_too() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.read(RELATION, 0, 100).await.unwrap();
    let lower = world.lower.clone();
    world.close().await;
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    world.lower.fail_next_lookups(u32::MAX);
    let hydrating = Hydrating::start(&world.upper);
    hydrating.waits_for("the store does not answer").await;
    world.lower.fail_next_lookups(20);
    assert_eq!(hydrating.end().await.state, HydrationState::Done);
}

#[tokio::test]
async fn a_disk_that_stumbles_does_not_end_it() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::of(Arc::new(MemoryLower::build(&[("f", 65_536)])), &disk).await;
    disk.fail_writes(5);
    assert_eq!(Hydrating::start(&world.upper).end().await.state, HydrationState::Done);
    same(&world.read_all("f").await.unwrap(), &world.lower.content(world.lower.at("f"), 0..65_536), "f");
}

#[tokio::test]
async fn a_full_disk_is_waited_for() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::on(&disk).await;
    disk.set_full(true);
    let hydrating = Hydrating::start(&world.upper);
    hydrating.waits_for("no room").await;
    // What a client wants is served all the while.
    let size = world.attributes(RELATION).await.size;
    let whole = world.read_all(RELATION).await.unwrap();
    same(&whole, &world.lower.content(world.lower.at(RELATION), 0..size), RELATION);
    assert!(!hydrating.task.is_finished());
    disk.set_full(false);
    assert_eq!(hydrating.end().await.state, HydrationState::Done);
    let before = world.shape().await;
    let world = world.anew_on(&disk).await;
    assert!(world.upper.is_hydrated());
    assert!(world.shape().await == before, "opened anew it differs");
}

/// The kernel tells of a lost write once, and what was lost may be anything that was fetched.
#[tokio::test]
async fn an_upper_that_has_lost_a_write_is_never_called_whole() {
    for number in [libc::EIO, libc::ENOSPC] {
        let disk = SimulatedDisk::new(u64::MAX);
        let world = World::on(&disk).await;
        world.read(RELATION, 0, 100).await.unwrap();
        disk.lose_a_write(number);
        for _ in 0..2 {
            let report = Hydrating::start(&world.upper).end().await;
            assert_eq!(report.state, HydrationState::Failed, "{report:?}");
            assert!(report.reason.unwrap().contains("sync"));
            assert!(!world.upper.is_hydrated());
            // It might be zeros.
            assert_eq!(world.read(RELATION, 0, 100).await, Err(Errno::EIO));
        }
        let lower = world.lower.clone();
        drop(world);
        for _ in 0..2 {
            let refused = World::try_of(lower.clone(), &disk).await.unwrap_err();
            assert!(matches!(refused, OpenError::Lost { .. }), "{refused}");
        }
    }
}

#[tokio::test]
async fn a_write_that_an_earlier_process_lost_is_found_out_when_the_upper_is_opened() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::on(&disk).await;
    world.read(RELATION, 0, 100).await.unwrap();
    let lower = world.lower.clone();
    drop(world);
    disk.lose_a_write(libc::EIO);
    let failed = World::try_of(lower.clone(), &disk).await.unwrap_err();
    assert!(matches!(failed, OpenError::Io { .. }), "{failed}");
    let refused = World::try_of(lower, &disk).await.unwrap_err();
    assert!(matches!(refused, OpenError::Lost { .. }), "{refused}");
}

/// The first who syncs is told, and need not be the one who has to hear it.
#[tokio::test]
async fn after_a_lost_write_no_fsync_succeeds_whoever_was_told_of_it() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::on(&disk).await;
    assert_eq!(Hydrating::start(&world.upper).end().await.state, HydrationState::Done);
    let (first, second) = (world.open_file("top").await.unwrap(), world.open_file(RELATION).await.unwrap());
    second.sync(true).await.unwrap();
    disk.lose_a_write(libc::EIO);
    assert_eq!(world.truncate("base/1/16385", 100).await, Err(Errno::EIO));
    for _ in 0..2 {
        assert_eq!(first.sync(true).await, Err(Errno::EIO));
        assert_eq!(second.sync(false).await, Err(Errno::EIO));
    }
    drop((first, second));

    let world = world.anew_on(&disk).await;
    disk.lose_a_write(libc::EIO);
    assert_eq!(world.rename("top", "moved", RenameMode::Replace).await, Err(Errno::EIO));
    assert_eq!(world.open_file(RELATION).await.unwrap().sync(true).await, Err(Errno::EIO));
}

/// What was fetched is safe then; of what it wrote since, the server is told and replays it.
#[tokio::test]
async fn a_whole_upper_that_loses_a_write_is_whole_for_the_next_process() {
    let disk = SimulatedDisk::new(u64::MAX);
    let world = World::on(&disk).await;
    assert_eq!(Hydrating::start(&world.upper).end().await.state, HydrationState::Done);
    disk.lose_a_write(libc::EIO);
    assert_eq!(world.upper.sync_all(), Err(Errno::EIO));
    assert_eq!(world.read("top", 0, 100).await.unwrap().len(), 100);
    let world = world.anew_on(&disk).await;
    assert!(world.upper.is_hydrated());
    world.upper.sync_all().unwrap();
}

#[tokio::test]
async fn a_damaged_file_is_told_and_left_and_all_others_come() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    world.lower.damage(RELATION);
    let report = Hydrating::start(&world.upper).end().await;
    assert_eq!((report.state, report.failed_files), (HydrationState::Failed, 1));
    let object = format!("memory/{}", world.lower.at(RELATION).0);
    assert!(report.reason.as_deref().unwrap().contains(&object), "{report:?}");
    let size = world.attributes(RELATION).await.size;
    assert_eq!(report.missing_bytes, Some(size));
    assert!(!world.upper.is_hydrated());
    // Each part of it was asked for by a read and once more for the reason; the rest is local.
    let asked = world.lower.fetches();
    assert!(asked < 30, "{asked} requests");
    for (path, size) in TREE.iter().filter(|(path, size)| *size > 0 && *path != RELATION) {
        let whole = world.read_all(path).await.unwrap();
        same(&whole, &world.lower.content(world.lower.at(path), 0..*size), path);
    }
    assert_eq!(world.lower.fetches(), asked);
}

#[tokio::test]
async fn without_a_hydrator_it_is_known_how_much_is_local() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let total: u64 = TREE.iter().map(|(_, size)| size).sum();
    world.read(RELATION, 0, 100).await.unwrap();
    let lower = world.lower.clone();
    drop(world);
    let world = World { upper: open(&lower, scratch.path()).await.unwrap(), lower };
    let hydrating = Hydrating::counting(&world.upper);
    let (hydrator, fetches) = (hydrating.hydrator.clone(), world.lower.fetches());
    assert_eq!(hydrating.task.await.map(|()| hydrator.report().state).unwrap(), HydrationState::Off);
    assert_eq!(hydrator.report().missing_bytes, Some(total - 65_536));
    assert_eq!(world.lower.fetches(), fetches);
    world.read("top", 0, 1).await.unwrap();
    assert_eq!(hydrator.report().missing_bytes, Some(total - 65_536 - 100));
}

/// An order that is a defect.
#[derive(Debug)]
struct Defect;

#[async_trait::async_trait]
impl StoredOrder for Defect {
    async fn places(&self) -> Result<HashMap<NodeId, Place>, LowerError> {
        panic!("made so")
    }

    async fn load(&self, _: &[NodeId]) -> Result<(), LowerError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_hydrator_that_is_a_defect_has_failed_and_is_not_at_work_for_ever() {
    let scratch = tempfile::tempdir().unwrap();
    let world = World::new(scratch.path()).await;
    let hydrator = Hydrator::of_a_test(&world.upper, true, Arc::new(Defect));
    hydrator.clone().run().await;
    let report = hydrator.report();
    assert_eq!(report.state, HydrationState::Failed);
    assert!(report.reason.unwrap().contains("made so"));
}

impl Hydrating {
    /// Starts one that only looks.
    fn counting(upper: &Upper) -> Self {
        let hydrator = Hydrator::counting(upper);
        Self { task: tokio::spawn(hydrator.clone().run()), hydrator }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn clients_see_what_they_would_without_it_and_the_end_is_an_ordinary_directory(
        steps in prop::collection::vec((operation(), 0..6u32), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut run = Run::new().await;
            let mut hydrating = Hydrating::start(&run.world.upper);
            for (operation, turns) in &steps {
                match operation {
                    Operation::Reopen => {
                        hydrating.kill().await;
                        run = run.reopen().await;
                        hydrating = Hydrating::start(&run.world.upper);
                    }
                    operation => run.apply(operation).await,
                }
                for _ in 0..*turns {
                    tokio::task::yield_now().await;
                }
            }
            assert_eq!(hydrating.end().await.state, HydrationState::Done);
            assert!(run.world.upper.is_hydrated());
            // Nothing is asked of the lower any more, and the directory is what the clients see.
            let fetches = run.world.lower.fetches();
            assert!(bare(run.scratch.path()) == bare_shape(&run.model), "the bare directory differs");
            assert_eq!(run.world.shape().await, run.model.shape());
            run = run.reopen().await;
            assert_eq!(run.world.shape().await, run.model.shape());
            assert_eq!(run.world.lower.fetches(), fetches);
        });
    }

    #[test]
    fn after_a_power_cut_the_mark_is_there_only_with_what_it_vouches_for(
        calls in 40u64..700,
        chances in prop::collection::vec(any::<u64>(), 1..100),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let disk = SimulatedDisk::new(calls);
            let start = disk.copy();
            let world = World::on(&disk).await;
            let (lower, model) = (world.lower.clone(), Model::new(&world.lower));
            let report = Hydrating::start(&world.upper).end().await;
            assert!(disk.is_dead() || report.state == HydrationState::Done, "{report:?}");
            let mut chances = chances.iter().copied().cycle();
            let disk = disk.after_power_cut(&start, || chances.next().unwrap_or(0));
            let world = World::of(lower, &disk).await;
            let fetches = world.lower.fetches();
            if world.upper.is_hydrated() {
                assert_eq!(world.shape().await, model.shape());
                assert_eq!(world.lower.fetches(), fetches, "it is marked, and not whole");
            }
            assert_eq!(Hydrating::start(&world.upper).end().await.state, HydrationState::Done);
            assert_eq!(world.shape().await, model.shape());
        });
    }
}
