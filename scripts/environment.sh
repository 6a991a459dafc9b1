# Sourced by the other scripts: `environment EXTRAS` makes .venv in the project's root and installs requant into it.

environment() {
    cd "$(dirname "$0")/.." || exit 6
    if [ ! -x .venv/bin/python ]; then
        echo "requant: making .venv" >&2
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "requant: Python 3.10 or newer is needed, python3 is $(python3 --version 2>&1)" >&2
            exit 2
        }
        python3 -m venv .venv || {
            echo "requant: python3 cannot make virtual environments; on Debian install python3-venv" >&2
            exit 2
        }
    fi
    state="$1 $(cksum pyproject.toml)"
    if [ "$(cat .venv/requant-installed 2>/dev/null)" != "$state" ]; then
        echo "requant: installing" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$1" || exit 6
        echo "$state" >.venv/requant-installed
    fi
}
