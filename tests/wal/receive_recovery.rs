//! Servers recover what was received through the mount, to the last commit: the end of it is there in pieces only.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::receive_scene::{Receiver, cluster};
use crate::scene::{base_backup, recover, shell};
use crate::support::{Cluster, Mounted, Need, Server, Stop, require};

/// Says which command goes through the mount; that of a recovery comes first.
const DOCUMENT: &str = include_str!("../../docs/mount.md");

/// A primary whose last commits are in pieces, and a copy of it that recovers through the mount.
struct Scene {
    cluster: Cluster,
    receiver: Receiver,
    server: Server,
    // After what goes through it.
    _mount: Mounted,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let cluster = cluster(15);
        let receiver = Receiver::of(&cluster);
        receiver.wait_until_streaming();
        cluster.sql("create table r (n int)");
        let data = cluster.scratch().path().join("copy");
        base_backup(&cluster, &data, &["-X", "none"]);
        for row in 0..3 {
            cluster.sql(&format!("insert into r values ({row})"));
            receiver.wait_until_stored(&cluster);
        }
        // Nothing is switched: the segment of these commits is still open.
        let open = cluster.sql("select pg_walfile_name(pg_current_wal_lsn())");
        assert!(receiver.runs(1).iter().all(|(_, last)| *last < open), "{open}: {:?}", receiver.runs(1));
        let folder = cluster.scratch().folder("mnt");
        let walden = if nix::unistd::geteuid().is_root() {
            receiver.walden.as_root()
        } else {
            receiver.walden.clone()
        };
        let mount = walden.mount(&folder);
        let mut commands = DOCUMENT.lines().filter_map(|line| line.strip_prefix("restore_command = '"));
        let command = commands.next().and_then(|rest| rest.strip_suffix('\'')).unwrap();
        let command = command.replace("DIR", mount.path().to_str().unwrap());
        cluster.scratch().file("copy/recovery.signal", "");
        let mut server = Server::new(15, &data, &cluster.scratch().folder("run2"));
        server.set("restore_command", &command).set("hot_standby", "off");
        Self { cluster, receiver, server, _mount: mount }
    }

    #[track_caller]
    fn rows_recovered(&mut self) -> u32 {
        recover(&mut self.server).unwrap_or_else(|log| panic!("{log}"));
        self.server.sql("select count(*) from r").parse().unwrap()
    }
}

#[test]
fn a_recovery_by_cp_from_the_mount_has_what_is_in_pieces() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut scene = Scene::new();
    assert_eq!(scene.rows_recovered(), 3, "{}", scene.server.log());
}

/// Each look at the last segment would find more of it, and `cp` gives up a file that changes under it.
#[test]
fn a_recovery_by_cp_comes_to_its_end_while_more_is_received() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut scene = Scene::new();
    let (ended, cluster) = (AtomicBool::new(false), &scene.cluster);
    let recovered = thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                cluster.sql("insert into r values (9)");
            }
        });
        let recovered = recover(&mut scene.server);
        ended.store(true, Ordering::Relaxed);
        recovered
    });
    recovered.unwrap_or_else(|log| panic!("{log}"));
    let rows: u32 = scene.server.sql("select count(*) from r").parse().unwrap();
    assert!(rows >= 3, "{rows}: {}", scene.server.log());
}

/// What a server wrote last was perhaps never received; saved, it is put into `pg_wal` of what is recovered.
#[test]
fn a_recovery_by_cp_reads_what_was_saved_of_pg_wal_where_that_holds_more() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let mut scene = Scene::new();
    scene.receiver.stop();
    for row in 3..9 {
        scene.cluster.sql(&format!("insert into r values ({row})"));
    }
    scene.cluster.sql("select pg_switch_wal()");
    scene.cluster.sql("insert into r values (9)");
    scene.cluster.stop(Stop::Immediate);
    shell(
        scene.cluster.scratch().path(),
        "find data/pg_wal -maxdepth 1 -type f -exec cp -t copy/pg_wal {} +",
    );
    assert_eq!(scene.rows_recovered(), 10, "{}", scene.server.log());
}
