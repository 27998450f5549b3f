//! The read-only mount: ordinary tools on a volume and on virtual directories.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use jiff::Timestamp;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use walden::disk::Owner;
use walden::mount::lower_volume::LowerVolume;
use walden::mount::memory_lower::MemoryLower;
use walden::mount::virtual_dir::{Item, StaticDir, StaticFile};
use walden::mount::{MountError, Tree, unmount};

use crate::harness::{Fixture, run};

const RELATION: u64 = 3 * 1024 * 1024 + 8192;

fn lower() -> Arc<MemoryLower> {
    Arc::new(MemoryLower::build(&[
        ("PG_VERSION", 3),
        ("base/1/16384", RELATION),
        ("base/1/empty", 0),
        ("pg_wal/", 0),
        ("pg_tblspc/16390 -> ../tablespaces/16390", 0),
    ]))
}

fn mount(lower: &Arc<MemoryLower>) -> Option<Fixture> {
    let now: Timestamp = "2026-11-20T10:15:00Z".parse().unwrap();
    let data = Arc::new(LowerVolume::new(lower.clone(), Owner::current()));
    let root = StaticDir::new(now)
        .with("data", Item::Volume(data))
        .with("latest", Item::Symlink(b"data".to_vec()))
        .with("backup.json", Item::File(Arc::new(StaticFile::new("{}\n", now))));
    Fixture::mount(|_| Tree::new(Item::Directory(Arc::new(root)), Owner::current()), true)
}

#[test]
fn ordinary_tools_read_it() {
    let lower = lower();
    let Some(mut fixture) = mount(&lower) else { return };
    assert_eq!(fixture.shell("ls -A"), "backup.json\ndata\nlatest\n");
    assert_eq!(fixture.shell("ls latest/"), "PG_VERSION\nbase\npg_tblspc\npg_wal\n");
    assert_eq!(fixture.shell("cat backup.json; readlink data/pg_tblspc/16390"), "{}\n../tablespaces/16390\n");
    assert_eq!(
        fixture.shell("stat -c '%F %a %s %Y' data/base/1/16384 data/base/1/empty data/pg_wal"),
        format!(
            "regular file 600 {RELATION} 1700000000\nregular empty file 600 0 1700000000\n\
             directory 700 0 1700000000\n"
        )
    );
    let node = lower.at("base/1/16384");
    let expected = lower.content(node, 0..RELATION);
    let copy = fixture.scratch().join("copy");
    fixture.shell(&format!("cp data/base/1/16384 {}", copy.display()));
    assert_eq!(std::fs::read(&copy).unwrap(), expected);
    // Once over everything costs every byte once; again costs nothing, because the kernel kept it.
    let bytes = lower.fetched_bytes();
    assert_eq!(bytes, RELATION);
    fixture.shell("tar cf - . | tar tf - >/dev/null; find . -type f | xargs sha256sum >/dev/null");
    assert_eq!(lower.fetched_bytes(), bytes + 3);
    for refused in
        ["touch data/x", "rm data/PG_VERSION", "echo x >> backup.json", "mkdir y", "mv backup.json z"]
    {
        assert!(fixture.shell_fails(refused).contains("Read-only file system"), "{refused}");
    }
    assert!(fixture.shell_fails("cat data/nowhere").contains("No such file"));
    fixture.mounted.as_mut().unwrap().unmount().unwrap();
    assert_eq!(run(&fixture.point(), "ls -A | wc -l").stdout, b"0\n");
}

#[test]
fn damage_is_an_input_output_error() {
    let lower = lower();
    let Some(fixture) = mount(&lower) else { return };
    lower.damage("base/1/16384");
    assert!(fixture.shell_fails("cat data/base/1/16384 > /dev/null").contains("Input/output error"));
    assert_eq!(fixture.shell("wc -c < data/PG_VERSION"), "3\n");
}

#[test]
fn a_reader_that_waits_for_the_store_can_be_killed() {
    let lower = lower();
    let Some(fixture) = mount(&lower) else { return };
    let store_is_away = lower.gate.clone().try_write_owned().unwrap();
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let before = lower.fetches();
        let mut cat = Command::new("cat")
            .arg(fixture.point().join("data/base/1/16384"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while lower.fetches() == before {
            std::thread::yield_now();
        }
        nix::sys::signal::kill(Pid::from_raw(cat.id() as i32), signal).unwrap();
        assert_eq!(cat.wait().unwrap().signal(), Some(signal as i32));
    }
    drop(store_is_away);
    assert_eq!(fixture.shell("wc -c < data/base/1/16384").trim(), RELATION.to_string());
}

#[test]
fn unmounting_a_mount_in_use_names_who_holds_it() {
    let lower = lower();
    let Some(mut fixture) = mount(&lower) else { return };
    let mut holder =
        Command::new("sleep").arg("600").current_dir(fixture.point().join("data")).spawn().unwrap();
    let refused = fixture.mounted.as_mut().unwrap().unmount().unwrap_err();
    assert!(matches!(refused, MountError::Busy { .. }));
    let text = refused.to_string();
    assert!(text.contains(&format!("process {} (sleep): working directory", holder.id())), "{text}");
    // The refusal did no harm.
    assert_eq!(fixture.shell("wc -c < data/PG_VERSION"), "3\n");
    holder.kill().unwrap();
    holder.wait().unwrap();
    // By path, as `walden unmount` does it from another process.
    unmount(&fixture.point()).unwrap();
    fixture.mounted.as_mut().unwrap().wait();
    assert!(matches!(unmount(&fixture.point()), Err(MountError::NotMounted { .. })));
}
