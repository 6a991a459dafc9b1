#!/bin/sh
# Converts the tiny model in fixtures/ to a budget that forces a mix of types, or your own file:
#     sh scripts/demo.sh [MODEL OUT BUDGET...]        sh scripts/demo.sh model-BF16.gguf out.gguf --vram 12GiB
set -eu
here=$(pwd)
. "$(dirname "$0")/environment.sh"

absolute() {
    case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac
}

if [ $# -eq 0 ]; then
    environment ""
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    out=$folder/tiny-llama-11MiB.gguf
    echo "\$ requant convert fixtures/tiny-llama-f16.gguf ${out##*/} --imatrix fixtures/imatrix.gguf --vram 11MiB --ctx 512" >&2
    .venv/bin/requant convert fixtures/tiny-llama-f16.gguf "$out" --imatrix fixtures/imatrix.gguf --vram 11MiB --ctx 512
    echo "\$ requant verify ${out##*/} --source fixtures/tiny-llama-f16.gguf" >&2
    .venv/bin/requant verify "$out" --source fixtures/tiny-llama-f16.gguf
elif [ $# -ge 3 ]; then
    model=$(absolute "$1")
    out=$(absolute "$2")
    shift 2
    environment ""
    .venv/bin/requant convert "$model" "$out" "$@"
    .venv/bin/requant verify "$out" --source "$model"
else
    echo "usage: sh scripts/demo.sh [MODEL OUT BUDGET...]; for example: sh scripts/demo.sh model.gguf out.gguf --vram 12GiB" >&2
    exit 2
fi
