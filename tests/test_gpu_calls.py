"""The script for the first run on a GPU: how it takes its steps, and both calls rehearsed without one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def bench_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def call(tmp_path):
    """Take steps that are Python programs; returns whether all passed, and the figures."""
    from steps import Call, Step

    def take(steps, prepared=(), budget=3600.0, **how):
        scratch, out = tmp_path / "scratch", tmp_path / "out"
        for folder in (scratch, out):
            folder.mkdir(exist_ok=True)
        facts = {"name": "a", "rehearsal": False, "commit": "unknown", "sources": "", "begun": "2000-01-01"}
        facts |= {"budget": budget, "machine": {"processor": "", "cores": 1}}
        made = [
            [Step(name, "", ("-c", text), **{"limit": 3000.0, **more}) for name, text, more in some]
            for some in (steps, prepared)
        ]
        passed = Call(*made, [sys.executable], out, scratch, facts, **how).run()
        return passed, json.loads((out / "call-a.json").read_text())

    return take


def wait_for(happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states(document):
    return {step["name"]: step["status"] for step in document["steps"]}


def test_a_step_that_fails_is_told_and_hides_no_later_one(call, tmp_path):
    write = (
        f"import json; json.dump({{'rows': [{{'GB/s': 5}}]}}, open({str(tmp_path / 'scratch' / 'rate.json')!r}, 'w'))"
    )
    passed, document = call(
        [
            ("broken", "print('the reason'); raise SystemExit(3)", {}),
            ("rate", write, {"title": "Rates", "times": True}),
        ]
    )
    assert not passed and not document["passed"] and document["ended"]
    broken, rate = document["steps"]
    assert (broken["status"], broken["why"], broken["output"]) == ("failed", "ended with 3", "the reason\n")
    assert (rate["status"], rate["figures"]) == ("passed", {"rows": [{"GB/s": 5}]})
    report = (tmp_path / "out" / "call-a.md").read_text()
    assert "the reason" in report and "### Rates\n\n| GB/s |\n| --- |\n| 5 |" in report
    assert "the reason" in (tmp_path / "out" / "call-a.log").read_text()


def test_any_text_stays_in_its_cell():
    from measure import markdown

    assert (
        markdown([{"a": "x | y\nz"}, {"b": 0.12345}]) == "| a | b |\n| --- | --- |\n| x \\| y z | - |\n| - | 0.123 |\n"
    )


def test_wrong_kernels_are_not_timed(call):
    steps = [("kernels", "raise SystemExit(1)", {}), ("rate", "", {"times": True}), ("runs", "", {})]
    passed, document = call(steps)
    assert not passed
    assert states(document) == {"kernels": "failed", "rate": "skipped", "runs": "passed"}
    assert "do not count right" in document["steps"][1]["why"]


def test_a_step_over_its_limit_is_killed_with_what_it_started(tmp_path):
    from steps import Running, Step

    started = tmp_path / "started"
    text = f"""
import os, subprocess, sys, time

def stuck():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3000)"])
    with open({str(started)!r} + "~", "w") as file:
        file.write(str(child.pid))
    os.rename(file.name, {str(started)!r})
    time.sleep(3000)

stuck()
"""
    running = Running(Step("hangs", "", ("-c", text), limit=1), [sys.executable], tmp_path)
    wait_for(started.exists)
    found = running.wait(0)
    assert (found["status"], found["why"]) == ("failed", "killed after 0 s")
    assert "in stuck" in found["output"]  # Python says where it was
    child = Path("/proc", started.read_text(), "stat")
    wait_for(lambda: not child.exists() or child.read_text().split(") ")[1][0] == "Z")


def test_a_call_that_is_ended_keeps_what_it_found(tmp_path):
    command = [sys.executable, BENCH / "on_gpu.py", "--rehearse", "--call", "a", "--only", "kernels", "--out", tmp_path]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "call-a.json").exists)
    process.terminate()
    assert process.wait() == 143
    document = json.loads((tmp_path / "call-a.json").read_text())
    assert document["ended"] and not document["passed"]
    assert [step["name"] for step in document["steps"]] == ["kernels"]
    assert document["steps"][0]["why"].endswith("the call was ended")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process that ended meanwhile
            assert os.fsencode(document["scratch"]) not in path.read_bytes()
    assert not Path(document["scratch"]).exists()
    assert (tmp_path / "call-a.md").exists()


def test_steps_for_which_there_is_no_time_are_skipped(call):
    passed, document = call([("short", "", {"least": 1.0}), ("long", "", {"least": 1e6})], budget=1000.0)
    assert not passed
    assert states(document) == {"short": "passed", "long": "skipped"}
    assert document["steps"][1]["why"] == "skipped: no time left"


def test_preparations_run_beside_the_steps_and_are_waited_for(call, tmp_path):
    ready, seen = tmp_path / "ready", tmp_path / "seen"
    wait = f"import os, time\nwhile not os.path.exists({str(seen)!r}): time.sleep(0.01)\nopen({str(ready)!r}, 'w')"
    passed, document = call(
        [
            ("beside", f"open({str(seen)!r}, 'w')", {}),
            ("after", f"open({str(ready)!r})", {"after": ("made",)}),
            ("never", "", {"after": ("broken",)}),
        ],
        [("made", wait, {}), ("broken", "raise SystemExit(1)", {})],
    )
    assert not passed
    assert states(document) == {
        "made": "passed",
        "broken": "failed",
        "beside": "passed",
        "after": "passed",
        "never": "skipped",
    }
    assert document["steps"][-1]["why"] == "skipped: broken failed"


def test_a_program_that_is_not_installed_is_no_failure(call):
    passed, document = call([("memcheck", "", {"under": ("no-such-sanitizer", "--tool", "memcheck")})])
    assert passed
    assert (document["steps"][0]["status"], document["steps"][0]["why"]) == (
        "absent",
        "absent: no-such-sanitizer is not on PATH",
    )


def test_a_step_runs_under_its_program(call):
    assert shutil.which("env")
    text = "import os; raise SystemExit(os.environ.get('WATCHED') != 'yes')"
    assert call([("memcheck", text, {"under": ("env", "WATCHED=yes")})])[0]
    assert not call([("memcheck", text, {"under": ("env", "WATCHED=yes")})], rehearsal=True)[
        0
    ]  # a rehearsal leaves the program out


def test_figures_are_whole_while_steps_are_under_way(call, tmp_path):
    path = tmp_path / "out" / "call-a.json"
    look = f"import json; print([s['status'] for s in json.load(open({str(path)!r}))['steps']])"
    passed, document = call([("first", "", {}), ("second", look, {}), ("third", "", {})])
    assert passed
    assert document["steps"][1]["output"] == "['passed', 'waiting', 'waiting']\n"
    assert sorted(one.name for one in path.parent.iterdir()) == ["call-a.json", "call-a.log", "call-a.md"]


def test_what_did_not_pass_is_repeated_after_the_first_steps(tmp_path):
    from argparse import Namespace

    from gpu_calls import SMALL
    from on_gpu import chosen_steps

    before = {"fixtures": "failed", "tests": "skipped", "doctor": "passed", "profile": "absent"}
    earlier = tmp_path / "call-a.json"
    earlier.write_text(json.dumps({"steps": [{"name": name, "status": state} for name, state in before.items()]}))
    names = [step.name for step in chosen_steps("b", SMALL, tmp_path, Namespace(repeat=earlier, only=None))]
    assert names[:4] == ["machine", "kernels", "tests", "fixtures"]
    assert len(names) == len(set(names)) and "doctor" not in names
    few = chosen_steps("a", SMALL, tmp_path, Namespace(repeat=None, only="fixt,doc"))
    assert [step.name for step in few] == ["doctor", "fixtures"]


def test_the_pair_fits_where_it_is_written(tmp_path):
    from gpu_calls import SMALL, Sizes
    from on_gpu import scratch_folder

    with scratch_folder(SMALL, tmp_path) as (folder, sizes):
        assert folder.parent == tmp_path and sizes == SMALL
    free = shutil.disk_usage(tmp_path).free
    with scratch_folder(Sizes(pair=free), tmp_path) as (folder, sizes):
        assert folder.parent != tmp_path and sizes.pair <= 4 << 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.slow
def test_a_missing_gpu_fails_where_one_is_needed(needed):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "CKPTDIFF_NEED_GPU": str(int(needed))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-k", "self_test and tight"]
    ran = subprocess.run(
        [*command, str(ROOT / "tests/cuda/test_on_gpu.py")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if needed:
        assert ran.returncode == 1
        assert "CKPTDIFF_NEED_GPU=1, but: Skipped: " in ran.stdout
        assert " skipped" not in ran.stdout and " passed" not in ran.stdout
    else:
        assert ran.returncode == 0
        assert "SKIPPED" in ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing: the kernels cannot run on this CPU")
def test_both_calls_rehearsed(tmp_path):
    from gpu_calls import CALLS, SMALL, preparations

    command = [sys.executable, BENCH / "on_gpu.py", "--rehearse", "--out", tmp_path]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr
    for name, steps_of in CALLS.items():
        document = json.loads((tmp_path / f"call-{name}.json").read_text())
        assert document["rehearsal"] and document["passed"] and document["ended"]
        assert (document["device"], document["pair_bytes"]) == ("host device", 2 * SMALL.pair)
        steps = {step["name"]: step for step in document["steps"]}
        expected = steps_of(SMALL, tmp_path)
        needed = {one for step in expected for one in step.after}
        prepared = [step.name for step in preparations(SMALL, tmp_path) if step.name in needed]
        assert list(steps) == [*prepared, *(step.name for step in expected)]
        assert {step["status"] for step in steps.values()} == {"passed"}
        for step in expected:
            assert bool(steps[step.name]["why"]) == bool(step.under), step.name  # what a rehearsal cannot have
            rows = steps[step.name]["figures"].get("rows", [])
            assert bool(rows) == ("{figures}" in step.command), step.name
            assert not any(row.get("wrong") for row in rows)
        report = (tmp_path / f"call-{name}.md").read_text()
        assert report.startswith("## Rehearsal") and "All passed." in report
        assert all(f"### {step.title}\n" in report for step in expected if step.title)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"call-{name}.{kind}" for name in CALLS for kind in ("json", "log", "md")
    ]


def test_rehearsals_are_not_kept_as_results():
    kept = sorted((BENCH / "results").glob("*.json"))
    assert [path.name for path in kept if json.loads(path.read_text()).get("rehearsal", True)] == []
