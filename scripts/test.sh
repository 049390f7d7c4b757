#!/usr/bin/env bash
# Install llmprune with its test requirements into .venv and run the tests, two at once with a thread each; arguments go
# to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal "$@"
