//! How much room a file system has left.
//! Quotas are not seen: `statvfs` counts the file system, not a user's share of it.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::disk::Error;

/// The size of a file system and what is left of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes this process may still use; blocks reserved for root are not counted.
    pub free_bytes: u64,
    pub total_bytes: u64,
}

impl Space {
    /// Measures the file system that holds `path`.
    pub fn at(path: &Path) -> Result<Self, Error> {
        let figures = statvfs(path).map_err(|errno| Error::at("statvfs", path)(errno.into()))?;
        let unit = figures.fragment_size();
        Ok(Self {
            free_bytes: figures.blocks_available().saturating_mul(unit),
            total_bytes: figures.blocks().saturating_mul(unit),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_file_system_is_larger_than_what_is_free() {
        let space = Space::at(Path::new("/")).unwrap();
        assert!(0 < space.total_bytes && space.free_bytes <= space.total_bytes);
        assert!(Space::at(Path::new("/no/such/place")).unwrap_err().is_not_found());
    }
}
