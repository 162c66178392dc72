"""Compile every kernel into libraries that are called without Numba, one for each level of a processor's instructions.

The calls of ``run/warm_up.py`` that a process makes to have kernels compiled are made here too, under a recorder: it
compiles what is called for the types it is called with, adds a function that C could call (``kernel_library.py`` says
how), and goes on with its result. So a kernel that warm-up knows is built, and nothing is listed twice.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ckptdiff import jit
from ckptdiff.kernel_library import LEVELS, BuiltKernel, flatten, has_level, marked, path_of, processor_level, symbol_of

__all__ = ["USES", "compile_library"]

_NARROW, _CAST, _SINGLE = ("bf16", "bf16", "bf16"), ("f32", "f32", "bf16"), ("f32", "f32", "f32")
_RARE = ("bf16", "f32", "f32"), ("f64", "f64", "f64"), ("f32", "f64", "f64")
USES: tuple[tuple[str, ...], ...] = (
    *((kind, *formats) for kind in ("alike", "alone", "refine") for formats in (_CAST, _NARROW)),
    *((kind, *_SINGLE) for kind in ("alone", "refine")),
    ("delta",),
    *(("track", name) for name in ("bf16", "f32")),
    ("mask", "4096"),
    ("row",),
    ("decoded",),
    ("scores",),
    ("sparse",),
    ("steps",),
    *(("panel", name, "bf16") for name in ("bf16", "f32")),
)
"""What is built: calls as ``run/warm_up.py`` names them, the longest to compile first.

Kernels do not know which format of 8 or 16 bits they are given, only whether it is that of the comparison: these stand
for all pairs of formats but those of ``RARE``.
"""
RARE = (*((kind, *formats) for formats in _RARE for kind in ("alone", "refine")), ("track", "f64"))
"""What is built for release alone, where the time that it takes is not a user's."""
_TARGETS = {
    "v2": ("x86-64-v2", ""),
    "v3": ("x86-64-v3", ""),
    "v4": ("x86-64-v4", "+avx512vbmi,+avx512vbmi2,+avx512bitalg,+avx512vpopcntdq,+avx512bf16"),
    "baseline": ("generic", ""),
}
"""Names of processors and features, as LLVM knows them. Not all processors of v4 multiply bfloat16: what does is called
where they do alone (``linalg/pair_products.py``), and LLVM has no use of its own for those instructions."""
_AT_ONCE = 8
"""Compiling processes; each takes some 250 MB."""
RUNTIME = Path(__file__).with_name("kernel_runtime.c")


class Recorded(NamedTuple):
    """A kernel and what it was called with."""

    module: str
    name: str
    key: list[Any]
    types: bytes
    """Numba's types of the arguments, pickled."""


class Recorder:
    """Compiles kernels as they are called, and makes the calls."""

    def __init__(self, level: str) -> None:
        import llvmlite.binding as llvm
        from numba.core.registry import cpu_target

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        cpu, features = _TARGETS[level]
        self.objects: list[bytes] = []
        self.recorded: list[Recorded] = []
        self._entries: dict[str, Any] = {}
        self._target = cpu_target
        # Steps are linked into kernels and never called by themselves: without machine code of their own, all takes two
        # thirds of the time. Numba tells them apart by what Python would call, which can be any function of C.
        context = cpu_target.target_context
        context.get_executable = lambda library, description, environment: object().__sizeof__
        context.codegen()._add_module = lambda module: None
        self._machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=cpu, features=features, opt=3, reloc="pic", codemodel="default"
        )
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._machine)

    def __call__(self, kernel: jit.Kernel, arguments: tuple[Any, ...]) -> Any:
        """Make a call, as ``jit.recorder`` has it."""
        import numba

        key: list[Any] = []
        words: list[Any] = []
        flatten(arguments, key, words)
        symbol = symbol_of(kernel.name, key)
        if symbol not in self._entries:
            types = tuple(map(numba.typeof, arguments))
            place = kernel.function.__module__, kernel.function.__name__
            self.recorded.append(Recorded(*place, key, pickle.dumps(types)))
            result = self.compile(kernel, types, symbol)
            self._entries[symbol] = BuiltKernel(self._loaded(symbol), key, result)
        return self._entries[symbol](words)

    def _loaded(self, symbol: str) -> Callable[[Any], int]:
        import ctypes

        import llvmlite.binding as llvm

        self._engine.add_object_file(llvm.ObjectFileRef.from_data(self.objects[-1]))
        self._engine.finalize_object()
        return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(self._engine.get_function_address(symbol))

    def compile(self, kernel: jit.Kernel, types: tuple[Any, ...], symbol: str) -> str:
        """Add machine code of a kernel for types of arguments; returns what its result is made of."""
        from numba.core.compiler_lock import global_compiler_lock

        compiler = _compiler()(kernel.function, self._target, {"nopython": True, **jit.KERNEL}, {}, _pipeline())
        compiled = jit.declared(lambda _: compiler.compile(types, None))
        library, module = compiled.library, compiled.library.create_ir_module(symbol)
        result = _add_entry(self._target.target_context, module, compiled, symbol)
        library.add_ir_module(module)
        library._final_module.get_function(compiled.fndesc.llvm_func_name).linkage = "internal"
        with global_compiler_lock:
            library.finalize()
        final = library._final_module
        for one in (*final.functions, *final.global_variables):
            if not one.is_declaration:
                one.linkage = "weak_odr" if one.name.startswith(symbol) else "internal"
        self.objects.append(self._machine.emit_object(final))
        return result


@cache
def _compiler() -> Any:
    from numba.core import dispatcher

    class KernelCompiler(dispatcher._FunctionCompiler):  # type: ignore[misc, name-defined]
        """Leaves the machine code to be made after the entry point has been added."""

        def _customize_flags(self, flags: Any) -> Any:
            flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
            return flags

    return KernelCompiler


@cache
def _pipeline() -> Any:
    """Numba's compiler."""
    from numba.core.compiler import Compiler

    return Compiler


def _add_entry(context: Any, module: Any, compiled: Any, symbol: str) -> str:
    """Add a function that takes a room of words, and a constant that tells what it leaves there."""
    from llvmlite import ir

    word = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.IntType(32), [word.as_pointer()]), symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    words = (builder.load(builder.gep(function.args[0], [word(at)])) for at in range(1 << 20))
    types, returned = compiled.signature.args, compiled.signature.return_type
    given = [_argument(context, builder, kind, words) for kind in types]
    called = context.declare_function(module, compiled.fndesc)
    status, value = context.call_conv.call_function(builder, called, returned, types, given)
    with builder.if_then(status.is_error, likely=False):
        builder.ret(ir.IntType(32)(1))
    result = _results(context, builder, returned, value, function.args[0])
    builder.ret(ir.IntType(32)(0))
    text = result.encode() + b"\0"
    kind = ir.ArrayType(ir.IntType(8), len(text))
    held = ir.GlobalVariable(module, kind, f"{symbol}_text")
    held.initializer, held.global_constant = ir.Constant(kind, bytearray(text)), True
    # Of a pointer to it nothing but its value is asked for.
    pointer = ir.GlobalVariable(module, ir.IntType(8).as_pointer(), f"{symbol}_result")
    pointer.initializer = held.bitcast(ir.IntType(8).as_pointer())
    return result


def _argument(context: Any, builder: Any, kind: Any, words: Any) -> Any:
    """The value of an argument, made of the next words."""
    from llvmlite import ir
    from numba import types
    from numba.np.arrayobj import make_array, populate_array

    if isinstance(kind, types.Array):
        # An array object: two words of Python's, the data, how many dimensions, where its shape and its strides are.
        word = ir.IntType(64)
        at = builder.inttoptr(next(words), word.as_pointer())
        data, shape, strides = (builder.load(builder.gep(at, [word(place)])) for place in (2, 4, 5))
        sizes = [
            [builder.load(builder.gep(builder.inttoptr(part, word.as_pointer()), [word(i)])) for i in range(kind.ndim)]
            for part in (shape, strides)
        ]
        array = make_array(kind)(context, builder)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        populate_array(array, builder.inttoptr(data, array.data.type), *sizes, itemsize, None)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        return context.make_tuple(builder, kind, [_argument(context, builder, part, words) for part in kind])
    if isinstance(kind, types.NoneType):
        return context.get_dummy_value()
    value = next(words)
    if isinstance(kind, types.Float):
        real = builder.bitcast(value, ir.DoubleType())
        return real if kind.bitwidth == 64 else builder.fptrunc(real, context.get_value_type(kind))
    if isinstance(kind, types.Boolean | types.Integer):
        wanted = context.get_value_type(kind)
        return value if wanted.width == 64 else builder.trunc(value, wanted)
    raise TypeError(f"a kernel takes {kind}, which has no words")


def _results(context: Any, builder: Any, kind: Any, value: Any, room: Any) -> str:
    """Store what a kernel returned; returns what that is, as :class:`BuiltKernel` takes it."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

    if isinstance(kind, types.NoneType):
        return ""
    several = isinstance(kind, types.BaseTuple)
    kinds, values = (list(kind), cgutils.unpack_tuple(builder, value)) if several else ([kind], [value])
    found = ""
    for place, (one, part) in enumerate(zip(kinds, values, strict=True)):
        word = ir.IntType(64)
        if isinstance(one, types.Float):
            real = part if one.bitwidth == 64 else builder.fpext(part, ir.DoubleType())
            part, char = builder.bitcast(real, word), "d"
        elif isinstance(one, types.Boolean | types.Integer):
            signed = isinstance(one, types.Integer) and one.signed
            char = "?" if isinstance(one, types.Boolean) else "q" if signed else "Q"
            if part.type.width < 64:
                part = (builder.sext if signed else builder.zext)(part, word)
        else:
            raise TypeError(f"a kernel returns {kind}, which has no words")
        builder.store(part, builder.gep(room, [word(place)]))
        found += char
    return f"({found})" if several else found


def _compile_use(level: str, use: tuple[str, ...], folder: str) -> list[Recorded]:
    """In a process of its own that makes the calls of some uses: those of one, into objects in a folder."""
    from ckptdiff.measure.cpu import CpuBackend
    from ckptdiff.run.warm_up import make_call

    recorder = _recorder(level)
    before = len(recorder.recorded)
    token = jit.recorder.set(recorder)
    try:
        make_call(CpuBackend(), use)
    finally:
        jit.recorder.reset(token)
    _write(recorder, "-".join(use), folder)
    return recorder.recorded[before:]


def _compile_recorded(level: str, recorded: Recorded, folder: str) -> list[Recorded]:
    """The same of one kernel, which this processor cannot run."""
    recorder = _recorder(level)
    kernel = getattr(import_module(recorded.module), recorded.name)
    symbol = symbol_of(kernel.name, recorded.key)
    recorder.compile(kernel, pickle.loads(recorded.types), symbol)
    _write(recorder, symbol, folder)
    return []


@cache
def _recorder(level: str) -> Recorder:
    return Recorder(level)


def _write(recorder: Recorder, name: str, folder: str) -> None:
    for number, code in enumerate(recorder.objects):
        Path(folder, f"{name}-{number}.o").write_bytes(code)
    recorder.objects.clear()


def linker() -> list[str]:
    """A command that makes a shared library of objects; the process ends if there is none."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)
    if found is None:
        sys.exit("there is no C compiler to link kernels with")
    return [found, "-shared", "-fPIC", "-O2", "-s", "-Wl,-z,defs"]


def set_target(level: str) -> None:
    """Have Numba compile for a level, in this process and those it starts; it looks as it is imported."""
    os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = _TARGETS[level]
    os.environ["NUMBA_DISABLE_INTEL_SVML"] = "1"


def compile_library(
    level: str, target: Path, recorded: Sequence[Recorded] = (), uses: Sequence[tuple[str, ...]] = USES
) -> list[Recorded]:
    """Compile the library of a level; returns what it has.

    Parameters
    ----------
    level : str
        Of :data:`~ckptdiff.kernel_library.LEVELS`, or "baseline".
    recorded : sequence of Recorded
        What a library of another level has, for a level that this processor cannot run.
    uses : sequence of tuple of str
        What is called, for a level that it can.
    """
    set_target(level)
    work: Callable[..., list[Recorded]] = _compile_use if has_level(level) else _compile_recorded
    tasks: Sequence[Any] = uses if has_level(level) else recorded
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, Recorded] = {}
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), _AT_ONCE), mp_context=spawn) as pool:
            for done in [pool.submit(work, level, task, folder) for task in tasks]:
                found |= {f"{one.module}{one.name}{one.key}": one for one in done.result()}
        objects = sorted(map(str, Path(folder).glob("*.o")))
        built = Path(folder, "kernels.so")
        subprocess.run([*linker(), "-o", str(built), str(RUNTIME), *objects, "-lm"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(marked(built.read_bytes()))
    return list(found.values())


def main(asked: str, folder: str) -> None:
    """Compile libraries into a folder: for "this" processor, for "all", or for levels with commas between."""
    this = processor_level()
    if asked in ("this", "all"):
        levels = list(LEVELS) if asked == "all" and this != "baseline" else [this]
    else:
        levels = asked.split(",")
        if unknown := [level for level in levels if level not in _TARGETS]:
            sys.exit(f"CKPTDIFF_BUILD_FOR: no level {unknown[0]} (there are {', '.join(_TARGETS)}, this, all and none)")
        if not any(map(has_level, levels)):
            sys.exit(f"CKPTDIFF_BUILD_FOR: none of {asked} runs on this processor: name one beside it that does")
    linker()
    uses = USES if asked == "this" else (*USES, *RARE)
    recorded: list[Recorded] = []
    # What this processor cannot run is compiled of what another level has.
    for level in sorted(levels, key=has_level, reverse=True):
        recorded = compile_library(level, Path(folder, path_of(level).name), recorded, uses) or recorded


if __name__ == "__main__":
    main(*sys.argv[1:])
