//! Beginning a restore that is used while it fills: what can be refused is, then the pin, then the decision is written.
//!
//! The plan is plain restore's own, with all its refusals. Nothing of the basebackup is written here: the supervisor
//! mounts, and what is read comes. The pin comes first, so that no sweep can take the basebackup meanwhile; unlike a
//! lease it outlives every process.

use std::path::{Path, PathBuf};

use crate::disk::durable::{self, Create};
use crate::disk::{self, LockFile, Owner, PrivateArea};
use crate::instance::clone_folder::HydrateSpec;
use crate::instance::instant::InstantError;
use crate::instance::instant::debian_cluster::DebianCluster;
use crate::instance::instant::unfinished::{InstantSpec, Unfinished, read_spec};
use crate::instance::lazy_uppers::MountFailure;
use crate::instance::programs;
use crate::mount::mounting::open_beneath;
use crate::mount::upper::file_system;
use crate::repo::entry::TreePath;
use crate::repo::lease::Pin;
use crate::repo::{self, Basebackup};
use crate::restore::plan::{RestorePlan, control_file};
use crate::restore::settings_files::{main_file, to_json};
use crate::restore::target::{STATE_FILE_NAME, check_existing};
use crate::storage;

/// What the user asked for, beyond what any restore is asked for.
#[derive(Debug, Clone)]
pub struct InstantOptions {
    /// The site in the configuration.
    pub site: String,
    /// PostgreSQL's programs, where the configuration names them.
    pub bin_directory: Option<PathBuf>,
    /// How the rest of the basebackup comes.
    pub hydrate: HydrateSpec,
    /// Whether sessions are to open their files anew once everything is local.
    pub cut_over: bool,
}

const NO_PIN: &str = "these credentials may not write to the store, so nothing keeps the basebackup there until \
                      everything of it is local";
const NO_ROOT: &str = "without root files are not passed through, also once they are local, and WAL is written through the \
                       mount: the server is slower until it has been stopped and started on the plain directory";

/// Checks what only this kind of restore needs of a host, and decides how it goes on; nothing is written.
pub async fn plan_instant(
    basebackup: &Basebackup,
    plan: &mut RestorePlan,
    options: &InstantOptions,
) -> Result<InstantSpec, InstantError> {
    if plan.owner().is_root() {
        return Err(InstantError::RootOwner(plan.destinations.data.clone()));
    }
    check_fuse()?;
    let places = std::iter::once(&plan.destinations.data).chain(plan.destinations.tablespaces.values());
    for place in places {
        file_system::check(nearest_existing(place))?;
    }
    let record = basebackup.record();
    let bin_directory = programs::find(record.server.major, options.bin_directory.as_deref())?;
    let config_file = config_file(basebackup, plan).await?;
    if !Owner::current().is_root() {
        plan.warnings.push(NO_ROOT.to_owned());
    }
    Ok(InstantSpec {
        format: 1,
        site: options.site.clone(),
        pin: None,
        hydrate: options.hydrate,
        cut_over: options.cut_over,
        major: record.server.major,
        bin_directory,
        config_file,
        full_page_writes: control_file(basebackup).await?.full_page_writes,
        superuser: record.server.superuser.clone(),
        began_at: basebackup.repository().clock().now(),
    })
}

/// Pins the basebackup and writes down what was decided; from here on it is gone on with.
///
/// The pin is written down before it holds, so that whoever comes after a kill in between can end it; the plan comes last,
/// for with it the restore has begun.
pub async fn begin(
    basebackup: &Basebackup,
    plan: RestorePlan,
    spec: InstantSpec,
) -> Result<Unfinished, InstantError> {
    let (repository, mut begun) = (basebackup.repository(), Unfinished { plan, spec });
    let (area, lock) = take_hold(&begun.plan)?;
    let left = read_spec(&begun.plan.destinations.data)?.filter(|left| left.site == begun.spec.site);
    if let Some(pin) = left.and_then(|left| left.pin) {
        pin.end(repository).await?;
    }
    let area = clear_left(&begun.plan, &area, &lock)?;
    let pin = Pin::draw(repository, begun.plan.basebackup);
    begun.spec.pin = Some(pin.clone());
    begun.write_spec()?;
    let whom = format!("restore to {}", begun.plan.destinations.data.display());
    match pin.hold(repository, &whom).await {
        Ok(()) => {}
        Err(repo::Error::Store(error)) if error.kind() == storage::ErrorKind::Denied => {
            tracing::warn!("{NO_PIN}");
            begun.plan.warnings.push(NO_PIN.to_owned());
            begun.spec.pin = None;
            begun.write_spec()?;
        }
        // What was written down ends it, should it have come about.
        Err(error) => return Err(error.into()),
    }
    // Its owner says who has decided this.
    let state = area.directory().join(STATE_FILE_NAME);
    durable::write_file(&state, &to_json(&begun.plan)?, Create::PRIVATE_FILE)?;
    Ok(begun)
}

/// Takes hold of the target, as plain restore does.
fn take_hold(plan: &RestorePlan) -> Result<(PrivateArea, LockFile), InstantError> {
    let (destinations, owner) = (&plan.destinations, plan.owner());
    let check = || check_existing(destinations, plan.existing, plan.recovery.cluster, Owner::current(), None);
    if PrivateArea::open(&destinations.data)?.is_none() {
        check()?;
    }
    for (root, _) in destinations.all() {
        durable::create_dir_all(root, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    }
    let area = PrivateArea::create(&destinations.data, Some(owner))?;
    let lock = area.lock()?;
    check()?;
    Ok((area, lock))
}

/// Removes what an earlier restore has left, which would be taken for this one's: `rm -rf DIR/*` leaves it.
fn clear_left(plan: &RestorePlan, area: &PrivateArea, lock: &LockFile) -> Result<PrivateArea, InstantError> {
    let (destinations, owner) = (&plan.destinations, plan.owner());
    area.clear(lock)?;
    let area = PrivateArea::create(&destinations.data, Some(owner))?;
    for place in destinations.tablespaces.values() {
        if let Some(left) = PrivateArea::open(place)? {
            let _held = left.lock()?;
            PrivateArea::discard(place)?;
        }
    }
    let places = std::iter::once(&destinations.data).chain(destinations.tablespaces.values());
    for place in places {
        give(place, owner)?;
    }
    Ok(area)
}

/// Gives a directory to the server's user: whoever opens it later goes by that (`mounts::check_place`).
fn give(place: &Path, owner: Owner) -> Result<(), InstantError> {
    let directory = open_beneath(place).map_err(MountFailure::Mount)?;
    if Owner::current().is_root() {
        std::os::unix::fs::fchown(&directory, Some(owner.uid), Some(owner.gid))
            .map_err(disk::Error::at("change the owner of", place))?;
    }
    Ok(())
}

/// Refuses a host on which nobody, or not this user, can mount.
fn check_fuse() -> Result<(), InstantError> {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/fuse");
    if let Err(error) = opened {
        return Err(InstantError::NoFuse { detail: format!("could not open /dev/fuse: {error}") });
    }
    if Owner::current().is_root() {
        return Ok(());
    }
    match std::process::Command::new("fusermount3").arg("--version").output() {
        Ok(_) => Ok(()),
        Err(error) => Err(InstantError::NoFuse { detail: format!("could not run fusermount3: {error}") }),
    }
}

/// Finds the server's main configuration file where that is not in PGDATA.
async fn config_file(basebackup: &Basebackup, plan: &RestorePlan) -> Result<Option<PathBuf>, InstantError> {
    if let Some(file) = main_file(plan)? {
        return Ok(Some(file));
    }
    let inside =
        TreePath::new("data/postgresql.conf").map_err(|error| InstantError::Internal(error.to_string()))?;
    if basebackup.entry(&inside).await?.is_some() {
        return Ok(None);
    }
    match DebianCluster::of(&plan.destinations.data).map(|found| found.config_file()) {
        Some(file) if file.is_file() => Ok(Some(file)),
        _ => Err(InstantError::NoConfiguration),
    }
}

fn nearest_existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"))
}
