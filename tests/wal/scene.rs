//! A server whose WAL is archived by the binary, a copy of it from before, and recoveries of that copy.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{Account, Cluster, Mounted, Options, Run, Server, Site, Stop, Walden, wait_for};

/// Says which commands go through the mount: first that of a recovery, then that of a standby.
const DOCUMENT: &str = include_str!("../../docs/mount.md");

/// Rows that are put into the server after the copy, one for each segment that is archived.
pub struct Scene {
    pub cluster: Cluster,
    pub walden: Walden,
    /// The archived segments, oldest first; each holds the commit of one row of table `r`.
    pub segments: Vec<String>,
    copy: PathBuf,
}

impl Scene {
    /// Starts a server of a major version, copies it, and archives some segments after that.
    #[track_caller]
    pub fn new(major: u32, segments: usize) -> Self {
        Self::with_segments_of(1, major, segments, None)
    }

    /// The same with the repository elsewhere: the lines of `[storage]`.
    #[track_caller]
    pub fn in_store(storage: &str, major: u32, segments: usize) -> Self {
        Self::of_site(1, major, segments, None, |site| site.storage(storage))
    }

    /// The same with segments of another size, in MiB; where `first` is given, the server is set to that segment and begins behind it.
    #[track_caller]
    pub fn with_segments_of(mib: u32, major: u32, segments: usize, first: Option<&str>) -> Self {
        Self::of_site(mib, major, segments, first, |site| site)
    }

    #[track_caller]
    fn of_site(
        mib: u32,
        major: u32,
        segments: usize,
        first: Option<&str>,
        placed: impl FnOnce(Site) -> Site,
    ) -> Self {
        // A server refuses to keep less WAL than two segments.
        let max_wal_size = format!("{}MB", (4 * mib).max(256));
        let options =
            Options::default().initdb(&format!("--wal-segsize={mib}")).setting("max_wal_size", &max_wal_size);
        let mut cluster = Cluster::start_with(major, options);
        let site = Site::of(&cluster, cluster.data_directory())
            .bin_directory(&cluster.bin_directory())
            .lines("[sites.main.archive]\nfetch_wait = \"2s\"\n");
        let walden = Walden::configure(cluster.scratch(), &placed(site));
        cluster.set_archive_command(&walden.archive_command());
        cluster.sql("create table r (n int)");
        let copy = cluster.scratch().path().join("copy");
        cluster.stop(Stop::Fast);
        if let Some(first) = first {
            let program = cluster.bin_directory().join("pg_resetwal");
            let mut command = Account::of_postgresql().command(program);
            command.args(["-l", first, "-D"]).arg(cluster.data_directory());
            Run::of(&mut command, "").expect_success();
            // It takes the settings in pg_control back, and the WAL after the copy would bring them too late.
            cluster.start();
            cluster.stop(Stop::Fast);
        }
        copy_all(cluster.data_directory(), &copy);
        // Every segment, the first one too, has to come from the archive.
        shell(&copy, "find pg_wal -type f -delete");
        cluster.start();
        let mut scene = Self { cluster, walden, segments: Vec::new(), copy };
        for _ in 0..segments {
            scene.archive_row();
        }
        scene
    }

    /// Commits one more row and archives the segment it is in.
    #[track_caller]
    pub fn archive_row(&mut self) {
        self.cluster.sql(&format!("insert into r values ({})", self.segments.len()));
        self.segments.push(self.cluster.archive_wal());
    }

    /// Makes a server on a fresh copy that will recover, not yet started; it does not archive.
    #[track_caller]
    pub fn recovering(&self, name: &str, restore_command: &str) -> Server {
        self.server_with_signal(name, restore_command, "recovery.signal")
    }

    /// Makes a standby without a primary on a fresh copy.
    #[track_caller]
    pub fn standby(&self, name: &str, restore_command: &str) -> Server {
        let mut server = self.server_with_signal(name, restore_command, "standby.signal");
        server.set("wal_retrieve_retry_interval", "100ms").set("hot_standby", "on");
        server
    }

    fn server_with_signal(&self, name: &str, restore_command: &str, signal: &str) -> Server {
        let scratch = self.cluster.scratch();
        let data = scratch.path().join(name);
        copy_all(&self.copy, &data);
        scratch.file(&format!("{name}/{signal}"), "");
        let mut server = Server::new(self.cluster.major(), &data, &scratch.folder("run"));
        // Connections are let in when recovery has ended, and not before.
        server.set("restore_command", restore_command).set("archive_mode", "off").set("hot_standby", "off");
        server
    }

    /// Mounts the site at `mnt`, as root where the test is root, because others may not open `/dev/fuse` there.
    #[track_caller]
    pub fn mount(&self) -> Mounted {
        let folder = self.mount_point();
        if !folder.exists() && !is_mounted(&folder) {
            self.cluster.scratch().folder("mnt");
        }
        if nix::unistd::geteuid().is_root() { self.walden.as_root() } else { self.walden.clone() }
            .mount(&folder)
    }

    /// Returns where [`Scene::mount`] mounts.
    pub fn mount_point(&self) -> PathBuf {
        self.cluster.scratch().path().join("mnt")
    }

    /// Returns the documented restore_command of a recovery through the mount.
    pub fn cp(&self) -> String {
        self.documented(0)
    }

    /// Returns the documented restore_command of a standby through the mount.
    pub fn plain_cp(&self) -> String {
        self.documented(1)
    }

    fn documented(&self, nth: usize) -> String {
        let mut commands = DOCUMENT.lines().filter_map(|line| line.strip_prefix("restore_command = '"));
        let command = commands.nth(nth).and_then(|rest| rest.strip_suffix('\'')).unwrap();
        command.replace("DIR", self.mount_point().to_str().unwrap())
    }

    /// Returns the file of an archived segment in the repository.
    #[track_caller]
    pub fn object(&self, segment: &str) -> PathBuf {
        find(&self.walden.repository(), segment)
            .unwrap_or_else(|| panic!("{segment} is not in the repository"))
    }

    /// Fetches a segment as a standby does that nobody has asked for before, and compares it with what the server has.
    #[track_caller]
    pub fn assert_fetched(&self, segment: &str) {
        static STANDBYS: AtomicUsize = AtomicUsize::new(0);
        let name = format!("fetching-{}", STANDBYS.fetch_add(1, Ordering::Relaxed));
        let (own, scratch) = (self.cluster.data_directory(), self.cluster.scratch());
        let data = scratch.folder(&name);
        shell(&data, &format!("cp -a '{}/global' . && touch standby.signal", own.display()));
        let mut fetch = self.walden.command();
        fetch.args(["wal", "fetch", segment, "fetched"]).current_dir(&data);
        Run::of(&mut fetch, "").expect_success();
        let fetched = fs::read(data.join("fetched")).unwrap();
        assert!(fetched == fs::read(own.join("pg_wal").join(segment)).unwrap(), "{segment}: other bytes");
    }

    /// Says how many rows a server has that are those archived here.
    pub fn rows(server: &Server) -> usize {
        server.sql("select count(*) from r").parse().unwrap()
    }

    /// Checks that a recovery ends with the server refusing to go on, for the reason given, and not with promotion.
    #[track_caller]
    pub fn assert_stops(&self, mut server: Server, why: &str) {
        let Err(log) = recover(&mut server) else {
            panic!("promoted with {} of {} rows", Self::rows(&server), self.segments.len());
        };
        assert!(log.contains("FATAL"), "{log}");
        assert!(log.contains(why), "no \"{why}\" in:\n{log}");
        assert!(!log.contains("archive recovery complete"), "{log}");
        assert!(server.data_directory().join("recovery.signal").exists());
    }

    /// Checks that a recovery ends with every row.
    #[track_caller]
    pub fn assert_recovers(&self, mut server: Server) -> Server {
        recover(&mut server).unwrap_or_else(|log| panic!("{log}"));
        assert_eq!(Self::rows(&server), self.segments.len(), "{}", server.log());
        server
    }
}

/// Starts a server and waits until it has ended its recovery, or itself: then its log is returned.
#[track_caller]
pub fn recover(server: &mut Server) -> Result<(), String> {
    server.spawn();
    let recovered = wait_for("recovery to end one way or the other", || match server.is_running() {
        true => server.answers().then_some(true),
        false => Some(false),
    });
    if recovered { Ok(()) } else { Err(server.log()) }
}

/// Copies a running server with PostgreSQL's own program.
#[track_caller]
pub fn base_backup(server: &Server, to: &Path, options: &[&str]) {
    let mut command = Account::of_postgresql().command(server.bin_directory().join("pg_basebackup"));
    command.arg("-D").arg(to).args(["-c", "fast", "-d"]).arg(server.connection()).args(options);
    Run::of(&mut command, "").expect_success();
}

/// Copies a folder with everything in it, as PostgreSQL's account.
#[track_caller]
pub fn copy_all(from: &Path, to: &Path) {
    Run::of(Account::of_postgresql().command("cp").arg("-a").arg(from).arg(to), "").expect_success();
}

/// Runs a shell script in a folder, as PostgreSQL's account, and returns what it printed.
#[track_caller]
pub fn shell(folder: &Path, script: &str) -> String {
    let mut command = Account::of_postgresql().command("bash");
    command.args(["-euo", "pipefail", "-c", script]).current_dir(folder);
    Run::of(&mut command, "").expect_success().stdout
}

/// Kills the process that serves a mount, without a chance to unmount.
#[track_caller]
pub fn kill_mount(point: &Path) {
    let pids =
        Run::of(Command::new("pgrep").args(["-f", &format!("internal serve {}", point.display())]), "");
    let pid: i32 = pids.expect_success().stdout.trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// Tells whether something is mounted there, dead or alive.
fn is_mounted(folder: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == folder.to_str())
}

/// Finds a file in a folder and those below it.
pub fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name) {
                return Some(found);
            }
        } else if entry.file_name() == name {
            return Some(path);
        }
    }
    None
}
