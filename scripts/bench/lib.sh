# What the benches with a real cluster share: a release build, a scratch cluster with an encrypted local repository,
# and its end, which comes with the script's whatever happens. Sourced, not run; PostgreSQL runs as user postgres.

folder='' postmaster='' bin=''

# The programs of the newest PostgreSQL that Debian has installed.
find_postgresql() {
    bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
    [ -x "$bin/pgbench" ] || { say "no PostgreSQL server: run scripts/install demo"; exit 1; }
}

build_walden() {
    find_postgresql
    say "building (release; a few minutes the first time)"
    (cd "$root" && nice cargo build --quiet --locked --release --bin walden) </dev/null 1>&2
    local target
    target=$(cd "$root" && cargo metadata --locked --no-deps --format-version 1 |
        sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    built=$target/release/walden
}

as_postgres() { setpriv --reuid postgres --regid postgres --init-groups env -C / "$@"; }
walden() { "$folder/walden" --config "$folder/walden.toml" --no-progress "$@"; }
sql() { as_postgres "$bin/psql" -XAtq -h "$folder/run" -d postgres -c "$1"; }

# The value of a field in a flat JSON document.
field() { sed -n 's/.*"'"$1"'": *"\{0,1\}\([^",}]*\).*/\1/p' <<<"$2" | head -n 1; }

# Makes a folder below $1 with keys, configuration, repository and a running cluster that archives.
start_cluster() {
    folder=$(mktemp -d "$1/walden-bench-XXXXXX")
    install -m 755 "$built" "$folder/walden"
    mkdir "$folder/run" "$folder/repository" "$folder/state"
    chown -R postgres: "$folder"
    as_postgres env -C "$folder" ./walden key create --id bench >/dev/null
    cat >"$folder/walden.toml" <<TOML
[paths]
state = "$folder/state"
run = "$folder/run"
clones = "$folder/state/clones"

[storage]
url = "file://$folder/repository"

[encryption]
recipients = ["bench"]
signer = "bench"
trusted_signers = ["bench"]
[encryption.keys.bench]
public_key_file = "bench.pub.pem"
private_key_file = "bench.pem"
signing_key_file = "bench.sign.pem"
verify_key_file = "bench.verify.pem"

[sites.bench]
data_directory = "$folder/data"
bin_directory = "$bin"
connection = "host=$folder/run user=postgres dbname=postgres"
TOML
    chmod 644 "$folder/walden.toml"
    as_postgres "$bin/initdb" -D "$folder/data" --data-checksums --no-sync --auth=trust -E UTF8 --locale=C >/dev/null
    cat >>"$folder/data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$folder/run'
fsync = off
max_wal_size = '4GB'
shared_buffers = '256MB'
archive_mode = on
archive_command = '$folder/walden --config $folder/walden.toml wal push %p'
CONF
    as_postgres "$bin/postgres" -D "$folder/data" >"$folder/server.log" 2>&1 &
    postmaster=$!
    until sql "select 1" >/dev/null 2>&1; do
        kill -0 "$postmaster" 2>/dev/null || { cat "$folder/server.log" >&2; exit 1; }
        sleep 0.1
    done
}

# Ends the current WAL segment and waits until it is archived.
archive_wal() {
    local segment
    segment=$(sql "select pg_logical_emit_message(false, 'bench', 'x'); select pg_walfile_name(pg_switch_wal())" |
        tail -n 1)
    until [ -e "$folder/data/pg_wal/archive_status/$segment.done" ]; do sleep 0.1; done
}

stop_cluster() {
    [ -n "$postmaster" ] || return 0
    # The job is a shell, and its child the server, which writes its own number down.
    kill -INT "$(head -n 1 "$folder/data/postmaster.pid")" 2>/dev/null || true
    wait "$postmaster" || true
    postmaster=''
}

remove_cluster() {
    [ -n "$folder" ] || return 0
    stop_cluster
    local clone
    for clone in "$folder"/state/clones/*/; do
        [ -d "$clone" ] && walden clone delete "$(basename "$clone")" >/dev/null 2>&1
    done
    if grep -q " $folder/" /proc/mounts; then
        say "something is still mounted below $folder; it is left as it is"
    else
        rm -rf "$folder"
    fi
    folder=''
}

trap remove_cluster EXIT
trap 'exit 130' INT TERM
