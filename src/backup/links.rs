//! What becomes of a symbolic link of the source: it stays, or what it points to takes its place.
//!
//! No link of a basebackup leaves its tree, so that nothing that is made from it can reach the source's files. A
//! link whose target is in the tree stays one, rewritten to be relative where it has to be. Any other is followed,
//! and its target becomes part of the tree: a second link to it, or a loop, points to that place.
//! Only `canonicalize` looks at the file system here.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::repo::entry::TreePath;

/// The places of the current tree that are known by their real paths.
#[derive(Debug, Default)]
pub struct Links {
    top: TreePath,
    pg_path: Vec<u8>,
    places: Vec<(PathBuf, TreePath)>,
}

/// What to do with a link.
#[derive(Debug, PartialEq, Eq)]
pub enum LinkPlan {
    /// Keep it, with this target.
    Keep(Vec<u8>),
    /// Put what is at this path in its place.
    Follow(PathBuf),
    /// Leave it out: it leads out of the tree to nothing.
    Dangling,
}

impl Links {
    /// Forgets the previous tree; `top` is at `real`, and PostgreSQL calls it `pg_path`.
    pub fn begin_tree(&mut self, top: &TreePath, real: &Path, pg_path: &[u8]) {
        self.top = top.clone();
        self.pg_path = pg_path.to_vec();
        self.places = vec![(real.to_owned(), top.clone())];
    }

    /// Takes note that the directory at `real` stands at `tree` from now on.
    pub fn followed(&mut self, tree: &TreePath, real: &Path) {
        self.places.push((real.to_owned(), tree.clone()));
    }

    /// Returns what PostgreSQL calls `tree`, relative to its data directory.
    pub fn pg_path(&self, tree: &TreePath) -> Vec<u8> {
        let below = tree.strip(self.top.as_bytes()).unwrap_or_default();
        match (self.pg_path.is_empty(), below.is_empty()) {
            (true, _) => below.to_vec(),
            (false, true) => self.pg_path.clone(),
            (false, false) => [&self.pg_path, &b"/"[..], below].concat(),
        }
    }

    /// Returns the relative target for `tree` where the directory at `real` stands elsewhere in the tree already.
    pub fn place_of(&self, tree: &TreePath, real: &Path) -> Option<Vec<u8>> {
        let (_, place) = self.places.iter().find(|(known, place)| known == real && place != tree)?;
        Some(relative(tree, place))
    }

    /// Decides on the link at `tree`, which is at `real` and says `text`.
    pub fn plan(&self, tree: &TreePath, real: &Path, text: &[u8]) -> io::Result<LinkPlan> {
        let lexical = self.resolve_lexically(tree, text);
        let target = match fs::canonicalize(real) {
            Ok(target) => target,
            // It dangles or is its own target: harmless as long as it stays inside.
            Err(error) if is_broken_link(&error) => {
                let keep = lexical.is_some() && !text.starts_with(b"/");
                return Ok(if keep { LinkPlan::Keep(text.to_vec()) } else { LinkPlan::Dangling });
            }
            Err(error) => return Err(error),
        };
        let Some(place) = self.place_in_tree(&target) else {
            return Ok(LinkPlan::Follow(target));
        };
        let same = lexical.as_ref() == Some(&place) && !text.starts_with(b"/");
        Ok(LinkPlan::Keep(if same { text.to_vec() } else { relative(tree, &place) }))
    }

    /// Returns where a real path stands in the tree, the innermost known place deciding.
    fn place_in_tree(&self, target: &Path) -> Option<TreePath> {
        let within = |(real, place): &(PathBuf, TreePath)| {
            Some((target.strip_prefix(real).ok()?.to_owned(), place.clone()))
        };
        let (below, place) =
            self.places.iter().filter_map(within).min_by_key(|(below, _)| below.as_os_str().len())?;
        below.components().try_fold(place, |place, part| place.join(part.as_os_str().as_bytes()).ok())
    }

    /// Returns where the text of a link leads if no component of the way is a link, and never leaves the tree.
    fn resolve_lexically(&self, tree: &TreePath, text: &[u8]) -> Option<TreePath> {
        let top: Vec<&[u8]> = self.top.as_bytes().split(|byte| *byte == b'/').collect();
        let mut parts: Vec<&[u8]> = tree.split().0.split(|byte| *byte == b'/').collect();
        for part in text.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." if parts.len() > top.len() => {
                    parts.pop();
                }
                b".." => return None,
                name => parts.push(name),
            }
        }
        TreePath::new(parts.join(&b'/')).ok()
    }
}

/// Returns the target by which a link at `from` points to `to`.
fn relative(from: &TreePath, to: &TreePath) -> Vec<u8> {
    let from: Vec<&[u8]> = from.split().0.split(|byte| *byte == b'/').collect();
    let to: Vec<&[u8]> = to.as_bytes().split(|byte| *byte == b'/').collect();
    let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let mut parts: Vec<&[u8]> = vec![b".."; from.len() - shared];
    parts.extend(&to[shared..]);
    if parts.is_empty() { b".".to_vec() } else { parts.join(&b'/') }
}

fn is_broken_link(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::new(text).unwrap()
    }

    #[test]
    fn a_relative_target_leads_from_the_link_to_the_place() {
        for (from, to, target) in [
            ("data/a", "data/b", "b"),
            ("data/a/b/c", "data/x", "../../x"),
            ("data/a/b", "data", ".."),
            ("data/a", "data", "."),
            ("data/a/b", "data/a", "."),
            ("data/a", "data/a/b", "a/b"),
        ] {
            assert_eq!(
                String::from_utf8(relative(&path(from), &path(to))).unwrap(),
                target,
                "{from} -> {to}"
            );
        }
    }

    #[test]
    fn a_text_that_climbs_above_the_tree_leads_nowhere() {
        let mut links = Links::default();
        links.begin_tree(&path("tablespaces/7"), Path::new("/ts"), b"pg_tblspc/7");
        let resolve = |text: &str| links.resolve_lexically(&path("tablespaces/7/PG_15/5"), text.as_bytes());
        assert_eq!(resolve("6"), Some(path("tablespaces/7/PG_15/6")));
        assert_eq!(resolve("../../x"), None);
        assert_eq!(resolve("../x/./y/"), Some(path("tablespaces/7/x/y")));
        assert_eq!(links.pg_path(&path("tablespaces/7/PG_15/5")), b"pg_tblspc/7/PG_15/5");
    }
}
