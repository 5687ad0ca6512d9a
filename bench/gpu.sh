#!/usr/bin/env bash
# Tests and figures of everything there is for a GPU, from a checkout, with nothing to install:
#   OUT=folder bench/gpu.sh             on the GPU, in less than 9 minutes
#   OUT=folder bench/gpu.sh --dry-run   the same parts on a CPU, with small shapes
# Needs torch, triton, numpy, einops, tqdm and pytest in PYTHON (python3), and no network. The last
# lines printed are the table; OUT gets results.jsonl, copies.jsonl and log.txt.
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
