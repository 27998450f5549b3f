//! What is read in which order: the start-up set first, then everything else by place.
//!
//! Pure: from the list of files to a list of steps. The start-up set is what PostgreSQL touches when it starts:
//! `global/`, the newest SLRU segments, configuration, the catalogs of `postgres`, then of the other databases, the
//! largest first; at most [`START_SET_BYTES_MAX`]. Small files share a chunk with their neighbours, never with those of
//! another compartment: compressed lengths tell something about what was compressed together.
//! Deliberately absent: what a file holds; sizes are those of the walk and may be outdated when the file is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::backup::data_directory::SourceFile;

/// The order of the copy.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// How many of the steps belong to the start-up set.
    pub start_steps: usize,
    /// What the start-up set consists of.
    pub groups: Vec<GroupSummary>,
    /// Bytes of all files, as the walk saw them.
    pub bytes: u64,
}

/// One step of the copy; numbers are indexes into the list of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Small files of one compartment, to stand in one chunk.
    Together(Vec<usize>),
    /// A file by itself, page by page.
    Alone(usize),
    /// A file that is taken over from an earlier basebackup without being read.
    Keep(usize),
    /// A group of the start-up set ends: the page maps of its files are written here, behind them.
    WriteMaps,
}

/// A part of the start-up set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSummary {
    /// What it is.
    pub group: StartGroup,
    /// Files in it.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Files that would belong to it and did not fit.
    pub left_out: usize,
}

/// The parts of the start-up set, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StartGroup {
    /// `global/`
    Global,
    /// Transaction states: `pg_xact`, `pg_multixact`, `pg_commit_ts`.
    Slru,
    /// Configuration in and outside PGDATA, and the other files at the top.
    Configuration,
    /// The catalogs of the database with this oid.
    Catalogs(u32),
}

/// Where a file belongs: what is compressed together does not cross it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Compartment {
    Global,
    Slru,
    Configuration,
    Database(u32),
    Other,
}

/// What the plan has to know beyond the files.
#[derive(Debug, Clone, Default)]
pub struct PlanOptions {
    /// The database `postgres`, if there is one.
    pub postgres: Option<u32>,
    /// For each database the files that `pg_filenode.map` names: catalogs whatever their number.
    pub mapped: BTreeMap<u32, BTreeSet<u32>>,
}

/// At most this much raw is read ahead for a start; what does not fit is found like any other file.
pub const START_SET_BYTES_MAX: u64 = 64 << 20;
/// A cluster of many transactions has half a gigabyte of `pg_xact`; a start reads its newest end.
const SLRU_BYTES_MAX: u64 = 16 << 20;
/// A file below this size shares a chunk, and a shared chunk holds no more than this.
pub const SMALL_FILE_BYTES: u64 = 8 * 8192;
/// A step opens no more files than this, however small they are.
const FILES_TOGETHER_MAX: usize = 256;
/// Objects that initdb made have lower numbers.
const FIRST_NORMAL_OID: u32 = 16_384;
/// `pg_largeobject` has a catalog's number and holds user data.
const LARGE_OBJECTS: [u32; 2] = [2613, 2683];

/// Puts the files into the order in which they are read.
pub fn plan_copy(files: &[SourceFile], options: &PlanOptions) -> Plan {
    let mut by_place: BTreeMap<Compartment, Vec<usize>> = BTreeMap::new();
    let mut order: Vec<usize> = (0..files.len()).collect();
    order.sort_by(|a, b| files[*a].path.split().cmp(&files[*b].path.split()));
    for number in order {
        by_place.entry(compartment(files[number].path.as_bytes())).or_default().push(number);
    }
    let mut plan = Plan { bytes: files.iter().map(|file| file.size).sum(), ..Plan::default() };
    let mut taken = vec![false; files.len()];
    let mut room = START_SET_BYTES_MAX;
    for group in start_groups(files, &by_place, options) {
        let (chosen, summary) = choose(files, group, &by_place, options, room);
        if chosen.is_empty() {
            continue;
        }
        room -= summary.bytes;
        chosen.iter().for_each(|number| taken[*number] = true);
        push_steps(&mut plan.steps, files, &chosen);
        plan.steps.push(Step::WriteMaps);
        plan.groups.push(summary);
    }
    plan.start_steps = plan.steps.len();
    for numbers in by_place.values() {
        let rest: Vec<usize> = numbers.iter().copied().filter(|number| !taken[*number]).collect();
        push_steps(&mut plan.steps, files, &rest);
    }
    plan
}

impl Plan {
    /// Takes out of the plan what need not be read; the small files that remain are put together anew.
    pub fn keep(&mut self, files: &[SourceFile], is_unread: impl Fn(usize) -> bool) {
        let place = |number: usize| compartment(files[number].path.as_bytes());
        let (mut steps, mut start_steps, mut unread_bytes) = (Vec::new(), None, 0);
        let mut group: Vec<usize> = Vec::new();
        let mut flush = |steps: &mut Vec<Step>, group: &mut Vec<usize>| {
            let (unread, read): (Vec<usize>, Vec<usize>) = group.drain(..).partition(|n| is_unread(*n));
            unread_bytes += unread.iter().map(|number| files[*number].size).sum::<u64>();
            steps.extend(unread.into_iter().map(Step::Keep));
            push_steps(steps, files, &read);
        };
        for (at, step) in std::mem::take(&mut self.steps).into_iter().enumerate() {
            let numbers = match &step {
                Step::Together(numbers) => &numbers[..],
                Step::Alone(number) | Step::Keep(number) => std::slice::from_ref(number),
                Step::WriteMaps => &[],
            };
            let joins = match (group.first(), numbers.first()) {
                (Some(first), Some(next)) => place(*first) == place(*next),
                (None, Some(_)) => true,
                (_, None) => false,
            };
            if at == self.start_steps || !joins {
                flush(&mut steps, &mut group);
            }
            if at == self.start_steps {
                start_steps = Some(steps.len());
            }
            group.extend(numbers);
            if step == Step::WriteMaps {
                steps.push(step);
            }
        }
        flush(&mut steps, &mut group);
        self.start_steps = start_steps.unwrap_or(steps.len());
        self.bytes -= unread_bytes;
        self.steps = steps;
    }
}

fn start_groups(
    files: &[SourceFile],
    by_place: &BTreeMap<Compartment, Vec<usize>>,
    options: &PlanOptions,
) -> Vec<StartGroup> {
    let mut databases: Vec<(bool, u64, u32)> = by_place
        .iter()
        .filter_map(|(compartment, numbers)| match compartment {
            Compartment::Database(oid) => {
                let bytes: u64 = numbers.iter().map(|number| files[*number].size).sum();
                Some((options.postgres == Some(*oid), bytes, *oid))
            }
            _ => None,
        })
        .collect();
    // `postgres` first, then the largest; of equal ones the older.
    databases.sort_by_key(|(is_postgres, bytes, oid)| (!is_postgres, u64::MAX - bytes, *oid));
    let mut groups = vec![StartGroup::Global, StartGroup::Slru, StartGroup::Configuration];
    groups.extend(databases.into_iter().map(|(.., oid)| StartGroup::Catalogs(oid)));
    groups
}

/// Takes the files of `group` that fit into `room`, in the order in which they are to stand.
fn choose(
    files: &[SourceFile],
    group: StartGroup,
    by_place: &BTreeMap<Compartment, Vec<usize>>,
    options: &PlanOptions,
    room: u64,
) -> (Vec<usize>, GroupSummary) {
    let (compartment, mut room) = match group {
        StartGroup::Global => (Compartment::Global, room),
        StartGroup::Slru => (Compartment::Slru, room.min(SLRU_BYTES_MAX)),
        StartGroup::Configuration => (Compartment::Configuration, room),
        StartGroup::Catalogs(oid) => (Compartment::Database(oid), room),
    };
    let none = BTreeSet::new();
    let mapped = match group {
        StartGroup::Catalogs(oid) => options.mapped.get(&oid).unwrap_or(&none),
        _ => &none,
    };
    let mut candidates: Vec<usize> = by_place.get(&compartment).map_or(&[][..], Vec::as_slice).to_vec();
    match group {
        StartGroup::Catalogs(_) => {
            candidates.retain(|number| is_catalog(files[*number].path.split().1, mapped));
        }
        // The newest segments are those a start looks at.
        StartGroup::Slru => candidates.sort_by_key(|number| std::cmp::Reverse(files[*number].modified)),
        StartGroup::Global | StartGroup::Configuration => {}
    }
    let mut summary = GroupSummary { group, files: 0, bytes: 0, left_out: 0 };
    candidates.retain(|number| {
        let size = files[*number].size;
        let fits = size <= room;
        if fits {
            room -= size;
            summary.files += 1;
            summary.bytes += size;
        } else {
            summary.left_out += 1;
        }
        fits
    });
    candidates.sort_by(|a, b| files[*a].path.split().cmp(&files[*b].path.split()));
    (candidates, summary)
}

/// Appends the steps that read `numbers`, which are all of one compartment or in order of compartments.
fn push_steps(steps: &mut Vec<Step>, files: &[SourceFile], numbers: &[usize]) {
    let mut together: Vec<usize> = Vec::new();
    let mut bytes = 0;
    for number in numbers {
        let size = files[*number].size;
        if size >= SMALL_FILE_BYTES {
            steps.push(Step::Alone(*number));
            continue;
        }
        if bytes + size > SMALL_FILE_BYTES || together.len() == FILES_TOGETHER_MAX {
            steps.push(Step::Together(std::mem::take(&mut together)));
            bytes = 0;
        }
        together.push(*number);
        bytes += size;
    }
    if !together.is_empty() {
        steps.push(Step::Together(together));
    }
}

fn compartment(path: &[u8]) -> Compartment {
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
    match parts[..] {
        [b"data", b"global", _, ..] => Compartment::Global,
        [b"data", b"pg_xact" | b"pg_multixact" | b"pg_commit_ts", _, ..] => Compartment::Slru,
        [b"data", b"base", oid, _, ..]
        | [b"tablespaces", _, _, oid, _, ..]
        | [b"data", b"pg_tblspc", _, _, oid, _, ..] => {
            parse_oid(oid).map_or(Compartment::Other, Compartment::Database)
        }
        [b"data", _] | [b"config", ..] => Compartment::Configuration,
        _ => Compartment::Other,
    }
}

/// Returns whether a file of a database belongs to its catalogs: by its number, by the map, or by having neither.
fn is_catalog(name: &[u8], mapped: &BTreeSet<u32>) -> bool {
    let digits = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
    match parse_oid(&name[..digits]) {
        Some(number) if LARGE_OBJECTS.contains(&number) => false,
        Some(number) => number < FIRST_NORMAL_OID || mapped.contains(&number),
        // PG_VERSION, pg_filenode.map
        None => true,
    }
}

fn parse_oid(digits: &[u8]) -> Option<u32> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

impl fmt::Display for StartGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Global => f.write_str("global"),
            Self::Slru => f.write_str("transaction states"),
            Self::Configuration => f.write_str("configuration"),
            Self::Catalogs(oid) => write!(f, "catalogs of database {oid}"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for GroupSummary { group, files, bytes, left_out } in &self.groups {
            write!(f, "{group}: {files} files, {bytes} bytes")?;
            if *left_out > 0 {
                write!(f, " ({left_out} more do not fit)")?;
            }
            f.write_str("; ")?;
        }
        write!(
            f,
            "{} steps, {} of them for a start, {} bytes",
            self.steps.len(),
            self.start_steps,
            self.bytes
        )
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;

    use crate::repo::entry::TreePath;

    use super::*;

    fn file(path: &str, size: u64) -> SourceFile {
        SourceFile {
            path: TreePath::new(path).unwrap(),
            root: 0,
            size,
            mode: 0o600,
            modified: Timestamp::UNIX_EPOCH,
            identity: None,
        }
    }

    fn paths<'a>(plan: &Plan, files: &'a [SourceFile]) -> Vec<Vec<&'a str>> {
        let name = |n: &usize| std::str::from_utf8(files[*n].path.as_bytes()).unwrap();
        plan.steps
            .iter()
            .map(|step| match step {
                Step::Together(numbers) => numbers.iter().map(name).collect(),
                Step::Alone(number) => vec![name(number), "alone"],
                Step::Keep(number) => vec![name(number), "kept"],
                Step::WriteMaps => vec!["maps"],
            })
            .collect()
    }

    #[test]
    fn the_start_up_set_stands_first_in_the_order_of_worth() {
        let files = [
            file("data/base/16500/16400", 900_000),
            file("data/base/16500/1259", 100_000),
            file("data/base/16500/2613", 70_000),
            file("data/base/16500/30000", 80_000),
            file("data/base/16500/PG_VERSION", 3),
            file("data/base/5/1249", 8192),
            file("data/base/5/1249_fsm", 24_576),
            file("data/base/1/1249", 8192),
            file("data/global/1262", 8192),
            file("data/pg_xact/0000", 8192),
            file("data/postgresql.conf", 500),
            file("data/pg_logical/x", 10),
            file("config/etc/pg_hba.conf", 100),
            file("tablespaces/16399/PG_15_202209061/16500/16401", 70_000),
            file("tablespaces/16399/PG_15_202209061/5/16402", 10),
        ];
        let mapped = BTreeMap::from([(16_500, BTreeSet::from([30_000]))]);
        let plan = plan_copy(&files, &PlanOptions { postgres: Some(5), mapped });
        assert_eq!(
            paths(&plan, &files),
            [
                vec!["data/global/1262"],
                vec!["maps"],
                vec!["data/pg_xact/0000"],
                vec!["maps"],
                vec!["config/etc/pg_hba.conf", "data/postgresql.conf"],
                vec!["maps"],
                vec!["data/base/5/1249", "data/base/5/1249_fsm"],
                vec!["maps"],
                vec!["data/base/16500/1259", "alone"],
                vec!["data/base/16500/30000", "alone"],
                vec!["data/base/16500/PG_VERSION"],
                vec!["maps"],
                vec!["data/base/1/1249"],
                vec!["maps"],
                vec!["tablespaces/16399/PG_15_202209061/5/16402"],
                vec!["data/base/16500/16400", "alone"],
                vec!["data/base/16500/2613", "alone"],
                vec!["tablespaces/16399/PG_15_202209061/16500/16401", "alone"],
                vec!["data/pg_logical/x"],
            ]
        );
        assert_eq!(plan.start_steps, 14);
        assert!(plan.to_string().starts_with("global: 1 files, 8192 bytes; "), "{plan}");
    }

    #[test]
    fn the_start_up_set_is_bounded_and_the_newest_transactions_come_first() {
        let mut files: Vec<SourceFile> = (0..100)
            .map(|n| SourceFile {
                modified: Timestamp::from_second(n).unwrap(),
                ..file(&format!("data/pg_xact/{n:04X}"), 262_144)
            })
            .collect();
        files.push(file("data/base/5/1259", START_SET_BYTES_MAX));
        files.push(file("data/base/5/1249", 8192));
        let plan = plan_copy(&files, &PlanOptions::default());
        let start = &plan.steps[..plan.start_steps];
        assert_eq!(
            start.iter().filter(|step| matches!(step, Step::Alone(n) if (36..100).contains(n))).count(),
            64
        );
        assert!(start.contains(&Step::Together(vec![101])));
        assert!(!start.contains(&Step::Alone(100)));
        let left_out: Vec<usize> = plan.groups.iter().map(|group| group.left_out).collect();
        assert_eq!(left_out, [36, 1]);
    }

    proptest! {
        #[test]
        fn every_file_is_read_once_and_no_chunk_crosses_compartments(
            sizes in proptest::collection::vec((0usize..8, prop_oneof![0u64..200, 0u64..200_000, 0u64..100_000_000]), 0..300),
        ) {
            let folders = [
                "data/base/5", "data/base/16384", "data/global", "data/pg_xact", "data", "config/etc/x",
                "tablespaces/1/PG_15_1/16384", "data/pg_multixact/members",
            ];
            let files: Vec<SourceFile> = sizes.iter().enumerate()
                .map(|(n, (folder, size))| file(&format!("{}/{}", folders[*folder], 16_000 + n * 7), *size))
                .collect();
            let plan = plan_copy(&files, &PlanOptions { postgres: Some(5), ..PlanOptions::default() });
            let mut seen = vec![0; files.len()];
            let mut start_bytes = 0;
            for (at, step) in plan.steps.iter().enumerate() {
                let numbers = match step {
                    Step::Together(numbers) => numbers.clone(),
                    Step::Alone(number) => vec![*number],
                    Step::Keep(_) | Step::WriteMaps => Vec::new(),
                };
                let places: BTreeSet<Compartment> =
                    numbers.iter().map(|n| compartment(files[*n].path.as_bytes())).collect();
                prop_assert!(places.len() <= 1);
                let bytes: u64 = numbers.iter().map(|n| files[*n].size).sum();
                prop_assert!(matches!(step, Step::Alone(_)) || bytes <= SMALL_FILE_BYTES);
                start_bytes += if at < plan.start_steps { bytes } else { 0 };
                numbers.iter().for_each(|n| seen[*n] += 1);
            }
            prop_assert!(seen.iter().all(|count| *count == 1));
            prop_assert!(start_bytes <= START_SET_BYTES_MAX);
        }

        #[test]
        fn what_is_kept_is_not_read_and_everything_else_still_is(
            sizes in proptest::collection::vec((0usize..5, 0u64..200_000, any::<bool>()), 0..200),
        ) {
            let folders = ["data/base/5", "data/base/16384", "data/global", "data/pg_xact", "data"];
            let files: Vec<SourceFile> = sizes.iter().enumerate()
                .map(|(n, (folder, size, _))| file(&format!("{}/{}", folders[*folder], 16_000 + n), *size))
                .collect();
            let mut plan = plan_copy(&files, &PlanOptions { postgres: Some(5), ..PlanOptions::default() });
            let numbers = |steps: &[Step]| -> BTreeSet<usize> {
                steps.iter().flat_map(|step| match step {
                    Step::Together(numbers) => numbers.clone(),
                    Step::Alone(number) | Step::Keep(number) => vec![*number],
                    Step::WriteMaps => Vec::new(),
                }).collect()
            };
            let maps = |steps: &[Step]| steps.iter().filter(|step| **step == Step::WriteMaps).count();
            let before = (numbers(&plan.steps[..plan.start_steps]), maps(&plan.steps));
            plan.keep(&files, |number| sizes[number].2);
            prop_assert_eq!((numbers(&plan.steps[..plan.start_steps]), maps(&plan.steps)), before);
            prop_assert_eq!(numbers(&plan.steps).len(), files.len());
            let mut read_bytes = 0;
            for step in &plan.steps {
                let read = match step {
                    Step::Keep(number) => {
                        prop_assert!(sizes[*number].2);
                        continue;
                    }
                    Step::Together(numbers) => numbers.clone(),
                    Step::Alone(number) => vec![*number],
                    Step::WriteMaps => Vec::new(),
                };
                let places: BTreeSet<Compartment> =
                    read.iter().map(|n| compartment(files[*n].path.as_bytes())).collect();
                prop_assert!(places.len() <= 1 && read.iter().all(|number| !sizes[*number].2));
                read_bytes += read.iter().map(|number| files[*number].size).sum::<u64>();
            }
            prop_assert_eq!(plan.bytes, read_bytes);
        }
    }
}
