//! A real mount, used by real processes: what the kernel makes of our answers.
//!
//! Needs `/dev/fuse` and root or `fusermount3`; `postgres` root and PostgreSQL's programs. Where that is missing each test says so loudly and
//! passes, unless `CI` is set: then it fails. Everything lies in a scratch folder of its own; what is mounted is
//! unmounted again when a test fails too.

mod exercise;
mod folder_lower;
mod harness;
mod kernel_modes;
mod ordinary_user;
mod passthrough;
mod postgres;
mod read_only;
mod synced_writes;
mod writable;
