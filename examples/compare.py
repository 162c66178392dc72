"""A comparison step by step, as one would do it in a notebook.

python examples/compare.py [BASE TUNED]
"""

# %% Compare
import sys
import tempfile
from pathlib import Path

import numpy as np

import ckptdiff

ROOT = Path(__file__).parents[1]
base, tuned = sys.argv[1:3] if len(sys.argv) > 2 else (ROOT / "fixtures/llama/base", ROOT / "fixtures/llama/tuned")
work = tempfile.TemporaryDirectory()
run_file = Path(work.name, "run.h5")

diff = ckptdiff.diff(base, tuned, out=run_file)
print(f"{diff.counts['matched']} tensors, {diff.overall['unchanged_abs']['1e-05']:.1%} of the values within 1e-5")
print(f"relative update {diff.overall['rel_norm']:.4%}")

# %% Where did it change? One dict of figures for each module type
for row in sorted(diff.grouped("module"), key=lambda row: row["rel_norm"] or 0, reverse=True):
    print(f"{row['module_type']:14} update {row['rel_norm'] or 0:.4%}, unchanged {row['unchanged_bitwise']:.1%}")

# %% Is that more than rounding? Small weights have a finer grid, so noise falls on them too
share, noise = diff.overall["low_coverage"]["0.1"], diff.overall["low_coverage_null"]["0.1"]
print(f"the 10 % smallest weights hold {share:.1%} of the changes; of rounded noise, {noise:.1%}")

# %% Does the cast hide something? Compare what is stored
stored = ckptdiff.diff(base, tuned, compare="stored", mask="bitwise")
print(f"unchanged as stored {stored.overall['unchanged_bitwise']:.1%}, in bf16 {diff.overall['unchanged_bitwise']:.1%}")

# %% Look at a mask: are changes spread evenly over the rows of a matrix?
with ckptdiff.RunFile(run_file) as run:
    name = max((name for name in run.masks if len(run.masks[name].shape) == 2), key=lambda name: run.masks[name].count)
    mask = run.masks[name].dense()
    # The histogram of |d| by powers of two; bin 0 is exactly zero.
    sizes = run.histograms[name].delta[0]
print(f"{name}: {mask.mean():.1%} in the mask, by row {mask.mean(axis=1).min():.1%} to {mask.mean(axis=1).max():.1%}")
print(f"sizes of d: 2^{np.flatnonzero(sizes[1:])[0] - 149} to 2^{np.flatnonzero(sizes[1:])[-1] - 149}")

# %% Done
work.cleanup()
