//! The damage matrix: each kind of object flipped, cut, removed, swapped, and every later action tried on it
//! (failure 22). The bytes are either the right ones or an error that names the object, never others.
//!
//! With it what is refused although nothing is damaged: keys that are missing, strange or exposed, signers nobody
//! trusts. And the witness that no upload, however it fails, seals twice under one nonce (failure 43).

#[path = "../support/mod.rs"]
mod support;

mod damage;
mod source;

mod clones;
mod forms;
mod increments;
mod keys;
mod matrix;
mod mounted;
mod pieces;
mod sealing;
mod wal;
