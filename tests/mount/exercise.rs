//! Ordinary file operations on a directory, logged: a mount and a local directory must log the same.
//!
//! The directory holds `relation` (3 MiB and a bit), `small`, and `folder/` with `inside`. Each step leaves something for
//! the next, and the tree that remains is compared as well.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::{Whence, lseek};

pub const RELATION: u64 = 3 * 1024 * 1024 + 8192 + 77;

/// Does everything and returns what came of it, line by line.
pub fn exercise(place: &Path) -> Vec<String> {
    let mut log = Log { place: place.to_owned(), lines: Vec::new() };
    names(&mut log);
    attributes(&mut log);
    open_files(&mut log);
    lengths(&mut log);
    holes(&mut log);
    mapped(&mut log);
    readers(&mut log);
    synced(&mut log);
    log.lines
}

struct Log {
    place: PathBuf,
    lines: Vec<String>,
}

impl Log {
    fn at(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    fn outcome<T: std::fmt::Debug>(&mut self, what: &str, outcome: io::Result<T>) {
        let shown = match outcome {
            Ok(value) => format!("{value:?}"),
            Err(error) => format!("{:?}", error.raw_os_error()),
        };
        self.lines.push(format!("{what}: {shown}"));
    }

    fn content(&mut self, what: &str, bytes: &[u8]) {
        self.lines.push(format!("{what}: {} bytes, sum {}", bytes.len(), sum(bytes)));
    }

    fn listing(&mut self, name: &str) {
        let listed = fs::read_dir(self.at(name)).map(|entries| {
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        });
        self.outcome(&format!("list {name}"), listed);
    }
}

/// A sum that notices order and place.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(7, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

fn read_write() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options
}

fn names(log: &mut Log) {
    log.listing("");
    let exclusive = OpenOptions::new().write(true).create_new(true).open(log.at("small"));
    log.outcome("create what exists", exclusive.map(drop));
    let created = OpenOptions::new().write(true).create_new(true).mode(0o640).open(log.at("created"));
    log.outcome("create", created.and_then(|mut file| file.write_all(b"created\n")));
    log.outcome("mkdir", fs::create_dir(log.at("made")));
    log.outcome("mkdir what exists", fs::create_dir(log.at("folder")));
    log.outcome("rmdir what is not empty", fs::remove_dir(log.at("folder")));
    log.outcome("rmdir a file", fs::remove_dir(log.at("small")));
    log.outcome(
        "unlink a directory",
        fs::remove_file(log.at("made")).map_err(|_| io::Error::from_raw_os_error(1)),
    );
    log.outcome("rename a directory", fs::rename(log.at("folder"), log.at("made/folder")));
    log.outcome("read through the new path", fs::read(log.at("made/folder/inside")).map(|b| sum(&b)));
    log.outcome("rename below itself", fs::rename(log.at("made"), log.at("made/folder/made")));
    log.outcome("rename over a directory that is not empty", fs::rename(log.at("created"), log.at("made")));
    let keep = |from: &str, to: &str| {
        let (from, to) = (log.at(from), log.at(to));
        renameat2(AT_FDCWD, &from, AT_FDCWD, &to, RenameFlags::RENAME_NOREPLACE).map_err(io::Error::from)
    };
    let (refused, done) = (keep("created", "small"), keep("created", "kept"));
    log.outcome("rename without replacing", refused);
    log.outcome("rename to a free name without replacing", done);
    log.outcome("link", fs::hard_link(log.at("made/folder/inside"), log.at("linked")));
    log.outcome("link counts", fs::metadata(log.at("linked")).map(|m| m.nlink()));
    log.outcome("write through one name", fs::write(log.at("linked"), b"both"));
    log.outcome("read through the other", fs::read(log.at("made/folder/inside")));
    log.outcome("symlink", symlink("made/folder", log.at("pointer")));
    log.outcome("readlink", fs::read_link(log.at("pointer")));
    log.outcome("through the symlink", fs::read(log.at("pointer/inside")));
    log.outcome("nowhere", fs::read(log.at("nowhere")));
    log.outcome("below a file", fs::read(log.at("small/below")));
    for (name, kind) in [("fifo", SFlag::S_IFIFO), ("socket", SFlag::S_IFSOCK)] {
        log.outcome(
            name,
            mknod(&log.at(name), kind, Mode::from_bits_truncate(0o600), 0).map_err(io::Error::from),
        );
    }
    let is_fifo = fs::metadata(log.at("fifo")).map(|m| (m.file_type().is_fifo(), m.mode() & 0o7777));
    log.outcome("a fifo", is_fifo);
    log.listing("");
    log.listing("made/folder");
}

fn attributes(log: &mut Log) {
    let at = SystemTime::UNIX_EPOCH + Duration::new(1_600_000_000, 123_456_789);
    let small = log.at("small");
    log.outcome("chmod", fs::set_permissions(&small, PermissionsExt::from_mode(0o604)));
    log.outcome("chown", chown(&small, Some(1), Some(2)));
    log.outcome("utimens", File::open(&small).and_then(|file| file.set_modified(at)));
    let shown =
        fs::metadata(&small).map(|m| (m.mode(), m.uid(), m.gid(), m.mtime(), m.mtime_nsec(), m.len()));
    log.outcome("stat", shown);
    log.outcome("read after all that", fs::read(&small).map(|bytes| sum(&bytes)));
    log.outcome("chmod a directory", fs::set_permissions(log.at("made"), PermissionsExt::from_mode(0o710)));
    log.outcome("stat a directory", fs::metadata(log.at("made")).map(|m| m.mode()));
    let before = fs::metadata(&small).unwrap().modified().unwrap();
    fs::write(&small, b"changed").unwrap();
    log.outcome(
        "a write moves the time",
        fs::metadata(&small).and_then(|m| m.modified()).map(|t| t > before),
    );
}

fn open_files(log: &mut Log) {
    let path = log.at("appended");
    let appended = OpenOptions::new().append(true).create(true).open(&path).and_then(|mut one| {
        let mut other = OpenOptions::new().append(true).open(&path)?;
        for turn in 0..50 {
            writeln!(one, "one {turn}")?;
            writeln!(other, "other {turn}")?;
        }
        fs::read(&path)
    });
    log.content("appended", &appended.unwrap());
    let relation = log.at("relation");
    OpenOptions::new().append(true).open(&relation).unwrap().write_all(b"at the end").unwrap();
    log.outcome("append to a large file", fs::metadata(&relation).map(|m| m.len()));

    // Unlinked while it is open, it lives on; a new file of its name is another one.
    let doomed = log.at("doomed");
    fs::write(&doomed, vec![5; 10_000]).unwrap();
    let mut open = read_write().open(&doomed).unwrap();
    fs::remove_file(&doomed).unwrap();
    log.outcome("links of an unlinked file", open.metadata().map(|m| m.nlink()));
    open.write_all_at(b"still here", 9_995).unwrap();
    let mut content = Vec::new();
    open.read_to_end(&mut content).unwrap();
    log.content("an unlinked file", &content);
    log.outcome("truncate an unlinked file", open.set_len(3).and_then(|()| open.metadata()).map(|m| m.len()));
    fs::write(&doomed, b"another").unwrap();
    log.outcome("its name again", fs::read(&doomed));

    // Replaced while it is open: the old content stays with the handle.
    let (target, source) = (log.at("target"), log.at("source"));
    fs::write(&target, b"old").unwrap();
    fs::write(&source, b"new").unwrap();
    let old = File::open(&target).unwrap();
    fs::rename(&source, &target).unwrap();
    let mut buffer = [0; 3];
    old.read_exact_at(&mut buffer, 0).unwrap();
    log.content("replaced, by handle", &buffer);
    log.outcome("replaced, by name", fs::read(&target));
    log.outcome("replaced, the source", fs::metadata(&source).map(drop));
}

fn lengths(log: &mut Log) {
    let relation = read_write().open(log.at("relation")).unwrap();
    for length in [2_000_003, 2_500_000, 1_234_567, 1_300_000, 8192, 8192 * 3] {
        relation.set_len(length).unwrap();
        let mut tail = vec![0; 70_000];
        let read = relation.read_at(&mut tail, length.saturating_sub(60_000)).unwrap();
        log.content(&format!("cut to {length}"), &tail[..read]);
    }
    relation.write_all_at(&vec![3; 1_100_001], 4_567).unwrap();
    log.outcome("a large ragged write", fs::read(log.at("relation")).map(|bytes| (bytes.len(), sum(&bytes))));
    log.outcome(
        "open and cut",
        File::create(log.at("small")).and_then(|file| file.metadata()).map(|m| m.len()),
    );
    let room = File::create(log.at("room")).unwrap();
    log.outcome("fallocate", fallocate(&room, FallocateFlags::empty(), 0, 100_000).map_err(io::Error::from));
    let keep = fallocate(&room, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 300_000);
    log.outcome("fallocate beyond the end", keep.map_err(io::Error::from));
    log.outcome("size", room.metadata().map(|m| (m.len(), m.blocks() * 512 >= 300_000)));
}

fn holes(log: &mut Log) {
    let mut file = read_write().create(true).truncate(true).open(log.at("sparse")).unwrap();
    file.write_all_at(&[1; 4096], 1 << 20).unwrap();
    file.set_len(3 << 20).unwrap();
    for (name, offset, whence) in [
        ("data", 0, Whence::SeekData),
        ("hole", 0, Whence::SeekHole),
        ("hole", 1 << 20, Whence::SeekHole),
        ("data", 2 << 20, Whence::SeekData),
        ("hole", 2 << 20, Whence::SeekHole),
        ("data", 4 << 20, Whence::SeekData),
    ] {
        log.outcome(&format!("{name} from {offset}"), lseek(&file, offset, whence).map_err(io::Error::from));
    }
    log.outcome("end", file.seek(SeekFrom::End(-5)));
    log.outcome(
        "a sparse file's content",
        fs::read(log.at("sparse")).map(|bytes| (bytes.len(), sum(&bytes))),
    );
}

#[expect(unsafe_code, reason = "there is no safe way to map a file")]
fn mapped(log: &mut Log) {
    let file = File::open(log.at("mapped")).unwrap();
    let length = file.metadata().unwrap().len() as usize;
    // SAFETY: a private read-only mapping of an open file that nobody cuts meanwhile, unmapped before it closes.
    let total = unsafe {
        let address =
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        let total = sum(std::slice::from_raw_parts(address.cast::<u8>(), length));
        libc::munmap(address, length);
        total
    };
    log.outcome("mapped", Ok((length, total)));
}

fn readers(log: &mut Log) {
    let path = log.at("mapped");
    let threads: Vec<_> = (0..8u64)
        .map(|seed| {
            let path = path.clone();
            std::thread::spawn(move || {
                let file = File::open(path).unwrap();
                let size = file.metadata().unwrap().len();
                let mut total = 0u64;
                for turn in 0..60u64 {
                    let offset = (seed * 7919 + turn * 104_729 * 37) % size;
                    let mut buffer = vec![0; 8192 + (turn as usize % 5) * 10_000];
                    let read = file.read_at(&mut buffer, offset).unwrap();
                    total = total.wrapping_add(sum(&buffer[..read]));
                }
                total
            })
        })
        .collect();
    let sums: Vec<u64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    log.outcome("concurrent readers", Ok(sums));
}

fn synced(log: &mut Log) {
    let file = read_write().open(log.at("relation")).unwrap();
    log.outcome("fsync", file.sync_all());
    log.outcome("fdatasync", file.sync_data());
    log.outcome("fsync a file nobody changed", File::open(log.at("mapped")).and_then(|file| file.sync_all()));
    log.outcome("fsync a directory", File::open(log.at("made")).and_then(|directory| directory.sync_all()));
    log.outcome("fsync the top", File::open(&log.place).and_then(|directory| directory.sync_all()));
}
