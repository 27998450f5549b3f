//! What a clone's server is told so that it can harm nothing: settings, configuration files, the restore command.
//!
//! Pure: facts in, settings out, each with its reason. They stand on the command line, because postgresql.auto.conf
//! of the source is still read and must not win (failures 8, 27b, 27c). A setting that a major version does not know
//! is not given to it. Deliberately absent: what keeps writes inside the clone's folder; `launch` does that.

use std::path::{Path, PathBuf};

use crate::catalog::{RecoveryTarget, Target, TargetAction};
use crate::pg::{RecoveryLimits, TimelineId, WalSegmentSize};

/// What decides a clone's settings.
#[derive(Debug, Clone)]
pub struct CloneFacts {
    /// Name of the clone.
    pub name: String,
    /// Major version of the cluster.
    pub major: u32,
    /// Where sockets go.
    pub socket_directory: PathBuf,
    /// The port in the socket's name.
    pub port: u16,
    /// Where the generated files are.
    pub config_directory: PathBuf,
    /// The `wal` directory of the clone's mount.
    pub wal_directory: PathBuf,
    /// The limits that replay needs, from pg_control and the WAL.
    pub limits: RecoveryLimits,
    /// Where recovery ends, and on which timeline; nothing once recovery is over.
    pub recovery: Option<(RecoveryTarget, TimelineId)>,
    /// The size of the cluster's WAL segments.
    pub wal_segment_size: WalSegmentSize,
    /// Whether the first record about a page after a checkpoint brings the whole page.
    pub full_page_writes: bool,
    /// Libraries to preload.
    pub preload: String,
    /// Whether sessions are let in before the target.
    pub read_early: bool,
    /// Memory of the host.
    pub host_memory_bytes: u64,
}

/// A setting for the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// Its value, not quoted.
    pub value: String,
    /// Why the clone needs it.
    pub reason: &'static str,
}

/// A socket's path ends at 107 bytes on Linux.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// A clone shares its host with others: an eighth of the memory, and no more than this.
const SHARED_BUFFERS_MAX: u64 = 256 << 20;

/// Segments that the server refuses to keep fewer of at a checkpoint; by itself it keeps 80 MB.
const SEGMENTS_KEPT_MIN: u32 = 2;
/// WAL after which a server starts a checkpoint by itself.
const MAX_WAL_SIZE_MB: u32 = 1024;

/// At most one of them may have a value.
const TARGET_SETTINGS: [&str; 5] = [
    "recovery_target",
    "recovery_target_time",
    "recovery_target_lsn",
    "recovery_target_xid",
    "recovery_target_name",
];

/// Returns every setting of a clone's server.
pub fn clone_settings(facts: &CloneFacts) -> Vec<Setting> {
    let mut settings = Vec::new();
    place(facts, &mut settings);
    keep_to_itself(facts.major, &mut settings);
    fit_the_host(facts, &mut settings);
    recover(facts, &mut settings);
    let reason = "a library that is missing here stops the start, and some reach outside";
    settings.push(Setting { name: "shared_preload_libraries", value: facts.preload.clone(), reason });
    settings
}

/// Returns the path of the server's socket.
///
/// # Errors
/// The path, where it is longer than a socket's may be.
pub fn socket_path(socket_directory: &Path, port: u16) -> Result<PathBuf, PathBuf> {
    let path = socket_directory.join(format!(".s.PGSQL.{port}"));
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX { Err(path) } else { Ok(path) }
}

/// Returns the generated files by name: the folder is private, so whoever reaches the socket is let in.
pub fn config_files(name: &str) -> [(&'static str, String); 3] {
    let head =
        format!("# Written by walden for clone {name}; what matters is on the server's command line.\n");
    [
        ("postgresql.conf", head.clone()),
        ("pg_hba.conf", format!("{head}local all all trust\nlocal replication all trust\n")),
        ("pg_ident.conf", head),
    ]
}

/// Returns the command that fetches a file of the archive from the clone's own mount.
///
/// It survives a mount that is dead or gone: only a proven absence is exit 1, everything else stops recovery.
pub fn restore_command(wal_directory: &Path) -> String {
    // A percent sign in the path would be taken for a placeholder.
    let wal = wal_directory.display().to_string().replace('%', "%%").replace('\'', r"'\''");
    format!("cp '{wal}'/%f %p || {{ test -e '{wal}'/%f.absent && exit 1; exit 200; }}")
}

fn place(facts: &CloneFacts, settings: &mut Vec<Setting>) {
    let files = facts.config_directory.display();
    let mut set = |name, value, reason| settings.push(Setting { name, value, reason });
    let own_files = "the source's files name paths, addresses and users of the source";
    set("config_file", format!("{files}/postgresql.conf"), own_files);
    set("hba_file", format!("{files}/pg_hba.conf"), own_files);
    set("ident_file", format!("{files}/pg_ident.conf"), own_files);
    set("listen_addresses", String::new(), "a clone is reached through its socket alone");
    set(
        "unix_socket_directories",
        facts.socket_directory.display().to_string(),
        "the socket is in the clone's folder",
    );
    set("unix_socket_permissions", "0700".to_owned(), "the socket is its owner's");
    set("unix_socket_group", String::new(), "the socket is its owner's");
    set("port", facts.port.to_string(), "the port is in the socket's name");
    set("cluster_name", format!("walden:{}", facts.name), "it is told apart in ps");
    let pid_file = facts.socket_directory.join("postmaster.pid").display().to_string();
    set("external_pid_file", pid_file, "the source's would be replaced, and an empty name is no name");
    set("logging_collector", "off".to_owned(), "the log goes to the clone's folder");
    set("log_destination", "stderr".to_owned(), "the log goes to the clone's folder");
}

fn keep_to_itself(major: u32, settings: &mut Vec<Setting>) {
    let mut set =
        |name, value: &str, reason| settings.push(Setting { name, value: value.to_owned(), reason });
    set("archive_mode", "off", "it must not archive into the repository it came from");
    set("archive_command", "", "it must not archive into the repository it came from");
    if major >= 15 {
        set("archive_library", "", "it must not archive into the repository it came from");
    }
    set("archive_cleanup_command", "", "it would remove WAL of the source");
    set("recovery_end_command", "", "it was written for the source's fail-over");
    set("primary_conninfo", "", "it must not connect to the source's primary");
    set("primary_slot_name", "", "it would hold back the primary's WAL");
    set("synchronous_standby_names", "", "nobody will ever confirm a commit");
    set("max_logical_replication_workers", "0", "a subscription would take the publisher's slot");
    if major >= 17 {
        set("sync_replication_slots", "off", "it must not connect to the source's primary");
        set("event_triggers", "off", "a login trigger was written for the source");
        set("summarize_wal", "off", "summaries of a clone are of no use");
    }
    set("session_preload_libraries", "", "a library that is missing here ends every session");
    set("local_preload_libraries", "", "a library that is missing here ends every session");
    set("ssl", "off", "the certificate is the source's");
    set("wal_level", "replica", "a clone is no publisher");
}

fn fit_the_host(facts: &CloneFacts, settings: &mut Vec<Setting>) {
    let mut set =
        |name, value: &str, reason| settings.push(Setting { name, value: value.to_owned(), reason });
    set("huge_pages", "off", "the host's huge pages are not the clone's");
    let megabytes = (facts.host_memory_bytes / 8).clamp(16 << 20, SHARED_BUFFERS_MAX) >> 20;
    set("shared_buffers", &format!("{megabytes}MB"), "it shares the host with others");
    set("restart_after_crash", "off", "the supervisor syncs the upper before each start");
    if facts.major >= 14 {
        set("recovery_init_sync_method", "syncfs", "otherwise every file is opened before recovery");
    }
    if facts.major >= 15 {
        if facts.full_page_writes {
            let reason =
                "replay brings the pages itself, and the server would have them fetched all the same";
            set("recovery_prefetch", "off", reason);
        } else {
            set("recovery_prefetch", "try", "pages come from afar");
        }
    }
    let kept = SEGMENTS_KEPT_MIN * (facts.wal_segment_size.bytes() >> 20);
    if facts.wal_segment_size > WalSegmentSize::DEFAULT {
        let reason = "initdb fits the source's own file to segments of this size";
        set("min_wal_size", &format!("{kept}MB"), reason);
        set("max_wal_size", &format!("{}MB", MAX_WAL_SIZE_MB.max(2 * kept)), reason);
    }
    if facts.major >= 18 {
        set("io_method", "worker", "io_uring on a FUSE file waits in the kernel");
    }
}

fn recover(facts: &CloneFacts, settings: &mut Vec<Setting>) {
    let mut set = |name, value: String, reason| settings.push(Setting { name, value, reason });
    let replay = "replay needs at least the source's";
    set("max_prepared_transactions", facts.limits.max_prepared_transactions.to_string(), replay);
    let Some((target, timeline)) = &facts.recovery else {
        set("hot_standby", "on".to_owned(), "recovery is over");
        return;
    };
    let early = facts.read_early || (target.action == TargetAction::Pause && target.target != Target::Latest);
    set("hot_standby", if early { "on" } else { "off" }.to_owned(), "the first answer is the target");
    if early {
        let limits = facts.limits;
        for (name, value) in [
            ("max_connections", limits.max_connections),
            ("max_worker_processes", limits.max_worker_processes),
            ("max_wal_senders", limits.max_wal_senders),
            ("max_locks_per_transaction", limits.max_locks_per_transaction),
        ] {
            set(name, value.to_string(), replay);
        }
    }
    set(
        "restore_command",
        restore_command(&facts.wal_directory),
        "the archive, through the clone's own mount",
    );
    set("recovery_min_apply_delay", "0".to_owned(), "a delayed standby's delay is not the clone's");
    if facts.major <= 15 {
        set("promote_trigger_file", String::new(), "it is a path of the source");
    }
    let wanted = target.settings(*timeline);
    let asked = "what was asked for";
    // Empty where it is not asked for: postgresql.auto.conf may hold an old one. And before the one that is: after it
    // the server takes even an empty one for a second target.
    let targets = TARGET_SETTINGS.iter().filter(|name| !wanted.iter().any(|(wanted, _)| wanted == *name));
    targets.for_each(|name| set(name, String::new(), asked));
    if !wanted.iter().any(|(name, _)| *name == "recovery_target_inclusive") {
        set("recovery_target_inclusive", "on".to_owned(), asked);
    }
    if !wanted.iter().any(|(name, _)| *name == "recovery_target_action") {
        set("recovery_target_action", "promote".to_owned(), asked);
    }
    for (name, value) in wanted {
        set(name, value, asked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(major: u32) -> CloneFacts {
        CloneFacts {
            name: "one".to_owned(),
            major,
            socket_directory: "/clones/one/run".into(),
            port: 5432,
            config_directory: "/clones/one/config".into(),
            wal_directory: "/clones/one/mnt/wal".into(),
            limits: RecoveryLimits {
                max_connections: 300,
                max_prepared_transactions: 7,
                ..RecoveryLimits::default()
            },
            recovery: Some((RecoveryTarget::latest(TargetAction::Promote), TimelineId::FIRST)),
            wal_segment_size: WalSegmentSize::DEFAULT,
            full_page_writes: true,
            preload: String::new(),
            read_early: false,
            host_memory_bytes: 24 << 30,
        }
    }

    fn value(settings: &[Setting], name: &str) -> Option<String> {
        let found: Vec<&Setting> = settings.iter().filter(|setting| setting.name == name).collect();
        assert!(found.len() <= 1, "{name} is set twice");
        found.first().map(|setting| setting.value.clone())
    }

    /// Failures 8 and 27c: a clone archived, took a slot, hung on its first commit, moved an address.
    #[test]
    fn whatever_reaches_outside_is_switched_off_in_every_version() {
        for major in 13..=18 {
            let settings = clone_settings(&facts(major));
            for (name, expected, since) in SAFE {
                let expected = (major >= since).then_some(expected);
                assert_eq!(value(&settings, name).as_deref(), expected, "{name} in {major}");
            }
            let pid_file = value(&settings, "external_pid_file").unwrap();
            assert!(pid_file.starts_with("/clones/one/"), "{pid_file}");
            assert_eq!(value(&settings, "hot_standby").as_deref(), Some("off"));
            assert_eq!(value(&settings, "max_prepared_transactions").as_deref(), Some("7"));
            assert_eq!(value(&settings, "max_connections"), None);
            assert_eq!(value(&settings, "promote_trigger_file").is_some(), major <= 15);
        }
    }

    /// 7-postgresql, *Clones*: name, value, and the first version that knows it.
    const SAFE: [(&str, &str, u32); 28] = [
        ("archive_mode", "off", 13),
        ("archive_command", "", 13),
        ("archive_library", "", 15),
        ("archive_cleanup_command", "", 13),
        ("recovery_end_command", "", 13),
        ("primary_conninfo", "", 13),
        ("primary_slot_name", "", 13),
        ("synchronous_standby_names", "", 13),
        ("session_preload_libraries", "", 13),
        ("local_preload_libraries", "", 13),
        ("shared_preload_libraries", "", 13),
        ("recovery_min_apply_delay", "0", 13),
        ("max_logical_replication_workers", "0", 13),
        ("sync_replication_slots", "off", 17),
        ("event_triggers", "off", 17),
        ("ssl", "off", 13),
        ("huge_pages", "off", 13),
        ("logging_collector", "off", 13),
        ("listen_addresses", "", 13),
        ("restart_after_crash", "off", 13),
        ("recovery_init_sync_method", "syncfs", 14),
        ("recovery_target", "", 13),
        ("recovery_target_time", "", 13),
        ("recovery_target_lsn", "", 13),
        ("recovery_target_xid", "", 13),
        ("recovery_target_name", "", 13),
        ("recovery_target_timeline", "1", 13),
        ("unix_socket_permissions", "0700", 13),
    ];

    #[test]
    fn who_reads_early_gets_the_limits_that_replay_needs() {
        let settings = clone_settings(&CloneFacts { read_early: true, ..facts(15) });
        assert_eq!(value(&settings, "hot_standby").as_deref(), Some("on"));
        assert_eq!(value(&settings, "max_connections").as_deref(), Some("300"));
    }

    #[test]
    fn pages_are_fetched_ahead_of_replay_only_where_replay_does_not_bring_them() {
        let prefetch = |full_page_writes, major| {
            let settings = clone_settings(&CloneFacts { full_page_writes, ..facts(major) });
            value(&settings, "recovery_prefetch")
        };
        assert_eq!(prefetch(true, 15).as_deref(), Some("off"));
        assert_eq!(prefetch(false, 15).as_deref(), Some("try"));
        assert_eq!(prefetch(false, 14), None);
    }

    #[test]
    fn a_target_is_set_once_and_the_others_are_cleared() {
        let target = RecoveryTarget {
            target: Target::Name("before".to_owned()),
            ..RecoveryTarget::latest(TargetAction::Pause)
        };
        let settings =
            clone_settings(&CloneFacts { recovery: Some((target, TimelineId::FIRST)), ..facts(15) });
        assert_eq!(value(&settings, "recovery_target_name").as_deref(), Some("before"));
        assert_eq!(value(&settings, "recovery_target_lsn").as_deref(), Some(""));
        let empty = settings.iter().rposition(|setting| setting.name == "recovery_target_time");
        let asked = settings.iter().position(|setting| setting.name == "recovery_target_name");
        assert!(empty < asked, "the server would see two targets");
        assert_eq!(value(&settings, "recovery_target_action").as_deref(), Some("pause"));
        assert_eq!(value(&settings, "hot_standby").as_deref(), Some("on"));
    }

    #[test]
    fn a_path_with_a_percent_sign_or_a_quote_stays_a_path() {
        let command = restore_command(Path::new("/a%f'b/wal"));
        assert!(command.starts_with(r"cp '/a%%f'\''b/wal'/%f %p || "), "{command}");
    }

    #[test]
    fn a_socket_path_that_is_too_long_is_told() {
        assert!(socket_path(Path::new("/short"), 5432).is_ok());
        assert!(socket_path(Path::new(&format!("/{}", "x".repeat(100))), 5432).is_err());
    }

    /// Failure 6: by default a server does not start with segments above 40 MiB.
    #[test]
    fn wal_of_any_segment_size_fits_what_the_server_keeps() {
        let kept = |mib: u32| {
            let wal_segment_size = WalSegmentSize::new(mib << 20).unwrap();
            let settings = clone_settings(&CloneFacts { wal_segment_size, ..facts(15) });
            (value(&settings, "min_wal_size"), value(&settings, "max_wal_size"))
        };
        let both = |min: &str, max: &str| (Some(min.to_owned()), Some(max.to_owned()));
        assert_eq!(kept(1), (None, None));
        assert_eq!(kept(16), (None, None));
        assert_eq!(kept(64), both("128MB", "1024MB"));
        assert_eq!(kept(1024), both("2048MB", "4096MB"));
    }
}
