//! PostgreSQL's programs, in the places where packages put them.
//!
//! The newest installation that has all of them wins: a client package alone, or a server without pgbench, is no use.
//! Deliberately absent: the search path, which on Debian never has the server's programs.

use std::path::{Path, PathBuf};

use crate::instance::demo::error::DemoError;
use crate::pg::MajorVersion;

/// What the demonstration runs.
const WANTED: [&str; 4] = ["initdb", "postgres", "pgbench", "psql"];
/// Where packages put a major version, `{}`: Debian, PGDG's RPMs, SUSE.
const VERSIONED: [&str; 3] = ["/usr/lib/postgresql/{}/bin", "/usr/pgsql-{}/bin", "/usr/lib/postgresql{}/bin"];
/// Where there is one version only: PostgreSQL's own default, and distributions that put it on the path.
const UNVERSIONED: [&str; 2] = ["/usr/local/pgsql/bin", "/usr/bin"];

/// Finds the folder of PostgreSQL's programs.
pub(super) fn find() -> Result<PathBuf, DemoError> {
    let candidates = candidates(&MajorVersion::ALL.map(MajorVersion::number));
    choose(&candidates, |program| program.is_file()).map(Path::to_owned).ok_or_else(|| {
        let searched = VERSIONED.iter().chain(&UNVERSIONED).map(|place| place.replace("{}", "*").into());
        DemoError::NoPostgresql { wanted: WANTED.to_vec(), searched: searched.collect() }
    })
}

/// Lists where to look, the best place first.
fn candidates(versions: &[u32]) -> Vec<PathBuf> {
    let place = |major: &u32| VERSIONED.map(|place| PathBuf::from(place.replace("{}", &major.to_string())));
    let versioned = versions.iter().rev().flat_map(place);
    versioned.chain(UNVERSIONED.map(PathBuf::from)).collect()
}

fn choose(candidates: &[PathBuf], is_program: impl Fn(&Path) -> bool) -> Option<&Path> {
    let complete = |folder: &&PathBuf| WANTED.iter().all(|program| is_program(&folder.join(program)));
    candidates.iter().find(complete).map(PathBuf::as_path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_complete_installation_is_taken() {
        let candidates = candidates(&[13, 15, 18]);
        assert_eq!(candidates[0], Path::new("/usr/lib/postgresql/18/bin"));
        let installed = |program: &Path| {
            let path = program.to_str().unwrap();
            path == "/usr/lib/postgresql/18/bin/psql"
                || path.starts_with("/usr/lib/postgresql/15/bin")
                || path.starts_with("/usr/lib/postgresql/13/bin")
        };
        assert_eq!(choose(&candidates, installed), Some(Path::new("/usr/lib/postgresql/15/bin")));
        assert_eq!(choose(&candidates, |_| false), None);
    }
}
