//! A site over pg_upgrade, a roll-back from it, and a new major version: every cluster archives, every one is restored.

use std::path::{Path, PathBuf};

use crate::checked::edit;
use crate::support::{
    Account, Cluster, Need, Options, Run, Server, Site, Sql, Stop, Walden, require, wait_for,
};

/// The latest basebackup's id.
#[track_caller]
fn newest(walden: &Walden) -> String {
    let list = walden.json(&["list"]);
    let newest =
        list["basebackups"].as_array().unwrap().iter().max_by_key(|b| b["id"].as_str().unwrap().to_owned());
    newest.unwrap()["id"].as_str().unwrap().to_owned()
}

/// Recovers a basebackup to the end of its cluster's archive and returns the rows there.
#[track_caller]
fn rows_of_clone(walden: &Walden, name: &str, basebackup: &str) -> String {
    let walden = walden.as_root();
    let status = walden.json(&["clone", "create", name, "--backup", basebackup]);
    let port = u16::try_from(status["port"].as_u64().unwrap()).unwrap();
    let sql = Sql::at(Path::new(status["socket_directory"].as_str().unwrap()), port);
    let rows = sql.sql("select string_agg(t, ' ' order by t) from r");
    walden.run(&["clone", "delete", name]);
    rows
}

/// Restores a basebackup to disk, starts its version of PostgreSQL on it, and returns the rows at the end of its archive.
#[track_caller]
fn rows_of_restore(walden: &Walden, cluster: &Cluster, major: u32, basebackup: &str) -> String {
    let directory = cluster.scratch().path().join(format!("restored-{basebackup}"));
    walden.run(&["restore", basebackup, "--target-dir", directory.to_str().unwrap()]);
    let mut server = Server::new(major, &directory, &cluster.scratch().folder("run"));
    server.set("archive_mode", "off").start();
    wait_for("recovery to end", || {
        server.try_sql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f").then_some(())
    });
    server.sql("select string_agg(t, ' ' order by t) from r")
}

/// Runs a PostgreSQL program as its account in a folder.
#[track_caller]
fn program(server: &Server, name: &str, folder: &Path, arguments: &[&str]) {
    let mut command = Account::of_postgresql().command(server.bin_directory().join(name));
    Run::of(command.args(arguments).current_dir(folder), "").expect_success();
}

/// Makes a new cluster out of the old one, which is stopped and stays as it is.
#[track_caller]
fn pg_upgrade(old: &Cluster) -> Server {
    let (bin, data) = (old.bin_directory(), old.scratch().folder("new"));
    let path = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let folder = old.scratch().folder("upgrade");
    let initdb =
        ["-D", &path(&data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"];
    program(old, "initdb", &folder, &[&initdb[..], &["--data-checksums"]].concat());
    let (bin, from) = (path(&bin), old.data_directory().to_str().unwrap());
    let places = ["-b", &bin, "-B", &bin, "-d", from, "-D", &path(&data), "-U", "postgres"];
    program(old, "pg_upgrade", &folder, &[&places[..], &["-s", &path(&folder)]].concat());
    let mut server = Server::new(15, &data, &old.scratch().folder("run"));
    server.set("archive_mode", "on").set("fsync", "off");
    server
}

/// Names the new cluster in the configuration, where the old one stood.
fn name_instead(walden: &Walden, old: &Cluster, new: &Server) {
    edit(old.scratch(), walden, &old.connection(), &new.connection());
    let path = |server: &Server| server.data_directory().to_str().unwrap().to_owned();
    edit(old.scratch(), walden, &path(old), &path(new));
}

/// Failure 12a: after pg_upgrade the new cluster's timeline 1 collided with the old one's, and archiving stopped.
#[test]
fn pg_upgrade_and_a_roll_back_from_it_both_keep_archiving() {
    require!(Need::PostgreSQL(15), Need::Program("pg_upgrade"), Need::Fuse, Need::Root);
    let mut old = Cluster::start_with(15, Options::default());
    let walden = Walden::configure(old.scratch(), &Site::of(&old, old.data_directory()));
    old.set_archive_command(&walden.archive_command());
    old.sql("create table r (t text); insert into r values ('common')");
    walden.run(&["backup"]);
    let of_old = newest(&walden);
    old.stop(Stop::Fast);

    let mut new = pg_upgrade(&old);
    new.start();
    name_instead(&walden, &old, &new);
    // From here on its archiver fails, tries again, and loses nothing.
    new.set_archive_command(&walden.archive_command());
    let refused = walden.try_run(&["backup"]).expect_code(1).stderr;
    assert!(refused.contains("is not of this site") && refused.contains("walden site upgrade"), "{refused}");
    let upgraded = walden.json(&["site", "upgrade"]);
    assert_eq!(upgraded["accepted"], true, "{upgraded}");
    assert_eq!(upgraded["other_clusters"].as_array().unwrap().len(), 1, "{upgraded}");
    assert!(walden.run(&["site", "upgrade"]).stdout.contains("was accepted before"));
    new.sql("insert into r values ('new')");
    walden.run(&["backup"]);
    let of_new = newest(&walden);
    assert_ne!(of_old, of_new);
    new.sql("insert into r values ('newer')");
    new.archive_wal();
    new.stop(Stop::Fast);

    // Nothing is configured anew for the roll-back: archive_command asks the data directory whose WAL it is.
    old.start();
    old.sql("insert into r values ('rolled back')");
    old.archive_wal();
    old.stop(Stop::Fast);
    assert_eq!(rows_of_clone(&walden, "old", &of_old), "common rolled back");
    assert_eq!(rows_of_clone(&walden, "new", &of_new), "common new newer");
    assert_eq!(rows_of_restore(&walden, &old, 15, &of_old), "common rolled back");
    assert_eq!(rows_of_restore(&walden, &old, 15, &of_new), "common new newer");
}

#[test]
fn a_new_major_version_archives_into_the_same_site() {
    require!(Need::PostgreSQL(13), Need::PostgreSQL(18));
    let old = Cluster::start_with(13, Options::default());
    let walden = Walden::configure(old.scratch(), &Site::of(&old, old.data_directory()));
    old.set_archive_command(&walden.archive_command());
    old.sql("create table r (t text); insert into r values ('13')");
    walden.run(&["backup"]);
    let of_old = newest(&walden);

    // Of the same size of segments, at the same place in the WAL, on the same timeline.
    let new = Cluster::start_with(18, Options::default());
    name_instead(&walden, &old, &new);
    let pushed = new.data_directory().join("pg_wal/000000010000000000000001");
    let refused = walden.try_run(&["wal", "push", pushed.to_str().unwrap()]).expect_code(1).stderr;
    assert!(refused.contains("is not of this site"), "{refused}");
    walden.run(&["site", "upgrade"]);
    new.set_archive_command(&walden.archive_command());
    new.sql("create table r (t text); insert into r values ('18')");
    walden.run(&["backup"]);
    let of_new = newest(&walden);
    old.sql("insert into r values ('13 later')");
    old.archive_wal();
    new.archive_wal();
    let clusters = walden.json(&["wal", "list"])["clusters"].as_array().unwrap().len();
    let versions = walden.run(&["list"]).stdout;
    assert_eq!(clusters, 2);
    assert!(versions.contains(" 13.") && versions.contains(" 18."), "{versions}");
    assert_eq!(rows_of_restore(&walden, &old, 13, &of_old), "13 13 later");
    assert_eq!(rows_of_restore(&walden, &old, 18, &of_new), "18");
}
