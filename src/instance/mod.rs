//! A PostgreSQL running on a writable mount: clones, restores that are not finished, and the demo.
//!
//! A clone is a folder ([`clone_folder`]) and, while it runs, one supervisor process that mounts, starts PostgreSQL
//! and answers requests. Invariant: a clone can harm nothing, neither the archive it came from nor a file, a slot or a
//! network of the source (`isolation`, `launch`). It ends by being deleted, or as an ordinary data directory
//! (`finalize`).

pub mod adoption;
pub mod clone_folder;
pub mod create;
pub mod duplicate;
pub mod expiry;
pub mod finalize;
pub mod finalize_plan;
pub mod half_made;
pub mod instant;
pub mod reset;
pub mod supervise;

mod as_user;
mod bring;
mod clone_mount;
mod copy_tree;
pub mod cut_over;
mod cutting_over;
mod ending;
mod hydration;
pub mod isolation;
pub mod launch;
mod launch_order;
mod lazy_uppers;
mod native_settings;
mod orphans;
mod places;
mod postmaster;
mod prepare;
pub mod programs;
mod replay_processor;
mod requests;
pub mod server;
mod store_wait;

pub mod demo;
pub mod landlock;
pub mod mount_namespace;
pub mod preload;
