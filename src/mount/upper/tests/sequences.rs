//! Random operations on an upper and on the model, compared after each one.
//!
//! Every operation must end alike, with the same error number; every read must give the same bytes; and the whole tree
//! must be the same at the end, again after opening the upper anew, and again after that in one more.

use std::sync::Arc;

use nix::errno::Errno;
use proptest::prelude::*;

use crate::mount::fs::{OpenFile, RenameMode};
use crate::mount::upper::tests::model::{self, Model};
use crate::mount::upper::tests::world::{World, caller, open, same};

/// Names that exist, names that do not, and names below names that are files.
const PATHS: [&str; 20] = [
    "PG_VERSION",
    "global/pg_control",
    "global/new",
    "base/1/16384",
    "base/1/16385",
    "base/1/16386",
    "base/2/16384",
    "base/2/16385",
    "base/1",
    "base/2",
    "base/3",
    "base/3/16384",
    "top",
    "top/below",
    "empty",
    "new",
    "link",
    "pg_stat",
    "pg_stat/x",
    "base",
];

/// The largest offset: a little beyond the largest file.
const REACH: usize = 300_000;

#[derive(Debug, Clone)]
pub(super) enum Operation {
    Read(usize, usize, usize),
    Write(usize, usize, usize),
    Truncate(usize, usize),
    Create(usize),
    MakeDirectory(usize),
    Unlink(usize),
    RemoveDirectory(usize),
    Rename(usize, usize, bool),
    Link(usize, usize),
    Open(usize, usize),
    ReadOpen(usize, usize, usize),
    WriteOpen(usize, usize, usize),
    Close(usize),
    SyncOpen(usize),
    SyncDirectory(usize),
    Reopen,
}

pub(super) fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let path = || 0..PATHS.len();
    let slot = || 0..3usize;
    let offset = || prop_oneof![0..REACH, (0..REACH / 8192).prop_map(|page| page * 8192), 0..200usize];
    let length = || prop_oneof![1..200usize, Just(8192), 1..70_000usize];
    prop_oneof![
        6 => (path(), offset(), length()).prop_map(|(p, o, l)| Read(p, o, l)),
        6 => (path(), offset(), length()).prop_map(|(p, o, l)| Write(p, o, l)),
        3 => (path(), offset()).prop_map(|(p, o)| Truncate(p, o)),
        2 => path().prop_map(Create),
        1 => path().prop_map(MakeDirectory),
        3 => path().prop_map(Unlink),
        1 => path().prop_map(RemoveDirectory),
        4 => (path(), path(), prop::bool::weighted(0.8)).prop_map(|(a, b, r)| Rename(a, b, r)),
        1 => (path(), path()).prop_map(|(a, b)| Link(a, b)),
        3 => (slot(), path()).prop_map(|(s, p)| Open(s, p)),
        2 => (slot(), offset(), length()).prop_map(|(s, o, l)| ReadOpen(s, o, l)),
        2 => (slot(), offset(), length()).prop_map(|(s, o, l)| WriteOpen(s, o, l)),
        1 => slot().prop_map(Close),
        1 => slot().prop_map(SyncOpen),
        1 => path().prop_map(SyncDirectory),
        1 => Just(Reopen),
    ]
}

/// A file that is open in both.
type Slot = Option<(Arc<dyn OpenFile>, model::Bytes)>;

pub(super) struct Run {
    pub(super) scratch: tempfile::TempDir,
    pub(super) world: World,
    pub(super) model: Model,
    slots: [Slot; 3],
    stamp: u8,
}

impl Run {
    pub(super) async fn new() -> Self {
        // In memory where there is room for it: opening syncs the whole file system, which others write to.
        let scratch = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let world = World::new(scratch.path()).await;
        let model = Model::new(&world.lower);
        Self { scratch, world, model, slots: [None, None, None], stamp: 0 }
    }

    /// Returns bytes no other write had.
    fn data(&mut self, length: usize) -> Vec<u8> {
        self.stamp = self.stamp.wrapping_add(1);
        vec![self.stamp; length]
    }

    pub(super) async fn apply(&mut self, operation: &Operation) {
        use Operation::*;
        let (world, model) = (&self.world, &mut self.model);
        match *operation {
            Truncate(p, size) => {
                // The kernel cuts nothing but files.
                if matches!(model.file(PATHS[p]), Err(Errno::EISDIR | Errno::ELOOP)) {
                    return;
                }
                let got = world.truncate(PATHS[p], size as u64).await;
                assert_eq!(got, model.file(PATHS[p]).map(|file| file.borrow_mut().resize(size, 0)));
            }
            Create(p) => assert_eq!(world.create(PATHS[p]).await.map(drop), model.create(PATHS[p]).map(drop)),
            MakeDirectory(p) => {
                assert_eq!(world.make_directory(PATHS[p]).await, model.make_directory(PATHS[p]));
            }
            Unlink(p) => assert_eq!(world.unlink(PATHS[p]).await, model.unlink(PATHS[p])),
            RemoveDirectory(p) => {
                assert_eq!(world.remove_directory(PATHS[p]).await, model.remove_directory(PATHS[p]));
            }
            Rename(from, to, replace) => {
                let mode = if replace { RenameMode::Replace } else { RenameMode::NoReplace };
                // What the kernel refuses before we see it, in an order of its own.
                let (a, b) = (PATHS[from], PATHS[to]);
                if a == b || b.starts_with(&format!("{a}/")) || a.starts_with(&format!("{b}/")) {
                    return;
                }
                assert_eq!(world.rename(a, b, mode).await, model.rename(a, b, replace));
            }
            Link(from, to) => {
                if model.is_directory(PATHS[from]) {
                    return;
                }
                let expected = model.link(PATHS[from], PATHS[to]);
                assert_eq!(world.link(PATHS[from], PATHS[to]).await, expected);
            }
            SyncDirectory(p) => {
                if model.is_directory(PATHS[p]) {
                    world.sync_directory(PATHS[p]).await.unwrap();
                }
            }
            _ => self.apply_to_content(operation).await,
        }
    }

    async fn apply_to_content(&mut self, operation: &Operation) {
        use Operation::*;
        let (world, model) = (&self.world, &mut self.model);
        match *operation {
            Read(p, offset, length) => {
                let got = world.read(PATHS[p], offset as u64, length as u32).await;
                let expected = model.file(PATHS[p]).map(|file| model::read(&file, offset, length));
                same_outcome(got, expected);
            }
            Write(p, offset, length) => {
                let data = self.data(length);
                let got = self.world.write(PATHS[p], offset as u64, &data).await;
                assert_eq!(got, self.model.file(PATHS[p]).map(|file| model::write(&file, offset, &data)));
            }
            Open(slot, p) => {
                let got = world.open_file(PATHS[p]).await;
                match (got, model.file(PATHS[p])) {
                    (Ok(file), Ok(content)) => self.slots[slot] = Some((file, content)),
                    (got, expected) => assert_eq!(got.map(drop), expected.map(drop)),
                }
            }
            ReadOpen(slot, offset, length) => {
                let Some((file, content)) = &self.slots[slot] else { return };
                let got = file.read(&caller(), offset as u64, length as u32).await.unwrap();
                same(&got, &model::read(content, offset, length), "open file");
            }
            WriteOpen(slot, offset, length) => {
                let data = self.data(length);
                let Some((file, content)) = &self.slots[slot] else { return };
                file.write(&caller(), offset as u64, data.clone().into()).await.unwrap();
                model::write(content, offset, &data);
            }
            Close(slot) => self.slots[slot] = None,
            SyncOpen(slot) => {
                if let Some((file, _)) = &self.slots[slot] {
                    file.sync(true).await.unwrap();
                }
            }
            _ => unreachable!("{operation:?} is applied elsewhere"),
        }
    }

    /// Opens the upper anew, as the next process does.
    pub(super) async fn reopen(self) -> Self {
        let Self { scratch, world, model, slots, stamp } = self;
        drop(slots);
        let lower = world.lower.clone();
        world.close().await;
        let upper = open(&lower, scratch.path()).await.unwrap();
        Self { scratch, world: World { lower, upper }, model, slots: [None, None, None], stamp }
    }
}

fn same_outcome(got: Result<Vec<u8>, Errno>, expected: Result<Vec<u8>, Errno>) {
    match (got, expected) {
        (Ok(got), Ok(expected)) => same(&got, &expected, "file"),
        (got, expected) => assert_eq!(got.map(drop), expected.map(drop)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn an_upper_behaves_like_a_file_system(operations in prop::collection::vec(operation(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut run = Run::new().await;
            for operation in &operations {
                match operation {
                    Operation::Reopen => run = run.reopen().await,
                    operation => run.apply(operation).await,
                }
            }
            for _ in 0..2 {
                assert_eq!(run.world.shape().await, run.model.shape());
                run = run.reopen().await;
            }
            assert_eq!(run.world.shape().await, run.model.shape());
        });
    }
}
