#!/usr/bin/env bash
# The wheel of this checkout, alone in an empty environment and used from another folder, without the extras. About two
# minutes, most of them torch's installation. Needs what tests/run.sh has installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/install.sh test
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
constraints="$PWD/constraints.txt"
export DATA="$(cd hf_sdp && find . -type f ! -name '*.py' ! -path '*/__pycache__/*')"  # pages and py.typed

# From a copy: setuptools would leave a build folder here, and take files from an old one.
mkdir "$folder/source" "$folder/elsewhere"
cp -r pyproject.toml README.md LICENSE hf_sdp "$folder/source"
python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$folder" "$folder/source"

deactivate
unset PYTHONPATH
"${PYTHON:-python3}" -m venv "$folder/venv"
source "$folder/venv/bin/activate"
python -m pip install --quiet "$(grep '^torch==' "$constraints")"
python -m pip install --quiet -c "$constraints" "$folder"/hf_sdp-*.whl
cd "$folder/elsewhere"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

python - <<'PYTHON'
import importlib.metadata
import os
from importlib.resources import files

import hf_sdp

assert "site-packages" in hf_sdp.__file__, hf_sdp.__file__
assert hf_sdp.__version__ == importlib.metadata.version("hf_sdp")
for name in hf_sdp.__all__:
    getattr(hf_sdp, name)
data = os.environ["DATA"].split()
assert "./py.typed" in data
for name in data:
    assert files("hf_sdp").joinpath(name).is_file(), name
PYTHON
hf-sdp --help > /dev/null
hf-sdp plan llama-1b
python -m hf_sdp estimate llama-1b --workers 4 > /dev/null
if said="$(hf-sdp compare 2>&1)"; then
    echo "hf-sdp compare ran without matplotlib" >&2
    exit 1
fi
[ "$said" = 'hf-sdp: compare needs matplotlib: pip install "hf_sdp[bench]"' ] || { echo "$said" >&2; exit 1; }
echo "The wheel works alone."
