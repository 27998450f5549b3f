//! `walden check` and `site init`: nothing to say where all is well, and the right line where something is not.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use crate::checked::{Checked, edit};
use crate::support::{Cluster, DebianCluster, Need, Options, Scratch, Site, Stop, Walden, require};

#[test]
fn a_debian_cluster_that_follows_site_init_has_nothing_wrong() {
    require!(Need::DebianCluster, Need::PostgreSQL(15), Need::Fuse);
    let cluster = DebianCluster::start(&[]);
    let scratch = Scratch::new();
    let walden = Walden::configure(&scratch, &Site::of(&cluster, &cluster.data_directory())).as_root();
    Checked::by(&walden, &[]).assert_failed("before init", &["archive_command", "site"]);

    let init = walden.json(&["site", "init", "--wal-timeout", "1"]);
    assert_eq!((&init["created"], &init["settings"][1]["takes"]), (&true.into(), &"nothing".into()));
    let setting = &init["settings"][2];
    assert_eq!((&setting["name"], &setting["takes"]), (&"archive_command".into(), &"reload".into()));
    let again = walden.run(&["site", "init", "--wal-timeout", "1"]).stdout;
    assert!(again.contains("was there before"), "{again}");

    // The line as it is printed, where it belongs.
    let line = again.lines().find_map(|line| line.trim().strip_prefix("archive_command = ")).unwrap();
    cluster.sql(&format!("alter system set archive_command = {line}"));
    cluster.sql("select pg_reload_conf()");
    let checked = Checked::by(&walden, &[]);
    checked.assert_failed("after init", &[]);
    // The archiver may have met the empty command.
    let warned: Vec<&str> = checked.with("warning").into_iter().filter(|name| *name != "archiver").collect();
    assert_eq!((warned, checked.with("skipped")), (Vec::new(), Vec::new()), "{}", checked.run.stdout);
    assert!(checked.detail("WAL round trip").contains("read back and opened"));
    assert!(checked.detail("cluster").contains("is of this site"));
    let text = walden.run(&["check"]).stdout;
    assert_eq!(text.lines().filter(|line| line.starts_with("ok ")).count(), checked.items.len(), "{text}");

    // A host without the private key verifies as far as it can.
    fs::rename(scratch.path().join("walden/test.pem"), scratch.path().join("elsewhere.pem")).unwrap();
    let checked = Checked::by(&walden, &[]);
    checked.assert_failed("no private key", &[]);
    assert!(
        checked.detail("WAL round trip").contains("no private key here opens it"),
        "{}",
        checked.run.stdout
    );
}

/// A source whose archive_command has a configuration of its own, so that breaking the other breaks nothing else.
struct Source {
    cluster: Cluster,
    walden: Walden,
    configuration: String,
}

impl Source {
    #[track_caller]
    fn start() -> Self {
        let cluster = Cluster::start_with(15, Options::default());
        let walden = Walden::configure(cluster.scratch(), &Site::of(&cluster, cluster.data_directory()));
        let configuration = fs::read_to_string(walden.configuration_file()).unwrap();
        cluster.scratch().file("walden/archive.toml", &configuration);
        let source = Self { cluster, walden, configuration };
        source.cluster.set_archive_command(&source.archive_command());
        source.cluster.archive_wal();
        source
    }

    fn archive_command(&self) -> String {
        self.walden.archive_command().replace("walden.toml", "archive.toml")
    }

    /// Checks with `from` replaced by `to` in the configuration.
    #[track_caller]
    fn with(&self, from: &str, to: &str) -> Checked {
        edit(self.cluster.scratch(), &self.walden, from, to);
        let checked = self.check();
        self.cluster.scratch().file("walden/walden.toml", &self.configuration);
        checked
    }

    #[track_caller]
    fn check(&self) -> Checked {
        Checked::by(&self.walden, &["--wal-timeout", "3"])
    }
}

#[test]
fn each_mistake_in_the_configuration_fails_its_own_line() {
    require!(Need::PostgreSQL(15));
    let source = Source::start();
    source.check().assert_failed("nothing is wrong", &[]);
    let (cluster, scratch) = (&source.cluster, source.cluster.scratch());

    cluster.sql("create role plain login; create role secretive login password 'right'");
    let hba = cluster.data_directory().join("pg_hba.conf");
    let rules = format!("local all secretive scram-sha-256\n{}", fs::read_to_string(&hba).unwrap());
    fs::write(&hba, rules).unwrap();
    cluster.sql("select pg_reload_conf()");
    let checked = source.with("user=postgres", "user=secretive password=wrong");
    checked.assert_failed("wrong password", &["connection"]);
    assert_eq!(checked.with("skipped"), ["WAL round trip"]);

    let checked = source.with("user=postgres", "user=plain");
    checked.assert_failed("no rights", &["rights"]);
    let grants = checked.hint("rights").split_once(": ").unwrap().1.to_owned();
    cluster.sql(&grants);
    source.with("user=postgres", "user=plain").assert_failed("rights as the hint grants them", &[]);

    let own = cluster.data_directory().display().to_string();
    let checked = source.with(&own, "/nonexistent");
    checked.assert_failed("wrong data directory", &["data directory"]);
    let other = Cluster::start_with(15, Options::default());
    let checked = source.with(&own, &other.data_directory().display().to_string());
    checked.assert_failed("the directory of another server", &["data directory"]);
    assert!(checked.detail("data directory").contains("system identifier"), "{}", checked.run.stdout);

    // Another server pointed at this site, which nobody meant.
    let connection = |cluster: &Cluster| cluster.connection();
    let (old, new) = (connection(cluster), connection(&other));
    edit(scratch, &source.walden, &own, &other.data_directory().display().to_string());
    let checked = source.with(&old, &new);
    checked.assert_failed("a foreign cluster", &["archive_command", "cluster"]);

    // Each of several servers has its lines; what one lacks says nothing of the other.
    let node = |connection: &str| format!("[[sites.main.nodes]]\nconnection = \"{connection}\"\n");
    let nodes = node(&old) + &node("host=/nonexistent user=postgres");
    let checked = source.with(&format!("connection = \"{old}\"\n"), &nodes);
    checked.assert_failed("a node that does not answer", &["node 2: connection"]);
    assert_eq!(checked.items["node 1: WAL round trip"]["status"], "ok", "{}", checked.run.stdout);

    let checked = source.with(&source.walden.storage(), "url = \"file:///sys/walden\"");
    checked.assert_failed("a store that cannot be written", &["store"]);

    let key = |name: &str| scratch.path().join("walden").join(name);
    fs::rename(key("test.sign.pem"), key("away")).unwrap();
    source.check().assert_failed("a missing key", &["keys to write"]);
    fs::rename(key("away"), key("test.sign.pem")).unwrap();
    fs::set_permissions(key("test.pem"), fs::Permissions::from_mode(0o644)).unwrap();
    let checked = source.check();
    checked.assert_failed("a key that others can read", &["key test"]);
    assert!(checked.hint("key test").starts_with("chmod 600"), "{}", checked.hint("key test"));
}

/// Failing at one of the many files would be the next basebackup's.
#[test]
fn a_file_that_cannot_be_read_fails_the_line_of_the_data_files() {
    require!(Need::PostgreSQL(15), Need::Root);
    let source = Source::start();
    let (cluster, scratch) = (&source.cluster, source.cluster.scratch());
    let space = scratch.folder("space");
    cluster.sql(&format!("create tablespace apart location '{}'", space.display()));
    cluster.sql("create table here (n int); create table there (n int) tablespace apart");
    cluster.sql("insert into here values (1); insert into there values (1)");
    // What is dirty would be written later, to a file that has come to be another's.
    cluster.sql("checkpoint");
    let file = |table: &str| {
        cluster.data_directory().join(cluster.sql(&format!("select pg_relation_filepath('{table}')")))
    };
    let checked = source.check();
    checked.assert_failed("nothing is wrong", &[]);
    let words: Vec<&str> = checked.detail("data files").split(' ').collect();
    assert_eq!((words[0], words[1]), (words[2], "of"), "{words:?}");
    assert!(words[0].parse::<u32>().unwrap() > 500 && words.contains(&"1"), "{words:?}");

    let uid = fs::metadata(file("here")).unwrap().uid();
    let user = nix::unistd::User::from_uid(uid.into()).unwrap().unwrap().name;
    for table in ["here", "there"] {
        let file = file(table);
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        for (owner, mode) in [(uid, 0), (0, 0o600)] {
            chown(&file, Some(owner), None).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            let checked = source.check();
            checked.assert_failed(&format!("{table}: {owner}, {mode:o}"), &["data files"]);
            let (detail, hint) = (checked.detail("data files"), checked.hint("data files"));
            assert!(detail.contains(&format!("/{name}\": Permission denied")), "{detail}");
            assert!(detail.contains("; 1 could not be opened; "), "{detail}");
            let who = format!("runs as user {user} ({uid}) and walden as user {user} ({uid})");
            assert!(hint.contains(&who), "{hint}");
            // Root may read it, and the server may not.
            let checked = Checked::by(&source.walden.as_root(), &["--wal-timeout", "3"]);
            assert_eq!(checked.items["data files"]["status"], "warning", "{}", checked.run.stdout);
            assert!(checked.detail("data files").contains(&name), "{}", checked.run.stdout);
        }
        chown(&file, Some(uid), None).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    source.check().assert_failed("put right", &[]);
}

#[test]
fn each_setting_that_is_wrong_on_the_server_fails_its_own_line() {
    require!(Need::PostgreSQL(15));
    let mut source = Source::start();
    source.cluster.set_archive_command("false");
    let checked = source.check();
    checked.assert_failed("archive_command = false", &["WAL round trip"]);
    assert!(checked.with("warning").contains(&"archive_command"), "{}", checked.run.stdout);
    assert!(checked.hint("WAL round trip").contains("archiver failed with"), "{}", checked.run.stdout);

    source.cluster.set_archive_command(&source.archive_command());
    source.cluster.set("archive_mode", "off");
    source.cluster.restart();
    source.check().assert_failed("archive_mode = off", &["archive_mode"]);

    source.cluster.set("wal_level", "minimal").set("max_wal_senders", "0").set("full_page_writes", "off");
    source.cluster.restart();
    let checked = source.check();
    checked.assert_failed("wal_level = minimal", &["archive_mode", "wal_level"]);
    assert!(checked.with("warning").contains(&"full_page_writes"), "{}", checked.run.stdout);
    source.cluster.stop(Stop::Fast);
}

#[test]
fn a_site_that_receives_its_wal_is_told_of_no_archive_command() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start_with(15, Options::default().setting("archive_mode", "off"));
    let site = Site::of(&cluster, cluster.data_directory()).key("wal = \"receive\"");
    let walden = Walden::configure(cluster.scratch(), &site);
    let init = walden.json(&["site", "init", "--wal-timeout", "1"]);
    let settings = init["settings"].as_array().unwrap();
    assert_eq!(settings.len(), 1, "{init}");
    assert_eq!((&settings[0]["name"], &settings[0]["takes"]), (&"wal_level".into(), &"nothing".into()));
    // Nobody receives yet.
    let failed: Vec<&serde_json::Value> =
        init["check"].as_array().unwrap().iter().filter(|item| item["status"] == "failed").collect();
    assert_eq!(failed.len(), 1, "{init}");
    assert_eq!(failed[0]["name"], "WAL round trip");
    assert!(failed[0]["hint"].as_str().unwrap().contains("walden wal receive"), "{init}");
}
