//! What a daemon is asked and what it answers.
//!
//! While it works it says so every second, so that whoever waits can tell a slow store from a daemon that hangs.
//! Deliberately absent: versions; both ends are the same binary, and what is not understood is refused.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A request to a daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DaemonRequest {
    /// Archive a file of `pg_wal`.
    Push(PushRequest),
}

/// A file that is to be archived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PushRequest {
    /// The site, by its name in the daemon's configuration.
    pub site: String,
    /// The file, from the root.
    pub path: PathBuf,
    /// Whether it is to supersede what stands under its name.
    pub force: bool,
    /// Where whoever asks takes the file to go.
    pub destination: Destination,
}

/// Where the WAL of a site goes, as a configuration says it: a daemon goes by the one it was started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Destination {
    /// The store, and the folder of the site in it.
    pub repository: String,
    /// The ids of the keys that can read it; none where the configuration says nothing of keys, as on a server that leaves
    /// them to its daemon.
    pub recipients: Option<Vec<String>>,
}

impl Destination {
    /// Returns whether what is archived here arrives where `wanted` says.
    pub fn serves(&self, wanted: &Self) -> bool {
        let readable = wanted.recipients.is_none() || wanted.recipients == self.recipients;
        readable && self.repository == wanted.repository
    }
}

/// A line of a daemon's answer; all but the last are `Working`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DaemonAnswer {
    /// It is being done.
    Working,
    /// The archive has the file durably.
    Archived(ArchivedFile),
    /// It could not be done.
    Failed(Failure),
    /// It was not begun: the daemon's configuration has WAL of the site go elsewhere.
    Elsewhere,
}

/// A file that was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchivedFile {
    /// Its name.
    pub name: String,
    /// The cluster that wrote it.
    pub cluster: String,
    /// Whether it was not there before.
    pub created: bool,
}

/// Why a request failed, as a command would say it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind of a command's failure, in its own word.
    pub kind: String,
    /// What went wrong, with its causes.
    pub message: String,
    /// What to do about it, as a sentence.
    pub hint: Option<String>,
}

/// How often a daemon says that it is at work.
pub(super) const WORKING_EVERY: Duration = Duration::from_secs(1);
/// A daemon that says nothing for so long hangs: ten times what it has to say in that time.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_the_store_and_who_can_read_there() {
        let of = |repository: &str, recipients: Option<&[&str]>| Destination {
            repository: repository.to_owned(),
            recipients: recipients.map(|ids| ids.iter().map(|id| (*id).to_owned()).collect()),
        };
        let own = of("main in s3://a", Some(&["2025", "2026"]));
        assert!(own.serves(&own));
        assert!(own.serves(&of("main in s3://a", None)), "it leaves the keys to the daemon");
        assert!(!own.serves(&of("main in s3://b", Some(&["2025", "2026"]))));
        assert!(!own.serves(&of("main in s3://b", None)));
        assert!(!own.serves(&of("main in s3://a", Some(&["2026"]))));
        assert!(!own.serves(&of("main in s3://a", Some(&[]))), "in clear text");
        assert!(!of("main in s3://a", None).serves(&own), "it would be in clear text");
    }
}
