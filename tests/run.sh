#!/usr/bin/env bash
# Style, import contract, types and tests, from nothing but Python and a package index. Arguments go to pytest; with them
# only style and the chosen tests run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/install.sh test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
ruff check .
if [ $# -eq 0 ]; then
    ruff format --check .
    lint-imports --no-cache --no-logo
    mypy
fi
# Two files at a time: workers wait more than they compute. Without a path: testpaths of pyproject.toml.
exec python -m pytest -n 2 --dist loadfile "$@"
