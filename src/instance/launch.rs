//! Starts a postmaster: a clone's sees nothing writable but its own directories, a restored server's sees all its user may.
//!
//! `walden internal run-postgres` reads an order from its standard input and becomes the postmaster: private mount
//! namespace (`mount_namespace`) or Landlock, privileges dropped, exec. A process of its own, because namespaces are
//! entered before there are threads. Replay of CREATE TABLESPACE writes to the absolute path
//! that stands in the WAL (failure 27b: it destroyed rows of the running source); here another folder stands there.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid};
use serde::{Deserialize, Serialize};

use crate::instance::landlock;
use crate::instance::mount_namespace::{self, NamespaceError};

/// What is to be started.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// The `postgres` program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Where it runs.
    pub data_directory: PathBuf,
    /// Where its pid file appears, beneath the mount.
    pub pid_file: PathBuf,
    /// The user and group it runs as.
    pub owner: (u32, u32),
    /// What it may write to; whatever its user may, where nothing is said.
    pub isolation: Option<Isolation>,
    /// Where its output goes.
    pub log_file: PathBuf,
    /// Its whole environment.
    pub environment: Vec<(String, String)>,
    /// The process that waits for it: when that one dies, it dies too.
    pub supervisor: u32,
}

/// What a postmaster may write to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Isolation {
    /// Directories that stay writable, and mounts below them.
    pub writable: Vec<PathBuf>,
    /// Absolute paths, each with the folder that stands in for it.
    pub stand_ins: Vec<(PathBuf, PathBuf)>,
}

/// Why a postmaster could not be started in isolation.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The order could not be read.
    #[error("the order is not understood: {0}")]
    Order(io::Error),
    /// A step failed.
    #[error("could not {step}: {source}")]
    Step { step: String, source: io::Error },
    /// Somebody else's path would be written to, and nothing here can prevent it.
    #[error("replay writes to \"{}\", and this process may not make a private mount namespace", path.display())]
    NotRedirected { path: PathBuf },
    /// Nothing here can keep the server's writes within the clone.
    #[error(
        "nothing keeps the clone's server from writing elsewhere: neither a mount namespace ({namespace}) nor Landlock \
         ({landlock})"
    )]
    NotIsolated { namespace: io::Error, landlock: io::Error },
    /// The view could not be made.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

const ORDER_BYTES_MAX: u64 = 1 << 20;

/// Reads the order and becomes the postmaster; returns only why it could not.
pub fn run() -> LaunchError {
    let mut order = Vec::new();
    let launch = io::stdin()
        .take(ORDER_BYTES_MAX)
        .read_to_end(&mut order)
        .and_then(|_| serde_json::from_slice::<Launch>(&order).map_err(io::Error::other));
    match launch {
        Ok(launch) => become_postgres(&launch).unwrap_or_else(|error| error),
        Err(error) => LaunchError::Order(error),
    }
}

fn become_postgres(launch: &Launch) -> Result<LaunchError, LaunchError> {
    let log = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&launch.log_file)
        .map_err(step(format!("open \"{}\"", launch.log_file.display())))?;
    let errors = log.try_clone().map_err(step("use the log twice"))?;
    launch.isolation.iter().try_for_each(isolate).inspect_err(|error| {
        // Whoever looks why there is no server looks into its log.
        let _ = writeln!(&log, "FATAL:  {error}");
    })?;
    drop_privileges(launch.owner)?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGQUIT)
        .map_err(|errno| step("follow the supervisor")(errno.into()))?;
    if nix::unistd::getppid().as_raw().unsigned_abs() != launch.supervisor {
        return Err(step("follow the supervisor")(io::Error::other("it is gone already")));
    }
    nix::unistd::setsid().ok();
    std::env::set_current_dir(&launch.data_directory).map_err(step("enter the data directory"))?;
    let error = Command::new(&launch.program)
        .args(&launch.arguments)
        .env_clear()
        .envs(launch.environment.iter().map(|(name, value)| (name, value)))
        .stdin(File::open("/dev/null").map_err(step("open /dev/null"))?)
        .stdout(log)
        .stderr(errors)
        .exec();
    Ok(step(format!("execute \"{}\"", launch.program.display()))(error))
}

/// Gives this process the best that the host allows.
fn isolate(isolation: &Isolation) -> Result<(), LaunchError> {
    let namespace = match mount_namespace::enter(&isolation.writable, &isolation.stand_ins) {
        Ok(()) => Ok(()),
        Err(NamespaceError::Unavailable { source }) => Err(source),
        Err(error) => return Err(error.into()),
    };
    let foreign = isolation.stand_ins.first().map(|(path, _)| path.as_path());
    choose(foreign, namespace, || landlock::restrict(&isolation.writable))
}

/// Goes on in a mount namespace, else, where replay is known to write to no `foreign` path, under Landlock.
///
/// Without either a clone is refused whatever its WAL holds: what is created later, by a promoted clone's own
/// sessions or by WAL that is replayed after a pause, may name any path of this host.
fn choose(
    foreign: Option<&Path>,
    namespace: io::Result<()>,
    landlock: impl FnOnce() -> io::Result<()>,
) -> Result<(), LaunchError> {
    let Err(namespace) = namespace else { return Ok(()) };
    // Landlock forbids and cannot redirect: replay would end at the first foreign path.
    if let Some(path) = foreign {
        return Err(LaunchError::NotRedirected { path: path.to_owned() });
    }
    landlock().map_err(|landlock| LaunchError::NotIsolated { namespace, landlock })
}

fn drop_privileges(owner: (u32, u32)) -> Result<(), LaunchError> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
    let dropped = || -> nix::Result<()> {
        match nix::unistd::User::from_uid(uid)? {
            Some(user) => {
                let name = CString::new(user.name).map_err(|_| nix::errno::Errno::EINVAL)?;
                nix::unistd::initgroups(&name, gid)?;
            }
            None => nix::unistd::setgroups(&[gid])?,
        }
        nix::unistd::setgid(gid)?;
        nix::unistd::setuid(uid)
    };
    dropped().map_err(|errno| step(format!("become user {uid}"))(errno.into()))
}

fn step(step: impl Into<String>) -> impl FnOnce(io::Error) -> LaunchError {
    let step = step.into();
    move |source| LaunchError::Step { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable() -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }

    #[test]
    fn a_namespace_is_enough_and_landlock_is_then_not_asked() {
        choose(Some(Path::new("/srv/ts")), Ok(()), || panic!("asked")).unwrap();
    }

    #[test]
    fn failure_27b_landlock_is_enough_only_where_replay_writes_to_no_foreign_path() {
        choose(None, unavailable(), || Ok(())).unwrap();
        let refused = choose(Some(Path::new("/srv/ts")), unavailable(), || panic!("asked")).unwrap_err();
        assert!(matches!(&refused, LaunchError::NotRedirected { path } if path == Path::new("/srv/ts")));
        assert!(refused.to_string().contains("\"/srv/ts\""), "{refused}");
    }

    #[test]
    fn a_clone_that_nothing_isolates_is_refused() {
        let refused = choose(None, unavailable(), unavailable).unwrap_err();
        assert!(matches!(&refused, LaunchError::NotIsolated { .. }), "{refused}");
        assert!(refused.to_string().contains("Operation not permitted"), "{refused}");
    }
}
