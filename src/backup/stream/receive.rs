//! Takes a base backup apart as it comes: archives into entries and work, the manifest into its facts.
//!
//! No bytes wait here but those of one file of less than a job, and of small files that are gathered for one. What
//! Walden never keeps is passed over by the rules of the walk, and noted for the comparison with the manifest. What has
//! to be whole in the end is kept: `pg_control` and `backup_label`.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use crate::backup::data_directory::{LEFT_OUT, SourceFile, server_path};
use crate::backup::error::Error;
use crate::backup::plan::{Compartment, FILES_TOGETHER_MAX, SMALL_FILE_BYTES, compartment};
use crate::backup::source_file::FileState;
use crate::backup::stream::changes::Changes;
use crate::backup::stream::error::StreamError;
use crate::backup::stream::manifest::{ManifestFile, ManifestReader, ServerManifest};
use crate::backup::stream::partial::{HeaderReader, PREFIX, PartialFile, PartialHeader, whole_label};
use crate::backup::stream::start_set::StartSet;
use crate::backup::stream::tar_reader::{TarEntry, TarError, TarKind, TarPart, TarReader};
use crate::backup::stream::work::{Lane, LargeReceived, ReceivedFile, Work, state_of};
use crate::pg::{
    BackupRule, BackupRules, CONTROL_FILE_SIZE, Crc32c, Crc32cDigest, DataPath, InitForks, Oid, RelationFile,
};
use crate::replication::{BaseBackupPart, BaseBackupTablespace};
use crate::repo::{
    entry::{Entry, Node, TreePath},
    manifest::Tablespace,
    page_map::PAGE_SIZE,
};

/// What has to be known of the server before its archives come.
#[derive(Debug)]
pub struct ReceiveOptions {
    /// Where its data directory is, for messages.
    pub data_directory: PathBuf,
    /// Permission bits of the data directory, which no archive has.
    pub directory_mode: u32,
    /// The directory of this version in a tablespace, `PG_15_202209061`.
    pub version_directory: String,
    /// The tablespaces that have archives.
    pub tablespaces: Vec<BaseBackupTablespace>,
    /// Names of tablespaces by oid.
    pub tablespace_names: BTreeMap<Oid, String>,
    /// When the backup started, by the server's clock.
    pub started: Timestamp,
    /// Chooses what a start needs.
    pub start_set: StartSet,
    /// Bytes of a large file that are worked on at once; divides a block of a map.
    pub piece_bytes: u64,
    /// Where the server was asked for changes alone: what they are changes of.
    pub changes: Option<Changes>,
}

/// Takes parts and gives work.
#[derive(Debug)]
pub struct Receiver {
    options: ReceiveOptions,
    rules: BackupRules,
    top: Top,
    tar: TarReader,
    open: Option<OpenFile>,
    batches: [Batch; 2],
    ready: VecDeque<Work>,
    large_files: usize,
    manifest: ManifestReader,
    entries: Vec<Entry>,
    tablespaces: Vec<Tablespace>,
    control: Option<(FileState, Bytes)>,
    label: Option<(FileState, Bytes)>,
    left_out: Vec<Vec<u8>>,
    changed: Vec<ManifestFile>,
    put_together: HashSet<Vec<u8>>,
    warnings: Vec<String>,
}

/// What came beside the files.
#[derive(Debug)]
pub struct Received {
    /// Directories.
    pub entries: Vec<Entry>,
    /// Tablespaces other than the built-in ones.
    pub tablespaces: Vec<Tablespace>,
    /// `pg_control`.
    pub control: (FileState, Bytes),
    /// `backup_label`.
    pub label: (FileState, Bytes),
    /// Files that came and are not kept, under the server's names.
    pub left_out: Vec<Vec<u8>>,
    /// Files as they came that were put together into others, for the comparison with the manifest.
    pub changed: Vec<ManifestFile>,
    /// Those others, under the server's names: the manifest does not have them.
    pub put_together: HashSet<Vec<u8>>,
    /// What the server sent that is no part of a basebackup, for people.
    pub warnings: Vec<String>,
    /// What the server says it sent.
    pub manifest: ServerManifest,
}

/// Where the entries of an archive stand, here and for the server.
#[derive(Debug, Default)]
struct Top {
    tree: Vec<u8>,
    server: Vec<u8>,
    archive: String,
}

/// A file of which not all has come.
#[derive(Debug)]
enum OpenFile {
    Small { file: SourceFile, lane: Lane, raw: Vec<u8> },
    Large { file: Arc<LargeReceived>, offset: u64, raw: Vec<u8> },
    Partial(Box<OpenPartial>),
    Kept { what: Kept, state: FileState, raw: Vec<u8> },
    PassedOver,
}

/// A file of which only changes come.
#[derive(Debug)]
struct OpenPartial {
    file: SourceFile,
    /// What the server calls it now, and its size there.
    sent_as: (Vec<u8>, u64),
    crc: Crc32cDigest,
    come: Come,
}

/// How much has come of a file of which only changes come.
#[derive(Debug)]
enum Come {
    /// Not all of its header.
    Header(HeaderReader),
    /// A header that says that nothing has changed.
    Kept,
    /// A header, and some of its pages.
    Pages(PartialFile),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Control,
    Label,
    CloneMarker,
}

/// Small files that wait for neighbours.
#[derive(Debug, Default)]
struct Batch {
    compartment: Option<Compartment>,
    files: Vec<ReceivedFile>,
    bytes: u64,
}

/// Files that are kept in memory, and how large they may be. A label has 1 KiB of the user's at most.
const KEPT: [(&[u8], Kept, u64); 3] = [
    (b"data/global/pg_control", Kept::Control, CONTROL_FILE_SIZE as u64),
    (b"data/backup_label", Kept::Label, 64 << 10),
    (b"data/walden.clone", Kept::CloneMarker, 64 << 10),
];
/// Permission bits of directories that no archive has.
const MADE_MODE: u32 = 0o700;

impl Receiver {
    /// Prepares for the archives of a backup.
    pub fn new(options: ReceiveOptions) -> Self {
        Self {
            rules: BackupRules::new(&options.version_directory),
            options,
            top: Top::default(),
            tar: TarReader::default(),
            open: None,
            batches: [Batch::default(), Batch::default()],
            ready: VecDeque::new(),
            large_files: 0,
            manifest: ManifestReader::default(),
            entries: Vec::new(),
            tablespaces: Vec::new(),
            control: None,
            label: None,
            left_out: Vec::new(),
            changed: Vec::new(),
            put_together: HashSet::new(),
            warnings: Vec::new(),
        }
    }

    /// Returns the work that has gathered, in order.
    pub fn next_work(&mut self) -> Option<Work> {
        self.ready.pop_front()
    }

    /// Takes the next part.
    pub fn take(&mut self, part: BaseBackupPart) -> Result<(), Error> {
        match part {
            BaseBackupPart::Archive(tablespace) => {
                self.end_archive()?;
                self.begin_archive(tablespace)
            }
            BaseBackupPart::Content(mut bytes) => {
                while let Some(part) = self.tar.next(&mut bytes).map_err(|error| self.unreadable(error))? {
                    match part {
                        TarPart::Entry(entry) => self.entry(entry)?,
                        TarPart::Content(bytes) => self.content(&bytes)?,
                        TarPart::EndOfFile => self.end_file()?,
                    }
                }
                Ok(())
            }
            BaseBackupPart::Manifest => {
                self.end_archive()?;
                for lane in [Lane::StartSet, Lane::Rest] {
                    self.end_batch(lane);
                }
                Ok(())
            }
            BaseBackupPart::ManifestContent(bytes) => Ok(self.manifest.push(&bytes)?),
            BaseBackupPart::End(_) => Ok(()),
        }
    }

    /// Returns what came beside the files, once all has come.
    pub fn finish(mut self) -> Result<Received, Error> {
        let manifest = self.manifest.finish()?;
        // An in-place tablespace's directory is in its archive's place and in that of the data directory.
        self.entries.sort_by(|a, b| a.path.cmp(&b.path));
        self.entries.dedup_by(|a, b| a.path == b.path);
        self.tablespaces.sort_by_key(|tablespace| tablespace.oid);
        self.tablespaces.dedup_by_key(|tablespace| tablespace.oid);
        Ok(Received {
            entries: self.entries,
            tablespaces: self.tablespaces,
            control: self.control.ok_or(StreamError::Missing("global/pg_control"))?,
            label: self.label.ok_or(StreamError::Missing("backup_label"))?,
            left_out: self.left_out,
            changed: self.changed,
            put_together: self.put_together,
            warnings: self.warnings,
            manifest,
        })
    }

    fn unreadable(&self, source: TarError) -> StreamError {
        StreamError::Archive { archive: self.top.archive.clone(), source }
    }

    fn end_archive(&mut self) -> Result<(), Error> {
        self.tar.finish().map_err(|error| self.unreadable(error))?;
        self.tar = TarReader::default();
        Ok(())
    }

    fn begin_archive(&mut self, tablespace: Option<Oid>) -> Result<(), Error> {
        let Some(oid) = tablespace else {
            self.top =
                Top { tree: b"data".to_vec(), server: Vec::new(), archive: "the data directory".into() };
            self.push_directory(TreePath::new("data")?, self.options.directory_mode, self.options.started);
            return Ok(());
        };
        let announced = self.options.tablespaces.iter().find(|announced| announced.oid == oid);
        let location = announced.map(|announced| announced.location.clone()).unwrap_or_default();
        let in_place = !location.starts_with(b"/");
        let tree = if in_place { format!("data/pg_tblspc/{oid}") } else { format!("tablespaces/{oid}") };
        if !in_place {
            self.push_directory(TreePath::new("tablespaces")?, MADE_MODE, self.options.started);
            self.push_directory(TreePath::new(tree.clone())?, MADE_MODE, self.options.started);
        }
        self.push_tablespace(oid, if in_place { Vec::new() } else { location });
        let server = format!("pg_tblspc/{oid}/").into_bytes();
        self.top = Top { tree: tree.into_bytes(), server, archive: format!("tablespace {oid}") };
        Ok(())
    }

    fn push_tablespace(&mut self, oid: Oid, location: Vec<u8>) {
        let name = self.options.tablespace_names.get(&oid).cloned().unwrap_or_default();
        self.tablespaces.push(Tablespace { oid: oid.0, location, name });
    }

    fn push_directory(&mut self, path: TreePath, mode: u32, modified: Timestamp) {
        self.entries.push(Entry { path, mode, modified, node: Node::Directory });
    }

    fn entry(&mut self, entry: TarEntry) -> Result<(), Error> {
        let server = [&self.top.server[..], &entry.path].concat();
        let named = || StreamError::Name {
            archive: self.top.archive.clone(),
            path: entry.path.escape_ascii().to_string(),
        };
        let data_path = DataPath::new(server).map_err(|_| named())?;
        let path = TreePath::new([&self.top.tree[..], b"/", &entry.path].concat()).map_err(|_| named())?;
        let is_skipped = self.rules.rule(&data_path, &InitForks::none()) == BackupRule::Skip;
        let in_pg_tblspc = path.strip(b"data/pg_tblspc").and_then(Oid::from_name);
        match entry.kind {
            TarKind::Directory => {
                if let Some(oid) = in_pg_tblspc {
                    self.push_tablespace(oid, Vec::new());
                }
                if !is_skipped {
                    self.push_directory(path, entry.mode, entry.modified);
                }
                Ok(())
            }
            // Known by the list of archives; one that came to be meanwhile is replayed.
            TarKind::Symlink { .. } if in_pg_tblspc.is_some() => Ok(()),
            TarKind::Symlink { .. } => {
                self.warnings.push(format!("\"{path}\" came as a link and is left out"));
                Ok(())
            }
            TarKind::File { size } => {
                let TarEntry { mode, modified, .. } = entry;
                let file = SourceFile { path, root: 0, size, mode, modified, identity: None };
                self.open_file(file, &data_path, is_skipped)
            }
        }
    }

    fn open_file(&mut self, file: SourceFile, server: &DataPath, is_skipped: bool) -> Result<(), Error> {
        let path = file.path.as_bytes();
        if let Some((_, what, bytes_max)) = KEPT.into_iter().find(|(kept, ..)| *kept == path) {
            if file.size > bytes_max {
                return Err(StreamError::TooLarge { path: file.path.to_string(), bytes: file.size }.into());
            }
            self.open = Some(OpenFile::Kept { what, state: state_of(&file), raw: Vec::new() });
            return Ok(());
        }
        if is_skipped || LEFT_OUT.contains(&path) {
            self.left_out.push(server.as_bytes().to_vec());
            self.open = Some(OpenFile::PassedOver);
            return Ok(());
        }
        if let Some(whole) = self.whole_path(&file.path) {
            return self.open_partial(SourceFile { path: whole, ..file }, server);
        }
        let in_start_set = self.options.start_set.takes(&file.path, file.size, file.modified);
        let lane = if in_start_set { Lane::StartSet } else { Lane::Rest };
        self.open = Some(if file.size < SMALL_FILE_BYTES {
            let raw = Vec::with_capacity(file.size as usize);
            OpenFile::Small { file, lane, raw }
        } else {
            self.large_files += 1;
            let raw = Vec::with_capacity(self.options.piece_bytes.min(file.size) as usize);
            let file = Arc::new(LargeReceived::new(self.large_files, lane, file));
            OpenFile::Large { file, offset: 0, raw }
        });
        Ok(())
    }

    /// Opens a file of which only changes come.
    fn open_partial(&mut self, file: SourceFile, server: &DataPath) -> Result<(), Error> {
        let Some(changes) = &self.options.changes else {
            return Ok(());
        };
        let come = Come::Header(HeaderReader::new(file.size, changes.segment_pages));
        let sent_as = (server.as_bytes().to_vec(), file.size);
        let partial = OpenPartial { file, sent_as, crc: Crc32cDigest::new(), come };
        // Such a fork was not in the manifest that went up.
        if partial.file.relation().is_some_and(|relation| !relation.fork.is_logged()) {
            return Err(partial.objection("is of a fork that no summary of WAL speaks for").into());
        }
        self.open = Some(OpenFile::Partial(Box::new(partial)));
        Ok(())
    }

    /// Returns where the whole file stands where `path` is that of its changes.
    fn whole_path(&self, path: &TreePath) -> Option<TreePath> {
        self.options.changes.as_ref()?;
        let (folder, name) = path.split();
        let whole = TreePath::new([folder, b"/", name.strip_prefix(PREFIX)?].concat()).ok()?;
        let relation = RelationFile::classify(&DataPath::new(server_path(&whole)?).ok()?);
        relation.is_some().then_some(whole)
    }

    fn content(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        match &mut self.open {
            Some(OpenFile::Small { raw, .. } | OpenFile::Kept { raw, .. }) => raw.extend_from_slice(bytes),
            Some(OpenFile::Large { file, offset, raw }) => {
                let (piece, size) = (self.options.piece_bytes, file.file.size);
                while !bytes.is_empty() {
                    let wanted = piece.min(size - *offset) as usize;
                    let (now, later) = bytes.split_at((wanted - raw.len()).min(bytes.len()));
                    raw.extend_from_slice(now);
                    bytes = later;
                    if raw.len() < wanted {
                        continue;
                    }
                    let range = *offset..*offset + wanted as u64;
                    *offset = range.end;
                    let last = range.end == size;
                    let raw = std::mem::replace(raw, Vec::with_capacity(piece.min(size - *offset) as usize));
                    self.ready.push_back(Work::Pages { file: file.clone(), range, raw, last });
                }
            }
            Some(OpenFile::Partial(partial)) => {
                partial.crc.update(bytes);
                if let Come::Header(reader) = &mut partial.come
                    && let Some(header) = reader.take(&mut bytes).map_err(|it| partial.objection(it))?
                {
                    self.large_files += 1;
                    partial.begin(header, self.large_files, &mut self.options, &mut self.ready)?;
                }
                if let Come::Pages(pages) = &mut partial.come {
                    pages.take(bytes, self.options.piece_bytes, &mut self.ready);
                }
            }
            Some(OpenFile::PassedOver) | None => {}
        }
        Ok(())
    }

    fn end_file(&mut self) -> Result<(), Error> {
        match self.open.take() {
            Some(OpenFile::Small { file, lane, raw }) => self.gather(lane, ReceivedFile { file, raw }),
            Some(OpenFile::Kept { what: Kept::Control, state, raw }) => {
                self.control = Some((state, raw.into()));
            }
            Some(OpenFile::Kept { what: Kept::Label, state, raw }) => self.keep_label(state, raw)?,
            Some(OpenFile::Partial(partial)) => {
                if matches!(partial.come, Come::Header(_)) {
                    return Err(partial.objection("is cut within its header").into());
                }
                let OpenPartial { file, sent_as: (path, size), crc, come } = *partial;
                self.changed.push(ManifestFile { path, size, crc: Some(crc.finish().0) });
                self.put_together.extend(server_path(&file.path));
                if let Come::Pages(pages) = come {
                    pages.finish(&mut self.ready);
                }
            }
            Some(OpenFile::Kept { what: Kept::CloneMarker, raw, .. }) => {
                let text = String::from_utf8_lossy(&raw);
                let name = text.lines().find_map(|line| line.strip_prefix("name = ")).unwrap_or_default();
                let path = self.options.data_directory.clone();
                return Err(Error::Clone { path, clone: name.to_owned() });
            }
            Some(OpenFile::Large { .. } | OpenFile::PassedOver) | None => {}
        }
        Ok(())
    }

    /// Keeps the label; one of changes becomes that of a whole basebackup.
    fn keep_label(&mut self, mut state: FileState, raw: Vec<u8>) -> Result<(), Error> {
        let whole = if self.options.changes.is_some() { whole_label(&raw)? } else { raw.clone() };
        if whole != raw {
            let path = b"backup_label".to_vec();
            let (size, crc) = (raw.len() as u64, Some(Crc32c::of(&raw).0));
            self.changed.push(ManifestFile { path: path.clone(), size, crc });
            self.put_together.insert(path);
        }
        state.size = whole.len() as u64;
        self.label = Some((state, whole.into()));
        Ok(())
    }

    /// Puts a small file to its neighbours, as `plan` does: of one compartment, and no more than a chunk.
    fn gather(&mut self, lane: Lane, received: ReceivedFile) {
        let place = Some(compartment(received.file.path.as_bytes()));
        let batch = &self.batches[lane as usize];
        let is_full =
            batch.bytes + received.file.size > SMALL_FILE_BYTES || batch.files.len() == FILES_TOGETHER_MAX;
        if batch.compartment != place || is_full {
            self.end_batch(lane);
        }
        let batch = &mut self.batches[lane as usize];
        batch.compartment = place;
        batch.bytes += received.file.size;
        batch.files.push(received);
    }

    fn end_batch(&mut self, lane: Lane) {
        let Batch { files, .. } = std::mem::take(&mut self.batches[lane as usize]);
        if !files.is_empty() {
            self.ready.push_back(Work::Together { lane, files });
        }
    }
}

impl OpenPartial {
    fn objection(&self, detail: &'static str) -> StreamError {
        StreamError::Partial { path: self.file.path.to_string(), detail }
    }

    /// Begins the pages behind the header, or keeps the file where it is as it was.
    fn begin(
        &mut self,
        header: PartialHeader,
        number: usize,
        options: &mut ReceiveOptions,
        ready: &mut VecDeque<Work>,
    ) -> Result<(), StreamError> {
        let known = options.changes.as_ref().and_then(|changes| (changes.known)(&self.file.path));
        let cut_at = options.changes.as_ref().and_then(|changes| changes.cut_at(&self.file));
        let header = header.cut_at(cut_at.unwrap_or(u32::MAX));
        let size = u64::from(header.pages()) * PAGE_SIZE;
        let Some(known) = known.filter(|_| size > 0) else {
            return Err(StreamError::NotKnown { path: self.file.path.to_string() });
        };
        let file = SourceFile { size, ..self.file.clone() };
        let in_start_set = options.start_set.takes(&file.path, file.size, file.modified);
        let lane = if in_start_set { Lane::StartSet } else { Lane::Rest };
        let file = Arc::new(LargeReceived::new(number, lane, file));
        let is_kept = known.size == size && header.keeps_all(known.size / PAGE_SIZE);
        self.come = if is_kept {
            ready.push_back(Work::Keep(file));
            Come::Kept
        } else {
            Come::Pages(PartialFile::new(file, header))
        };
        Ok(())
    }
}

/// Returns the tablespaces of a server that neither have an archive nor are in that of the data directory.
pub fn tablespaces_left_out(
    known: impl IntoIterator<Item = (Oid, bool)>,
    archives: &[BaseBackupTablespace],
    with_map: bool,
) -> Option<Oid> {
    let announced: BTreeSet<Oid> = archives.iter().map(|archive| archive.oid).collect();
    // With a map the server leaves everything in pg_tblspc out, in-place tablespaces of 15 as well.
    let mut known = known.into_iter();
    known.find(|(oid, in_place)| !announced.contains(oid) && (!in_place || with_map)).map(|(oid, _)| oid)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use tar::{EntryType, Header};

    use super::super::work::{Done, WorkContext};
    use super::*;
    use crate::backup::changed_blocks::{ChangedBlocks, SummaryEntry};
    use crate::backup::state::{KnownContent, KnownFile};
    use crate::codec::Compression;
    use crate::pg::Fork;

    const PIECE: u64 = 512 << 10;

    fn header(path: &str, kind: EntryType, size: u64) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_mode(0o600);
        header.set_mtime(1_700_000_000);
        header.set_size(size);
        header.set_entry_type(kind);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn file(path: &str, content: &[u8]) -> Vec<u8> {
        let mut bytes = header(path, EntryType::Regular, content.len() as u64);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn directory(path: &str) -> Vec<u8> {
        header(&format!("{path}/"), EntryType::Directory, 0)
    }

    fn receiver() -> Receiver {
        let at =
            |oid: u32, location: &[u8]| BaseBackupTablespace { oid: Oid(oid), location: location.to_vec() };
        Receiver::new(ReceiveOptions {
            data_directory: "/server/data".into(),
            directory_mode: 0o750,
            version_directory: "PG_15_202209061".to_owned(),
            tablespaces: vec![at(16_400, b"/space"), at(16_401, b"pg_tblspc/16401")],
            tablespace_names: BTreeMap::from([(Oid(16_400), "fast".to_owned())]),
            started: "2023-11-15T00:00:00Z".parse().unwrap(),
            start_set: StartSet::new(&[], "2023-11-15T00:00:00Z".parse().unwrap()),
            piece_bytes: PIECE,
            changes: None,
        })
    }

    /// Feeds an archive in pieces.
    fn feed(receiver: &mut Receiver, oid: Option<u32>, archive: &[u8], piece: usize) -> Result<(), Error> {
        receiver.take(BaseBackupPart::Archive(oid.map(Oid)))?;
        for piece in archive.chunks(piece) {
            receiver.take(BaseBackupPart::Content(Bytes::copy_from_slice(piece)))?;
        }
        Ok(())
    }

    /// What the work is about: path, lane and bytes, each large file put together again.
    fn files_of(receiver: &mut Receiver) -> BTreeMap<String, (Lane, Vec<u8>)> {
        let mut found: BTreeMap<String, (Lane, Vec<u8>)> = BTreeMap::new();
        while let Some(work) = receiver.next_work() {
            match work {
                Work::Together { lane, files } => {
                    let total: usize = files.iter().map(|file| file.raw.len()).sum();
                    assert!(total as u64 <= SMALL_FILE_BYTES && files.len() <= FILES_TOGETHER_MAX);
                    let place = |file: &ReceivedFile| compartment(file.file.path.as_bytes());
                    assert!(files.iter().all(|file| place(file) == place(&files[0])));
                    for ReceivedFile { file, raw } in files {
                        assert!(found.insert(file.path.to_string(), (lane, raw)).is_none());
                    }
                }
                Work::Pages { file, range, raw, last } => {
                    let (lane, file) = (file.lane, &file.file);
                    let all = &mut found.entry(file.path.to_string()).or_insert((lane, Vec::new())).1;
                    assert_eq!((range.start, range.end - range.start), (all.len() as u64, raw.len() as u64));
                    assert!(last || raw.len() as u64 == PIECE);
                    all.extend(raw);
                    assert_eq!(last, all.len() as u64 == file.size);
                }
                other => panic!("{other:?}"),
            }
        }
        found
    }

    fn large(seed: u8, bytes: usize) -> Vec<u8> {
        (0..bytes).map(|n| (n / 1000) as u8 ^ seed).collect()
    }

    #[test]
    fn archives_become_trees_with_what_walden_keeps() {
        let mut receiver = receiver();
        let big = large(1, 3 * PIECE as usize + 8192);
        let space =
            [directory("PG_15_202209061"), directory("PG_15_202209061/5"), file("PG_15_202209061/5/1", b"x")];
        feed(&mut receiver, Some(16_400), &space.concat(), 100).unwrap();
        let space = [directory("PG_15_202209061"), file("PG_15_202209061/2", b"y")];
        feed(&mut receiver, Some(16_401), &space.concat(), 700).unwrap();
        let base = [
            file("backup_label", b"START WAL"),
            file("tablespace_map", b"16400 /space\n"),
            directory("./pg_wal"),
            directory("./pg_wal/archive_status"),
            file("base/5/16384", &big),
            file("base/5/16385", b""),
            file("standby.signal", b""),
            file("walden.plan.json", b"{}"),
            directory("pg_tblspc"),
            header("pg_tblspc/16400/", EntryType::Symlink, 0),
            header("elsewhere", EntryType::Symlink, 0),
            directory("pg_tblspc/16401"),
            file("global/1262", &[7; 8192]),
            file("global/pg_control", &[9; 8192]),
            vec![0; 1024],
        ];
        feed(&mut receiver, None, &base.concat(), 32_768).unwrap();
        receiver.take(BaseBackupPart::Manifest).unwrap();
        let files = files_of(&mut receiver);
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "data/base/5/16384",
                "data/base/5/16385",
                "data/global/1262",
                "data/pg_tblspc/16401/PG_15_202209061/2",
                "tablespaces/16400/PG_15_202209061/5/1",
            ]
        );
        assert!(files["data/base/5/16384"] == (Lane::Rest, big));
        assert_eq!(files["data/global/1262"].0, Lane::StartSet);
        let manifest =
            "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n],\n\"WAL-Ranges\": [\n],\n";
        let digest = hex::encode(crate::codec::Sha256::digest(manifest.as_bytes()).0);
        let manifest = format!("{manifest}\"Manifest-Checksum\": \"{digest}\"}}\n");
        receiver.take(BaseBackupPart::ManifestContent(manifest.into())).unwrap();
        let received = receiver.finish().unwrap();
        assert_eq!((&received.control.1[..], &received.label.1[..]), (&[9; 8192][..], &b"START WAL"[..]));
        assert_eq!(received.left_out, [&b"tablespace_map"[..], b"standby.signal", b"walden.plan.json"]);
        assert_eq!(received.warnings.len(), 1, "{:?}", received.warnings);
        let tablespaces: Vec<(u32, &[u8], &str)> =
            received.tablespaces.iter().map(|it| (it.oid, &it.location[..], it.name.as_str())).collect();
        assert_eq!(tablespaces, [(16_400, &b"/space"[..], "fast"), (16_401, &b""[..], "")]);
        let directories: Vec<String> = received.entries.iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(
            directories,
            [
                "data",
                "data/pg_tblspc",
                "data/pg_tblspc/16401",
                "data/pg_tblspc/16401/PG_15_202209061",
                "data/pg_wal",
                "data/pg_wal/archive_status",
                "tablespaces",
                "tablespaces/16400",
                "tablespaces/16400/PG_15_202209061",
                "tablespaces/16400/PG_15_202209061/5",
            ]
        );
        assert_eq!(received.entries[0].mode, 0o750);
    }

    #[test]
    fn what_leaves_the_tree_or_is_too_large_to_keep_is_refused() {
        for path in ["../x", "/etc/passwd", "base/../../x", "base//x", ""] {
            let error = feed(&mut receiver(), None, &file(path, b"x"), 512).unwrap_err();
            let refused = matches!(&error, Error::Received(StreamError::Name { .. }));
            assert!(refused || path.is_empty(), "{path}: {error}");
        }
        for path in ["global/pg_control", "backup_label", "walden.clone"] {
            let error =
                feed(&mut receiver(), None, &header(path, EntryType::Regular, 1 << 40), 512).unwrap_err();
            assert!(matches!(error, Error::Received(StreamError::TooLarge { .. })), "{error}");
        }
        let marker = file("walden.clone", b"# a clone\nname = scratch\n");
        let error = feed(&mut receiver(), None, &marker, 512).unwrap_err();
        assert!(
            matches!(&error, Error::Clone { path, clone } if clone == "scratch" && path == Path::new("/server/data"))
        );
        let mut cut = receiver();
        feed(&mut cut, Some(16_400), &file("x", &[1; 600])[..600], 512).unwrap();
        let error = cut.take(BaseBackupPart::Archive(None)).unwrap_err();
        assert!(matches!(&error, Error::Received(StreamError::Archive { .. })), "{error}");
        let error = receiver().finish().unwrap_err();
        assert!(matches!(&error, Error::Received(StreamError::Manifest { .. })), "{error}");
    }

    /// A relation's changes, as the server writes them.
    fn changes(sent: &[(u32, u8)], kept_below: u32) -> Vec<u8> {
        let mut bytes = 0xd3ae_1f0d_u32.to_le_bytes().to_vec();
        bytes.extend((sent.len() as u32).to_le_bytes());
        bytes.extend(kept_below.to_le_bytes());
        sent.iter().for_each(|(page, _)| bytes.extend(page.to_le_bytes()));
        if !sent.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(8192), 0);
        }
        sent.iter().for_each(|(_, fill)| bytes.extend([*fill; 8192]));
        bytes
    }

    fn known(pages: u64) -> Changes {
        let known = move |path: &TreePath| {
            let known = KnownFile {
                path: path.clone(),
                size: pages * 8192,
                inode: 0,
                device: 0,
                changed: Timestamp::UNIX_EPOCH,
                crc: None,
                damaged_pages: 0,
                content: KnownContent::Inline(Bytes::new()),
            };
            path.as_bytes().starts_with(b"data/base/5/1").then_some(known)
        };
        Changes { known: Box::new(known), summaries: Arc::default(), segment_pages: 131_072 }
    }

    #[test]
    fn changes_are_told_from_files_and_put_under_the_names_of_those() {
        let mut receiver = receiver();
        receiver.options.changes = Some(known(7));
        let label = b"START WAL LOCATION: 0/2000028\nINCREMENTAL FROM LSN: 0/1\n";
        let base = [
            file("backup_label", label),
            file("base/5/INCREMENTAL.16384", &changes(&[(2, 5), (9, 6)], 7)),
            file("base/5/INCREMENTAL.16385_init.1", &changes(&[], 7)),
            // Of a user, and not of a relation.
            file("INCREMENTAL.16384", b"mine"),
            file("base/5/INCREMENTAL.notes", b"mine"),
        ];
        feed(&mut receiver, None, &base.concat(), 5000).unwrap();
        receiver.take(BaseBackupPart::Manifest).unwrap();
        let (mut changed, mut kept, mut small) = (Vec::new(), Vec::new(), 0);
        while let Some(work) = receiver.next_work() {
            match work {
                Work::Changed { file, pages, sent, raw, kept_below, last } => {
                    assert_eq!((pages, raw.len(), kept_below, last), (0..10, 2 * 8192, 7, true));
                    changed.push((file.file.path.to_string(), file.file.size, sent));
                }
                Work::Keep(file) => kept.push((file.file.path.to_string(), file.file.size)),
                Work::Together { files, .. } => small += files.len(),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(changed, [("data/base/5/16384".to_owned(), 10 * 8192, vec![2, 9])]);
        assert_eq!((kept, small), (vec![("data/base/5/16385_init.1".to_owned(), 7 * 8192)], 2));
        let names: Vec<&[u8]> = receiver.changed.iter().map(|file| &file.path[..]).collect();
        let sent: [&[u8]; 3] =
            [b"backup_label", b"base/5/INCREMENTAL.16384", b"base/5/INCREMENTAL.16385_init.1"];
        assert_eq!(names, sent);
        let sent = changes(&[(2, 5), (9, 6)], 7);
        assert_eq!(
            (receiver.changed[1].size, receiver.changed[1].crc),
            (sent.len() as u64, Some(Crc32c::of(&sent).0))
        );
        assert!(receiver.put_together.contains(&b"base/5/16384"[..]));
        assert_eq!(&receiver.label.as_ref().unwrap().1[..], b"START WAL LOCATION: 0/2000028\n");
    }

    #[test]
    fn changes_of_what_is_not_known_are_refused() {
        for (path, content, expected) in [
            ("base/7/INCREMENTAL.16384", changes(&[(2, 5)], 7), "is not known"),
            ("base/5/INCREMENTAL.16384", changes(&[], 0), "is not known"),
            ("base/5/INCREMENTAL.16384", vec![1; 8192], "does not begin as one"),
            // One that says nothing is none that has not changed.
            ("base/5/INCREMENTAL.16384", Vec::new(), "is cut"),
            ("base/5/INCREMENTAL.16384", changes(&[], 7)[..11].to_vec(), "is cut"),
            // Whose changes no summary names, whatever the server believes of them (decision 2102).
            ("base/5/INCREMENTAL.16384_vm", changes(&[], 7), "is of a fork"),
            ("base/5/INCREMENTAL.16384_fsm", changes(&[(2, 5)], 7), "is of a fork"),
        ] {
            let mut receiver = receiver();
            receiver.options.changes = Some(known(7));
            let error = feed(&mut receiver, None, &file(path, &content), 700).unwrap_err();
            assert!(error.to_string().contains(expected), "{path}: {error}");
            let Error::Received(error) = error else { panic!("{error}") };
            assert!(error.is_of_changes(), "{path}: with everything it may go well: {error}");
        }
    }

    /// The server says the length of a file, and not that it was shorter in between.
    #[test]
    fn a_file_that_was_cut_is_not_kept_behind_the_cut() {
        let mut summaries = ChangedBlocks::default();
        let cut = |relfilenode: u32, block: u32| SummaryEntry {
            tablespace: Oid::DEFAULT_TABLESPACE,
            database: Oid(5),
            relfilenode: Oid(relfilenode),
            fork: Fork::Main,
            block,
            is_limit: true,
        };
        summaries.insert(&cut(16_384, 5)).unwrap();
        summaries.insert(&cut(16_385, 131_072 + 4)).unwrap();
        let mut receiver = receiver();
        receiver.options.changes = Some(Changes { summaries: Arc::new(summaries), ..known(7) });
        let names = ["16384", "16385.1", "16385", "16386"];
        let files = names.map(|name| file(&format!("base/5/INCREMENTAL.{name}"), &changes(&[], 7)));
        feed(&mut receiver, None, &files.concat(), 5000).unwrap();
        let found: Vec<Option<(u32, u32)>> = std::iter::from_fn(|| receiver.next_work())
            .map(|work| match work {
                Work::Changed { pages, kept_below, .. } => Some((pages.end, kept_below)),
                Work::Keep(_) => None,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(found, [Some((7, 5)), Some((7, 4)), None, None]);
    }

    #[test]
    fn failure_13_a_tablespace_without_an_archive_is_missed() {
        let archives = [BaseBackupTablespace { oid: Oid(1), location: b"/a".to_vec() }];
        let left = |known: &[(u32, bool)], map| {
            tablespaces_left_out(known.iter().map(|(oid, in_place)| (Oid(*oid), *in_place)), &archives, map)
        };
        assert_eq!(left(&[(1, false)], true), None);
        assert_eq!(left(&[(1, false), (2, false)], false), Some(Oid(2)));
        assert_eq!(left(&[(1, false), (3, true)], false), None);
        assert_eq!(left(&[(3, true)], true), Some(Oid(3)));
    }

    proptest! {
        #[test]
        fn every_byte_comes_out_once_however_the_archive_was_cut(
            sizes in proptest::collection::vec(
                prop_oneof![0usize..100, 0usize..70_000, 500_000usize..600_000], 1..12),
            piece in 1usize..100_000,
        ) {
            let folders = ["base/5", "global", "base/16384", "pg_xact", "conf.d"];
            let contents: BTreeMap<String, Vec<u8>> = sizes.iter().enumerate()
                .map(|(n, size)| (format!("{}/{}", folders[n % 7 % 5], 16_000 + n), large(n as u8, *size)))
                .collect();
            let archive: Vec<u8> = contents.iter().flat_map(|(path, content)| file(path, content)).collect();
            let mut receiver = receiver();
            feed(&mut receiver, None, &archive, piece.max(archive.len() / 2000 + 1)).unwrap();
            receiver.take(BaseBackupPart::Manifest).unwrap();
            let found = files_of(&mut receiver);
            prop_assert_eq!(found.len(), contents.len());
            for (path, content) in contents {
                prop_assert!(found[&format!("data/{path}")].1 == content, "{}", path);
            }
        }
    }

    #[test]
    fn small_files_are_packed_with_their_checksums() {
        let context = WorkContext {
            compression: Compression::NONE,
            page_judge: None,
            hash_key: None,
            parent: None,
            start_set_again: false,
        };
        let received = |path: &str, raw: &[u8]| {
            let path = TreePath::new(path).unwrap();
            let (size, modified) = (raw.len() as u64, Timestamp::UNIX_EPOCH);
            ReceivedFile {
                file: SourceFile { path, root: 0, size, mode: 0o600, modified, identity: None },
                raw: raw.to_vec(),
            }
        };
        let files =
            vec![received("data/a", b"tiny"), received("data/b", &[1; 100]), received("data/c", &[2; 200])];
        let Done::Together { files, together, .. } =
            Work::Together { lane: Lane::Rest, files }.execute(&context).unwrap()
        else {
            panic!("other work")
        };
        assert_eq!((files.len(), together.files.len(), together.frames.len()), (3, 3, 1));
        assert_eq!(together.files[2].crc, Crc32c::of(&[2; 200]));
        assert_eq!(together.frames[0].body.len(), 300);
        let torn = vec![received("data/base/5/pg_filenode.map", &[1; 512])];
        let error = Work::Together { lane: Lane::Rest, files: torn }.execute(&context).unwrap_err();
        assert!(matches!(&error, Error::Received(StreamError::Torn { .. })), "{error}");
    }
}
