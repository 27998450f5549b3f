//! States written, read, damaged and left at every step of a finish.

use std::collections::BTreeMap;
use std::fs;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::journal::{decode_pack, encode_pack};
use super::writer::FinishStep;
use super::*;
use crate::codec::{CodecId, SeededRandom};
use crate::pg::{SystemIdentifier, WalSegmentSize};
use crate::repo::{PackRecord, chunk::ChunkRef};

fn id(seconds: u64) -> BasebackupId {
    BasebackupId::from_parts(1_790_000_000 + seconds, 0x3fa9).unwrap()
}

fn facts(basebackup: BasebackupId) -> StateFacts {
    StateFacts {
        site: Uuid::from_bytes([7; 16]),
        basebackup,
        backup_json: Digest::of(b"backup.json"),
        cluster: ClusterId {
            system_identifier: SystemIdentifier(7_301_234_567_890_123_456),
            segment_size: WalSegmentSize::DEFAULT,
        },
        timeline: TimelineId::new(3).unwrap(),
        start_lsn: Lsn(0x16_B374_D848),
        stop_lsn: Lsn(0x16_B374_E000),
        started_at: "2026-11-20T10:15:00.123456789Z".parse().unwrap(),
        has_checksums: true,
        sealing: Digest::of(b"recipients"),
        chunk_pages: 8,
        hash_key: HashKey::generate(&SeededRandom::new(1)),
        since_read_all: 6,
    }
}

fn chunk(n: u32) -> ChunkRef {
    ChunkRef {
        pack: PackId { origin: id(u64::from(n % 3)), number: n % 5 },
        position: n,
        offset: n * 100,
        stored_len: 100,
        raw_len: 65_536,
        codec: CodecId::Zstd,
        tag: n.is_multiple_of(2).then_some([n as u8; 16]),
    }
}

fn blob(n: u32, len: u32) -> BlobRef {
    BlobRef { chunk: chunk(n), at: n, len }
}

/// A block of `pages` pages of which those of every third run are zero.
fn block(pages: u32, seed: u32) -> KnownBlock {
    let mut map = MapBlock::default();
    while map.page_count() < pages {
        let n = map.page_count();
        let count = (1 + (n ^ seed) % 8).min(pages - n);
        if (n + seed).is_multiple_of(3) { map.push_zero(count) } else { map.push(chunk(n + seed), 0, count) }
    }
    let hash = |page: u32| PageHash((u64::from(page) << 32 | u64::from(seed)).to_le_bytes());
    KnownBlock { map, hashes: (0..pages).map(hash).collect() }
}

/// What a test says of a file: the rest follows.
#[derive(Debug, Clone)]
enum Model {
    Inline(Vec<u8>),
    Part(u32),
    /// Bytes, and whether the map stands in the file table.
    Pages(u64, u32),
}

type Models = BTreeMap<Vec<Vec<u8>>, Model>;

fn model() -> impl Strategy<Value = Model> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..60).prop_map(Model::Inline),
        (1u32..60_000).prop_map(Model::Part),
        (1u64..100 * PAGE_SIZE, any::<u32>()).prop_map(|(size, seed)| Model::Pages(size, seed % 1000)),
        (1u64..3, 0..PAGE_SIZE, any::<u32>()).prop_map(|(blocks, rest, seed)| {
            Model::Pages(blocks * MAP_BLOCK_PAGES * PAGE_SIZE + rest, seed % 1000)
        }),
    ]
}

fn models() -> impl Strategy<Value = Models> {
    let name = prop::collection::vec(prop_oneof![Just(b'a'), Just(b'0'), Just(b'\n'), Just(0xff)], 1..4);
    prop::collection::btree_map(prop::collection::vec(name, 1..4), model(), 0..25)
}

fn tree_path(parts: &[Vec<u8>]) -> TreePath {
    TreePath::new(parts.join(&b'/')).unwrap()
}

/// Writes the blocks of a file and says what is known of it.
fn known(path: TreePath, model: &Model, writer: &mut StateWriter) -> KnownFile {
    let (size, content) = match model {
        Model::Inline(bytes) => (bytes.len() as u64, KnownContent::Inline(bytes.clone().into())),
        Model::Part(len) => {
            (u64::from(*len), KnownContent::Part { blob: blob(9, *len), hash: PageHash([9; 8]) })
        }
        Model::Pages(size, seed) => {
            let blocks = blocks_of(*size, *seed);
            let records = blocks.iter().map(|block| writer.push_block(block).unwrap()).collect();
            let stands = match &blocks[..] {
                [one] if one.map.page_count() <= 16 => Content::Map(Box::new(one.map.clone())),
                _ => Content::Blocks((0..blocks.len() as u32).map(|n| blob(n, 77)).collect()),
            };
            (*size, KnownContent::Pages { stands, records })
        }
    };
    let path_bytes = path.as_bytes().len() as u64;
    KnownFile {
        path,
        size,
        inode: size ^ path_bytes,
        device: path_bytes,
        changed: Timestamp::new(1_790_000_000 - size as i64 % 7, 0).unwrap(),
        crc: (size % 3 != 0).then_some(Crc32c(size as u32)),
        damaged_pages: (size % 3) as u32,
        content,
    }
}

fn blocks_of(size: u64, seed: u32) -> Vec<KnownBlock> {
    let pages = size.div_ceil(PAGE_SIZE);
    let count = pages.div_ceil(MAP_BLOCK_PAGES);
    (0..count).map(|n| block((pages - n * MAP_BLOCK_PAGES).min(MAP_BLOCK_PAGES) as u32, seed)).collect()
}

/// Writes a state of these files, last first; returns them in order.
fn write(folder: &StateFolder, basebackup: BasebackupId, models: &Models) -> Vec<KnownFile> {
    let held = folder.take_lock().unwrap();
    let mut writer = folder.begin(&held, basebackup).unwrap();
    let mut files = push_all(&mut writer, models);
    writer.finish(&facts(basebackup)).unwrap();
    files.sort_by(|a, b| a.path.split().cmp(&b.path.split()));
    files
}

fn push_all(writer: &mut StateWriter, models: &Models) -> Vec<KnownFile> {
    let mut files = Vec::new();
    for (parts, model) in models.iter().rev() {
        let file = known(tree_path(parts), model, writer);
        writer.push_file(&file).unwrap();
        files.push(file);
    }
    files
}

/// Reads everything there is, in each of the ways there are.
fn read_all(folder: &StateFolder) -> Result<Vec<(KnownFile, Vec<KnownBlock>)>, StateError> {
    let state = folder.open()?.expect("there is a state");
    let mut all = Vec::new();
    for file in state.files() {
        let file = file?;
        let blocks: Vec<KnownBlock> =
            (0..file.block_count()).map(|n| state.block(&file, n)).collect::<Result<_, _>>()?;
        for (n, block) in (0..).zip(&blocks) {
            assert_eq!(state.map(&file, n)?, block.map);
        }
        assert_eq!(state.find(&file.path)?.as_ref(), Some(&file));
        all.push((file, blocks));
    }
    assert_eq!(all.len() as u64, state.file_count());
    Ok(all)
}

fn few() -> Models {
    let path = |text: &str| text.split('/').map(|part| part.as_bytes().to_vec()).collect();
    BTreeMap::from([
        (path("data/PG_VERSION"), Model::Inline(b"15\n".to_vec())),
        (path("data/base/5/112"), Model::Part(16_384)),
        (path("data/base/5/16384"), Model::Pages(40 * PAGE_SIZE - 100, 3)),
        (path("data/base/5/16385"), Model::Pages(3 * PAGE_SIZE, 4)),
    ])
}

fn scratch() -> (tempfile::TempDir, StateFolder) {
    let scratch = tempfile::tempdir().unwrap();
    let folder = StateFolder::new(scratch.path().join("basebackups/site"));
    (scratch, folder)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

/// The folder's own path, which only its files tell.
fn folder_path(folder: &StateFolder) -> PathBuf {
    folder.finished(id(0)).parent().unwrap().to_owned()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn a_state_comes_back_as_it_was_written(models in models(), bytes_max in 0usize..3000) {
        let (_scratch, folder) = scratch();
        let held = folder.take_lock().unwrap();
        let mut writer = folder.begin(&held, id(1)).unwrap().gathering_at_most(bytes_max);
        let mut files = push_all(&mut writer, &models);
        prop_assert!(writer.held_bytes() <= bytes_max);
        writer.finish(&facts(id(1))).unwrap();
        files.sort_by(|a, b| a.path.split().cmp(&b.path.split()));

        let state = folder.open().unwrap().unwrap();
        prop_assert_eq!(state.facts(), &facts(id(1)));
        let read = read_all(&folder).unwrap();
        prop_assert_eq!(read.len(), files.len());
        for ((found, blocks), file) in read.iter().zip(&files) {
            prop_assert_eq!(found, file);
            let model = models.iter().find(|(parts, _)| tree_path(parts) == file.path).unwrap().1;
            if let Model::Pages(size, seed) = model {
                prop_assert_eq!(blocks, &blocks_of(*size, *seed));
            }
        }
    }

    #[test]
    fn a_flipped_byte_is_always_found(at: prop::sample::Index, flip in 1u8.., cut: bool) {
        let (_scratch, folder) = scratch();
        let written = write(&folder, id(1), &few());
        let path = folder.finished(id(1));
        let whole = fs::read(&path).unwrap();
        let at = at.index(whole.len());
        let mut bytes = whole.clone();
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        fs::write(&path, &bytes).unwrap();
        let error = read_all(&folder).expect_err("damage is found");
        // A version of the future looks like one.
        let other_release = !cut && (8..16).contains(&at) && error.kind() == StateErrorKind::Unsupported;
        prop_assert!(other_release || error.kind() == StateErrorKind::Damaged, "{}", error);
        fs::write(&path, &whole).unwrap();
        prop_assert_eq!(read_all(&folder).unwrap().len(), written.len());
    }

    #[test]
    fn arbitrary_bytes_are_no_state(mut bytes in prop::collection::vec(any::<u8>(), 0..400), magic: bool) {
        if magic && bytes.len() > 16 {
            bytes[..8].copy_from_slice(b"WALDSTAT");
            bytes[8..16].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        }
        let (_scratch, folder) = scratch();
        drop(folder.take_lock().unwrap());
        fs::write(folder.finished(id(1)), bytes).unwrap();
        let kind = folder.open().expect_err("no state").kind();
        prop_assert!([StateErrorKind::Damaged, StateErrorKind::Unsupported].contains(&kind));
    }

    /// What the checksums keep from them: whoever can write in the folder can forge those.
    #[test]
    fn decoders_never_panic(bytes: Vec<u8>, models in models(), at: prop::sample::Index, flip in 1u8..) {
        let _ = format::decode_hashes(&bytes);
        let _ = format::decode_file(&bytes);
        let _ = format::decode_facts(&bytes);
        let _ = format::decode_directory(&bytes);
        let _ = format::Footer::decode(&bytes);
        let _ = decode_pack(&bytes);
        let _ = MapBlock::decode(&bytes);
        let mut noted = encode_pack(&pack(3), 7);
        prop_assert_eq!(decode_pack(&noted).unwrap(), (pack(3), 7));
        let byte = at.index(noted.len());
        noted[byte] ^= flip;
        let _ = decode_pack(&noted);
        let mut map = block(300, 5).map.encode();
        let byte = at.index(map.len());
        map[byte] ^= flip;
        let _ = MapBlock::decode(&map);
        let (_scratch, folder) = scratch();
        for file in write(&folder, id(1), &models) {
            let mut record = format::encode_file(&file);
            let at = at.index(record.len());
            record[at] ^= flip;
            let _ = format::decode_file(&record);
        }
        let mut facts = format::encode_facts(&facts(id(1)));
        let at = at.index(facts.len());
        facts[at] ^= flip;
        let _ = format::decode_facts(&facts);
    }
}

#[test]
fn every_byte_flipped_in_turn_is_found() {
    let (_scratch, folder) = scratch();
    write(&folder, id(1), &few());
    let path = folder.finished(id(1));
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        assert!(read_all(&folder).is_err(), "byte {at} of {}", whole.len());
    }
}

#[test]
fn an_intact_part_of_another_place_or_another_state_is_damage() {
    let (_scratch, folder) = scratch();
    let files = write(&folder, id(1), &few());
    let path = folder.finished(id(1));
    let whole = fs::read(&path).unwrap();
    let at = |name: &[u8]| {
        let file = files.iter().find(|file| file.path.split().1 == name).unwrap();
        let KnownContent::Pages { records, .. } = &file.content else { panic!("{name:?} has pages") };
        records[0].offset as usize..records[0].offset as usize + records[0].len as usize
    };
    let (small, large) = (at(b"16385"), at(b"16384"));
    // A write that went astray: the small block where the large one begins, and where it is itself it stays.
    let mut moved = whole.clone();
    let bytes = whole[small.clone()].to_vec();
    moved[large.start..large.start + bytes.len()].copy_from_slice(&bytes);
    fs::write(&path, &moved).unwrap();
    assert!(read_all(&folder).unwrap_err().to_string().contains("list of page hashes"));
    // A write that never came: the same place of the state before.
    let (_other_scratch, other) = scratch();
    write(&other, id(2), &few());
    let theirs = fs::read(other.finished(id(2))).unwrap();
    assert_eq!(theirs.len(), whole.len());
    let mut stale = whole.clone();
    stale[small.clone()].copy_from_slice(&theirs[small]);
    fs::write(&path, &stale).unwrap();
    assert_eq!(read_all(&folder).unwrap_err().kind(), StateErrorKind::Damaged);
    // A state under the name of another.
    fs::write(&path, &theirs).unwrap();
    assert!(folder.open().unwrap_err().to_string().contains("another basebackup"));
}

#[test]
fn damage_costs_what_it_describes_and_nothing_else() {
    let (_scratch, folder) = scratch();
    let files = write(&folder, id(1), &few());
    let KnownContent::Pages { records, .. } = &files[2].content else { panic!("16384 has pages") };
    let mut bytes = fs::read(folder.finished(id(1))).unwrap();
    bytes[records[0].offset as usize + 5] ^= 1;
    fs::write(folder.finished(id(1)), bytes).unwrap();
    let state = folder.open().unwrap().unwrap();
    assert_eq!(state.files().filter_map(Result::ok).count(), files.len());
    let blocks: Vec<bool> =
        files.iter().filter(|it| it.block_count() > 0).map(|it| state.block(it, 0).is_ok()).collect();
    assert_eq!(blocks.iter().filter(|ok| **ok).count(), 1, "{blocks:?}");
}

#[test]
fn a_block_that_no_file_has_is_not_read() {
    let (_scratch, folder) = scratch();
    let files = write(&folder, id(1), &few());
    let state = folder.open().unwrap().unwrap();
    for file in &files {
        assert!(state.block(file, file.block_count()).is_err());
    }
    // A file that has changed its size in the hands of the caller.
    let mut file = files.into_iter().find(|file| file.path.split().1 == b"16385").unwrap();
    file.size -= PAGE_SIZE;
    assert_eq!(state.block(&file, 0).unwrap_err().kind(), StateErrorKind::Damaged);
    assert_eq!(state.map(&file, 0).unwrap_err().kind(), StateErrorKind::Damaged);
}

#[test]
fn a_kill_at_any_step_of_a_finish_leaves_the_old_state_or_the_new_one() {
    let (scratch, folder) = scratch();
    write(&folder, id(1), &few());
    let held = folder.take_lock().unwrap();
    let mut writer = folder.begin(&held, id(2)).unwrap();
    let more: Models = BTreeMap::from([(vec![b"data".to_vec(), b"x".to_vec()], Model::Part(5))]);
    let path = folder_path(&folder);
    let mut left = Vec::new();
    let mut leave = |at: String| {
        let to = scratch.path().join(format!("left at {at}"));
        copy_folder(&path, &to);
        left.push((at, StateFolder::new(to)));
    };
    leave("begin".to_owned());
    push_all(&mut writer, &more);
    leave("files".to_owned());
    writer.finish_by_steps(&facts(id(2)), &mut |step| leave(format!("{step:?}"))).unwrap();
    let steps = [FinishStep::Written, FinishStep::Synced, FinishStep::Named, FinishStep::Tidied];
    assert_eq!(left.len(), 2 + steps.len());
    for (at, folder) in left {
        let new = at == "Named" || at == "Tidied";
        let read = read_all(&folder).unwrap();
        assert_eq!(read.len(), if new { 1 } else { few().len() }, "left at {at}");
        assert_eq!(
            folder.open().unwrap().unwrap().facts(),
            &facts(id(if new { 2 } else { 1 })),
            "left at {at}"
        );
        // The next basebackup finds its feet whatever was left, and tidies up.
        write(&folder, id(3), &few());
        assert_eq!(
            names(&folder_path(&folder)),
            [format!("{}.pages", id(3)), "lock".to_owned()],
            "left at {at}"
        );
    }
}

#[test]
fn a_file_cut_anywhere_while_it_was_written_is_not_taken_for_a_state() {
    let (scratch, folder) = scratch();
    write(&folder, id(1), &few());
    let whole = fs::read(folder.finished(id(1))).unwrap();
    for len in (0..whole.len()).step_by(97) {
        let left = StateFolder::new(scratch.path().join(len.to_string()));
        drop(left.take_lock().unwrap());
        fs::write(left.unfinished(id(1)), &whole[..len]).unwrap();
        assert!(left.open().unwrap().is_none());
        // Nor where a file system without order has given it its name.
        fs::rename(left.unfinished(id(1)), left.finished(id(1))).unwrap();
        assert_eq!(left.open().unwrap_err().kind(), StateErrorKind::Damaged, "{len} bytes");
    }
}

#[test]
fn a_basebackup_that_fails_leaves_the_state_as_it_was() {
    let (_scratch, folder) = scratch();
    write(&folder, id(1), &few());
    let held = folder.take_lock().unwrap();
    let mut writer = folder.begin(&held, id(2)).unwrap();
    push_all(&mut writer, &few());
    drop(writer);
    assert_eq!(names(&folder_path(&folder)), [format!("{}.pages", id(1)), "lock".to_owned()]);
    assert_eq!(folder.open().unwrap().unwrap().facts().basebackup, id(1));
}

#[test]
fn two_basebackups_of_a_site_at_once_are_refused() {
    let (_scratch, folder) = scratch();
    let held = folder.take_lock().unwrap();
    let error = folder.clone().take_lock().unwrap_err();
    assert_eq!(error.kind(), StateErrorKind::Retry);
    assert!(error.to_string().ends_with(&format!("by process {}", std::process::id())), "{error}");
    assert!(error.hint().is_some());
    drop(held);
    drop(folder.take_lock().unwrap());
}

#[test]
fn the_folder_and_the_state_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let (_scratch, folder) = scratch();
    write(&folder, id(1), &few());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&folder_path(&folder)), 0o700);
    assert_eq!(mode(&folder.finished(id(1))), 0o600);
    assert_eq!(format!("{:?}", facts(id(1)).hash_key), "HashKey");
}

#[test]
fn blocks_are_taken_over_from_the_state_before() {
    let (_scratch, folder) = scratch();
    let files = write(&folder, id(1), &few());
    let before = folder.open().unwrap().unwrap();
    let held = folder.take_lock().unwrap();
    let mut writer = folder.begin(&held, id(2)).unwrap();
    for file in &files {
        let mut file = file.clone();
        if let KnownContent::Pages { records, .. } = &mut file.content {
            let known = files.iter().find(|known| known.path == file.path).unwrap();
            for (n, at) in (0..).zip(records) {
                *at = writer.copy_block(&before, known, n).unwrap();
            }
        }
        writer.push_file(&file).unwrap();
    }
    writer.finish(&facts(id(2))).unwrap();
    // The old one is still there for who has it open.
    let large = files.iter().find(|file| file.path.split().1 == b"16384").unwrap();
    let state = folder.open().unwrap().unwrap();
    let found = state.find(&large.path).unwrap().unwrap();
    assert_eq!(state.block(&found, 0).unwrap(), before.block(large, 0).unwrap());
    assert_eq!(state.facts().basebackup, id(2));
}

#[test]
fn what_does_not_fit_together_is_not_written() {
    let (_scratch, folder) = scratch();
    let held = folder.take_lock().unwrap();
    let mut writer = folder.begin(&held, id(1)).unwrap();
    let file = known(TreePath::new("data/x").unwrap(), &Model::Pages(3 * PAGE_SIZE, 0), &mut writer);
    let mut refused = |change: &dyn Fn(&mut KnownFile)| {
        let mut file = file.clone();
        change(&mut file);
        assert_eq!(writer.push_file(&file).unwrap_err().kind(), StateErrorKind::Bug, "{file:?}");
    };
    refused(&|file| file.size += PAGE_SIZE);
    refused(&|file| file.content = KnownContent::Inline(Bytes::new()));
    refused(&|file| file.content = KnownContent::Part { blob: blob(1, 7), hash: PageHash([0; 8]) });
    refused(&|file| {
        if let KnownContent::Pages { records, .. } = &mut file.content {
            records.clear();
        }
    });
    refused(&|file| {
        if let KnownContent::Pages { stands, .. } = &mut file.content {
            *stands = Content::Blocks(Vec::new());
        }
    });
    let mut short = block(5, 0);
    short.hashes.pop();
    assert_eq!(writer.push_block(&short).unwrap_err().kind(), StateErrorKind::Bug);
    assert_eq!(writer.push_block(&KnownBlock::default()).unwrap_err().kind(), StateErrorKind::Bug);
    writer.push_file(&file).unwrap();
    writer.push_file(&file).unwrap();
    assert!(writer.finish(&facts(id(1))).unwrap_err().to_string().contains("named twice"));
    let writer = folder.begin(&held, id(1)).unwrap();
    assert_eq!(writer.finish(&facts(id(2))).unwrap_err().kind(), StateErrorKind::Bug);
    assert!(folder.open().unwrap().is_none());
}

#[test]
fn after_an_error_nothing_more_is_taken() {
    let (_scratch, folder) = scratch();
    let held = folder.take_lock().unwrap();
    let mut writer = folder.begin(&held, id(1)).unwrap();
    // A disk that is full: here a file that can only be read.
    writer.write_to(fs::File::open(folder.unfinished(id(1))).unwrap());
    let full = block(MAP_BLOCK_PAGES as u32, 1);
    let error = (0..20).find_map(|_| writer.push_block(&full).err()).expect("a mebibyte does not fit");
    assert!(matches!(error, StateError::Disk(_)), "{error}");
    assert!(matches!(writer.push_block(&full), Err(StateError::GivenUp { .. })));
    assert!(matches!(writer.finish(&facts(id(1))), Err(StateError::GivenUp { .. })));
    assert_eq!(names(&folder_path(&folder)), ["lock"]);
}

#[test]
fn many_files_pass_through_little_memory_and_are_found_in_any_order() {
    const FILES: u32 = 20_000;
    const BYTES_MAX: usize = 128 << 10;
    let (_scratch, folder) = scratch();
    let held = folder.take_lock().unwrap();
    let mut writer = folder.begin(&held, id(1)).unwrap().gathering_at_most(BYTES_MAX);
    let path = |n: u32| TreePath::new(format!("data/base/{}/{n}", n % 7)).unwrap();
    // 7919 has no divisor in common with their number: every file once, in an order that is none.
    for n in (0..FILES).map(|n| n * 7919 % FILES) {
        let file = known(path(n), &Model::Part(n + 1), &mut writer);
        writer.push_file(&file).unwrap();
        assert!(writer.held_bytes() <= BYTES_MAX);
    }
    writer.finish(&facts(id(1))).unwrap();
    let state = folder.open().unwrap().unwrap();
    let paths: Vec<TreePath> = state.files().map(|file| file.unwrap().path).collect();
    assert_eq!(paths.len(), FILES as usize);
    assert!(paths.windows(2).all(|pair| pair[0].split() < pair[1].split()));
    for n in (0..FILES).step_by(11) {
        assert_eq!(state.find(&path(n)).unwrap().unwrap().size, u64::from(n) + 1);
    }
    for absent in ["data", "data/base/0/00", "data/base/7/7", "zzz", ""] {
        assert!(state.find(&TreePath::new(absent).unwrap()).unwrap().is_none(), "{absent}");
    }
}

#[test]
fn a_page_hash_is_the_beginning_of_the_keyed_digest() {
    let key = HashKey(Zeroizing::new([5; 32]));
    let page = [1; PAGE_SIZE as usize];
    assert_eq!(key.hash(&page).0, Digest::salted(&[5; 32], &page).as_bytes()[..8]);
    assert_ne!(key.hash(&page), HashKey(Zeroizing::new([6; 32])).hash(&page));
    let packs = block(100, 0).packs();
    assert!(packs.len() > 1 && packs.iter().all(|pack| pack.number < 5));
}

/// A basebackup that was killed when the store had one pack: three files that were synced with it, and others.
fn killed(folder: &StateFolder) -> (Vec<KnownFile>, u64) {
    let held = folder.take_lock().unwrap();
    let mut writer = folder.begin(&held, id(1)).unwrap();
    let mut journal = folder.begin_journal(&held, &facts(id(1))).unwrap();
    let mut push = |writer: &mut StateWriter, name: &str, model: &Model| {
        let file = known(TreePath::new(name).unwrap(), model, writer);
        journal.push_file(&file).unwrap();
        file
    };
    let mut synced = vec![
        push(&mut writer, "data/PG_VERSION", &Model::Inline(b"15\n".to_vec())),
        push(&mut writer, "data/base/5/112", &Model::Part(16_384)),
        push(&mut writer, "data/base/5/16384", &Model::Pages(20_000 * PAGE_SIZE - 100, 3)),
    ];
    let durable = writer.keep().unwrap();
    journal.push_pack(&pack(0), durable).unwrap();
    let mut push = |writer: &mut StateWriter, name: &str, model: &Model| {
        journal.push_file(&known(TreePath::new(name).unwrap(), model, writer)).unwrap();
    };
    push(&mut writer, "data/base/5/113", &Model::Part(5));
    push(&mut writer, "data/base/5/16385", &Model::Pages(3 * PAGE_SIZE, 4));
    // The frames are on the disk, the blocks that they name are not.
    journal.flush().unwrap();
    let _killed = ManuallyDrop::new(writer);
    synced.sort_by(|a, b| a.path.split().cmp(&b.path.split()));
    (synced, durable)
}

fn pack(number: u32) -> PackRecord {
    let (salt, digest) = ([number as u8; 32], Digest::of(b"pack"));
    PackRecord { id: PackId { origin: id(1), number }, size: 32 << 20, live: 0, key: 0, salt, digest }
}

fn taken_up(folder: &StateFolder) -> (Attempt, Vec<KnownFile>) {
    let held = folder.take_lock().unwrap();
    let attempt = folder.attempt(&held).unwrap().expect("a pack was noted");
    let state = folder.take_up(&held, &attempt).unwrap();
    let files: Vec<KnownFile> = state.files().collect::<Result<_, _>>().unwrap();
    for file in &files {
        (0..file.block_count()).for_each(|n| drop(state.block(file, n).unwrap()));
    }
    (attempt, files)
}

/// Maps of files under way stand nowhere yet.
fn without_places(mut files: Vec<KnownFile>) -> Vec<KnownFile> {
    for file in &mut files {
        if let KnownContent::Pages { stands: Content::Blocks(blobs), .. } = &mut file.content {
            blobs.clear();
        }
    }
    files
}

#[test]
fn what_was_killed_is_believed_up_to_its_last_pack_however_often_it_is_taken_up() {
    let (_scratch, folder) = scratch();
    let (synced, durable) = killed(&folder);
    let (attempt, files) = taken_up(&folder);
    assert_eq!((&attempt.facts, &attempt.packs[..]), (&facts(id(1)), &[pack(0)][..]));
    assert_eq!(without_places(files.clone()), without_places(synced));
    let once = fs::read(folder.unfinished(id(1))).unwrap();
    assert!(once.len() as u64 > durable);
    // As where the store was away when it was taken up first, or that was killed half-way.
    for cut in [once.len(), durable as usize, durable as usize + 100] {
        fs::write(folder.unfinished(id(1)), &once[..cut]).unwrap();
        let (again, of_again) = taken_up(&folder);
        assert_eq!((&again, &of_again), (&attempt, &files), "{cut} of {}", once.len());
        assert!(fs::read(folder.unfinished(id(1))).unwrap() == once, "{cut}");
    }
}

#[test]
fn what_came_behind_the_last_pack_may_be_anything() {
    let (scratch, folder) = scratch();
    let (_, durable) = killed(&folder);
    let (journal, state) =
        (fs::read(folder.journal(id(1))).unwrap(), fs::read(folder.unfinished(id(1))).unwrap());
    let (attempt, files) = taken_up(&folder);
    let end = (0..journal.len())
        .find(|len| {
            fs::write(folder.journal(id(1)), &journal[..*len]).unwrap();
            folder.attempt(&folder.take_lock().unwrap()).unwrap().is_some()
        })
        .expect("the whole journal has a pack");
    assert!(end < journal.len(), "nothing came behind the pack");
    for (name, filling) in [("zeros", 0), ("noise", 0xa5)] {
        let left = StateFolder::new(scratch.path().join(name));
        drop(left.take_lock().unwrap());
        let broken = |whole: &[u8], from: usize| {
            let mut bytes = whole[..from].to_vec();
            bytes.resize(whole.len() + 5000, filling);
            bytes
        };
        fs::write(left.journal(id(1)), broken(&journal, end)).unwrap();
        fs::write(left.unfinished(id(1)), broken(&state, durable as usize)).unwrap();
        let (found, of_found) = taken_up(&left);
        assert_eq!((&found, &of_found), (&attempt, &files), "{name}");
    }
    // What had been synced is not there: then nothing is believed.
    fs::write(folder.journal(id(1)), &journal).unwrap();
    fs::write(folder.unfinished(id(1)), &state[..durable as usize - 1]).unwrap();
    let refused = folder.attempt(&folder.take_lock().unwrap()).unwrap_err();
    assert_eq!(refused.kind(), StateErrorKind::Damaged, "{refused}");
    fs::remove_file(folder.unfinished(id(1))).unwrap();
    assert_eq!(folder.attempt(&folder.take_lock().unwrap()).unwrap(), None);
}

#[test]
fn who_looks_at_what_was_killed_leaves_it_as_it_was() {
    let (_scratch, folder) = scratch();
    killed(&folder);
    let read = || [folder.journal(id(1)), folder.unfinished(id(1))].map(|path| fs::read(path).unwrap());
    let before = read();
    let held = folder.take_lock().unwrap();
    let attempt = folder.attempt(&held).unwrap();
    assert!(attempt.is_some() && folder.attempt(&held).unwrap() == attempt);
    assert!(read() == before);
}
