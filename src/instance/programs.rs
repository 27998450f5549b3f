//! Finding PostgreSQL's programs of a major version on this host.
//!
//! The known places of Debian, the PGDG packages for Red Hat, Alpine and plain builds, then the directory that the
//! configuration names, which wins. A wrong major version is refused by what the program says of itself.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Why the programs cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProgramsError {
    /// They are nowhere.
    #[error("PostgreSQL {major} is not installed on this host")]
    NotFound { major: u32 },
    /// They are of another major version.
    #[error("\"{}\" is {version}, and PostgreSQL {major} is needed", program.display())]
    OtherVersion { program: PathBuf, version: String, major: u32 },
    /// The program does not run.
    #[error("could not run \"{}\": {detail}", program.display())]
    NotRunnable { program: PathBuf, detail: String },
}

impl ProgramsError {
    /// Returns what the user should do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { major } => {
                Some(format!("Install postgresql-{major}, or set bin_directory in the site's configuration."))
            }
            Self::OtherVersion { .. } => {
                Some("Correct bin_directory in the site's configuration.".to_owned())
            }
            Self::NotRunnable { .. } => None,
        }
    }
}

/// Returns the directory of PostgreSQL's programs of this major version.
pub fn find(major: u32, configured: Option<&Path>) -> Result<PathBuf, ProgramsError> {
    if let Some(directory) = configured {
        return check(directory, major).map(|()| directory.to_owned());
    }
    let candidates = known_places(major).into_iter().filter(|directory| directory.join("postgres").is_file());
    let mut broken = None;
    for directory in candidates {
        match check(&directory, major) {
            Ok(()) => return Ok(directory),
            // What other versions are installed is no news; a program of ours that does not run is.
            Err(ProgramsError::OtherVersion { .. }) => {}
            Err(error) => broken = Some(error),
        }
    }
    Err(broken.unwrap_or(ProgramsError::NotFound { major }))
}

/// Returns the version of this host's C library, which decides how text is ordered.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "the C library tells its version in no other way")]
pub fn libc_version() -> Option<String> {
    // SAFETY: the function returns a constant string of the library.
    let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
    version.to_str().ok().map(str::to_owned)
}

/// Returns nothing: other C libraries order text by bytes and have no version of it.
#[cfg(not(target_env = "gnu"))]
pub fn libc_version() -> Option<String> {
    None
}

fn known_places(major: u32) -> Vec<PathBuf> {
    [
        format!("/usr/lib/postgresql/{major}/bin"),
        format!("/usr/pgsql-{major}/bin"),
        format!("/usr/libexec/postgresql{major}"),
        "/usr/local/pgsql/bin".to_owned(),
        "/usr/local/bin".to_owned(),
        "/usr/bin".to_owned(),
    ]
    .map(PathBuf::from)
    .to_vec()
}

fn check(directory: &Path, major: u32) -> Result<(), ProgramsError> {
    let program = directory.join("postgres");
    let not_runnable = |detail: String| ProgramsError::NotRunnable { program: program.clone(), detail };
    let output =
        Command::new(&program).arg("--version").output().map_err(|error| not_runnable(error.to_string()))?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() {
        return Err(not_runnable(output.status.to_string()));
    }
    if major_of(&version) == Some(major) {
        return Ok(());
    }
    Err(ProgramsError::OtherVersion { program, version, major })
}

/// Reads `postgres (PostgreSQL) 15.18 (Debian …)`, and `18beta1` for a beta.
fn major_of(version: &str) -> Option<u32> {
    let number = version.split_once(") ")?.1;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_what_the_program_says() {
        assert_eq!(major_of("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"), Some(15));
        assert_eq!(major_of("postgres (PostgreSQL) 18.4"), Some(18));
        assert_eq!(major_of("postgres (PostgreSQL) 18beta2"), Some(18));
        assert_eq!(major_of("something else"), None);
    }

    #[test]
    fn what_is_nowhere_is_not_found_and_another_version_is_refused() {
        assert!(matches!(
            find(99, None),
            Err(ProgramsError::NotFound { .. } | ProgramsError::OtherVersion { .. })
        ));
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(find(15, Some(directory.path())), Err(ProgramsError::NotRunnable { .. })));
    }
}
