#!/usr/bin/env bash
# Builds the four programs for production from the lockfile, and prints the SHA-256 of each.
#
# The same commit, toolchain and C compiler give the same bytes in whatever folder they are built: paths of the clone, of the
# build folder and of cargo's sources are replaced by fixed names, in Rust and in C. With --check everything is built once more, from a
# fresh clone of HEAD in another folder, and compared; what is not committed is no part of that.
#
# Packages are named one by one and not as the workspace: tests turn crash points on, which have no place in production.
set -euo pipefail

readonly programs=(product-service analytics-service notification-service lomash)
readonly packages=(-p lomash-product -p lomash-analytics -p lomash-notification -p lomash)

# build SOURCE TARGET: builds the clone SOURCE into the folder TARGET.
build() {
    local source=$1 target=$2 cargo_home=${CARGO_HOME:-$HOME/.cargo}
    local from=("$target" "$source" "$cargo_home") to=(/target /source /cargo)
    local rust="" c="" index
    # jemalloc's configure hands C's flags on as words.
    if [[ "$target$source$cargo_home" == *[[:space:]]* ]]; then
        echo "release: a path below has a blank, which C's flags cannot hold; use folders without one:" >&2
        printf '  %s\n' "${from[@]}" >&2
        exit 1
    fi
    # The last match wins in rustc, and the build folder may lie in the clone.
    for index in 2 1 0; do
        rust+="${rust:+$'\x1f'}--remap-path-prefix=${from[index]}=${to[index]}"
        c+=" -ffile-prefix-map=${from[index]}=${to[index]}"
    done
    (
        cd "$source"
        CARGO_ENCODED_RUSTFLAGS="$rust" CFLAGS="${CFLAGS:-}$c" CARGO_TARGET_DIR="$target" CARGO_INCREMENTAL=0 \
            cargo build --release --locked "${packages[@]}"
    )
}

# sums TARGET: prints the hashes of the programs there.
sums() {
    (cd "$1/release" && sha256sum "${programs[@]}")
}

source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
target=${CARGO_TARGET_DIR:-$source/target}
mkdir -p "$target"
target=$(cd "$target" && pwd -P)

case "${1-}" in
    "")
        build "$source" "$target"
        sums "$target"
        ;;
    --check)
        if [ -n "$(git -C "$source" status --porcelain --untracked-files=no)" ]; then
            echo "release: the clone has changes that are not committed; commit or stash them, so that both builds are of one source" >&2
            exit 1
        fi
        elsewhere=$(mktemp -d "${TMPDIR:-/tmp}/lomash-release.XXXXXX")
        trap 'rm -rf "$elsewhere"' EXIT
        git clone --quiet "$source" "$elsewhere/another-clone"
        build "$source" "$target"
        build "$elsewhere/another-clone" "$elsewhere/another-target"
        sums "$target" >"$elsewhere/here"
        sums "$elsewhere/another-target" >"$elsewhere/there"
        cat "$elsewhere/here"
        diff "$elsewhere/here" "$elsewhere/there" || {
            echo "release: the two builds differ" >&2
            exit 1
        }
        echo "release: built twice, in two folders, to the same bytes"
        ;;
    *)
        echo "usage: release.sh [--check]" >&2
        exit 2
        ;;
esac
