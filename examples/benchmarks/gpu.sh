#!/usr/bin/env bash
# Run gpu.py, with its options, from any folder and without installing anything: torch has to be there, and what else
# ditmoe needs may lie in .whl/site of the project, as `pip install --target .whl/site pulp msgspec bitsandbytes` puts it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
[ ! -d "$root/.whl/site" ] || PYTHONPATH=$PYTHONPATH:$root/.whl/site
export PYTHONDONTWRITEBYTECODE=1
exec "${PYTHON:-python3}" "$root/examples/benchmarks/gpu.py" "$@"
