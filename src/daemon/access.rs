//! Who may have WAL archived: root, the daemon's own user, and the owner of the site's data directory.
//!
//! The daemon signs what it archives, so a request is a right. The owner of *some* directory has none: anyone can make
//! one that looks like the site's cluster, and would have its forgeries signed. So the owner counts only
//! where the configuration names the directory, and the file lies in that one. Superseding what is archived already is
//! for those alone who could do it without the daemon: a server that was broken into must not reach its past.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::control::Failure;

/// What a decision rests on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// Who asks.
    pub(super) caller: u32,
    /// Who the daemon is.
    pub(super) own: u32,
    /// Whose the site's data directory is, where the file that was named lies in it.
    pub(super) owner: Option<u32>,
    /// Whether what is archived is to be superseded.
    pub(super) force: bool,
}

impl Request {
    /// Decides.
    pub(super) fn is_allowed(self) -> bool {
        self.caller == 0 || self.caller == self.own || (!self.force && self.owner == Some(self.caller))
    }
}

/// Returns the owner of the site's data directory if `path` is `pg_wal/NAME` in it.
pub(super) fn owner_of_site(data_directory: Option<&Path>, path: &Path) -> Option<u32> {
    let named = fs::metadata(path.parent()?.parent()?).ok()?;
    let own = fs::metadata(data_directory?).ok()?;
    ((named.dev(), named.ino()) == (own.dev(), own.ino())).then_some(own.uid())
}

/// Says that somebody may not.
pub(super) fn denied(request: Request, site: &str) -> Failure {
    let Request { caller, force, .. } = request;
    let (what, hint) = if force {
        ("supersede", "Only root and the daemon's own user may: run the command as one of them.")
    } else {
        (
            "archive",
            "It takes requests of root, of its own user and of the owner of the site's data_directory, which its \
             configuration has to name.",
        )
    };
    Failure {
        kind: "failed".to_owned(),
        message: format!("user {caller} may not have the daemon {what} WAL of site \"{site}\""),
        hint: Some(hint.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_daemon_and_the_owner_may_and_nobody_else() {
        let request = |caller, owner, force| Request { caller, own: 10, owner, force };
        for (caller, owner, allowed) in [
            (0, None, true),
            (10, None, true),
            (20, Some(20), true),
            (20, None, false),
            (20, Some(30), false),
            (30, Some(10), false),
        ] {
            assert_eq!(request(caller, owner, false).is_allowed(), allowed, "{caller} {owner:?}");
            let may_force = allowed && owner != Some(caller);
            assert_eq!(request(caller, owner, true).is_allowed(), may_force, "{caller} {owner:?}, by force");
        }
    }

    #[test]
    fn only_the_directory_that_is_configured_has_an_owner() {
        let folder = tempfile::tempdir().unwrap();
        let (site, other) = (folder.path().join("site"), folder.path().join("other"));
        for data in [&site, &other] {
            fs::create_dir_all(data.join("pg_wal")).unwrap();
        }
        let own = nix::unistd::geteuid().as_raw();
        assert_eq!(owner_of_site(Some(&site), &site.join("pg_wal/00000002.history")), Some(own));
        assert_eq!(owner_of_site(Some(&site), &other.join("pg_wal/00000002.history")), None);
        assert_eq!(owner_of_site(None, &site.join("pg_wal/00000002.history")), None);
        assert_eq!(owner_of_site(Some(&site), Path::new("/")), None);
    }
}
