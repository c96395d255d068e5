#!/usr/bin/env bash
# Build the site, with the python given (or found), into which ".[docs]" has been installed, and fail on any warning and
# on any link within it that leads nowhere:   ci/docs.sh .venv/bin/python [FOLDER]
# FOLDER keeps the pages; without it they are removed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${1:-python}"
# Sphinx imports the package, which must not start anything for that.
unset JOBLIB_BACKEND "${!JOBLIB_BACKEND_@}"
scratch="$(mktemp -d "${TMPDIR:-/tmp}/joblib_backends-docs.XXXXXX")"
trap 'rm -rf "$scratch"' EXIT
pages="${2:-$scratch/pages}"
"$python" -m sphinx -W --keep-going -n -q -j auto -b html -d "$scratch/doctrees" docs "$pages"
"$python" ci/check_pages.py "$pages"
