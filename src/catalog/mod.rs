//! What exists in a site: basebackups, WAL coverage, timelines, and what recovery needs of them.
