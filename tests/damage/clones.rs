//! Clones of a damaged repository: refused before anything is made, or failed and said why; one that runs already
//! answers with an error. Never with other rows.

use std::fs;

use crate::damage::{At, Damage, write};
use crate::source::{Source, files_below};
use crate::support::{Need, Run, Site, require};

/// Where PostgreSQL's sockets of these clones are does not matter: they are asked through `clone psql`.
fn create(source: &Source, name: &str) -> Run {
    // It is met by what the server reads.
    source.walden.as_root().try_run(&["clone", "create", name, "--no-hydrate"])
}

#[test]
fn a_clone_of_what_is_damaged_is_refused_and_leaves_nothing() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let source = Source::create(|site: Site| site);
    let newer = source.basebackup(1);
    let id = &source.ids[1];
    let theirs = |leaf: &str| Damage::ReplaceBy(source.basebackup(0).join(leaf));
    let outcome = format!("backup.json of basebackup {id}");
    let (manifest, refs) = (format!("manifest of basebackup {id}"), format!("refs of basebackup {id}"));
    let history = "timeline history file 00000002.history".to_owned();
    let history_object = source.wal_object("00000002.history");
    for (object, damage, name) in [
        (newer.join("backup.json"), Damage::Flip(At::Middle), &outcome),
        (newer.join("backup.json"), theirs("backup.json"), &outcome),
        (newer.join("manifest"), Damage::Flip(At::Last), &manifest),
        (newer.join("manifest"), Damage::Remove, &manifest),
        (newer.join("refs"), Damage::Flip(At::First), &refs),
        (newer.join("refs"), theirs("refs"), &refs),
        (newer.join("refs"), Damage::Remove, &refs),
        (history_object, Damage::Flip(At::First), &history),
    ] {
        source.restore();
        damage.inflict(&object);
        let refused = create(&source, "refused").expect_code(3);
        assert!(refused.stderr.contains(name), "{damage:?}: {}", refused.stderr);
        assert_nothing_is_left(&source);
    }
}

#[test]
fn a_clone_that_meets_damage_fails_or_answers_with_an_error() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let source = Source::create(|site: Site| site);
    // Before its server is started: what a start needs stands in the first pack.
    let first = source.packs(1).remove(0);
    for damage in [Damage::Truncate, Damage::Remove, Damage::ReplaceBy(source.packs(0).remove(0))] {
        source.restore();
        damage.inflict(&first);
        is_refused(&source, &format!("{damage:?}"));
    }
    source.restore();
    spoil_packs(&source);
    is_refused(&source, "every pack is noise");
    // WAL that has to be replayed is looked through before there is anything to recover.
    source.restore();
    Damage::Flip(At::Middle).inflict(&source.wal_object(&source.segment));
    let refused = create(&source, "refused").expect_code(3);
    assert!(refused.stderr.contains(&source.segment), "{}", refused.stderr);
    assert_nothing_is_left(&source);
    // While it runs: what it has not read yet.
    source.restore();
    create(&source, "runs").expect_code(0);
    let sum = "select count(*), sum(hashtext(text)::numeric) from kept";
    spoil_packs(&source);
    let answer = psql(&source, "runs", sum);
    assert_ne!(answer.code(), Some(0), "wrong rows: {}", answer.stdout);
    assert!(answer.stderr.contains("Input/output error"), "{}", answer.stderr);
    assert_eq!(answer.stdout.trim(), "");
    source.walden.as_root().try_run(&["clone", "duplicate", "runs", "second"]).expect_code(3);
    let list = source.walden.as_root().json(&["clone", "list"]);
    assert_eq!(list["clones"].as_array().map(Vec::len), Some(1), "{list}");
    // Nothing of the damage was kept: with the repository repaired the same server has the source's rows.
    source.restore();
    let answer = psql(&source, "runs", sum).expect_code(0);
    assert_eq!(answer.stdout.trim(), source.cluster.sql(sum));
    source.walden.as_root().run(&["clone", "delete", "runs"]);
    assert_nothing_is_left(&source);
}

/// Asks for a clone whose server cannot be started, and checks that the reason names the object.
fn is_refused(source: &Source, damage: &str) {
    let refused = create(source, "refused").expect_code(3);
    let id = &source.ids[1];
    let names = [format!("of basebackup {id} is damaged"), format!("{id}/packs/0-")];
    assert!(names.iter().any(|name| refused.stderr.contains(name)), "{damage}: {}", refused.stderr);
    assert!(refused.stderr.contains("hint: Use another basebackup"), "{damage}: {}", refused.stderr);
    assert_nothing_is_left(source);
}

/// Makes noise of every pack of the newer basebackup behind its header, in place.
fn spoil_packs(source: &Source) {
    for pack in source.packs(1) {
        let bytes: Vec<u8> = fs::read(&pack).unwrap().iter().map(|byte| byte ^ 0x55).collect();
        write(&pack, &bytes);
    }
}

fn psql(source: &Source, name: &str, sql: &str) -> Run {
    let arguments = ["clone", "psql", name, "--", "-d", "postgres", "-XAtc", sql];
    source.walden.as_root().try_run(&arguments)
}

fn assert_nothing_is_left(source: &Source) {
    let list = source.walden.as_root().json(&["clone", "list"]);
    assert_eq!(list["clones"].as_array().map(Vec::len), Some(0), "{list}");
    let clones = source.walden.repository().with_file_name("clones");
    assert_eq!(files_below(&clones), Vec::<std::path::PathBuf>::new());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&*clones.to_string_lossy()), "{mounts}");
}
