//! What a site's files came to: those that are under way, and a bounded number of those that are archived.
//!
//! Only success is remembered, and only of the very file that was read; a failure is told to those who wait for it and
//! forgotten, so that the next request tries again. Success means that the store has the file durably. It is told once:
//! PostgreSQL asks once, and who asks again may do so because something is wrong with what is stored.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};

use tokio::sync::watch;

use crate::control::{ArchivedFile, Failure};

use super::file_identity::FileIdentity;

/// What became of a file.
pub(super) type Outcome = Result<ArchivedFile, Failure>;

/// Where the outcome of a file that is under way will be.
pub(super) type Awaited = watch::Receiver<Option<Outcome>>;

/// What is known of a file.
#[derive(Debug)]
pub(super) enum Known {
    /// It is archived.
    Archived(ArchivedFile),
    /// Somebody is at it.
    Running(Awaited),
    /// Nothing.
    Nothing,
}

/// The files of one site.
#[derive(Debug, Default)]
pub(super) struct Outcomes {
    files: HashMap<PathBuf, (FileIdentity, State)>,
    /// The archived ones, the longest known first.
    archived: VecDeque<PathBuf>,
}

#[derive(Debug)]
enum State {
    /// Whether somebody was told so is the second.
    Archived(ArchivedFile, bool),
    Running(Awaited),
}

/// Archived files that are remembered: several times as many as are looked ahead.
const ARCHIVED_MAX: usize = 512;

impl Outcomes {
    /// Returns what is known of the file that stands there now.
    pub(super) fn known(&self, path: &Path, identity: &FileIdentity) -> Known {
        match self.files.get(path) {
            Some((known, state)) if known == identity => match state {
                State::Archived(file, _) => Known::Archived(file.clone()),
                State::Running(awaited) => Known::Running(awaited.clone()),
            },
            _ => Known::Nothing,
        }
    }

    /// Returns what can be told of the file that stands there now: of one that was told of before, nothing.
    pub(super) fn tell(&mut self, path: &Path, identity: &FileIdentity) -> Known {
        match self.files.get_mut(path) {
            Some((known, State::Archived(_, told))) if known == identity && *told => Known::Nothing,
            Some((known, State::Archived(file, told))) if known == identity => {
                *told = true;
                Known::Archived(file.clone())
            }
            _ => self.known(path, identity),
        }
    }

    /// Notes that somebody begins with a file, and returns where to tell the outcome.
    pub(super) fn begin(&mut self, path: &Path, identity: FileIdentity) -> watch::Sender<Option<Outcome>> {
        let (sender, awaited) = watch::channel(None);
        self.archived.retain(|known| known != path);
        self.files.insert(path.to_owned(), (identity, State::Running(awaited)));
        sender
    }

    /// Notes the outcome of a file, unless another one has come under its name since; `None` is forgotten.
    pub(super) fn end(&mut self, path: &Path, identity: &FileIdentity, archived: Option<ArchivedFile>) {
        let Some((known, state)) = self.files.get_mut(path) else { return };
        if known != identity {
            return;
        }
        let Some(archived) = archived else {
            self.files.remove(path);
            return;
        };
        *state = State::Archived(archived, false);
        self.archived.push_back(path.to_owned());
        if self.archived.len() > ARCHIVED_MAX
            && let Some(oldest) = self.archived.pop_front()
        {
            self.files.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> ArchivedFile {
        ArchivedFile { name: name.to_owned(), cluster: "c".to_owned(), created: true }
    }

    fn identities() -> (FileIdentity, FileIdentity) {
        let folder = tempfile::tempdir().unwrap();
        let identity = |name: &str| {
            std::fs::write(folder.path().join(name), name).unwrap();
            FileIdentity::of(&folder.path().join(name)).unwrap()
        };
        (identity("1"), identity("22"))
    }

    #[test]
    fn success_is_known_of_the_very_file_and_failure_of_none() {
        let (first, second) = identities();
        let path = Path::new("/data/pg_wal/1");
        let mut outcomes = Outcomes::default();
        let _sender = outcomes.begin(path, first);
        assert!(matches!(outcomes.known(path, &first), Known::Running(_)));
        assert!(matches!(outcomes.known(path, &second), Known::Nothing));
        outcomes.end(path, &first, Some(file("1")));
        assert!(matches!(outcomes.known(path, &first), Known::Archived(known) if known == file("1")));
        assert!(matches!(outcomes.known(path, &second), Known::Nothing), "another file under the name");
        assert!(matches!(outcomes.tell(path, &first), Known::Archived(known) if known == file("1")));
        assert!(matches!(outcomes.tell(path, &first), Known::Nothing), "told before");
        assert!(matches!(outcomes.known(path, &first), Known::Archived(_)), "and not to be done ahead");
        // The other file is begun, and what the first comes to is no word about it.
        let _sender = outcomes.begin(path, second);
        outcomes.end(path, &first, Some(file("1")));
        assert!(matches!(outcomes.known(path, &second), Known::Running(_)));
        outcomes.end(path, &second, None);
        assert!(matches!(outcomes.known(path, &second), Known::Nothing));
        assert!(outcomes.files.is_empty() && outcomes.archived.is_empty());
    }

    #[test]
    fn no_more_is_remembered_than_the_bound() {
        let (identity, _) = identities();
        let mut outcomes = Outcomes::default();
        for n in 0..2 * ARCHIVED_MAX {
            let path = PathBuf::from(format!("/data/pg_wal/{n}"));
            let _sender = outcomes.begin(&path, identity);
            outcomes.end(&path, &identity, Some(file("1")));
        }
        assert_eq!((outcomes.files.len(), outcomes.archived.len()), (ARCHIVED_MAX, ARCHIVED_MAX));
        assert!(matches!(outcomes.known(Path::new("/data/pg_wal/0"), &identity), Known::Nothing));
    }
}
