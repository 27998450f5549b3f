//! Making a clone: which basebackup, what its recovery may ask for, what has to stand in for foreign paths.
//!
//! Everything is decided and checked before the folder exists; what is written then is the decision. The basebackup
//! is pinned first, so that no sweep can take it while the clone lives. What a kill leaves is `half_made`'s. Starting it is
//! the supervisor's work.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::catalog::host::{self, Host, OtherArchitecture};
use crate::catalog::recovery_choice::{PlannedRecovery, RecoveryError, RecoveryRequest, plan_for_target};
use crate::catalog::wal_scan::{WalScan, scan_wal};
use crate::catalog::{RecoveryPlan, RecoveryTarget, TargetAction};
use crate::control::CloneState;
use crate::disk::durable::{self, Create};
use crate::disk::{self, Owner};
use crate::instance::clone_folder::{CloneFolder, CloneSpec, HydrateSpec, LastState, write_json};
use crate::instance::half_made::{give_up, made, make_folder, pin};
use crate::instance::isolation::{config_files, socket_path};
use crate::instance::preload::{Preload, is_in, plan_preload};
use crate::repo::documents::ServerRecord;
use crate::repo::manifest::Tablespace;
use crate::repo::{self, Repository, read_manifest_start};

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The site in the configuration.
    pub site: String,
    /// The basebackup; chosen by the target where none is named.
    pub basebackup: Option<String>,
    /// Where recovery ends.
    pub target: RecoveryTarget,
    /// Whether recovery shall end before a hole that the target lies behind.
    pub until_hole: bool,
    /// The port in the socket's name.
    pub port: u16,
    /// Whether sessions are let in before the target.
    pub read_early: bool,
    /// PostgreSQL's programs, where the configuration names them.
    pub bin_directory: Option<PathBuf>,
    /// Whom PostgreSQL runs as.
    pub owner: Owner,
    /// Who makes the clone and will serve its mount.
    pub user: Owner,
    /// What is known of this host.
    pub host: Host,
    /// Libraries to preload that the user vouches for.
    pub preload: Vec<String>,
    /// How the rest of the basebackup comes.
    pub hydrate: HydrateSpec,
    /// When the clone is deleted, if ever.
    pub expires_at: Option<Timestamp>,
}

impl CreateOptions {
    fn request(&self) -> RecoveryRequest<'_> {
        let Self { basebackup, target, until_hole, .. } = self;
        RecoveryRequest { basebackup: basebackup.as_deref(), target, until_hole: *until_hole }
    }
}

/// A server that runs as another user than the mount's reads neither keys nor credentials.
const SHARED_USER: &str = "PostgreSQL runs as the user who serves the mount: a superuser of the clone can read that \
                           user's private keys and the store's credentials; root keeps them apart";
const NO_PIN: &str = "these credentials may not write to the store, so nothing keeps the basebackup there while the \
                      clone lives";

/// Why a clone cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// What recovery would go through.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// The folder.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// PostgreSQL's programs.
    #[error(transparent)]
    Programs(#[from] crate::instance::programs::ProgramsError),
    /// Pages of the basebackup are of no use here.
    #[error(transparent)]
    Architecture(#[from] OtherArchitecture),
    /// The socket's path.
    #[error("the path of the socket, \"{}\", is longer than a socket's may be", .0.display())]
    SocketPath(PathBuf),
    /// The WAL needs a library that the clone would not load.
    #[error("the WAL has records of an extension's resource manager ({}), which only its library can replay", numbers(.0))]
    ResourceManagers(Vec<u8>),
    /// Somebody else is at it.
    #[error("clone \"{name}\" is being made by {}", disk::lock::describe_holder(*.holder))]
    InTheMaking { name: String, holder: Option<i32> },
    /// PostgreSQL refuses to run as root.
    #[error("PostgreSQL does not run as root, and the clones folder belongs to root")]
    RootOwner,
}

impl CreateError {
    /// Returns what the user should do.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Repository(error) => return error.hint().map(str::to_owned),
            Self::Recovery(error) => return error.hint().map(str::to_owned),
            Self::Architecture(error) => error.hint().to_owned(),
            Self::SocketPath(_) => "Set [paths] clones to a shorter path.".to_owned(),
            Self::RootOwner => {
                "Give the folder to the user that is to run PostgreSQL, such as postgres.".to_owned()
            }
            Self::InTheMaking { .. } => "Wait until it is made, or take another name.".to_owned(),
            Self::Programs(error) => return error.hint(),
            Self::ResourceManagers(_) => {
                "Name the extension's library with --preload; what it does when it is loaded is not looked at."
                    .to_owned()
            }
            Self::Disk(disk::Error::Exists { .. }) => "\"walden clone delete\" removes a clone.".to_owned(),
            Self::Disk(error) => return error.hint().map(str::to_owned),
        })
    }
}

/// Makes the folder of a clone; it can be started afterwards.
pub async fn create(
    repository: &Repository,
    folder: &CloneFolder,
    options: &CreateOptions,
) -> Result<CloneSpec, CreateError> {
    if options.owner.is_root() {
        return Err(CreateError::RootOwner);
    }
    socket_path(&folder.run(), options.port).map_err(CreateError::SocketPath)?;
    let planned = plan_for_target(repository, options.request()).await?;
    let mut warnings = planned.warnings();
    let PlannedRecovery { record, plan, timeline, target, accepted_hole, .. } = planned;
    host::check_architecture(&record.server, &options.host)?;
    let bin_directory =
        crate::instance::programs::find(record.server.major, options.bin_directory.as_deref())?;
    let tablespaces = read_manifest_start(repository, &record).await?.tablespaces;
    // Held until all is written: what somebody makes is not what a kill has left.
    let _lock = make_folder(repository, folder, &options.site, options.owner).await?;
    warnings.extend(warnings_of(&record.server, options));
    let pin = match pin(repository, record.id, folder, &options.site).await {
        Ok(pin) => pin,
        Err(error) => return Err(give_up(repository, folder, error).await),
    };
    if pin.is_none() {
        warnings.push(NO_PIN.to_owned());
    }
    // Pinned before the long look at the WAL: no sweep can take the basebackup meanwhile.
    let scan = match scan_wal(repository, &plan, &target.target, record.start_lsn).await {
        Ok(scan) => scan,
        Err(error) => return Err(give_up(repository, folder, error.into()).await),
    };
    if let Some(error) = unreplayable(&scan, &options.preload) {
        return Err(give_up(repository, folder, error).await);
    }
    let preload = preload(&record.server.preload_libraries, &options.preload, &bin_directory);
    let left_out = preload.left_out.iter();
    warnings.extend(left_out.map(|(name, reason)| format!("the clone does not preload {name}: {reason}")));
    let spec = CloneSpec {
        format: 1,
        name: folder.name().to_owned(),
        site: options.site.clone(),
        basebackup: record.id,
        manifest_digest: record.manifest.digest.to_string(),
        cluster: record.cluster,
        major: record.server.major,
        preload: preload.setting(),
        bin_directory,
        target,
        until_hole: accepted_hole,
        timeline,
        read_early: options.read_early,
        port: options.port,
        superuser: record.server.superuser.clone(),
        owner: (options.owner.uid, options.owner.gid),
        pin,
        limits: scan.limits,
        stand_ins: stand_ins(folder, &tablespaces, &scan),
        warnings,
        hydrate: options.hydrate,
        created_at: repository.clock().now(),
        expires_at: options.expires_at,
    };
    match write_folder(folder, &spec, &plan, options.owner) {
        Ok(()) => {
            spec.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            Ok(spec)
        }
        Err(error) => Err(give_up(repository, folder, error.into()).await),
    }
}

/// What the user should know of any clone of this basebackup on this host.
fn warnings_of(server: &ServerRecord, options: &CreateOptions) -> Vec<String> {
    let mut warnings: Vec<String> = host::ordering_warning(server, &options.host).into_iter().collect();
    if options.user.uid == options.owner.uid {
        warnings.push(SHARED_USER.to_owned());
    }
    warnings
}

/// Refuses WAL that needs a library, while nobody has said which: the server would end in the middle of it.
fn unreplayable(scan: &WalScan, vouched_for: &[String]) -> Option<CreateError> {
    let unknown = !scan.managers.is_empty() && vouched_for.is_empty();
    unknown.then(|| CreateError::ResourceManagers(scan.managers.iter().copied().collect()))
}

fn numbers(managers: &[u8]) -> String {
    let numbers: Vec<String> = managers.iter().map(u8::to_string).collect();
    numbers.join(", ")
}

/// Decides what the clone's server preloads.
fn preload(source: &str, vouched_for: &[String], bin_directory: &Path) -> Preload {
    // Debian has libraries beside the programs, a plain build one level further down.
    let folders = ["../lib", "../lib/postgresql"].map(|folder| bin_directory.join(folder));
    plan_preload(source, vouched_for, |name| folders.iter().any(|folder| is_in(folder, name)))
}

/// Places of the source that replay may write to, whatever is there on this host: where its tablespaces were when the
/// basebackup was taken, and where it made others later.
fn stand_ins(folder: &CloneFolder, tablespaces: &[Tablespace], scan: &WalScan) -> Vec<(PathBuf, PathBuf)> {
    // A tablespace without a location is a directory of `pg_tblspc` itself.
    let mut stand_ins: Vec<(PathBuf, PathBuf)> = tablespaces
        .iter()
        .filter(|tablespace| !tablespace.location.is_empty())
        .map(|tablespace| {
            let location = PathBuf::from(OsString::from_vec(tablespace.location.clone()));
            (location, folder.tablespace(tablespace.oid))
        })
        .collect();
    for (oid, location) in &scan.tablespaces {
        // A place that is used again, or that is in the basebackup already, has its folder.
        if !stand_ins.iter().any(|(known, _)| known == location) {
            stand_ins.push((location.clone(), folder.stand_ins().join(oid.to_string())));
        }
    }
    stand_ins
}

pub(super) fn write_folder(
    folder: &CloneFolder,
    spec: &CloneSpec,
    plan: &RecoveryPlan,
    owner: Owner,
) -> Result<(), disk::Error> {
    write_places(folder, spec, owner)?;
    durable::write_file(&folder.server_log(), b"", Create::PRIVATE_FILE.owned_by(owner))?;
    write_json(&folder.plan_file(), plan, "a recovery plan")?;
    folder.write_state(&LastState::sound(CloneState::Creating))?;
    folder.write_spec(spec)?;
    made(folder);
    Ok(())
}

/// Makes the folders that stand in for foreign paths, and the generated configuration.
pub(super) fn write_places(folder: &CloneFolder, spec: &CloneSpec, owner: Owner) -> Result<(), disk::Error> {
    let own_folders = spec.stand_ins.iter().filter(|(_, own)| own.starts_with(folder.stand_ins()));
    for (_, own) in own_folders {
        durable::create_dir(own, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    }
    for (name, text) in config_files(folder.name()) {
        let file = folder.config().join(name);
        durable::write_file(&file, text.as_bytes(), Create::PRIVATE_FILE.owned_by(owner))?;
    }
    Ok(())
}

/// Returns the action that a clone takes where none is named.
pub const fn default_action() -> TargetAction {
    TargetAction::Promote
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn wal_of_an_extension_is_refused_until_its_library_is_named() {
        let scan = WalScan { managers: BTreeSet::from([140]), ..WalScan::default() };
        let error = unreplayable(&scan, &[]).unwrap();
        assert!(error.to_string().contains("resource manager (140)"), "{error}");
        assert!(error.hint().unwrap().contains("--preload"));
        assert!(unreplayable(&scan, &["its_library".to_owned()]).is_none());
        assert!(unreplayable(&WalScan::default(), &[]).is_none());
    }
}
