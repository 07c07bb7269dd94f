#!/usr/bin/env bash
# Runs this example: starts a server and its clients, shows the rounds, stops everything. ./run.sh --help says more.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

# The first Python that is new enough starts the launcher, which finds or makes an environment with the packages.
for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
        exec "$python" "$here/launcher/__main__.py" "$@"
    status=$?
    [ -z "${PYTHON:-}" ] || break
done
[ "$status" = 126 ] && fault="can't be executed" || fault="is missing or older than Python 3.11"
echo "error: ${PYTHON:-python3} $fault: install Python 3.11 or newer, or name one: PYTHON=/path/to/python ./run.sh" >&2
exit 1
