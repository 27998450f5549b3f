//! The upper against a reference model, and what must never happen to it.
//!
//! `world` drives an upper by paths, `model` is the file system it must behave like, `sequences` compares the two over
//! random operations, `rules` are the failures seen elsewhere.

mod model;
mod rules;
mod sequences;
mod world;
