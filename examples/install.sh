# Sourced from the repository root: makes .venv if it is not there, installs hf_sdp with the given extras ("": none), and activates
# it. Does nothing more on the second call. Usage: source examples/install.sh EXTRAS
#
# torch comes first and alone, as pinned in constraints.txt: without the pin pip may take another build later and fetch
# gigabytes of CUDA packages a second time.

if [ ! -d .venv ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
source .venv/bin/activate
if ! cmp -s constraints.txt ".venv/installed-${1:-base}"; then
    if ! python -c 'import torch' 2>/dev/null; then
        python -m pip install "$(grep '^torch==' constraints.txt)"
    fi
    python -m pip install -c constraints.txt -e ".${1:+[$1]}"
    cp constraints.txt ".venv/installed-${1:-base}"
fi
