//! Where things go: tablespaces, Debian's configuration, standbys, and directories that hold something already.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use crate::source::{Source, wait_until_writable};
use crate::support::{
    Checksums, DebianCluster, Need, Options, Run, Scratch, Server, Site, Stop, Walden, require, wait_for,
};

/// Failures 13, 25 and 27b: on the source's own host, mapped, without touching the source.
#[test]
fn tablespaces_go_where_they_are_mapped_and_the_source_is_not_touched() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default());
    let (one, two) = (source.scratch().folder("one"), source.scratch().folder("two"));
    source.sql(&format!("create tablespace one location '{}'", one.display()));
    source.sql(&format!("create tablespace two location '{}'", two.display()));
    source.sql("create table here (n int) tablespace one; insert into here select generate_series(1, 1000)");
    source
        .sql("create table there (n int) tablespace two; insert into there select generate_series(1, 2000)");
    let oid = source.sql("select oid from pg_tablespace where spcname = 'two'");
    source.backup();
    source.sql("insert into here select generate_series(1, 1000); checkpoint");
    source.archive_wal();
    let expected = Checksums::of(&source);

    let directory = source.place("restored");
    let words = |map: &[&str]| -> Vec<String> {
        let words = ["restore", "--target-dir", directory.to_str().unwrap()].map(str::to_owned);
        words
            .into_iter()
            .chain(map.iter().flat_map(|map| ["--tablespace-map".to_owned(), (*map).to_owned()]))
            .collect()
    };
    let refused = |map: &[&str], why: &str| {
        let words = words(map);
        let run = source.walden.try_run(&words.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(run.code(), Some(1), "{map:?}");
        assert!(run.stderr.contains(why), "no \"{why}\" in:\n{}", run.stderr);
        assert!(!directory.exists());
    };
    let (new_one, new_two) = (source.place("new-one"), source.place("new-two"));
    let map_one = format!("one={}", new_one.display());
    let map_two = format!("{oid}={}", new_two.display());
    refused(&[], "is not empty");
    refused(&[&map_one], "is not empty");
    refused(&[&map_one, "three=/x"], "no tablespace \"three\"");
    refused(&[&map_one, &format!("two={}", new_one.display())], "in each other's way");
    refused(&[&map_one, &format!("two={}/ts", directory.display())], "in each other's way");
    let words = words(&[&map_one, &map_two]);
    let report = source.walden.json(&words.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(report["tablespaces"][0]["directory"], new_one.to_str().unwrap());

    let mut server = source.server("restored");
    server.start();
    wait_until_writable(&server);
    expected.assert_same(&Checksums::of(&server));
    server.sql("insert into here values (1); insert into there values (1); checkpoint");
    let location = server.sql(&format!("select pg_tablespace_location({oid})"));
    assert_eq!(location, new_two.to_str().unwrap());
    expected.assert_same(&Checksums::of(&source));
    source.sql("select pg_reload_conf()");

    // WAL that would make a tablespace where the source has one now is refused.
    drop(server);
    let three = source.scratch().folder("three");
    source.sql(&format!("create tablespace three location '{}'", three.display()));
    source.sql("create table late (n int) tablespace three");
    source.archive_wal();
    let again = source.place("again");
    let again = ["restore", "--target-dir", again.to_str().unwrap()];
    let maps = ["--tablespace-map", &format!("one={}/x", again[2]), "--tablespace-map"];
    let elsewhere =
        [format!("one={}", source.place("x").display()), format!("two={}", source.place("y").display())];
    let run =
        source.walden.try_run(&[&again[..], &[maps[0], &elsewhere[0], maps[2], &elsewhere[1]]].concat());
    assert_eq!(run.code(), Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("recovery would create tablespace"), "{}", run.stderr);
}

#[test]
fn a_standby_follows_the_archive_and_then_its_primary() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default().initdb("--wal-segsize=1"));
    source.sql("create table marks (n int)");
    source.backup();
    source.sql("insert into marks values (1)");
    source.archive_wal();
    let primary = source.connection();
    source.restore("standby", &["--standby", "--primary-conninfo", &primary]);
    let mut standby = source.server("standby");
    standby.set("primary_conninfo", "").set("wal_retrieve_retry_interval", "100ms");
    standby.start();
    let rows = |server: &Server| server.sql("select count(*) from marks");
    wait_for("the archive to be followed", || (rows(&standby) == "1").then_some(()));
    standby.stop(Stop::Fast);
    // Now with the primary that the restore has named, and WAL that only it has.
    source.sql("insert into marks values (2)");
    let mut standby = source.server("standby");
    standby.start();
    wait_for("the primary to be followed", || (rows(&standby) == "2").then_some(()));
    assert_eq!(standby.sql("select status from pg_stat_wal_receiver"), "streaming");
    assert_eq!(standby.sql("show recovery_target_timeline"), "latest");
    standby.sql("select pg_promote()");
    standby.sql("insert into marks values (3)");
}

/// `initdb --waldir`: the link leads to the source's WAL, which a restored server must not write to.
#[test]
fn a_pg_wal_on_a_volume_of_its_own_becomes_a_directory() {
    require!(Need::PostgreSQL(15));
    let mut source = Source::start(Options::default().initdb("--wal-segsize=1"));
    let volume = source.place("wal");
    source.cluster.stop(Stop::Fast);
    let link = source.data_directory().join("pg_wal");
    fs::rename(&link, &volume).unwrap();
    std::os::unix::fs::symlink(&volume, &link).unwrap();
    source.cluster.start();
    source.sql("create table marks as select generate_series(1, 1000) n");
    source.backup();
    source.sql("insert into marks values (0)");
    source.archive_wal();
    let expected = Checksums::of(&source);

    let report = source.restore("restored", &[]);
    let restored = source.place("restored").join("pg_wal");
    let told = format!(
        "\"{}\" was a link to \"{}\" and becomes what was there",
        restored.display(),
        volume.display()
    );
    let warnings = report["warnings"].as_array().unwrap();
    assert!(warnings.iter().any(|warning| warning == told.as_str()), "{warnings:?}");
    assert!(fs::symlink_metadata(&restored).unwrap().is_dir());
    let mut server = source.server("restored");
    server.start();
    wait_until_writable(&server);
    expected.assert_same(&Checksums::of(&server));
    server.sql("insert into marks values (-1)");
    let timeline = |folder: &Path, number: &str| {
        let names = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.file_name());
        names.filter(|name| name.to_str().unwrap().starts_with(number)).count()
    };
    assert!(timeline(&restored, "00000002") > 0);
    assert_eq!(timeline(&volume, "00000002"), 0, "the restored server wrote to the source's WAL");
    expected.assert_same(&Checksums::of(&source));
}

/// Debian keeps configuration outside PGDATA.
#[test]
fn configuration_outside_the_data_directory_goes_where_it_is_told() {
    require!(Need::DebianCluster);
    let cluster = DebianCluster::start(&[("work_mem", "9MB")]);
    let scratch = Scratch::new();
    let walden = Walden::configure(&scratch, &Site::of(&cluster, &cluster.data_directory()));
    cluster.sql(&format!("alter system set archive_command = '{}'", walden.archive_command()));
    cluster.sql("select pg_reload_conf(); create table marks (n int); insert into marks values (1)");
    walden.run(&["backup"]);

    let bare = scratch.path().join("bare");
    let report = walden.json(&["restore", "--target-dir", bare.to_str().unwrap()]);
    let told = report["warnings"].to_string();
    assert!(told.contains("--config-dir") && told.contains("postgresql.conf"), "{told}");
    let limits = report["settings"].to_string();
    assert!(limits.contains("max_connections"), "{limits}");
    assert!(!bare.join("postgresql.conf").exists());

    let (data, config) = (scratch.path().join("data"), scratch.path().join("config"));
    let places =
        ["restore", "--target-dir", data.to_str().unwrap(), "--config-dir", config.to_str().unwrap()];
    let report = walden.as_root().json(&places);
    assert!(!report["settings"].to_string().contains("max_connections"), "{report}");
    for file in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        let source = fs::read_to_string(cluster.configuration_directory().join(file)).unwrap();
        let restored = fs::read_to_string(config.join(file)).unwrap();
        assert!(restored.starts_with(&source), "{file}");
    }
    let mut server = Server::new(15, &data, &scratch.folder("run"));
    server.set("config_file", config.join("postgresql.conf").to_str().unwrap()).set("archive_mode", "off");
    server.set("ssl", "off");
    server.start();
    wait_until_writable(&server);
    assert_eq!(server.sql("select n from marks"), "1");
    assert_eq!(server.sql("show work_mem"), "9MB");
    assert_eq!(server.sql("show hba_file"), config.join("pg_hba.conf").to_str().unwrap());
    assert_eq!(server.sql("show data_directory"), data.to_str().unwrap());
}

#[test]
fn a_delta_brings_a_directory_back_and_force_replaces_only_what_walden_restored() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default());
    source.sql("create table still as select generate_series(1, 100000) n");
    source.sql("create table busy as select generate_series(1, 1000) n; checkpoint");
    source.backup();
    let expected = Checksums::of(&source);
    let whole = source.restore("a", &["--target", "immediate", "--target-action", "promote"]);
    let mut server = source.server("a");
    server.start();
    wait_until_writable(&server);
    server.sql("update busy set n = n + 1; create table more (n int); checkpoint");
    let directory = source.place("a");
    let command = ["restore", "--target-dir", directory.to_str().unwrap()];
    let running = source.walden.try_run(&[&command[..], &["--delta"]].concat()).expect_code(1);
    assert!(running.stderr.contains("a server is running"), "{}", running.stderr);
    server.stop(Stop::Fast);

    let to = ["--target", "immediate", "--target-action", "promote"];
    let delta = source.restore("a", &[&to[..], &["--delta"]].concat());
    let figure = |report: &serde_json::Value, name: &str| report[name].as_u64().unwrap();
    assert!(figure(&delta, "bytes_restored") < figure(&whole, "bytes_restored") / 4, "{delta}");
    assert!(figure(&delta, "bytes_fetched") < figure(&whole, "bytes_fetched"), "{delta}");
    server.start();
    wait_until_writable(&server);
    expected.assert_same(&Checksums::of(&server));
    server.stop(Stop::Fast);

    let again = source.walden.try_run(&command).expect_code(1);
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);
    source.restore("a", &[&to[..], &["--force"]].concat());
    server.start();
    wait_until_writable(&server);
    expected.assert_same(&Checksums::of(&server));
    server.stop(Stop::Fast);

    // What another put there is not Walden's to replace, and other places are no targets at all.
    let strange = source.scratch().folder("strange");
    source.scratch().file("strange/precious", "x");
    for (place, options, why) in [
        (&strange, &["--force"][..], "was not restored by walden"),
        (&strange, &["--delta"], "no global/pg_control"),
        (&source.cluster.data_directory().to_owned(), &["--force"], "a server is running"),
    ] {
        let run =
            source.walden.try_run(&[&["restore", "--target-dir", place.to_str().unwrap()], options].concat());
        assert_eq!(run.code(), Some(1), "{}", run.stderr);
        assert!(run.stderr.contains(why), "no \"{why}\" in:\n{}", run.stderr);
    }
    assert_eq!(fs::read_to_string(strange.join("precious")).unwrap(), "x");
}

#[test]
fn a_repository_is_no_place_to_restore_into() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let source = Source::start(Options::default());
    source.backup();
    let place = source.walden.repository().join("new");
    let refused = source.walden.try_run(&["restore", "--target-dir", place.to_str().unwrap()]);
    assert!(refused.expect_code(1).stderr.contains("the repository"));
    assert!(!place.exists());
}

#[test]
fn a_restore_by_root_belongs_to_whom_the_directory_does() {
    require!(Need::PostgreSQL(15), Need::Root);
    let source = Source::start(Options::default());
    source.backup();
    let directory = source.place("by-root");
    let by_root = source.walden.as_root();
    let told = by_root.run(&["restore", "--target-dir", directory.to_str().unwrap()]);
    assert!(!told.stderr.contains("cannot be read by user"), "{}", told.stderr);
    let strangers = Run::of(Command::new("find").arg(&directory).args(["-not", "-user", "postgres"]), "");
    assert_eq!(strangers.expect_success().stdout, "");
    let mut server = source.server("by-root");
    server.start();
    wait_until_writable(&server);
    server.stop(Stop::Fast);
    // What root can read and the server cannot is told before it is missed.
    let configuration = source.walden.configuration_file();
    chown(&configuration, Some(0), Some(0)).unwrap();
    fs::set_permissions(&configuration, Permissions::from_mode(0o600)).unwrap();
    let place = source.place("told");
    let told = by_root.run(&["restore", "--target-dir", place.to_str().unwrap(), "--dry-run"]);
    let warning = format!("\"{}\" cannot be read by user postgres", configuration.display());
    assert!(told.stderr.contains(&warning), "{}", told.stderr);
    source.scratch().account().own(&configuration);
    // A directory of another user is refused to an ordinary one.
    let root = tempfile::Builder::new().prefix("walden-test-").tempdir_in("/tmp").unwrap();
    let words = ["restore", "--target-dir", root.path().to_str().unwrap()];
    let run = source.walden.try_run(&words).expect_code(1);
    assert!(run.stderr.contains("belongs to user 0"), "{}", run.stderr);
    assert!(fs::read_dir(Path::new(words[2])).unwrap().next().is_none());
}
