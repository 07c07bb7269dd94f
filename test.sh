#!/usr/bin/env bash
# Passes the tests: ./test.sh for the quick part (minutes), ./test.sh --slow for all; other arguments go to pytest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

cd "$here"
for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" basic/launcher/environment.py requirements-dev.txt -m pytest "$@"
    fi
    [ -z "${PYTHON:-}" ] || break
done
echo "error: ${PYTHON:-python3} is missing or older than Python 3.11: install a newer one, or name it: PYTHON=/path/to/python ./test.sh" >&2
exit 1
