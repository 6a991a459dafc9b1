#!/bin/sh
# The tests with the slow ones.
exec sh "$(dirname "$0")/../test.sh" -m "slow or not slow" "$@"
