//! A restore that is used while it fills equals its source, and ends as an ordinary data directory under a running server.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::source::{Source, wait_until_writable};
use crate::support::{
    Account, Checksums, Need, Options, Pgbench, Run, Server, Sql, Walden, bin_directory, mounts_below,
    require, wait_for,
};

/// A source whose own files say where a restored server listens.
struct InstantSource {
    source: Source,
    /// Names the restored server without having started it.
    native: Server,
    walden: Walden,
    target: PathBuf,
}

impl InstantSource {
    #[track_caller]
    fn start() -> Self {
        let source = Source::start(Options::default());
        let native = source.server("restored");
        let conf = source.data_directory().join("postgresql.conf");
        let own = format!(
            "\nport = {}\nunix_socket_directories = '{}'\nlisten_addresses = ''\n",
            native.port,
            native.host.display()
        );
        fs::write(&conf, fs::read_to_string(&conf).unwrap() + &own).unwrap();
        let (walden, target) = (source.walden.as_root(), source.place("restored"));
        Self { source, native, walden, target }
    }

    fn sql(&self) -> &Sql {
        &self.native
    }

    #[track_caller]
    fn instant(&self, options: &[&str]) -> Value {
        let words = ["restore", "--instant", "--target-dir", self.target.to_str().unwrap()];
        self.walden.json(&[&words, options].concat())
    }

    fn control(&self, arguments: &[&str]) -> Run {
        let pg_ctl = bin_directory(15).expect("the test required it").join("pg_ctl");
        Run::of(Account::of_postgresql().command(pg_ctl).arg("-D").arg(&self.target).args(arguments), "")
    }

    /// Counts the pins of basebackups, and the objects that end them.
    fn pins(&self) -> (usize, usize) {
        let mut folders = vec![self.source.walden.repository()];
        let (mut pins, mut ends) = (0, 0);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.iter().any(|part| part == "pins") {
                    let is_end = path.extension().is_some_and(|extension| extension == "end");
                    *(if is_end { &mut ends } else { &mut pins }) += 1;
                }
            }
        }
        (pins, ends)
    }
}

#[test]
fn a_restore_that_is_used_at_once_becomes_a_plain_directory_under_its_running_server() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let mut scene = InstantSource::start();
    let folder = scene.source.scratch().folder("space");
    scene.source.sql(&format!("create tablespace space location '{}'", folder.display()));
    scene.source.sql(
        "create table apart tablespace space as select n, md5(n::text) from generate_series(1, 30000) n",
    );
    Pgbench::initialize(&scene.source, 3);
    let load = Pgbench::start(&scene.source, 2);
    let id = scene.source.backup();
    drop(load);
    let sessions = "select count(*) from pg_stat_activity where application_name = 'pgbench'";
    wait_for("the load to be gone", || (scene.source.sql(sessions) == "0").then_some(()));
    scene.source.sql("delete from apart where n % 7 = 0; drop table if exists pgbench_history");
    let expected = Checksums::of(&scene.source);
    scene.source.archive_wal();

    let space = scene.source.place("new-space");
    let map = format!("space={}", space.display());
    let report = scene.instant(&["--target-action", "promote", "--tablespace-map", &map, "--cut-over"]);
    assert_eq!((&report["state"], &report["server"]), (&"plain".into(), &"running".into()), "{report}");
    assert_eq!(report["basebackup"], id.as_str());
    assert_eq!(report["cut_over"], "done", "{report}");
    assert_eq!(report["hydrated_bytes"], report["total_bytes"]);
    assert_eq!(report["tablespaces"][0]["directory"], space.to_str().unwrap());
    assert!(report["answered_after_seconds"].as_f64() <= report["plain_after_seconds"].as_f64(), "{report}");
    expected.assert_same(&Checksums::of(scene.sql()));
    let sql = scene.sql();
    let added = |list: &str, name: &str| {
        let settings = report[list].as_array().unwrap_or_else(|| panic!("no {list}: {report}"));
        let found = settings.iter().find(|setting| setting["name"] == name);
        found.map(|setting| setting["value"].as_str().unwrap().to_owned())
    };
    assert_eq!(added("settings", "restore_command"), Some(sql.sql("show restore_command")), "{report}");
    assert_eq!(added("command_line_settings", "restart_after_crash").as_deref(), Some("off"), "{report}");
    // All that it has from there.
    let given = "select count(*) from pg_settings where source = 'command line'";
    let listed = report["command_line_settings"].as_array().unwrap().len();
    assert_eq!(sql.sql(given), listed.to_string(), "{report}");
    assert!(report["config_settings"].as_array().is_some_and(Vec::is_empty), "{report}");
    assert_eq!(sql.sql("select count(*) from pg_database where datname like 'walden%'"), "0");
    assert_eq!(sql.sql("show archive_mode"), "on", "it is the restored primary");
    sql.sql("create table later as select n from generate_series(1, 10000) n; checkpoint");
    sql.sql("update apart set n = -n where n % 3 = 0");
    let changed = Checksums::of(sql);

    // The mounts stay as long as the server runs, and not longer.
    let mounts = mounts_below(scene.source.scratch().path());
    assert!(mounts.contains(&scene.target) && mounts.contains(&space), "{mounts:?}");
    scene.control(&["-w", "-m", "fast", "stop"]).expect_success();
    wait_for("the mounts to go", || mounts_below(scene.source.scratch().path()).is_empty().then_some(()));
    for directory in [&scene.target, &space] {
        wait_for("the private area to go", || (!directory.join(".walden").exists()).then_some(()));
    }
    assert_eq!(scene.pins(), (1, 1), "nothing holds the basebackup any more");
    assert_nothing_is_left(&scene.target);
    assert_nothing_is_left(&space);
    assert!(fs::symlink_metadata(scene.target.join("pg_wal")).unwrap().is_dir());

    scene.native.set("archive_mode", "off");
    scene.native.start();
    assert_eq!(scene.native.sql("show restart_after_crash"), "on");
    changed.assert_same(&Checksums::of(scene.sql()));
    scene.native.sql("insert into later values (-1); insert into apart values (-1, 'x'); checkpoint");
    scene.native.restart();
    assert_eq!(scene.native.sql("select count(*) from later where n = -1"), "1");
    // What Walden would go on with is not there, and a directory in use is nobody's target.
    let words = ["restore", "--resume", "--target-dir", scene.target.to_str().unwrap()];
    let refused = scene.walden.try_run(&words).expect_code(1);
    assert!(refused.stderr.contains("holds no unfinished restore"), "{}", refused.stderr);
}

/// Everything is killed at once, as by a reboot; the bare directory starts no server, and the restore goes on.
#[test]
fn a_killed_restore_refuses_to_start_bare_and_goes_on_when_it_is_resumed() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = InstantSource::start();
    Pgbench::initialize(&scene.source, 3);
    scene.source.backup();
    scene.source.sql("create table after_it as select n from generate_series(1, 5000) n");
    let expected = Checksums::of(&scene.source);
    scene.source.archive_wal();
    let report = scene.instant(&["--target-action", "promote", "--no-hydrate"]);
    assert_eq!(report["state"], "answering", "{report}");
    scene.sql().sql("create table mine as select n from generate_series(1, 100) n");

    // Whoever restores there meanwhile is told of it.
    let target = scene.target.to_str().unwrap();
    let refused = scene.walden.try_run(&["restore", "--target-dir", target]).expect_code(1);
    assert!(refused.stderr.contains("is being served by process"), "{}", refused.stderr);
    assert!(refused.stderr.contains("--resume"), "{}", refused.stderr);

    let supervisor = i32::try_from(report["supervisor_pid"].as_i64().unwrap()).unwrap();
    let kill =
        |pid: i32| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    kill(supervisor).unwrap();
    let words = ["restore", "--resume", "--target-dir", target, "--no-start"];
    let mounted = scene.walden.json(&words);
    assert_eq!(mounted["state"], "mounted", "{mounted}");
    let supervisor = i32::try_from(mounted["supervisor_pid"].as_i64().unwrap()).unwrap();
    kill(supervisor).unwrap();
    wait_for("the dead mounts to go", || {
        let mounts = mounts_below(&scene.target);
        mounts.iter().for_each(|mount| crate::support::unmount(mount));
        mounts.is_empty().then_some(())
    });
    let bare = scene.control(&["-w", "-l", scene.target.with_extension("log").to_str().unwrap(), "start"]);
    assert!(!bare.success(), "a directory of holes was started");
    assert!(!scene.target.join("PG_VERSION").exists() && !scene.target.join("global/pg_control").exists());

    let resumed =
        scene.walden.json(&["restore", "--resume", "--target-dir", target, "--hydrate-rate", "none"]);
    assert_eq!(resumed["state"], "plain", "{resumed}");
    wait_until_writable(&scene.native);
    assert_eq!(scene.sql().sql("select count(*) from mine"), "100");
    scene.sql().sql("drop table mine");
    expected.assert_same(&Checksums::of(scene.sql()));
    // Told to end, it takes everything down.
    let supervisor = i32::try_from(resumed["supervisor_pid"].as_i64().unwrap()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    wait_for("the mounts to go", || mounts_below(&scene.target).is_empty().then_some(()));
    assert!(scene.target.join("PG_VERSION").exists());
    assert!(!scene.target.join("postmaster.pid").exists(), "the server was stopped first");
}

/// Looks for what only an upper has: the private area, and attributes that lead into a basebackup.
#[track_caller]
fn assert_nothing_is_left(directory: &Path) {
    let mut folders = vec![directory.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type().unwrap())).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            assert!(!name.starts_with(".walden") && !name.contains("tmp.walden"), "{}", path.display());
            if kind.is_dir() {
                folders.push(path);
            }
        }
    }
}
