//! A basebackup of a busy cluster, mounted: ordinary tools, PostgreSQL's own, and a server on a copy of it.

use std::fs;

use crate::scene::{copy_all, recover, shell};
use crate::support::{Account, Chaos, Checksums, Cluster, Mounted, Need, Options, Run, Server, Site};
use crate::support::{Stop, Walden, require};

/// A cluster with a tablespace and a load, backed up once.
struct BackedUp {
    cluster: Cluster,
    walden: Walden,
}

impl BackedUp {
    fn new(major: u32) -> Self {
        let cluster = Cluster::start_with(major, Options::default());
        let site = Site::of(&cluster, cluster.data_directory()).bin_directory(&cluster.bin_directory());
        let walden = Walden::configure(cluster.scratch(), &site);
        cluster.set_archive_command(&walden.archive_command());
        let tablespace = cluster.scratch().folder("tablespace");
        cluster.sql(&format!("create tablespace away location '{}'", tablespace.display()));
        cluster.sql("create table far tablespace away as select n from generate_series(1, 10000) n");
        let load = Chaos::start(&cluster);
        load.wait_for_churn(1);
        walden.run(&["backup"]);
        load.finish();
        Self { cluster, walden }
    }

    fn mount(&self) -> Mounted {
        let walden =
            if nix::unistd::geteuid().is_root() { self.walden.as_root() } else { self.walden.clone() };
        walden.mount(&self.cluster.scratch().folder("mnt"))
    }
}

#[test]
fn ordinary_tools_and_the_servers_own_read_a_mounted_basebackup() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = BackedUp::new(15);
    let mount = source.mount();
    let point = mount.path();
    let latest = shell(point, "readlink basebackups/latest");
    let id = latest.trim();
    assert_eq!(shell(point, "ls basebackups"), format!("{id}\nlatest\n"));
    assert_eq!(shell(point, "ls -A basebackups/latest/"), "backup.json\ndata\nlinks.txt\ntablespaces\nwal\n");
    shell(point, "ls -lR . > /dev/null");
    let files = shell(point, "find basebackups -type f | sort | xargs sha256sum | sha256sum");
    assert_eq!(shell(point, "find basebackups -type f | sort | xargs sha256sum | sha256sum"), files);
    shell(point, "tar cf - basebackups clusters | tar tf - > /dev/null");
    let record: serde_json::Value =
        serde_json::from_str(&shell(point, "cat basebackups/latest/backup.json")).unwrap();
    assert_eq!((record["outcome"].as_str(), record["id"].as_str()), (Some("complete"), Some(id)));
    // Links stay within the mount; the map that would make others is not there.
    let links = shell(point, "cd basebackups/latest/data && find . -type l -printf '%p %l\\n'");
    let (link, target) = links.trim().split_once(' ').unwrap();
    assert!(link.starts_with("./pg_tblspc/") && target.starts_with("../../tablespaces/"), "{links}");
    assert!(!shell(point, &format!("ls basebackups/latest/data/{link}/")).is_empty());
    shell(
        point,
        "test ! -e basebackups/latest/data/tablespace_map && test -s basebackups/latest/data/backup_label",
    );
    shell(point, "ls basebackups/latest/wal/ | grep -q backup");
    let bin = source.cluster.bin_directory();
    let data = point.join("basebackups/latest/data");
    let control = Run::of(Account::of_postgresql().command(bin.join("pg_controldata")).arg(&data), "");
    assert!(control.expect_success().stdout.contains("Database system identifier"));
    let mut verify = Account::of_postgresql().command(bin.join("pg_verifybackup"));
    Run::of(verify.arg("-n").arg(&data), "").expect_success();
    // Mounted once, it shows what comes later.
    source.walden.run(&["backup", "--label", "second"]);
    assert_ne!(shell(point, "readlink basebackups/latest"), latest);
    let unmounted = source.walden.as_root().run(&["unmount", point.to_str().unwrap()]);
    assert!(unmounted.stdout.contains("Unmounted"));
    drop(mount);
    drop(source);
}

#[test]
fn a_copy_of_the_mount_recovers_with_fetch_and_its_own_plan_on_13() {
    a_copy_of_the_mount_recovers(13);
}

#[test]
fn a_copy_of_the_mount_recovers_with_fetch_and_its_own_plan_on_15() {
    a_copy_of_the_mount_recovers(15);
}

#[test]
fn a_copy_of_the_mount_recovers_with_fetch_and_its_own_plan_on_18() {
    a_copy_of_the_mount_recovers(18);
}

fn a_copy_of_the_mount_recovers(major: u32) {
    require!(Need::PostgreSQL(major), Need::Fuse);
    let mut source = BackedUp::new(major);
    source.cluster.sql("create table later as select n from generate_series(1, 1000) n");
    source.cluster.archive_wal();
    let expected = Checksums::of(&source.cluster);
    source.cluster.stop(Stop::Fast);
    let mount = source.mount();
    let scratch = source.cluster.scratch();
    let copy = scratch.path().join("restored");
    copy_all(&mount.path().join("basebackups/latest/"), &copy);
    fs::remove_file(copy.join("wal")).unwrap();
    scratch.file("restored/data/recovery.signal", "");
    let mut server = Server::new(major, &copy.join("data"), &scratch.folder("run"));
    server.set("restore_command", &source.walden.restore_command()).set("hot_standby", "off");
    server.set("archive_mode", "off");
    recover(&mut server).unwrap();
    expected.assert_same(&Checksums::of(&server));
    server.stop(Stop::Fast);
    drop(mount);
}

/// Failure 22, on the mount: a damaged object is an error that names it, and never other bytes.
#[test]
fn damaged_data_is_an_error_and_a_line_in_the_log() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = BackedUp::new(15);
    let repository = source.walden.repository();
    let packs = shell(&repository, "find . -path '*/packs/*' -type f");
    for pack in packs.lines() {
        let path = repository.join(pack);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        fs::write(&path, bytes).unwrap();
    }
    let mount = source.mount();
    let point = mount.path();
    let failed = shell(
        point,
        "find basebackups -type f -not -path '*/latest/*' -print0 | xargs -0 -n 1 cat 2>&1 >/dev/null || true",
    );
    assert!(failed.contains("Input/output error"), "{failed}");
    let log = shell(source.walden.configuration_file().parent().unwrap(), "cat state/log/*");
    assert!(log.contains("ERROR") && log.contains("pack"), "{log}");
    drop(mount);
}

/// Failure 33: mounting over the repository itself deadlocked.
#[test]
fn a_mount_over_or_inside_what_it_reads_is_refused() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Folder);
    let source = BackedUp::new(15);
    let walden = source.walden.as_root();
    let repository = source.walden.repository();
    let inside = repository.join("inside");
    fs::create_dir(&inside).unwrap();
    for folder in [repository.as_path(), repository.parent().unwrap(), &inside] {
        let refused = walden.try_run(&["mount", folder.to_str().unwrap()]).expect_code(2);
        assert!(refused.stderr.contains("error: "), "{}", refused.stderr);
    }
    let missing = repository.with_file_name("nowhere");
    let refused = walden.try_run(&["mount", missing.to_str().unwrap()]).expect_code(2);
    assert!(refused.stderr.contains("hint: Create it first"), "{}", refused.stderr);
}
