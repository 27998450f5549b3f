//! The binary over S3: on a server that is not ours, on a line that breaks, and where the store refuses.
//!
//! What one answer of a store means is tested beside `storage::s3`; here it is what a command makes of it.

#[path = "../support/mod.rs"]
mod support;

mod credentials;
mod independent;
mod line;
mod reaching;
mod refusals;
mod scene;
mod silent;
