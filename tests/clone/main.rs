//! What `walden clone` promises, on real servers: it equals its source, harms nothing, keeps what it acknowledged, and
//! leaves nothing behind.

#[path = "../support/mod.rs"]
mod support;

mod processes;
mod site;

mod commands;
mod equal;
mod finalize;
mod full_disk;
mod holes;
mod hostile;
mod hydration;
mod killed_commands;
mod life;
mod pieces;
mod rounds;
mod shown;
mod silent_store;
mod standalone;
mod store_away;
mod tablespaces;
mod targets;
mod terminated;
mod told;
