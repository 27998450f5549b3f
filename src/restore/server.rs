//! Whether a server runs in a data directory, as far as this host can tell.
//!
//! `postmaster.pid` names a process of the server's own PID namespace: a container's number says nothing here, and is
//! often 1. So processes are also told by the directory they work in, compared by device and inode, which holds across
//! mount namespaces. What cannot be told counts as a server; only a number that is free, or another's, is left over.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::pg::PostmasterPid;
use crate::restore::Error;

/// What is known of the server of a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// This process works there.
    Running(i32),
    /// `postmaster.pid` names a process, if it can be read, and nothing says that it is not the server.
    Unknown(Option<i32>),
}

impl Server {
    /// Returns why nothing may be written there.
    pub(super) fn refusal(self, data: &Path) -> Error {
        let path = data.to_owned();
        match self {
            Self::Running(pid) => Error::Running { path, pid },
            Self::Unknown(pid) => Error::MayRun { path: path.join(PID_FILE), pid },
        }
    }
}

/// What is known of the process that `postmaster.pid` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    /// It works in the data directory.
    Here,
    /// It works elsewhere.
    Elsewhere,
    /// It is another user's, and does not tell where it works.
    Hidden,
    /// There is none of that number.
    Gone,
}

const PID_FILE: &str = "postmaster.pid";
/// The first process of every container, and of this host.
const FIRST_PROCESS: i32 = 1;
/// What the server's program is called; every process of the server works in the data directory.
const PROGRAMS: [&str; 2] = ["postgres", "postmaster"];

/// Looks for the server of a data directory.
pub(super) fn server_in(data: &Path) -> Option<Server> {
    let found = match fs::read(data.join(PID_FILE)) {
        Ok(text) => match PostmasterPid::parse(&String::from_utf8_lossy(&text)) {
            Ok(file) => decide(file.pid, named(file.pid, data)),
            // A server that is starting has made the file and not yet written it.
            Err(_) => Some(Server::Unknown(None)),
        },
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => None,
        Err(_) => Some(Server::Unknown(None)),
    };
    match found {
        Some(Server::Running(_)) => found,
        // A server whose file is gone, or holds the number it has in its container.
        _ => working_in(data).map(Server::Running).or(found),
    }
}

/// Decides by the process that `postmaster.pid` names.
fn decide(pid: i32, named: Named) -> Option<Server> {
    match named {
        Named::Here => Some(Server::Running(pid)),
        Named::Hidden => Some(Server::Unknown(Some(pid))),
        Named::Elsewhere | Named::Gone if pid == FIRST_PROCESS => Some(Server::Unknown(Some(pid))),
        Named::Elsewhere | Named::Gone => None,
    }
}

fn named(pid: i32, data: &Path) -> Named {
    match works_in(pid, data) {
        Ok(true) => Named::Here,
        Ok(false) => Named::Elsewhere,
        Err(ErrorKind::NotFound) => Named::Gone,
        Err(_) => Named::Hidden,
    }
}

/// Finds a process of a server that works in the directory, whatever its number is in its own namespace.
fn working_in(data: &Path) -> Option<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut numbers = processes.filter_map(|process| process.file_name().to_str()?.parse::<i32>().ok());
    numbers.find(|pid| is_server(*pid) && works_in(*pid, data).is_ok_and(|here| here))
}

fn is_server(pid: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    PROGRAMS.iter().any(|program| name.contains(program))
}

/// Tells whether a process works in a directory.
fn works_in(pid: i32, directory: &Path) -> Result<bool, ErrorKind> {
    let at = |path: &Path| {
        let metadata = fs::metadata(path).map_err(|error| error.kind())?;
        Ok::<_, ErrorKind>((metadata.dev(), metadata.ino()))
    };
    let of_process = at(format!("/proc/{pid}/cwd").as_ref())?;
    Ok(at(directory).is_ok_and(|directory| directory == of_process))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::{Child, Command};

    use super::*;

    /// A process that sleeps in a directory until it is dropped.
    struct Sleeper(Child);

    impl Sleeper {
        fn start(program: &Path, directory: &Path) -> Self {
            let mut command = Command::new(program);
            Self(command.arg("600").current_dir(directory).spawn().unwrap())
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn directories() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let scratch = tempfile::tempdir().unwrap();
        let (data, other) = (scratch.path().join("data"), scratch.path().join("other"));
        fs::create_dir(&data).unwrap();
        fs::create_dir(&other).unwrap();
        (scratch, data, other)
    }

    #[test]
    fn a_process_that_does_not_tell_counts_as_the_server() {
        for (pid, named, found) in [
            (7, Named::Here, Some(Server::Running(7))),
            (7, Named::Hidden, Some(Server::Unknown(Some(7)))),
            (7, Named::Elsewhere, None),
            (7, Named::Gone, None),
            (1, Named::Here, Some(Server::Running(1))),
            (1, Named::Elsewhere, Some(Server::Unknown(Some(1)))),
            (1, Named::Gone, Some(Server::Unknown(Some(1)))),
        ] {
            assert_eq!(decide(pid, named), found, "{pid} {named:?}");
        }
    }

    #[test]
    fn the_process_that_the_file_names_is_the_server_where_it_works_there() {
        let (_scratch, data, other) = directories();
        assert_eq!(server_in(&data), None);
        let (here, elsewhere) =
            (Sleeper::start("sleep".as_ref(), &data), Sleeper::start("sleep".as_ref(), &other));
        // Any program may stand in a directory, such as the shell of who restores.
        assert_eq!(server_in(&data), None);
        let file = data.join("postmaster.pid");
        fs::write(&file, format!("{}\n{}\n", here.pid(), data.display())).unwrap();
        assert_eq!(server_in(&data), Some(Server::Running(here.pid())));
        // Left by a crash; its number is another's now.
        fs::write(&file, format!("{}\n", elsewhere.pid())).unwrap();
        assert_eq!(server_in(&data), None);
        for unclear in ["", "1\n/var/lib/postgresql/data\n"] {
            fs::write(&file, unclear).unwrap();
            assert!(matches!(server_in(&data), Some(Server::Unknown(_))), "{unclear:?}");
        }
    }

    /// A container's server: its number there is another's here.
    #[test]
    fn a_server_is_found_by_the_directory_it_works_in() {
        let (scratch, data, other) = directories();
        let program = scratch.path().join("postgres");
        fs::copy("/bin/sleep", &program).unwrap();
        let elsewhere = Sleeper::start(&program, &other);
        let server = Sleeper::start(&program, &data);
        for file in [format!("{}\n", elsewhere.pid()), "1\n".to_owned()] {
            fs::write(data.join("postmaster.pid"), file).unwrap();
            assert_eq!(server_in(&data), Some(Server::Running(server.pid())));
        }
        fs::remove_file(data.join("postmaster.pid")).unwrap();
        assert_eq!(server_in(&data), Some(Server::Running(server.pid())));
    }
}
