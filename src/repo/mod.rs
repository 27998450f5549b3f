//! The repository format: what an object is called, how it is sealed, how it is read in parts.
