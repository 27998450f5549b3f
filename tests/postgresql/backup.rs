//! Basebackups of real servers under load: taken by the binary, read back through the library, started again.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use walden::clock::SystemClock;
use walden::codec::SystemRandom;
use walden::pg::{ControlFile, Lsn};
use walden::repo::entry::{Node, TreePath};
use walden::repo::{Basebackup, BasebackupId, FileReader, Repository};
use walden::storage::LocalStore;

use crate::session::runtime;
use crate::support::repository::{site_options, unencrypted};
use crate::support::{
    Account, Chaos, Checksums, Cluster, DebianCluster, Ledger, Need, Options, Pgbench, Run, Scratch, Server,
    Site, Sql, Stop, Walden, require,
};

/// A basebackup opened through the library, in a repository without encryption.
pub struct Opened {
    pub reader: FileReader,
    runtime: tokio::runtime::Runtime,
}

impl Opened {
    pub fn open(repository: &Path, id: &str) -> Self {
        let runtime = runtime();
        let id: BasebackupId = id.parse().unwrap();
        let reader = runtime.block_on(async {
            let store = LocalStore::open(repository, &SystemClock).unwrap();
            let options = site_options(store, unencrypted(SystemRandom), SystemClock);
            let repository = Repository::open(options).await.unwrap();
            FileReader::new(Arc::new(Basebackup::open(&repository, id).await.unwrap()), 64 << 20)
        });
        Self { reader, runtime }
    }

    pub fn record(&self) -> walden::repo::documents::BackupRecord {
        self.reader.basebackup().record().clone()
    }

    pub fn file(&self, path: &str) -> Vec<u8> {
        self.runtime.block_on(async {
            let path = TreePath::new(path).unwrap();
            let (_, entry) = self.reader.basebackup().entry(&path).await.unwrap().expect("the file is there");
            self.reader.read(&entry, 0..entry.size()).await.unwrap().to_vec()
        })
    }

    pub fn paths(&self) -> Vec<String> {
        self.runtime.block_on(async {
            let mut paths = Vec::new();
            for n in 0..self.reader.basebackup().block_count() {
                let block = self.reader.basebackup().block(n).await.unwrap();
                paths.extend(block.iter().map(|entry| entry.path.to_string()));
            }
            paths
        })
    }

    /// Writes the trees out as a data directory, with tablespaces in folders beside it.
    pub fn restore(&self, scratch: &Scratch, name: &str) -> PathBuf {
        let target = scratch.path().join(name);
        fs::create_dir(&target).unwrap();
        self.runtime.block_on(async {
            for n in 0..self.reader.basebackup().block_count() {
                let block = self.reader.basebackup().block(n).await.unwrap();
                for entry in block.iter() {
                    let path = target.join(std::ffi::OsStr::from_bytes(entry.path.as_bytes()));
                    fs::create_dir_all(path.parent().unwrap()).unwrap();
                    match &entry.node {
                        Node::Directory => fs::create_dir_all(&path).unwrap(),
                        Node::Symlink(text) => symlink(std::ffi::OsStr::from_bytes(text), &path).unwrap(),
                        Node::File { .. } => {
                            let bytes = self.reader.read(entry, 0..entry.size()).await.unwrap();
                            fs::write(&path, bytes).unwrap();
                        }
                    }
                    if !matches!(entry.node, Node::Symlink(_)) {
                        fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode)).unwrap();
                    }
                }
            }
        });
        for tablespace in &self.reader.basebackup().start().tablespaces {
            if !tablespace.location.is_empty() {
                let link = target.join(format!("data/pg_tblspc/{}", tablespace.oid));
                symlink(target.join(format!("tablespaces/{}", tablespace.oid)), link).unwrap();
            }
        }
        Run::of(Command::new("chown").args(["-R", "-h", "postgres:"]).arg(&target), "").expect_success();
        target.join("data")
    }
}

/// A cluster that archives through walden, and walden.
pub fn archiving(cluster: &Cluster) -> Walden {
    let site = Site::of(cluster, cluster.data_directory()).unencrypted();
    let walden = Walden::configure(cluster.scratch(), &site);
    cluster.set_archive_command(&walden.archive_command());
    walden
}

pub fn id_of(outcome: &serde_json::Value) -> &str {
    outcome["id"].as_str().unwrap()
}

/// Holds a copy against its `backup_manifest`; the builds of other versions come without the program for it.
pub fn verify_backup(cluster: &Cluster, data: &Path) {
    let verify = cluster.bin_directory().join("pg_verifybackup");
    if verify.exists() {
        Run::of(Account::of_postgresql().command(verify).arg("-n").arg(data), "").expect_success();
    } else {
        assert_ne!(cluster.major(), 15, "Debian has pg_verifybackup");
        eprintln!("SKIPPED: {} does not exist", verify.display());
    }
}

/// Starts a copy and lets it replay the archive to its end.
pub fn recover(walden: &Walden, major: u32, data: &Path, run: &Path) -> Server {
    let mut copy = Server::new(major, data, run);
    copy.set("restore_command", &walden.restore_command()).set("archive_mode", "off");
    fs::write(data.join("recovery.signal"), "").unwrap();
    Account::of_postgresql().own(&data.join("recovery.signal"));
    copy.start();
    crate::support::wait_for("the end of recovery", || {
        (copy.sql("select pg_is_in_recovery()") == "f").then_some(())
    });
    copy
}

/// Failures 13 and 16: a tablespace, and files that come, grow, shrink and go while they are read.
fn a_basebackup_under_load_starts_after_replay(major: u32) {
    require!(Need::PostgreSQL(major));
    let mut cluster = Cluster::start(major);
    let space = cluster.scratch().folder("space");
    cluster.sql(&format!("create tablespace fast location '{}'", space.display()));
    cluster.sql("create unlogged table forgotten as select generate_series(1, 1000) n");
    cluster
        .sql("create table kept tablespace fast as select n, md5(n::text) from generate_series(1, 20000) n");
    let walden = archiving(&cluster);
    let chaos = Chaos::start(&cluster);
    chaos.wait_for_churn(2);
    let outcome = walden.json(&["backup", "--label", "under load"]);
    assert_eq!(outcome["damaged_pages"], 0, "{outcome}");
    chaos.wait_for_churn(2);
    let acknowledged = chaos.finish().acknowledged();
    cluster.archive_wal();

    let opened = Opened::open(&walden.repository(), id_of(&outcome));
    let paths = opened.paths();
    for left_out in
        ["data/postmaster.pid", "data/pg_wal/", "data/global/pg_internal.init", "data/pg_tblspc/1"]
    {
        assert!(!paths.iter().any(|path| path.starts_with(left_out)), "{left_out}");
    }
    let control = ControlFile::parse(&opened.file("data/global/pg_control")).unwrap();
    let record = opened.reader.basebackup().record().clone();
    assert_eq!(control.system_identifier, record.cluster.system_identifier);
    assert!(control.redo >= record.start_lsn && record.start_lsn < record.stop_lsn);
    let label = String::from_utf8(opened.file("data/backup_label")).unwrap();
    assert!(label.contains(&format!("START WAL LOCATION: {}", record.start_lsn)), "{label}");
    assert!(label.contains("LABEL: under load"), "{label}");

    let data = opened.restore(cluster.scratch(), "copy");
    verify_backup(&cluster, &data);
    let source = Checksums::of(&cluster);
    let run = cluster.scratch().folder("run-copy");
    let copy = recover(&walden, major, &data, &run);
    Ledger::assert_holds(&copy, acknowledged);
    source.assert_same(&Checksums::of(&copy));
    assert_eq!(copy.sql("select count(*) from forgotten"), "0");
    drop(copy);
    cluster.stop(Stop::Fast);
}

#[test]
fn failure_16_a_basebackup_of_15_under_load_starts_after_replay() {
    a_basebackup_under_load_starts_after_replay(15);
}

#[test]
fn failure_16_a_basebackup_of_13_under_load_starts_after_replay() {
    a_basebackup_under_load_starts_after_replay(13);
}

#[test]
fn failure_16_a_basebackup_of_18_under_load_starts_after_replay() {
    a_basebackup_under_load_starts_after_replay(18);
}

#[test]
fn no_page_is_called_damaged_in_backups_under_load_and_a_damaged_one_is() {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    let chaos = Chaos::start(&cluster);
    for _ in 0..20 {
        chaos.wait_for_commits(20);
        let outcome = walden.json(&["backup"]);
        assert_eq!(outcome["damaged_pages"], 0, "{outcome}");
    }
    chaos.finish();
    cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 50000) n; checkpoint");
    let file = cluster.sql("select pg_relation_filepath('t')");
    cluster.stop(Stop::Fast);
    let path = cluster.data_directory().join(&file);
    let mut bytes = fs::read(&path).unwrap();
    bytes[3 * 8192 + 4000] ^= 0x10;
    fs::write(&path, &bytes).unwrap();
    cluster.start();
    let run = walden.run(&["backup", "--json"]);
    assert!(run.stdout.contains("\"damaged_pages\": 1"), "{}", run.stdout);
    assert!(run.stderr.contains(&format!("data/{file}")) && run.stderr.contains("block 3"), "{}", run.stderr);
    let listed = walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().last().unwrap()["damaged_pages"], 1);
}

#[test]
fn a_debian_clusters_configuration_outside_pgdata_is_kept() {
    require!(Need::DebianCluster, Need::PostgreSQL(15));
    let cluster = DebianCluster::start(&[("archive_mode", "on"), ("archive_command", "/bin/true")]);
    let scratch = Scratch::new();
    let walden = Walden::configure(&scratch, &Site::of(&cluster, &cluster.data_directory()).unencrypted());
    cluster.sql(&format!("alter system set archive_command = '{}'", walden.archive_command()));
    cluster.sql("select pg_reload_conf()");
    let outcome = walden.json(&["backup"]);
    let opened = Opened::open(&walden.repository(), id_of(&outcome));
    let names = opened.reader.basebackup().record().server.outside_configuration.clone();
    let etc = cluster.configuration_directory();
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        let name = etc.strip_prefix("/").unwrap().join(name).display().to_string();
        assert!(names.contains(&name), "{names:?}");
        assert_eq!(opened.file(&format!("config/{name}")), fs::read(Path::new("/").join(&name)).unwrap());
    }
}

#[test]
fn what_cannot_become_a_basebackup_is_refused_and_leaves_none() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start_with(15, Options::default().setting("archive_mode", "off"));
    let walden =
        Walden::configure(cluster.scratch(), &Site::of(&cluster, cluster.data_directory()).unencrypted());
    let refused = walden.try_run(&["backup"]).expect_code(2);
    assert!(refused.stderr.contains("archive_mode is off"), "{}", refused.stderr);

    let cluster = Cluster::start(15);
    let walden =
        Walden::configure(cluster.scratch(), &Site::of(&cluster, cluster.data_directory()).unencrypted());
    let refused = walden.try_run(&["backup"]).expect_code(2);
    assert!(refused.stderr.contains("archive_command is empty"), "{}", refused.stderr);
    drop(cluster);

    let cluster = Cluster::start(15);
    let other = Cluster::start(15);
    let walden =
        Walden::configure(cluster.scratch(), &Site::of(&cluster, other.data_directory()).unencrypted());
    cluster.set_archive_command(&walden.archive_command());
    let refused = walden.try_run(&["backup"]).expect_code(2);
    assert!(refused.stderr.contains("different servers"), "failure 21a: {}", refused.stderr);

    let walden = archiving(&cluster);
    cluster.set_archive_command("/bin/false");
    let refused = walden.try_run(&["backup", "--wal-timeout", "3"]).expect_code(1);
    assert!(refused.stderr.contains("did not arrive in the archive"), "{}", refused.stderr);
    let listed = walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 0, "{listed}");
    assert_eq!(listed["unfinished"].as_array().unwrap().len(), 1, "{listed}");
    fs::write(cluster.data_directory().join("walden.clone"), "name = scratch\n").unwrap();
    let refused = walden.try_run(&["backup"]).expect_code(2);
    assert!(refused.stderr.contains("clone \"scratch\""), "{}", refused.stderr);
}

#[test]
fn failure_17_a_terminated_or_killed_backup_leaves_the_server_and_no_basebackup() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    Pgbench::initialize(&cluster, 5);
    let walden = archiving(&cluster);
    walden.json(&["backup"]);
    cluster.set_archive_command("/bin/false");
    let unfinished = || walden.json(&["list"])["unfinished"].as_array().unwrap().len();
    for (before, signal) in ["-TERM", "-KILL"].into_iter().enumerate() {
        // Without an archive it never ends by itself: it waits for WAL after the copy.
        let mut child = walden.command().arg("backup").spawn().unwrap();
        crate::support::wait_for("the attempt to begin", || (unfinished() > before).then_some(()));
        Run::of(Command::new("kill").args([signal, &child.id().to_string()]), "").expect_success();
        let status = child.wait().unwrap();
        assert_eq!(status.code(), if signal == "-TERM" { Some(1) } else { None }, "{status}");
    }
    let backends = "select count(*) from pg_stat_activity where application_name = 'walden'";
    crate::support::wait_for("the sessions to end", || (cluster.sql(backends) == "0").then_some(()));
    let listed = walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(listed["unfinished"].as_array().unwrap().len(), 2, "{listed}");
}

#[test]
fn a_lost_session_fails_the_backup_while_it_copies() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    let sparse = sparse_file(&cluster, "sparse", 256);
    let mut child = walden.command().arg("backup").spawn().unwrap();
    let sessions = "from pg_stat_activity where application_name = 'walden'";
    crate::support::wait_for("the copy of the large file", || reads(&child, &sparse).then_some(()));
    assert_eq!(cluster.sql(&format!("select count(pg_terminate_backend(pid)) {sessions}")), "1");
    assert_eq!(child.wait().unwrap().code(), Some(4));
    let listed = walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 0, "{listed}");
    assert_eq!(cluster.sql(&format!("select count(*) {sessions}")), "0");
}

#[test]
fn failure_19_a_basebackup_of_a_standby_starts_after_replay_and_ends_where_nobody_writes() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    let chaos = Chaos::start(&cluster);
    chaos.wait_for_churn(1);
    let standby_data = cluster.scratch().path().join("standby");
    let base = cluster.bin_directory().join("pg_basebackup");
    let mut copy = Account::of_postgresql().command(base);
    copy.arg("-R").arg("-D").arg(&standby_data).arg("-d").arg(cluster.connection()).arg("-cfast");
    Run::of(&mut copy, "").expect_success();
    let run = cluster.scratch().folder("run-standby");
    let mut standby = Server::new(15, &standby_data, &run);
    standby.start();
    let scratch = Scratch::new();
    let from_standby = Walden::configure(&scratch, &standby_site(&standby, &standby_data, &walden));
    let taking = backup_while_switching(&from_standby, &cluster);
    let acknowledged = chaos.finish().acknowledged();
    cluster.archive_wal();
    let taken: serde_json::Value = serde_json::from_str(&taking.stdout).unwrap();
    let opened = Opened::open(&walden.repository(), id_of(&taken));
    let data = opened.restore(cluster.scratch(), "from-standby");
    let source = Checksums::of(&cluster);
    let copy = recover(&walden, 15, &data, &cluster.scratch().folder("run-copy"));
    Ledger::assert_holds(&copy, acknowledged);
    source.assert_same(&Checksums::of(&copy));
    drop(copy);

    // Both answer and both directories are here, so the role decides, and then the order. Nobody writes any more: the
    // primary is asked to end the segment, where it is among the nodes: this is what failure 19 waited for.
    let dead = format!("host={} port=1", scratch.path().display());
    let (of_cluster, of_standby) = (cluster.connection(), standby.connection());
    for (nodes, expected) in [
        ([(&*dead, "primary"), (&*of_cluster, "standby"), (&*of_standby, "standby")], &*standby_data),
        (
            [(&*dead, "primary"), (&*of_standby, "primary"), (&*of_cluster, "primary")],
            cluster.data_directory(),
        ),
    ] {
        let scratch = Scratch::new();
        let site = standby_site(&standby, &standby_data, &walden).nodes(&nodes);
        let run = Walden::configure(&scratch, &site).run(&["-v", "backup", "--wal-timeout", "60"]);
        assert!(
            run.stderr.contains(&format!("from \"{}\"", expected.display())),
            "{nodes:?}: {}",
            run.stderr
        );
    }

    // Promoted, it archives on a timeline of its own, whose history the backup makes sure of.
    standby.sql("select pg_promote()");
    standby.set_archive_command(&walden.archive_command());
    let promoted = from_standby.json(&["backup"]);
    assert_eq!(promoted["timeline"], 2, "{promoted}");
    let histories = walden.repository().join("main/clusters").join(promoted["cluster"].as_str().unwrap());
    let history = histories.join("history/00000002.history");
    standby.archive_wal();
    fs::remove_file(&history).unwrap();
    from_standby.json(&["backup"]);
    assert!(history.exists(), "the archiver is done with it, so the backup has put it back");
    // What another server archived for this timeline is not overwritten, and not passed over either.
    let own = standby_data.join("pg_wal/00000002.history");
    let text = fs::read_to_string(&own).unwrap();
    fs::write(&own, format!("{text}# another reason\n")).unwrap();
    let refused = from_standby.try_run(&["backup"]).expect_code(1);
    assert!(refused.stderr.contains("00000002.history already exists with different"), "{}", refused.stderr);
}

#[test]
fn pg_control_is_read_after_everything_else() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    let sparse = sparse_file(&cluster, "sparse", 6);
    let taking =
        walden.command().args(["--output", "json", "backup"]).stdout(Stdio::piped()).spawn().unwrap();
    crate::support::wait_for("the copy of the large file", || reads(&taking, &sparse).then_some(()));
    cluster.sql("create table later (n int); checkpoint");
    let checkpoint: Lsn = cluster.sql("select checkpoint_lsn from pg_control_checkpoint()").parse().unwrap();
    assert!(reads(&taking, &sparse), "the checkpoint came while other files were copied");
    let output = taking.wait_with_output().unwrap();
    let outcome: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let opened = Opened::open(&walden.repository(), id_of(&outcome));
    let control = ControlFile::parse(&opened.file("data/global/pg_control")).unwrap();
    assert!(control.checkpoint >= checkpoint, "{control:?}");
}

/// Makes a file in the data directory that is all zero and stored nowhere, but takes a while to read.
pub fn sparse_file(cluster: &Cluster, name: &str, gib: u64) -> PathBuf {
    let sparse = cluster.data_directory().join(name);
    fs::File::create(&sparse).unwrap().set_len(gib << 30).unwrap();
    Account::of_postgresql().own(&sparse);
    sparse
}

/// Says whether a process has a file open.
fn reads(process: &Child, file: &Path) -> bool {
    fs::read_dir(format!("/proc/{}/fd", process.id()))
        .is_ok_and(|fds| fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|path| path == file)))
}

/// Takes a basebackup of a standby: there nobody else ends the segment that it needs.
fn backup_while_switching(walden: &Walden, primary: &Cluster) -> Run {
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| walden.run(&["-v", "--output", "json", "backup"]));
        while !taking.is_finished() {
            primary.sql("select pg_switch_wal()");
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        taking.join().unwrap()
    })
}

fn standby_site(standby: &Sql, data: &Path, walden: &Walden) -> Site {
    Site::of(standby, data).unencrypted().storage(&walden.storage())
}

#[test]
fn failure_18_odd_names_links_and_modes_of_the_source_come_back() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    let data = cluster.data_directory();
    let outside = cluster.scratch().folder("outside");
    fs::write(outside.join("kept"), "outside").unwrap();
    let names: [&[u8]; 3] = [b"two\nlines", b"\xff\xfe", b"quote\"'\\"];
    for name in names {
        fs::write(data.join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
    }
    fs::create_dir(data.join("empty")).unwrap();
    fs::set_permissions(data.join("empty"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink(&outside, data.join("out")).unwrap();
    symlink("base", data.join("in")).unwrap();
    let own = Command::new("chown").args(["-R", "-h", "postgres:"]).arg(data).output().unwrap();
    assert!(own.status.success());
    let outcome = walden.json(&["backup"]);
    let opened = Opened::open(&walden.repository(), id_of(&outcome));
    let copy = opened.restore(cluster.scratch(), "copy");
    for name in names {
        assert_eq!(fs::read(copy.join(std::ffi::OsStr::from_bytes(name))).unwrap(), name);
    }
    assert_eq!(fs::metadata(copy.join("empty")).unwrap().permissions().mode() & 0o7777, 0o750);
    assert_eq!(fs::read(copy.join("out/kept")).unwrap(), b"outside");
    assert!(!fs::symlink_metadata(copy.join("out")).unwrap().is_symlink());
    assert_eq!(fs::read_link(copy.join("in")).unwrap(), Path::new("base"));
    let shown = walden.json(&["show", "latest", "--files"]);
    let kinds: BTreeMap<&str, &str> = shown["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| (file["path"].as_str().unwrap(), file["kind"].as_str().unwrap()))
        .collect();
    assert_eq!((kinds["data/in"], kinds["data/out"]), ("link", "directory"));
    verify_backup(&cluster, &copy);
}
