"""All that the first run on a GPU has to answer, in two calls of minutes, from the tree, installing nothing.

    PYTHONPATH=. python3 bench/on_gpu.py --call a --out DIR    # 4 minutes: is it right, and how fast
    PYTHONPATH=. python3 bench/on_gpu.py --call b --out DIR    # 6 minutes: what it depends on, and the sanitizers
    PYTHONPATH=. python3 bench/on_gpu.py --rehearse --out DIR  # both, small, without a GPU

Each step is a process of its own with a time limit; what is over its limit is killed with all it started, and the rest
goes on. DIR/call-a.json is whole at any moment and holds what was found so far, DIR/call-a.log what the steps printed,
DIR/call-a.md the tables. The exit code is 0 if every step passed. `GPU.md` says what each step answers.

If the kernels count wrong, steps that only time them are skipped; those that say what else is wrong are not. When time
runs out the last steps are skipped: the most important come first. A rehearsal takes the same steps in the same way,
but for sizes and for the device: `host_device.py` puts the tests' host device in the place of a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from gpu_calls import BENCH, CALLS, REAL, SMALL, Sizes, preparations
from measure import machine
from steps import ROOT, Call, Step, done

BUDGET = {"a": 240.0, "b": 360.0}


def commit() -> str:
    """The commit of the tree, if it is a clone."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def sources() -> str:
    """A hash of all that is measured, which tells trees apart where there is no git."""
    digest = hashlib.sha256()
    for folder in ("ckptdiff", "cuda", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def scratch_folder(sizes: Sizes, memory: Path = Path("/dev/shm")) -> Iterator[tuple[Path, Sizes]]:
    """A folder for all that is written, and sizes that fit there: in memory if there is room, else on a disk."""
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 3 * sizes.pair
    if not roomy:  # a large pair would be as slow to write as the disk is
        sizes = replace(sizes, pair=min(sizes.pair, 4 << 30))
    with tempfile.TemporaryDirectory(prefix="ckptdiff-", dir=memory if roomy else None) as name:
        while 3 * sizes.pair > shutil.disk_usage(name).free and sizes.pair > 1 << 20:
            sizes = replace(sizes, pair=sizes.pair // 2)
        yield Path(name), sizes


def make(name: str, options: argparse.Namespace, kernels: Path) -> bool:
    """One call, in which a rehearsal builds the GPU's kernels in a folder; returns whether all passed."""
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    with scratch_folder(SMALL if options.rehearse else REAL[name]) as (scratch, sizes):
        steps = chosen_steps(name, sizes, scratch, options)
        needed = {one for step in steps for one in step.after}
        prepared = [step for step in preparations(sizes, scratch) if step.name in needed]
        python = [sys.executable]
        if options.rehearse:
            python += [str(BENCH / "host_device.py"), str(kernels.absolute())]
        facts = {
            "name": name,
            "rehearsal": options.rehearse,
            "commit": options.commit or commit(),
            "sources": sources(),
            "begun": begun,
            "budget": options.budget or (3600.0 if options.rehearse else BUDGET[name]),
            "machine": machine(),
            "pair_bytes": 2 * sizes.pair,
            "scratch": str(scratch),
        }
        patience = 20.0 if options.rehearse else 1.0
        return Call(steps, prepared, python, options.out, scratch, facts, patience, options.rehearse).run()


def chosen_steps(name: str, sizes: Sizes, scratch: Path, options: argparse.Namespace) -> list[Step]:
    """The steps of a call; those that did not pass in an earlier one come right after the first two."""
    steps = CALLS[name](sizes, scratch)
    if options.repeat:
        before = {step["name"] for step in json.loads(options.repeat.read_text())["steps"] if not done(step)}
        again = [step for call in CALLS.values() for step in call(sizes, scratch) if step.name in before]
        steps = list({step.name: step for step in (*steps[:2], *again, *steps[2:])}.values())
    if options.only:
        steps = [step for step in steps if any(word in step.name for word in options.only.split(","))]
    return steps


def main() -> int:
    """Command line entry; returns 1 if a step did not pass."""
    parser = argparse.ArgumentParser(
        description="Answer all that a first run on a GPU has to, in two calls of minutes."
    )
    parser.add_argument("--call", choices=CALLS, help="which one; a rehearsal makes both by default")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures, tables and the log")
    parser.add_argument("--rehearse", action="store_true", help="small, on the host device of the tests, without a GPU")
    parser.add_argument("--kernels", type=Path, help="keep what a rehearsal builds here, for the next one")
    parser.add_argument("--budget", type=float, help="seconds of the whole call (a: 240, b: 360)")
    parser.add_argument("--repeat", type=Path, metavar="JSON", help="first repeat what did not pass in an earlier call")
    parser.add_argument("--only", metavar="WORDS", help="only steps whose name holds one of these, by commas")
    parser.add_argument("--commit", help="of a tree that is not a clone")
    options = parser.parse_args()
    if not (options.call or options.rehearse):
        parser.error("--call a or --call b, or --rehearse")
    options.out.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # steps over their limit are aborted
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="ckptdiff-kernels-") as built:
        kernels = options.kernels or Path(built)
        passed = [make(name, options, kernels) for name in ([options.call] if options.call else CALLS)]
    print("all passed" if all(passed) else "NOT ALL PASSED", flush=True)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
