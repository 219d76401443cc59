#!/bin/sh
# Checks the documents that machines read: docs/openapi*.json with spectral and redocly, docs/asyncapi.yaml with its parser, and
# the TypeScript types that are generated from the former by three small programs that use them: check.sh
#
# The tools are pinned in package-lock.json with their hashes, and come by npm from whatever registry it is configured for. They
# are installed once beside what else is kept outside the clone, run none of their install scripts, and go nowhere when they
# check. Assumes node and npm, which deploy/dev/setup.sh --with-node brings.
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
docs=$(cd "$here/../../docs" && pwd -P)
lock=$(cat "$here/package.json" "$here/package-lock.json" | sha256sum | cut -c 1-16)
tools=${XDG_CACHE_HOME:-$HOME/.cache}/lomash-inventory/api-$lock

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ ! -e "$tools/complete" ]; then
    echo "api: installing the tools of tests/api/package-lock.json, once (a minute or so)" >&2
    mkdir -p "$tools"
    cp "$here/package.json" "$here/package-lock.json" "$tools/"
    (cd "$tools" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error)
    touch "$tools/complete"
fi
run() {
    program=$1
    shift
    "$tools/node_modules/.bin/$program" "$@"
}
# Neither tells anybody that it ran, nor asks for a newer version of itself.
export REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true

# Where their packages are found: a module is looked up from where it lies. The rules stay where they are, for the generator
# would take them for its own.
cp "$here"/*.ts "$here"/*.mjs "$here/tsconfig.json" "$here/package.json" "$work/"
ln -s "$tools/node_modules" "$work/node_modules"
cd "$work"

failed=
check() {
    what=$1
    shift
    if "$@" >"$work/log" 2>&1; then
        echo "api: $what"
    else
        cat "$work/log" >&2
        echo "api: FAILED: $what" >&2
        failed=yes
    fi
}
for document in openapi openapi-analytics openapi-notification; do
    check "docs/$document.json by spectral" \
        run spectral lint --ruleset "$here/spectral.yaml" --fail-severity hint "$docs/$document.json"
    check "docs/$document.json by redocly" \
        run redocly lint --config "$here/redocly.yaml" --format stylish "$docs/$document.json"
    # What has a default is left out by whoever sends it.
    check "docs/$document.json as TypeScript" \
        run openapi-typescript "$docs/$document.json" --default-non-nullable=false --output "$document.ts"
done
check "docs/asyncapi.yaml by its parser" node asyncapi.mjs "$docs/asyncapi.yaml"
check "the programs of tests/api by tsc" run tsc --project tsconfig.json
[ -z "$failed" ]
