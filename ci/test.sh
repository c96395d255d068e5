#!/usr/bin/env bash
# Everything that must hold before a change goes in, with the python given (or found), into which
# ".[test,dev]" has been installed:   ci/test.sh .venv/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${1:-python}"
# The suite sets these itself where it tests them.
unset JOBLIB_BACKEND "${!JOBLIB_BACKEND_@}"

# They run beside the tests: mypy alone takes half a minute, and so does the site.
checks() {
    "$python" -m ruff check . && "$python" -m mypy && "$python" ci/check_floors.py && "$python" ci/check_doors.py &&
        ci/docs.sh "$python"
}
# Three parts of the suite side by side: mostly they wait, for processes that start and for clusters that notice. The
# tests of shared fits run alone afterwards: what is not worth sharing on a busy machine is fitted twice.
suite() { "$python" -m pytest -p no:cacheprovider "$@"; }
local_faults=(tests/faults/test_local.py tests/faults/test_checkpoint.py)
with_local=(tests/test_[mptw]*.py tests/test_s[ct]*.py)
logs="$(mktemp -d)"
(set -e; checks; suite "${local_faults[@]}" "${with_local[@]}"; "$python" ci/host_suite.py) >"$logs/local" 2>&1 &
first=$!
suite tests/faults "${local_faults[@]/#/--ignore=}" >"$logs/clusters" 2>&1 &
second=$!
trap 'kill "$first" "$second" 2>/dev/null || :; rm -rf "$logs"' EXIT
failed=0
suite tests --ignore=tests/faults --ignore=tests/test_sharing.py "${with_local[@]/#/--ignore=}" || failed=1
wait "$first" || failed=1
wait "$second" || failed=1
cat "$logs/local" "$logs/clusters"
suite tests/test_sharing.py || failed=1
exit "$failed"
