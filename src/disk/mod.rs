//! Local files: durable write and rename, locks, free space, Walden's private area, the clone marker.
