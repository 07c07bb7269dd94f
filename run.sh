#!/usr/bin/env bash
# Runs an example: ./run.sh [EXAMPLE] [CLIENTS] [MIN_CLIENTS] [SAMPLED] [ROUNDS] [key=value ...]; EXAMPLE is a folder, and
# `basic` where it is left out. ./run.sh EXAMPLE --help says more.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

example=basic
case "${1:-}" in
    "" | -* | *=*) ;;
    [0-9]*) [[ "$1" != *[!0-9]* || ! -f "$here/$1/server.py" ]] || { example=${1%/} && shift; } ;; # a number, mostly
    *) example=${1%/} && shift ;;
esac
if [[ "$example" == */* || ! -f "$here/$example/server.py" ]]; then
    examples=$(cd "$here" && for file in */server.py; do printf ' %s' "${file%/server.py}"; done)
    echo "error: there is no example '$example'; there are:$examples" >&2
    exit 2
fi
exec "$here/$example/run.sh" "$@"
