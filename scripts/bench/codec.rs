//! The measurement behind `docs/decisions/0001-crypto-crates.md`; `scripts/bench/codec` builds and runs it.
//!
//! Out: read 64 KiB from a file in the page cache → hash every page → zstd 3 → seal. Back: open → inflate. Each
//! once with every cipher per run, so that a busy moment of the machine meets all of them; what is printed are
//! medians of the runs. Then the operations that happen once per object or per backup.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use serde_json::{Value, json};
use walden::codec::{
    CodecId, Compression, Compressor, DataKey, Decompressor, FrameAad, FrameKey, Hasher, RandomExt,
    RecipientKey, RecipientPrivateKey, SeededRandom, SigningKey, TAG_LEN, VerifyKey, create_keys,
};

const PAGE_LEN: usize = 8192;
const CHUNK_LEN: usize = 65_536;
/// Enough to leave the caches of the processor, little enough for many runs.
const SAMPLE_LEN: usize = 32 << 20;
const RUNS_DEFAULT: usize = 9;

fn main() {
    let (mut json_only, mut runs, mut files) = (false, RUNS_DEFAULT, Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--json" => json_only = true,
            "--runs" => {
                let given = args.next().and_then(|runs| runs.parse().ok());
                runs = given.filter(|&runs| runs > 0).expect("--runs takes a number");
            }
            _ => files.push(arg),
        }
    }

    let (_scratch, sample) = sample(&files);
    let chunks = chunks_of(&sample);
    let pipelines = measure_pipelines(&sample, chunks, runs);
    let operations = measure_operations();
    if !json_only {
        print_table(&pipelines, &operations);
    }
    let pipelines: Vec<Value> = pipelines.iter().map(Pipeline::to_json).collect();
    let operations: serde_json::Map<_, _> =
        operations.iter().map(|(name, time)| ((*name).to_owned(), json!(micros(*time)))).collect();
    println!(
        "{}",
        json!({ "chunks": chunks, "runs": runs, "pipelines": pipelines, "operations_us": operations })
    );
}

/// Puts the files' chunks, or made-up pages, into one scratch file.
fn sample(files: &[String]) -> (tempfile::TempDir, File) {
    let folder = tempfile::tempdir().expect("a folder for the sample");
    let path = folder.path().join("sample");
    let mut sample = File::create(&path).expect("the sample is created");
    if files.is_empty() {
        sample.write_all(&heap_pages(SAMPLE_LEN / PAGE_LEN)).expect("the sample is written");
    }
    for name in files {
        let mut file = File::open(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        std::io::copy(&mut file, &mut sample).expect("the sample is written");
    }
    (folder, File::open(path).expect("the sample is there"))
}

fn chunks_of(sample: &File) -> usize {
    let len = sample.metadata().expect("the sample is there").len() as usize;
    let chunks = len.min(SAMPLE_LEN * 8) / CHUNK_LEN;
    assert!(chunks > 0, "the sample has no whole chunk");
    chunks
}

/// A cipher under test.
trait Cipher {
    fn name(&self) -> &'static str;
    fn seal(&self, frame: &FrameAad, body: Vec<u8>) -> Vec<u8>;
    fn open(&self, frame: &FrameAad, stored: Vec<u8>) -> Vec<u8>;
}

/// What Walden does.
struct Walden(&'static str, FrameKey);

impl Cipher for Walden {
    fn name(&self) -> &'static str {
        self.0
    }

    fn seal(&self, frame: &FrameAad, body: Vec<u8>) -> Vec<u8> {
        self.1.seal(frame, body)
    }

    fn open(&self, frame: &FrameAad, stored: Vec<u8>) -> Vec<u8> {
        self.1.open(frame, stored).expect("the frame is authentic")
    }
}

/// The same with the `aes-gcm` crate, which chooses its instructions when it runs, too.
struct RustCrypto(Aes256Gcm);

impl RustCrypto {
    fn nonce_and_aad(frame: &FrameAad) -> (Nonce<aes_gcm::aead::consts::U12>, [u8; 15]) {
        let (mut nonce, mut aad) = ([0; 12], [0; 15]);
        nonce[4..].copy_from_slice(&frame.position.to_be_bytes());
        aad[1..9].copy_from_slice(&frame.position.to_le_bytes());
        aad[11..].copy_from_slice(&frame.raw_len.to_le_bytes());
        (nonce.into(), aad)
    }
}

impl Cipher for RustCrypto {
    fn name(&self) -> &'static str {
        "aes-gcm"
    }

    fn seal(&self, frame: &FrameAad, mut body: Vec<u8>) -> Vec<u8> {
        let (nonce, aad) = Self::nonce_and_aad(frame);
        body.reserve_exact(TAG_LEN);
        self.0.encrypt_in_place(&nonce, &aad, &mut body).expect("the body is short");
        body
    }

    fn open(&self, frame: &FrameAad, mut stored: Vec<u8>) -> Vec<u8> {
        let (nonce, aad) = Self::nonce_and_aad(frame);
        self.0.decrypt_in_place(&nonce, &aad, &mut stored).expect("the frame is authentic");
        stored
    }
}

/// Time per chunk in every stage.
#[derive(Default, Clone)]
struct Stages {
    read: Duration,
    hash: Duration,
    compress: Duration,
    seal: Duration,
    open: Duration,
    inflate: Duration,
}

struct Pipeline {
    cipher: &'static str,
    stages: Stages,
    ratio: f64,
}

impl Pipeline {
    fn out(&self) -> Duration {
        self.stages.read + self.stages.hash + self.stages.compress + self.stages.seal
    }

    fn back(&self) -> Duration {
        self.stages.open + self.stages.inflate
    }

    fn to_json(&self) -> Value {
        let Stages { read, hash, compress, seal, open, inflate } = self.stages;
        json!({
            "cipher": self.cipher, "ratio": self.ratio,
            "out_mb_s": mb_per_s(self.out()), "back_mb_s": mb_per_s(self.back()),
            "read_us": micros(read), "hash_us": micros(hash), "compress_us": micros(compress),
            "seal_us": micros(seal), "open_us": micros(open), "inflate_us": micros(inflate),
        })
    }
}

fn measure_pipelines(sample: &File, chunks: usize, runs: usize) -> Vec<Pipeline> {
    let data_key = DataKey::generate(&SeededRandom::new(1));
    let (salt, identity) = ([1; 32], b"bench");
    let ciphers: [Box<dyn Cipher>; 3] = [
        Box::new(Walden("aws-lc-rs", data_key.frame_key(&salt, identity))),
        Box::new(RustCrypto(Aes256Gcm::new(&Key::<Aes256Gcm>::from([7; 32])))),
        Box::new(Walden("none (BLAKE3 tag)", FrameKey::unencrypted(&salt, identity))),
    ];
    let mut times = vec![Vec::new(); ciphers.len()];
    let mut ratio = 0.0;
    // The first run warms the page cache and the contexts, and is not counted.
    for run in 0..=runs {
        for (cipher, times) in ciphers.iter().zip(&mut times) {
            let (stages, stored_len) = one_run(sample, chunks, &**cipher);
            ratio = (chunks * CHUNK_LEN) as f64 / stored_len as f64;
            if run > 0 {
                times.push(stages);
            }
        }
    }
    let stage = |times: &[Stages], stage: fn(&Stages) -> Duration| median(times.iter().map(stage).collect());
    ciphers
        .iter()
        .zip(&times)
        .map(|(cipher, times)| Pipeline {
            cipher: cipher.name(),
            stages: Stages {
                read: stage(times, |t| t.read),
                hash: stage(times, |t| t.hash),
                compress: stage(times, |t| t.compress),
                seal: stage(times, |t| t.seal),
                open: stage(times, |t| t.open),
                inflate: stage(times, |t| t.inflate),
            },
            ratio,
        })
        .collect()
}

/// Takes every chunk out and back again; returns the mean times of a chunk and the stored length of all.
fn one_run(sample: &File, chunks: usize, cipher: &dyn Cipher) -> (Stages, usize) {
    let mut total = Stages::default();
    let mut compressor = Compressor::new(Compression::default());
    let mut decompressor = Decompressor::new();
    let mut buffer = vec![0; CHUNK_LEN];
    let page_hash_key = [9; 32];
    let mut stored = Vec::with_capacity(chunks);
    for position in 0..chunks as u64 {
        let start = Instant::now();
        sample.read_exact_at(&mut buffer, position * CHUNK_LEN as u64).expect("the sample is read");
        let read = Instant::now();
        for page in buffer.chunks(PAGE_LEN) {
            let mut hasher = Hasher::salted(&page_hash_key);
            hasher.update(page);
            std::hint::black_box(hasher.finish());
        }
        let hashed = Instant::now();
        let (codec, body) = compressor.compress(&buffer).expect("the chunk is compressed");
        let compressed = Instant::now();
        let frame = FrameAad { kind: 0, position, last: false, codec, raw_len: CHUNK_LEN as u32 };
        let sealed = cipher.seal(&frame, body);
        total.seal += compressed.elapsed();
        total.read += read - start;
        total.hash += hashed - read;
        total.compress += compressed - hashed;
        stored.push((frame, sealed));
    }
    let stored_len = stored.iter().map(|(_, sealed)| sealed.len()).sum();
    for (frame, sealed) in stored {
        let start = Instant::now();
        let body = cipher.open(&frame, sealed);
        let opened = Instant::now();
        let raw = decompressor.decompress(frame.codec, &body, CHUNK_LEN).expect("the chunk is whole");
        total.inflate += opened.elapsed();
        total.open += opened - start;
        std::hint::black_box(raw);
    }
    let chunks = chunks as u32;
    let Stages { read, hash, compress, seal, open, inflate } = total;
    let mean = Stages {
        read: read / chunks,
        hash: hash / chunks,
        compress: compress / chunks,
        seal: seal / chunks,
        open: open / chunks,
        inflate: inflate / chunks,
    };
    (mean, stored_len)
}

/// Measures what happens once per object, per data key or per header.
fn measure_operations() -> Vec<(&'static str, Duration)> {
    let data_key = DataKey::generate(&SeededRandom::new(1));
    let header = vec![b'h'; 1024];
    let mut operations = vec![
        ("derive a frame key", median_of(501, || data_key.frame_key(&[1; 32], &[2; 100]))),
        ("derive a frame key, open one 25 kB frame", {
            let frame = FrameAad { kind: 0, position: 0, last: true, codec: CodecId::None, raw_len: 25_000 };
            let sealed = data_key.frame_key(&[1; 32], &[2; 100]).seal(&frame, vec![3; 25_000]);
            median_of(501, || data_key.frame_key(&[1; 32], &[2; 100]).open(&frame, sealed.clone()))
        }),
    ];
    for (bits, wrap, unwrap) in
        [(3072, "RSA 3072 wrap", "RSA 3072 unwrap"), (4096, "RSA 4096 wrap", "RSA 4096 unwrap")]
    {
        let keys = create_keys(bits).expect("keys are created");
        let public = RecipientKey::from_pem(&keys.public_pem).expect("a new key is read");
        let private = RecipientPrivateKey::from_pem(&keys.private_pem).expect("a new key is read");
        let wrapped = public.wrap(&data_key).expect("the key is wrapped");
        operations.push((wrap, median_of(101, || public.wrap(&data_key))));
        operations.push((unwrap, median_of(101, || private.unwrap(&wrapped).expect("the key is unwrapped"))));
        if bits == 3072 {
            let signing = SigningKey::from_pem(&keys.sign_pem).expect("a new key is read");
            let verify = VerifyKey::from_pem(&keys.verify_pem).expect("a new key is read");
            let signature = signing.sign(&header);
            operations.push(("Ed25519 sign 1 kB", median_of(501, || signing.sign(&header))));
            operations.push(("Ed25519 verify 1 kB", median_of(501, || verify.verify(&header, &signature))));
        }
    }
    operations
}

fn median_of<T>(times: usize, mut operation: impl FnMut() -> T) -> Duration {
    let measured = (0..times).map(|_| {
        let start = Instant::now();
        std::hint::black_box(operation());
        start.elapsed()
    });
    median(measured.collect())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn micros(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e8).round() / 100.0
}

fn mb_per_s(per_chunk: Duration) -> f64 {
    (CHUNK_LEN as f64 / 1e6 / per_chunk.as_secs_f64()).round()
}

fn print_table(pipelines: &[Pipeline], operations: &[(&str, Duration)]) {
    println!("64 KiB chunks, zstd 3, one thread; microseconds per chunk, MB/s of raw data");
    println!();
    println!(
        "| cipher | ratio | read | hash | zstd | seal | out MB/s | seal share | open | inflate | back MB/s | open share |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for pipeline in pipelines {
        let Stages { read, hash, compress, seal, open, inflate } = pipeline.stages;
        let share = |part: Duration, whole: Duration| part.as_secs_f64() / whole.as_secs_f64() * 100.0;
        println!(
            "| {} | {:.2} | {:.1} | {:.1} | {:.1} | {:.1} | {:.0} | {:.1} % | {:.1} | {:.1} | {:.0} | {:.1} % |",
            pipeline.cipher,
            pipeline.ratio,
            micros(read),
            micros(hash),
            micros(compress),
            micros(seal),
            mb_per_s(pipeline.out()),
            share(seal, pipeline.out()),
            micros(open),
            micros(inflate),
            mb_per_s(pipeline.back()),
            share(open, pipeline.back()),
        );
    }
    println!();
    println!("| operation (aws-lc-rs) | µs |");
    println!("|---|---|");
    for (name, time) in operations {
        println!("| {name} | {:.1} |", micros(*time));
    }
    println!();
}

/// Makes up heap pages: headers, line pointers and rows with numbers, a uuid, a time, an address, words and noise.
fn heap_pages(count: usize) -> Vec<u8> {
    let random = SeededRandom::new(42);
    let mut pages = Vec::with_capacity(count * PAGE_LEN);
    let mut row_number = 1_u64;
    for page_number in 0..count as u32 {
        let mut page = vec![0; PAGE_LEN];
        let (mut lower, mut upper) = (24, PAGE_LEN);
        loop {
            let tuple = heap_tuple(&random, row_number, page_number, ((lower - 24) / 4 + 1) as u16);
            let start = match upper.checked_sub(tuple.len()) {
                Some(start) if (start & !7) >= lower + 4 => start & !7,
                _ => break,
            };
            page[start..start + tuple.len()].copy_from_slice(&tuple);
            let pointer = start as u32 | 1 << 15 | (tuple.len() as u32) << 17;
            page[lower..lower + 4].copy_from_slice(&pointer.to_le_bytes());
            (lower, upper) = (lower + 4, start);
            row_number += 1;
        }
        page[0..8].copy_from_slice(&(0x1_6000_0000 + u64::from(page_number) * 8000).to_be_bytes());
        page[8..10].copy_from_slice(&random.array::<2>());
        page[12..14].copy_from_slice(&(lower as u16).to_le_bytes());
        page[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
        page[16..20].copy_from_slice(&[0x00, 0x20, 0x04, 0x20]);
        pages.extend_from_slice(&page);
    }
    pages
}

fn heap_tuple(random: &SeededRandom, number: u64, page: u32, item: u16) -> Vec<u8> {
    const WORDS: [&str; 32] = [
        "order", "invoice", "delivery", "customer", "urgent", "gift", "return", "paid", "pending", "note",
        "street", "please", "the", "of", "and", "with", "before", "after", "noon", "box", "red", "green",
        "large", "small", "second", "floor", "ring", "twice", "leave", "at", "door", "shop",
    ];
    let noise: [u8; 32] = random.array();
    let mut tuple = Vec::with_capacity(256);
    tuple.extend_from_slice(&(700 + number as u32 / 500).to_le_bytes());
    tuple.extend_from_slice(&[0; 8]);
    tuple.extend_from_slice(&((page >> 16) as u16).to_le_bytes());
    tuple.extend_from_slice(&(page as u16).to_le_bytes());
    tuple.extend_from_slice(&item.to_le_bytes());
    tuple.extend_from_slice(&[9, 0, 2, 9, 24, 0]);
    tuple.extend_from_slice(&number.to_le_bytes());
    tuple.extend_from_slice(&noise[..16]);
    tuple.extend_from_slice(
        &(820_000_000_000_000 + number * 1_700_000 + u64::from(noise[16]) * 5000).to_le_bytes(),
    );
    tuple.extend_from_slice(&(u32::from(noise[17]) * 100 + 99).to_le_bytes());
    let word = |n: usize| WORDS[usize::from(noise[18 + n]) % WORDS.len()];
    let text = format!("{}.{}{}@example.com", word(0), word(1), noise[19] % 100);
    tuple.push((text.len() as u8 + 1) << 1 | 1);
    tuple.extend_from_slice(text.as_bytes());
    let text = (2..10).map(word).collect::<Vec<_>>().join(" ");
    tuple.push((text.len() as u8 + 1) << 1 | 1);
    tuple.extend_from_slice(text.as_bytes());
    let text = format!(
        "{{\"status\": \"{}\", \"items\": {}, \"sku\": \"{}\"}}",
        word(10),
        noise[29] % 9,
        hex::encode(&noise[28..])
    );
    tuple.push((text.len() as u8 + 1) << 1 | 1);
    tuple.extend_from_slice(text.as_bytes());
    tuple
}
