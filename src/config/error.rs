//! What can be wrong with a configuration, said with file, line and key.
//!
//! A complaint about the content of the file reads `FILE:LINE: …`, as a compiler's does, so that an editor jumps
//! to it. A value is never repeated in a message where it may be a secret.

use std::io;
use std::path::{Path, PathBuf};

use crate::disk;
use crate::storage;

/// The result of an operation of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with the configuration, or with what it leads to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no configuration file in any of the known places.
    #[error("there is no configuration file: looked for {}", list(searched))]
    NoFile { searched: Vec<PathBuf> },
    /// A file cannot be read.
    #[error("could not read {what} \"{}\": {source}", path.display())]
    Unreadable { what: &'static str, path: PathBuf, source: io::Error },
    /// The file says something that is not accepted.
    #[error("{place}: {problem}")]
    Content { place: Place, problem: Problem },
    /// The command line or the environment names a site that is not configured.
    #[error("unknown site \"{name}\"")]
    UnknownSite { name: String, nearest: Option<String>, configured: Vec<String> },
    /// Several sites are configured and none was named.
    #[error("there are {} sites, and none was chosen: {}", configured.len(), configured.join(", "))]
    SiteNotChosen { configured: Vec<String> },
    /// No site is configured.
    #[error("{}: no site is configured", path.display())]
    NoSite { path: PathBuf },
    /// An environment variable is not what it should be.
    #[error("the environment variable {name} is {reason}")]
    Environment { name: String, reason: String },
    /// A secret can be read by others than its owner.
    #[error("{what} \"{}\" has mode {mode:04o}: {reader} can use it", path.display())]
    Exposed { what: &'static str, path: PathBuf, mode: u32, reader: &'static str },
    /// A folder of Walden's belongs to somebody else.
    #[error("{what} \"{}\" belongs to user {owner}, not to user {caller}", path.display())]
    ForeignFolder { what: &'static str, path: PathBuf, owner: u32, caller: u32 },
    /// A folder of Walden's can be written by others.
    #[error("{what} \"{}\" has mode {mode:04o}: others than its owner can write to it", path.display())]
    OpenFolder { what: &'static str, path: PathBuf, mode: u32 },
    /// A folder of Walden's is something else.
    #[error("{what} \"{}\" is not a directory", path.display())]
    NotAFolder { what: &'static str, path: PathBuf },
    /// A local file could not be looked at or created.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// The store could not be opened.
    #[error(transparent)]
    Store(#[from] storage::Error),
}

/// Where in a configuration file something stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file, as it was named.
    pub file: PathBuf,
    /// The line, counted from 1.
    pub line: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// What is wrong at a place of the file; `section` reads `in [sites.main]` or `at the top level`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The file is not TOML; also a key or section given twice.
    #[error("{message}")]
    Syntax { message: String },
    /// A key that no release knows.
    #[error("unknown key \"{key}\" {section}")]
    UnknownKey { key: String, section: String, hint: String },
    /// A key or a section that a later release will know.
    #[error("\"{key}\" {section} does nothing yet")]
    NotYet { key: String, section: String },
    /// A value of another type.
    #[error("\"{key}\" {section} should be {expected}, but is {found}")]
    WrongType {
        key: String,
        section: String,
        expected: &'static str,
        found: &'static str,
        example: &'static str,
    },
    /// A value of the right type that means nothing.
    #[error("\"{key}\" {section}: {reason}")]
    BadValue { key: String, section: String, reason: String, hint: Option<String> },
    /// A key that must be there.
    #[error("\"{key}\" is missing {section}")]
    MissingKey { key: &'static str, section: String, hint: Option<String> },
    /// A key names another place of the file that is not there.
    #[error("\"{key}\" {section} names {what} \"{name}\", which is not configured")]
    UnknownName { key: String, section: String, what: &'static str, name: String, nearest: Option<String> },
}

/// What an error calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The configuration, an argument or a file's mode has to change.
    Configuration,
    /// A local file or folder failed.
    Disk,
    /// The store could not be opened; its own kind says why.
    Store(storage::ErrorKind),
}

impl Error {
    /// Returns what the error calls for.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Disk(_) => ErrorKind::Disk,
            Self::Store(error) => ErrorKind::Store(error.kind()),
            Self::NoFile { .. } | Self::Unreadable { .. } | Self::Content { .. } => ErrorKind::Configuration,
            Self::UnknownSite { .. } | Self::SiteNotChosen { .. } | Self::NoSite { .. } => {
                ErrorKind::Configuration
            }
            Self::Environment { .. } | Self::Exposed { .. } => ErrorKind::Configuration,
            Self::ForeignFolder { .. } | Self::OpenFolder { .. } | Self::NotAFolder { .. } => {
                ErrorKind::Configuration
            }
        }
    }

    /// Returns a sentence on what to do, where there is one to give.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoFile { .. } => Some("Write one (docs/configuration.md), or name it with --config.".into()),
            Self::Content { problem, .. } => problem.hint(),
            Self::UnknownSite { nearest: Some(nearest), .. } => Some(format!("Did you mean \"{nearest}\"?")),
            Self::UnknownSite { configured, .. } if configured.is_empty() => {
                Some("No site is configured.".into())
            }
            Self::UnknownSite { configured, .. } => Some(format!("Configured: {}.", configured.join(", "))),
            Self::SiteNotChosen { .. } => Some("Choose one with --site or WALDEN_SITE.".into()),
            Self::NoSite { .. } => {
                Some("Add a section such as [sites.main]; it needs a connection to be backed up, and may be empty.".into())
            }
            Self::Exposed { path, .. } => Some(format!("chmod 600 {}", quote(path))),
            Self::OpenFolder { path, .. } => Some(format!("chmod go-w {}", quote(path))),
            Self::ForeignFolder { .. } => {
                Some("Run as that user, or choose another folder in [paths].".into())
            }
            Self::NotAFolder { .. } => Some("Choose another folder in [paths].".into()),
            Self::Disk(error) => error.hint().map(str::to_owned),
            Self::Unreadable { .. } | Self::Environment { .. } | Self::Store(_) => None,
        }
    }
}

impl Problem {
    /// Returns a sentence on what to do, where there is one to give.
    fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownName { nearest: Some(nearest), .. } => Some(format!("Did you mean \"{nearest}\"?")),
            Self::UnknownKey { hint, .. } => Some(hint.clone()),
            Self::NotYet { .. } => Some(
                "It belongs to a later release of Walden: remove it until then, so that nobody relies on it."
                    .into(),
            ),
            Self::BadValue { hint, .. } | Self::MissingKey { hint, .. } => hint.clone(),
            Self::WrongType { key, example, .. } if !example.is_empty() => {
                Some(format!("Such as {key} = {example}."))
            }
            Self::Syntax { .. } | Self::WrongType { .. } | Self::UnknownName { .. } => None,
        }
    }
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    paths.join(", ")
}

/// Writes a path so that a shell takes it as one word.
fn quote(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
