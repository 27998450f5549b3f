//! The pages of a cluster at a moment, a hash of each, taken from its files while nobody writes to them.
//!
//! Of the files that a basebackup takes as they are and a start does not write anew: relations, their maps, and the
//! status of transactions. A server that does nothing may still write a page or two (a hint bit, a checkpoint): a page
//! is *settled* where the record before a backup and the one behind it agree, and only those are compared.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;

const PAGE_SIZE: usize = 8192;
const HASH_LEN: usize = 16;
/// Below PGDATA; links are followed.
const FOLDERS: [&str; 5] = ["base", "global", "pg_tblspc", "pg_xact", "pg_multixact"];
/// Of so many pages one may be unsettled, or the server was not at rest and little was compared.
const UNSETTLED_SHARE_MAX: u64 = 100;

type PageHash = [u8; HASH_LEN];

/// The pages of a cluster.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PageRecord {
    files: BTreeMap<Vec<u8>, FileRecord>,
}

#[derive(Debug, PartialEq, Eq)]
struct FileRecord {
    size: u64,
    hashes: Vec<PageHash>,
}

/// What came between two records.
#[derive(Debug, Default, Serialize)]
pub struct Changes {
    pages: u64,
    changed_pages: u64,
    changed_bytes: u64,
    changed_files: u64,
    /// All bytes of the files in which anything changed.
    changed_file_bytes: u64,
}

/// What a restored directory has of what was recorded.
#[derive(Debug, Default, Serialize)]
pub struct Comparison {
    settled_pages: u64,
    unsettled_pages: u64,
    different_pages: u64,
    missing_files: u64,
    /// Files whose size was settled and is another one.
    other_sizes: u64,
}

impl PageRecord {
    /// Hashes the pages of a data directory.
    pub fn take(data_directory: &Path) -> io::Result<Self> {
        let mut record = Self::default();
        for folder in FOLDERS {
            record.add(&data_directory.join(folder), folder.as_bytes())?;
        }
        Ok(record)
    }

    fn add(&mut self, path: &Path, name: &[u8]) -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let below = [name, b"/", entry.file_name().as_bytes()].concat();
            let metadata = match fs::metadata(entry.path()) {
                // A server removes files whenever it likes.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata?,
            };
            if metadata.is_dir() {
                if !entry.file_name().as_bytes().starts_with(b"pgsql_tmp") {
                    self.add(&entry.path(), &below)?;
                }
            } else if is_recorded(entry.file_name().as_bytes()) {
                self.files.insert(below, hash_file(&entry.path())?);
            }
        }
        Ok(())
    }

    /// Writes the record into a file.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut out = BufWriter::new(File::create(path)?);
        for (name, file) in &self.files {
            out.write_all(&(name.len() as u32).to_le_bytes())?;
            out.write_all(name)?;
            out.write_all(&file.size.to_le_bytes())?;
            out.write_all(file.hashes.as_flattened())?;
        }
        out.flush()
    }

    /// Reads a record that was written.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut bytes = &fs::read(path)?[..];
        let mut files = BTreeMap::new();
        while !bytes.is_empty() {
            let mut name = vec![0; u32::from_le_bytes(take(&mut bytes)?) as usize];
            bytes.read_exact(&mut name)?;
            let size = u64::from_le_bytes(take(&mut bytes)?);
            let mut hashes = vec![[0; HASH_LEN]; size.div_ceil(PAGE_SIZE as u64) as usize];
            bytes.read_exact(hashes.as_flattened_mut())?;
            files.insert(name, FileRecord { size, hashes });
        }
        Ok(Self { files })
    }

    /// Says what has changed since an earlier record.
    pub fn since(&self, before: &Self) -> Changes {
        let mut changes = Changes::default();
        for (name, file) in &self.files {
            let known: &[PageHash] = before.files.get(name).map_or(&[], |before| before.hashes.as_slice());
            let same = file.hashes.iter().zip(known).filter(|(now, then)| now == then).count();
            let changed = (file.hashes.len() - same) as u64;
            changes.pages += file.hashes.len() as u64;
            changes.changed_pages += changed;
            if changed > 0 {
                changes.changed_files += 1;
                changes.changed_file_bytes += file.size;
            }
        }
        changes.changed_bytes = changes.changed_pages * PAGE_SIZE as u64;
        changes
    }

    /// Compares a restored directory, which this is, with what the server had before and after the backup.
    pub fn compared(&self, before: &Self, after: &Self) -> Comparison {
        let mut comparison = Comparison::default();
        for (name, then) in &before.files {
            let Some(now) = after.files.get(name) else { continue };
            let Some(restored) = self.files.get(name) else {
                comparison.missing_files += 1;
                continue;
            };
            comparison.other_sizes += u64::from(then.size == now.size && restored.size != then.size);
            for (n, (then, now)) in then.hashes.iter().zip(&now.hashes).enumerate() {
                if then != now {
                    comparison.unsettled_pages += 1;
                    continue;
                }
                comparison.settled_pages += 1;
                comparison.different_pages += u64::from(restored.hashes.get(n) != Some(now));
            }
        }
        comparison
    }
}

impl Comparison {
    /// Whether it says that the restored directory is the server's, bit for bit.
    pub fn is_exact(&self) -> bool {
        let wrong = self.different_pages + self.missing_files + self.other_sizes;
        wrong == 0 && self.settled_pages > UNSETTLED_SHARE_MAX * self.unsettled_pages
    }
}

/// `pg_control` is written all the time, and what relcache files hold is nobody's data.
fn is_recorded(name: &[u8]) -> bool {
    name != b"pg_control" && !name.starts_with(b"pg_internal.init") && !name.starts_with(b"pgsql_tmp")
}

fn hash_file(path: &Path) -> io::Result<FileRecord> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    let (mut size, mut hashes) = (0, Vec::new());
    let mut page = Vec::with_capacity(PAGE_SIZE);
    loop {
        page.clear();
        (&mut file).take(PAGE_SIZE as u64).read_to_end(&mut page)?;
        if page.is_empty() {
            return Ok(FileRecord { size, hashes });
        }
        size += page.len() as u64;
        let mut hash = [0; HASH_LEN];
        hash.copy_from_slice(&blake3::hash(&page).as_bytes()[..HASH_LEN]);
        hashes.push(hash);
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> io::Result<[u8; N]> {
    let mut field = [0; N];
    bytes.read_exact(&mut field)?;
    Ok(field)
}
