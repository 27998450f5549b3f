//! A cut-over that cannot come about, since Walden is not let in: the command ends, and says so.

use std::fs;
use std::path::Path;

use crate::instant_scene::{Scene, word};
use crate::support::{Need, Options, Sql, require, wait_for};

/// Restores with a cut-over and what is added to the configuration, and returns what became of it.
#[track_caller]
fn cut_over(settings: &str, access: &str) -> String {
    let scene = Scene::start(Options::default());
    let data = scene.source.data_directory();
    let append = |name: &str, before: &str, after: &str| {
        let path = data.join(name);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{before}{text}{after}")).unwrap();
    };
    // The source has its own on the command line, and does not read these again.
    let port = scene.source.port;
    append("postgresql.conf", "", &format!("\nlisten_addresses = '127.0.0.1'\nport = {port}\n{settings}\n"));
    append("pg_hba.conf", access, "");
    scene.source.backup();
    scene.source.archive_wal();
    let restored = scene.place("restored");
    let report = restored.begin_beside(&["--cut-over"]).report();
    assert_eq!(word(&report, "state"), "plain");
    let sql = Sql::at(Path::new("127.0.0.1"), port);
    wait_for("the restored server to answer", || sql.answers().then_some(()));
    let databases = sql.sql("select count(*) from pg_database where datname like 'walden%'");
    assert_eq!(databases, "0");
    restored.stop();
    restored.assert_plain();
    word(&report, "cut_over").to_owned()
}

#[test]
fn a_server_without_a_socket_is_not_cut_over_and_the_command_ends() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let told = cut_over("unix_socket_directories = ''", "");
    assert!(told.starts_with("not done: ") && told.contains("socket"), "{told}");
}

#[test]
fn a_server_that_refuses_walden_is_not_told_to_be_cut_over() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let told = cut_over("", "local all all reject\n");
    assert!(told.starts_with("not done: ") && told.contains("pg_hba.conf"), "{told}");
}
