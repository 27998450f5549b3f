//! Which packs of the parent are not named again, so that what they hold is stored anew.
//!
//! An incremental basebackup leaves dead pages behind in the packs of earlier ones. Whole packs of which little is
//! still in use are written again from the data directory, within a budget: simulated with 7.9 % of the pages changed
//! each time and the last seven basebackups kept, 70 % and 8 % hold what is stored below 2.4 times what is in use, and
//! what a restore fetches below 1.5 times (decision 2113). Neither the private key nor a download is needed. What is gone
//! from the store is stored again whatever the budget.
//! Pure; deliberately absent: finding out what is gone, and the start-up set, which only the plan knows.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};

use crate::repo::{BasebackupId, PackId, Refs, keyring::KeyEnvelope};

/// What is stored again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rewriting {
    /// The packs that are not named again.
    pub packs: BTreeSet<PackId>,
    /// How many of them are missing from the store, or have another size there.
    pub missing: usize,
    /// How many are mostly dead.
    pub sparse: usize,
    /// How many are old.
    pub old: usize,
    /// How many are of basebackups of which too many are named.
    pub crowded: usize,
    /// Stored bytes in use that are to be written again.
    pub bytes: u64,
}

/// A pack of which less than this share is in use is written again…
const LIVE_PERCENT_MIN: u64 = 70;
/// …while all that is written again stays below this share of what is in use.
const BUDGET_PERCENT: u64 = 8;
/// A pack that was written so long ago is written again, too: what is never read rots unseen…
const AGE_MAX: SignedDuration = SignedDuration::from_hours(90 * 24);
/// …and first of all out of this part of the budget, which mostly dead packs would otherwise spend every day.
const OLD_PART: u64 = 4;

/// Keys of earlier basebackups take no more than this of a record, which readers refuse where it is some times as large.
const KEYS_BYTES_MAX: usize = 1 << 20;
/// No basebackup names packs of more others than this…
const ORIGINS_MAX: usize = 256;
/// …and each may name those of so many, whatever their keys take.
const ORIGINS_MIN: usize = 8;

/// Returns how many basebackups one may name the packs of, its own among them: each has a key, wrapped for each
/// recipient, in the record.
pub fn origins_max(keys: &[KeyEnvelope]) -> usize {
    let wrapped = |key: &KeyEnvelope| -> usize {
        // A third more in base64, and 64 digits of who it is wrapped for.
        key.wrapped.iter().map(|wrapped| wrapped.key.len() * 4 / 3 + 128).sum::<usize>() + 256
    };
    let largest = keys.iter().map(wrapped).max().unwrap_or(1);
    (KEYS_BYTES_MAX / largest).clamp(ORIGINS_MIN, ORIGINS_MAX)
}

/// Decides which packs are written again; `live` has the stored bytes of each that are in use, by pages, and
/// `origins_max` says of how many basebackups packs may be named.
pub fn plan_rewriting(
    refs: &Refs,
    live: &BTreeMap<PackId, u64>,
    missing: &[PackId],
    origins_max: usize,
    now: Timestamp,
) -> Rewriting {
    let live_of = |pack: &PackId| live.get(pack).copied().unwrap_or(0);
    let mut rewriting = Rewriting { missing: missing.len(), ..Rewriting::default() };
    rewriting.packs.extend(missing);
    let budget = live.values().sum::<u64>() * BUDGET_PERCENT / 100;
    let is_old = |pack: &PackId| now.duration_since(pack.origin.time()) > AGE_MAX;
    let (mut sparse, mut old) = (Vec::new(), Vec::new());
    for record in refs.records().iter().filter(|record| !rewriting.packs.contains(&record.id)) {
        let share = live_of(&record.id) * 100 / u64::from(record.size.max(1));
        if share < LIVE_PERCENT_MIN {
            sparse.push((share, record.id));
        }
        if is_old(&record.id) {
            old.push(record.id);
        }
    }
    sparse.sort();
    let mut spent = 0;
    // Of a small cluster one pack may be more than the budget, and would stay for ever: the first of each kind is taken.
    let mut take = |pack: PackId, (is_first, budget): (bool, u64), packs: &mut BTreeSet<PackId>| {
        let cost = live_of(&pack);
        let fits = (is_first || spent + cost <= budget) && packs.insert(pack);
        spent += if fits { cost } else { 0 };
        usize::from(fits)
    };
    // Ascending by the time they were written.
    for pack in &old {
        let room = (rewriting.old == 0, budget / OLD_PART);
        rewriting.old += take(*pack, room, &mut rewriting.packs);
    }
    for (_, pack) in sparse {
        rewriting.sparse += take(pack, (rewriting.sparse == 0, budget), &mut rewriting.packs);
    }
    for pack in old {
        rewriting.old += take(pack, (false, budget), &mut rewriting.packs);
    }
    let mut origins: BTreeMap<BasebackupId, (u64, Vec<PackId>)> = BTreeMap::new();
    for record in refs.records().iter().filter(|record| !rewriting.packs.contains(&record.id)) {
        let (live, packs) = origins.entry(record.id.origin).or_default();
        *live += live_of(&record.id);
        packs.push(record.id);
    }
    let mut origins: Vec<(u64, Vec<PackId>)> = origins.into_values().collect();
    origins.sort();
    // One place is that of the basebackup that is about to be taken.
    let crowded = (origins.len() + 1).saturating_sub(origins_max);
    for (_, packs) in origins.into_iter().take(crowded) {
        rewriting.crowded += packs.len();
        rewriting.packs.extend(packs);
    }
    rewriting.bytes = rewriting.packs.iter().map(live_of).sum();
    rewriting
}

#[cfg(test)]
mod tests {
    use crate::codec::{Cipher, Digest};
    use crate::repo::{PackRecord, keyring::WrappedKey};

    use super::*;

    const DAY: u64 = 86_400;

    fn pack(day: u64, number: u32) -> PackId {
        PackId { origin: BasebackupId::from_parts(day * DAY, 1).unwrap(), number }
    }

    /// Packs with their sizes and what is in use of them.
    fn plan(packs: &[(PackId, u32, u64)], missing: &[PackId], day: u64) -> Rewriting {
        let record = |(id, size, _): &(PackId, u32, u64)| PackRecord {
            id: *id,
            size: *size,
            live: *size,
            key: 0,
            salt: [0; 32],
            digest: Digest::of(b""),
        };
        let refs = Refs::new(packs.iter().map(record).collect());
        let live = packs.iter().map(|(id, _, live)| (*id, *live)).collect();
        plan_rewriting(
            &refs,
            &live,
            missing,
            ORIGINS_MAX,
            Timestamp::from_second((day * DAY) as i64).unwrap(),
        )
    }

    #[test]
    fn the_least_live_packs_go_first_and_no_more_than_the_budget_allows() {
        let mut packs: Vec<_> = (0..25).map(|n| (pack(1, n), 1000, 1000)).collect();
        packs[3].2 = 690;
        packs[5].2 = 300;
        packs[7].2 = 710;
        packs[9].2 = 680;
        // 8 % of 23,380 bytes in use are 1870: 300 and 680 and 690 fit.
        let rewriting = plan(&packs, &[], 2);
        assert_eq!(rewriting.packs, BTreeSet::from([pack(1, 3), pack(1, 5), pack(1, 9)]));
        assert_eq!((rewriting.sparse, rewriting.old, rewriting.missing, rewriting.bytes), (3, 0, 0, 1670));
        packs.truncate(12);
        // 8 % of 10,380 are 830: 300 and nothing else.
        assert_eq!(plan(&packs, &[], 2).packs, BTreeSet::from([pack(1, 5)]));
    }

    #[test]
    fn a_pack_that_is_more_than_the_budget_is_written_again_alone() {
        let packs = [(pack(1, 0), 1000, 500), (pack(2, 0), 1000, 550)];
        assert_eq!(plan(&packs, &[], 3).packs, BTreeSet::from([pack(1, 0)]));
    }

    #[test]
    fn missing_packs_are_stored_again_whatever_the_budget_and_leave_it_to_others() {
        let mut packs: Vec<_> = (0..10).map(|n| (pack(1, n), 1000, 1000)).collect();
        packs[9].2 = 500;
        let missing: Vec<PackId> = (0..9).map(|n| pack(1, n)).collect();
        let rewriting = plan(&packs, &missing, 2);
        assert_eq!(rewriting.packs.len(), 10);
        assert_eq!((rewriting.missing, rewriting.sparse), (9, 1));
    }

    #[test]
    fn packs_of_the_least_live_basebackups_are_written_again_where_too_many_are_named() {
        let packs: Vec<_> = (0..300).map(|day| (pack(day / 10, day as u32), 1000, 900 + day % 100)).collect();
        assert_eq!(plan(&packs, &[], 40).packs, BTreeSet::new());
        let packs: Vec<_> = (0..260).map(|n| (pack(1 + n / 4, n as u32), 1000, 1000)).collect();
        assert_eq!(plan(&packs, &[], 70).crowded, 0);
        let hours =
            |n: u64| PackId { origin: BasebackupId::from_parts(50 * DAY + n * 3600, 1).unwrap(), number: 0 };
        let packs: Vec<_> = (0..258).map(|n| (hours(n), 1000, 1000 - n)).collect();
        let rewriting = plan(&packs, &[], 70);
        assert_eq!(rewriting.packs, BTreeSet::from([hours(255), hours(256), hours(257)]));
        assert_eq!((rewriting.crowded, rewriting.sparse), (3, 0));
    }

    #[test]
    fn the_keys_of_many_recipients_leave_room_for_fewer_basebackups() {
        let key = |recipients: usize, len: usize| KeyEnvelope {
            cipher: Cipher::Aes256Gcm,
            id: [0; 16],
            commitment: [0; 32],
            wrapped: vec![WrappedKey { recipient: [0; 32], key: vec![0; len] }; recipients],
        };
        assert_eq!(origins_max(&[]), 256);
        assert_eq!(origins_max(&[key(1, 384)]), 256);
        for (recipients, len) in [(8, 512), (32, 1024)] {
            let keys = vec![key(recipients, len); origins_max(&[key(recipients, len)])];
            let bytes = serde_json::to_vec(&keys).unwrap().len();
            assert!(
                (KEYS_BYTES_MAX / 2..=KEYS_BYTES_MAX).contains(&bytes),
                "{} keys, {bytes} bytes",
                keys.len()
            );
        }
        assert_eq!(origins_max(&[key(32, 8192)]), 8);
    }

    #[test]
    fn old_packs_have_their_part_of_the_budget_however_many_are_sparse() {
        let mut packs: Vec<_> = (0..100).map(|day| (pack(day, 0), 1000, 1000)).collect();
        packs.extend((0..50).map(|n| (pack(150, n), 1000, 500)));
        // 8 % of 125,000 are 10,000: 2500 of them for those of the first days, 8000 for the sparse.
        let rewriting = plan(&packs, &[], 160);
        assert_eq!((rewriting.old, rewriting.sparse, rewriting.bytes), (2, 16, 10_000));
        assert!([pack(0, 0), pack(1, 0)].iter().all(|old| rewriting.packs.contains(old)));
        // Of a small cluster one of each, though either is more than the budget.
        let packs = [(pack(0, 0), 1000, 1000), (pack(1, 0), 1000, 900), (pack(150, 0), 1000, 500)];
        assert_eq!(plan(&packs, &[], 160).packs, BTreeSet::from([pack(0, 0), pack(150, 0)]));
        // A sparse one that is old is written once.
        let packs = [(pack(0, 0), 1000, 100), (pack(150, 0), 1000, 1000)];
        let rewriting = plan(&packs, &[], 160);
        assert_eq!((rewriting.old, rewriting.sparse, rewriting.bytes), (1, 0, 100));
    }

    #[test]
    fn old_packs_are_written_again_the_oldest_first_and_behind_the_sparse() {
        let packs: Vec<_> = (0..25).map(|day| (pack(day, 0), 1000, 1000)).collect();
        assert_eq!(plan(&packs, &[], 90).packs, BTreeSet::new());
        // 8 % of 25,000 are 2000.
        let rewriting = plan(&packs, &[], 100);
        assert_eq!(rewriting.packs, BTreeSet::from([pack(0, 0), pack(1, 0)]));
        assert_eq!((rewriting.sparse, rewriting.old), (0, 2));
    }
}
