//! PostgreSQL's vocabulary and file formats, pure: no file is opened here, no clock is read.
