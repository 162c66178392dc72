"""The kernels under the sanitizers of g++: no access outside a buffer, no undefined operation, no race of lanes."""

import subprocess

import pytest
from host_kernels import COMPILER, Build
from patience import PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot run on this CPU"),
]


def run(build, folder, *sizes):
    program = build.make(folder, "sanitize.cpp", shared=False)
    found = subprocess.run([program, *map(str, sizes)], capture_output=True, text=True, timeout=PATIENCE)
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout == "clean\n"


@pytest.mark.parametrize("names", [("bf16", "bf16", "bf16"), ("f64", "f8_e4m3", "f64")], ids="-".join)
def test_memory_and_arithmetic(names, tmp_path):
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run(Build(*names, 64, flags), tmp_path, 1, 8, 9, 513, 4097, 32768, 32769)


def test_lanes_do_not_race(tmp_path):
    flags = ("-O1", "-g", "-fsanitize=thread", "-DLANES_ARE_THREADS")
    run(Build("f32", "f32", "bf16", 64, flags), tmp_path, 9, 4097, 32769)
