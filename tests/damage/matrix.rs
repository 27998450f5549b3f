//! Every kind of object, damaged in every way, met by the library and by the commands that only read.
//!
//! A case names the object, what befalls it, and the words by which an error has to name it. What is read is
//! compared with the undamaged repository file by file: equal, or refused for damage, and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use walden::clock::SystemClock;
use walden::codec::{Digest, RecipientPrivateKey, SystemRandom, VerifyKey};
use walden::repo::entry::{Content, Node};
use walden::repo::{Basebackup, Error, ErrorKind, FileReader, Keyring, KeyringOptions, Repository};
use walden::storage::LocalStore;

use crate::damage::{At, Damage, write};
use crate::mounted::{Tree, assert_mount_is_honest};
use crate::source::Source;
use crate::support::repository::site_options;
use crate::support::{Need, Site, require};

/// One row of the matrix.
#[derive(Debug)]
pub struct Case {
    pub kind: Kind,
    pub object: PathBuf,
    pub damage: Damage,
    /// What an error says to name the object, any of these.
    pub names: Vec<String>,
}

/// What the object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Site,
    Begin,
    Outcome,
    Manifest,
    Refs,
    Pack,
}

/// What was read: the digest of each file's content, or why it could not be.
pub type Contents = BTreeMap<String, Result<Digest, Error>>;

#[tokio::test]
async fn a_damaged_object_is_refused_by_name_and_never_read_as_something_else() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = Source::create(|site: Site| site);
    let pristine = read_all(&source).await;
    assert!(pristine.values().all(Result::is_ok) && pristine.len() > 1000, "{} files", pristine.len());
    let listing = source.walden.run(&["show", "latest", "--files"]).stdout;
    let tree = Tree::of_mount(&source);
    for case in cases(&source) {
        source.restore();
        case.damage.inflict(&case.object);
        let read = read_all(&source).await;
        assert_right_or_refused(&case, &pristine, &read);
        assert_list_tells(&source, &case);
        assert_show_tells(&source, &case, &listing);
        if case.is_worth_a_mount() {
            assert_mount_is_honest(&source, &case, &tree);
        }
    }
}

#[tokio::test]
async fn an_expired_basebackup_is_gone_from_everywhere_and_the_others_are_not() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = Source::create(Site::unencrypted);
    let pristine = read_all(&source).await;
    write(&source.basebackup(1).join("expired"), b"{}\n");
    let read = read_all(&source).await;
    assert!(matches!(read[&source.ids[1]], Err(Error::Expired(_))));
    let kept = read.iter().filter(|(name, _)| name.starts_with(&source.ids[0]));
    assert!(kept.clone().count() > 500);
    for (name, content) in kept {
        assert_eq!(content.as_ref().unwrap(), pristine[name].as_ref().unwrap(), "{name}");
    }
    let list = source.walden.run(&["list"]).stdout;
    assert!(list.contains(&source.ids[0]) && !list.contains(&source.ids[1]), "{list}");
    let show = source.walden.run(&["show", "latest"]).stdout;
    assert!(show.contains(&source.ids[0]), "{show}");
    source.walden.try_run(&["show", &source.ids[1]]).expect_code(1);
    let created = source
        .walden
        .as_root()
        .try_run(&["clone", "create", "gone", "--backup", &source.ids[1]])
        .expect_code(1);
    assert!(created.stderr.contains("there is no basebackup"), "{}", created.stderr);
}

/// Every kind of object × every damage.
fn cases(source: &Source) -> Vec<Case> {
    let newer = source.basebackup(1);
    let packs = source.packs(1);
    let (first, last) = (packs[0].clone(), packs[packs.len() - 1].clone());
    let theirs = |leaf: &str| source.basebackup(0).join(leaf);
    let mut cases = Vec::new();
    let mut add = |kind: Kind, object: &PathBuf, more: Vec<Damage>| {
        for damage in Damage::ALONE.into_iter().chain(more) {
            let names = names(kind, &source.ids[1]);
            cases.push(Case { kind, object: object.clone(), damage, names });
        }
    };
    for (kind, leaf) in [
        (Kind::Begin, "begin"),
        (Kind::Outcome, "backup.json"),
        (Kind::Manifest, "manifest"),
        (Kind::Refs, "refs"),
    ] {
        add(kind, &newer.join(leaf), vec![Damage::ReplaceBy(theirs(leaf))]);
    }
    add(Kind::Site, &source.site().join("site.json"), Vec::new());
    let mut swaps = vec![Damage::ReplaceBy(source.packs(0)[0].clone())];
    swaps.extend((packs.len() > 1).then(|| Damage::SwapWith(last.clone())));
    add(Kind::Pack, &first, swaps);
    if packs.len() > 1 {
        add(Kind::Pack, &last, Vec::new());
    }
    cases
}

fn names(kind: Kind, id: &str) -> Vec<String> {
    match kind {
        Kind::Begin => Vec::new(),
        Kind::Outcome => vec![format!("backup.json of basebackup {id}"), format!("{id}/backup.json")],
        Kind::Manifest => vec![format!("manifest of basebackup {id}"), format!("{id}/manifest")],
        Kind::Refs => vec![format!("refs of basebackup {id}"), format!("{id}/refs")],
        Kind::Pack => vec![format!("of basebackup {id}"), format!("{id}/packs/")],
        // A site that claims to be another one makes strangers of all its objects.
        Kind::Site => vec!["site.json".to_owned(), "is not trusted".to_owned()],
    }
}

impl Case {
    /// Says whether nothing that is read comes from what was damaged: headers of packs are for repair.
    fn may_be_harmless(&self) -> bool {
        let slack = matches!(self.damage, Damage::Flip(At::First) | Damage::Extend);
        match self.kind {
            Kind::Begin => true,
            Kind::Pack => slack,
            // What follows the pinned size is never asked for.
            Kind::Manifest => self.damage == Damage::Extend,
            Kind::Site | Kind::Outcome | Kind::Refs => false,
        }
    }

    /// Mounts are slower than calls: one of each sort.
    fn is_worth_a_mount(&self) -> bool {
        let sort = matches!(
            self.damage,
            Damage::Flip(At::Middle)
                | Damage::Truncate
                | Damage::Remove
                | Damage::ReplaceBy(_)
                | Damage::SwapWith(_)
        );
        sort && !matches!(self.kind, Kind::Site | Kind::Begin)
    }

    pub fn is_named_in(&self, text: &str) -> bool {
        self.names.iter().any(|name| text.contains(name))
    }

    fn is_removed_outcome(&self) -> bool {
        self.kind == Kind::Outcome && self.damage == Damage::Remove
    }
}

fn assert_right_or_refused(case: &Case, pristine: &Contents, read: &Contents) {
    let mut refused = 0;
    for (name, content) in read {
        match content {
            Ok(digest) => {
                let right = pristine.get(name).unwrap_or_else(|| panic!("{case:?}: {name} came to be"));
                assert_eq!(digest, right.as_ref().unwrap(), "{case:?}: {name} has other bytes");
            }
            Err(Error::Incomplete(_)) if case.is_removed_outcome() => refused += 1,
            Err(error) if case.kind == Kind::Site && case.damage == Damage::Remove => {
                assert!(error.is_absent(), "{error}");
                refused += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Damaged, "{case:?}: {name}: {error:?}");
                assert!(case.is_named_in(&error.to_string()), "{case:?}: {name}: {error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0 || case.may_be_harmless(), "{case:?} was not noticed");
    assert!(refused > 0 || read.len() == pristine.len(), "{case:?}: files are missing");
}

fn assert_list_tells(source: &Source, case: &Case) {
    let list = source.walden.try_run(&["list"]);
    match (case.kind, &case.damage) {
        (Kind::Site, Damage::Remove) => {
            assert!(list.expect_code(1).stderr.contains("there is no site \"main\""));
        }
        (Kind::Outcome, Damage::Remove) => {
            let wanted = format!("{}: running, or killed", source.ids[1]);
            assert!(list.expect_code(0).stdout.contains(&wanted));
        }
        (Kind::Site, _) => {
            let list = list.expect_code(3);
            assert!(case.is_named_in(&(list.stdout + &list.stderr)), "{case:?}");
        }
        (Kind::Outcome, _) => {
            let list = list.expect_code(3);
            assert!(list.stdout.contains(&source.ids[0]), "the other one is hidden: {}", list.stdout);
            assert!(case.is_named_in(&list.stdout), "{case:?}: {}", list.stdout);
            assert!(
                list.stderr.contains("1 basebackups have a damaged or untrusted record"),
                "{}",
                list.stderr
            );
        }
        _ => {
            let list = list.expect_code(0);
            assert!(source.ids.iter().all(|id| list.stdout.contains(id)), "{case:?}: {}", list.stdout);
        }
    }
}

fn assert_show_tells(source: &Source, case: &Case, pristine: &str) {
    let show = source.walden.try_run(&["show", &source.ids[1], "--files"]);
    match (case.kind, &case.damage) {
        (Kind::Site | Kind::Outcome, Damage::Remove) => {
            show.expect_code(1);
        }
        (Kind::Begin | Kind::Pack, _) | (Kind::Manifest, Damage::Extend) => {
            assert_eq!(show.expect_code(0).stdout, pristine, "{case:?}");
        }
        (Kind::Site | Kind::Outcome | Kind::Manifest | Kind::Refs, _) => {
            let show = show.expect_code(3);
            assert!(case.is_named_in(&show.stderr), "{case:?}: {}", show.stderr);
        }
    }
}

/// Opens the repository as the commands do and reads every file of both basebackups.
pub async fn read_all(source: &Source) -> Contents {
    let mut contents = Contents::new();
    let repository = match open(source).await {
        Ok(repository) => repository,
        Err(error) => return Contents::from([("the site".to_owned(), Err(error))]),
    };
    for id in &source.ids {
        if let Err(error) = read_basebackup(&repository, id, &mut contents).await {
            contents.insert(id.clone(), Err(error));
        }
    }
    contents
}

async fn open(source: &Source) -> Result<Repository, Error> {
    let folder = source.walden.repository().with_file_name("");
    let key = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let keyring = Keyring::new(KeyringOptions {
        recipients: Vec::new(),
        wal_recipients: Vec::new(),
        signer: None,
        trusted_signers: key("test.verify.pem").iter().map(|pem| VerifyKey::from_pem(pem).unwrap()).collect(),
        private_keys: key("test.pem").iter().map(|pem| RecipientPrivateKey::from_pem(pem).unwrap()).collect(),
        random: Arc::new(SystemRandom),
    });
    let store = LocalStore::open(&source.walden.repository(), &SystemClock).unwrap();
    Repository::open(site_options(store, keyring, SystemClock)).await
}

async fn read_basebackup(repository: &Repository, id: &str, contents: &mut Contents) -> Result<(), Error> {
    let basebackup = Arc::new(Basebackup::open(repository, id.parse().unwrap()).await?);
    let reader = FileReader::new(basebackup.clone(), 16 << 20);
    for n in 0..basebackup.block_count() {
        for entry in basebackup.block(n).await?.iter() {
            let Node::File { content, .. } = &entry.node else { continue };
            // Nothing of the packs is in these.
            let inline = matches!(content, Content::Inline(_));
            let read = reader.read(entry, 0..entry.size()).await;
            assert!(!inline || read.is_ok());
            contents.insert(format!("{id}/{}", entry.path), read.map(|bytes| Digest::of(&bytes)));
        }
    }
    Ok(())
}
