#!/usr/bin/env bash
# The tests with the oldest supported versions (tests/constraints-oldest.txt), in an environment of their own. Left out are
# the rooms bench and cli, which only measure and print, bad input (tests/attack), and the long comparisons with the
# oracle, which depend on torch alone; of adapters it runs gradients, several adapters and new ones. Arguments go to
# pytest instead of this choice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
oldest=tests/constraints-oldest.txt
constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
names="$(sed -n 's/==.*//p' "$oldest" | paste -s -d '|')"
cat "$oldest" > "$constraints"
grep -v -E "^($names)==" constraints.txt >> "$constraints"
VENV=.venv-oldest CONSTRAINTS="$constraints" source examples/install.sh test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    set -- tests --ignore=tests/bench --ignore=tests/cli --ignore=tests/attack --ignore-glob='*/test_oracle*' \
        --ignore-glob='*/adapters/test_[eqrt]*'
fi
python -m pytest -n 2 --dist loadfile "$@"
