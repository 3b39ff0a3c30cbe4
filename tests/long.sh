#!/usr/bin/env bash
# The tests that the default run leaves out: more combinations of what it tests in part. Arguments go to pytest.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" -m long "$@"
