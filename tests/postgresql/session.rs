//! The SQL session against real servers: versions, TLS, peer authentication, a lost connection.

use std::fs;
use std::process::Command;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use walden::replication::{ConnectOptions, Error, Param, Session};

use crate::support::{Cluster, Need, Run, require};

fn connect(options: &ConnectOptions) -> Result<Session, Error> {
    runtime().block_on(Session::connect(options))
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_session_speaks_to_13_without_timeouts() {
    a_session_is_set_up(13);
}

#[test]
fn a_session_speaks_to_15_without_timeouts() {
    a_session_is_set_up(15);
}

#[test]
fn a_session_speaks_to_18_without_timeouts() {
    a_session_is_set_up(18);
}

fn a_session_is_set_up(major: u32) {
    require!(Need::PostgreSQL(major));
    let cluster = Cluster::start(major);
    cluster
        .sql("alter role postgres set statement_timeout = '5s'; alter role postgres set search_path = 'x'");
    cluster.sql("alter role postgres set idle_in_transaction_session_timeout = '5s'");
    runtime().block_on(async {
        let session = Session::connect(&ConnectOptions::new(cluster.connection())).await.unwrap();
        assert_eq!(session.version().number(), major);
        let settings = session.simple("show statement_timeout; show search_path").await.unwrap();
        assert_eq!(settings, [[Some("0".to_owned())], [Some("pg_catalog".to_owned())]]);
        let sql = "select $1 as text, $2 as int, $3 as bool, null::text as none";
        let row =
            session.query_one(sql, &[Param::Text("a'b"), Param::Int(-7), Param::Bool(true)]).await.unwrap();
        assert_eq!(row.text("text").unwrap(), "a'b");
        assert_eq!((row.int("int").unwrap(), row.bool("bool").unwrap()), (-7, true));
        assert_eq!(row.text_opt("none").unwrap(), None);
        assert!(matches!(row.text("none"), Err(Error::Unexpected { .. })));
        assert!(matches!(row.unsigned::<u32>("int"), Err(Error::Unexpected { .. })));
        let refused = session.query("select 1/0", &[]).await.unwrap_err();
        assert_eq!(refused.sqlstate(), Some("22012"));
        session.query_one("select 1", &[]).await.expect("a refused statement does not end the session");
        let rows = session.query("select 1 where false", &[]).await.unwrap();
        assert!(rows.is_empty());
    });
}

#[test]
fn a_lost_session_says_so_and_stays_lost() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    runtime().block_on(async {
        let session = Session::connect(&ConnectOptions::new(cluster.connection())).await.unwrap();
        let pid = session.backend_pid();
        cluster.sql(&format!("select pg_terminate_backend({pid})"));
        let lost = session.lost().await;
        assert!(
            matches!(&lost, Error::Lost { detail } if detail.contains("terminating connection")),
            "{lost}"
        );
        let later = session.query("select 1", &[]).await.unwrap_err();
        assert!(
            matches!(&later, Error::Lost { detail } if detail.contains("terminating connection")),
            "{later}"
        );
    });
}

#[test]
fn what_a_server_refuses_is_told_apart() {
    require!(Need::PostgreSQL(18));
    let cluster = Cluster::start(18);
    cluster.sql("create role guest login password 'right'");
    let hba = cluster.data_directory().join("pg_hba.conf");
    fs::write(&hba, "local all guest scram-sha-256\nlocal all postgres trust\n").unwrap();
    cluster.sql("select pg_reload_conf()");
    let as_guest = ConnectOptions::new(cluster.connection()).with("user", "guest").unwrap();
    let missing = connect(&as_guest).unwrap_err();
    assert!(matches!(&missing, Error::AuthenticationFailed { user, .. } if user == "guest"), "{missing}");
    assert!(missing.hint().unwrap().contains(".pgpass"));
    let wrong = connect(&as_guest.with("password", "wrong").unwrap()).unwrap_err();
    assert!(matches!(wrong, Error::AuthenticationFailed { .. }), "{wrong}");
    assert!(!wrong.to_string().contains("wrong\"") && !format!("{wrong:?}").contains("password 'wrong'"));
    connect(&as_guest.with("password", "right").unwrap()).unwrap();
    let mut by_file = as_guest.clone();
    let line =
        format!("{}:*:*:guest:right\n", cluster.data_directory().parent().unwrap().join("run").display());
    by_file.passfile = Some(cluster.scratch().file("pgpass", &line));
    connect(&by_file).unwrap();
    let nowhere = connect(&as_guest.with("dbname", "nowhere").unwrap().with("password", "right").unwrap());
    assert_eq!(nowhere.unwrap_err().sqlstate(), Some("3D000"));
}

#[test]
fn the_server_wanted_is_found_among_several() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let here = ConnectOptions::new(cluster.connection());
    let socket = &cluster.connection();
    let host = socket.split_whitespace().next().unwrap().trim_start_matches("host=");
    let several = here.with("host", &format!("/nonexistent,{host}")).unwrap();
    connect(&several).unwrap();
    connect(&several.with("target_session_attrs", "primary").unwrap()).unwrap();
    connect(&several.with("target_session_attrs", "prefer-standby").unwrap()).unwrap();
    let error = connect(&several.with("target_session_attrs", "standby").unwrap()).unwrap_err();
    assert!(matches!(error, Error::WrongServer { .. }), "{error}");
}

#[test]
fn root_reaches_a_cluster_with_peer_authentication() {
    require!(Need::PostgreSQL(15), Need::Root);
    let mut cluster = Cluster::start(15);
    fs::write(cluster.data_directory().join("pg_hba.conf"), "local all all peer\n").unwrap();
    cluster.restart();
    // The owner of the socket is tried when root itself is refused.
    let options = ConnectOptions::new(cluster.connection());
    let session = connect(&options).unwrap();
    assert_eq!(session.user(), "postgres");
    let owner = cluster.scratch().account().uid;
    connect(&ConnectOptions { connect_as: Some(owner), ..options.clone() }).unwrap();
    let nobody = connect(&ConnectOptions { connect_as: Some(65534), ..options }).unwrap_err();
    assert!(!matches!(nobody, Error::Sql { .. }), "{nobody}");
    assert!(nix::unistd::geteuid().is_root());
}

#[test]
fn tls_is_as_strict_as_sslmode_says() {
    require!(Need::PostgreSQL(15));
    let key = |cluster: &Cluster| cluster.data_directory().join("server.key");
    let mut cluster = Cluster::start(15);
    let certificate = cluster.scratch().path().join("data/server.crt");
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-new", "-x509", "-days", "2", "-nodes", "-subj", "/CN=localhost"]);
    openssl.args(["-addext", "subjectAltName=DNS:localhost", "-out"]).arg(&certificate);
    Run::of(openssl.arg("-keyout").arg(key(&cluster)), "").expect_success();
    for file in [&certificate, &key(&cluster)] {
        cluster.scratch().account().own(file);
    }
    let port = cluster.port;
    cluster.sql("alter system set ssl = on");
    cluster.set("listen_addresses", "127.0.0.1");
    fs::write(
        cluster.data_directory().join("pg_hba.conf"),
        "local all all trust\nhostssl all all 127.0.0.1/32 trust\n",
    )
    .unwrap();
    cluster.restart();
    let at = |host: &str, rest: &str| {
        let roots = certificate.display();
        let rest = rest.replace("ROOTS", &roots.to_string());
        connect(&ConnectOptions::new(format!("host={host} port={port} user=postgres {rest}")))
    };
    let encrypted = at("127.0.0.1", "").unwrap();
    let sql = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
    drop(encrypted);
    runtime().block_on(async {
        let options =
            ConnectOptions::new(format!("host=127.0.0.1 port={port} user=postgres sslmode=require"));
        let session = Session::connect(&options).await.unwrap();
        assert!(session.query_one(sql, &[]).await.unwrap().bool("ssl").unwrap());
    });
    assert!(matches!(at("127.0.0.1", "sslmode=disable"), Err(Error::AuthenticationFailed { .. })));
    at("127.0.0.1", "sslmode=allow").unwrap();
    at("127.0.0.1", "sslmode=verify-ca sslrootcert=ROOTS").unwrap();
    at("localhost", "hostaddr=127.0.0.1 sslmode=verify-full sslrootcert=ROOTS").unwrap();
    let name = at("127.0.0.1", "sslmode=verify-full sslrootcert=ROOTS").unwrap_err();
    assert!(matches!(name, Error::Tls { .. }), "{name}");
    let stranger = at("localhost", "hostaddr=127.0.0.1 sslmode=verify-full sslrootcert=system").unwrap_err();
    assert!(matches!(stranger, Error::Tls { .. }), "{stranger}");
}

/// A proxy that drops `options` from the start-up packet, as poolers do, and passes everything else on.
#[test]
fn a_pooler_is_recognized() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let connection = cluster.connection();
    let socket = connection.split_whitespace().next().unwrap().trim_start_matches("host=").to_owned();
    let port = cluster.port;
    let directory = cluster.scratch().folder("pool");
    runtime().block_on(async {
        let listener = tokio::net::UnixListener::bind(directory.join(format!(".s.PGSQL.{port}"))).unwrap();
        let upstream = Arc::new(format!("{socket}/.s.PGSQL.{port}"));
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut server = tokio::net::UnixStream::connect(&*upstream).await.unwrap();
                let length = client.read_u32().await.unwrap() as usize;
                let mut packet = vec![0; length - 4];
                client.read_exact(&mut packet).await.unwrap();
                let packet = without_options(&packet);
                server.write_u32(packet.len() as u32 + 4).await.unwrap();
                server.write_all(&packet).await.unwrap();
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
            }
        });
        let options = ConnectOptions::new(&connection).with("host", directory.to_str().unwrap()).unwrap();
        let error = Session::connect(&options).await.unwrap_err();
        assert!(matches!(error, Error::Pooled { .. }), "{error}");
    });
}

fn without_options(packet: &[u8]) -> Vec<u8> {
    let mut kept = packet[..4].to_vec();
    let words: Vec<&[u8]> = packet[4..].split(|byte| *byte == 0).collect();
    for pair in words.chunks(2).filter(|pair| pair.len() == 2 && !pair[0].is_empty() && pair[0] != b"options")
    {
        for word in pair {
            kept.extend_from_slice(word);
            kept.push(0);
        }
    }
    kept.push(0);
    kept
}
