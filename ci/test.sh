#!/usr/bin/env bash
# Everything that must hold before a change goes in, with the python given (or found), into which
# ".[test,dev]" has been installed:   ci/test.sh .venv/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${1:-python}"
# The suite sets these itself where it tests them.
unset JOBLIB_BACKEND "${!JOBLIB_BACKEND_@}"

"$python" -m ruff check .
"$python" -m mypy
"$python" ci/check_floors.py
"$python" ci/check_doors.py
# Two halves of the suite side by side: mostly they wait, for processes that start and for clusters that notice.
log="$(mktemp)"
# Those of shared fits run alone: what is not worth sharing on a busy machine is fitted twice.
(set -e; "$python" -m pytest -p no:cacheprovider tests/faults; "$python" ci/host_suite.py) >"$log" 2>&1 &
faults=$!
trap 'kill "$faults" 2>/dev/null || :; rm -f "$log"' EXIT
failed=0
"$python" -m pytest -p no:cacheprovider --ignore=tests/faults --ignore=tests/test_sharing.py || failed=1
wait "$faults" || failed=1
cat "$log"
"$python" -m pytest -p no:cacheprovider tests/test_sharing.py || failed=1
exit "$failed"
