//! Incremental basebackups of what is damaged: packs of earlier ones that are missing or not as large as they were, and a
//! state of which any byte is another. The basebackup heals the one and does without the other; it is never wrong.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use walden::clock::SystemClock;
use walden::repo::documents::Outcome;
use walden::repo::{self, Repository};
use walden::storage::LocalStore;

use crate::damage::{At, Damage};
use crate::source::files_below;
use crate::support::repository::{keyring_in, site_options};
use crate::support::{Need, Resting, Taken, require};

/// The packs that a basebackup names, the smallest first.
fn packs_of(site: &Resting, taken: &Taken) -> Vec<PathBuf> {
    let repository = site.walden.repository();
    let store = LocalStore::open(&repository, &SystemClock).unwrap();
    let keys = keyring_in(&site.scratch().path().join("walden"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let site = Repository::open(site_options(store, keys, SystemClock)).await.unwrap();
        let (outcome, ..) = repo::read_outcome(&site, taken.id.parse().unwrap()).await.unwrap();
        let Outcome::Complete(record) = outcome else { panic!("{} is not complete", taken.id) };
        let refs = repo::read_refs(&site, &record).await.unwrap();
        let mut packs: Vec<_> = refs.records().iter().filter(|pack| pack.live > 0).collect();
        packs.sort_by_key(|pack| pack.size);
        let keys = packs.iter().map(|pack| site.layout().pack(pack.id, &pack.salt));
        keys.map(|key| repository.join(key.as_str())).collect()
    })
}

/// What a listing of a store shows of a pack: that it is gone, or has another size.
const VISIBLE: [Damage; 4] = [Damage::Remove, Damage::Truncate, Damage::Empty, Damage::Extend];

#[test]
fn packs_that_are_missing_or_of_another_size_are_written_again_from_the_data_directory() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    let full = site.back_up();
    assert_eq!(full.parent, None);
    let mut last = full.clone();
    for damage in VISIBLE {
        for _ in 0..2 {
            site.change();
            last = site.back_up();
        }
        // The largest is most of the cluster, the smallest what one round has changed.
        for is_largest in [true, false] {
            let packs = packs_of(&site, &last);
            assert!(packs.len() > 1, "{packs:?}");
            let pack = &packs[if is_largest { packs.len() - 1 } else { 0 }];
            damage.inflict(pack);
            site.change();
            let healed = site.back_up();
            let what = format!("{damage:?} of {}", pack.display());
            assert_eq!(healed.parent.as_ref(), Some(&last.id), "{what}");
            assert!(!packs_of(&site, &healed).contains(pack), "{what}: it is named again");
            let is_much = healed.stored_bytes > full.stored_bytes / 2;
            assert_eq!(is_much, is_largest, "{what}: {} of {}", healed.stored_bytes, full.stored_bytes);
            site.assert_exact(&healed);
            last = healed;
        }
    }
    // With nothing changed and nothing missing little is written again.
    let idle = site.back_up();
    assert!(idle.stored_bytes < full.stored_bytes / 2, "{} of {}", idle.stored_bytes, full.stored_bytes);
    site.assert_exact(&idle);
}

#[test]
fn all_packs_gone_are_written_again() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    site.back_up();
    site.change();
    let last = site.back_up();
    for pack in packs_of(&site, &last) {
        Damage::Remove.inflict(&pack);
    }
    let healed = site.back_up();
    assert_eq!(healed.parent, Some(last.id), "what is missing is no reason to begin anew");
    site.assert_exact(&healed);
}

/// The state of the site's last basebackup on this host.
fn state_of(site: &Resting, taken: &Taken) -> PathBuf {
    let folder = site.scratch().path().join("walden/state/basebackups");
    let name = format!("{}.pages", taken.id);
    let found = files_below(&folder).into_iter().find(|file| file.ends_with(&name));
    found.unwrap_or_else(|| panic!("{name} is not below {}", folder.display()))
}

/// Overwrites a byte in place, which the owner keeps.
fn flip(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 0x10;
    fs::write(file, bytes).unwrap();
}

/// Takes a basebackup upon a state that is not what it was: it is a full one, says why, and is right.
#[track_caller]
fn assert_full_and_said(site: &Resting, what: &str) -> Taken {
    let taken = site.back_up();
    assert_eq!(taken.parent, None, "{what}");
    let because = "what this host remembers cannot be used";
    assert!(taken.full_because.contains(because), "{what}: {}", taken.full_because);
    site.assert_exact(&taken);
    taken
}

/// How many places of a state are tried, from its first byte to its last.
const PLACES: usize = 16;

/// Hashes are not read before they are compared: damage among them costs the pages they are of, damage anywhere else all of
/// them. Either way nothing that is damaged is believed, nor handed on to the next state.
#[test]
fn a_state_with_any_byte_flipped_costs_what_it_describes_and_is_never_believed() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    let mut last = site.back_up();
    let mut full = Vec::new();
    for n in 0..PLACES {
        site.change();
        let state = state_of(&site, &last);
        let len = fs::metadata(&state).unwrap().len() as usize;
        let at = n * (len - 1) / (PLACES - 1);
        flip(&state, at);
        let taken = site.back_up();
        let what = format!("byte {at} of {len}");
        if taken.parent.is_none() {
            let because = "what this host remembers cannot be used";
            assert!(taken.full_because.contains(because), "{what}: {}", taken.full_because);
            full.push(n);
        } else {
            assert_eq!(taken.parent.as_ref(), Some(&last.id), "{what}");
        }
        site.assert_exact(&taken);
        last = taken;
    }
    assert!(full.contains(&0) && full.contains(&(PLACES - 1)), "header and end: {full:?}");
    site.change();
    let good = site.back_up();
    assert_eq!(good.parent, Some(last.id), "a good state is believed again");
    site.assert_exact(&good);
}

#[test]
fn a_state_that_is_cut_empty_older_or_no_file_costs_a_full_basebackup() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    let mut last = site.back_up();
    for damage in [Damage::Flip(At::Last), Damage::Truncate, Damage::Empty, Damage::Extend] {
        site.change();
        damage.inflict(&state_of(&site, &last));
        last = assert_full_and_said(&site, &format!("{damage:?}"));
    }
    // That of an earlier basebackup under the name of the last.
    let older = fs::read(state_of(&site, &last)).unwrap();
    site.change();
    last = site.back_up();
    assert!(last.parent.is_some());
    fs::write(state_of(&site, &last), &older).unwrap();
    site.change();
    last = assert_full_and_said(&site, "an older one");
    // A folder and a link stand where it stood.
    let state = state_of(&site, &last);
    fs::remove_file(&state).unwrap();
    fs::create_dir(&state).unwrap();
    last = assert_full_and_said(&site, "a folder");
    let state = state_of(&site, &last);
    let away = site.scratch().path().join("away");
    fs::rename(&state, &away).unwrap();
    symlink("/dev/zero", &state).unwrap();
    last = assert_full_and_said(&site, "a link to what never ends");
    site.change();
    let good = site.back_up();
    assert_eq!(good.parent, Some(last.id), "a good state is believed again");
}

/// Retention, or a hand, took what the state builds on: every way in which that shows.
#[test]
fn a_parent_that_is_expired_gone_or_another_costs_a_full_basebackup() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    let basebackups = site.walden.repository().join("main/basebackups");
    let mut last = site.back_up();
    let object = |taken: &Taken, name: &str| basebackups.join(&taken.id).join(name);
    type Done<'a> = &'a dyn Fn(&Taken);
    let expired: Done<'_> = &|last| {
        let mark = object(last, "expired");
        fs::copy(object(last, "begin"), &mark).unwrap();
        site.scratch().account().own(&mark);
    };
    let no_outcome: Done<'_> = &|last| fs::remove_file(object(last, "backup.json")).unwrap();
    let gone: Done<'_> = &|last| fs::remove_dir_all(basebackups.join(&last.id)).unwrap();
    let no_refs: Done<'_> = &|last| Damage::Remove.inflict(&object(last, "refs"));
    let bad_refs: Done<'_> = &|last| Damage::Flip(At::Middle).inflict(&object(last, "refs"));
    let bad_outcome: Done<'_> = &|last| Damage::Flip(At::Middle).inflict(&object(last, "backup.json"));
    let cases = [
        ("expired", expired),
        ("no outcome", no_outcome),
        ("no refs", no_refs),
        ("damaged refs", bad_refs),
        ("gone", gone),
        ("a damaged outcome", bad_outcome),
    ];
    for (what, doing) in cases {
        site.change();
        doing(&last);
        if what == "a damaged outcome" {
            // "walden list" fails from now on, and rightly so.
            let report = site.walden.json(&["backup"]);
            assert!(report["full_because"].as_str().unwrap().contains(&last.id), "{what}: {report}");
            break;
        }
        let taken = site.back_up();
        assert_eq!(taken.parent, None, "{what}");
        assert!(taken.full_because.contains(&last.id), "{what}: {}", taken.full_because);
        site.assert_exact(&taken);
        last = taken;
    }
}

/// A host that was restored from a backup of its own remembers an older basebackup: that is what the next one is compared
/// with, however many there are by now.
#[test]
fn a_state_that_was_put_back_from_a_copy_builds_upon_the_basebackup_it_is_of() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    let first = site.back_up();
    let (state, copy) = (state_of(&site, &first), site.scratch().path().join("copy"));
    fs::copy(&state, &copy).unwrap();
    let mut last = first.clone();
    for _ in 0..2 {
        site.change();
        last = site.back_up();
    }
    assert!(!state.exists(), "a state is kept no longer than it is of use");
    fs::remove_file(state_of(&site, &last)).unwrap();
    fs::copy(&copy, &state).unwrap();
    site.scratch().account().own(&state);
    site.change();
    let next = site.back_up();
    assert_eq!(next.parent.as_ref(), Some(&first.id), "not the newest, {}", last.id);
    site.assert_exact(&next);
    // Both that were taken meanwhile are as whole as they were.
    site.assert_exact(&last);
    site.assert_exact(&first);
}

/// Bytes that rot under the same size show in no listing. Who reads them is told which pack it is, and of which
/// basebackup; a full one owes nothing to it.
#[test]
fn a_rotten_pack_of_a_parent_is_named_by_whoever_reads_it_and_a_full_basebackup_does_without() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    let full = site.back_up();
    let pack = packs_of(&site, &full).pop().expect("a basebackup has a pack");
    Damage::Flip(At::Middle).inflict(&pack);
    site.change();
    let upon_it = site.back_up();
    assert_eq!(upon_it.parent.as_ref(), Some(&full.id));
    let target = site.scratch().path().join("rotten");
    let run = site.walden.try_run(&["restore", &upon_it.id, "--target-dir", target.to_str().unwrap()]);
    assert_eq!(run.code(), Some(3), "{}", run.stderr);
    assert!(run.stderr.contains(&full.id), "{}", run.stderr);
    let report = site.walden.json(&["backup", "--full"]);
    assert_eq!(report["full_because"], "as asked for");
    site.assert_exact(&site.taken(report["id"].as_str().unwrap()));
}
