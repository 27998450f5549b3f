//! What a basebackup remembers for the next one, while it is packed: page hashes as they come, files at the end.
//!
//! A state that cannot be written (a full disk, above all) costs only what the next basebackup could have spared, so
//! it never fails this one: it is given up, once, with a warning. The old state then stays, and stays valid for its
//! own basebackup. Of a full one a journal says what the store has already, for the case that it is killed.
//! Deliberately absent: what stands in the file (`state`), and when it counts (`run`).

use jiff::Timestamp;

use crate::backup::data_directory::FileIdentity;
use crate::backup::known_parent::KnownParent;
use crate::backup::state::{
    Journal, KnownBlock, KnownContent, KnownFile, PageHash, RecordAt, StateError, StateWriter,
};
use crate::pg::Crc32c;
use crate::repo::{
    PackRecord,
    entry::{Content, Entry, Node},
};

/// Collects what is remembered.
#[derive(Debug, Default)]
pub struct Remembering {
    writer: Option<StateWriter>,
    journal: Option<Journal>,
    /// One for each entry that was packed; none for those that no next basebackup will compare with.
    files: Vec<Option<RememberedFile>>,
}

/// What is remembered of a file beside its entry.
#[derive(Debug, Clone, Default)]
pub struct RememberedFile {
    /// What it was when it was read.
    pub identity: Option<FileIdentity>,
    /// Pages of it whose checksum was wrong.
    pub damaged_pages: u32,
    /// The hash of a file that takes no page.
    pub hash: Option<PageHash>,
    /// Where the hashes of its pages stand.
    pub records: Vec<RecordAt>,
}

impl Remembering {
    /// Starts to remember.
    pub fn new(writer: StateWriter) -> Self {
        Self { writer: Some(writer), ..Self::default() }
    }

    /// Notes in `journal` from now on what is done.
    pub fn journal(&mut self, journal: Journal) {
        self.journal = Some(journal);
    }

    /// Returns whether anything is remembered.
    pub fn is_on(&self) -> bool {
        self.writer.is_some()
    }

    /// Remembers pages; returns where they stand.
    pub fn push_block(&mut self, block: &KnownBlock) -> Option<RecordAt> {
        let pushed = self.writer.as_mut()?.push_block(block);
        pushed.map_err(|error| self.give_up(&error)).ok()
    }

    /// Remembers pages as the parent knows them; none where the parent's state cannot tell.
    pub fn copy_block(&mut self, parent: &KnownParent, file: &KnownFile, n: u64) -> Option<Option<RecordAt>> {
        let Some(writer) = &mut self.writer else {
            return Some(None);
        };
        match parent.copy_block(writer, file, n) {
            Ok(record) => Some(Some(record)),
            Err(StateError::Damaged { .. }) => None,
            Err(error) => {
                self.give_up(&error);
                Some(None)
            }
        }
    }

    /// Remembers a file, the next entry that is packed.
    pub fn push_file(&mut self, entry: &Entry, crc: Option<Crc32c>, file: Option<RememberedFile>) {
        if !self.is_on() {
            return;
        }
        if let (Some(journal), Some(file)) = (&mut self.journal, &file) {
            let noted =
                known_file(entry, crc, file.clone()).map_or(Ok(()), |known| journal.push_file(&known));
            self.drop_journal_if(noted);
        }
        self.files.push(file);
    }

    /// Notes a pack that the store has.
    ///
    /// Syncs two files, once for each 32 MiB that went up.
    pub fn push_pack(&mut self, pack: &PackRecord) {
        if let (Some(writer), Some(journal)) = (&mut self.writer, &mut self.journal) {
            let noted = writer.keep().and_then(|len| journal.push_pack(pack, len));
            self.drop_journal_if(noted);
        }
    }

    fn drop_journal_if(&mut self, noted: Result<(), StateError>) {
        if let Err(error) = noted {
            tracing::warn!("if this basebackup is killed, the next one begins anew: {error}");
            self.journal = None;
        }
    }

    /// Writes down the files: `entries` in the order in which they were packed, with their contents filled in.
    pub fn finish(mut self, entries: &[Entry], checksums: &[Option<Crc32c>]) -> Option<StateWriter> {
        let files = std::mem::take(&mut self.files);
        for ((entry, crc), file) in entries.iter().zip(checksums).zip(files) {
            let Some(known) = file.and_then(|file| known_file(entry, *crc, file)) else {
                continue;
            };
            if let Err(error) = self.writer.as_mut()?.push_file(&known) {
                self.give_up(&error);
            }
        }
        self.writer
    }

    fn give_up(&mut self, error: &StateError) {
        tracing::warn!(
            "nothing of this basebackup is remembered, and the next one stores more than it would: {error}"
        );
        (self.writer, self.journal, self.files) = (None, None, Vec::new());
    }
}

fn known_file(entry: &Entry, crc: Option<Crc32c>, file: RememberedFile) -> Option<KnownFile> {
    let Node::File { size, content } = &entry.node else {
        return None;
    };
    let content = match content {
        Content::Inline(bytes) => KnownContent::Inline(bytes.clone()),
        Content::Part(blob) => KnownContent::Part { blob: *blob, hash: file.hash? },
        stands => KnownContent::Pages { stands: stands.clone(), records: file.records },
    };
    // Inode 0 is nobody's: such a file is read each time.
    let nowhere = FileIdentity { device: 0, inode: 0, changed: Timestamp::UNIX_EPOCH };
    let FileIdentity { device, inode, changed } = file.identity.unwrap_or(nowhere);
    let (path, damaged_pages) = (entry.path.clone(), file.damaged_pages);
    Some(KnownFile { path, size: *size, inode, device, changed, crc, damaged_pages, content })
}
