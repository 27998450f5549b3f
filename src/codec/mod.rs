//! Bytes to bytes: compression, frames, keys, signatures, and the bounded CPU pool.
