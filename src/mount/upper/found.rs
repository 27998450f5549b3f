//! What an operation found under a name, held while the operation goes on.
//!
//! The kernel counts what it has looked up, but a look-up that is still being answered, and whoever walks the tree in the
//! background, are counted by nobody else: without this the walk's forgetting could take a record away in between.

use crate::mount::fs::{LocalId, Volume};
use crate::mount::upper::Upper;

/// A node that stays in the table while this is there.
#[derive(Debug)]
pub(super) struct Found {
    upper: Upper,
    id: LocalId,
}

impl Found {
    /// Takes over a reference that has been counted.
    pub(super) fn counted(upper: &Upper, id: LocalId) -> Self {
        Self { upper: upper.clone(), id }
    }

    /// Returns its number.
    pub(super) fn id(&self) -> LocalId {
        self.id
    }
}

impl Drop for Found {
    fn drop(&mut self) {
        self.upper.forget(self.id, 1);
    }
}
