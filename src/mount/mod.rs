//! Basebackups as file systems: the read-only tree, and the writable upper above it.
