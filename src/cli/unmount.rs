//! `walden unmount DIR`: takes a mount away, and says who holds it where that cannot be done.
//!
//! It works on the mount alone: the process that serves it ends by itself, and may have died long ago. Only mounts
//! of Walden are touched.

use std::fmt::{self, Write};
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::mount::{self, MountError};

use super::context::Context;
use super::detached;
use super::error::CommandError;
use super::output::Report;
use super::text::TextStyle;

/// Unmounts what `walden mount` mounted
#[derive(Debug, Args)]
pub struct Unmount {
    /// The directory
    dir: PathBuf,
}

/// What `unmount` did.
#[derive(Debug, Serialize)]
struct UnmountReport {
    unmounted: PathBuf,
}

/// What the kernel calls the type of our mounts.
const FILE_SYSTEM: &str = "fuse.walden";

impl Unmount {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let dir = resolve(&self.dir)?;
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        if !is_ours(&mounts, &dir) {
            return Err(MountError::NotMounted { path: dir }.into());
        }
        mount::unmount(&dir)?;
        context.output.print(&UnmountReport { unmounted: dir })
    }
}

impl Report for UnmountReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        writeln!(out, "Unmounted {}.", self.unmounted.display())
    }
}

/// Resolves links in all but the last part, which may be a mount whose process has died.
fn resolve(dir: &Path) -> Result<PathBuf, CommandError> {
    if let Ok(resolved) = dir.canonicalize() {
        return Ok(resolved);
    }
    let whole = detached::absolute(dir)?;
    let parent = whole.parent().and_then(|parent| parent.canonicalize().ok());
    Ok(parent.zip(whole.file_name()).map_or(whole.clone(), |(parent, name)| parent.join(name)))
}

/// Tells from the table of mounts whether the topmost one on `dir` is ours.
fn is_ours(mounts: &str, dir: &Path) -> bool {
    let escaped: String = dir
        .to_string_lossy()
        .chars()
        .map(|c| match c {
            ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", u32::from(c)),
            other => other.to_string(),
        })
        .collect();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mut on_dir = fields.filter(|fields| fields.get(1) == Some(&escaped.as_str()));
    on_dir.next_back().is_some_and(|fields| fields.get(2) == Some(&FILE_SYSTEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_mounts_are_ours() {
        let mounts = "proc /proc proc rw 0 0\n\
                      walden:main /mnt/a\\040b fuse.walden ro 0 0\n\
                      walden:main /mnt/covered fuse.walden ro 0 0\ntmpfs /mnt/covered tmpfs rw 0 0\n";
        assert!(is_ours(mounts, Path::new("/mnt/a b")));
        for other in ["/proc", "/mnt", "/mnt/covered", "/mnt/a"] {
            assert!(!is_ours(mounts, Path::new(other)), "{other}");
        }
    }
}
