//! A server recovers what was received through the mount, to the last commit: the end of it is there in pieces only.

use crate::receive_scene::{Receiver, cluster};
use crate::scene::{base_backup, recover};
use crate::support::{Need, Server, require};

/// Says which command goes through the mount; that of a recovery comes first.
const DOCUMENT: &str = include_str!("../../docs/mount.md");

#[test]
fn a_recovery_by_cp_from_the_mount_has_what_is_in_pieces() {
    require!(Need::PostgreSQL(15), Need::Fuse);
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
    let walden =
        if nix::unistd::geteuid().is_root() { receiver.walden.as_root() } else { receiver.walden.clone() };
    let mount = walden.mount(&folder);
    let mut commands = DOCUMENT.lines().filter_map(|line| line.strip_prefix("restore_command = '"));
    let command = commands.next().and_then(|rest| rest.strip_suffix('\'')).unwrap();
    let command = command.replace("DIR", mount.path().to_str().unwrap());
    cluster.scratch().file("copy/recovery.signal", "");
    let mut server = Server::new(15, &data, &cluster.scratch().folder("run2"));
    server.set("restore_command", &command).set("hot_standby", "off");
    recover(&mut server).unwrap_or_else(|log| panic!("{log}"));
    assert_eq!(server.sql("select count(*) from r"), "3", "{}", server.log());
}
