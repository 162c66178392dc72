"""Real commands under a real pseudo-terminal: what the screen shows while they run, and afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from pseudo_terminal import Terminal, run_under_terminal
from safetensors.numpy import save_file

pytestmark = pytest.mark.slow

LONG = "model.language_model.layers.0.self_attn.q_proj.weight"
NAMES = (LONG, "model.language_model.layers.0.mlp.gate_proj.weight", "model.norm.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints in a row, and run files of the first with each of the others."""
    from ckptdiff.cli import main

    folder = tmp_path_factory.mktemp("terminal")
    rng = np.random.default_rng(0)
    values = {name: 0.05 * rng.standard_normal((1500, 700) if name.endswith("proj.weight") else 700) for name in NAMES}
    for number in range(3):
        save_file({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in values.items()}, folder / f"{number}.st")
        (folder / f"{number}.st").rename(folder / f"{number}.safetensors")
        for tensor in values.values():
            tensor += 1e-3 * rng.standard_normal(tensor.shape) * (rng.random(tensor.shape) < 0.2)
    for number in (1, 2):
        pair = [str(folder / f"{side}.safetensors") for side in (0, number)]
        assert main(
            ["diff", *pair, "--compare", "stored", "--mask", "bitwise", "-o", str(folder / f"{number}.h5"), "-q"]
        )
    # Every kernel is called once, so that no command of a test has one to compile, which it would tell of.
    sides, out = [str(folder / f"{number}.safetensors") for number in range(3)], ["-O", str(folder / "x")]
    for words in (
        *(["diff", *sides[:2], "--spectra", mode, *out] for mode in ("randomized", "exact")),
        ["lora", *sides[:2], "-o", str(folder / "adapter"), "--rank", "4", *out],
        ["track", *sides, *out],
        ["mask", "combine", "--union", str(folder / "1.h5"), str(folder / "2.h5"), "-o", str(folder / "both.h5")],
    ):
        assert main([*words, "--no-progress"]) == 0
    return folder


def command(*words: str | Path) -> str:
    """Python code of a command."""
    return f"from ckptdiff.cli import main\nsys.exit(main({list(map(str, words))!r}))\n"


def rows(frame: list[str]) -> dict[str, str]:
    """The rows of stages in a frame: what stands beside each bar, which is part of what is returned."""
    found = (re.match(r"([a-z ]+?) +([━─]+  .*)", line) for line in frame)
    return {row[1]: row[2] for row in found if row}


def assert_each_stage_is_shown(terminal: Terminal, stages: list[str]) -> None:
    """From nothing to its end, never back, all before it complete; and no trace of it is left."""
    order: list[str] = []
    bars: dict[str, list[float]] = {}
    for frame in terminal.frames:
        for stage, row in rows(frame).items():
            if stage not in order:
                order.append(stage)
                assert row.count("━") == 0 or " in " in row, "its first moment"
            bar, words = row.split("  ", 1)
            bars.setdefault(stage, []).append(bar.count("━") / len(bar))
            if " in " in words:
                assert "─" not in bar
            for earlier in order[: order.index(stage)]:
                assert earlier not in rows(frame) or " in " in rows(frame)[earlier]
    assert order == stages
    for stage, shares in bars.items():
        assert shares[-1] == 1.0, stage
    assert_clean(terminal)


def assert_clean(terminal: Terminal) -> None:
    assert not terminal.screen.cursor.hidden
    assert not any("━" in line or "─" in line or "…" in line for line in terminal.frames[-1]), terminal.frames[-1]
    assert terminal.screen.cursor.x == 0


def test_a_diff_with_spectra(folder: Path, tmp_path: Path) -> None:
    pair = folder / "0.safetensors", folder / "1.safetensors"
    words = (
        "diff",
        *pair,
        "--spectra",
        "randomized",
        "-o",
        tmp_path / "run.h5",
        "--format",
        "json",
        "-O",
        tmp_path / "x",
    )
    with run_under_terminal(command(*words), 100, 30) as terminal:
        assert terminal.ended() == 0
    assert_each_stage_is_shown(terminal, ["comparing", "spectra", "writing"])
    assert terminal.frames[-1] == []
    shares = [
        int(share[1])
        for frame in terminal.frames
        if (share := re.search(r"(\d+) %( in \d+ s)?(  |$)", rows(frame).get("spectra", "")))
    ]
    assert shares == sorted(shares) and shares[-1] == 100  # in how many steps, depends on the machine
    assert any(re.search(r"MB in \d+ s", rows(frame).get("comparing", "")) for frame in terminal.frames)
    assert any(LONG in frame for frame in terminal.frames)


def test_names_are_shortened_where_the_screen_is_narrow(folder: Path, tmp_path: Path) -> None:
    pair = folder / "0.safetensors", folder / "1.safetensors"
    words = "diff", *pair, "--spectra", "exact", "--format", "json", "-O", tmp_path / "x"
    with run_under_terminal(command(*words), 40, 10) as terminal:
        assert terminal.ended() == 0
    assert_each_stage_is_shown(terminal, ["comparing", "spectra"])
    assert any(LONG[:39] + "…" in frame for frame in terminal.frames)
    for frame in terminal.frames:
        assert len(frame) <= 3


def test_a_screen_of_few_lines(folder: Path, tmp_path: Path) -> None:
    """Shows the last stages, and nothing of it scrolls away."""
    pair = folder / "0.safetensors", folder / "1.safetensors"
    words = "lora", *pair, "-o", tmp_path / "adapter", "--rank", "4", "-O", tmp_path / "x"
    with run_under_terminal(command(*words), 60, 4) as terminal:
        assert terminal.ended() == 0
    assert terminal.frames[-1] == []
    assert max(len(rows(frame)) for frame in terminal.frames) == 2
    assert {stage for frame in terminal.frames for stage in rows(frame)} == {"comparing", "factors", "writing"}
    assert_clean(terminal)


def test_every_other_command(folder: Path, tmp_path: Path) -> None:
    """One after the other in one process: the stages of each, and what is left on the screen when it has ended."""
    zero, one, two, out = *(folder / f"{number}.safetensors" for number in range(3)), tmp_path
    run = tmp_path / "run.h5"
    run.write_bytes((folder / "1.h5").read_bytes())
    commands: list[tuple[list[str | Path], list[str]]] = [
        (["mask", "export", run, "-o", out / "bool.safetensors"], ["exporting"]),
        (["mask", "export", run, "-o", out / "coo.npz", "--layout", "coo"], ["exporting"]),
        (["mask", "export", run, "-o", out / "patch.safetensors", "--layout", "patch"], ["exporting"]),
        (["mask", "export", run, "-o", out / "shira", "--layout", "shira", "--rank", "3"], ["exporting"]),
        (["mask", "combine", "--union", run, folder / "2.h5", "-o", out / "both.h5"], ["combining"]),
        (["patch", "apply", zero, out / "patch.safetensors", "-o", out / "made.safetensors"], ["patching"]),
        (["overlap", run, folder / "2.h5", "--base", zero, "-O", out / "x"], ["overlap"]),
        (["track", zero, one, two, "-O", out / "x"], ["following"]),
        (
            ["spectra", "add", run, "--base", out / "made0.safetensors", "--tuned", out / "made.safetensors"],
            ["copying", "reading base", "reading tuned", "spectra", "writing"],
        ),
        (["claims", zero, one, "--spectra", "randomized", "-O", out / "x"], ["comparing", "spectra"]),
    ]
    (out / "made0.safetensors").write_bytes(zero.read_bytes())
    listed = json.dumps([list(map(str, words)) for words, _ in commands])
    code = (
        "import json\nfrom ckptdiff.cli import main\nsys.stdout = open(os.devnull, 'w')\n"
        f"for number, words in enumerate(json.loads({listed!r})):\n"
        "    assert main(words) == 0, words\n"
        "    print(f'== {number} ended', file=sys.stderr)\n"
    )
    with run_under_terminal(code, 200, 40) as terminal:
        assert terminal.ended() == 0, terminal.frames[-1]
    seen: list[set[str]] = [set() for _ in commands]
    for frame in terminal.frames:
        number = sum(line.startswith("== ") for line in frame)
        if number < len(commands):
            seen[number] |= rows(frame).keys()
            ended = next((i for i, line in reversed(list(enumerate(frame))) if line.startswith("== ")), -1)
            assert not rows(frame[: ended + 1])
    assert seen == [set(stages) for _, stages in commands]
    assert_clean(terminal)
    left = [line for line in terminal.frames[-1] if not line.startswith("== ")]
    assert all(line.startswith("ckptdiff: ") for line in left), left


def held_until(path: Path) -> str:
    """Code after which no matrix is measured before there is a file of that name."""
    return f"""
from ckptdiff.spectra import job
measure = job.Measuring._measure
def held(measuring, *arguments):
    while not os.path.exists({str(path)!r}) and not measuring.stop.wait(0.01):
        pass
    return measure(measuring, *arguments)
job.Measuring._measure = held
"""


def test_ctrl_c_leaves_the_screen_clean(folder: Path, tmp_path: Path) -> None:
    pair = folder / "0.safetensors", folder / "1.safetensors"
    words = "diff", *pair, "--spectra", "randomized", "-o", tmp_path / "run.h5"
    with run_under_terminal(held_until(tmp_path / "never") + command(*words), 80, 24) as terminal:
        terminal.wait_for(lambda frame: "spectra" in rows(frame) and frame[-1] in NAMES)
        assert " in " in rows(terminal.frames[-1])["comparing"]
        terminal.type("\x03")
        assert terminal.ended() == 130
    assert terminal.frames[-1] in (["ckptdiff: interrupted"], ["^Cckptdiff: interrupted"])
    assert_clean(terminal)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_screen_clean(folder: Path, tmp_path: Path) -> None:
    """The tuned checkpoint changes while its spectra are measured."""
    base, tuned, go_on = folder / "0.safetensors", tmp_path / "tuned.safetensors", tmp_path / "go on"
    tuned.write_bytes((folder / "1.safetensors").read_bytes())
    words = "diff", base, tuned, "--spectra", "randomized"
    with run_under_terminal(held_until(go_on) + command(*words), 80, 24) as terminal:
        terminal.wait_for(lambda frame: "spectra" in rows(frame))
        with tuned.open("ab") as file:
            file.write(b"more")
        go_on.touch()
        assert terminal.ended() == 2
    assert terminal.frames[-1][0].startswith("ckptdiff: error: the shard changed while it was read")
    assert_clean(terminal)


def test_a_report_that_comes_line_by_line_has_the_terminal_for_itself(folder: Path) -> None:
    words = "diff", folder / "0.safetensors", folder / "1.safetensors", "--format", "ndjson"
    with run_under_terminal("os.dup2(2, 1)\n" + command(*words), 80, 24) as terminal:
        assert terminal.ended() == 0
    kinds = [json.loads(line)["type"] for line in terminal.written.decode().splitlines()]
    assert kinds[0] == "header" and kinds.count("tensor") == len(NAMES)


@pytest.mark.parametrize(("option", "environment"), [("--no-progress", {}), ("--quiet", {}), ("", {"TERM": "dumb"})])
def test_nothing_is_drawn(folder: Path, tmp_path: Path, option: str, environment: dict[str, str]) -> None:
    words = "mask", "export", folder / "1.h5", "-o", tmp_path / "bool.safetensors", *([option] if option else [])
    with run_under_terminal(command(*words), 80, 24, **environment) as terminal:
        assert terminal.ended() == 0
    said = f"ckptdiff: 3 masks written to {tmp_path}/bool.safetensors"
    assert "".join(terminal.frames[-1]) == ("" if option == "--quiet" else said)
    assert b"\x1b" not in terminal.written
