//! Debian's clusters: which of them has its data in a directory, and where that one's configuration is.
//!
//! A cluster is a folder `VERSION/NAME` of `/etc/postgresql`, whose `postgresql.conf` says where the data is: on another disk
//! perhaps, or behind a link. Where no configuration names the directory, for `/etc` was lost with it, its place tells,
//! `/var/lib/postgresql/VERSION/NAME`. Deliberately absent: files that a configuration includes; Debian writes the path
//! into the main one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::disk::state_file;
use crate::restore::target::resolve;

/// A cluster as Debian names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DebianCluster {
    /// PostgreSQL's, as in `15`.
    pub version: String,
    /// As in `main`.
    pub name: String,
}

/// Below the root of a host: where Debian has configurations, and data unless that is elsewhere.
const CONFIGURATIONS: &str = "etc/postgresql";
const DATA: &str = "var/lib/postgresql";
const CONF: &str = "postgresql.conf";
/// Comments and all it has 30 KiB; what is longer is not what Debian wrote.
const CONF_BYTES_MAX: u64 = 1 << 20;

impl DebianCluster {
    /// Finds the cluster that has its data in a directory, which is named without links.
    pub fn of(data: &Path) -> Option<Self> {
        Self::below(Path::new("/"), data)
    }

    /// Returns where its configuration is.
    pub fn config_file(&self) -> PathBuf {
        self.config_file_below(Path::new("/"))
    }

    fn below(root: &Path, data: &Path) -> Option<Self> {
        let has_it = |cluster: &Self| {
            let conf = state_file::read(&cluster.config_file_below(root), "a configuration", CONF_BYTES_MAX);
            let directory = conf.ok().and_then(|conf| data_directory(&String::from_utf8_lossy(&conf)));
            directory.is_some_and(|directory| resolve(&directory) == data)
        };
        let by_configuration = Self::in_folder(&root.join(CONFIGURATIONS)).into_iter().find(has_it);
        by_configuration.or_else(|| Self::by_place(&root.join(DATA), data))
    }

    /// Finds the cluster whose place a directory is, or what is linked there.
    fn by_place(places: &Path, data: &Path) -> Option<Self> {
        let inside = data.strip_prefix(places).or_else(|_| data.strip_prefix(resolve(places)));
        let of_path = |path: &Path| {
            let mut parts = path.components().map(|part| part.as_os_str().to_str());
            let (version, name) = (parts.next()??, parts.next()??);
            Self::named(version, name).filter(|_| parts.next().is_none())
        };
        let is_linked = |cluster: &Self| resolve(&places.join(&cluster.version).join(&cluster.name)) == data;
        inside.ok().and_then(of_path).or_else(|| Self::in_folder(places).into_iter().find(is_linked))
    }

    /// Lists what looks like a cluster in a folder of Debian's.
    fn in_folder(folder: &Path) -> BTreeSet<Self> {
        let names = |folder: &Path| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
        };
        let of_version = |version: String| {
            let clusters = names(&folder.join(&version)).into_iter();
            clusters.filter_map(move |name| Self::named(&version, &name))
        };
        names(folder).into_iter().flat_map(of_version).collect()
    }

    /// Only what has the look of one: both become parts of the names of units.
    fn named(version: &str, name: &str) -> Option<Self> {
        let is_version = version.bytes().any(|byte| byte.is_ascii_digit())
            && version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let is_one = is_version && !name.is_empty() && !name.starts_with('.') && name.bytes().all(is_plain);
        is_one.then(|| Self { version: version.to_owned(), name: name.to_owned() })
    }

    fn config_file_below(&self, root: &Path) -> PathBuf {
        root.join(CONFIGURATIONS).join(&self.version).join(&self.name).join(CONF)
    }
}

/// Reads where a configuration has the data; the last line that says so counts, and a path needs quotes there.
fn data_directory(conf: &str) -> Option<PathBuf> {
    const NAME: &str = "data_directory";
    let value = |line: &str| {
        let (name, rest) = line.trim_start().split_at_checked(NAME.len())?;
        let rest = rest.trim_start();
        let quoted = rest.strip_prefix('=').unwrap_or(rest).trim_start().strip_prefix('\'')?;
        name.eq_ignore_ascii_case(NAME).then(|| unquoted(quoted))
    };
    conf.lines().rev().find_map(value).filter(|path| path.is_absolute())
}

/// Reads a quoted value up to its closing quote.
fn unquoted(text: &str) -> PathBuf {
    let (mut value, mut letters) = (String::new(), text.chars().peekable());
    while let Some(letter) = letters.next() {
        match letter {
            '\'' if letters.next_if_eq(&'\'').is_none() => break,
            '\\' => value.extend(letters.next()),
            letter => value.push(letter),
        }
    }
    value.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn cluster(version: &str, name: &str) -> Option<DebianCluster> {
        Some(DebianCluster { version: version.to_owned(), name: name.to_owned() })
    }

    #[test]
    fn a_cluster_is_known_by_the_place_of_its_data() {
        let of = |path: &str| DebianCluster::by_place(Path::new("/nowhere/postgresql"), Path::new(path));
        assert_eq!(of("/nowhere/postgresql/15/main"), cluster("15", "main"));
        assert_eq!(of("/nowhere/postgresql/9.6/my-db_2"), cluster("9.6", "my-db_2"));
        for other in [
            "/nowhere/postgresql/15",
            "/nowhere/postgresql/15/main/base",
            "/nowhere/postgresql/data/main",
            "/nowhere/postgresql/15/..",
            "/nowhere/postgresql/.../main",
            "/nowhere/postgresql/inf/main",
            "/nowhere/postgresql/15/a b",
            "/srv/postgresql/15/main",
            "15/main",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
        let file = cluster("15", "main").unwrap().config_file();
        assert_eq!(file, Path::new("/etc/postgresql/15/main/postgresql.conf"));
    }

    #[test]
    fn a_cluster_is_known_by_its_configuration_wherever_its_data_is() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        let disk = root.join("disk");
        let configure = |version: &str, name: &str, data: &Path| {
            let cluster = cluster(version, name).unwrap();
            let file = cluster.config_file_below(&root);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, format!("port = 5432\ndata_directory = '{}'\t# there\n", data.display()))
                .unwrap();
        };
        fs::create_dir_all(disk.join("one")).unwrap();
        symlink(&disk, root.join("link")).unwrap();
        configure("15", "main", &root.join("link/one"));
        configure("15", "odd name", &disk.join("odd"));
        configure("16", "main", &root.join("var/lib/postgresql/15/main"));
        let of = |data: &Path| DebianCluster::below(&root, data);
        assert_eq!(of(&disk.join("one")), cluster("15", "main"));
        assert_eq!(of(&disk.join("odd")), None);
        assert_eq!(of(&disk.join("two")), None);
        // Its own word counts more than where it lies.
        assert_eq!(of(&root.join("var/lib/postgresql/15/main")), cluster("16", "main"));
        assert_eq!(of(&root.join("var/lib/postgresql/15/other")), cluster("15", "other"));
    }

    /// Nothing in `/etc` says so: it was lost too.
    #[test]
    fn a_cluster_is_known_by_a_link_in_its_place() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        let (disk, places) = (root.join("disk"), root.join(DATA));
        for folder in [&disk.join("one"), &places.join("15"), &root.join("other")] {
            fs::create_dir_all(folder).unwrap();
        }
        symlink(disk.join("one"), places.join("15/main")).unwrap();
        symlink(root.join("other"), places.join("14")).unwrap();
        let of = |data: &Path| DebianCluster::below(&root, data);
        assert_eq!(of(&disk.join("one")), cluster("15", "main"));
        assert_eq!(of(&disk), None);
        fs::create_dir(root.join("other/main")).unwrap();
        assert_eq!(of(&root.join("other/main")), cluster("14", "main"));
        // All of Debian's places are on another disk, and that of the cluster is not there yet.
        fs::rename(&places, root.join("moved")).unwrap();
        symlink(root.join("moved"), &places).unwrap();
        assert_eq!(of(&root.join("moved/13/main")), cluster("13", "main"));
    }

    #[test]
    fn where_the_data_is_is_read_as_postgresql_reads_it() {
        for (conf, expected) in [
            ("data_directory = '/srv/one'", Some("/srv/one")),
            ("  DATA_DIRECTORY='/srv/one'   # as '/srv/two'", Some("/srv/one")),
            ("data_directory '/srv/one'\ndata_directory = '/srv/two'\nport = 1", Some("/srv/two")),
            (r"data_directory = '/srv/it''s a\\b\'c'", Some(r"/srv/it's a\b'c")),
            ("#data_directory = '/srv/one'", None),
            ("data_directory = 'ConfigDir'", None),
            ("data_directory_mode = '/srv/one'", None),
            ("data_directory = /srv/one", None),
            ("data_directory", None),
            ("däta_directory = '/srv/one'", None),
            ("", None),
        ] {
            assert_eq!(data_directory(conf).as_deref(), expected.map(Path::new), "{conf}");
        }
    }
}
