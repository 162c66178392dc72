"""Writes that fail: the process lives on, the error says why, and nothing is left behind.

A limit on the size of files stands in for a full disk. It holds for a whole process, so each test has its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import h5py
import pytest
from patience import PATIENCE

from ckptdiff.files.staged import StagedFile

PREAMBLE = """
    import os, resource, signal, sys
    from pathlib import Path
    import numpy as np
    from ckptdiff.errors import RunFileError
    from ckptdiff.figures.catalogue import COLUMNS
    from ckptdiff.measure.histograms import HistogramRows
    from ckptdiff.options import MaskRule
    from ckptdiff.figures.result import Diff, TensorFacts
    from ckptdiff.runfile.export import export_masks
    from ckptdiff.runfile.reader import RunFile
    from ckptdiff.files.staged import StagedFile
    from ckptdiff.runfile.writer import RunFileWriter

    folder = Path(sys.argv[1])
    PAGED = len(sys.argv) > 2
    target = folder / "run.h5"
    names = [f"model.layers.{i}.weight" for i in range(300)]
    shape = (4000, 8)
    payload = np.random.default_rng(0).bytes(4000)
    facts = tuple(TensorFacts(n, shape, "BF16", "BF16", "bf16", None, "language", "other", "other") for n in names)
    columns = {column.name: np.zeros(300, column.dtype) for column in COLUMNS}
    columns["numel"][:] = 32000
    columns["changed"][:] = 8 * sum(byte.bit_count() for byte in payload) // 8
    diff = Diff(facts, columns, {}, {}, "bf16", "bitwise", {}, "0.1.0")

    def write():
        with RunFileWriter(target, rule=MaskRule("bitwise"), compare="bf16", paged=PAGED) as writer:
            for name in names:
                writer.add_mask_chunks(name, shape, 0, [(payload, 1)])
                writer.add_histograms(HistogramRows.empty(1))
            writer.finish(diff)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
"""


def run(code: str, folder: Path, paged: bool = False) -> str:
    script = textwrap.dedent(PREAMBLE) + textwrap.dedent(code)
    options = ["paged"] if paged else []
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *options], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("paged", [False, True])
def test_a_run_file_that_does_not_fit(tmp_path: Path, paged: bool) -> None:
    output = run(
        """
        write()
        before = target.read_bytes()
        print(len(before))
        for share in (0, 0.0001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.9999):
            limit(int(share * len(before)))
            try:
                write()
            except RunFileError as error:
                assert error.file == str(target) and "bytes free" in error.found and "make room" in error.hint
                assert error.problem == "cannot write the output: File too large", error
            else:
                sys.exit(f"{share} did not fail")
            assert os.listdir(folder) == ["run.h5"], os.listdir(folder)
            assert target.read_bytes() == before
        limit(len(before))
        write()
        """,
        tmp_path,
        paged,
    )
    assert int(output) == (tmp_path / "run.h5").stat().st_size


def test_an_export_that_does_not_fit(tmp_path: Path) -> None:
    run(
        """
        write()
        with RunFile(target) as run:
            for name in ("m.safetensors", "m.npz"):
                for size in (0, 100, 200_000, 1_000_000):
                    limit(size)
                    try:
                        export_masks(run, folder / name, layout="packed")
                    except RunFileError as error:
                        assert "File too large" in error.problem
                    else:
                        sys.exit(f"{size} did not fail")
                    assert os.listdir(folder) == ["run.h5"]
        """,
        tmp_path,
    )


INTERRUPTED_WRITES = [(False, "1, 2, 10, 100, 500"), (True, "1, 2, 5, 10, 15")]


@pytest.mark.parametrize(("paged", "stops"), INTERRUPTED_WRITES)
@pytest.mark.parametrize(
    ("where", "raised"),
    [
        ((os, "pwrite"), "KeyboardInterrupt"),
        # Before the first line of a callback nothing of ours can catch it, and an error of HDF5 may take its place.
        ((StagedFile, "write"), "(KeyboardInterrupt, RuntimeError, SystemError)"),
    ],
    ids=["in", "before"],
)
def test_an_interrupt_of_a_write(tmp_path: Path, where: tuple[Any, str], raised: str, paged: bool, stops: str) -> None:
    owner, name = where
    run(
        f"""
        real, calls = {owner.__name__}.{name}, 0

        def interrupted(*arguments):
            global calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return real(*arguments)

        {owner.__name__}.{name} = interrupted
        for stop in ({stops}):
            calls = 0
            try:
                write()
            except {raised}:
                pass
            else:
                sys.exit(f"interrupt {{stop}} got lost")
            assert not os.listdir(folder)
        """,
        tmp_path,
        paged,
    )


def test_a_disk_that_cannot_be_synced(tmp_path: Path) -> None:
    run(
        """
        def broken(descriptor):
            raise OSError(5, "Input/output error")

        os.fsync = broken
        try:
            write()
        except RunFileError as error:
            assert error.problem == "cannot write the output: Input/output error"
        else:
            sys.exit("did not fail")
        assert not os.listdir(folder)
        """,
        tmp_path,
    )


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_run_leaves_the_target_alone(tmp_path: Path) -> None:
    (tmp_path / "run.h5").write_bytes(b"before")
    code = """
        with RunFileWriter(target, rule=MaskRule("bitwise"), compare="bf16") as writer:
            for name in names:
                writer.add_mask_chunks(name, shape, 0, [(payload, 1)])
            print("written", flush=True)
            signal.pause()
        """
    script = textwrap.dedent(PREAMBLE) + textwrap.dedent(code)
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "run.h5").read_bytes() == b"before"
    left = [path for path in tmp_path.iterdir() if path.name != "run.h5"]
    assert [path.suffix for path in left] == [".tmp"]
    with pytest.raises(OSError, match=r"truncated|signature"):
        h5py.File(left[0])
