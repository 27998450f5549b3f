//! The replication connection against a real server: who may log in how, and what the commands answer.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use walden::replication::{ConnectOptions, Error, ReplicationConnection, Session, Started};

use crate::session::runtime;
use crate::support::{Cluster, Need, Run, require};

const HBA: &str = "local all all trust\n\
    hostssl replication scram 127.0.0.1/32 scram-sha-256\n\
    hostssl replication clear 127.0.0.1/32 password\n\
    hostnossl replication scram 127.0.0.1/32 scram-sha-256\n\
    hostnossl replication md 127.0.0.1/32 md5\n";

fn cluster_with_tls() -> Cluster {
    let mut cluster = Cluster::start(15);
    let (key, certificate) =
        (cluster.data_directory().join("server.key"), cluster.data_directory().join("server.crt"));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-new", "-x509", "-days", "2", "-nodes", "-subj", "/CN=localhost"]);
    openssl.args(["-addext", "subjectAltName=DNS:localhost", "-out"]).arg(&certificate);
    Run::of(openssl.arg("-keyout").arg(&key), "").expect_success();
    for file in [&certificate, &key] {
        cluster.scratch().account().own(file);
    }
    cluster.sql("create role scram login replication password 'secret'");
    cluster.sql("create role clear login replication password 'secret'");
    cluster.sql("set password_encryption = md5; create role md login replication password 'secret'");
    cluster.sql("alter system set ssl = on");
    cluster.set("listen_addresses", "127.0.0.1");
    fs::write(cluster.data_directory().join("pg_hba.conf"), HBA).unwrap();
    cluster.restart();
    cluster
}

#[test]
fn a_replication_login_is_as_strict_as_its_settings_say() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster_with_tls();
    let roots = cluster.data_directory().join("server.crt");
    let log_in = |user: &str, rest: &str| {
        let rest = rest.replace("ROOTS", &roots.display().to_string());
        let text = format!(
            "host=localhost hostaddr=127.0.0.1 port={} user={user} passfile=/nonexistent {rest}",
            cluster.port
        );
        runtime().block_on(async {
            let mut connection = ReplicationConnection::connect(&ConnectOptions::new(text)).await?;
            connection.identify().await
        })
    };
    let identity = log_in("scram", "password=secret sslmode=verify-full sslrootcert=ROOTS").unwrap();
    let own = cluster.sql("select system_identifier from pg_control_system()");
    assert_eq!(identity.system_identifier.to_string(), own);
    // Only SCRAM-SHA-256-PLUS binds the exchange to the channel.
    log_in("scram", "password=secret sslmode=require channel_binding=require").unwrap();
    log_in("scram", "password=secret sslmode=require channel_binding=disable").unwrap();
    log_in("scram", "password=secret sslmode=disable").unwrap();
    log_in("md", "password=secret sslmode=disable").unwrap();
    log_in("clear", "password=secret sslmode=require").unwrap();
    for (user, rest) in [
        ("scram", "password=wrong sslmode=require"),
        ("scram", "sslmode=require"),
        ("scram", "password=secret sslmode=disable channel_binding=require"),
        // A password that is sent as it is binds nothing, and must not be sent then.
        ("clear", "password=secret sslmode=require channel_binding=require"),
        ("md", "password=wrong sslmode=disable"),
        ("md", "password=secret sslmode=require"),
    ] {
        let refused = log_in(user, rest).unwrap_err();
        assert!(matches!(refused, Error::AuthenticationFailed { .. }), "{user} {rest}: {refused}");
    }
    let stranger = log_in("scram", "password=secret sslmode=verify-full sslrootcert=system").unwrap_err();
    assert!(matches!(stranger, Error::Tls { .. }), "{stranger}");

    let passwords = cluster.scratch().path().join("passwords");
    fs::write(&passwords, format!("localhost:{}:replication:scram:secret\n", cluster.port)).unwrap();
    fs::set_permissions(&passwords, fs::Permissions::from_mode(0o600)).unwrap();
    log_in("scram", &format!("sslmode=require passfile={}", passwords.display())).unwrap();
}

#[test]
fn commands_answer_what_the_server_is_and_refuse_what_it_has_not() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    runtime().block_on(async {
        let options = ConnectOptions::new(cluster.connection());
        let mut connection = ReplicationConnection::connect(&options).await.unwrap();
        assert_eq!(connection.setting("wal_segment_size").await.unwrap(), "16MB");
        // Whatever the user or the server says, the one beside a session may be idle for as long as it takes.
        let impatient =
            ConnectOptions::new(format!("{} options='-c idle_session_timeout=7s'", cluster.connection()));
        let other =
            ReplicationConnection::connect(&impatient).await.unwrap().setting("idle_session_timeout").await;
        assert_eq!(other.unwrap(), "7s");
        let session = Session::connect(&impatient).await.unwrap();
        let server = (session.address(), session.version());
        let mut beside = ReplicationConnection::connect_beside(&impatient, server, "beside").await.unwrap();
        assert_eq!(beside.setting("idle_session_timeout").await.unwrap(), "0");
        assert_eq!(beside.setting("application_name").await.unwrap(), "beside");
        connection.create_slot("odd name").await.unwrap_err();
        connection.create_slot("ours").await.unwrap();
        let twice = connection.create_slot("ours").await.unwrap_err();
        assert_eq!(twice.sqlstate(), Some("42710"));
        // An error leaves the connection as it was.
        let timeline = connection.identify().await.unwrap().timeline;
        assert_eq!(connection.history(timeline).await.unwrap_err().sqlstate(), Some("58P01"));
        connection.drop_slot("ours").await.unwrap();
        let behind = walden::pg::Lsn(1 << 60);
        let Started::Streaming(mut stream) =
            connection.start_streaming(None, behind, timeline).await.unwrap()
        else {
            panic!("the timeline has not ended");
        };
        assert!(matches!(stream.next().await, Err(Error::Sql { .. })), "nobody has that yet");
    });
    assert_eq!(cluster.sql("select count(*) from pg_replication_slots"), "0");
}
