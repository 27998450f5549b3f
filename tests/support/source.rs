//! A real server and the Walden that backs it up: what most tests of the binary begin with.

use std::ops::Deref;

use super::{Cluster, Options, Site, Walden};

/// A cluster and its Walden.
#[derive(Debug)]
pub struct Source {
    // Dropped in this order: the server has to be gone before its folder.
    pub cluster: Cluster,
    pub walden: Walden,
}

impl Deref for Source {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Source {
    /// Starts a cluster, and configures its site as `adjust` says; nothing is archived yet.
    #[track_caller]
    pub fn configured(major: u32, options: Options, adjust: impl FnOnce(&Cluster, Site) -> Site) -> Self {
        let cluster = Cluster::start_with(major, options);
        let site = Site::of(&cluster, cluster.data_directory()).bin_directory(&cluster.bin_directory());
        let walden = Walden::configure(cluster.scratch(), &adjust(&cluster, site));
        Self { cluster, walden }
    }

    /// Lets PostgreSQL archive with `walden wal push` from now on.
    #[track_caller]
    pub fn archive(&self) {
        self.set_archive_command(&self.walden.archive_command());
    }
}
