//! A tree of a clone comes to its place: by a rename where that reaches it, else by a copy that is removed there where it
//! was once it is whole and synced.
//!
//! ```text
//! the tree is gone from the clone              it is in its place
//! the place has a private area of this tree's  a copy of it: whole where that says `copied`, else begun anew
//! the place is absent or empty                 it is to come
//! anything else                                came there after the order was written, and is somebody's
//! ```
//! Never is anything cleared that a copy of this very tree has not begun. Deliberately absent: what is done in the place.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::disk::durable::{self, Create};
use crate::disk::{Owner, PrivateArea, private_area};
use crate::instance::copy_tree::copy_tree;
use crate::instance::finalize::{FinalizeError, TreeMove};
use crate::instance::places::{at, clear, is_absent_or_empty, is_there};

/// Says in a private area which tree is being copied; written before anything of it is there.
const BEGUN: &str = "begun";
/// Says in a private area that the whole tree has been copied.
const COPIED: &str = "copied";

/// Brings a tree, as incomplete as it was.
pub(super) fn bring(tree: &TreeMove, is_copied: bool, owner: Owner) -> Result<(), FinalizeError> {
    let TreeMove { from, to } = tree;
    if !is_there(from) {
        // By an earlier attempt.
        return if is_there(to) { Ok(()) } else { Err(FinalizeError::Missing { path: from.clone() }) };
    }
    let is_begun = is_copy_of(tree);
    if is_begun && is_there(&to.join(private_area::DIRECTORY_NAME).join(COPIED)) {
        return Ok(());
    }
    if !is_begun && !is_absent_or_empty(to)? && !is_bare_area(to)? {
        return Err(FinalizeError::Taken { path: to.clone() });
    }
    check_still_whole(from)?;
    if let Some(parent) = to.parent() {
        durable::create_dir_all(parent, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    }
    if !is_copied && is_absent_or_empty(to)? && rename(from, to)? {
        return Ok(());
    }
    copy(tree, owner)
}

/// Tells whether a place holds a copy of this tree, or the beginning of one.
pub(super) fn is_copy_of(tree: &TreeMove) -> bool {
    let begun = tree.to.join(private_area::DIRECTORY_NAME).join(BEGUN);
    fs::read(begun).is_ok_and(|text| text == tree.from.as_os_str().as_bytes())
}

/// Brings the WAL into a data directory, in place of the link that led to it.
pub(super) fn bring_wal(
    from: &Path,
    data: &Path,
    is_copied: bool,
    owner: Owner,
) -> Result<(), FinalizeError> {
    let place = data.join("pg_wal");
    if fs::symlink_metadata(&place).is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    let Some(area) = PrivateArea::open(data)? else {
        return Err(FinalizeError::Missing { path: data.join(private_area::DIRECTORY_NAME) });
    };
    let staged = area.temporary_directory().join("pg_wal");
    if is_there(from) {
        if is_there(&staged) {
            fs::remove_dir_all(&staged).map_err(at("remove", &staged))?;
        }
        if is_copied || !rename(from, &staged)? {
            durable::create_dir(&staged, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
            copy_tree(from, &staged, "")?;
            durable::sync_file_system(&staged)?;
        }
    }
    if !is_there(&staged) {
        return Err(FinalizeError::Missing { path: from.to_owned() });
    }
    durable::remove_file(&place)?;
    Ok(durable::rename(&staged, &place)?)
}

/// Tells whether there is nothing in a directory but a private area with nothing in it, as a kill before the first word
/// of a copy leaves it.
fn is_bare_area(to: &Path) -> Result<bool, FinalizeError> {
    let Some(area) = PrivateArea::open(to)? else { return Ok(false) };
    let parts = [area.held_directory(), area.temporary_directory()];
    let is_only = |directory: &Path, known: &[&Path]| {
        let mut entries = fs::read_dir(directory).map_err(at("open directory", directory))?;
        Ok::<_, FinalizeError>(entries.all(|entry| entry.is_ok_and(|entry| known.contains(&&*entry.path()))))
    };
    Ok(is_only(to, &[area.directory()])?
        && is_only(area.directory(), &[&parts[0], &parts[1]])?
        && is_absent_or_empty(&parts[0])?
        && is_absent_or_empty(&parts[1])?)
}

/// Looks once more for the mark that a plan has asked for: a server that has run since has taken it away.
fn check_still_whole(from: &Path) -> Result<(), FinalizeError> {
    let Some(area) = PrivateArea::open(from)? else { return Ok(()) };
    let mark = area.directory().join(private_area::WHOLE_MARK);
    if is_there(&mark) { Ok(()) } else { Err(FinalizeError::Missing { path: mark }) }
}

fn copy(tree: &TreeMove, owner: Owner) -> Result<(), FinalizeError> {
    let TreeMove { from, to } = tree;
    durable::create_dir_all(to, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    // From here on, whatever is in it, nothing can start it.
    let area = PrivateArea::create(to, Some(owner))?;
    let say =
        |name, text: &[u8]| durable::write_file(&area.directory().join(name), text, Create::PRIVATE_FILE);
    // And from here on an attempt knows it for its own.
    say(BEGUN, from.as_os_str().as_bytes())?;
    clear(to, private_area::DIRECTORY_NAME)?;
    clear(&area.held_directory(), "")?;
    copy_tree(from, to, private_area::DIRECTORY_NAME)?;
    if let Some(held) = PrivateArea::open(from)? {
        copy_tree(&held.held_directory(), &area.held_directory(), "")?;
    }
    durable::sync_file_system(to)?;
    Ok(say(COPIED, b"")?)
}

/// Renames a directory to a place that is absent or an empty directory; false where a rename does not reach it.
fn rename(from: &Path, to: &Path) -> Result<bool, FinalizeError> {
    match fs::rename(from, to) {
        Ok(()) => {
            durable::fsync_parent(to)?;
            durable::fsync_parent(from)?;
            Ok(true)
        }
        // Another file system, or the place is where one is mounted.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EXDEV | libc::EBUSY)) => Ok(false),
        Err(error) => Err(at("rename a directory to", to)(error).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(scratch: &Path) -> TreeMove {
        let (from, to) = (scratch.join("one/upper/data"), scratch.join("main"));
        fs::create_dir_all(from.join("base")).unwrap();
        let area = PrivateArea::create(&from, None).unwrap();
        fs::write(area.directory().join(private_area::WHOLE_MARK), "").unwrap();
        TreeMove { from, to }
    }

    #[test]
    fn only_a_copy_that_this_tree_has_begun_is_begun_anew() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = tree(scratch.path());
        let owner = Owner::current();
        fs::create_dir(&tree.to).unwrap();
        let area = PrivateArea::create(&tree.to, None).unwrap();
        let somebodys = area.directory().join("restore.json");
        fs::write(&somebodys, "{}").unwrap();
        for text in [None, Some("/clones/other/upper/data")] {
            text.iter().for_each(|text| fs::write(area.directory().join(BEGUN), text).unwrap());
            let error = bring(&tree, true, owner).unwrap_err();
            assert!(matches!(&error, FinalizeError::Taken { path } if *path == tree.to), "{error}");
            assert!(somebodys.exists() && !is_copy_of(&tree));
        }
        // Killed before the first word: nothing in it is anybody's.
        fs::remove_file(somebodys).unwrap();
        fs::remove_file(area.directory().join(BEGUN)).unwrap();
        bring(&tree, false, owner).unwrap();
        assert!(is_copy_of(&tree) && tree.to.join("base").is_dir());
        assert!(tree.from.exists(), "it goes once all is synced");
    }

    #[test]
    fn a_tree_that_is_not_whole_any_more_stays() {
        for is_copied in [false, true] {
            let scratch = tempfile::tempdir().unwrap();
            let tree = tree(scratch.path());
            let mark = tree.from.join(private_area::DIRECTORY_NAME).join(private_area::WHOLE_MARK);
            fs::remove_file(&mark).unwrap();
            let error = bring(&tree, is_copied, Owner::current()).unwrap_err();
            assert!(matches!(&error, FinalizeError::Missing { path } if *path == mark), "{error}");
            assert!(tree.from.exists() && !tree.to.exists());
        }
    }
}
