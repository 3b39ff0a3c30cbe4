# Sourced from the repository root: makes a virtual environment if it is not there, installs hf_sdp with the given extras
# ("": none), and activates it. Does nothing more on the second call. Usage: source examples/install.sh EXTRAS
#
# VENV (default .venv) is the environment's folder, CONSTRAINTS (default constraints.txt) the file of pinned versions.
# torch comes first and alone, as pinned there: without the pin pip may take another build later and fetch gigabytes of
# CUDA packages a second time.

venv="${VENV:-.venv}" constraints="${CONSTRAINTS:-constraints.txt}"
if [ ! -d "$venv" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
source "$venv/bin/activate"
if ! cat "$constraints" pyproject.toml | cmp -s - "$venv/installed-${1:-base}"; then
    if ! python -c 'import torch' 2>/dev/null; then
        python -m pip install "$(grep '^torch==' "$constraints")"
    fi
    python -m pip install -c "$constraints" -e ".${1:+[$1]}"
    cat "$constraints" pyproject.toml > "$venv/installed-${1:-base}"
fi
