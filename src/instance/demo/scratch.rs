//! The folder everything happens in, whose it is, and the configuration written there.
//!
//! ```text
//! <dir>/walden-demo-XXXXXX/data        the scratch cluster      run/     its socket
//!                          repository  the store                keys/    made by `walden key create`
//!                          state clones                         walden.toml, load.sql, server.log
//!                          mnt         the read-only mount      walden   the binary, where others cannot reach it
//! ```
//! PostgreSQL refuses root, so what root makes here belongs to user postgres; everybody else demonstrates alone.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};
use tempfile::TempDir;

use crate::disk::durable::{Create, create_dir, create_file};
use crate::disk::{Owner, Space};
use crate::instance::demo::error::DemoError;

/// A socket's path ends at 107 bytes on Linux.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// The longest path below the folder that a socket has: a clone's.
const LONGEST_SOCKET: &str = "clones/demo/run/.s.PGSQL.65535";
/// A pgbench scale as files; twice with index and growth, once more in the repository.
const BYTES_PER_SCALE: u64 = 16 << 20;
/// What is needed besides: WAL and a cluster without data.
const BYTES_BESIDES: u64 = 1 << 30;
/// Whom PostgreSQL runs as when root asks.
const SERVER_USER: &str = "postgres";

/// Whom PostgreSQL runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) owner: Owner,
}

/// The folder; it is not removed by being dropped, because what is mounted in it would be removed as well.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    account: Account,
}

impl Account {
    /// Returns user postgres for root, and the caller otherwise.
    pub(super) fn of_caller() -> Result<Self, DemoError> {
        let caller = Owner::current();
        let user =
            if caller.is_root() { User::from_name(SERVER_USER) } else { User::from_uid(Uid::effective()) };
        match user.ok().flatten() {
            Some(user) => {
                let owner = Owner { uid: user.uid.as_raw(), gid: user.gid.as_raw() };
                Ok(Self { name: user.name, owner })
            }
            // A user without a name can run PostgreSQL all the same.
            None if !caller.is_root() => Ok(Self { name: caller.uid.to_string(), owner: caller }),
            None => Err(DemoError::NoAccount { name: SERVER_USER }),
        }
    }

    /// Returns whether this is somebody else than the caller, and therefore the caller root.
    pub(super) fn is_other(&self) -> bool {
        self.owner.uid != Owner::current().uid
    }
}

impl Scratch {
    /// Creates the folder and those in it that Walden does not create itself.
    pub(super) fn create(parent: &Path, scale: u32) -> Result<Self, DemoError> {
        let account = Account::of_caller()?;
        let parent = parent.canonicalize().map_err(DemoError::at("open", parent))?;
        if account.is_other() && !is_open_to_all(&parent) {
            return Err(DemoError::ClosedFolder { user: account.name, path: parent });
        }
        check_space(&parent, scale)?;
        let folder = tempfile::Builder::new().prefix("walden-demo-").tempdir_in(&parent);
        let folder = folder.map_err(DemoError::at("create a folder in", &parent))?;
        check_length(folder.path())?;
        account.owner.give(folder.path())?;
        for name in ["run", "repository", "keys", "state", "mnt"] {
            create_dir(&folder.path().join(name), Create::PRIVATE_DIRECTORY.owned_by(account.owner))?;
        }
        Ok(Self { path: TempDir::keep(folder), account })
    }

    /// Returns where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a path in it.
    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Returns whom PostgreSQL runs as.
    pub(super) fn account(&self) -> &Account {
        &self.account
    }

    /// Writes a file in it that its owner alone reads.
    pub(super) fn write(&self, name: &str, content: &str) -> Result<PathBuf, DemoError> {
        let path = self.join(name);
        create_file(&path, content.as_bytes(), Create::PRIVATE_FILE.owned_by(self.account.owner))?;
        Ok(path)
    }

    /// Returns a place from which everybody can run the binary: its own, or a copy here.
    pub(super) fn reachable_binary(&self, binary: &Path) -> Result<PathBuf, DemoError> {
        if !self.account.is_other() || is_open_to_all(binary) {
            return Ok(binary.to_owned());
        }
        let copy = self.join("walden");
        std::fs::copy(binary, &copy).map_err(DemoError::at("copy", binary))?;
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&copy, executable).map_err(DemoError::at("change the mode of", &copy))?;
        self.account.owner.give(&copy)?;
        Ok(copy)
    }

    /// Removes the folder; the caller has made sure that nothing is mounted in it.
    pub(super) fn remove(&self) -> Result<(), DemoError> {
        std::fs::remove_dir_all(&self.path).map_err(DemoError::at("remove", &self.path))
    }
}

/// Returns the configuration: the one that `key create` proposes, and a site.
pub(super) fn configuration(
    folder: &Path,
    bin_directory: &Path,
    connection: &str,
    encryption: &str,
) -> String {
    let path = |name: &str| toml_string(&folder.join(name).display().to_string());
    let (connection, bin) = (toml_string(connection), toml_string(&bin_directory.display().to_string()));
    let url = toml_string(&format!("file://{}", folder.join("repository").display()));
    format!(
        "[paths]\nstate = {}\nrun = {}\nclones = {}\n\n[storage]\nurl = {url}\n\n{encryption}\n\
         [sites.demo]\ndata_directory = {}\nbin_directory = {bin}\nconnection = {connection}\n",
        path("state"),
        path("run"),
        path("clones"),
        path("data"),
    )
}

fn toml_string(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Whether any user may open the path where it is: a folder below `/root` is closed to postgres.
fn is_open_to_all(path: &Path) -> bool {
    let open = |path: &Path| std::fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o001 != 0);
    path.ancestors().all(open)
}

fn check_length(folder: &Path) -> Result<(), DemoError> {
    if folder.join(LONGEST_SOCKET).as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
        return Ok(());
    }
    Err(DemoError::LongFolder { path: folder.to_owned(), max: SOCKET_PATH_BYTES_MAX })
}

fn check_space(folder: &Path, scale: u32) -> Result<(), DemoError> {
    let needed_bytes = BYTES_BESIDES + 3 * BYTES_PER_SCALE * u64::from(scale);
    let free_bytes = Space::at(folder)?.free_bytes;
    if free_bytes >= needed_bytes {
        return Ok(());
    }
    Err(DemoError::NoSpace { path: folder.to_owned(), free_bytes, needed_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_everything_in_the_folder() {
        let written = configuration(
            Path::new("/tmp/a \"b\""),
            Path::new("/usr/lib/postgresql/15/bin"),
            "host=/x",
            "[encryption]\nrecipients = [\"demo\"]\n",
        );
        assert!(written.contains("clones = \"/tmp/a \\\"b\\\"/clones\"\n"), "{written}");
        assert!(written.contains("url = \"file:///tmp/a \\\"b\\\"/repository\"\n"), "{written}");
        assert!(written.contains("[sites.demo]\ndata_directory = \"/tmp/a \\\"b\\\"/data\"\n"), "{written}");
    }

    #[test]
    fn a_folder_too_long_for_sockets_is_refused_before_anything_is_made() {
        check_length(Path::new("/tmp/walden-demo-abcdef")).unwrap();
        let long = PathBuf::from(format!("/{}", "x".repeat(80)));
        assert!(matches!(check_length(&long), Err(DemoError::LongFolder { .. })));
    }

    #[test]
    fn a_folder_is_made_with_its_folders_and_removed() {
        let parent = tempfile::tempdir_in("/tmp").unwrap();
        std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        if let Ok(scratch) = Scratch::create(parent.path(), 0) {
            assert!(scratch.join("repository").is_dir());
            let file = scratch.write("walden.toml", "x").unwrap();
            assert_eq!(Owner::of(&file).unwrap().uid, scratch.account().owner.uid);
            scratch.remove().unwrap();
            assert!(!scratch.path().exists());
        }
        let missing = Scratch::create(&parent.path().join("none"), 1).unwrap_err();
        assert!(missing.to_string().contains("none"), "{missing}");
    }

    #[test]
    fn space_is_asked_for_before_it_is_used() {
        let error = check_space(Path::new("/tmp"), u32::MAX).unwrap_err();
        assert!(matches!(error, DemoError::NoSpace { .. }), "{error}");
    }
}
