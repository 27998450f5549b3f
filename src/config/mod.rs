//! The configuration file and the environment, turned into the Options of the modules below.
