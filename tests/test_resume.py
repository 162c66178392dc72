"""A run that goes on from what a stopped or killed one has kept gives the same file as one in one go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from patience import PATIENCE
from run_contents import contents
from safetensors.numpy import save_file
from several_blocks import save_several_blocks
from stopped_process import ended, go_on, stopped_at

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.errors import ChangedFileError, OptionError, RunFileError
from ckptdiff.events import Event, Note, StageBegun, StageProgress, TensorsDone
from ckptdiff.figures.spectral import SPECTRAL_KEYS
from ckptdiff.files.packed_entry import unpack
from ckptdiff.files.unfinished import Saving, Unfinished
from ckptdiff.options import MaskRule, Options, SpectraOptions
from ckptdiff.run.engine import run
from ckptdiff.run.tasks import Grain
from ckptdiff.spectra.budget import Budget
from ckptdiff.spectra.existing import add_spectra
from ckptdiff.spectra.job import MatrixJob
from ckptdiff.spectra.kept_spectra import KeptSpectra, packed_spectra, spectra_of
from ckptdiff.spectra.measure import MatrixSpectra

FIXTURES = Path(__file__).parents[1] / "fixtures"
AT_ONCE = Saving(0, 0)
FINE = Grain(blocks=1, tensors=7)
"""So that small checkpoints have many tasks."""


class GivenUpError(Exception):
    """Raised by a listener."""


def of(name: str) -> tuple[str, str]:
    return str(FIXTURES / name / "base"), str(FIXTURES / name / "tuned")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_several_blocks(tmp_path_factory.mktemp("large"), 2)


def stopping(after: int, kinds: tuple[type[Event], ...]) -> Callable[[Event], None]:
    """A listener that gives up at an event: the so-manieth of these kinds."""
    count = 0

    def listen(event: Event) -> None:
        nonlocal count
        count += isinstance(event, kinds)
        if count > after:
            raise GivenUpError

    return listen


def once_measured(event: Event) -> None:
    """A listener that gives up when all spectra are measured, and nothing is in place yet."""
    if isinstance(event, StageProgress) and event.stage == "spectra" and event.done >= 1:
        raise GivenUpError


CASES = {
    "abs": ("large", Options(mask=MaskRule("abs", 1e-5))),
    "top": ("large", Options(compare="stored", mask=MaskRule("top", 20))),
    "rel": ("large", Options(compare="stored", mask=MaskRule("rel", 1e-3))),
    "none": ("large", Options(mask=MaskRule("none"))),
    "mapped": ("large", Options(io="mmap", mask=MaskRule("bitwise"))),
    "spectra": ("moe", Options(spectra=SpectraOptions("exact"))),
    "randomized": ("llama", Options(spectra=SpectraOptions("randomized"), exclude=("*norm*",))),
    "wide": ("wide", Options(compare="stored", mask=MaskRule("rel", 1e-3))),
    "odd": ("odd", Options(mask=MaskRule("bitwise"))),
    "fp8": ("fp8", Options(mask=MaskRule("bitwise"))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_parts_is_one_in_one_go(case: str, large: tuple[str, str], tmp_path: Path) -> None:
    name, options = CASES[case]
    options = replace(options, threads=2)
    pair = large if name == "large" else of(name)
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    run(*pair, out=whole, options=options, grain=FINE)
    rounds, kinds = 0, (TensorsDone, StageProgress)
    while not parts.exists():
        try:
            # A tensor further each time, so that what is kept is found, and more is kept.
            run(*pair, out=parts, options=options, grain=FINE, saving=AT_ONCE, listener=stopping(2 * rounds, kinds))
        except GivenUpError:
            assert not list(tmp_path.glob(".*"))
        rounds += 1
    assert rounds > 1 and contents(parts) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.h5", "whole.h5"]


def test_what_is_kept_is_not_measured_again(large: tuple[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    """A run that was stopped as it wrote its file has nothing left to measure, whatever its threads and memory."""
    out = tmp_path / "run.h5"
    options = Options(spectra=SpectraOptions("randomized"), include=("c.*", "b.*"), threads=1)

    def last(event: Event) -> None:
        if isinstance(event, StageBegun) and event.stage == "writing":
            raise GivenUpError

    heard: list[Event] = []
    with pytest.raises(GivenUpError):
        run(*large, out=out, options=options, saving=AT_ONCE, listener=last)
    from ckptdiff.run.worker import Worker
    from ckptdiff.spectra.job import Measuring

    for owner, method in ((Worker, "measure"), (Worker, "pass_over"), (Measuring, "measure_all")):
        monkeypatch.delattr(owner, method)
    options = replace(options, threads=3, max_memory=16 << 30, io="mmap", groups=("norms=norm",))
    found = run(*large, out=out, options=options, saving=AT_ONCE, listener=heard.append, title="again")
    assert found.tensors[0].groups == ("norms",)
    assert found.spectra is not None and found.spectra.methods.count("randomized") == 1
    begun = {event.stage: event for event in heard if isinstance(event, StageBegun)}
    assert begun["comparing"].kept == begun["comparing"].total and begun["spectra"].kept == 1
    first = next(event for event in heard if isinstance(event, StageProgress) and event.stage == "spectra")
    assert first.done == 1


@pytest.mark.parametrize("harm", [False, True], ids=["whole", "damaged"])
@pytest.mark.parametrize("first, second", [(1, 3), (3, 1), (64, 2)])
def test_what_was_kept_in_other_spans_is_found(
    large: tuple[str, str], tmp_path: Path, first: int, second: int, harm: bool
) -> None:
    options = Options(compare="stored", mask=MaskRule("top", 20), threads=1)
    whole, out = tmp_path / "whole.h5", tmp_path / "run.h5"
    run(*large, out=whole, options=options)

    def late(event: Event) -> None:
        if isinstance(event, StageProgress) and event.done > 20 << 20:
            raise GivenUpError

    with pytest.raises(GivenUpError):
        run(*large, out=out, options=options, grain=Grain(blocks=first), saving=AT_ONCE, listener=late)
    if harm:
        damage(tmp_path / "run.h5.part")
    heard: list[Event] = []
    run(*large, out=out, options=options, grain=Grain(blocks=second), saving=AT_ONCE, listener=heard.append)
    assert contents(out) == contents(whole)
    assert next(event for event in heard if isinstance(event, StageBegun) and event.stage == "comparing").kept > 0


def damage(folder: Path) -> None:
    for path in sorted(folder.glob("*.done"))[::2]:
        stored = bytearray(path.read_bytes())
        stored[-1] ^= 1
        path.write_bytes(stored)
    for path in sorted(folder.glob("*.done"))[1::4]:
        os.truncate(path, path.stat().st_size - 1)


def test_what_is_damaged_is_measured_again_and_said(large: tuple[str, str], tmp_path: Path) -> None:
    options = Options(spectra=SpectraOptions("randomized"), exclude=("a.*",))
    whole, out = tmp_path / "whole.h5", tmp_path / "run.h5"
    run(*large, out=whole, options=options, grain=FINE)
    with pytest.raises(GivenUpError):
        run(*large, out=out, options=options, grain=FINE, saving=AT_ONCE, listener=once_measured)
    damage(tmp_path / "run.h5.part")
    heard: list[Event] = []
    run(*large, out=out, options=options, grain=FINE, saving=AT_ONCE, listener=heard.append)
    said = [event.text for event in heard if isinstance(event, Note) and event.text.endswith("measured again")]
    assert len(said) > 1 and all("run.h5.part" in text for text in said)
    assert contents(out) == contents(whole)


def test_spectra_are_added_in_parts(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    ckptdiff.diff(*of("moe"), out=whole)
    before = whole.read_bytes()
    parts.write_bytes(before)
    add_spectra(whole, "exact")
    real, made = KeptSpectra.keep, []

    def keep(self: KeptSpectra, job: MatrixJob, spectra: MatrixSpectra) -> None:
        real(self, job, spectra)
        if spectra.method:
            made.append((job.index, job.view.offset))
            if len(made) % 5 == 0:
                raise GivenUpError

    rounds = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptSpectra, "keep", keep)
        while parts.read_bytes() == before:
            try:
                add_spectra(parts, "exact", threads=1 + rounds % 2, resume=True)
            except GivenUpError:
                assert (tmp_path / "parts.h5.part").is_dir()
            rounds += 1
    assert rounds > 1 and len(made) == len(set(made))
    assert contents(parts) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.h5", "whole.h5"]


def test_spectra_of_another_run_file_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    ckptdiff.diff(*of("tied"), out=out)
    with pytest.raises(GivenUpError):
        add_spectra(out, resume=True, listener=once_measured)
    assert (tmp_path / "run.h5.part").is_dir()
    with pytest.raises(RunFileError, match="belongs to another run") as caught:
        add_spectra(out, "exact", resume=True)
    assert "exact" in str(caught.value.found)
    assert main(["spectra", "add", str(out), "--seed", "4", "--resume"]) == 2
    ckptdiff.diff(*of("tied"), out=out, compare="stored")
    with pytest.raises(RunFileError, match="belongs to another run") as caught:
        add_spectra(out, resume=True)
    assert "--compare stored" in str(caught.value.found)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "mask": ({"mask": MaskRule("bitwise")}, "--mask bitwise"),
    "compare": ({"compare": "stored"}, "--compare stored"),
    "map": ({"renames": ("^x=y",)}, "--map '^x=y'"),
    "include": ({"include": ("*proj*",)}, "--include '*proj*'"),
    "spectra": ({"spectra": SpectraOptions("exact")}, "--spectra mode exact"),
    "seed": ({"spectra": SpectraOptions(seed=3)}, "seed 3"),
    "device": ({"device": "reference"}, "--device reference"),
}


@pytest.fixture
def copied(tmp_path: Path) -> tuple[str, str]:
    """A pair that may be changed."""
    folder = tmp_path / "pair"
    folder.mkdir()
    rng = np.random.default_rng(2)
    weights = rng.normal(0, 0.02, (40, 30)).astype(ml_dtypes.bfloat16)
    for side in ("base", "tuned"):
        save_file({"a.proj.weight": weights, "b.proj.weight": weights + weights}, folder / f"{side}.safetensors")
    return str(folder / "base.safetensors"), str(folder / "tuned.safetensors")


@pytest.mark.parametrize("change", [*CHANGES, "base", "tuned"])
def test_another_run_is_refused_by_what_differs(change: str, copied: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    options = Options(device="cpu")
    with pytest.raises(GivenUpError):
        run(*copied, out=out, options=options, saving=AT_ONCE, listener=stopping(0, (TensorsDone,)))
    part = tmp_path / "run.h5.part"
    before = {path.name: path.read_bytes() for path in part.iterdir()}
    if change in CHANGES:
        changes, expected = CHANGES[change]
        options = replace(options, **changes)
    else:
        expected = f"{change} 1 file"
        os.utime(copied[change == "tuned"], ns=(10**18, 10**18))
    with pytest.raises(RunFileError, match="belongs to another run") as caught:
        run(*copied, out=out, options=options, saving=AT_ONCE)
    assert caught.value.file == str(part) and expected in str(caught.value.found)
    assert {path.name: path.read_bytes() for path in part.iterdir()} == before and not out.exists()


def test_what_was_read_of_a_changed_file_is_not_kept(copied: tuple[str, str], tmp_path: Path) -> None:
    """Not even if the file is as it was when the run goes on."""
    out, shard = tmp_path / "run.h5", Path(copied[1])
    stored, times = shard.read_bytes(), shard.stat()
    keep = Unfinished.keep

    def change(self: Unfinished, key: str, parts: list[bytes]) -> None:
        shard.write_bytes(stored[:-2] + b"\x80\x3f")
        keep(self, key, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unfinished, "keep", change)
        with pytest.raises(ChangedFileError):
            run(*copied, out=out, saving=AT_ONCE)
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
    shard.write_bytes(stored)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(*copied, out=out, saving=AT_ONCE)


def test_another_version_is_refused(copied: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run.h5"
    with pytest.raises(GivenUpError):
        run(*copied, out=out, saving=AT_ONCE, listener=stopping(0, (TensorsDone,)))
    version = ckptdiff.__version__
    monkeypatch.setattr(ckptdiff, "__version__", "9.9")
    with pytest.raises(RunFileError, match=rf"(?s)expected: +version {version}.*found: +version 9\.9"):
        run(*copied, out=out, saving=AT_ONCE)


def test_a_run_without_resume_leaves_it_alone_and_says_so(copied: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    with pytest.raises(GivenUpError):
        run(*copied, out=out, saving=AT_ONCE, listener=stopping(0, (TensorsDone,)))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run.h5.part").iterdir()}
    heard: list[Event] = []
    run(*copied, out=out, options=Options(mask=MaskRule("bitwise")), listener=heard.append)
    said = [event.text for event in heard if isinstance(event, Note) and event.warning]
    assert len(said) == 1 and "--resume goes on from there" in said[0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run.h5.part").iterdir()} == before


def test_two_runs_at_once(copied: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run.h5"

    def again(event: Event) -> None:
        if isinstance(event, TensorsDone):
            with pytest.raises(RunFileError, match="another run with --resume is at work"):
                run(*copied, out=out, saving=AT_ONCE)

    run(*copied, out=out, saving=AT_ONCE, listener=again)
    assert out.exists() and not (tmp_path / "run.h5.part").exists()


def test_resume_takes_a_run_file(copied: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="there is none"):
        ckptdiff.diff(*copied, resume=True)
    assert main(["diff", *copied, "--resume"]) == 2
    assert "try:      -o RUN.h5" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_keeps_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the command line goes on from there; nothing has been written yet when the signal comes."""
    out, whole = tmp_path / "run.h5", tmp_path / "whole.h5"
    words = ["diff", *of("llama"), "--spectra", "randomized", "--threads", "1", "-O", os.devnull, "-o"]
    process = stopped_at("ckptdiff.spectra.kept_spectra:KeptSpectra.keep", 3, *words, out, "--resume")
    process.terminate()
    go_on(process)
    code, err = ended(process)
    folder = tmp_path / "run.h5.part"
    said = f"ckptdiff: warning: what is done is kept in {folder}: the same command goes on from there\n"
    assert (code, err) == (143, f"{said}ckptdiff: terminated\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5.part"]
    assert main([*words, str(out), "--resume", "--mask", "bitwise"]) == 2
    assert f"file:     {folder}" in capsys.readouterr().err
    assert main([*words, str(out), "--resume"]) == main([*words, str(whole)]) == 0
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.h5", "whole.h5"]


# One that cannot be waited for, as within a large eigenproblem.
STUCK = """
import time
from pathlib import Path

from ckptdiff.cli.signals import ended_soon, signals_noted
from ckptdiff.files.unfinished import Saving, Unfinished

with signals_noted(), ended_soon(0.0), Unfinished(Path("run.h5"), {}, print, Saving(0, 0)) as unfinished:
    unfinished.keep("a", [b"a"])
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""


def test_a_signal_that_cannot_be_waited_for(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (
        process.returncode == 130 and b"run.h5.part: the same command goes on" in err and err.endswith(b"interrupted\n")
    )
    with Unfinished(tmp_path / "run.h5", {}, print) as unfinished:
        assert unfinished.find("a") == b"a"


def test_a_matrix_that_memory_puts_into_another_mode_is_measured_again(tmp_path: Path, copied: tuple[str, str]) -> None:
    from ckptdiff.checkpoint import open_checkpoint, pair
    from ckptdiff.spectra.matrices import matrices_of

    (one, *_) = pair(open_checkpoint(copied[0]), open_checkpoint(copied[1])).pairs
    (view,) = matrices_of(one.name, one.shape)
    job = MatrixJob(0, 0, one, view, 0.0, False)
    roomy, narrow = (Budget(SpectraOptions("exact"), bound, 0, 1) for bound in (1 << 40, 1000))
    found = MatrixSpectra("exact", {SPECTRAL_KEYS[0]: 0.5, "x": float("nan")}, {"delta": np.ones(3)}, ("because",))
    with Unfinished(tmp_path / "run.h5", {}, print, AT_ONCE) as unfinished:
        KeptSpectra(unfinished, roomy).keep(job, found)
        KeptSpectra(unfinished, roomy).keep(replace(job, index=1), MatrixSpectra("", reasons=("no room",)))
    with Unfinished(tmp_path / "run.h5", {}, print, AT_ONCE) as unfinished:
        again = KeptSpectra(unfinished, roomy).find(job)
        assert again is not None and repr(again) == repr(found)
        assert KeptSpectra(unfinished, narrow).find(job) is None
        assert KeptSpectra(unfinished, roomy).find(replace(job, index=1)) is None
    assert repr(spectra_of(unpack(b"".join(packed_spectra(found))))) == repr(found)


# Each file-system call of a run that has to do with its output is the last one of some process, which is killed there.
KILLED = """
import os, random, signal, sys, threading
from pathlib import Path

import ckptdiff.spectra.existing, ckptdiff.runfile.reader
from ckptdiff.files.unfinished import Saving
from ckptdiff.options import Options, SpectraOptions
from ckptdiff.run.engine import run

base, tuned, folder, every = sys.argv[1:]
CALLS = ("open", "os.")


def compare(last, out):
    calls = 0

    def hear(event, arguments):
        nonlocal calls
        if event.startswith(CALLS) and arguments and str(arguments[0]).startswith(str(out.parent)):
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)
    run(base, tuned, out=out, options=Options(threads=2, spectra=SpectraOptions("exact")), saving=Saving(0, 0))
    return calls


def child(last, out):
    process = os.fork()
    if process == 0:
        try:
            calls = compare(last, out)
            with open(folder + "/calls", "w") as file:
                file.write(str(calls))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


whole = Path(folder, "whole", "run.h5")
whole.parent.mkdir()
assert child(0, whole) == 0
calls = int(Path(folder, "calls").read_text())
chosen = random.Random(1)
for first in range(1, calls, int(every)):
    out = Path(folder, str(first), "run.h5")
    out.parent.mkdir()
    last, codes = first, []
    while not codes or codes[-1]:  # killed again and again, each time at some call, until it comes to its end
        codes.append(child(last, out))
        assert codes[-1] in (0, -9), codes
        last = chosen.randrange(1, calls) if len(codes) < 3 else 0
    print(first, *codes)
"""


@pytest.mark.slow
def test_killed_at_any_call_and_resumed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *of("tied"), str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rounds = [line.split()[1:] for line in done.stdout.splitlines()]
    assert len(rounds) >= 8 and sum(codes.count("-9") for codes in rounds) > len(rounds) // 2
    expected = contents(tmp_path / "whole" / "run.h5")
    folders = [path for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert len(folders) == len(rounds)
    for folder in folders:
        assert contents(folder / "run.h5") == expected
        assert [path.name for path in folder.iterdir()] == ["run.h5"]
