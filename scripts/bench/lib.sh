# What the benches with a real cluster share: release builds, clusters that are kept between runs, a folder for one run
# with repositories on this disk and in the store of the benches, both programs' configurations, and the end of it all,
# which comes with the script's whatever happens. Sourced, not run; PostgreSQL, Walden's backups and the peer run as
# user postgres.
#
# The peer is Debian's pgBackRest, with the features nearest to Walden's: bundles, block incremental (a beta in 2.45),
# zstd 3, AES-256, two processes. It is installed here and not by scripts/install, because only benches need it.
#
# Places: `local` is a folder on this disk; `far` the store of the benches (scripts/bench/store: S3, TLS, in memory)
# over a line of 10 ms each way and 1 Gbit/s each way of a connection; `near` the same store without the line.

json=false quick=false keep=false build=true wal=true runs=3 peer_runs=1 dir=/var/tmp/walden-bench rest=()
small=false profile=release only=''
# What pgbench calls the scale of a cluster of one size: 1.9 GB, with --small 0.2 GB.
unit=100
# The examples of the package that are built and stand beside walden in the folder of a run.
programs=(bench-store bench-run)
folder='' postmaster='' store='' cluster='' bin='' store_json=''
delay_ms=10 mbit=1000

options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --json) json=true ;;
            --quick) quick=true runs=1 ;;
            --small) small=true unit=10 ;;
            --debug) profile=debug ;;
            --only) only=$2; shift ;;
            --keep) keep=true ;;
            --no-build) build=false ;;
            --no-wal) wal=false ;;
            --runs) runs=$2; shift ;;
            --peer-runs) peer_runs=$2; shift ;;
            --dir) dir=$2; shift ;;
            -*) say "unknown option $1"; exit 2 ;;
            *) rest+=("$1") ;;
        esac
        shift
    done
    [ "$(id -u)" = 0 ] || { say "dropping caches and mounting take root"; exit 1; }
}

# The programs of the newest PostgreSQL that Debian has installed.
find_server() {
    bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
    [ -x "$bin/pgbench" ] || { say "no PostgreSQL server: run scripts/install demo"; exit 1; }
}

# The same, and the peer.
find_programs() {
    find_server
    command -v pgbackrest >/dev/null || {
        say "installing pgbackrest, the peer, from Debian"
        apt-get install -y --no-install-recommends pgbackrest >&2
    }
    say "peer: $(pgbackrest version)"
}

# Builds what is measured; with --no-build it is what was built last.
build() {
    local how=(--profile release)
    [ $profile = release ] || how=(--profile dev)
    if $build; then
        say "building ($profile; some minutes the first time)"
        (cd "$root" && cargo build --quiet --locked "${how[@]}" --bin walden "${programs[@]/#/--example=}") </dev/null 1>&2
    fi
    built=$(cd "$root" && cargo metadata --locked --no-deps --format-version 1 |
        sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/$profile
}

as_postgres() { setpriv --reuid postgres --regid postgres --init-groups env -C / HOME=/ "$@"; }
sql() { as_postgres "$bin/psql" -XAtq -h "$folder/run" -d "${2:-postgres}" -c "$1"; }
# walden PLACE ARGUMENT..., as root: a clone mounts.
walden() { "$folder/walden" --config "$folder/walden-$1.toml" --no-progress "${@:2}"; }
# peer PLACE ARGUMENT...
peer() { as_postgres pgbackrest --config="$folder/peer-$1.conf" --stanza=bench "${@:2}"; }

# The value of a field in a flat JSON document.
field() { sed -n 's/.*"'"$1"'": *"\{0,1\}\([^",}]*\).*/\1/p' <<<"$2" | head -n 1; }
# The value of a field of a JSON document by its path, a.b; nothing for null.
nested() {
    python3 -c '
import json, sys
value = json.loads(sys.argv[2])
for key in sys.argv[1].split("."):
    value = value[key]
print("" if value is None else value)' "$@"
}
# The median of the numbers on standard input, and of one field of the JSON lines of a file.
median() { sort -n | awk '{ a[NR] = $1 } END { m = int((NR + 1) / 2); print NR % 2 ? a[m] : (a[m] + a[m + 1]) / 2 }'; }
median_of() { sed 's/.*"'"$1"'":\([0-9.]*\).*/\1/' "$2" | median; }
# $1 / $2, or nothing where one of them was not measured.
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.2f", a / b }'; }
# The same, so that nothing is met by rounding.
exact_ratio() { awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.3f", a / b }'; }
megabytes() { awk -v b="$1" 'BEGIN { printf "%.0f", b / 1e6 }'; }
mebibytes() { awk -v b="$1" 'BEGIN { printf "%.2f", b / 1048576 }'; }
median_file() { median <"$folder/$1"; }
# Seconds since a moment of $EPOCHREALTIME.
since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.3f", b - a }'; }

# aim NAME least|most LIMIT VALUE: notes in `aims` and `verdict` whether it is met; what was not measured is not.
aim() {
    local met told=met
    met=$(awk -v how="$2" -v limit="$3" -v value="${4:-0}" 'BEGIN {
        met = how == "least" ? value >= limit : value > 0 && value <= limit
        print met ? "true" : "false"
    }')
    aims+=("{\"aim\":\"$1\",\"at_$2\":$3,\"measured\":${4:-null},\"met\":$met}")
    $met || told='NOT MET'
    verdict+="$(printf '%-52s %8s  at %-5s %4s  %s' "$1" "${4:--}" "$2" "$3" "$told")"$'\n'
}

# row PART WHAT VALUE UNIT [BESIDE VALUE]: a figure, what is beside it in the same run, and how many times that it is.
row() {
    local times=''
    [ $# -lt 6 ] || times=$(exact_ratio "$3" "$6")
    table+="$(printf '%-11s %-36s %10s %-9s %10s %-22s %s' "$1" "$2" "$3" "$4" "${6:-}" "${5:-}" "${times:+$times times}")"$'\n'
    results+=("{\"part\":\"$1\",\"what\":\"$2\",\"value\":${3:-null},\"unit\":\"$4\",\"beside\":\"${5:-}\",\"beside_value\":${6:-null},\"ratio\":${times:-null}}")
    figure[$1, $2]=$3
    [ -z "$times" ] || figure[$1, $2, ratio]=$times
}

# The largest of the figures of a part whose names match.
most() {
    local name
    for name in "${!figure[@]}"; do
        # shellcheck disable=SC2053
        [[ $name != "$1, "$2 ]] || echo "${figure[$name]}"
    done | sort -g | tail -n 1
}

# Prints the table, what is aimed at, and one line of JSON that names the bench and has more of its fields: report BENCH FIELDS
report() {
    if ! $json; then
        printf '%-11s %-36s %10s %-9s %10s %-22s\n' PART WHAT FIGURE '' BESIDE ''
        printf '%s\n%s' "$table" "$verdict"
        ! $small || echo "small: what is measured here is whether it can be measured"
    fi
    (IFS=,; echo "{\"bench\":\"$1\",\"small\":$small,\"build\":\"$profile\",\"runs\":$runs,$2\"caches\":\"dropped\",\"delay_ms\":$delay_ms,\"mbit\":$mbit,\"store\":${store_json:-null},\"results\":[${results[*]}],\"aims\":[${aims[*]}]}")
}

# Nothing that is read next was read before.
cold() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# Makes the folder of this run; keys, configurations and the store of the benches are in it.
begin() {
    mkdir -p "$dir"
    folder=$(mktemp -d "$dir/run-XXXXXX")
    chmod 755 "$dir" "$folder"
    install -m 755 "$built/walden" "${programs[@]/#/$built/examples/}" "$folder"
    mkdir "$folder/run" "$folder"/run-{local,near,far} "$folder/repository" "$folder/peer" "$folder/peer-work"
    chown -R postgres: "$folder"
    as_postgres env -C "$folder" ./walden key create --id bench >/dev/null
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=bench -addext 'subjectAltName=IP:127.0.0.1' \
        -addext 'basicConstraints=critical,CA:FALSE' -keyout "$folder/store.key" -out "$folder/store.crt" 2>/dev/null
    start_store
    write_configurations
}

start_store() {
    "$folder/bench-store" "$folder/store.crt" "$folder/store.key" "$delay_ms" "$mbit" >"$folder/ports" &
    store=$!
    until [ -s "$folder/ports" ]; do sleep 0.05; done
    read -r near_port far_port <"$folder/ports"
}

# asks the store of the benches itself: store_says METHOD PATH
store_says() { curl -fsS --cacert "$folder/store.crt" -X "$1" "https://127.0.0.1:$near_port/-/$2"; }

write_configurations() {
    local place port
    (umask 077 && echo secret >"$folder/s3.secret")
    chown postgres: "$folder/s3.secret"
    for place in local near far; do
        port=$near_port
        [ $place = near ] || port=$far_port
        {
            walden_configuration $place
            if [ $place = local ]; then
                echo "[storage]"
                echo "url = \"file://$folder/repository\""
            else
                echo "[storage]"
                echo "url = \"s3://bench/walden\""
                echo "endpoint = \"https://127.0.0.1:$port\""
                echo "ca_file = \"store.crt\""
                echo "access_key_id = \"bench\""
                echo "secret_access_key_file = \"s3.secret\""
            fi
        } >"$folder/walden-$place.toml"
        {
            peer_configuration
            if [ $place = local ]; then
                echo "repo1-path=$folder/peer"
            else
                echo "repo1-path=/peer"
                echo "repo1-type=s3"
                echo "repo1-s3-bucket=bench"
                echo "repo1-s3-endpoint=127.0.0.1"
                echo "repo1-s3-region=us-east-1"
                echo "repo1-s3-key=bench"
                echo "repo1-s3-key-secret=secret"
                echo "repo1-s3-uri-style=path"
                echo "repo1-storage-host=127.0.0.1"
                echo "repo1-storage-port=$port"
                echo "repo1-storage-verify-tls=n"
            fi
        } >"$folder/peer-$place.conf"
        chmod 644 "$folder/walden-$place.toml" "$folder/peer-$place.conf"
    done
    # The peer insists on being named in the command; which of the two archives is in the file `archives`.
    cat >"$folder/pgbackrest-or-walden" <<SCRIPT
#!/bin/bash
while read -r command; do \$command "\$1" || exit 1; done <"$folder/archives"
SCRIPT
    chmod 755 "$folder/pgbackrest-or-walden"
}

walden_configuration() {
    mkdir -p "$folder/state-$1"
    chown postgres: "$folder/state-$1"
    cat <<TOML
[paths]
state = "$folder/state-$1"
run = "$folder/run-$1"
clones = "$folder/state-$1/clones"

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
bin_directory = "$bin"
connection = "host=$folder/run user=postgres dbname=postgres"

TOML
}

peer_configuration() {
    cat <<CONF
[bench]
pg1-path=$cluster/data
pg1-socket-path=$folder/run
pg1-user=postgres

[global]
beta=y
lock-path=$folder/peer-work
log-path=$folder/peer-work
spool-path=$folder/peer-work
log-level-console=error
log-level-file=off
process-max=2
compress-type=zst
compress-level=3
start-fast=y
repo1-retention-full=9
repo1-bundle=y
repo1-block=y
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass=not-much-of-a-secret
CONF
}

# Says which archives WAL goes to: archive_to walden-local peer-far ...
archive_to() {
    local to
    for to in "$@"; do
        case $to in
            walden-*) echo "$folder/walden --config $folder/$to.toml wal push" ;;
            peer-*) echo "pgbackrest --config=$folder/$to.conf --stanza=bench archive-push" ;;
        esac
    done >"$folder/archives.new"
    mv "$folder/archives.new" "$folder/archives"
}

# Removes an archive that a busy server's archiver may still be writing to: out of its way first.
clear_away() {
    [ ! -e "$1" ] || mv "$1" "$1.old-$EPOCHREALTIME"
    rm -rf "$1".old-* || { sleep 1; rm -rf "$1".old-*; }
}

# Starts an archive of its own from nothing for each program and place, and sends WAL there.
fresh_archives() {
    local to
    rm -f "$folder/archives"
    for to in "$@"; do
        case $to in
            walden-local) clear_away "$folder/repository"; install -d -o postgres -g postgres "$folder/repository" ;;
            peer-local) clear_away "$folder/peer"; install -d -o postgres -g postgres "$folder/peer"; peer local stanza-create ;;
            walden-*) store_says DELETE objects/bench/walden/ ;;
            peer-*) store_says DELETE objects/bench/peer/; peer near stanza-create ;;
        esac
    done
    archive_to "$@"
}

# The cluster of $1 times 1.9 GB, with --small a tenth of it: made once, kept in $dir. A cluster like people's: accounts
# of pgbench, text that compresses as text does, noise that does not, many small tables, a tablespace.
make_cluster() {
    cluster=$dir/cluster-$1
    [ "$unit" = 100 ] || cluster+=-of-$unit
    [ ! -e "$cluster/complete" ] || return 0
    say "making a cluster of $1 times $(awk -v unit="$unit" 'BEGIN { print 0.019 * unit }') GB in $cluster, which stays there"
    rm -rf "$cluster"
    install -d -o postgres -g postgres "$cluster" "$cluster/tablespace"
    as_postgres "$bin/initdb" -D "$cluster/data" --data-checksums --no-sync --auth=trust -E UTF8 --locale=C >/dev/null
    cat >>"$cluster/data/postgresql.conf" <<CONF
listen_addresses = ''
max_wal_size = '1GB'
shared_buffers = '256MB'
fsync = off
CONF
    folder=$cluster/making
    install -d -o postgres -g postgres "$folder/run"
    start_server -c wal_level=minimal -c max_wal_senders=0 -c autovacuum=off
    as_postgres "$bin/createdb" -h "$folder/run" bench
    as_postgres "$bin/pgbench" -h "$folder/run" -i -q -I dtGvp -s $(($1 * unit)) bench >&2 2>/dev/null
    as_postgres "$bin/psql" -Xq -v ON_ERROR_STOP=1 -h "$folder/run" -d bench <<SQL
        create extension pgcrypto;
        create tablespace bench location '$cluster/tablespace';
        create table words as select n, substr(encode(sha256(n::text::bytea), 'base64'), 1, 2 + n % 9) as word
            from generate_series(0, 4095) n;
        create index on words (n);
        analyze words;
        -- Words drawn each by itself, the first ones far more often, as in a language: text that is cut from one longer text
        -- is as small as that text to whoever compresses enough of it at a time.
        set enable_hashjoin = off;
        set enable_mergejoin = off;
        create table texts tablespace bench as
            select i, (select string_agg(word, ' ') from generate_series(0, i % 40) k join words
                on n = (hashint8extended(i, k) & 4095) * (hashint8extended(i, -1 - k) & 4095) / 4096) as text
            from generate_series(1::bigint, $1 * $unit * 10000 * 7919::bigint, 7919) i;
        reset enable_hashjoin;
        reset enable_mergejoin;
        create index on texts (i) tablespace bench;
        create table noise (n int, noise bytea);
        alter table noise alter noise set storage plain;
        insert into noise select n, gen_random_bytes(1000) from generate_series(1, $1 * $unit * 890) n;
        do \$\$ begin
            for n in 1 .. 300 loop
                execute format('create table small_%s as select i, md5(i::text) as text from generate_series(1, %s) i', n, n * 3);
                execute format('alter table small_%s add primary key (i)', n);
            end loop;
        end \$\$;
        vacuum analyze;
SQL
    stop_server
    folder=''
    rm -rf "$cluster/making"
    touch "$cluster/complete"
}

# start_server ARGUMENT...
start_server() {
    as_postgres "$bin/postgres" -D "$cluster/data" -k "$folder/run" "$@" >"$folder/server.log" 2>&1 &
    postmaster=$!
    until sql "select 1" >/dev/null 2>&1; do
        kill -0 "$postmaster" 2>/dev/null || { cat "$folder/server.log" >&2; exit 1; }
        sleep 0.1
    done
}

# start_source ARGUMENT...: the server that is backed up.
start_source() {
    start_server -c fsync=on -c archive_mode=on -c "archive_command=$folder/pgbackrest-or-walden %p" "$@"
}

# Ends the current WAL segment and waits until it is archived.
archive_wal() {
    local segment
    segment=$(sql "select pg_logical_emit_message(false, 'bench', 'x'); select pg_walfile_name(pg_switch_wal())" |
        tail -n 1)
    until [ -e "$cluster/data/pg_wal/archive_status/$segment.done" ]; do
        sleep 0.1
        [ -e "$cluster/data/pg_wal/$segment" ] || break
    done
}

stop_server() {
    [ -n "$postmaster" ] || return 0
    # The job is a shell, and its child the server, which writes its own number down.
    kill -INT "$(head -n 1 "$cluster/data/postmaster.pid")" 2>/dev/null || true
    wait "$postmaster" || true
    postmaster=''
}

# Runs one backup and appends what it took to a file: backup_by PROGRAM PLACE FILE [full|incremental]. What Walden
# tells of it is in FILE.json.
backup_by() {
    local options=(--full) type=full
    [ "${4:-full}" = full ] || options=() type=incr
    case $1 in
        walden)
            as_postgres "$folder/bench-run" "$3" "$folder/walden" --config "$folder/walden-$2.toml" --no-progress \
                --output json backup "${options[@]}" >"$3.json"
            ;;
        peer)
            as_postgres "$folder/bench-run" "$3" pgbackrest --config="$folder/peer-$2.conf" --stanza=bench --type=$type \
                backup >/dev/null
            ;;
    esac
}

# Looks a row of a user table up by its index: lookup SOCKET_DIRECTORY PORT, in a cluster of `size`.
lookup() {
    as_postgres "$bin/psql" -XAtq -h "$1" -p "$2" -d bench \
        -c "select abalance from pgbench_accounts where aid = $((size * unit * 50000 + SRANDOM % (unit * 50000)))"
}

# Makes a clone at `place`, with no cache warm, and leaves when it was asked for and when it had answered a look-up in
# `started` and `ended`, its status then in `status`, and requests and bytes until then in `counts`: those of the store,
# counted at its edge where it is far, by Walden where it is local.
answer_from_clone() {
    local created
    store_says GET counts >/dev/null
    cold
    started=$EPOCHREALTIME
    # Without what comes in the background: bytes and requests are those of the query.
    created=$(walden "$place" clone create "$1" --no-hydrate --output json)
    # The look-up itself, on the socket of the clone; no other command comes in between.
    lookup "$(field socket_directory "$created")" "$(field port "$created")" >/dev/null
    ended=$EPOCHREALTIME
    status=$(walden "$place" clone status "$1" --output json)
    counts=$(store_says GET counts)
    [ "$place" = far ] || counts="{\"requests\":$(field requests "$status"),\"bytes_sent\":$(field bytes_fetched "$status")}"
}

# Prints JSON of what took from `started` to `ended` and had `counts`.
result() {
    awk -v from="$started" -v to="$ended" -v b="$(field bytes_sent "$counts")" -v r="$(field requests "$counts")" \
        'BEGIN { printf "{\"seconds\":%.3f,\"bytes\":%d,\"requests\":%d}\n", to - from, b, r }'
}

# Prints JSON of one cold start of a clone.
first_by_walden() {
    local started ended status counts
    answer_from_clone bench
    walden "$place" clone delete bench >/dev/null
    result
}

# Writes so many MiB of WAL by pgbench into the source and has them archived.
write_wal() {
    local from is_enough
    start_source -c fsync=off -c logging_collector=off
    from=$(sql "select pg_current_wal_lsn()")
    while :; do
        # From 2048 on the bytes are more than an integer holds.
        is_enough=$(sql "select pg_current_wal_lsn() - '$from' > $1::bigint * 1024 * 1024")
        [ "$is_enough" = f ] || break
        as_postgres "$bin/pgbench" -h "$folder/run" -n -N -c 4 -t 5000 bench >/dev/null 2>&1
    done
    archive_wal
    stop_server
}

# Makes a place for a restore, which is as new: make_place TARGET
make_place() {
    rm -rf "$1"
    install -d -m 700 -o postgres -g postgres "$1" "$1/data" "$1/tablespace" "$1/run"
}

# Restores into a place and appends what it took to a file: restore_plainly PLACE TARGET FILE
restore_plainly() {
    as_postgres "$folder/bench-run" "$3" "$folder/walden" --config "$folder/walden-$1.toml" --no-progress restore \
        --target-dir "$2/data" --tablespace-map "bench=$2/tablespace" >/dev/null
}

# What the store of the benches does by itself, so that one sees that it is not what is measured.
measure_store() {
    local port from to
    head -c 268435456 /dev/urandom >"$folder/speed"
    for port in $near_port $far_port; do
        from=$EPOCHREALTIME
        curl -fsS --cacert "$folder/store.crt" -H Expect: -T "$folder/speed" "https://127.0.0.1:$port/bench/speed" >/dev/null
        to=$EPOCHREALTIME
        curl -fsS --cacert "$folder/store.crt" -o /dev/null "https://127.0.0.1:$port/bench/speed"
        awk -v a="$from" -v b="$to" -v c="$EPOCHREALTIME" 'BEGIN { printf "%.0f %.0f\n", 268.4 / (b - a), 268.4 / (c - b) }'
    done >"$folder/speeds"
    for _ in 1 2 3 4 5; do
        curl -s --cacert "$folder/store.crt" -o /dev/null -o /dev/null -w '%{time_starttransfer} %{time_pretransfer}\n' \
            "https://127.0.0.1:$far_port/bench/none" "https://127.0.0.1:$far_port/bench/none" | tail -n 1
    done | awk '{ print ($1 - $2) * 1000 }' | median >"$folder/round-trip"
    store_says DELETE objects/bench/speed
    rm "$folder/speed"
    {
        read -r near_up near_down
        read -r far_up far_down
    } <"$folder/speeds"
    round_trip=$(cat "$folder/round-trip")
    say "the store alone, one connection of curl: $near_up MB/s up, $near_down MB/s down; over the line:" \
        "$far_up MB/s up, $far_down MB/s down, $round_trip ms from request to answer"
    store_json="{\"near_up_mb_s\":$near_up,\"near_down_mb_s\":$near_down,\"far_up_mb_s\":$far_up,\"far_down_mb_s\":$far_down,\"far_answer_ms\":$round_trip}"
}

# The end of a run; the clusters stay.
end_run() {
    [ -n "$folder" ] || return 0
    stop_server
    local place clone
    for place in local near far; do
        for clone in "$folder/state-$place"/clones/*/; do
            [ -d "$clone" ] && walden $place clone delete "$(basename "$clone")" >/dev/null 2>&1
        done
    done
    [ -z "$store" ] || kill "$store" 2>/dev/null || true
    store=''
    if grep -q " $folder/" /proc/mounts; then
        say "something is still mounted below $folder; it is left as it is"
    else
        rm -rf "$folder"
    fi
    folder=''
}

finish() {
    end_run
    $keep || rm -rf "$dir"/cluster-*
}

trap finish EXIT
trap 'exit 130' INT TERM
