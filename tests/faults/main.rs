//! What goes wrong around a backup that is not damage: processes killed at any moment, two writers of one site, a full
//! disk, a server that is shut down, a clock that is off, a folder that may not be written, one request of the store
//! that fails.
//!
//! Each time the run succeeds or says what failed, nothing that is not whole is listed, and the next run converges.

#[path = "../support/mod.rs"]
mod support;

mod site;

mod clocks;
mod clone_start;
mod engines;
mod full_disk;
mod killed;
mod parts;
mod positions;
mod primary_and_standby;
mod refused;
mod shutdown;
mod two_writers;
mod unwritable;
