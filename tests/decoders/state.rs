//! What Walden's processes say to each other and remember on a host: messages, and documents in local files.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use walden::catalog::{RecoveryPlan, RecoveryTarget, TargetAction};
use walden::control::{
    ArchivedFile, CloneSetting, CloneState, DaemonAnswer, DaemonRequest, Destination, Failure, FileReply,
    FileRequest, PushRequest, Reply, Request,
};
use walden::disk::state_file::DOCUMENT_BYTES_MAX;
use walden::disk::{Binding, PrivateArea};
use walden::instance::clone_folder::{CloneFolder, CloneSpec, HydrateSpec, LastState};
use walden::instance::finalize::{FinalizeOrder, TablespaceMove, TreeMove};
use walden::instance::launch::{Isolation, Launch};
use walden::pg::{RecoveryLimits, TimelineId};
use walden::repo::lease::Pin;
use walden::repo::{BasebackupId, ClusterId};
use walden::restore::destinations::{ConfigurationPlace, Destinations};
use walden::restore::plan::{Existing, Figures, RestorePlan};
use walden::restore::recovery_settings::Setting;
use walden::restore::run::read_unfinished;
use walden::restore::target::RestoreMarker;

use crate::BYTES_ALWAYS;
use crate::counting::peak_of;
use crate::samples::{Decoder, PLAN, decoder};

/// A document or message of type `T`, of which there are these.
fn json<T: Serialize + DeserializeOwned>(name: &'static str, values: &[T]) -> Decoder {
    let samples: Vec<Vec<u8>> = values.iter().map(|value| serde_json::to_vec(value).unwrap()).collect();
    samples.iter().for_each(|sample| drop(serde_json::from_slice::<T>(sample).expect(name)));
    decoder(name, samples, |bytes| drop(serde_json::from_slice::<T>(bytes)))
}

pub fn decoders() -> Vec<Decoder> {
    let failure = Failure { kind: "failed".into(), message: "x".into(), hint: Some("Do.".into()) };
    let archived = ArchivedFile { name: "1".into(), cluster: "7-1".into(), created: true };
    let setting = CloneSetting { name: "port".into(), value: "5432".into(), reason: "x".into() };
    vec![
        json(
            "request to a clone",
            &[Request::Status, Request::Stop, Request::Promote, Request::Reload, Request::Finalize],
        ),
        json(
            "reply of a clone",
            &[Reply::Done, Reply::NotYet { message: "x".into() }, Reply::Failed { message: "x".into() }],
        ),
        json(
            "request to a daemon",
            &[DaemonRequest::Push(PushRequest {
                site: "main".into(),
                path: "/d/pg_wal/1".into(),
                force: true,
                destination: Destination {
                    repository: "main in s3://bucket".into(),
                    recipients: Some(vec!["2026".into()]),
                },
            })],
        ),
        json(
            "answer of a daemon",
            &[
                DaemonAnswer::Working,
                DaemonAnswer::Archived(archived),
                DaemonAnswer::Failed(failure),
                DaemonAnswer::Elsewhere,
            ],
        ),
        json("request for a file", &[FileRequest { name: "00000002.history".into() }]),
        json(
            "reply about a file",
            &[FileReply::Written { bytes: 9 }, FileReply::Enclosed { bytes: 9 }, FileReply::Absent],
        ),
        json("binding of a private area", &[binding()]),
        json("description of a clone", &[clone_spec()]),
        json("order to finalize a clone", &[finalize_order()]),
        json("state of a clone", &[LastState::sound(CloneState::Running)]),
        json("settings of a clone", &[vec![setting]]),
        json("order to start a server", &[launch()]),
        json("plan of a restore", &[restore_plan()]),
        json("marker of a restore", &[restore_marker()]),
    ]
}

fn basebackup() -> BasebackupId {
    "20261120T101500Z-3fa9".parse().unwrap()
}

fn cluster() -> ClusterId {
    "7710459600104976879-1".parse().unwrap()
}

fn binding() -> Binding {
    Binding { basebackup: basebackup().to_string(), manifest_digest: "ab12".into(), part: "data".into() }
}

fn clone_spec() -> CloneSpec {
    CloneSpec {
        format: 1,
        name: "yesterday".into(),
        site: "main".into(),
        basebackup: basebackup(),
        manifest_digest: "ab12".into(),
        cluster: cluster(),
        major: 15,
        bin_directory: "/usr/lib/postgresql/15/bin".into(),
        target: RecoveryTarget::latest(TargetAction::Promote),
        until_hole: None,
        timeline: TimelineId::FIRST,
        read_early: false,
        port: 5432,
        superuser: "postgres".into(),
        owner: (113, 120),
        pin: Some(Pin { id: basebackup(), random: [7; 8] }),
        limits: RecoveryLimits::default(),
        preload: "pg_stat_statements".into(),
        stand_ins: vec![(PathBuf::from("/srv/one"), PathBuf::from("/clones/yesterday/tablespaces/1"))],
        warnings: vec!["x".into()],
        hydrate: HydrateSpec::default(),
        created_at: Timestamp::UNIX_EPOCH,
        expires_at: Some(Timestamp::UNIX_EPOCH),
    }
}

fn finalize_order() -> FinalizeOrder {
    let tree = |from: &str, to: &str| TreeMove { from: from.into(), to: to.into() };
    FinalizeOrder {
        format: 1,
        name: "yesterday".into(),
        site: "main".into(),
        owner: (113, 120),
        data: tree("/clones/yesterday/upper/data", "/srv/main"),
        wal: "/clones/yesterday/pg_wal".into(),
        tablespaces: vec![TablespaceMove {
            oid: "16400".into(),
            tree: tree("/clones/yesterday/upper/tablespace-16400", "/srv/main.tablespaces/16400"),
        }],
        settings: vec![("archive_mode".into(), "off".into())],
        is_adopted: false,
        is_copied: true,
        pin: Some(Pin { id: basebackup(), random: [7; 8] }),
    }
}

fn launch() -> Launch {
    Launch {
        program: "/usr/lib/postgresql/15/bin/postgres".into(),
        arguments: vec![OsString::from("-D"), OsString::from("/clones/yesterday/mnt/data")],
        data_directory: "/clones/yesterday/mnt/data".into(),
        pid_file: "/clones/yesterday/upper/data/postmaster.pid".into(),
        owner: (113, 120),
        isolation: Some(Isolation {
            writable: vec![PathBuf::from("/clones/yesterday")],
            stand_ins: vec![(PathBuf::from("/srv/one"), PathBuf::from("/clones/yesterday/tablespaces/1"))],
        }),
        log_file: "/clones/yesterday/server.log".into(),
        environment: vec![("LANG".into(), "C".into())],
        supervisor: 4711,
    }
}

fn destinations() -> Destinations {
    Destinations {
        data: "/srv/restored".into(),
        tablespaces: [(16_400, PathBuf::from("/srv/one"))].into(),
        configuration: Some(ConfigurationPlace {
            directory: "/etc/restored".into(),
            top: "config/etc".into(),
        }),
    }
}

fn restore_plan() -> RestorePlan {
    let settings = vec![Setting { name: "recovery_target".into(), value: String::new() }];
    RestorePlan {
        format: 1,
        basebackup: basebackup(),
        manifest_digest: "ab12".into(),
        destinations: destinations(),
        tablespace_names: [(16_400, "one".to_owned())].into(),
        owner: (113, 120),
        existing: Existing::Delta,
        recovery: serde_json::from_str::<RecoveryPlan>(PLAN).unwrap(),
        target: Some(RecoveryTarget::latest(TargetAction::Pause)),
        timeline: TimelineId::FIRST,
        settings: settings.clone(),
        configuration: Some(("config/etc/postgresql.conf".into(), settings)),
        figures: Figures::default(),
        warnings: vec!["x".into()],
    }
}

fn restore_marker() -> RestoreMarker {
    RestoreMarker { format: 1, basebackup: basebackup(), cluster: cluster(), destinations: destinations() }
}

/// The longest document that is read, three times: a vector grows by doubling, and what it was is there meanwhile.
const DOCUMENT_BYTES: usize = 3 * DOCUMENT_BYTES_MAX as usize;

/// Makes a file of a terabyte, which takes no room.
fn make_huge(path: &Path) {
    File::create(path).unwrap().set_len(1 << 40).unwrap();
}

#[test]
fn a_local_file_without_end_is_refused_in_bounded_memory() {
    let scratch = tempfile::tempdir().unwrap();
    let area = PrivateArea::create(scratch.path(), None).unwrap();
    make_huge(&area.directory().join("binding.json"));
    make_huge(&area.directory().join("restore.json"));
    let clone = CloneFolder::new(scratch.path(), "one").unwrap();
    std::fs::create_dir(clone.path()).unwrap();
    ["clone.json", "state.json", "settings.json"].iter().for_each(|name| make_huge(&clone.path().join(name)));
    let peak = peak_of(|| {
        for refused in [
            area.binding().unwrap_err().to_string(),
            read_unfinished(scratch.path()).unwrap_err().to_string(),
            clone.read_spec().unwrap_err().to_string(),
            clone.read_state().unwrap_err().to_string(),
            clone.read_settings().unwrap_err().to_string(),
        ] {
            assert!(refused.contains(&format!("it has more than {DOCUMENT_BYTES_MAX} bytes")), "{refused}");
        }
    });
    assert!(peak <= DOCUMENT_BYTES + BYTES_ALWAYS, "{peak} bytes");
}
