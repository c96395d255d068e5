#!/usr/bin/env bash
# Run the tests with the oldest supported version of every dependency (ci/oldest.txt), in an environment that is
# removed afterwards. Arguments go to pytest:   ci/oldest.sh -x -k processes
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/.."
. "$here/python.sh"
# No wheels of NumPy 1.26.0 exist for a newer Python than 3.12.
PYTHON="${PYTHON:-python3.11}"
environment="$(mktemp -d "${TMPDIR:-/tmp}/joblib_backends-oldest.XXXXXX")"
trap 'rm -rf "$environment"' EXIT

new_environment "$environment"
"$environment/bin/pip" install -q --disable-pip-version-check -c "$here/oldest.txt" ".[test]"
"$environment/bin/pip" list --disable-pip-version-check | grep -i -E "$(sed -n 's/==.*//p' "$here/oldest.txt" | paste -sd'|')"
"$environment/bin/python" -m pytest "$@"
