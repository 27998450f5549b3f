//! The power goes at any system call; what was synced is there afterwards, and nothing is there that never was.
//!
//! For each name the test remembers what it has stood for since its directory was last synced, and for each file the
//! sizes and the contents of each 4 KiB it has had since it was last synced. After the cut every name must stand for
//! one of those, and every stretch of content must be one of those. Files and directories of the lower are moreover
//! themselves: one that was never removed is found, and found once. What may be passed through is written past the
//! upper, as the kernel does. An upper that is marked as whole needs the lower no more, and one that has lost a write and
//! said so is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use proptest::prelude::*;

use crate::mount::fs::{FileKind, LocalId, RenameMode, Volume};
use crate::mount::lower::{Lower, NodeId, NodeKind};
use crate::mount::memory_lower::MemoryLower;
use crate::mount::upper::OpenError;
use crate::mount::upper::hydrate::{HydrationState, Hydrator};
use crate::mount::upper::tests::simulated_disk::SimulatedDisk;
use crate::mount::upper::tests::world::{World, same};

const UNIT: usize = 4096;

/// Small, because it is read whole after each of many cuts.
const TREE: [(&str, u64); 7] = [
    ("PG_VERSION", 3),
    ("global/pg_control", 8192),
    ("base/1/16384", 5 * 4096 + 77),
    ("base/1/16385", 8192),
    ("base/2/16384", 12_288),
    ("top", 100),
    ("pg_stat/", 0),
];

const PATHS: [&str; 14] = [
    "PG_VERSION",
    "global/pg_control",
    "base/1/16384",
    "base/1/16385",
    "base/1/16386",
    "base/2/16384",
    "base/1",
    "base/2",
    "base/3",
    "base/3/16384",
    "top",
    "new",
    "other",
    "pg_stat",
];
/// The paths most operations are about.
const HOT: std::ops::Range<usize> = 2..5;
const FOLDERS: [&str; 6] = ["", "base", "base/1", "base/2", "base/3", "global"];

#[derive(Debug, Clone)]
enum Operation {
    Read(usize),
    Write(usize, usize, usize),
    Truncate(usize, usize),
    Create(usize),
    MakeDirectory(usize),
    Unlink(usize),
    RemoveDirectory(usize),
    Rename(usize, usize),
    Sync(usize),
    SyncDirectory(usize),
    Hydrate,
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    // Most of it happens to a few, so that one operation meets what another left.
    let path = || prop_oneof![1 => 0..PATHS.len(), 2 => HOT];
    let offset = || prop_oneof![0..24_000usize, (0..3usize).prop_map(|page| page * 8192)];
    let length = || prop_oneof![1..200usize, Just(8192), 1..9_000usize];
    prop_oneof![
        2 => path().prop_map(Read),
        6 => (path(), offset(), length()).prop_map(|(p, o, l)| Write(p, o, l)),
        2 => (path(), offset()).prop_map(|(p, o)| Truncate(p, o)),
        2 => path().prop_map(Create),
        1 => path().prop_map(MakeDirectory),
        3 => path().prop_map(Unlink),
        1 => path().prop_map(RemoveDirectory),
        5 => (path(), path()).prop_map(|(a, b)| Rename(a, b)),
        4 => path().prop_map(Sync),
        1 => (0..FOLDERS.len()).prop_map(SyncDirectory),
        1 => Just(SyncDirectory(2)),
        1 => Just(Hydrate),
    ]
}

/// Everything a name, a size or a stretch may be after the cut; the last is what it is now.
type History<T> = Vec<T>;

/// A file, directory or link, and what it may be after the cut.
#[derive(Debug)]
struct Object {
    kind: FileKind,
    /// Its number, if it is the lower's.
    lower: Option<LocalId>,
    content: Vec<u8>,
    sizes: BTreeSet<usize>,
    stretches: BTreeMap<usize, History<Vec<u8>>>,
    names: BTreeMap<String, History<Option<usize>>>,
    was_removed: bool,
}

/// What may be found after the cut.
#[derive(Debug)]
struct Expected {
    objects: Vec<Object>,
}

impl Object {
    fn new(kind: FileKind, lower: Option<LocalId>, content: Vec<u8>) -> Self {
        let mut object = Self {
            kind,
            lower,
            content,
            sizes: BTreeSet::new(),
            stretches: BTreeMap::new(),
            names: BTreeMap::new(),
            was_removed: false,
        };
        object.remember(0..usize::MAX);
        object
    }

    /// Adds the present content in `range` to what may be found.
    fn remember(&mut self, range: std::ops::Range<usize>) {
        self.sizes.insert(self.content.len());
        let known = self.stretches.keys().last().map_or(0, |last| last + 1);
        let all = self.content.len().div_ceil(UNIT).max(known);
        for unit in range.start / UNIT..range.end.div_ceil(UNIT).min(all) {
            let stretch = self.stretch(unit);
            let history = self.stretches.entry(unit).or_default();
            if history.last() != Some(&stretch) {
                history.push(stretch);
            }
        }
    }

    /// Returns what is in a unit now, zeros beyond the end.
    fn stretch(&self, unit: usize) -> Vec<u8> {
        let end = ((unit + 1) * UNIT).min(self.content.len());
        let mut stretch = self.content.get(unit * UNIT..end).unwrap_or_default().to_vec();
        stretch.resize(UNIT, 0);
        stretch
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        let (old, end) = (self.content.len(), offset + data.len());
        for unit in old.div_ceil(UNIT)..end.div_ceil(UNIT) {
            // A file may have grown before all that it grew by was written.
            self.stretches.entry(unit).or_insert_with(|| vec![vec![0; UNIT]]);
        }
        self.content.resize(old.max(end), 0);
        self.content[offset..end].copy_from_slice(data);
        self.remember(offset.min(old)..end);
    }

    fn truncate(&mut self, size: usize) {
        let from = size.min(self.content.len());
        self.content.resize(size, 0);
        self.remember(from..usize::MAX);
    }

    fn synced(&mut self) {
        self.sizes.clear();
        self.stretches.clear();
        self.remember(0..usize::MAX);
    }

    /// Says what is wrong with content found after the cut, if anything is.
    fn explain(&self, found: &[u8]) -> Result<(), String> {
        if !self.sizes.contains(&found.len()) {
            return Err(format!("has {} bytes, not one of {:?}", found.len(), self.sizes));
        }
        for (unit, got) in found.chunks(UNIT).enumerate() {
            let history = self.stretches.get(&unit).map_or(&[][..], Vec::as_slice);
            let zeros = history.is_empty() && got.iter().all(|byte| *byte == 0);
            if !zeros && !history.iter().any(|stretch| stretch[..got.len()] == *got) {
                return Err(format!(
                    "has bytes at {} that never were there: {:?}…",
                    unit * UNIT,
                    &got[..4.min(got.len())]
                ));
            }
        }
        Ok(())
    }
}

impl Expected {
    async fn new(lower: &MemoryLower) -> Self {
        let mut expected = Self { objects: Vec::new() };
        let root = expected.add(lower, lower.root()).await;
        let mut rest = vec![(root, lower.root())];
        while let Some((at, node)) = rest.pop() {
            for (name, child, known) in lower.list(node).await.unwrap() {
                let id = expected.add(lower, child).await;
                let name = String::from_utf8(name).unwrap();
                expected.objects[at].names.insert(name, vec![Some(id)]);
                if known.kind == NodeKind::Directory {
                    rest.push((id, child));
                }
            }
        }
        expected
    }

    async fn add(&mut self, lower: &MemoryLower, node: NodeId) -> usize {
        let known = lower.node(node).await.unwrap();
        let content =
            if known.kind == NodeKind::File { lower.content(node, 0..known.size) } else { Vec::new() };
        self.objects.push(Object::new(known.kind.into(), Some(LocalId(node.0 + 1)), content));
        self.objects.len() - 1
    }

    fn at(&self, path: &str) -> Option<usize> {
        path.split('/')
            .filter(|name| !name.is_empty())
            .try_fold(0, |at, name| self.objects[at].names.get(name).and_then(|history| *history.last()?))
    }

    fn parent<'a>(&self, path: &'a str) -> Option<(usize, &'a str)> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.at(directory).filter(|at| self.objects[*at].kind == FileKind::Directory).map(|at| (at, name))
    }

    fn file(&mut self, path: &str) -> Option<&mut Object> {
        let at = self.at(path)?;
        Some(&mut self.objects[at]).filter(|object| object.kind == FileKind::File)
    }

    fn set(&mut self, (directory, name): (usize, &str), value: Option<usize>) {
        self.objects[directory].names.entry(name.to_owned()).or_insert_with(|| vec![None]).push(value);
    }

    fn make(&mut self, path: &str, kind: FileKind) {
        if let (Some(place), None) = (self.parent(path), self.at(path)) {
            self.objects.push(Object::new(kind, None, Vec::new()));
            self.set(place, Some(self.objects.len() - 1));
        }
    }

    fn remove(&mut self, path: &str) {
        if let (Some(place), Some(old)) = (self.parent(path), self.at(path)) {
            self.objects[old].was_removed = true;
            self.set(place, None);
        }
    }

    fn rename(&mut self, from: &str, to: &str) {
        let (Some(source), Some(target), Some(moved)) = (self.parent(from), self.parent(to), self.at(from))
        else {
            return;
        };
        if let Some(old) = self.at(to) {
            self.objects[old].was_removed = true;
        }
        self.set(target, Some(moved));
        self.set(source, None);
    }

    fn directory_synced(&mut self, path: &str) {
        if let Some(at) = self.at(path) {
            for history in self.objects[at].names.values_mut() {
                history.drain(..history.len() - 1);
            }
        }
    }
}

/// Does an operation to both. What was cut off half-way may have happened; what failed for another reason has not.
async fn apply(
    world: &World,
    expected: &mut Expected,
    disk: &SimulatedDisk,
    operation: &Operation,
    stamp: u8,
) {
    use Operation::*;
    let happened = |outcome: &Result<(), Errno>| outcome.is_ok() || disk.is_dead();
    match *operation {
        Read(p) => drop(world.read_all(PATHS[p]).await),
        Write(p, offset, length) => {
            let data = vec![stamp; length];
            if happened(&world.write(PATHS[p], offset as u64, &data).await)
                && let Some(file) = expected.file(PATHS[p])
            {
                file.write(offset, &data);
            }
        }
        Truncate(p, size) => {
            if expected.file(PATHS[p]).is_some()
                && happened(&world.truncate(PATHS[p], size as u64).await)
                && let Some(file) = expected.file(PATHS[p])
            {
                file.truncate(size);
            }
        }
        Create(p) => {
            if happened(&world.create(PATHS[p]).await.map(drop)) {
                expected.make(PATHS[p], FileKind::File);
            }
        }
        MakeDirectory(p) => {
            if happened(&world.make_directory(PATHS[p]).await) {
                expected.make(PATHS[p], FileKind::Directory);
            }
        }
        Unlink(p) => {
            if happened(&world.unlink(PATHS[p]).await) {
                expected.remove(PATHS[p]);
            }
        }
        RemoveDirectory(p) => {
            if happened(&world.remove_directory(PATHS[p]).await) {
                expected.remove(PATHS[p]);
            }
        }
        Rename(from, to) => {
            let (a, b) = (PATHS[from], PATHS[to]);
            if a == b || b.starts_with(&format!("{a}/")) || a.starts_with(&format!("{b}/")) {
                return;
            }
            if happened(&world.rename(a, b, RenameMode::Replace).await) {
                expected.rename(a, b);
            }
        }
        Sync(p) => {
            if let Ok(file) = world.open_file(PATHS[p]).await
                && file.sync(false).await.is_ok()
                && let Some(file) = expected.file(PATHS[p])
            {
                file.synced();
            }
        }
        Hydrate => hydrate(world, disk).await,
        SyncDirectory(p) => {
            if world.sync_directory(FOLDERS[p]).await.is_ok() {
                expected.directory_synced(FOLDERS[p]);
            }
        }
    }
}

/// Hydrates until the end or the cut: what would be tried again after that tells nothing.
async fn hydrate(world: &World, disk: &SimulatedDisk) {
    let cut = async {
        while !disk.is_dead() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        () = Hydrator::hasty(&world.upper).run() => {}
        () = cut => {}
    }
}

/// Looks at everything there is after the cut.
async fn check(world: &World, expected: &Expected) -> Result<(), String> {
    let mut found = BTreeMap::new();
    // A name that has stood for several directories may lead to any of them.
    let mut rest = vec![(String::new(), vec![0usize])];
    while let Some((path, candidates)) = rest.pop() {
        let mut names: BTreeSet<String> = world.names(&path).await.into_iter().collect();
        let remembered = candidates.iter().flat_map(|at| expected.objects[*at].names.keys().cloned());
        names.extend(remembered);
        for name in names {
            let child = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
            let may_be: Vec<Option<usize>> = candidates
                .iter()
                .flat_map(|at| expected.objects[*at].names.get(&name).cloned().unwrap_or_else(|| vec![None]))
                .collect();
            let inside = check_name(world, expected, &child, &may_be, &mut found).await?;
            if !inside.is_empty() {
                rest.push((child, inside));
            }
        }
    }
    for object in expected.objects.iter().filter(|object| !object.was_removed) {
        if let Some(id) = object.lower.filter(|id| *id != world.upper.root()) {
            match found.get(&id).map_or(&[][..], Vec::as_slice) {
                [_] => {}
                [] => return Err(format!("{id:?} of the lower is lost")),
                several => return Err(format!("{id:?} of the lower is at {several:?}")),
            }
        }
    }
    Ok(())
}

/// Makes files of the lower that are shorter now as long as they were: zeros come in view, never what was cut off.
async fn check_growth(world: &World) {
    for (path, size) in TREE {
        let Ok(found) = world.find(path).await else { continue };
        if found.attributes.kind == FileKind::File && found.attributes.size < size {
            let mut content = world.read_all(path).await.unwrap();
            content.resize(size as usize, 0);
            world.truncate(path, size).await.unwrap();
            same(&world.read_all(path).await.unwrap(), &content, path);
        }
    }
}

/// Checks what a name stands for, and returns which directories it may be.
async fn check_name(
    world: &World,
    expected: &Expected,
    path: &str,
    may_be: &[Option<usize>],
    found: &mut BTreeMap<LocalId, Vec<String>>,
) -> Result<Vec<usize>, String> {
    let entry = match world.find(path).await {
        Ok(entry) => entry,
        Err(Errno::ENOENT) if may_be.contains(&None) => return Ok(Vec::new()),
        Err(errno) => return Err(format!("{path}: {errno}")),
    };
    let is_lower = expected.objects.iter().any(|object| object.lower == Some(entry.id));
    if is_lower {
        found.entry(entry.id).or_default().push(path.to_owned());
    }
    let fits = |at: &usize| {
        let object = &expected.objects[*at];
        object.kind == entry.attributes.kind && object.lower == is_lower.then_some(entry.id)
    };
    let candidates: Vec<usize> = may_be.iter().flatten().copied().filter(fits).collect();
    if candidates.is_empty() {
        return Err(format!("{path} is something that never was there: {entry:?}"));
    }
    match entry.attributes.kind {
        FileKind::Directory => return Ok(candidates),
        FileKind::File => {
            let content = world.read_all(path).await.map_err(|errno| format!("{path}: {errno}"))?;
            let explained = candidates.iter().map(|at| expected.objects[*at].explain(&content));
            let failures: Vec<String> = explained.map_while(Result::err).collect();
            if failures.len() == candidates.len() {
                return Err(format!("{path} {}", failures.join(", ")));
            }
        }
        _ => {}
    }
    Ok(Vec::new())
}

/// Runs operations until the power goes after so many system calls, looks at what is left, and says whether it went.
async fn cut(operations: &[Operation], calls: u64, mut seed: u64) -> bool {
    let lower = Arc::new(MemoryLower::build(&TREE));
    let disk = SimulatedDisk::new(calls);
    let start = disk.copy();
    let world = World::of(lower.clone(), &disk).await;
    let mut expected = Expected::new(&lower).await;
    for (stamp, operation) in (1..).zip(operations) {
        if disk.is_dead() {
            break;
        }
        apply(&world, &mut expected, &disk, operation, stamp).await;
    }
    drop(world);
    let after = disk.after_power_cut(&start, || chance(&mut seed));
    for _ in 0..2 {
        let world = World::of(lower.clone(), &after).await;
        let fetches = lower.fetches();
        if let Err(wrong) = check(&world, &expected).await {
            panic!("after {calls} calls of {operations:?}: {wrong}");
        }
        let is_needed = lower.fetches() > fetches;
        assert!(!world.upper.is_hydrated() || !is_needed, "after {calls} calls of {operations:?}: not whole");
    }
    check_growth(&World::of(lower.clone(), &after).await).await;
    disk.is_dead()
}

/// Draws from a seed.
fn chance(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed >> 11
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

/// Calls that opening an upper takes, and a few more.
const CALLS_FIRST: u64 = 20;

/// Every cut of the changes whose order matters most, each with several outcomes.
#[test]
fn every_cut_of_the_delicate_changes_leaves_the_old_state_or_the_new() {
    use Operation::*;
    const RELATION: usize = 2;
    const UNTOUCHED: usize = 3;
    const NEW: usize = 11;
    const BASE_1: usize = 6;
    const BASE_3: usize = 8;
    let of_base_1 = FOLDERS.iter().position(|folder| *folder == "base/1").unwrap();
    let of_base = FOLDERS.iter().position(|folder| *folder == "base").unwrap();
    let of_top = 0;
    let changed = [Write(RELATION, 0, 9_000), Sync(RELATION)];
    for delicate in [
        vec![Unlink(RELATION)],
        vec![
            Unlink(RELATION),
            SyncDirectory(of_base_1),
            Create(RELATION),
            Write(RELATION, 0, 50),
            Sync(RELATION),
        ],
        vec![Unlink(UNTOUCHED), SyncDirectory(of_base_1)],
        vec![Truncate(RELATION, 5_001), Write(UNTOUCHED, 0, 10)],
        vec![Truncate(RELATION, 5_001), Truncate(RELATION, 12_000), Sync(RELATION)],
        vec![Rename(RELATION, NEW), SyncDirectory(of_top), SyncDirectory(of_base_1)],
        vec![Rename(UNTOUCHED, NEW), Sync(NEW)],
        vec![Rename(RELATION, UNTOUCHED), Unlink(UNTOUCHED), SyncDirectory(of_base_1)],
        vec![Create(NEW), Write(NEW, 0, 8192), Sync(NEW), Rename(NEW, RELATION), SyncDirectory(of_base_1)],
        vec![Rename(BASE_1, BASE_3), SyncDirectory(of_base), Create(BASE_1)],
        vec![Create(NEW), Sync(NEW), Rename(NEW, 0), SyncDirectory(of_top), Unlink(0), SyncDirectory(of_top)],
    ] {
        let operations: Vec<Operation> = changed.iter().cloned().chain(delicate).collect();
        cut_throughout(&operations, 1, 5);
    }
}

/// The same around the mark that says that everything is local. A hydrator makes many calls, and sleeps between them: the
/// cuts are a few calls apart, and elsewhere in each sequence.
#[test]
fn cuts_throughout_a_hydration_leave_a_whole_upper_or_one_that_goes_on() {
    use Operation::*;
    const RELATION: usize = 2;
    const UNTOUCHED: usize = 3;
    const NEW: usize = 11;
    let of_base_1 = FOLDERS.iter().position(|folder| *folder == "base/1").unwrap();
    for delicate in [
        vec![Hydrate, Unlink(RELATION), SyncDirectory(of_base_1)],
        vec![Hydrate, Truncate(RELATION, 5_001), Truncate(RELATION, 12_000), Sync(RELATION)],
        vec![Truncate(RELATION, 5_001), Truncate(RELATION, 12_000), Rename(UNTOUCHED, NEW), Hydrate],
    ] {
        let operations: Vec<Operation> = [Write(RELATION, 0, 9_000)].into_iter().chain(delicate).collect();
        cut_throughout(&operations, 5, 1);
    }
}

/// Cuts at every so manyth call, until a run comes to its end, each time with several outcomes.
fn cut_throughout(operations: &[Operation], step: usize, outcomes: u64) {
    run(async {
        for calls in (CALLS_FIRST..).step_by(step) {
            let mut went = false;
            for seed in 1..=outcomes {
                went = cut(operations, calls, seed * 0x9e37_79b9).await;
            }
            if !went {
                // This one was whole, and the one before was not: every call that is reached has been the last one.
                assert!(calls > CALLS_FIRST + operations.len() as u64);
                return;
            }
        }
    });
}

/// Whoever was told that a write is lost is told again by the next process, however soon the power went; and one that nobody
/// was told of is a hole by then.
#[test]
fn every_cut_after_a_lost_write_leaves_an_upper_that_is_refused_or_right() {
    const RELATION: usize = 2;
    const UNTOUCHED: usize = 3;
    for by_the_hydrator in [false, true] {
        let (mut refused, mut opened) = (0, 0);
        let mut calls = CALLS_FIRST;
        let mut went = true;
        while went {
            for mut seed in (1..4).map(|seed| seed * 0x9e37_79b9) {
                run(async {
                    let lower = Arc::new(MemoryLower::build(&TREE));
                    let disk = SimulatedDisk::new(calls);
                    let start = disk.copy();
                    let world = World::of(lower.clone(), &disk).await;
                    let mut expected = Expected::new(&lower).await;
                    for (stamp, operation) in (1..).zip([
                        Operation::Write(RELATION, 0, 9_000),
                        Operation::Sync(RELATION),
                        Operation::Write(RELATION, 8192, 8192),
                        Operation::Read(UNTOUCHED),
                    ]) {
                        if !disk.is_dead() {
                            apply(&world, &mut expected, &disk, &operation, stamp).await;
                        }
                    }
                    disk.lose_a_write(libc::EIO);
                    let is_told = if by_the_hydrator {
                        let hydrator = Hydrator::hasty(&world.upper);
                        hydrator.clone().run().await;
                        hydrator.report().state == HydrationState::Failed
                    } else {
                        match world.open_file(PATHS[RELATION]).await {
                            Ok(file) => file.sync(false).await.is_err(),
                            Err(_) => false,
                        }
                    };
                    went = disk.is_dead();
                    drop(world);
                    let after = disk.after_power_cut(&start, || chance(&mut seed));
                    match World::try_of(lower.clone(), &after).await {
                        Err(error) => {
                            assert!(matches!(error, OpenError::Lost { .. }), "{calls} calls: {error}");
                            refused += 1;
                        }
                        Ok(world) => {
                            assert!(went || !is_told, "{calls} calls: it was told, and is opened");
                            if let Err(wrong) = check(&world, &expected).await {
                                panic!("after {calls} calls: {wrong}");
                            }
                            opened += 1;
                        }
                    }
                });
            }
            calls += 1;
        }
        assert!(refused > 0 && opened > 0, "{refused} refused, {opened} opened");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn what_was_synced_is_there_and_nothing_that_never_was(
        operations in prop::collection::vec(operation(), 1..25),
        calls in CALLS_FIRST..400,
        seed in 1..u64::MAX,
    ) {
        run(cut(&operations, calls, seed));
    }
}
