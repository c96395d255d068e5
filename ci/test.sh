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
"$python" -m pytest
"$python" ci/host_suite.py
