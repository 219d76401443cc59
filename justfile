# The front door: every recipe is one line of intent; `./just` runs it, from any folder, and `./just --list` shows it.
#
# Assumes Linux and Rust; `setup` brings the rest. Everything is built as one workspace, in one profile and one
# set of features, so that demo, tests and lints share what is compiled. CARGO_TARGET_DIR is respected.

set shell := ["sh", "-euc"]

# What `just up` wrote while it runs: the operating recipes find its servers by themselves. The environment wins.
set dotenv-load := true
set dotenv-filename := ".data/stack.env"

export CARGO_TERM_COLOR := env("CARGO_TERM_COLOR", "auto")

target := env("CARGO_TARGET_DIR", env("CARGO_BUILD_TARGET_DIR", justfile_directory() / "target"))
lomash := join(target, "debug", "lomash")
here := invocation_directory()

# Shows this list
[private]
default:
    @"$LOMASH_JUST" --justfile '{{ justfile() }}' --list --unsorted

# Install what this machine lacks: nats-server, PostgreSQL, Redis, a C compiler (quick when nothing is)
[group('start')]
setup:
    @deploy/dev/setup.sh

# Start NATS, Postgres, Redis and the services on free loopback ports; Ctrl-C stops them all
[group('start')]
up *ARGS: _programs
    exec '{{ lomash }}' up {{ ARGS }}

# Watch the whole way of an order on servers of its own; ends by itself and fails if any number is off
[group('start')]
demo *ARGS: _programs
    exec '{{ lomash }}' demo {{ ARGS }}

# Start three NATS nodes with TLS and identities, and the services against them; `--check` kills each under load, verifies and ends
[group('start')]
cluster *ARGS: _programs
    exec '{{ lomash }}' cluster {{ ARGS }}

# Import a catalogue, over HTTP: sku,name,category,quantity,threshold,active; `--dry-run` says what would change
[group('operate')]
import CATALOG *ARGS: _programs
    exec '{{ lomash }}' import '{{ join(here, CATALOG) }}' {{ ARGS }}

# Publish the orders of a file (NDJSON envelopes, or the retail CSV; gzip or plain)
[group('operate')]
orders FILE *ARGS: _programs
    exec '{{ lomash }}' orders replay '{{ join(here, FILE) }}' {{ ARGS }}

# Check every invariant over the stream and its projection
[group('operate')]
verify *ARGS: _programs
    exec '{{ lomash }}' verify {{ ARGS }}

# Build a projection anew from the stream, beside the live one, and swap them (`analytics`: the stock metrics); `--rollback` swaps back
[group('operate')]
rebuild *ARGS: _programs
    exec '{{ lomash }}' rebuild {{ ARGS }}

# Correct the stock by the warehouse's counts; `--dry-run` only reports, `--approve ID` goes on with a run that waits
[group('operate')]
reconcile *ARGS: _programs
    exec '{{ lomash }}' reconcile {{ ARGS }}

# Dead letters: `list`, `show N`, `redrive N --yes`, `discard N --yes`; by filter or `--all`, too
[group('operate')]
dlq *ARGS: _programs
    exec '{{ lomash }}' dlq {{ ARGS }}

# Show streams, consumers, lag and checkpoints
[group('operate')]
status *ARGS: _programs
    exec '{{ lomash }}' status {{ ARGS }}

# Replay stored messages: STREAM and which of them, to standard output, `--file` or `--subject`; see docs/operations.md
[group('operate')]
replay *ARGS: _programs
    exec '{{ lomash }}' replay {{ ARGS }}

# Write the streams into an archive, or what came since: DIR; `--check` proves its hashes
[group('operate')]
backup DIR *ARGS: _programs
    exec '{{ lomash }}' backup '{{ join(here, DIR) }}' {{ ARGS }}

# Restore an archive into servers that have none of the streams, and prove that it is equal: DIR
[group('operate')]
restore DIR *ARGS: _programs
    exec '{{ lomash }}' restore '{{ join(here, DIR) }}' {{ ARGS }}

# Compare streams and consumers with streams/ (`diff`), or bring them to it (`apply`)
[group('operate')]
streams *ARGS: _programs
    exec '{{ lomash }}' streams {{ ARGS }}

# Print a bearer token for development, for the stack that `just up` runs: `--role ADMIN` for one that may write
[group('operate')]
token *ARGS: _programs
    @exec '{{ lomash }}' token {{ ARGS }}

# Measure this system beside its rivals and the limit of the server, optimised, on servers of its own (some 35 minutes)
[group('operate')]
bench *ARGS: release
    cd '{{ here }}'; exec '{{ absolute_path(join(target, "release", "lomash")) }}' bench {{ ARGS }}

# Build the programs for production and print their SHA-256; `--check` builds them twice, in two folders, and compares
[group('develop')]
release *ARGS: _setup
    deploy/dev/release.sh {{ ARGS }}

# Run every test; words after it are passed to `cargo test` (`just test -p lomash-ledger`)
[group('develop')]
test *ARGS: _setup
    cargo build --workspace --all-targets --locked
    cargo test --locked {{ if ARGS == "" { "--workspace" } else { ARGS } }}

# Write docs/openapi*.json anew from the code
[group('develop')]
openapi: _setup
    UPDATE_OPENAPI=1 cargo test --locked --workspace --test integration the_committed_copy

# Fuzz the HTTP adapter against its OpenAPI document with schemathesis (PyPI), on servers of its own: [EXAMPLES [SEED]]
[group('develop')]
fuzz-http *ARGS: _programs
    LOMASH='{{ lomash }}' deploy/dev/schemathesis.sh {{ ARGS }}

# Format every file
[group('develop')]
fmt:
    cargo fmt --all

# Fail if a file is not formatted
[group('develop')]
fmt-check:
    cargo fmt --all --check

# Lint every target; a warning is an error
[group('develop')]
clippy:
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Check licences, duplicate versions and sources of every dependency (builds cargo-deny once)
[group('develop')]
deny:
    "$(deploy/dev/setup.sh --with-deny --quiet)" --log-level error check licenses bans sources

# Check and test the alert rules, and check the configuration that names them (installs promtool once)
[group('develop')]
alerts:
    promtool=$(deploy/dev/setup.sh --with-promtool --quiet); \
        "$promtool" check config deploy/prometheus/prometheus.yml; \
        "$promtool" test rules deploy/prometheus/alerts_test.yml

# Lint docs/openapi*.json, parse docs/asyncapi.yaml, compile generated TypeScript types (installs Node.js and its tools once)
[group('develop')]
api:
    deploy/dev/setup.sh --with-node --quiet
    tests/api/check.sh

# Write what is in each program as CycloneDX, from the lockfile
[group('develop')]
sbom FOLDER="target/sbom":
    deploy/dev/sbom.py '{{ FOLDER }}'

# Build the documentation of our own crates
[group('develop')]
doc *ARGS:
    cargo doc --workspace --no-deps --locked {{ ARGS }}

# What CI runs
[group('develop')]
ci: (_step "setup") (_step "fmt-check") (_step "clippy") (_step "deny") (_step "alerts") (_step "api") (_step "test") (_step "demo")

_setup:
    @deploy/dev/setup.sh --quiet

# All targets and not only the programs: what tests depend on adds features to shared crates, and building in two
# ways would compile most of the tree twice.
_programs: _setup
    cargo build --workspace --all-targets --locked

# Runs one recipe and says how long it took.
_step RECIPE:
    @started=$(date +%s); echo "── {{ RECIPE }}"; \
        "$LOMASH_JUST" --justfile '{{ justfile() }}' {{ RECIPE }}; \
        echo "── {{ RECIPE }}: $(( $(date +%s) - started )) s"
