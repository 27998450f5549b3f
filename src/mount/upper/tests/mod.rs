//! The upper against a reference model, and what must never happen to it.
//!
//! `world` drives an upper by paths, `model` is the file system it must behave like, `sequences` compares the two over
//! random operations, `hydration` lets a hydrator work beside them, `fetching` is who fetches what, and when, `modes`
//! says what may be passed through, `rules` are the failures seen elsewhere. `power_cut` stops a `simulated_disk` at any
//! system call and loses what was not synced.

mod fetching;
mod hydration;
mod model;
mod modes;
mod power_cut;
mod rules;
mod sequences;
pub(super) mod simulated_disk;
pub(super) mod world;
