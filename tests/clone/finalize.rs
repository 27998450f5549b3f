//! A clone becomes an ordinary data directory: started by PostgreSQL's own pg_ctl, with everything the clone held.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::site::{Clone, Source, servers_of};
use crate::support::{
    Account, Checksums, Need, Options, Run, Site, Sql, Stop, bin_directory, mounts_below, require, wait_for,
};

/// A data directory as its owner runs it, without a word of the tests on the command line.
pub struct Native {
    data: PathBuf,
    pub sql: Sql,
}

impl Native {
    #[track_caller]
    pub fn start(data: &Path, socket: &Path, port: u16) -> Self {
        let native = Self { data: data.to_owned(), sql: Sql::at(socket, port) };
        // Beside it: in the directory itself a server would count it as a file of its own.
        let log = PathBuf::from(format!("{}.log", data.display()));
        let start = native.control(&["-w", "-l", log.to_str().unwrap(), "start"]);
        assert!(start.success(), "{}\n{}", start.stderr, fs::read_to_string(&log).unwrap_or_default());
        native
    }

    fn control(&self, arguments: &[&str]) -> Run {
        let pg_ctl = bin_directory(15).expect("the test required it").join("pg_ctl");
        Run::of(Account::of_postgresql().command(pg_ctl).arg("-D").arg(&self.data).args(arguments), "")
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.control(&["-w", "-m", "fast", "stop"]);
    }
}

/// A source with tablespaces from before its basebackup and from after it, whose own file says where its data is.
fn source() -> Source {
    let source = Source::start(Options::default().setting("autovacuum", "off"));
    let conf = source.data_directory().join("postgresql.conf");
    let own = format!("\ndata_directory = '{}'\n", source.data_directory().display());
    fs::write(&conf, fs::read_to_string(&conf).unwrap() + &own).unwrap();
    let folders = ["before", "after"].map(|name| source.scratch().folder(name));
    source.sql(&format!("create tablespace before location '{}'", folders[0].display()));
    source
        .sql("create table old tablespace before as select n, md5(n::text) from generate_series(1, 20000) n");
    source.sql("create table kept as select n, repeat('x', 100) from generate_series(1, 50000) n");
    source.backup_at_rest();
    source.sql(&format!("create tablespace after location '{}'", folders[1].display()));
    source.sql("create table young tablespace after as select n from generate_series(1, 20000) n");
    source.sql("update old set n = -n where n % 2 = 0");
    source.archive_wal();
    source
}

/// Changes a clone in every place and returns what it holds then.
#[track_caller]
fn change(clone: &Clone) -> Checksums {
    clone.sql("insert into young select n from generate_series(1, 1000) n; delete from old where n % 5 = 0");
    clone.sql("create table own as select n from generate_series(1, 5000) n; create database other");
    clone.in_database("other").sql("create table there as select 1 as n");
    Checksums::of(clone)
}

fn path(value: &Value) -> PathBuf {
    PathBuf::from(value.as_str().unwrap())
}

#[track_caller]
fn assert_nothing_runs(source: &Source, folder: &Path) {
    assert!(mounts_below(folder).is_empty());
    let name = folder.display().to_string();
    wait_for("the clone's processes to end", || servers_of(&name).is_empty().then_some(()));
    let (pins, ends) = source.pins();
    assert_eq!(pins, ends, "a pin holds the basebackup");
}

#[test]
fn a_finalized_clone_starts_natively_with_everything_it_held() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("whole", &[]);
    let expected = change(&clone);
    // What a cut-over that was killed leaves.
    clone.sql("create database walden_cutover_0123456789abcdef");
    let folder = clone.folder();
    let report = clone.walden.json(&["clone", "finalize", "whole"]);
    let data = path(&report["data_directory"]);
    assert_eq!(data, folder.join("data"));
    assert_eq!(report["adopted"], false);
    assert_nothing_runs(&source, &folder);
    let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name.to_string_lossy().starts_with("data")), "{left:?}");
    assert!(!data.join(".walden").exists());

    let native = Native::start(&data, &data, clone.port);
    expected.assert_same(&Checksums::of(&native.sql));
    assert_eq!(native.sql.sql("select count(*) from pg_database where datname like 'walden%'"), "0");
    assert_eq!(native.sql.sql("show data_directory"), data.display().to_string(), "not the source's");
    assert_eq!(native.sql.sql("show archive_mode"), "off");
    assert_eq!(native.sql.sql("show listen_addresses"), "");
    let places = native.sql.sql("select pg_tablespace_location(oid) from pg_tablespace where oid > 16000");
    assert_eq!(places.lines().count(), 2);
    for place in places.lines() {
        assert!(place.starts_with(&format!("{}.tablespaces/", data.display())), "{place}");
        assert!(Path::new(place).is_dir());
    }
    native.sql.sql("insert into young values (-7); checkpoint");
    drop(native);
    let native = Native::start(&data, &data, clone.port);
    assert_eq!(native.sql.sql("select count(*) from young where n = -7"), "1");

    // It is nobody's clone any more, and may not archive.
    let gone = clone.walden.try_run(&["clone", "delete", "whole"]);
    assert!(!gone.success() && gone.stderr.contains("no clone any more"), "{}", gone.stderr);
    assert!(data.join("PG_VERSION").exists());
    let history = data.join("pg_wal/00000002.history");
    let pushed = source.walden.try_run(&["wal", "push", history.to_str().unwrap()]);
    assert!(!pushed.success() && pushed.stderr.contains("clone"), "{}", pushed.stderr);

    // Also once the directory was moved away: its tablespaces stay where its links lead.
    drop(native);
    fs::rename(&data, source.scratch().path().join("moved")).unwrap();
    let kept = clone.walden.try_run(&["clone", "delete", "whole"]);
    assert!(!kept.success() && kept.stderr.contains("is no clone"), "{}", kept.stderr);
    assert!(places.lines().all(|place| Path::new(place).is_dir()));
}

/// A place on another file system than the clones'.
fn elsewhere(clones: &Path) -> TempDir {
    let place = tempfile::Builder::new().prefix("walden-test-").tempdir_in("/dev/shm").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    Account::of_postgresql().own(place.path());
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    assert_ne!(device(place.path()), device(clones), "/dev/shm is to be a file system of its own");
    place
}

#[test]
fn a_clone_is_finalized_to_a_named_place_by_renames_and_by_a_copy() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let shm = elsewhere(source.scratch().path());
    for (name, place) in [("near", source.scratch().folder("places")), ("far", shm.path().to_owned())] {
        let clone = source.clone(name, &[]);
        let expected = change(&clone);
        let (folder, to) = (clone.folder(), place.join("main"));
        fs::create_dir_all(&to).unwrap();
        fs::write(to.join("somebody's"), "").unwrap();
        let to_text = to.to_str().unwrap();
        let refused = clone.walden.try_run(&["clone", "finalize", name, "--to", to_text]);
        assert!(refused.stderr.contains("is not an empty directory"), "{}", refused.stderr);
        assert_eq!(clone.state(), "running", "what is refused has stopped nothing");
        fs::remove_file(to.join("somebody's")).unwrap();
        let inside = folder.join("inside");
        let refused = clone.walden.try_run(&["clone", "finalize", name, "--to", inside.to_str().unwrap()]);
        assert!(refused.stderr.contains("in the folder of the clones"), "{}", refused.stderr);

        let report = clone.walden.json(&["clone", "finalize", name, "--to", to_text]);
        assert_eq!(path(&report["data_directory"]), to);
        assert_eq!(report["tablespaces"].as_array().unwrap().len(), 2);
        assert!(!folder.exists());
        assert_nothing_runs(&source, &folder);
        let native = Native::start(&to, &to, clone.port);
        expected.assert_same(&Checksums::of(&native.sql));
    }
}

/// Killed at a place on the way: while it copies, when all is copied, when the directory is released.
#[test]
fn a_finalize_that_is_killed_is_ended_by_the_next() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let shm = elsewhere(source.scratch().path());
    for (name, sign) in [
        ("ordered", None),
        ("copying", Some("main/base")),
        ("copied", Some("main/.walden/copied")),
        ("released", Some("main/PG_VERSION")),
    ] {
        let clone = source.clone(name, &[]);
        let expected = change(&clone);
        let (folder, place) = (clone.folder(), shm.path().join(name));
        let to = place.join("main");
        let is_begun = sign.is_some();
        let sign = sign.map_or_else(|| folder.join("finalize.json"), |sign| place.join(sign));
        let arguments = ["clone", "finalize", name, "--to", to.to_str().unwrap()];
        let mut finalize = clone.walden.start(&arguments);
        wait_for("the finalize to come that far, or to end", || {
            (sign.exists() || finalize.process.try_wait().unwrap().is_some()).then_some(())
        });
        drop(finalize);
        if folder.join("finalize.json").exists() {
            let start = clone.walden.try_run(&["clone", "start", name]);
            assert!(start.stderr.contains("hint: \"walden clone finalize"), "{}", start.stderr);
            // Nothing of it may be in its place yet, and then it can be given up.
            if is_begun {
                assert!(!clone.walden.try_run(&["clone", "delete", name]).success());
            }
            let other = clone.walden.try_run(&["clone", "finalize", name, "--to", "/nonexistent/place"]);
            assert!(other.stderr.contains("already"), "{}", other.stderr);
        }
        if folder.exists() {
            clone.walden.run(&arguments);
        }
        assert!(!folder.exists());
        assert_nothing_runs(&source, &folder);
        let native = Native::start(&to, &to, clone.port);
        expected.assert_same(&Checksums::of(&native.sql));
    }
}

/// Its place was taken after the order was written, as where it ended before its first step: that stays, and the clone can be
/// deleted.
#[test]
fn a_finalize_touches_nothing_that_came_to_its_place_since() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let (clone, to) = (source.clone("late", &[]), source.scratch().folder("taken").join("main"));
    let folder = clone.folder();
    let whole = folder.join("upper/data/.walden/whole");
    wait_for("the clone to be whole", || whole.exists().then_some(()));
    clone.run("stop");
    let spec: Value = serde_json::from_slice(&fs::read(folder.join("clone.json")).unwrap()).unwrap();
    let order = serde_json::json!({
        "format": 1, "name": "late", "site": spec["site"], "owner": spec["owner"], "pin": spec["pin"],
        "data": {"from": folder.join("upper/data"), "to": to}, "wal": folder.join("pg_wal"),
        "tablespaces": [], "settings": [], "is_adopted": false, "is_copied": false,
    });
    fs::write(folder.join("finalize.json"), order.to_string()).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(to.join("PG_VERSION"), "15\n").unwrap();
    for command in ["start", "restart", "reset"] {
        let refused = clone.walden.try_run(&["clone", command, "late"]).expect_code(1);
        assert!(refused.stderr.contains("on its way to be"), "{}", refused.stderr);
    }
    // As one that was asked for before the order was there.
    let late = clone.walden.try_run(&["internal", "serve-clone", "late"]).expect_code(1);
    assert!(late.stderr.contains("on its way to be"), "{}", late.stderr);
    assert!(whole.exists() && mounts_below(&folder).is_empty());
    let arguments = ["clone", "finalize", "late", "--to", to.to_str().unwrap()];
    let refused = clone.walden.try_run(&arguments).expect_code(1);
    assert!(refused.stderr.contains("is not an empty directory"), "{}", refused.stderr);
    assert!(whole.exists());
    clone.run("delete");
    assert!(!folder.exists());
    assert_eq!(fs::read_dir(&to).unwrap().count(), 1);
    assert_nothing_runs(&source, &folder);
}

/// Waiting for what nobody fetches would have no end.
#[test]
fn finalize_fetches_what_a_clone_without_hydration_is_missing() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("lazy", &["--no-hydrate"]);
    let expected = change(&clone);
    assert!(!clone.folder().join("upper/data/.walden/whole").exists());
    // Also of one that is stopped, which has to be started for it.
    clone.run("stop");
    clone.run("finalize");
    let data = clone.folder().join("data");
    let native = Native::start(&data, &data, clone.port);
    expected.assert_same(&Checksums::of(&native.sql));
}

#[test]
fn a_clone_that_recovers_is_not_finalized() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    source.sql("select pg_create_restore_point('here')");
    source.archive_wal();
    let pauses = ["--target-name", "here", "--target-action", "pause", "--no-hydrate", "--expires", "12h"];
    let clone = source.clone("paused", &pauses);
    let description = fs::read(clone.folder().join("clone.json")).unwrap();
    let refused = clone.walden.try_run(&["clone", "finalize", "paused"]);
    assert!(refused.stderr.contains("recovery has not ended"), "{}", refused.stderr);
    assert!(refused.stderr.contains("walden clone promote paused"), "{}", refused.stderr);
    assert_eq!(clone.state(), "paused");
    // Nor one that turns out to when it is started for it; what it was told of its end and of the rest still holds.
    clone.run("stop");
    let refused = clone.walden.try_run(&["clone", "finalize", "paused"]);
    assert!(refused.stderr.contains("recovery has not ended"), "{}", refused.stderr);
    assert_eq!(fs::read(clone.folder().join("clone.json")).unwrap(), description);
    clone.run("promote");
    clone.run("finalize");
    let data = clone.folder().join("data");
    let native = Native::start(&data, &data, clone.port);
    assert_eq!(native.sql.sql("select pg_is_in_recovery()"), "f");
}

/// It goes on as the cluster of its site: on a timeline of its own, whose history and WAL are in the archive.
#[test]
fn an_adopted_clone_archives_into_its_site_and_can_be_backed_up() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut source = source();
    let port = source.port;
    let (clone, rival) = (source.clone("heir", &[]), source.clone("rival", &[]));
    let expected = change(&clone);
    source.cluster.stop(Stop::Fast);
    let to = source.scratch().path().join("heir");
    let report = clone.walden.json(&["clone", "finalize", "heir", "--adopt", "--to", to.to_str().unwrap()]);
    assert_eq!(report["adopted"], true);
    assert!(!to.join("walden.clone").exists());
    // Both came onto timeline 2, and there can be one server on it.
    let refused = rival.walden.try_run(&["clone", "finalize", "rival", "--adopt"]).expect_code(1);
    assert!(refused.stderr.contains("timeline 2, which the clone is on"), "{}", refused.stderr);
    rival.run("start");
    assert_eq!(rival.sql("select count(*) from kept"), "50000");
    rival.run("delete");
    // The source's own configuration holds again: its port, and sockets where this build has them.
    let run = source.scratch().folder("heir-run");
    let conf = to.join("postgresql.conf");
    let lines = format!("\nunix_socket_directories = '{}'\nport = {port}\n", run.display());
    fs::write(&conf, fs::read_to_string(&conf).unwrap() + &lines).unwrap();
    let native = Native::start(&to, &run, port);
    expected.assert_same(&Checksums::of(&native.sql));
    assert_eq!(native.sql.sql("show archive_mode"), "on");
    native.sql.sql("select pg_logical_emit_message(false, 'test', 'a record')");
    let segment = native.sql.sql("select pg_walfile_name(pg_switch_wal())");
    assert!(segment.starts_with("00000002"), "{segment}");
    let archived = format!("select coalesce(last_archived_wal >= '{segment}', false) from pg_stat_archiver");
    wait_for("the segment to be archived", || (native.sql.sql(&archived) == "t").then_some(()));
    source.walden.reconfigure(source.scratch(), &Site::of(&native.sql, &to));
    source.walden.run(&["backup"]);
    let timelines = source.walden.json(&["info"])["clusters"][0]["timelines"].clone();
    assert_eq!(timelines.as_array().unwrap().len(), 2, "{timelines}");
}
