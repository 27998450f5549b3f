//! The daemon, with real servers that archive through it: under load, broken stores, `kill -9`, and its own end.

#[path = "../support/mod.rs"]
mod support;

mod scene;

mod archiving;
mod callers;
mod clones;
mod ending;
mod heads;
mod killed;
mod memory;
mod queue;
