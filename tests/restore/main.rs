//! What `walden restore` promises, on real servers: what is recovered equals the source, whatever is asked for, and
//! nothing that is incomplete or damaged can be started.

#[path = "../support/mod.rs"]
mod support;

mod instant_scene;
mod source;

mod equal;
mod hosts;
mod incomplete;
mod instant;
mod instant_boot;
mod instant_commands;
mod instant_crashes;
mod instant_cut_over;
mod instant_debian;
mod instant_ending;
mod instant_full_disk;
mod instant_kills;
mod instant_majors;
mod instant_refusals;
mod instant_resumed_away;
mod instant_store_away;
mod instant_tablespaces;
mod instant_targets;
mod instant_terminated;
mod places;
mod standalone;
mod targets;
