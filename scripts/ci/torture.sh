#!/bin/sh
# The long form of the tests of what must never go wrong: kills, power cuts and signals, the slow tests, mutation testing,
# ten million malformed files. Hours on two cores. JSON lines on stdout.
#     sh scripts/ci/torture.sh [MUTANTS]      # files to mutate, 10000000 by default
set -eu
. "$(dirname "$0")/environment.sh"
environment "[dev]"
cd "$root"
"$bin/python" -m pip install --quiet --disable-pip-version-check "mutmut==3.8.1"
failed=0
"$bin/python" scripts/ci/kill_test.py --kills 240 --crashes 500 --signals 52 --slowest 18 || failed=1
"$bin/python" -m pytest -m slow >&2 || failed=1
"$bin/python" scripts/ci/mutation.py || failed=1
"$bin/python" scripts/ci/fuzz.py --mutants "${1:-10000000}" || failed=1
exit $failed
