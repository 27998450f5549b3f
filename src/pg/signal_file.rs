//! The files that tell a starting server to recover: a recovery that ends, or a standby, which follows and never ends
//! by itself. Where both are there, it is a standby.

/// Asks for a recovery that ends.
pub const RECOVERY_SIGNAL: &str = "recovery.signal";
/// Asks for a standby.
pub const STANDBY_SIGNAL: &str = "standby.signal";
