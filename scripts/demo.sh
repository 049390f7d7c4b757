#!/usr/bin/env bash
# Install llmprune into .venv and show what four methods do to the demo model. Needs Python 3.10 to 3.13 and pip.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
.venv/bin/python scripts/demo.py
