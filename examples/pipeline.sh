#!/usr/bin/env bash
# A gate for a release: compare two checkpoints, list the tensors that moved most, and fail if the update is too large.
#
#     bash examples/pipeline.sh BASE TUNED [LIMIT]
#
# Exits with 0 if the relative update is at most LIMIT (0.01), with 1 if it is larger, with 2 if something is wrong.
set -euo pipefail
base=$1 tuned=$2 limit=${3:-0.01}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One JSON object a line, as the tensors are done: nothing has to hold the whole report.
ckptdiff diff "$base" "$tuned" -o "$work/run.h5" --format ndjson --no-progress |
    python3 -c '
import json, sys

moved = []
for line in sys.stdin:
    row = json.loads(line)
    if row["type"] == "tensor" and row["rel_norm"]:
        moved.append((row["rel_norm"], row["name"]))
for share, name in sorted(moved, reverse=True)[:3]:
    print(f"{share:8.4%}  {name}")
'

# The run file has all that was measured, so checks read no checkpoint again. A check that holds makes it exit with 1.
ckptdiff show "$work/run.h5" --format json --fail-if "global.rel_norm>$limit" |
    python3 -c 'import json, sys; print("relative update:", json.load(sys.stdin)["global"]["rel_norm"])'
