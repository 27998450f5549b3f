//! An instant restore in the place of a real Debian cluster, driven by `pg_ctlcluster` alone: stopped and started on the mount
//! while it is unfinished, without Walden when it is plain.
//!
//! Debian's configuration is in `/etc`, outside the data directory, where the host still has it or the restore puts it.

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::instant_scene::Beside;
use crate::source::wait_until_writable;
use crate::support::{
    Account, Checksums, DebianCluster, Need, Run, Scratch, Site, Walden, mounts_below, processes_in, require,
    unmount, wait_for,
};

/// What stands where no scratch folder takes it away again: dropped before the cluster is.
struct Mounts {
    /// Where the data is, links resolved.
    directory: PathBuf,
    links: Vec<PathBuf>,
    scratch: PathBuf,
}

impl Mounts {
    fn supervisors(&self) -> Vec<Pid> {
        let scratch = self.scratch.display().to_string();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let numbered = processes.filter_map(|it| Some((it.file_name().to_str()?.parse().ok()?, it.path())));
        let serves = |path: &Path| {
            let command = fs::read(path.join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            command.contains("serve-restore") && command.contains(&scratch)
        };
        numbered.filter(|(_, path)| serves(path)).map(|(pid, _)| Pid::from_raw(pid)).collect()
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for process in [processes_in(&self.directory), self.supervisors()].concat() {
            let _ = kill(process, Signal::SIGKILL);
        }
        mounts_below(&self.directory).iter().for_each(|mount| unmount(mount));
        // A link would be left where the cluster is dropped.
        self.links.iter().for_each(|link| drop(fs::remove_file(link)));
    }
}

/// A Debian cluster whose data is lost, and what it held.
struct Lost {
    rows: Checksums,
    walden: Walden,
    // Dropped in this order: what is mounted on the cluster, the cluster, where its backups are.
    mounts: Mounts,
    cluster: DebianCluster,
    scratch: Scratch,
}

impl Lost {
    #[track_caller]
    fn new() -> Self {
        let cluster = DebianCluster::start(&[("work_mem", "9MB")]);
        let scratch = Scratch::new();
        let site = Site::of(&cluster, &cluster.data_directory());
        let walden = Walden::configure(&scratch, &site);
        cluster.sql(&format!("alter system set archive_command = '{}'", walden.archive_command()));
        cluster.sql("select pg_reload_conf()");
        cluster.sql(
            "create table kept as select n, md5(n::text) as t from generate_series(1, 50000) n; checkpoint",
        );
        walden.run(&["backup"]);
        cluster.sql("delete from kept where n % 3 = 0; select pg_switch_wal()");
        let rows = Checksums::of(&cluster);
        let (directory, folder) = (cluster.data_directory(), scratch.path().to_owned());
        let mounts = Mounts { directory, links: Vec::new(), scratch: folder };
        let lost = Self { rows, walden, mounts, cluster, scratch };
        lost.cluster.control("stop");
        for entry in fs::read_dir(lost.cluster.data_directory()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            }
            .unwrap();
        }
        lost
    }

    /// The same where the data was on another disk, and a link to it in Debian's place.
    #[track_caller]
    fn behind_a_link() -> Self {
        let mut lost = Self::new();
        let (place, disk) = (lost.target(), lost.scratch.folder("disk"));
        fs::remove_dir(&place).unwrap();
        symlink(&disk, &place).unwrap();
        lost.mounts.links.push(place);
        lost.mounts.directory = disk;
        lost
    }

    /// Where the data is.
    fn directory(&self) -> PathBuf {
        self.mounts.directory.clone()
    }

    /// What Debian, and a DBA, calls that.
    fn target(&self) -> PathBuf {
        self.cluster.data_directory()
    }

    /// Restores so slowly that there is time for what is to be done meanwhile; the command is killed once the server answers.
    #[track_caller]
    fn restore(&self, options: &[&str]) {
        let directory = self.target();
        let words =
            ["restore", "--instant", "--hydrate-rate", "512KiB", "--target-dir", directory.to_str().unwrap()];
        let mut beside = Beside::start(&self.walden.as_root(), &[&words, options].concat());
        wait_for("the server to take writes", || {
            beside.assert_no_failure();
            let answer = self.cluster.try_sql("select pg_is_in_recovery()");
            answer.is_ok_and(|answer| answer == "f").then_some(())
        });
        // Nobody but a service manager mounts it again after a reboot, and there is none here.
        assert!(beside.has_told("--resume"), "what to do after a reboot is not said: {}", beside.told());
    }

    #[track_caller]
    fn resume(&self, options: &[&str]) -> Value {
        let directory = self.target();
        let words = ["restore", "--resume", "--target-dir", directory.to_str().unwrap()];
        self.walden.as_root().json(&[&words, options].concat())
    }

    /// From an unfinished server to a plain directory, with Debian's own commands.
    #[track_caller]
    fn lives(&self) {
        let cluster = &self.cluster;
        wait_until_writable(cluster);
        self.rows.assert_same(&Checksums::of(cluster));
        assert_eq!(cluster.sql("show work_mem"), "9MB");
        let status = cluster.try_control("status").expect_success();
        assert!(status.stdout.contains("server is running"), "{}", status.stdout);
        cluster.sql("insert into kept values (0, 'new')");
        cluster.control("stop");
        assert!(!mounts_below(&self.directory()).is_empty(), "without its mount it cannot be started");
        cluster.control("start");
        wait_until_writable(cluster);
        assert_eq!(cluster.sql("select count(*) from kept where n = 0"), "1");
        cluster.control("reload");
        cluster.control("restart");
        wait_until_writable(cluster);

        let rows = Checksums::of(cluster);
        assert_eq!(self.resume(&[])["state"], "plain");
        rows.assert_same(&Checksums::of(cluster));
        cluster.control("stop");
        wait_for("the mounts to go", || mounts_below(&self.directory()).is_empty().then_some(()));
        wait_for("the supervisor to end", || self.mounts.supervisors().is_empty().then_some(()));
        for name in [".walden", "pgsql_tmp.walden"] {
            assert!(!self.directory().join(name).exists(), "{name} is left");
        }
        assert!(fs::symlink_metadata(self.directory().join("pg_wal")).unwrap().is_dir());
        cluster.control("start");
        wait_until_writable(cluster);
        rows.assert_same(&Checksums::of(cluster));
        cluster.sql("insert into kept values (-1, 'native')");
        assert_eq!(cluster.sql("show data_directory"), self.target().to_str().unwrap());
        cluster.control("stop");
    }
}

/// Its data is lost, its `/etc` is not.
#[test]
fn a_lost_cluster_comes_back_under_the_configuration_that_its_host_still_has() {
    require!(Need::DebianCluster, Need::Fuse);
    let lost = Lost::new();
    let file = lost.cluster.configuration_directory().join("postgresql.conf");
    let before = fs::read_to_string(&file).unwrap();
    lost.restore(&[]);
    assert_eq!(fs::read_to_string(&file).unwrap(), before, "the host's own configuration was changed");
    lost.lives();
}

/// Both are lost: it comes with its configuration.
#[test]
fn a_lost_cluster_comes_back_with_its_configuration() {
    require!(Need::DebianCluster, Need::Fuse);
    let lost = Lost::new();
    let config = lost.cluster.configuration_directory();
    let before = fs::read_to_string(config.join("postgresql.conf")).unwrap();
    fs::remove_dir_all(&config).unwrap();
    fs::create_dir(&config).unwrap();
    let postgres = Account::of_postgresql();
    chown(&config, Some(postgres.uid), Some(postgres.gid)).unwrap();
    lost.restore(&["--config-dir", config.to_str().unwrap()]);
    let after = fs::read_to_string(config.join("postgresql.conf")).unwrap();
    assert!(after.starts_with(&before), "{after}");
    lost.lives();
}

/// Debian knows a cluster by its configuration, wherever that has the data. What the unit calls at boot comes first, then what
/// `postgresql@` calls; the mount of a process that has died is found behind the link too.
#[test]
fn a_lost_cluster_behind_a_link_comes_back_and_is_mounted_again() {
    require!(Need::DebianCluster, Need::Fuse);
    let lost = Lost::behind_a_link();
    lost.restore(&[]);
    assert!(mounts_below(&lost.directory()).contains(&lost.directory()), "it is mounted elsewhere");
    for supervisor in lost.mounts.supervisors() {
        kill(supervisor, Signal::SIGKILL).unwrap();
    }
    wait_for("the server to end with its supervisor", || {
        (processes_in(&lost.directory()).is_empty() && lost.mounts.supervisors().is_empty()).then_some(())
    });
    assert!(!mounts_below(&lost.directory()).is_empty(), "a dead mount is what this is about");
    assert_eq!(lost.resume(&["--no-start"])["state"], "mounted");
    lost.cluster.control("start");
    lost.lives();
}

/// Debian's own commands on a host that was started anew, before anybody resumed: they refuse, and harm nothing.
#[test]
fn a_cluster_that_is_not_resumed_yet_refuses_to_start() {
    require!(Need::DebianCluster, Need::Fuse);
    let lost = Lost::new();
    lost.restore(&[]);
    lost.cluster.sql("insert into kept values (0, 'new')");
    let all = [processes_in(&lost.directory()), lost.mounts.supervisors()].concat();
    for process in &all {
        let _ = kill(*process, Signal::SIGKILL);
    }
    let gone = |pid: &Pid| !Path::new(&format!("/proc/{pid}")).exists();
    wait_for("all to be gone", || all.iter().all(gone).then_some(()));
    wait_for("the mounts to be taken away", || {
        mounts_below(&lost.directory()).iter().for_each(|mount| unmount(mount));
        mounts_below(&lost.directory()).is_empty().then_some(())
    });
    for action in ["start", "restart"] {
        let refused = lost.cluster.try_control(action);
        assert!(!refused.success(), "{action}: {}{}", refused.stdout, refused.stderr);
    }
    assert_eq!(lost.resume(&[])["state"], "plain");
    wait_until_writable(&lost.cluster);
    assert_eq!(lost.cluster.sql("select count(*) from kept where n = 0"), "1");
    lost.cluster.control("stop");
    wait_for("the mounts to go", || mounts_below(&lost.directory()).is_empty().then_some(()));
    lost.cluster.control("start");
    wait_until_writable(&lost.cluster);
    assert_eq!(lost.cluster.sql("select count(*) from kept where n = 0"), "1");
    let mut lsclusters = Command::new("pg_lsclusters");
    let listed = Run::of(lsclusters.arg("--no-header"), "").expect_success();
    assert!(listed.stdout.contains(&lost.target().display().to_string()), "{}", listed.stdout);
}
