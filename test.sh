#!/usr/bin/env bash
# Runs the tests: ./test.sh for the quick part (minutes), ./test.sh --slow for all; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
        exec "$python" basic/launcher/environment.py requirements-dev.txt -m pytest "$@"
    status=$?
    [ -z "${PYTHON:-}" ] || break
done
[ "$status" = 126 ] && fault="can't be executed" || fault="is missing or older than Python 3.11"
echo "error: ${PYTHON:-python3} $fault: install Python 3.11 or newer, or name one: PYTHON=/path/to/python ./test.sh" >&2
exit 1
