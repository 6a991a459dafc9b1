#!/bin/sh
# Converts the tiny model in fixtures/ to a budget that forces a mix of types, or your own file:
#     sh scripts/demo.sh [MODEL OUT BUDGET...]        sh scripts/demo.sh model-BF16.gguf out.gguf --vram 12GiB
set -eu
. "$(dirname "$0")/ci/environment.sh"

run() {
    echo "\$ requant $*" >&2
    "$bin/requant" "$@"
}

if [ $# -eq 0 ]; then
    environment "[calibrate]"
    cd "$root"
    mkdir -p demo
    run convert fixtures/tiny-llama-f16.gguf demo/tiny-llama-11MiB.gguf --force \
        --vram 11MiB --ctx 512
    run verify demo/tiny-llama-11MiB.gguf --source fixtures/tiny-llama-f16.gguf
    run evaluate demo/tiny-llama-11MiB.gguf --base fixtures/tiny-llama-f16.gguf --text fixtures/eval.txt
elif [ $# -ge 3 ]; then
    environment "[calibrate]"
    run convert "$@"
    run verify "$2" --source "$1"
else
    echo "usage: sh scripts/demo.sh [MODEL OUT BUDGET...]; for example: sh scripts/demo.sh model.gguf out.gguf --vram 12GiB" >&2
    exit 2
fi
