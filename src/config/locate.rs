//! Where the configuration file is: the command line, the environment, here, the system.
//!
//! The first place that is named or has the file wins; a named file that is not there is an error, never a
//! reason to look on.

use std::path::{Path, PathBuf};

use super::environment::Environment;
use super::error::{Error, Result};

const HERE: &str = "walden.toml";
const SYSTEM: &str = "/etc/walden/walden.toml";

/// Returns the file to read.
pub(super) fn locate(explicit: Option<&Path>, environment: &Environment) -> Result<PathBuf> {
    locate_in(explicit, environment, &[HERE.into(), SYSTEM.into()])
}

fn locate_in(explicit: Option<&Path>, environment: &Environment, known: &[PathBuf]) -> Result<PathBuf> {
    if let Some(named) = explicit.map(Path::to_owned).or_else(|| environment.config_file()) {
        return Ok(named);
    }
    let found = known.iter().find(|path| path.exists()).cloned();
    found.ok_or_else(|| Error::NoFile { searched: known.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_comes_before_the_environment_before_the_known_places() {
        let scratch = tempfile::tempdir().unwrap();
        let (here, system) = (scratch.path().join("here.toml"), scratch.path().join("system.toml"));
        let known = [here.clone(), system.clone()];
        let (none, env) = (Environment::of(0, &[]), Environment::of(0, &[("WALDEN_CONFIG", "/env.toml")]));

        let error = locate_in(None, &none, &known).unwrap_err();
        let shown =
            format!("there is no configuration file: looked for {}, {}", here.display(), system.display());
        assert_eq!(error.to_string(), shown);
        std::fs::write(&system, "").unwrap();
        assert_eq!(locate_in(None, &none, &known).unwrap(), system);
        std::fs::write(&here, "").unwrap();
        assert_eq!(locate_in(None, &none, &known).unwrap(), here);
        assert_eq!(locate_in(None, &env, &known).unwrap(), Path::new("/env.toml"));
        assert_eq!(locate_in(Some(Path::new("no.toml")), &env, &known).unwrap(), Path::new("no.toml"));
    }
}
