//! A PostgreSQL running on a writable mount: clones, and the demo.
//!
//! A clone is a folder ([`clone_folder`]) and, while it runs, one supervisor process that mounts, starts PostgreSQL
//! and answers requests. Invariant: a clone can harm nothing, neither the archive it came from nor a file, a slot or a
//! network of the source (`isolation`, `launch`). Deliberately absent: passthrough and cut-over.

pub mod clone_folder;
pub mod create;
pub mod supervise;

mod clone_mount;
mod hydration;
pub mod isolation;
pub mod launch;
mod orphans;
pub mod programs;
pub mod server;
mod store_wait;

pub mod demo;
pub mod landlock;
pub mod mount_namespace;
pub mod preload;
