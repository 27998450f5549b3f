//! A site as its owner meets it: set up, checked while this and that is wrong, and kept over pg_upgrade.

#[path = "../support/mod.rs"]
mod support;

mod check;
mod checked;
mod upgrade;
