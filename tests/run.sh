#!/usr/bin/env bash
# Style check and tests, from nothing but Python and a package index. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/install.sh test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
ruff check .
exec python -m pytest "$@"  # without a path: testpaths of pyproject.toml
