#!/bin/sh
# Pin what requant needs at run time, and all that needs in turn, by version and SHA-256: requirements.lock, and
# requirements-calibrate.lock with the extra `calibrate`. Versions stay as they are until they no longer fit.
#     sh scripts/ci/lock.sh [--upgrade]
set -eu
. "$(dirname "$0")/environment.sh"
environment "[supply]"
cd "$root"

lock() {
    out=$1
    shift
    "$bin/uv" pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-emit-index-url \
        --custom-compile-command "sh scripts/ci/lock.sh" --output-file "$out" pyproject.toml "$@"
}
lock requirements.lock "$@"
lock requirements-calibrate.lock --extra calibrate "$@"
