//! What is written ahead of a fetch: handed out for what it is, and nothing is left of the rest.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use bytes::Bytes;

use super::held::settle;
use super::{Archive, Duration, FetchOptions, Repository, Server, fs, name, repo, segment};
use crate::wal::fetch::find;
use crate::wal::written_ahead::WrittenAhead;

impl Server {
    async fn found<O>(&self, archive: &Archive<O>, number: u64) -> Bytes
    where
        O: AsyncFn() -> Result<Repository, repo::Error>,
    {
        let options = FetchOptions {
            data_directory: self.folder.path().to_owned(),
            name: name(1, number).parse().unwrap(),
            target: self.path("pg_wal/RECOVERYXLOG"),
            wait: Duration::from_millis(1),
        };
        find(&options, archive).await.unwrap().unwrap()
    }

    /// Begins a file as a fetch does, of a mode.
    fn wanted(&self, mode: u32) -> File {
        let file = File::create(self.path(&format!("wanted-{mode:o}"))).unwrap();
        file.set_permissions(fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    fn names_in_pg_wal(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("pg_wal")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[tokio::test]
async fn the_next_segments_are_written_before_they_are_asked_for() {
    let server = Server::new();
    server.push_segments(1, 2..=6).await;
    let archive = server.held();
    let written = WrittenAhead::new(server.folder.path());
    let wanted = server.wanted(0o600);
    let first = name(1, 2).parse().unwrap();
    written.follow(first, &archive).await;
    assert!(
        written.take(name(1, 3).parse().unwrap(), &Bytes::new(), &wanted).await.is_none(),
        "nothing is open"
    );
    for number in 2..=6 {
        let found = server.found(&archive, number).await;
        let file = written.take(name(1, number).parse().unwrap(), &found, &wanted).await;
        assert_eq!(file.is_some(), number > 2, "{number}");
        if let Some(file) = file {
            let mut content = vec![0; found.len()];
            file.read_exact_at(&mut content, 0).unwrap();
            assert!(content == segment(1, number), "{number}");
            let metadata = file.metadata().unwrap();
            assert_eq!((metadata.nlink(), metadata.len()), (0, found.len() as u64));
            let again = written.take(name(1, number).parse().unwrap(), &found, &wanted).await;
            assert!(again.is_none(), "it is somebody else's now");
        }
        written.follow(name(1, number).parse().unwrap(), &archive).await;
        settle().await;
        assert!(server.names_in_pg_wal().is_empty());
    }
}

#[tokio::test]
async fn a_file_is_taken_for_the_very_bytes_that_it_was_written_of_and_for_no_other() {
    let server = Server::new();
    server.push_segments(1, 2..=6).await;
    let archive = server.held();
    let written = WrittenAhead::new(server.folder.path());
    let wanted = server.wanted(0o600);
    let follow = async || {
        server.found(&archive, 2).await;
        written.follow(name(1, 2).parse().unwrap(), &archive).await;
        settle().await;
    };
    follow().await;
    // Equal, and read by somebody else.
    let found = Bytes::from(server.found(&archive, 3).await.to_vec());
    assert!(written.take(name(1, 3).parse().unwrap(), &found, &wanted).await.is_none());
    // Opened anew, as after every failure: what was read before is not what is found.
    archive.release().await;
    let found = server.found(&archive, 4).await;
    assert!(written.take(name(1, 4).parse().unwrap(), &found, &wanted).await.is_none());
    // For a file of another mode, and what is not written ahead.
    follow().await;
    let found = server.found(&archive, 3).await;
    assert!(written.take(name(1, 3).parse().unwrap(), &found, &server.wanted(0o640)).await.is_none());
    let found = server.found(&archive, 6).await;
    assert!(written.take(name(1, 6).parse().unwrap(), &found, &wanted).await.is_none());
    assert!(written.take("00000002.history".parse().unwrap(), &found, &wanted).await.is_none());
    // Given up, by jumping elsewhere or altogether.
    follow().await;
    written.follow(name(1, 4).parse().unwrap(), &archive).await;
    let found = server.found(&archive, 3).await;
    assert!(written.take(name(1, 3).parse().unwrap(), &found, &wanted).await.is_none());
    follow().await;
    written.clear();
    let found = server.found(&archive, 3).await;
    assert!(written.take(name(1, 3).parse().unwrap(), &found, &wanted).await.is_none());
}

#[tokio::test]
async fn where_nothing_can_be_written_ahead_a_fetch_goes_on_without() {
    let server = Server::new();
    server.push_segments(1, 2..=4).await;
    let archive = server.held();
    let written = WrittenAhead::new(server.folder.path());
    server.found(&archive, 2).await;
    // A folder without room, in which no file can be made either.
    fs::remove_dir(server.path("pg_wal")).unwrap();
    symlink("/proc/self", server.path("pg_wal")).unwrap();
    written.follow(name(1, 2).parse().unwrap(), &archive).await;
    settle().await;
    let found = server.found(&archive, 3).await;
    assert!(found == segment(1, 3));
    assert!(written.take(name(1, 3).parse().unwrap(), &found, &server.wanted(0o600)).await.is_none());
}
