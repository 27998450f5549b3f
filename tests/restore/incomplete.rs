//! What is damaged or incomplete: it fails by name, cannot be started, and is completed by `--resume`.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::source::{Source, wait_until_writable};
use crate::support::{Need, Options, Pgbench, Run, Server, require, wait_for};

/// What is done to the bytes of a pack.
type Damage = fn(&mut Vec<u8>);

/// Says why PostgreSQL refuses to start on a directory.
#[track_caller]
fn refusal(source: &Source, name: &str) -> String {
    let mut server = Server::new(15, &source.place(name), &source.scratch().folder("run"));
    server.try_start().expect_err("the server starts on it")
}

#[track_caller]
fn assert_same(source: &Source, one: &str, other: &str) {
    let mut diff = Command::new("diff");
    diff.args(["-r", "--no-dereference", "-x", "walden.restore.json"])
        .arg(source.place(one))
        .arg(source.place(other));
    Run::of(&mut diff, "").expect_success();
}

/// Failure 27a, and bit-equal results after a kill at any moment.
#[test]
fn a_restore_that_is_killed_cannot_be_started_and_is_completed() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default());
    Pgbench::initialize(&source, 4);
    source.backup();
    source.archive_wal();
    source.restore("whole", &[]);
    let mut killed = Vec::new();
    for (n, delay) in [0, 50, 150].into_iter().enumerate() {
        let name = format!("killed-{n}");
        let directory = source.place(&name);
        let directory = directory.to_str().unwrap();
        let mut restore = source.walden.start(&["restore", "--target-dir", directory]);
        let begun = Path::new(directory).join(".walden/restore.json");
        wait_for("the restore to begin or to end", || {
            (begun.exists() || restore.process.try_wait().unwrap().is_some()).then_some(())
        });
        std::thread::sleep(Duration::from_millis(delay));
        restore.process.kill().unwrap();
        let status = restore.process.wait().unwrap();
        // One that was done is no test.
        if status.signal().is_none() || !begun.exists() {
            continue;
        }
        killed.push(name.clone());
        // After the last rename it is whole, and may be started.
        if !Path::new(directory).join("PG_VERSION").exists() {
            refusal(&source, &name);
            assert!(!Path::new(directory).join("global/pg_control").exists());
            let run = source.walden.try_run(&["restore", "--target-dir", directory]).expect_code(1);
            assert!(run.stderr.contains("--resume"), "{}", run.stderr);
        }
        source.walden.run(&["restore", "--target-dir", directory, "--resume"]);
        assert_same(&source, "whole", &name);
    }
    let first = killed.first().expect("no restore could be killed");
    let mut server = source.server(first);
    server.start();
    crate::source::wait_until_writable(&server);
    assert_eq!(server.sql("select count(*) from pgbench_accounts"), "400000");
}

/// Failure 22: whatever is done to a pack, the restore fails, names it, and what is there cannot be started.
#[test]
fn a_restore_of_damaged_packs_fails_and_cannot_be_started() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default());
    Pgbench::initialize(&source, 1);
    let id = source.backup();
    source.archive_wal();
    let packs = source.walden.repository().join(format!("main/basebackups/{id}/packs"));
    let packs: Vec<PathBuf> = fs::read_dir(packs).unwrap().flatten().map(|entry| entry.path()).collect();
    let damages: [(&str, Damage); 3] = [
        ("flipped", |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }),
        ("cut", |bytes| bytes.truncate(bytes.len() / 2)),
        ("gone", Vec::clear),
    ];
    for (name, damage) in damages {
        let pack = &packs[0];
        let original = fs::read(pack).unwrap();
        let mut bytes = original.clone();
        damage(&mut bytes);
        match bytes.is_empty() {
            true => fs::remove_file(pack).unwrap(),
            false => fs::write(pack, &bytes).unwrap(),
        }
        let directory = source.place(name);
        let run =
            source.walden.try_run(&["restore", "--target-dir", directory.to_str().unwrap()]).expect_code(3);
        assert!(run.stderr.contains("pack ") || run.stderr.contains("packs/"), "{}", run.stderr);
        assert!(run.stderr.contains(&id), "{}", run.stderr);
        assert!(!run.stderr.contains("--resume"), "going on does not help: {}", run.stderr);
        refusal(&source, name);
        fs::write(pack, original).unwrap();
        source.scratch().account().own(pack);
        // The store is well again, so the same restore can be completed.
        source.walden.run(&["restore", "--target-dir", directory.to_str().unwrap(), "--resume"]);
    }
}

/// Failure 22, the rest of it: a pack of another basebackup in its place; and a signer whose word is not taken.
#[test]
fn what_belongs_elsewhere_or_comes_from_strangers_is_not_restored() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default());
    let ids = [source.backup(), source.backup()];
    source.archive_wal();
    let pack = |id: &str| {
        let packs = source.walden.repository().join(format!("main/basebackups/{id}/packs"));
        let mut packs: Vec<PathBuf> =
            fs::read_dir(packs).unwrap().flatten().map(|entry| entry.path()).collect();
        packs.sort();
        packs.remove(0)
    };
    let original = fs::read(pack(&ids[1])).unwrap();
    fs::write(pack(&ids[1]), fs::read(pack(&ids[0])).unwrap()).unwrap();
    let directory = source.place("swapped");
    // By its id: of two that begin in the same second either may be the latest.
    let command = ["restore", &ids[1], "--target-dir", directory.to_str().unwrap()];
    let run = source.walden.try_run(&command).expect_code(3);
    assert!(run.stderr.contains("pack ") || run.stderr.contains("packs/"), "{}", run.stderr);
    refusal(&source, "swapped");
    fs::write(pack(&ids[1]), original).unwrap();

    let folder = source.scratch().path().join("walden");
    let mut create = source.walden.command();
    Run::of(create.args(["key", "create", "--id", "other"]).current_dir(&folder), "").expect_success();
    let configuration = fs::read_to_string(source.walden.configuration_file()).unwrap();
    let other = configuration.replace("trusted_signers = [\"test\"]", "trusted_signers = [\"other\"]")
        + "\n[encryption.keys.other]\nverify_key_file = \"other.verify.pem\"\n";
    assert_ne!(configuration.len(), other.len());
    source.scratch().file("walden/walden.toml", &other);
    let directory = source.place("strange");
    let command = ["restore", "--target-dir", directory.to_str().unwrap()];
    let run = source.walden.try_run(&command).expect_code(3);
    assert!(run.stderr.contains("is not trusted"), "{}", run.stderr);
    assert!(!directory.exists());
    let run = source.walden.run(&[&command[..], &["--allow-unsigned"]].concat());
    assert!(run.stderr.contains("no trusted signer vouches for"), "{}", run.stderr);
    // What the server asks for afterwards is not taken on nobody's word.
    assert!(run.stderr.contains("fetches only WAL of trusted_signers"), "{}", run.stderr);
    source.scratch().file("walden/walden.toml", &configuration);
    let mut server = source.server("strange");
    server.start();
    wait_until_writable(&server);
}
