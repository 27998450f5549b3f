//! Takes a basebackup: plan, read, hash, compress, seal, pack, upload, commit.
