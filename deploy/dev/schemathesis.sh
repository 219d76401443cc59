#!/bin/sh
# Fuzzes the HTTP adapter against its own OpenAPI document: schemathesis.sh [EXAMPLES [SEED]]
#
# Owns a throw-away environment with a pinned schemathesis (from PyPI, by pip and whatever index it is configured for)
# and a throw-away system: `lomash up` on free ports with its data in a temporary folder. Both are gone when it ends,
# however it ends. Every operation gets EXAMPLES generated requests (30), good and bad ones; the seed is printed, and
# the same seed sends the same requests.
#
# Not part of CI: pip may take a minute, and what is found depends on the seed. The event stream is left out, because it
# has no end. Assumes python3 with venv, and that LOMASH names a `lomash` with its services beside it.
set -eu

version=4.32.5
examples=${1:-30} seed=${2:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
here=$(cd "$(dirname "$0")" && pwd)

fail() {
    echo "schemathesis: $*" >&2
    exit 1
}

[ -x "${LOMASH:-}" ] || fail "LOMASH must name the program; run ./just fuzz-http"
command -v python3 >/dev/null 2>&1 || fail "python3 is needed (Debian: apt-get install python3 python3-venv)"

work=$(mktemp -d)
# Postgres may run as another user, who must be able to walk through.
chmod 711 "$work"
up=
finish() {
    if [ -n "$up" ]; then
        kill -TERM "$up" 2>/dev/null || true
        wait "$up" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

"$LOMASH" up --data "$work/data" >"$work/up.log" 2>&1 &
up=$!

python3 -m venv "$work/venv" || fail "no virtual environment (Debian: apt-get install python3-venv)"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version" ||
    fail "schemathesis $version could not be installed"

# The last line of stack.env is written when the services are ready.
waited=0
until grep -qs '^PRODUCT_URL=' "$work/data/stack.env"; do
    kill -0 "$up" 2>/dev/null || fail "the system did not start: $(cat "$work/up.log")"
    [ "$waited" -lt 120 ] || fail "the system was not ready after $waited s: $(cat "$work/up.log")"
    waited=$((waited + 1))
    sleep 1
done
url=$(sed -n 's/^PRODUCT_URL=//p' "$work/data/stack.env")
token=$(sed -n 's/^ADMIN_TOKEN=//p' "$work/data/stack.env")

echo "schemathesis: $examples examples an operation; again with: ./just fuzz-http $examples $seed"
cd "$work"
status=0
"$work/venv/bin/schemathesis" --config-file "$here/schemathesis.toml" run "$url/openapi.json" \
    --header "Authorization: Bearer $token" \
    --exclude-operation-id streamInventory \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance,negative_data_rejection,unsupported_method,ignored_auth \
    --phases examples,coverage,fuzzing --max-examples "$examples" --seed "$seed" \
    --request-timeout 10 --continue-on-failure --warnings off || status=$?
if grep -l panicked "$work"/data/*.log; then
    fail "a service panicked: $(grep -h panicked "$work"/data/*.log)"
fi
exit "$status"
