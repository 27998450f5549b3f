//! The folders on this host: where they are, whose they are, and that nobody else writes to them.
//!
//! Defaults are the system's for root and the home directory's for everybody else. A folder is checked when it
//! is first used, not when the configuration is read, so that `walden list` works on a host without any state.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk::Owner;
use crate::disk::durable::{Create, create_dir_all};

use super::environment::Environment;
use super::error::{Error, Result};
use super::table::Table;

/// Where Walden keeps what it needs on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// What is remembered between runs.
    pub state: PathBuf,
    /// The daemon's socket.
    pub run: PathBuf,
    /// What clones write.
    pub clones: PathBuf,
}

/// A folder that was checked, and who it belongs to: what root creates below it gets this owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedFolder {
    /// The folder, which exists.
    pub path: PathBuf,
    /// Its owner.
    pub owner: Owner,
}

const PRIVATE_MODE: u32 = 0o700;
/// PostgreSQL's user has to reach the socket of a daemon that another one runs.
const RUN_MODE: u32 = 0o711;

impl Paths {
    /// Returns the folders of a host without a configuration file.
    pub fn defaults(environment: &Environment) -> Self {
        let state = default_state(environment);
        Self { run: default_run(environment, &state), clones: state.join("clones"), state }
    }

    pub(super) fn read(table: &Table<'_>, environment: &Environment) -> Result<Self> {
        let state = table.path("state")?.unwrap_or_else(|| default_state(environment));
        Ok(Self {
            run: table.path("run")?.unwrap_or_else(|| default_run(environment, &state)),
            clones: table.path("clones")?.unwrap_or_else(|| state.join("clones")),
            state,
        })
    }

    /// Returns the state folder, created if need be.
    pub fn open_state(&self) -> Result<OwnedFolder> {
        open_folder("the state folder", &self.state, None, PRIVATE_MODE)
    }

    /// Returns the folder of the daemon's socket, created if need be; others may pass through it to the socket.
    pub fn open_run(&self) -> Result<OwnedFolder> {
        open_folder("the run folder", &self.run, self.owner_of_state(), RUN_MODE)
    }

    /// Returns the folder of clones, created if need be.
    pub fn open_clones(&self) -> Result<OwnedFolder> {
        open_folder("the clones folder", &self.clones, self.owner_of_state(), PRIVATE_MODE)
    }

    fn owner_of_state(&self) -> Option<Owner> {
        Owner::of(&self.state).ok()
    }
}

/// Checks a folder, or creates it; `heir` is who gets what root creates.
fn open_folder(what: &'static str, path: &Path, heir: Option<Owner>, mode: u32) -> Result<OwnedFolder> {
    let caller = Owner::current();
    if !path.exists() {
        let owner = heir.filter(|_| caller.is_root());
        create_dir_all(path, Create { owner, mode })?;
    }
    let metadata =
        fs::metadata(path).map_err(|source| Error::Unreadable { what, path: path.to_owned(), source })?;
    let (owner, mode) = (Owner { uid: metadata.uid(), gid: metadata.gid() }, metadata.mode() & 0o7777);
    check_folder(what, path, metadata.is_dir(), owner, mode, caller)?;
    Ok(OwnedFolder { path: path.to_owned(), owner })
}

/// Decides whether a folder is fit to hold what must not be altered by others.
fn check_folder(
    what: &'static str,
    path: &Path,
    is_dir: bool,
    owner: Owner,
    mode: u32,
    caller: Owner,
) -> Result<()> {
    let path = path.to_owned();
    if !is_dir {
        return Err(Error::NotAFolder { what, path });
    }
    if owner.uid != caller.uid && !caller.is_root() {
        return Err(Error::ForeignFolder { what, path, owner: owner.uid, caller: caller.uid });
    }
    if mode & 0o022 != 0 {
        return Err(Error::OpenFolder { what, path, mode });
    }
    Ok(())
}

fn default_state(environment: &Environment) -> PathBuf {
    if environment.is_root() {
        return "/var/lib/walden".into();
    }
    let state_home = environment.path("XDG_STATE_HOME").filter(|path| path.is_absolute());
    state_home.unwrap_or_else(|| home(environment).join(".local/state")).join("walden")
}

fn default_run(environment: &Environment, state: &Path) -> PathBuf {
    if environment.is_root() {
        return "/run/walden".into();
    }
    match environment.path("XDG_RUNTIME_DIR").filter(|path| path.is_absolute()) {
        Some(runtime) => runtime.join("walden"),
        None => state.join("run"),
    }
}

/// Returns the caller's home, from the environment or the user database; services often have no `HOME`.
fn home(environment: &Environment) -> PathBuf {
    environment.home().filter(|path| path.is_absolute()).unwrap_or_else(|| {
        let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(environment.uid)).ok().flatten();
        user.map_or_else(|| PathBuf::from("/"), |user| user.dir)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn defaults_depend_on_who_asks() {
        let paths = |uid, variables: &[(&str, &str)]| Paths::defaults(&Environment::of(uid, variables));
        let root = paths(0, &[("HOME", "/root"), ("XDG_RUNTIME_DIR", "/run/user/0")]);
        assert_eq!(root.state, Path::new("/var/lib/walden"));
        assert_eq!(root.run, Path::new("/run/walden"));
        assert_eq!(root.clones, Path::new("/var/lib/walden/clones"));

        let user = paths(1000, &[("HOME", "/home/ann"), ("XDG_RUNTIME_DIR", "/run/user/1000")]);
        assert_eq!(user.state, Path::new("/home/ann/.local/state/walden"));
        assert_eq!(user.run, Path::new("/run/user/1000/walden"));

        let service = paths(1000, &[("HOME", "/home/ann"), ("XDG_STATE_HOME", "/srv/state")]);
        assert_eq!(service.state, Path::new("/srv/state/walden"));
        assert_eq!(service.run, Path::new("/srv/state/walden/run"));
        let relative = paths(1000, &[("HOME", "/home/ann"), ("XDG_STATE_HOME", "state")]);
        assert_eq!(relative.state, Path::new("/home/ann/.local/state/walden"));
    }

    #[test]
    fn a_missing_folder_is_created_private_and_an_open_one_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let state = scratch.path().join("deep/state");
        let paths = Paths { run: state.join("run"), clones: state.join("clones"), state: state.clone() };
        let folder = paths.open_state().unwrap();
        assert_eq!(folder, OwnedFolder { path: state.clone(), owner: Owner::of(scratch.path()).unwrap() });
        assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o7777, 0o700);
        paths.open_clones().unwrap();
        let run = paths.open_run().unwrap().path;
        assert_eq!(fs::metadata(run).unwrap().permissions().mode() & 0o7777, 0o711);

        fs::set_permissions(&state, Permissions::from_mode(0o770)).unwrap();
        let error = paths.open_state().unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "the state folder \"{}\" has mode 0770: others than its owner can write to it",
                state.display()
            )
        );
        assert_eq!(error.hint().unwrap(), format!("chmod go-w {}", state.display()));

        fs::write(scratch.path().join("file"), "").unwrap();
        let file = Paths { state: scratch.path().join("file"), ..paths };
        assert!(matches!(file.open_state().unwrap_err(), Error::NotAFolder { .. }));
    }

    #[test]
    fn a_folder_of_somebody_else_is_for_root_alone() {
        let (ann, root) = (Owner { uid: 1000, gid: 1000 }, Owner { uid: 0, gid: 0 });
        let check =
            |owner, caller| check_folder("the state folder", Path::new("/s"), true, owner, 0o750, caller);
        check(ann, ann).unwrap();
        check(ann, root).unwrap();
        let error = check(root, ann).unwrap_err();
        assert_eq!(error.to_string(), "the state folder \"/s\" belongs to user 0, not to user 1000");
    }
}
