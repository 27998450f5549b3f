//! The rules of the tree that neither the compiler nor clippy knows: who may name whom, and how a file looks.
//!
//! `Source` blanks comments and literals and knows which lines are tests; every rule is a function from
//! sources to findings, each with file, line and the rule's name. The layers come from the table in
//! `docs/architecture.md`, so that the document cannot drift from the code. Every rule has a sample below
//! that it must catch: a rule that cannot fail is worth nothing.
//!
//! Text, not syntax: no parser crate is needed, and what fools it would puzzle a reader as well.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Lines of code a file may have, its tests not counted.
const FILE_LINES_MAX: usize = 550;
/// Lines from a function's `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 75;
/// Lines of the `//!` header; `mod.rs`, `main.rs` and tests may do with one.
const HEADER_LINES: Range<usize> = 2..16;
/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 7] = ["utils", "util", "common", "helpers", "helper", "misc", "shared"];
/// Macros and attributes of work left undone.
const UNFINISHED: [&str; 4] = ["todo!", "unimplemented!", "dbg!", "#[ignore"];

const EVERYWHERE: &[&str] = &["src/"];

/// Every dependency and where it may be named: one module, unless it is vocabulary.
const CRATES: &[(&str, &[&str])] = &[
    ("aes-gcm", &["src/codec/"]),
    ("anyhow", &["src/cli/"]),
    ("async-trait", EVERYWHERE),
    ("aws-lc-rs", &["src/codec/"]),
    ("base64", EVERYWHERE),
    ("blake3", &["src/codec/"]),
    ("bytes", EVERYWHERE),
    ("clap", &["src/cli/"]),
    ("crc-fast", &["src/pg/"]),
    ("crossbeam-channel", EVERYWHERE),
    ("fuser", &["src/mount/fuse/"]),
    ("futures", EVERYWHERE),
    ("hex", EVERYWHERE),
    ("hyper-util", &["src/storage/"]),
    ("jiff", EVERYWHERE),
    ("libc", EVERYWHERE),
    ("lru", &["src/repo/", "src/mount/"]),
    ("lz4_flex", &["src/codec/"]),
    ("nix", EVERYWHERE),
    ("object_store", &["src/storage/"]),
    ("pem", &["src/codec/"]),
    ("postgres-protocol", &["src/replication/"]),
    ("proptest", EVERYWHERE),
    ("reqwest", &["src/storage/s3/"]),
    ("rustls-native-certs", &["src/replication/", "src/storage/"]),
    ("s3s", &["src/storage/"]),
    ("s3s-fs", &["src/storage/"]),
    ("serde", EVERYWHERE),
    ("serde_json", EVERYWHERE),
    ("snap", &["src/codec/"]),
    ("strsim", &["src/config/", "src/cli/"]),
    ("tar", &["src/backup/stream/"]),
    ("tempfile", EVERYWHERE),
    ("thiserror", EVERYWHERE),
    ("tokio", EVERYWHERE),
    ("tokio-postgres", &["src/replication/"]),
    ("tokio-postgres-rustls", &["src/replication/"]),
    ("tokio-rustls", &["src/replication/"]),
    ("toml", &["src/config/"]),
    ("tracing", EVERYWHERE),
    ("tracing-subscriber", &["src/cli/"]),
    ("url", EVERYWHERE),
    ("uuid", EVERYWHERE),
    ("zeroize", EVERYWHERE),
    ("zstd", &["src/codec/"]),
];

/// What reaches outside the process, or decides what is where, and the one place that may: (rule, code, places).
const EFFECTS: &[(&str, &[&str], &[&str])] = &[
    (
        "clock",
        &["Timestamp::now", "Zoned::now", "SystemTime::now", "Instant::now", ".elapsed()", "clock_gettime"],
        &["src/clock.rs"],
    ),
    (
        "environment",
        &["env::var", "env::set_var", "env::remove_var", "env::temp_dir", "env::home_dir"],
        &["src/config/"],
    ),
    (
        "printing",
        &["print!", "println!", "eprint!", "eprintln!", "stdout()", "stderr()"],
        &["src/cli/", "src/main.rs"],
    ),
    // The configuration proves that a prefix can be one.
    ("object keys", &["ObjectKey"], &["src/repo/", "src/storage/", "src/config/"]),
    ("deletion", &["store.delete(", "store().delete("], &["src/storage/"]),
];

#[test]
fn the_tree_is_tidy() {
    let tree = Tree::load(Path::new(env!("CARGO_MANIFEST_DIR")));
    assert!(
        tree.sources.len() > 15,
        "only {} sources found: tidy looked in the wrong place",
        tree.sources.len()
    );
    let findings = tree.findings();
    let list: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(findings.is_empty(), "{} untidy places:\n{}\n", list.len(), list.join("\n"));
}

#[test]
fn the_commands_and_links_of_the_readme_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let commands = shell_commands(&readme);
    assert!(
        commands.len() >= 2 && commands[0] == "scripts/demo" && commands[1] == "scripts/test",
        "{commands:?}"
    );
    for command in commands.iter().filter(|c| c.starts_with("scripts/")) {
        let script = command.split_whitespace().next().unwrap();
        let mode =
            fs::metadata(root.join(script)).unwrap_or_else(|e| panic!("{script}: {e}")).permissions().mode();
        assert!(mode & 0o111 == 0o111, "{script} is not executable");
    }
    for link in readme.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        assert!(
            link.contains("://") || root.join(link).exists(),
            "README.md links to {link}, which is not there"
        );
    }
}

/// A filter that matches nothing is no error: what it was to be strict with would pass at a second try, as flaky.
#[test]
fn what_is_never_tried_twice_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = fs::read_to_string(root.join(".config/nextest.toml")).unwrap();
    let (before, _) = config.split_once("retries = 0").unwrap();
    let (_, filter) = before.rsplit_once("filter =").unwrap();
    let mut binaries = BTreeSet::new();
    for part in filter.split("binary(").skip(1) {
        let (binary, rest) = part.split_once(')').unwrap();
        binaries.insert(binary);
        let files = fs::read_dir(root.join("tests").join(binary)).unwrap();
        let files: Vec<String> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        let modules = rest.split_once("test(/^").map_or("", |(_, modules)| modules.trim_start_matches('('));
        let modules = modules.split([')', ':', '/']).next().unwrap();
        for module in modules.split('|') {
            assert!(files.iter().any(|file| file.starts_with(module)), "{binary} has no module {module}");
        }
    }
    assert!(["clone", "damage", "restore", "wal"].iter().all(|it| binaries.contains(it)), "{binaries:?}");
}

#[test]
fn ci_runs_the_test_command_of_the_readme_and_nothing_of_its_own() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ci = fs::read_to_string(root.join(".ci/run")).unwrap();
    let does: Vec<&str> = ci.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    assert_eq!(does, ["cd \"$(dirname \"$0\")/..\"", "exec scripts/test"]);
}

/// A place that breaks a rule.
struct Finding {
    path: String,
    line: usize,
    rule: &'static str,
    what: String,
}

impl Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.rule, self.what)
    }
}

/// The repository as far as the rules look at it.
struct Tree {
    sources: Vec<Source>,
    layers: Layers,
    library: String,
    manifest: String,
}

impl Tree {
    fn load(root: &Path) -> Self {
        let mut files = BTreeMap::new();
        read_sources(root, "src", &mut files);
        read_sources(root, "tests", &mut files);
        let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        Self {
            layers: Layers::parse(&read("docs/architecture.md")),
            library: read("src/lib.rs"),
            manifest: read("Cargo.toml"),
            sources: Source::of_tree(&files),
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let mut findings = self.layers.compare(&self.library);
        findings.extend(dependencies(&self.manifest));
        for source in &self.sources {
            findings.extend(source_findings(source, &self.layers));
        }
        findings
    }
}

fn read_sources(root: &Path, folder: &str, files: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(root.join(folder)).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{folder}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            read_sources(root, &path, files);
        } else if path.ends_with(".rs") {
            files.insert(path, fs::read_to_string(entry.path()).unwrap());
        }
    }
}

fn source_findings(source: &Source, layers: &Layers) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(header(source));
    findings.extend(names(source));
    findings.extend(unfinished(source));
    findings.extend(function_length(source));
    if source.path.starts_with("src/") {
        findings.extend(documentation(source));
        findings.extend(file_length(source));
        findings.extend(panics(source));
        findings.extend(confinement(source));
        findings.extend(effects(source));
        findings.extend(imports(source));
        findings.extend(layers.check(source));
    }
    findings
}

// ---- what a file looks like ----

fn header(source: &Source) -> Vec<Finding> {
    let lines = source.text.lines().take_while(|l| l.starts_with("//!")).count();
    let short = source.is_all_tests() || ["mod.rs", "main.rs"].contains(&source.file_name());
    let least = if short { 1 } else { HEADER_LINES.start };
    if (least..HEADER_LINES.end).contains(&lines) {
        return Vec::new();
    }
    let want = HEADER_LINES.end - 1;
    vec![source.finding(0, "header", format!("opens with {lines} lines of `//!`, wanted {least} to {want}"))]
}

fn names(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let name = source.path.trim_end_matches(".rs");
    if let Some(part) = name.split('/').find(|part| EMPTY_NAMES.contains(part)) {
        findings.push(source.finding(0, "names", format!("`{part}` says nothing about what is inside")));
    }
    for at in source.words("mod") {
        let module = identifier(&source.code[at + 3..]);
        if EMPTY_NAMES.contains(&module) {
            findings.push(source.finding(
                at,
                "names",
                format!("`mod {module}` says nothing about what is inside"),
            ));
        }
    }
    findings
}

fn unfinished(source: &Source) -> Vec<Finding> {
    let found = UNFINISHED.iter().flat_map(|word| source.words(word).map(move |at| (at, word)));
    found
        .map(|(at, word)| source.finding(at, "unfinished", format!("`{word}` is left in the code")))
        .collect()
}

/// Rust's own lint would also ask for a sentence on every field of an error, which its name already says.
fn documentation(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let text: Vec<&str> = source.text.lines().map(str::trim_start).collect();
    for (at, line) in source.lines().filter(|(at, _)| !source.is_test(*at)) {
        let Some(item) = line.trim_start().strip_prefix("pub ").filter(|item| is_documented_kind(item))
        else {
            continue;
        };
        let above = text[..source.line(at) - 1].iter().rev();
        let mut prelude = above.take_while(|l| !l.is_empty() && !l.ends_with(['{', '}', ';']));
        if !prelude.any(|l| l.starts_with("///") || l.starts_with("$(#[")) {
            let what = format!("`pub {}` says nothing above itself", item.trim_end());
            findings.push(source.finding(at, "documentation", what));
        }
    }
    findings
}

fn is_documented_kind(item: &str) -> bool {
    let kinds = ["fn", "const", "async", "unsafe", "struct", "enum", "trait", "type", "static"];
    kinds.contains(&identifier(item))
}

fn file_length(source: &Source) -> Vec<Finding> {
    let tests: usize = source.tests.iter().map(|r| source.line(r.end - 1) - source.line(r.start) + 1).sum();
    let lines = source.text.lines().count().saturating_sub(tests);
    if lines <= FILE_LINES_MAX {
        return Vec::new();
    }
    vec![source.finding(
        0,
        "file length",
        format!("{lines} lines before the tests, at most {FILE_LINES_MAX}"),
    )]
}

fn function_length(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for at in source.words("fn") {
        let name = identifier(&source.code[at + 2..]);
        let end = source.item_end(at);
        if name.is_empty() || !source.code[at..end].ends_with('}') {
            continue;
        }
        let lines = source.line(end - 1) - source.line(at) + 1;
        if lines > FUNCTION_LINES_MAX {
            let what = format!("`{name}` has {lines} lines, at most {FUNCTION_LINES_MAX}");
            findings.push(source.finding(at, "function length", what));
        }
    }
    findings
}

// ---- what a file may name ----

fn panics(source: &Source) -> Vec<Finding> {
    let found =
        [".unwrap()", "panic!"].into_iter().flat_map(|call| source.words(call).map(move |at| (at, call)));
    let what = "outside tests an `expect` states why it cannot fail, or `?` passes the error on";
    let outside = found.filter(|(at, _)| !source.is_test(*at));
    outside.map(|(at, call)| source.finding(at, "panics", format!("`{call}`: {what}"))).collect()
}

fn confinement(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (package, places) in CRATES.iter().filter(|(_, places)| !source.is_in(places)) {
        let name = package.replace('-', "_");
        for at in source.words(&name).filter(|at| source.is_crate_path(*at, &name)) {
            let what = format!("`{package}` is confined to {}", places.join(" and "));
            findings.push(source.finding(at, "confinement", what));
        }
    }
    findings
}

fn effects(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (rule, calls, places) in EFFECTS.iter().filter(|(_, _, places)| !source.is_in(places)) {
        for call in *calls {
            for at in source.words(call).filter(|at| !source.is_test(*at)) {
                findings.push(source.finding(
                    at,
                    rule,
                    format!("`{call}` belongs to {} alone", places.join(" and ")),
                ));
            }
        }
    }
    findings
}

fn imports(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut seen = BTreeSet::new();
    for (at, line) in source.lines().filter(|(at, _)| !source.is_test(*at)) {
        let path = line.trim_start_matches("pub ").trim_start_matches("pub(crate) ");
        let Some(path) = path.strip_prefix("use crate::") else { continue };
        let module =
            path.split('{').next().and_then(|path| path.rsplit_once("::")).map_or("", |(module, _)| module);
        if Some(identifier(path)) != source.module() && !module.is_empty() && !seen.insert(module) {
            findings.push(source.finding(
                at,
                "imports",
                format!("a second `use crate::{module}::` in this file"),
            ));
        }
    }
    findings
}

/// The row of every top module, 1 the highest, as `docs/architecture.md` has it.
struct Layers {
    rows: BTreeMap<String, usize>,
}

impl Layers {
    fn parse(document: &str) -> Self {
        let mut rows = BTreeMap::new();
        for line in document.lines() {
            let columns: Vec<&str> = line.split('|').map(str::trim).collect();
            let [_, row, modules, ..] = columns[..] else { continue };
            let Ok(row) = row.parse::<usize>() else { continue };
            for module in modules.split_whitespace() {
                let twice = rows.insert(module.trim_matches('`').to_owned(), row);
                assert!(twice.is_none(), "docs/architecture.md lists {module} twice");
            }
        }
        assert!(!rows.is_empty(), "docs/architecture.md has no table of modules");
        Self { rows }
    }

    fn compare(&self, library: &str) -> Vec<Finding> {
        let declared: BTreeSet<&str> =
            library.lines().filter_map(|l| l.strip_prefix("pub mod ")).map(identifier).collect();
        let listed: BTreeSet<&str> = self.rows.keys().map(String::as_str).collect();
        let missing =
            declared.difference(&listed).map(|m| (m, "is in lib.rs but not in docs/architecture.md"));
        let surplus =
            listed.difference(&declared).map(|m| (m, "is in docs/architecture.md but not in lib.rs"));
        let finding = |(module, what): (&&str, &str)| Finding {
            path: "docs/architecture.md".into(),
            line: 1,
            rule: "table of modules",
            what: format!("`{module}` {what}"),
        };
        missing.chain(surplus).map(finding).collect()
    }

    /// Checks every way a file can name another module: `crate::…`, and `super` that leaves its own.
    fn check(&self, source: &Source) -> Vec<Finding> {
        let Some(own) = source.module() else { return Vec::new() };
        let mut findings = Vec::new();
        for at in source.words("crate::") {
            let path = &source.code[at + "crate::".len()..];
            if let Some(what) = self.objection(own, path) {
                findings.push(source.finding(at, "layers", what));
            }
        }
        for at in source.words("super::") {
            let leaves = !source.code[..at].ends_with("super::") && source.climbs(at) >= source.depth(at);
            if leaves {
                findings.push(source.finding(at, "layers", "`super` leaves the module: write `crate::…`"));
            }
        }
        findings
    }

    fn objection(&self, own: &str, path: &str) -> Option<String> {
        let named = identifier(path);
        if named.is_empty() {
            return Some("name one module in `crate::…`, neither all nor several".into());
        }
        let Some(row) = self.rows.get(named) else {
            return Some(format!(
                "`crate::{named}` is no module of docs/architecture.md; nothing else stands at the root"
            ));
        };
        let below = self.rows.get(own).is_some_and(|own| row > own);
        (named != own && !below).then(|| format!("`{own}` names `{named}`, which is not in a row below it"))
    }
}

fn dependencies(manifest: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut section = "";
    for (number, line) in manifest.lines().enumerate() {
        if line.starts_with('[') {
            section = line;
        }
        let Some((package, _)) = line.split_once(" = ") else { continue };
        let counts = ["[dependencies]", "[dev-dependencies]"].contains(&section);
        if counts && !CRATES.iter().any(|(known, _)| *known == package) {
            let what = format!("`{package}` has no place yet: say in tests/tidy.rs which module may name it");
            findings.push(Finding {
                path: "Cargo.toml".into(),
                line: number + 1,
                rule: "dependencies",
                what,
            });
        }
    }
    findings
}

/// The lines of a document's shell blocks, without prompt and comment.
fn shell_commands(document: &str) -> Vec<String> {
    let mut inside = false;
    let mut commands = Vec::new();
    for line in document.lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside {
            let command = line.split(" #").next().unwrap_or(line).trim();
            commands.extend((!command.is_empty() && !command.starts_with('#')).then(|| command.to_owned()));
        }
    }
    commands
}

// ---- reading ----

/// A file, its code without comments and literals (byte for byte as long), and where its tests are.
struct Source {
    path: String,
    text: String,
    code: String,
    tests: Vec<Range<usize>>,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let mut source =
            Self { path: path.to_owned(), text: text.to_owned(), code: blank_prose(text), tests: Vec::new() };
        for attribute in ["#[cfg(test)]", "#[cfg(all(test"] {
            let found = source.code.match_indices(attribute).map(|(at, _)| at);
            let items: Vec<_> = found.map(|at| at..source.item_end(at + attribute.len())).collect();
            source.tests.extend(items);
        }
        source
    }

    /// Reads a whole tree, in which a file that its parent declares under `cfg(test)` is all tests.
    fn of_tree(files: &BTreeMap<String, String>) -> Vec<Self> {
        let mut sources: Vec<Self> = files.iter().map(|(path, text)| Self::new(path, text)).collect();
        let test_modules: Vec<String> = sources.iter().flat_map(Self::test_files).collect();
        for source in &mut sources {
            let stem = source.path.trim_end_matches(".rs");
            let is = |module: &String| stem == module || stem.starts_with(&format!("{module}/"));
            if test_modules.iter().any(is) {
                source.tests = Vec::from([Range { start: 0, end: source.text.len() }]);
            }
        }
        sources
    }

    /// The paths, without `.rs`, of the modules this file declares as tests.
    fn test_files(&self) -> Vec<String> {
        let stem = self.path.trim_end_matches(".rs");
        let folder = stem.strip_suffix("/mod").unwrap_or(stem);
        let declared = self.tests.iter().filter(|r| self.code[(*r).clone()].ends_with(';'));
        let modules = declared.filter_map(|r| self.words("mod").find(|at| r.contains(at)));
        modules.map(|at| format!("{folder}/{}", identifier(&self.code[at + 3..]))).collect()
    }

    fn finding(&self, at: usize, rule: &'static str, what: impl Into<String>) -> Finding {
        Finding { path: self.path.clone(), line: self.line(at), rule, what: what.into() }
    }

    fn file_name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// The top module the file belongs to; none for `lib.rs` and `main.rs`.
    fn module(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?.trim_end_matches(".rs");
        let module = inside.split('/').next()?;
        (!["lib", "main"].contains(&module)).then_some(module)
    }

    /// How many modules the place is below the crate's root; tests stand in a module of their own.
    fn depth(&self, at: usize) -> usize {
        let file = self.path.trim_end_matches("/mod.rs").split('/').count() - 1;
        let inside_tests = self.tests.iter().any(|range| range.contains(&at) && range.start > 0);
        file + usize::from(inside_tests)
    }

    /// The number of `super::` in a row at `at`.
    fn climbs(&self, at: usize) -> usize {
        let path = &self.code[at..];
        (path.len() - path.trim_start_matches("super::").len()) / "super::".len()
    }

    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }

    fn is_test(&self, at: usize) -> bool {
        self.tests.iter().any(|range| range.contains(&at))
    }

    fn is_all_tests(&self) -> bool {
        self.path.starts_with("tests/") || self.tests.first().is_some_and(|all| all.len() == self.text.len())
    }

    fn line(&self, at: usize) -> usize {
        self.text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1
    }

    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code.split_inclusive('\n').scan(0, |end, line| {
            let at = *end;
            *end += line.len();
            Some((at, line))
        })
    }

    /// Where `word` stands by itself: not inside a longer name.
    fn words<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        let bytes = self.code.as_bytes();
        self.code.match_indices(word).map(|(at, _)| at).filter(move |at| {
            let before = at.checked_sub(1).map(|i| bytes[i]);
            let after = bytes.get(at + word.len()).copied();
            let open = |edge: Option<u8>| !edge.is_some_and(is_word);
            let starts = !word.starts_with(|c: char| c.is_alphanumeric()) || open(before);
            // `env::var` also means `env::vars` and `env::var_os`.
            let ends =
                word.contains("env::") || !word.ends_with(|c: char| c.is_alphanumeric()) || open(after);
            starts && ends
        })
    }

    /// Whether the name at `at` is the root of a path: `name::…` or `use name;`, not `other::name`.
    fn is_crate_path(&self, at: usize, name: &str) -> bool {
        let before = self.code[..at].trim_end();
        let rooted = !before.ends_with("::") || before.ends_with(" ::");
        let after = self.code[at + name.len()..].trim_start();
        let imported = before.ends_with("use") && (after.starts_with(';') || after.starts_with("as "));
        rooted && (after.starts_with("::") || imported)
    }

    /// One past the end of the item at `at`: its closing brace, or its semicolon.
    fn item_end(&self, at: usize) -> usize {
        let mut depth = 0usize;
        for (offset, byte) in self.code.bytes().enumerate().skip(at) {
            match byte {
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' if depth == 0 => return offset,
                b')' | b']' => depth -= 1,
                b'}' => {
                    depth -= 1;
                    let used = self.code[offset + 1..].starts_with(';');
                    if depth == 0 {
                        return offset + 1 + usize::from(used);
                    }
                }
                b';' if depth == 0 => return offset + 1,
                _ => {}
            }
        }
        self.code.len()
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn identifier(text: &str) -> &str {
    let text = text.trim_start();
    &text[..text.bytes().position(|b| !is_word(b)).unwrap_or(text.len())]
}

/// Replaces comments, strings and characters by spaces, newlines kept.
fn blank_prose(text: &str) -> String {
    let mut code = text.as_bytes().to_vec();
    let mut at = 0;
    while at < code.len() {
        let end = prose_end(text, at).min(code.len());
        if end == at {
            at += 1;
            continue;
        }
        code[at..end].iter_mut().filter(|b| **b != b'\n').for_each(|b| *b = b' ');
        at = end;
    }
    String::from_utf8(code).expect("only whole literals and comments were replaced, by ASCII")
}

/// Where the comment or literal that starts at `at` ends; `at` itself if none starts there.
fn prose_end(text: &str, at: usize) -> usize {
    let rest = &text.as_bytes()[at..];
    let word_before = at > 0 && is_word(text.as_bytes()[at - 1]);
    match rest {
        [b'/', b'/', ..] => at + rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => at + block_comment_len(rest),
        [b'"', ..] => at + string_len(rest),
        [b'b' | b'c', b'r', b'"' | b'#', ..] if !word_before => at + 1 + raw_string_len(&rest[1..]),
        [b'r', b'"' | b'#', ..] if !word_before => at + raw_string_len(rest),
        [b'\'', b'\\', ..] => at + 3 + rest[3..].iter().position(|b| *b == b'\'').map_or(0, |i| i + 1),
        [b'\'', first, ..] => {
            let width = if first.is_ascii() { 1 } else { first.leading_ones() as usize };
            if rest.get(1 + width) == Some(&b'\'') { at + 2 + width } else { at }
        }
        _ => at,
    }
}

fn block_comment_len(rest: &[u8]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at + 1 < rest.len() {
        match &rest[at..at + 2] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

fn string_len(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != b'"' {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// The length of `r#"…"#`; 0 for a raw name such as `r#type`.
fn raw_string_len(rest: &[u8]) -> usize {
    let hashes = rest[1..].iter().take_while(|b| **b == b'#').count();
    if rest.get(1 + hashes) != Some(&b'"') {
        return 0;
    }
    let closing = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let body = &rest[hashes + 2..];
    let len = body.windows(closing.len()).position(|w| w == closing).unwrap_or(body.len());
    hashes + 2 + len + closing.len()
}

/// Every rule against a sample that breaks it and one that does not.
mod rules {
    use super::*;

    const TABLE: &str =
        "| 1 | `cli` | x |\n| 2 | `backup` `mount` | x |\n| 3 | `repo` | x |\n| 4 | `pg` `clock` | x |";

    /// The rules that object to `text` as the file `path`, headers aside.
    fn objections(path: &str, text: &str) -> Vec<String> {
        let source = Source::new(path, &format!("//! A file.\n//! Its header.\n{text}"));
        source_findings(&source, &Layers::parse(TABLE)).iter().map(ToString::to_string).collect()
    }

    #[track_caller]
    fn caught(rule: &str, path: &str, text: &str) {
        let found = objections(path, text);
        assert!(
            found.iter().any(|f| f.contains(&format!(": {rule}: "))),
            "{rule} missed {text:?}: {found:?}"
        );
    }

    #[track_caller]
    fn fine(path: &str, text: &str) {
        assert_eq!(objections(path, text), Vec::<String>::new(), "{text:?}");
    }

    #[test]
    fn layers() {
        for bad in [
            "use crate::backup::Plan;",
            "use crate::mount::Tree;",
            "fn f(x: crate::cli::Args) {}",
            "pub(crate) use crate::cli;",
            "use crate::*;",
            "use crate::{pg, clock};",
            "use crate::Error;",
            "use super::super::backup::Plan;",
            "#[cfg(test)]\nmod tests {\n    use super::super::super::pg::Lsn;\n}",
            "#[cfg(test)]\nmod tests {\n    use crate::cli::main;\n}",
        ] {
            caught("layers", "src/repo/pack.rs", bad);
        }
        caught("layers", "src/backup/plan.rs", "use crate::mount::Tree;");
        caught("layers", "src/repo/mod.rs", "use super::backup;");
        caught("layers", "src/clock.rs", "use super::pg::Lsn;");
        fine(
            "src/repo/pack.rs",
            "use crate::pg::{Lsn, Page};\nuse crate::repo::layout;\nuse super::chunk::Chunk;",
        );
        fine("src/repo/mod.rs", "#[cfg(test)]\nmod tests {\n    use super::Pack;\n}");
        fine("src/repo/pack.rs", "#[cfg(test)]\nmod tests {\n    use super::super::Chunk;\n}");
        fine("src/repo/pack.rs", "// as crate::cli does\nconst S: &str = \"use crate::cli\";");
    }

    #[test]
    fn imports() {
        caught("imports", "src/repo/pack.rs", "use crate::pg::Lsn;\nuse crate::pg::Page;");
        caught("imports", "src/repo/pack.rs", "pub use crate::pg::Lsn;\nuse crate::pg::Page;");
        caught("imports", "src/repo/pack.rs", "use crate::pg::{A, B};\nuse crate::pg::{C, D};");
        caught("imports", "src/repo/pack.rs", "use crate::pg::page::A;\nuse crate::pg::page::B;");
        fine("src/repo/pack.rs", "use crate::pg::Lsn;\nuse crate::pg::page::{Page, PageNumber};");
        fine(
            "src/repo/pack.rs",
            "use crate::pg::Lsn;\n#[cfg(test)]\nmod tests {\n    use crate::pg::Page;\n}",
        );
        fine("src/repo/pack.rs", "use crate::repo::layout::Key;\nuse crate::repo::chunk::Chunk;");
    }

    #[test]
    fn header() {
        let check = |path: &str, text: &str| super::header(&Source::new(path, text)).len();
        assert_eq!(check("src/repo/pack.rs", "//! One line.\nfn f() {}"), 1);
        assert_eq!(check("src/repo/pack.rs", "fn f() {}\n//! Late.\n//! Later."), 1);
        assert_eq!(check("src/repo/pack.rs", &"//! Too much.\n".repeat(16)), 1);
        assert_eq!(check("src/repo/mod.rs", "mod pack;"), 1);
        assert_eq!(check("src/repo/mod.rs", "//! One line.\n"), 0);
        assert_eq!(check("src/repo/pack.rs", &"//! Enough.\n".repeat(15)), 0);
    }

    #[test]
    fn documentation() {
        caught("documentation", "src/repo/pack.rs", "pub fn open() {}");
        caught(
            "documentation",
            "src/repo/pack.rs",
            "/// A pack.\npub struct Pack;\n#[derive(Debug)]\npub struct B;",
        );
        caught("documentation", "src/repo/pack.rs", "impl Pack {\n    pub async fn open() {}\n}");
        fine(
            "src/repo/pack.rs",
            "/// A pack.\n#[derive(\n    Debug,\n)]\npub struct Pack {\n    pub bytes: u64,\n}",
        );
        fine("src/repo/pack.rs", "fn inner() {}\npub mod chunk;\npub use super::Pack;");
        fine("src/repo/pack.rs", "#[cfg(test)]\nmod tests {\n    pub fn open() {}\n}");
    }

    #[test]
    fn lengths() {
        let function = |lines: usize| format!("fn long() {{\n{}}}\n", "    f(\"}\");\n".repeat(lines - 2));
        caught("function length", "src/repo/pack.rs", &function(FUNCTION_LINES_MAX + 1));
        caught("function length", "tests/mount/main.rs", &function(FUNCTION_LINES_MAX + 1));
        fine("src/repo/pack.rs", &function(FUNCTION_LINES_MAX));
        let constants = "const A: u8 = 1;\n".repeat(FILE_LINES_MAX - 2);
        fine("src/repo/pack.rs", &constants);
        fine("src/repo/pack.rs", &format!("{constants}#[cfg(test)]\nmod tests {{\n{constants}}}\n"));
        caught("file length", "src/repo/pack.rs", &format!("{constants}const B: u8 = 1;\n"));
        let early = format!("#[cfg(test)]\nuse super::A;\n{constants}const B: u8 = 1;\n");
        caught("file length", "src/repo/pack.rs", &early);
    }

    #[test]
    fn panics() {
        caught("panics", "src/repo/pack.rs", "fn f() { g().unwrap(); }");
        caught("panics", "src/repo/pack.rs", "fn f() { panic!(\"no\"); }");
        caught("panics", "src/repo/pack.rs", "#[cfg(test)]\nmod tests {}\nfn f() { g().unwrap(); }");
        fine("src/repo/pack.rs", "#[cfg(test)]\nmod tests {\n    fn f() { g().unwrap(); }\n}");
        fine("src/repo/pack.rs", "/// Never `.unwrap()`.\nfn f() { g().unwrap_or_default(); }");
    }

    #[test]
    fn a_file_declared_as_tests_is_tests() {
        let text = "//! A file.\n//! Its header.\nfn f() { g().unwrap(); }";
        let parent = "//! Repo.\n#[cfg(test)]\nmod sample;\nmod pack;";
        let paths = ["src/repo/sample.rs", "src/repo/sample/deep.rs", "src/repo/pack.rs"];
        let mut files: BTreeMap<String, String> = paths.map(|p| (p.to_owned(), text.to_owned())).into();
        files.insert("src/repo/mod.rs".into(), parent.into());
        let sources = Source::of_tree(&files);
        let untidy = sources.iter().filter(|s| !super::panics(s).is_empty()).map(|s| s.path.as_str());
        assert_eq!(untidy.collect::<Vec<_>>(), ["src/repo/pack.rs"]);
    }

    #[test]
    fn names() {
        caught("names", "src/repo/utils.rs", "");
        caught("names", "src/helpers/pack.rs", "");
        caught("names", "src/repo/mod.rs", "mod common;");
        caught("names", "tests/common/mod.rs", "");
        fine("src/repo/mod.rs", "mod commonplace;");
    }

    #[test]
    fn unfinished() {
        for bad in ["todo!()", "unimplemented!(\"later\")", "dbg!(x)"] {
            caught("unfinished", "src/repo/pack.rs", &format!("fn f() {{ {bad} }}"));
        }
        caught("unfinished", "tests/mount/main.rs", "#[ignore]\n#[test]\nfn f() {}");
        caught("unfinished", "tests/mount/main.rs", "#[ignore = \"slow\"]\n#[test]\nfn f() {}");
        fine("src/repo/pack.rs", "// todo!\nfn f() { not_todo!(\"todo!\") }");
    }

    #[test]
    fn confinement() {
        for bad in [
            "use object_store::path::Path;",
            "fn f() { zstd::decode(b\"\"); }",
            "use snap;",
            "use toml as t;",
        ] {
            caught("confinement", "src/repo/pack.rs", bad);
        }
        caught("confinement", "src/mount/tree.rs", "use fuser::Request;");
        caught(
            "confinement",
            "src/backup/source.rs",
            "#[cfg(test)]\nmod tests {\n    use tokio_postgres::Client;\n}",
        );
        fine("src/mount/fuse/mod.rs", "use fuser::Request;");
        fine("src/storage/s3.rs", "use object_store::ObjectStore;");
        fine("src/repo/pack.rs", "use crate::pg::toml::Row;\nfn f(toml: u8, clap: u8) -> u8 { toml + clap }");
    }

    #[test]
    fn effects() {
        for bad in [
            "jiff::Timestamp::now()",
            "tokio::time::Instant::now()",
            "std::time::SystemTime::now()",
            "start.elapsed()",
        ] {
            caught("clock", "src/repo/pack.rs", &format!("fn f() {{ {bad}; }}"));
        }
        for bad in ["std::env::var(\"A\")", "std::env::vars()", "env::var_os(\"A\")"] {
            caught("environment", "src/cli/mod.rs", &format!("fn f() {{ {bad}; }}"));
        }
        for bad in ["println!(\"a\")", "eprint!(\"a\")", "std::io::stdout().lock()"] {
            caught("printing", "src/repo/pack.rs", &format!("fn f() {{ {bad}; }}"));
        }
        caught("object keys", "src/wal/push.rs", "use crate::storage::ObjectKey;");
        for bad in ["self.store.delete(key)", "repository.store().delete(key)"] {
            caught("deletion", "src/wal/push.rs", &format!("fn f() {{ {bad}; }}"));
        }
        fine("src/clock.rs", "fn f() { Timestamp::now(); }");
        fine("src/config/mod.rs", "fn f() { std::env::var(\"A\"); }");
        fine("src/cli/list.rs", "fn f() { println!(\"a\"); }");
        fine(
            "src/repo/pack.rs",
            "#[cfg(test)]\nmod tests {\n    fn f() { println!(\"{:?}\", Instant::now()); }\n}",
        );
        fine("src/repo/pack.rs", "const V: &str = env!(\"CARGO_PKG_VERSION\");");
    }

    #[test]
    fn the_table_of_modules_is_compared_both_ways() {
        let layers = Layers::parse("| row | modules |\n|---|---|\n| 1 | `cli` |\n| 2 | `pg` `clock` |");
        assert!(layers.compare("pub mod pg;\npub mod clock;\npub mod cli;").is_empty());
        assert_eq!(layers.compare("pub mod pg;\npub mod cli;").len(), 1);
        assert_eq!(layers.compare("pub mod pg;\npub mod clock;\npub mod cli;\npub mod wal;").len(), 1);
    }

    #[test]
    fn every_dependency_has_a_place() {
        assert_eq!(dependencies("[dependencies]\nleft-pad = \"1\"\n").len(), 1);
        assert_eq!(dependencies("[dev-dependencies]\nleft-pad = { version = \"1\" }\n").len(), 1);
        assert!(dependencies("[package]\nname = \"walden\"\n[dependencies]\nzstd = \"1\"\n").is_empty());
    }

    #[test]
    fn comments_and_literals_are_blanked_and_nothing_else() {
        let text =
            "a /* b /* c */ d */ e // f\n\"g\\\"h\" 'i' '\\'' 'é' &'static r#\"j\"k\"# br\"l\" r#type b'm' z";
        let code = blank_prose(text);
        assert_eq!(code.len(), text.len());
        let left: Vec<&str> = code.split_whitespace().collect();
        assert_eq!(left, ["a", "e", "&'static", "r#type", "b", "z"]);
    }

    #[test]
    fn commands_of_a_document() {
        let document = "x\n```sh\nscripts/demo   # shows it\n\n# a remark\nscripts/test\n```\n```text\nscripts/no\n```\n";
        assert_eq!(shell_commands(document), ["scripts/demo", "scripts/test"]);
    }
}
