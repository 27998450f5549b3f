//! Settings of a source that reach outside a clone, or keep it from starting (failures 8 and 27c).

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;

use crate::site::{Source, assert_unchanged, listing};
use crate::support::{Need, Options, require};

/// Lines of the source's own `postgresql.auto.conf`, which a clone's server still reads.
fn hostile_settings(outside: &Path) -> String {
    let outside = outside.display();
    format!(
        "synchronous_standby_names = '1 (nobody)'\n\
         recovery_end_command = 'touch {outside}/recovery_end_command'\n\
         archive_cleanup_command = 'touch {outside}/archive_cleanup_command'\n\
         restore_command = 'touch {outside}/restore_command; false'\n\
         external_pid_file = '{outside}/pid'\n\
         log_directory = '{outside}'\nlogging_collector = on\n\
         unix_socket_directories = '{outside}'\nlisten_addresses = '*'\n\
         ssl = on\nssl_cert_file = '/nowhere/server.crt'\n\
         shared_preload_libraries = 'no_such_library'\n\
         session_preload_libraries = 'no_such_library'\n\
         primary_conninfo = 'host=127.0.0.1 port=1'\nprimary_slot_name = 'taken'\n\
         recovery_target_name = 'of another recovery'\n\
         max_logical_replication_workers = 4\n\
         default_transaction_read_only = off\n"
    )
}

#[test]
fn failure_27c_a_clone_of_a_hostile_source_starts_and_touches_nothing() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    // The source itself must not call, and vacuum would touch files between two looks at them.
    let quiet =
        Options::default().setting("max_logical_replication_workers", "0").setting("autovacuum", "off");
    let source = Source::start(quiet);
    let outside = source.scratch().folder("outside");
    let publisher = TcpListener::bind("127.0.0.1:0").unwrap();
    publisher.set_nonblocking(true).unwrap();
    let port = publisher.local_addr().unwrap().port();
    source.sql("create table kept as select n from generate_series(1, 1000) n");
    let subscription = format!(
        "create subscription from_afar connection 'host=127.0.0.1 port={port} dbname=postgres connect_timeout=5' \
         publication everything with (connect = false, slot_name = 'taken')"
    );
    source.sql(&subscription);
    // Enabled before the basebackup: a server that starts with it and has workers calls at once.
    source.sql("alter subscription from_afar enable");
    let data = source.data_directory();
    let auto = data.join("postgresql.auto.conf");
    let settings = fs::read_to_string(&auto).unwrap() + &hostile_settings(&outside);
    fs::write(&auto, settings).unwrap();
    source.scratch().file("data/standby.signal", "");
    source.backup();
    fs::remove_file(data.join("standby.signal")).unwrap();
    source.sql("checkpoint");
    source.archive_wal();
    let archive = source.walden.json(&["wal", "list"]);
    let before = listing(data);

    let clone = source.clone("guest", &[]);
    clone.sql("set statement_timeout = '1s'; insert into kept values (0)");
    clone.sql("create table own as select 1");
    assert_eq!(clone.sql("select pg_is_in_recovery(), count(*) from kept"), "f|1001");
    clone.sql("select pg_switch_wal(); checkpoint");
    let outside_rows = outside.display();
    let own = clone.folder();
    for attempt in [
        // Nor what the supervisor, and whoever finalizes, goes by.
        format!("copy kept to '{}/finalize.json'", own.display()),
        format!("copy kept to program 'rm -rf {0}/clone.json && ! test -e {0}/clone.json'", own.display()),
        format!("copy kept to '{}/upper/data/new'", own.display()),
        format!("copy kept to '{}/config/postgresql.conf'", own.display()),
        format!("copy kept to '{outside_rows}/rows'"),
        format!("copy kept to program 'cat > {outside_rows}/rows'"),
        format!("copy kept to '{}/PG_VERSION'", data.display()),
        "copy kept to '/tmp/walden-clone-was-here'".to_owned(),
    ] {
        clone.try_sql(&attempt).expect_err(&attempt);
    }
    assert_eq!(clone.sql("show archive_mode"), "off");
    clone.run("stop");
    clone.run("start");
    assert_eq!(clone.sql("select count(*) from kept"), "1001");
    clone.run("delete");

    assert_eq!(outside.read_dir().unwrap().count(), 0, "{:?}", listing(&outside).keys());
    assert!(!Path::new("/tmp/walden-clone-was-here").exists());
    assert_eq!(publisher.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "the publisher was called");
    assert_eq!(source.walden.json(&["wal", "list"]), archive);
    // An idle server still writes its statistics; its settings and its tables stay as they were.
    for folder in ["base", "global", "pg_tblspc"] {
        let folder = data.join(folder);
        let files = before.iter().filter(|(path, _)| path.starts_with(&folder) && **path != folder);
        assert_unchanged(&files.map(|(path, file)| (path.clone(), file.clone())).collect(), &folder);
    }
}

/// Replay needs at least the limits of the server that wrote the WAL, and that server was started anew with larger ones.
#[test]
fn limits_that_grew_after_the_basebackup_are_found_in_the_wal() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut source = Source::start(Options::default());
    source.sql("create table kept (n int)");
    source.backup();
    source.cluster.set("max_prepared_transactions", "30").set("max_connections", "150");
    source.cluster.restart();
    for n in 0..20 {
        source.sql(&format!("begin; insert into kept values ({n}); prepare transaction 'p{n}'"));
    }
    source.sql("select pg_create_restore_point('here')");
    source.archive_wal();
    let clone = source.clone("grown", &["--target-name", "here", "--target-action", "pause"]);
    assert_eq!(clone.state(), "paused");
    clone.sql("select pg_wal_replay_resume()");
    crate::support::wait_for("the clone to run", || (clone.state() == "running").then_some(()));
    assert_eq!(clone.sql("select count(*) from pg_prepared_xacts"), "20");
    clone.sql("commit prepared 'p7'");
    assert_eq!(clone.sql("select n from kept"), "7");
    clone.run("delete");
}
