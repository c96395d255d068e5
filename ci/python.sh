# Sourced by the scripts beside it: `new_environment FOLDER` makes a virtual environment with the first Python that
# is new enough; PYTHON=... chooses one.
new_environment() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -m venv "$1"
            return
        fi
    done
    echo "No Python of at least 3.11 was found; name one with PYTHON=/path/to/python." >&2
    return 1
}
