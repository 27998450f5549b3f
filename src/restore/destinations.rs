//! Which path of a basebackup is written where: the data directory, each tablespace, the configuration.
//!
//! Pure. A path of the tree becomes a path below one of the destinations or is left out; no name in a basebackup,
//! forged or not, leads anywhere else, because a `TreePath` has no `..` and no link is made before all files are.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::private_area;
use crate::repo::entry::TreePath;
use crate::repo::manifest::Tablespace;
use crate::restore::Error;

/// Where a restore writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destinations {
    /// PGDATA.
    pub data: PathBuf,
    /// Each tablespace outside PGDATA, by oid.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// Where the configuration that was outside PGDATA goes, if anywhere.
    pub configuration: Option<ConfigurationPlace>,
}

/// Where configuration files go: those of the main file's folder right into `directory`, others below it under
/// their full path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigurationPlace {
    /// The directory.
    pub directory: PathBuf,
    /// The folder of the main file in the tree, such as `config/etc/postgresql/15/main`.
    pub top: String,
}

/// What becomes of the files that make a server do something a restore decides anew.
const NEVER_WRITTEN: [&[u8]; 5] = [
    // With it the server would make links to the source's directories (failure 27b).
    b"data/tablespace_map",
    b"data/recovery.signal",
    b"data/standby.signal",
    b"data/walden.plan.json",
    b"data/walden.restore.json",
];

impl Destinations {
    /// Decides where everything goes; what is not mapped goes where it was.
    pub fn new(
        data: &Path,
        tablespaces: &[Tablespace],
        map: &[(String, PathBuf)],
        configuration: Option<ConfigurationPlace>,
    ) -> Result<Self, Error> {
        let outside = || tablespaces.iter().filter(|tablespace| !tablespace.location.is_empty());
        let mut mapped: BTreeMap<u32, PathBuf> = BTreeMap::new();
        for (name, directory) in map {
            let by_oid = outside().find(|tablespace| tablespace.oid.to_string() == *name);
            let found = by_oid.or_else(|| outside().find(|tablespace| tablespace.name == *name));
            let found = found.ok_or_else(|| Error::UnknownTablespace { name: name.clone() })?;
            if mapped.insert(found.oid, directory.clone()).is_some() {
                return Err(Error::MappedTwice { name: name.clone() });
            }
        }
        for tablespace in outside() {
            let original = || PathBuf::from(OsStr::from_bytes(&tablespace.location));
            mapped.entry(tablespace.oid).or_insert_with(original);
        }
        let destinations = Self { data: data.to_owned(), tablespaces: mapped, configuration };
        destinations.check_apart()?;
        Ok(destinations)
    }

    /// Returns every directory that is written to, with what it is.
    pub fn all(&self) -> Vec<(&Path, String)> {
        let mut all = vec![(&*self.data, "the data directory".to_owned())];
        all.extend(self.tablespaces.iter().map(|(oid, path)| (&**path, format!("tablespace {oid}"))));
        all.extend(self.configuration.iter().map(|place| (&*place.directory, "--config-dir".to_owned())));
        all
    }

    /// Returns where a path of the tree goes; nothing where it is not restored.
    ///
    /// # Errors
    /// Where the tree has no such part.
    pub fn place(&self, path: &TreePath) -> Result<Option<PathBuf>, Error> {
        let below = |directory: &Path, rest: &[u8]| match rest {
            b"" => directory.to_owned(),
            rest => directory.join(OsStr::from_bytes(rest)),
        };
        if NEVER_WRITTEN.contains(&path.as_bytes()) {
            return Ok(None);
        }
        if let Some(rest) = path.strip(b"data") {
            // One that was left in the source: it would say of this restore how far that one had come.
            if rest.split(|byte| *byte == b'/').next() == Some(private_area::DIRECTORY_NAME.as_bytes()) {
                return Ok(None);
            }
            return Ok(Some(below(&self.data, rest)));
        }
        if let Some(rest) = path.strip(b"config") {
            let Some(place) = &self.configuration else { return Ok(None) };
            return Ok(Some(match path.strip(place.top.as_bytes()) {
                Some(rest) => below(&place.directory, rest),
                // A folder above the main file's is the directory itself.
                None if place.top.as_bytes().starts_with(path.as_bytes()) => return Ok(None),
                None => below(&place.directory, rest),
            }));
        }
        if path.as_bytes() == b"tablespaces" || path.as_bytes().is_empty() {
            return Ok(None);
        }
        let unknown = || {
            let detail = "it is in no part of a basebackup".to_owned();
            Error::Repository(crate::repo::Error::Damaged { object: path.to_string(), detail })
        };
        let rest = path.strip(b"tablespaces").ok_or_else(unknown)?;
        let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
        let oid: u32 =
            str::from_utf8(&rest[..end]).ok().and_then(|oid| oid.parse().ok()).ok_or_else(unknown)?;
        let directory = self.tablespaces.get(&oid).ok_or_else(unknown)?;
        Ok(Some(below(directory, rest.get(end + 1..).unwrap_or_default())))
    }

    /// Refuses two places of which one is within the other (failures 25, 27b).
    fn check_apart(&self) -> Result<(), Error> {
        let all = self.all();
        for (n, (path, _)) in all.iter().enumerate() {
            for (other, what) in &all[..n] {
                if path.starts_with(other) || other.starts_with(path) {
                    let other = format!("{what} in \"{}\"", other.display());
                    return Err(Error::Overlap { path: (*path).to_owned(), other });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tablespace(oid: u32, location: &str, name: &str) -> Tablespace {
        Tablespace { oid, location: location.as_bytes().to_vec(), name: name.to_owned() }
    }

    fn made(map: &[(&str, &str)]) -> Result<Destinations, Error> {
        let tablespaces = [
            tablespace(16400, "/srv/fast", "fast"),
            tablespace(16401, "/srv/slow", "slow"),
            tablespace(16402, "", "in"),
        ];
        let map: Vec<_> = map.iter().map(|(name, to)| ((*name).to_owned(), PathBuf::from(to))).collect();
        let top = "config/etc/postgresql/15/main".to_owned();
        let configuration = Some(ConfigurationPlace { directory: PathBuf::from("/etc/new"), top });
        Destinations::new(Path::new("/pg/data"), &tablespaces, &map, configuration)
    }

    fn place(destinations: &Destinations, path: &str) -> Option<String> {
        let place = destinations.place(&TreePath::new(path).unwrap()).unwrap();
        place.map(|path| path.display().to_string())
    }

    #[test]
    fn every_part_has_its_place_and_nothing_else_has_one() {
        let made = made(&[("fast", "/new/fast"), ("16401", "/new/slow")]).unwrap();
        for (path, expected) in [
            ("data", "/pg/data"),
            ("data/base/5/1", "/pg/data/base/5/1"),
            ("tablespaces/16400/PG_15/5/1", "/new/fast/PG_15/5/1"),
            ("tablespaces/16401", "/new/slow"),
            ("config/etc/postgresql/15/main/postgresql.conf", "/etc/new/postgresql.conf"),
            ("config/etc/postgresql/15/main", "/etc/new"),
            ("config/srv/more.conf", "/etc/new/srv/more.conf"),
        ] {
            assert_eq!(place(&made, path).as_deref(), Some(expected), "{path}");
        }
        for path in [
            "tablespaces",
            "config",
            "config/etc",
            "data/tablespace_map",
            "data/recovery.signal",
            "data/.walden",
            "data/.walden/complete",
        ] {
            assert_eq!(place(&made, path), None, "{path}");
        }
        for path in ["tablespaces/16402/x", "tablespaces/16499", "database", "wal/x"] {
            assert!(made.place(&TreePath::new(path).unwrap()).is_err(), "{path}");
        }
    }

    #[test]
    fn what_is_not_mapped_goes_where_it_was() {
        let made = made(&[("fast", "/new/fast")]).unwrap();
        assert_eq!(place(&made, "tablespaces/16401/x").as_deref(), Some("/srv/slow/x"));
    }

    /// Failure 25, as far as a map can cause it.
    #[test]
    fn a_map_that_mixes_places_up_is_refused() {
        for (map, message) in [
            (&[("quick", "/new")][..], "the basebackup has no tablespace \"quick\""),
            (&[("in", "/new")], "the basebackup has no tablespace \"in\""),
            (&[("fast", "/a"), ("16400", "/b")], "tablespace \"16400\" is mapped twice"),
            (
                &[("fast", "/a"), ("slow", "/a")],
                "\"/a\" and tablespace 16400 in \"/a\" are in each other's way",
            ),
            (
                &[("fast", "/pg/data/fast")],
                "\"/pg/data/fast\" and the data directory in \"/pg/data\" are in each other's way",
            ),
            (&[("fast", "/pg")], "\"/pg\" and the data directory in \"/pg/data\" are in each other's way"),
        ] {
            assert_eq!(made(map).unwrap_err().to_string(), message);
        }
    }
}
