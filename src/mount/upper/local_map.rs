//! Which parts of a file are local: one bit for each 4 KiB below the file's base length.
//!
//! Built once from the file's holes and kept in memory only. What lies at or beyond the base length is local by
//! definition and has no bit. Leaves of 128 MiB are allocated when they differ from all-clear and all-set, so a map
//! of a huge file costs memory only where it is ragged.

use std::ops::Range;

/// The unit of being local. A local file system must not allocate in larger steps.
pub(crate) const UNIT: u64 = 4096;

/// Bits in one leaf.
const LEAF_UNITS: u64 = 32 * 1024;
const LEAF_WORDS: usize = (LEAF_UNITS / 64) as usize;

/// Which units of a file are local.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LocalMap {
    leaves: Vec<Leaf>,
    base_length: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Leaf {
    None,
    All,
    Some(Box<[u64; LEAF_WORDS]>),
}

impl LocalMap {
    /// Creates a map in which nothing below `base_length` is local.
    pub(crate) fn new(base_length: u64) -> Self {
        let leaves = base_length.div_ceil(UNIT).div_ceil(LEAF_UNITS);
        Self { leaves: vec![Leaf::None; usize::try_from(leaves).unwrap_or(usize::MAX)], base_length }
    }

    /// Returns how many bytes from the start are the lower's where they are not local.
    pub(crate) fn base_length(&self) -> u64 {
        self.base_length
    }

    /// Lowers the base length; raising it would bring back what was cut off.
    pub(crate) fn truncate(&mut self, base_length: u64) {
        if base_length < self.base_length {
            self.base_length = base_length;
            self.leaves.truncate(base_length.div_ceil(UNIT).div_ceil(LEAF_UNITS) as usize);
        }
    }

    /// Marks every unit local whose part below the base length lies wholly in `bytes`.
    pub(crate) fn set(&mut self, bytes: Range<u64>) {
        let units = self.covered_units(&bytes);
        let mut at = units.start;
        while at < units.end {
            let (leaf, first) = ((at / LEAF_UNITS) as usize, at % LEAF_UNITS);
            let end = units.end.min((leaf as u64 + 1) * LEAF_UNITS);
            self.leaves[leaf].set(first..first + (end - at));
            at = end;
        }
    }

    /// Returns the units whose part below the base length lies wholly in `bytes`.
    pub(crate) fn covered_units(&self, bytes: &Range<u64>) -> Range<u64> {
        let end = if bytes.end >= self.base_length { self.units() } else { bytes.end / UNIT };
        let start = bytes.start.div_ceil(UNIT);
        start..end.max(start).min(self.units().max(start))
    }

    /// Tells whether the unit holding a byte is local.
    pub(crate) fn is_local(&self, byte: u64) -> bool {
        byte / UNIT >= self.units() || self.bit(byte / UNIT)
    }

    /// Returns the first stretch of `bytes` that is not local, in whole units cut at the base length.
    pub(crate) fn first_missing(&self, bytes: &Range<u64>) -> Option<Range<u64>> {
        let end = bytes.end.min(self.base_length);
        if bytes.start >= end {
            return None;
        }
        let units = bytes.start / UNIT..end.div_ceil(UNIT);
        let first = self.find(units.clone(), false)?;
        let last = self.find(first..units.end, true).unwrap_or(units.end);
        Some(first * UNIT..(last * UNIT).min(self.base_length))
    }

    /// Returns every stretch of `bytes` that is not local, in order.
    pub(crate) fn missing(&self, bytes: &Range<u64>) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        let mut rest = bytes.clone();
        while let Some(run) = self.first_missing(&rest) {
            rest.start = run.end;
            runs.push(run);
        }
        runs
    }

    fn units(&self) -> u64 {
        self.base_length.div_ceil(UNIT)
    }

    fn bit(&self, unit: u64) -> bool {
        match &self.leaves[(unit / LEAF_UNITS) as usize] {
            Leaf::None => false,
            Leaf::All => true,
            Leaf::Some(words) => {
                let at = unit % LEAF_UNITS;
                words[(at / 64) as usize] >> (at % 64) & 1 == 1
            }
        }
    }

    /// Finds the first unit that is `wanted`, a leaf at a time where a leaf is of one kind.
    fn find(&self, units: Range<u64>, wanted: bool) -> Option<u64> {
        let mut at = units.start;
        while at < units.end {
            let uniform = match &self.leaves[(at / LEAF_UNITS) as usize] {
                Leaf::None => Some(false),
                Leaf::All => Some(true),
                Leaf::Some(_) => None,
            };
            match uniform {
                Some(kind) if kind == wanted => return Some(at),
                Some(_) => at = (at / LEAF_UNITS + 1) * LEAF_UNITS,
                None if self.bit(at) == wanted => return Some(at),
                None => at += 1,
            }
        }
        None
    }
}

impl Leaf {
    fn set(&mut self, units: Range<u64>) {
        if units == (0..LEAF_UNITS) {
            *self = Self::All;
        }
        if *self == Self::None {
            *self = Self::Some(Box::new([0; LEAF_WORDS]));
        }
        let Self::Some(words) = self else { return };
        for unit in units {
            words[(unit / 64) as usize] |= 1 << (unit % 64);
        }
        if words.iter().all(|word| *word == u64::MAX) {
            *self = Self::All;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_unit_is_covered_when_all_of_it_below_the_base_length_is() {
        let map = LocalMap::new(2 * UNIT + 100);
        assert_eq!(map.covered_units(&(0..UNIT)), 0..1);
        assert_eq!(map.covered_units(&(1..2 * UNIT)), 1..2);
        assert_eq!(map.covered_units(&(2 * UNIT..2 * UNIT + 99)), 2..2);
        assert_eq!(map.covered_units(&(2 * UNIT..2 * UNIT + 100)), 2..3);
        assert_eq!(map.covered_units(&(10 * UNIT..11 * UNIT)).count(), 0);
        assert_eq!(map.covered_units(&(5..6)).count(), 0);
    }

    #[test]
    fn a_huge_file_s_empty_map_is_small_and_its_edges_work() {
        let tib = 1 << 40;
        let mut map = LocalMap::new(tib);
        assert_eq!(map.first_missing(&(0..tib)), Some(0..tib));
        map.set(0..tib - UNIT);
        assert_eq!(map.first_missing(&(0..tib)), Some(tib - UNIT..tib));
        assert!(map.is_local(tib) && !map.is_local(tib - 1) && map.is_local(0));
        map.set(tib - UNIT..tib);
        assert_eq!(map.first_missing(&(0..tib)), None);
        assert!(map.leaves.iter().all(|leaf| *leaf == Leaf::All));
        assert_eq!(LocalMap::new(0).first_missing(&(0..u64::MAX)), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn it_answers_like_a_set_of_bytes(
            base in 0u64..40 * UNIT,
            steps in prop::collection::vec((0u64..40 * UNIT, 0u64..10 * UNIT, prop::bool::weighted(0.1)), 0..12),
        ) {
            let mut map = LocalMap::new(base);
            let mut length = base;
            let mut local = vec![false; (base.div_ceil(UNIT)) as usize];
            for (start, count, cut) in steps {
                if cut {
                    length = length.min(start);
                    map.truncate(start);
                } else {
                    map.set(start..start + count);
                    for (unit, bit) in local.iter_mut().enumerate() {
                        let (from, to) = (unit as u64 * UNIT, ((unit as u64 + 1) * UNIT).min(length));
                        *bit |= from < to && start <= from && to <= start + count;
                    }
                }
            }
            let mut expected: Vec<Range<u64>> = Vec::new();
            for unit in (0..length.div_ceil(UNIT)).filter(|unit| !local[*unit as usize]) {
                let (from, to) = (unit * UNIT, ((unit + 1) * UNIT).min(length));
                match expected.last_mut() {
                    Some(run) if run.end == from => run.end = to,
                    _ => expected.push(from..to),
                }
            }
            prop_assert_eq!(map.missing(&(0..u64::MAX)), expected);
        }
    }
}
