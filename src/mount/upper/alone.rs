//! Letting go of the lower while the mount goes on: everything is local, and what was held back comes to its place.
//!
//! From then on the tree is what the upper's directory has, and nobody asks the lower: it may go from the store. A crash
//! at any point leaves a directory that is whole: each held file is where it was or where it belongs, and whoever opens the
//! upper again sees which (`Namespace::new`). The file itself stays the same, so who has it open notices nothing.

use std::io;
use std::path::Path;

use nix::errno::Errno;

use crate::disk::private_area::DIRECTORY_NAME;
use crate::mount::upper::Upper;
use crate::mount::upper::namespace::{Namespace, held_place, of_io};

impl Upper {
    /// Lets go of the lower; the directory beneath is then an ordinary one, but for its private area and origins.
    ///
    /// # Errors
    /// `EBUSY` while not everything is local and on stable storage; and what the disk says.
    pub fn stand_alone(&self) -> Result<(), Errno> {
        if !self.is_hydrated() {
            return Err(Errno::EBUSY);
        }
        self.shared.lock().stand_alone().map_err(of_io)
    }
}

impl Namespace {
    fn stand_alone(&mut self) -> io::Result<()> {
        // First: the other file is what a server looks for last (`HELD_BACK` has them in order).
        while let Some((place, name)) = self.held.first().copied() {
            let (held, place) = (held_place(name), Path::new(place));
            if self.disk.stat(&held)?.is_some() {
                self.disk.open(&held)?.sync(false)?;
                self.disk.rename(&held, place)?;
            }
            // The name leads to where the file is, whether or not that is on stable storage yet.
            self.held.remove(0);
            self.disk.sync_directory(place.parent().unwrap_or(Path::new("")))?;
            self.disk.sync_directory(&Path::new(DIRECTORY_NAME).join("held"))?;
        }
        self.is_alone = true;
        Ok(())
    }
}
