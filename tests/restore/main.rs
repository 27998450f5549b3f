//! What `walden restore` promises, on real servers: what is recovered equals the source, whatever is asked for, and
//! nothing that is incomplete or damaged can be started.

#[path = "../support/mod.rs"]
mod support;

mod source;

mod equal;
mod hosts;
mod incomplete;
mod instant;
mod places;
mod targets;
