"""What the spectra ask of CuPy and cuSOLVER, of stand-ins that compute on the host; and that the real ones have it."""

from __future__ import annotations

import ctypes
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from host_arrays import ArrayGpu
from host_kernels import COMPILER, HERE

from ckptdiff.linalg import cusolver
from ckptdiff.linalg.cusolver import eigenpairs, eigenpairs_of_each
from ckptdiff.linalg.on_cupy import CupyLibrary, in_use
from ckptdiff.linalg.stages import ArrayPanels, run_together
from ckptdiff.linalg.survey import survey, survey_of_each
from ckptdiff.measure.cuda.gpu import failure
from ckptdiff.options import SpectraOptions
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.measure import MatrixSpectra, measure_exact, measure_randomized, measure_stack


class CupyArray(np.ndarray):
    """An array that has what CuPy's have, and is not taken for NumPy's by what has to ask for it."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def _array(self) -> np.ndarray:
        return self.view(np.ndarray)

    def get(self) -> np.ndarray:
        return np.array(self.view(np.ndarray))


class Stream(list):  # type: ignore[type-arg]
    """A queue of the host device that can be made the current one."""

    ptr = 77

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *raised: object) -> None:
        pass


class Cupy(types.ModuleType):
    """NumPy under the name of CuPy; notes what is set."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.noted: list[Any] = []
        self.compute, self.limit = 1, 0
        handle = types.SimpleNamespace(cusolver_handle=5)

        @contextmanager
        def device(index: int = 0) -> Iterator[Any]:
            self.noted.append(("device", index))
            yield handle

        class Device:
            cusolver_handle = 5

            def __init__(self, index: int = 0) -> None:
                self._used = device(index)

            def __enter__(self) -> Any:
                return self._used.__enter__()

            def __exit__(self, *raised: Any) -> None:
                self._used.__exit__(*raised)

        @contextmanager
        def using_allocator(allocator: Any) -> Iterator[None]:
            before, self.allocator = self.allocator, allocator
            yield
            self.allocator = before

        self.allocator: Any = None
        self.cuda = types.SimpleNamespace(
            Device=Device, get_current_stream=lambda: Stream(), using_allocator=using_allocator
        )
        self.linalg = types.SimpleNamespace(
            cholesky=lambda a: np.linalg.cholesky(a).view(CupyArray),
            eigvalsh=lambda a: np.linalg.eigvalsh(a).view(CupyArray),
            qr=lambda a: [part.view(CupyArray) for part in np.linalg.qr(a)],
        )
        pool = types.SimpleNamespace(
            get_limit=lambda: self.limit,
            set_limit=self.set_limit,
            malloc=self.malloc,
            free_all_blocks=lambda: setattr(self, "kept", 0),
        )
        self.get_default_memory_pool = lambda: pool

    kept = 0
    """Bytes that CuPy's pool keeps for whoever asks next, which may not be who asks now."""

    def malloc(self, size: int) -> int:
        if self.kept + size > self.limit:
            raise MemoryError
        return size

    def set_limit(self, size: int) -> None:
        self.limit = size
        self.noted.append(("limit", size))

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if name not in ("asarray", "ascontiguousarray", "empty", "tril", "zeros"):
            return found
        return lambda *args, **options: found(*args, **options).view(CupyArray)


def _solve_triangular(a: Any, b: Any, lower: bool) -> Any:
    """SciPy's, one matrix after the other, since not every version takes a stack of them."""
    if a.ndim == 2:
        return scipy.linalg.solve_triangular(a, b, lower=lower).view(CupyArray)
    return np.stack([_solve_triangular(*each, lower) for each in zip(a, b, strict=True)]).view(CupyArray)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Cupy:
    """CuPy's modules, with cuSOLVER's library built for the host."""
    fake = Cupy()
    routines = types.ModuleType("cupy._core._routines_linalg")
    routines.COMPUTE_TYPE_DEFAULT = 1  # type: ignore[attr-defined]
    routines.get_compute_type = lambda dtype: fake.compute  # type: ignore[attr-defined]
    routines.set_compute_type = lambda dtype, kind: setattr(fake, "compute", kind)  # type: ignore[attr-defined]
    libraries = types.ModuleType("cupy_backends.cuda.libs.cusolver")
    libraries.createParams = lambda: fake.noted.append("params made") or 9  # type: ignore[attr-defined]
    libraries.destroyParams = lambda params: fake.noted.append("params gone")  # type: ignore[attr-defined]
    libraries.setStream = lambda handle, stream: fake.noted.append((handle, stream))  # type: ignore[attr-defined]
    errors = types.ModuleType("cupyx")

    @contextmanager
    def errstate(**how: str) -> Iterator[None]:
        fake.noted.append(how)
        yield

    errors.errstate = errstate  # type: ignore[attr-defined]
    solvers = types.ModuleType("cupyx.scipy.linalg")
    solvers.solve_triangular = _solve_triangular  # type: ignore[attr-defined]
    modules = {"cupy": fake, "cupy._core": types.ModuleType("cupy._core"), "cupyx.scipy.linalg": solvers}
    for name, module in (modules | {"cupyx": errors, "cupyx.scipy": types.ModuleType("cupyx.scipy")}).items():
        monkeypatch.setitem(sys.modules, name, module)
    for name, owner in (("cupy_backends", None), ("cupy_backends.cuda", None), ("cupy_backends.cuda.libs", libraries)):
        module = types.ModuleType(name)
        module.cusolver = owner  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["cupy._core"]._routines_linalg = routines  # type: ignore[attr-defined]
    return fake


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("g++ is missing: nothing stands in for cuSOLVER")
    path = tmp_path_factory.mktemp("cusolver") / "libcusolver.so"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, "-o", path, HERE / "host" / "cusolver.cpp"], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def solver(built: ctypes.CDLL, cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    monkeypatch.setattr(cusolver, "_library", lambda: built)
    yield built
    for name in ("failure", "status"):
        ctypes.c_int.in_dll(built, name).value = 0


def symmetric(n: int, dtype: Any) -> CupyArray:
    matrix = np.random.default_rng(n).standard_normal((n, n)).astype(dtype)
    return (matrix + matrix.T).view(CupyArray)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "first", "last"), [(40, 30, 39), (40, 0, 3), (40, 0, 39), (1, 0, 0)])
def test_a_part_of_the_eigenpairs(solver: Any, cupy: Cupy, dtype: Any, n: int, first: int, last: int) -> None:
    matrix = symmetric(n, dtype)
    known = np.linalg.eigvalsh(matrix.get().astype(np.float64))[first : last + 1]
    values, vectors = eigenpairs(cupy, np.tril(matrix).view(CupyArray), first, last)
    error = 40 * float(np.finfo(dtype).eps) * n
    assert np.allclose(values, known, rtol=0, atol=error)
    assert vectors.shape == (n, last - first + 1)
    assert np.allclose(matrix @ vectors, vectors * values, rtol=0, atol=error)
    assert cupy.noted == [(5, Stream.ptr), "params made", "params gone"]


def test_a_solver_that_fails_is_an_error(solver: Any, cupy: Cupy) -> None:
    """CuPy itself would go on with what it left; nothing is kept of its parameters either way."""
    ctypes.c_int.in_dll(solver, "failure").value = 3
    with pytest.raises(np.linalg.LinAlgError, match="info 3"):
        eigenpairs(cupy, symmetric(8, np.float64), 0, 2)
    ctypes.c_int.in_dll(solver, "status").value = 7
    with pytest.raises(RuntimeError, match="cusolverDnXsyevdx failed: CUSOLVER_STATUS 7"):
        eigenpairs(cupy, symmetric(8, np.float64), 0, 2)
    assert cupy.noted.count("params gone") == cupy.noted.count("params made") == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("vectors", [True, False])
def test_the_eigenpairs_of_many(solver: Any, cupy: Cupy, dtype: Any, vectors: bool) -> None:
    n, matrices = 24, np.stack([symmetric(24, dtype) * (k + 1) for k in range(5)])
    matrices[3] = 0
    known = np.linalg.eigvalsh(matrices.astype(np.float64))
    values, found = eigenpairs_of_each(cupy, np.tril(matrices).view(CupyArray), vectors=vectors)
    error = 200 * float(np.finfo(dtype).eps) * n
    assert values.shape == (5, n) and np.allclose(values, known, rtol=0, atol=error)
    if vectors:
        assert np.allclose(matrices @ found, found * values[:, None, :], rtol=0, atol=error)
    assert cupy.noted == [(5, Stream.ptr), "params made", "params gone"]


def test_one_of_many_that_fails_is_an_error(solver: Any, cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is; and so is a cuSOLVER that has no such routine."""
    ctypes.c_int.in_dll(solver, "failure").value = 3
    stack = np.stack([symmetric(8, np.float64)] * 4).view(CupyArray)
    with pytest.raises(np.linalg.LinAlgError, match="1 of 4 matrices: info 3 of number 3"):
        eigenpairs_of_each(cupy, stack)
    ctypes.c_int.in_dll(solver, "status").value = 7
    with pytest.raises(RuntimeError, match="cusolverDnXsyevBatched failed: CUSOLVER_STATUS 7"):
        eigenpairs_of_each(cupy, stack)
    monkeypatch.setattr(cusolver, "_library", object)
    with pytest.raises(RuntimeError, match="libcusolver is too old") as caught:
        eigenpairs_of_each(cupy, stack)
    assert "[ctk]" in str(failure(caught.value, "cuda:0").hint)


def measured(source: ArrayPanels, mode: str) -> MatrixSpectra:
    view = MatrixView(0, source.long, source.short)
    (known,) = run_together(source, survey(source.library))
    if mode == "exact":
        return measure_exact(source, known, view, 0.0, True)
    return measure_randomized(source, known, view, 0.0, SpectraOptions(block=8, steps=16))


@pytest.mark.parametrize(("mode", "short"), [("randomized", 64), ("randomized", 300), ("exact", 64)])
def test_figures_are_those_of_numpy(libraries: Any, solver: Any, cupy: Cupy, mode: str, short: int) -> None:
    gpu, stream = ArrayGpu(libraries, 0, processors=1), Stream()
    gpu._streams.append(stream)
    gpu.cupy, gpu.index = cupy, 0  # type: ignore[attr-defined]
    library = CupyLibrary(gpu, stream, host_rows=40)  # type: ignore[arg-type]
    rng, dtype = np.random.default_rng(0), np.float64 if mode == "exact" else np.float32
    base = (rng.standard_normal((400, short)) * np.linspace(1, 3, short)).astype(dtype)
    delta = (1e-3 * rng.standard_normal((400, short))).astype(dtype)
    known = measured(ArrayPanels(base, delta, 150), mode)
    found = measured(ArrayPanels(library.put(base), library.put(delta), 150, library), mode)
    assert found.reasons == known.reasons
    for key, value in known.figures.items():
        near = 1e-9 if mode == "exact" else 3e-4 if "coverage" in key or "not_low" in key else 2e-5
        assert found.figures[key] == pytest.approx(value, rel=near, abs=near, nan_ok=True), key


@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_a_stack_is_measured_as_by_numpy(libraries: Any, solver: Any, cupy: Cupy, mode: Any) -> None:
    gpu, stream = ArrayGpu(libraries, 0, processors=1), Stream()
    gpu._streams.append(stream)
    gpu.cupy, gpu.index = cupy, 0  # type: ignore[attr-defined]
    library = CupyLibrary(gpu, stream)  # type: ignore[arg-type]
    rng, dtype, shape = np.random.default_rng(0), np.float64 if mode == "exact" else np.float32, (3, 120, 50)
    base = (rng.standard_normal(shape) * np.linspace(1, 3, 50)).astype(dtype)
    delta = (1e-3 * rng.standard_normal(shape)).astype(dtype)
    base[2], delta[2] = 0, 0  # room that is not taken
    source = ArrayPanels(library.put(base), library.put(delta), 120, library)
    (surveys,) = run_together(source, survey_of_each(library, source.stack, 2))
    view = MatrixView(0, *shape[1:])
    for found, *sides in zip(measure_stack(source, surveys, view, [0.0, 0.0], mode), base, delta, strict=False):
        known = measured(ArrayPanels(*sides, 150), mode)
        assert found is not None and found.reasons == known.reasons
        for key, value in known.figures.items():
            near = 1e-9 if mode == "exact" else 3e-4 if "coverage" in key or "not_low" in key else 2e-5
            assert found.figures[key] == pytest.approx(value, rel=near, abs=near, nan_ok=True), key


@pytest.mark.parametrize("tf32", [False, True])
def test_cupy_is_used_as_figures_need_it_and_left_as_it_was(cupy: Cupy, tf32: bool) -> None:
    cupy.compute = before = 7 if tf32 else 1
    gpu = types.SimpleNamespace(cupy=cupy, index=2)
    with pytest.raises(ZeroDivisionError), in_use(gpu, Stream(), 1 << 30):  # type: ignore[arg-type]
        assert cupy.compute == 1
        assert cupy.noted == [("device", 2), {"linalg": "raise"}, ("limit", 1 << 30)]
        raise ZeroDivisionError
    assert (cupy.compute, cupy.limit) == (before, 0)


def test_memory_that_cupy_keeps_is_given_back_before_it_lacks(cupy: Cupy) -> None:
    """CuPy's pool counts as taken what it keeps, and raises where the limit is reached, whatever is free of it."""
    with in_use(types.SimpleNamespace(cupy=cupy, index=0), Stream(), 1 << 20):  # type: ignore[arg-type]
        cupy.kept = 1 << 19
        assert (cupy.allocator(1 << 19), cupy.kept) == (1 << 19, 1 << 19)
        assert (cupy.allocator(1 << 20), cupy.kept) == (1 << 20, 0)
        with pytest.raises(MemoryError):
            cupy.allocator(1 << 21)
    assert cupy.allocator is None


@pytest.mark.nvrtc
def test_cupy_has_what_the_spectra_call() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is missing")
    import cuda.pathfinder
    import cupyx
    from cupy._core import _routines_linalg as routines

    called: dict[Any, tuple[str, ...]] = {
        cupy: ("asarray", "ascontiguousarray", "empty", "flip", "get_default_memory_pool", "sum", "tril", "zeros"),
        cupy.linalg: ("cholesky", "eigvalsh", "qr"),
        cupy.ndarray: ("astype", "get", "mT", "reshape", "view"),
        cupy.cuda: ("Device", "get_current_stream", "using_allocator"),
        cupy.cuda.Device: ("__enter__", "cusolver_handle"),
        cupy.cuda.Stream: ("__enter__", "__exit__"),
        cupy.cuda.MemoryPool: ("free_all_blocks", "get_limit", "malloc", "set_limit"),
        cupyx: ("errstate",),
        cuda.pathfinder: ("load_nvidia_dynamic_lib",),
        routines: ("COMPUTE_TYPE_DEFAULT", "get_compute_type", "set_compute_type"),
    }
    for owner, names in called.items():
        assert [name for name in names if not hasattr(owner, name)] == [], owner
    assert (Path(cupyx.__file__).parent / "scipy/linalg/_solve_triangular.py").exists()  # imported where cuBLAS is
    assert "linalg" in inspect.signature(cupyx.errstate).parameters
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    single = np.dtype(np.float32)
    before = routines.get_compute_type(single)
    routines.set_compute_type(single, routines.COMPUTE_TYPE_DEFAULT)
    assert routines.get_compute_type(single) == routines.COMPUTE_TYPE_DEFAULT != routines.COMPUTE_TYPE_TF32
    routines.set_compute_type(single, before)
