//! A PostgreSQL running on a writable mount: clones, and the demo.

pub mod demo;
