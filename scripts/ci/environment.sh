# Sourced by the other scripts: sets `root`, the project's folder, and `bin`, that of the programs in its .venv;
# `environment EXTRAS` makes .venv and installs requant into it.

root=$(cd "$(dirname "$0")" && while [ ! -f pyproject.toml ]; do cd ..; done && pwd)
bin=$root/.venv/bin

environment() {
    if [ ! -x "$bin/python" ]; then
        echo "requant: making $root/.venv" >&2
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "requant: Python 3.10 or newer is needed, python3 is $(python3 --version 2>&1)" >&2
            exit 2
        }
        python3 -m venv "$root/.venv" || {
            echo "requant: python3 cannot make virtual environments; on Debian install python3-venv" >&2
            exit 2
        }
    fi
    state="$1 $(cksum <"$root/pyproject.toml")"
    if [ "$(cat "$root/.venv/requant-installed" 2>/dev/null)" != "$state" ]; then
        echo "requant: installing" >&2
        "$bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root$1" || exit 6
        echo "$state" >"$root/.venv/requant-installed"
    fi
}
