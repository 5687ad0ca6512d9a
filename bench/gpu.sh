#!/usr/bin/env bash
# All there is to know of a GPU in two runs, from a checkout, with nothing to install:
#   OUT=folder bench/gpu.sh 1           what matters most, in less than 6 minutes
#   OUT=folder bench/gpu.sh 2           tests and all the rest, in less than 7
#   OUT=folder bench/gpu.sh --dry-run   both on a CPU, tiny; fails if a run might not fit its limit
# Needs torch, triton, numpy, einops, tqdm and pytest in PYTHON (python3), and no network. The last
# lines printed are the table. CONTRIBUTING.md says how to use fifteen minutes of a GPU.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-gpu_out}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# The package as it would be installed: models/ and bench/ lie inside skiparse/.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/skiparse"
ln -s "$checkout"/skiparse/* "$checkout/models" "$checkout/bench" "$package/skiparse/"

cd "$package"
PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}" \
    "${PYTHON:-python3}" -m skiparse.bench.gpu --out "$out" "$@"
