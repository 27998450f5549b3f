//! WAL in and out: one segment pushed, one fetched.
