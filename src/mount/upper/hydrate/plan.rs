//! In which order files come: the start-up set, then what is waited for, then what somebody had begun to read, then the
//! rest as it lies in the store.
//!
//! A pure queue. The store's own order is nearly that of directories, and small files that share a pack come as one
//! group, so that one request can fetch what several of them need. Where nothing is known of the store, files come by
//! directory.

use std::collections::HashMap;
use std::fmt::Debug;

use crate::mount::fs::{FileKind, LocalId};
use crate::mount::lower::{LowerError, NodeId};

/// A file this small comes in a group with others: a full basebackup's chunk holds several of them.
const SMALL_BYTES: u64 = 64 << 10;
/// A group is no larger: what is decoded for it must stay in the reader's cache until its last file is written.
const GROUP_BYTES_MAX: u64 = 4 << 20;
/// A group has no more files: the empty ones cost system calls too.
const GROUP_FILES_MAX: usize = 256;

/// Where a file begins in the store; compares as it had best be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Its place in the start-up set, for what a server reads when it starts.
    pub start_set: Option<u32>,
    /// The pack, counted in the order of writing.
    pub pack: u32,
    /// The first byte within the pack.
    pub offset: u32,
}

/// What a hydrator asks of the store beyond a lower: order, and several files at once.
#[async_trait::async_trait]
pub trait StoredOrder: Send + Sync + Debug {
    /// Returns where files begin; those that need nothing of the store are left out.
    async fn places(&self) -> Result<HashMap<NodeId, Place>, LowerError>;

    /// Gets ready what holds small files, with few requests; each file is fetched by itself afterwards.
    async fn load(&self, files: &[NodeId]) -> Result<(), LowerError>;
}

/// Something that has yet to become local.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Which of the hydrator's uppers it is in.
    pub(crate) upper: usize,
    pub(crate) directory: LocalId,
    pub(crate) name: Vec<u8>,
    pub(crate) id: LocalId,
    /// A file or a symbolic link.
    pub(crate) kind: FileKind,
    /// Bytes that have to be fetched.
    pub(crate) bytes: u64,
    /// The upper has a place for it: somebody opened it once.
    pub(crate) is_begun: bool,
}

/// What is to be fetched, in order.
#[derive(Debug)]
pub(crate) struct Plan {
    queue: Vec<Option<(Class, Wanted)>>,
    next: usize,
    positions: HashMap<(usize, LocalId), usize>,
}

/// What decides between files before their names do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    StartSet(Place),
    Begun(Option<Place>),
    Rest(Option<Place>),
}

impl Wanted {
    /// Returns its number in the lower, which everything wanted has.
    pub(crate) fn node(&self) -> NodeId {
        NodeId(self.id.0.saturating_sub(1))
    }
}

impl Plan {
    /// Orders what is wanted; a place is that of the lower's number.
    pub(crate) fn new(wanted: Vec<Wanted>, places: &HashMap<NodeId, Place>) -> Self {
        let class = |wanted: &Wanted| match places.get(&wanted.node()).copied() {
            Some(place) if place.start_set.is_some() => Class::StartSet(place),
            place if wanted.is_begun => Class::Begun(place),
            place => Class::Rest(place),
        };
        let mut queue: Vec<(Class, Wanted)> =
            wanted.into_iter().map(|wanted| (class(&wanted), wanted)).collect();
        queue.sort_by(|(a_class, a), (b_class, b)| {
            (a_class, a.upper, a.directory, &a.name).cmp(&(b_class, b.upper, b.directory, &b.name))
        });
        let place_of = |(at, (_, wanted)): (usize, &(Class, Wanted))| ((wanted.upper, wanted.id), at);
        let positions = queue.iter().enumerate().map(place_of).collect();
        Self { queue: queue.into_iter().map(Some).collect(), next: 0, positions }
    }

    /// Takes the next of the start-up set.
    pub(crate) fn take_of_start_set(&mut self) -> Option<Vec<Wanted>> {
        let is_next = matches!(self.first(), Some((Class::StartSet(_), _)));
        if is_next { self.take_next() } else { None }
    }

    /// Takes a file out of turn, if it is still wanted.
    pub(crate) fn take(&mut self, upper: usize, id: LocalId) -> Option<Wanted> {
        let at = *self.positions.get(&(upper, id))?;
        self.queue[at].take().map(|(_, wanted)| wanted)
    }

    /// Takes the next, and if it is small, its small neighbours with it.
    pub(crate) fn take_next(&mut self) -> Option<Vec<Wanted>> {
        self.first()?;
        let (class, first) = self.queue[self.next].take()?;
        let mut bytes = first.bytes;
        let mut group = vec![first];
        while bytes <= GROUP_BYTES_MAX
            && group.len() < GROUP_FILES_MAX
            && let Some((other, wanted)) = self.first()
            && group[0].bytes.max(wanted.bytes) <= SMALL_BYTES
            && (group[0].upper, class.pack()) == (wanted.upper, other.pack())
        {
            bytes += wanted.bytes;
            group.extend(self.queue[self.next].take().map(|(_, wanted)| wanted));
        }
        Some(group)
    }

    /// Passes over what has been taken out of turn, and returns what is next.
    fn first(&mut self) -> Option<&(Class, Wanted)> {
        while self.queue.get(self.next)?.is_none() {
            self.next += 1;
        }
        self.queue[self.next].as_ref()
    }
}

impl Class {
    /// Returns the class and the pack: what may not differ within a group.
    fn pack(self) -> (u8, Option<u32>) {
        match self {
            Self::StartSet(place) => (0, Some(place.pack)),
            Self::Begun(place) => (1, place.map(|place| place.pack)),
            Self::Rest(place) => (2, place.map(|place| place.pack)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(id: u64, bytes: u64) -> Wanted {
        let directory = LocalId(id / 100);
        let name = id.to_string().into_bytes();
        Wanted { upper: 0, directory, name, id: LocalId(id), kind: FileKind::File, bytes, is_begun: false }
    }

    fn place(start_set: Option<u32>, pack: u32, offset: u32) -> Place {
        Place { start_set, pack, offset }
    }

    fn places(of: &[(u64, Place)]) -> HashMap<NodeId, Place> {
        of.iter().map(|(id, place)| (NodeId(id - 1), *place)).collect()
    }

    fn ids(group: &[Wanted]) -> Vec<u64> {
        group.iter().map(|wanted| wanted.id.0).collect()
    }

    const LARGE: u64 = 1 << 20;

    #[test]
    fn the_start_up_set_comes_first_then_what_was_begun_then_the_rest_as_it_lies() {
        let begun = Wanted { is_begun: true, ..wanted(3, LARGE) };
        let all = vec![wanted(1, LARGE), wanted(2, LARGE), begun, wanted(4, LARGE), wanted(5, LARGE)];
        let places = places(&[
            (1, place(None, 7, 0)),
            (2, place(None, 2, 500)),
            (3, place(None, 9, 0)),
            (4, place(Some(1), 8, 0)),
            (5, place(Some(0), 9, 9)),
        ]);
        let mut plan = Plan::new(all, &places);
        let mut order = Vec::new();
        while let Some(group) = plan.take_of_start_set() {
            order.extend(ids(&group));
        }
        assert_eq!(order, [5, 4]);
        while let Some(group) = plan.take_next() {
            order.extend(ids(&group));
        }
        assert_eq!(order, [5, 4, 3, 2, 1]);
    }

    #[test]
    fn what_is_waited_for_is_taken_once_and_out_of_turn() {
        let mut plan = Plan::new((1..=4).map(|id| wanted(id, LARGE)).collect(), &HashMap::new());
        assert_eq!(plan.take(0, LocalId(3)).unwrap().id, LocalId(3));
        assert!(plan.take(0, LocalId(3)).is_none() && plan.take(1, LocalId(2)).is_none());
        assert_eq!(plan.take(0, LocalId(1)).unwrap().id, LocalId(1));
        assert_eq!(ids(&plan.take_next().unwrap()), [2]);
        assert_eq!(ids(&plan.take_next().unwrap()), [4]);
        assert!(plan.take_next().is_none());
    }

    #[test]
    fn small_files_of_one_pack_come_together() {
        let all = vec![wanted(1, 8192), wanted(2, 100), wanted(3, LARGE), wanted(4, 0), wanted(5, 0)];
        let places = places(&[
            (1, place(None, 1, 10)),
            (2, place(None, 1, 20)),
            (3, place(None, 1, 30)),
            (4, place(None, 1, 40)),
            (5, place(None, 2, 0)),
        ]);
        let mut plan = Plan::new(all, &places);
        let groups = std::iter::from_fn(|| plan.take_next());
        assert_eq!(
            groups.map(|group| ids(&group)).collect::<Vec<_>>(),
            [vec![1, 2], vec![3], vec![4], vec![5]]
        );
    }

    #[test]
    fn without_any_place_files_come_by_directory_and_groups_have_bounds() {
        let files = GROUP_FILES_MAX as u64 + 10;
        let all = (0..files).rev().map(|id| wanted(1000 + id, 0)).collect();
        let mut plan = Plan::new(all, &HashMap::new());
        let first = plan.take_next().unwrap();
        assert_eq!(first.len(), GROUP_FILES_MAX);
        assert!(first.windows(2).all(|pair| pair[0].directory <= pair[1].directory));
        assert_eq!(plan.take_next().unwrap().len(), 10);
        let mut plan = Plan::new((1..=200).map(|id| wanted(id, SMALL_BYTES)).collect(), &HashMap::new());
        let bytes: u64 = plan.take_next().unwrap().iter().map(|wanted| wanted.bytes).sum();
        assert!(bytes <= GROUP_BYTES_MAX + SMALL_BYTES, "{bytes}");
    }
}
