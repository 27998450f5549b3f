//! The environment of the process, taken once and passed on; nothing below reads it.
//!
//! What Walden looks at: its own `WALDEN_*`, the home and XDG folders for default paths, `TZ`, the credentials of
//! the store (`AWS_*`, proxies) and libpq's `PG*`. Tests write an environment down instead of changing the
//! process's, which would race with every other thread.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use jiff::tz::TimeZone;

use super::error::{Error, Result};

/// A snapshot of the environment and of who is asking.
#[derive(Debug, Clone)]
pub struct Environment {
    variables: BTreeMap<OsString, OsString>,
    /// The effective user.
    pub uid: u32,
    /// The zone in which times without a zone are meant and times are shown.
    pub time_zone: LazyTimeZone,
}

/// A time zone that is looked up when it is first needed: for that all names of zones of the host are read, and what
/// PostgreSQL starts for every segment needs none.
#[derive(Debug, Clone, Default)]
pub struct LazyTimeZone(Arc<OnceLock<TimeZone>>);

impl LazyTimeZone {
    /// Returns the zone: the one it was made of, or that of the system.
    pub fn get(&self) -> TimeZone {
        self.0.get_or_init(TimeZone::system).clone()
    }
}

impl From<TimeZone> for LazyTimeZone {
    fn from(zone: TimeZone) -> Self {
        Self(Arc::new(OnceLock::from(zone)))
    }
}

impl Environment {
    /// Takes the environment of this process.
    pub fn of_process() -> Self {
        Self {
            variables: std::env::vars_os().collect(),
            uid: nix::unistd::geteuid().as_raw(),
            time_zone: LazyTimeZone::default(),
        }
    }

    /// Makes up an environment: these variables, this user, UTC.
    pub fn of(uid: u32, variables: &[(&str, &str)]) -> Self {
        let variables = variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self { variables, uid, time_zone: TimeZone::UTC.into() }
    }

    /// Returns `WALDEN_CONFIG`.
    pub fn config_file(&self) -> Option<PathBuf> {
        self.path("WALDEN_CONFIG")
    }

    /// Returns `WALDEN_SITE`.
    pub fn site(&self) -> Result<Option<String>> {
        self.text("WALDEN_SITE")
    }

    /// Returns `WALDEN_LOG`, a filter in the syntax of `tracing`.
    pub fn log_filter(&self) -> Result<Option<String>> {
        self.text("WALDEN_LOG")
    }

    /// Returns whether the caller is root.
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Returns what a PostgreSQL that walden starts is given: paths, language and zone, nothing of libpq's.
    pub fn for_postgres(&self) -> Vec<(String, String)> {
        let passed = ["PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ"];
        let mut variables: Vec<(String, String)> = passed
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), self.text(name).ok().flatten()?)))
            .collect();
        if !variables.iter().any(|(name, _)| name == "PATH") {
            variables.push(("PATH".to_owned(), "/usr/local/bin:/usr/bin:/bin".to_owned()));
        }
        variables
    }

    /// Returns what may decide how stores are reached and what is read: two processes that agree on it do the same.
    pub fn of_stores(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        let decides = |name: &str| {
            let name = name.to_ascii_uppercase();
            ["AWS_", "WALDEN_", "XDG_", "SSL_CERT"].iter().any(|prefix| name.starts_with(prefix))
                || name.ends_with("_PROXY")
                || name == "HOME"
        };
        let all = self.variables.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str()));
        all.filter(move |(name, _)| name.to_str().is_some_and(decides))
    }

    /// Returns whether colours are unwelcome (`NO_COLOR`).
    pub fn no_color(&self) -> bool {
        self.get("NO_COLOR").is_some()
    }

    /// Returns the caller's home directory.
    pub(super) fn home(&self) -> Option<PathBuf> {
        self.path("HOME")
    }

    /// Returns a variable as a path, if it is set and not empty.
    pub(super) fn path(&self, name: &str) -> Option<PathBuf> {
        self.get(name).map(PathBuf::from)
    }

    /// Returns a variable as text, if it is set and not empty.
    pub(super) fn text(&self, name: &'static str) -> Result<Option<String>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.to_str() {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(not_text(name)),
        }
    }

    /// Returns what libpq would look at: the PG* variables and HOME.
    pub(super) fn postgresql(&self) -> Result<BTreeMap<String, String>> {
        let wanted = |name: &str| name.starts_with("PG") || name == "HOME";
        let named = self.variables.iter().filter_map(|(name, value)| Some((name.to_str()?, value)));
        let text = |(name, value): (&str, &OsString)| match value.to_str() {
            Some(value) => Ok((name.to_owned(), value.to_owned())),
            None => Err(not_text(name)),
        };
        named.filter(|(name, _)| wanted(name)).map(text).collect()
    }

    fn get(&self, name: &str) -> Option<&OsStr> {
        self.variables.get(OsStr::new(name)).map(OsString::as_os_str).filter(|value| !value.is_empty())
    }
}

fn not_text(name: &str) -> Error {
    Error::Environment { name: name.to_owned(), reason: "not valid UTF-8".to_owned() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn an_empty_variable_is_as_good_as_none() {
        let environment =
            Environment::of(1000, &[("WALDEN_SITE", ""), ("WALDEN_CONFIG", "/a b/walden.toml")]);
        assert_eq!(environment.site().unwrap(), None);
        assert_eq!(environment.config_file(), Some("/a b/walden.toml".into()));
        assert!(!environment.is_root() && !environment.no_color());
    }

    #[test]
    fn what_is_not_text_is_named() {
        let mut environment = Environment::of(0, &[]);
        environment.variables.insert("WALDEN_SITE".into(), OsString::from_vec(vec![0xff]));
        let error = environment.site().unwrap_err();
        assert_eq!(error.to_string(), "the environment variable WALDEN_SITE is not valid UTF-8");
        assert_eq!(environment.postgresql().unwrap(), BTreeMap::new());
        environment.variables.insert("PGUSER".into(), OsString::from_vec(vec![0xff]));
        let error = environment.postgresql().unwrap_err();
        assert_eq!(error.to_string(), "the environment variable PGUSER is not valid UTF-8");
    }
}
