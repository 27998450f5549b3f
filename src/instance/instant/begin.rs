//! Beginning a restore that is used while it fills: what can be refused is, then the pin, then the decision is written.
//!
//! The plan is plain restore's own, with all its refusals. Nothing of the basebackup is written here: the supervisor
//! mounts, and what is read comes. The pin comes first, so that no sweep can take the basebackup meanwhile; unlike a
//! lease it outlives every process.

use std::path::{Path, PathBuf};

use crate::disk::durable::{self, Create};
use crate::disk::{Owner, PrivateArea};
use crate::instance::clone_folder::HydrateSpec;
use crate::instance::instant::InstantError;
use crate::instance::instant::unfinished::{InstantSpec, Unfinished, write_spec};
use crate::instance::pinning::pin;
use crate::instance::programs;
use crate::mount::upper::file_system;
use crate::repo::Basebackup;
use crate::repo::entry::TreePath;
use crate::restore::plan::{RestorePlan, control_file};
use crate::restore::settings_files::{main_file, to_json};
use crate::restore::target::{STATE_FILE_NAME, check_existing};

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
pub async fn begin(
    basebackup: &Basebackup,
    plan: RestorePlan,
    spec: InstantSpec,
) -> Result<Unfinished, InstantError> {
    let repository = basebackup.repository();
    let mut begun = Unfinished { plan, spec };
    let whom = format!("restore to {}", begun.plan.destinations.data.display());
    begun.spec.pin = pin(repository, begun.plan.basebackup, &whom).await?;
    if begun.spec.pin.is_none() {
        begun.plan.warnings.push(NO_PIN.to_owned());
        tracing::warn!("{NO_PIN}");
    }
    match write_down(&begun) {
        Ok(()) => Ok(begun),
        Err(error) => {
            if let Some(pin) = &begun.spec.pin
                && let Err(error) = pin.end(repository).await
            {
                tracing::warn!("could not let go of basebackup {}: {error}", pin.id);
            }
            Err(error)
        }
    }
}

/// Takes hold of the target, as plain restore does; the plan comes last, for with it the restore has begun.
fn write_down(begun: &Unfinished) -> Result<(), InstantError> {
    let Unfinished { plan, spec } = begun;
    let (destinations, owner) = (&plan.destinations, plan.owner());
    let check = || check_existing(destinations, plan.existing, plan.recovery.cluster, Owner::current(), None);
    if PrivateArea::open(&destinations.data)?.is_none() {
        check()?;
    }
    for (root, _) in destinations.all() {
        durable::create_dir_all(root, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    }
    let area = PrivateArea::create(&destinations.data, Some(owner))?;
    let _lock = area.lock()?;
    check()?;
    // What a restore has left that ended before it had begun.
    area.unbind()?;
    write_spec(plan, spec)?;
    // Its owner says who has decided this.
    let state = area.directory().join(STATE_FILE_NAME);
    Ok(durable::write_file(&state, &to_json(plan)?, Create::PRIVATE_FILE)?)
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
    match debian_config_file(&plan.destinations.data).filter(|file| file.is_file()) {
        Some(file) => Ok(Some(file)),
        None => Err(InstantError::NoConfiguration),
    }
}

/// Returns where Debian has the configuration of a cluster whose data directory is where Debian has those.
fn debian_config_file(data: &Path) -> Option<PathBuf> {
    let (version, name) = debian_cluster(data)?;
    Some(Path::new("/etc/postgresql").join(version).join(name).join("postgresql.conf"))
}

/// Returns version and name of the cluster whose data directory Debian has at this path.
pub(super) fn debian_cluster(data: &Path) -> Option<(String, String)> {
    let mut parts = data.strip_prefix("/var/lib/postgresql").ok()?.components();
    let mut next = || parts.next()?.as_os_str().to_str().map(str::to_owned);
    let (version, name) = (next()?, next()?);
    let is_version = version.parse::<f32>().is_ok();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (is_version && name.bytes().all(is_plain) && next().is_none()).then_some((version, name))
}

fn nearest_existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debian_cluster_is_known_by_where_its_data_directory_is() {
        let cluster = |path: &str| debian_cluster(Path::new(path));
        let of = |version: &str, name: &str| Some((version.to_owned(), name.to_owned()));
        assert_eq!(cluster("/var/lib/postgresql/15/main"), of("15", "main"));
        assert_eq!(cluster("/var/lib/postgresql/15/my-db_2"), of("15", "my-db_2"));
        for other in [
            "/var/lib/postgresql/15",
            "/var/lib/postgresql/15/main/base",
            "/var/lib/postgresql/data/main",
            "/var/lib/postgresql/15/a b",
            "/srv/postgresql/15/main",
            "15/main",
        ] {
            assert_eq!(cluster(other), None, "{other}");
        }
        let file = debian_config_file(Path::new("/var/lib/postgresql/15/main")).unwrap();
        assert_eq!(file, Path::new("/etc/postgresql/15/main/postgresql.conf"));
    }
}
