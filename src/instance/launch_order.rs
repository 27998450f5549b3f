//! What the postmaster of a clone is started with: from its description, its folder and its control file.
//!
//! Pure: what of it is to be decided, `isolation` decides.

use crate::catalog::wal_scan::greatest;
use crate::control::CloneSetting;
use crate::instance::clone_folder::CloneSpec;
use crate::instance::isolation::{CloneFacts, Setting};
use crate::instance::launch::{Isolation, Launch};
use crate::instance::supervise::SuperviseOptions;
use crate::pg::ControlFile;

/// Returns what a clone's settings follow from.
pub(super) fn facts(
    options: &SuperviseOptions,
    spec: &CloneSpec,
    control: &ControlFile,
    recovering: bool,
) -> CloneFacts {
    let folder = &options.folder;
    CloneFacts {
        name: spec.name.clone(),
        major: spec.major,
        socket_directory: folder.run(),
        port: spec.port,
        config_directory: folder.config(),
        wal_directory: folder.mount_point().join("wal"),
        limits: greatest(control.limits, spec.limits),
        recovery: recovering.then(|| (spec.target.clone(), spec.timeline)),
        wal_segment_size: control.wal_segment_size,
        full_page_writes: control.full_page_writes,
        preload: spec.preload.clone(),
        read_early: spec.read_early,
        host_memory_bytes: options.host_memory_bytes,
    }
}

/// Returns a setting as `clone status` lists it.
pub(super) fn listed(setting: Setting) -> CloneSetting {
    let Setting { name, value, reason } = setting;
    CloneSetting { name: name.to_owned(), value, reason: reason.to_owned() }
}

/// Returns how a clone's postmaster is started.
pub(super) fn launch(options: &SuperviseOptions, spec: &CloneSpec, settings: &[Setting]) -> Launch {
    let folder = &options.folder;
    let mut arguments = vec!["-D".into(), folder.data_directory().into_os_string()];
    for setting in settings {
        arguments.push("-c".into());
        arguments.push(format!("{}={}", setting.name, setting.value).into());
    }
    Launch {
        program: spec.bin_directory.join("postgres"),
        arguments,
        data_directory: folder.data_directory(),
        pid_file: folder.beneath_mount("postmaster.pid"),
        owner: spec.owner,
        isolation: Some(Isolation { writable: folder.writable(), stand_ins: spec.stand_ins.clone() }),
        log_file: folder.server_log(),
        environment: options.environment.clone(),
        supervisor: std::process::id(),
    }
}
