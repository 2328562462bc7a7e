"""Kernels in Gluon without their GPU: run as Python on arrays, each partition's warps in a thread.

Shared memory holds NaN until a copy is waited for, a product is computed where it is issued and
again where it is waited for, and barriers block: what comes too early or too late shows, and what
would never end fails. It says nothing of layouts, nor of warps of one partition beside each other.
"""

from __future__ import annotations

import builtins
import inspect
import pathlib
import threading
from collections.abc import Callable
from types import SimpleNamespace as Names
from typing import Any

import ml_dtypes
import numpy as np
import torch
from dsv4fuse.kernels import _common as common
from torch import Tensor

STUCK = 20.0  # seconds after which nobody will come
# Types that numpy has not: how memory of theirs is seen.
STORED = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
          torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn)}  # fmt: skip
local = threading.local()


def plain(x: Any) -> Any:
    return x.a if isinstance(x, Value) else x


def typed(x: Any) -> Any:
    """An integer of nobody's is one of 32 bits."""
    return np.int32(x) if type(x) is int else plain(x)


class Value:
    """A value of a kernel: an array, in whatever layout."""

    type = Names(layout=None)
    dtype = property(lambda self: self.a.dtype.type)

    def __init__(self, a: Any) -> None:
        self.a = np.asarray(a)

    def to(self, dtype: Any) -> Value:
        return Value(self.a.astype(dtype))

    def __getitem__(self, at: Any) -> Value:
        return Value(self.a[at])

    def __index__(self) -> int:
        return int(self.a)

    def __bool__(self) -> bool:
        return bool(self.a)


def _operator(do: Callable[..., Any], turned: bool) -> Callable[[Value, Any], Value]:
    return lambda x, y: Value(do(plain(y), x.a) if turned else do(x.a, plain(y)))


for name, do in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide,
    "floordiv": np.floor_divide, "mod": np.remainder, "and": np.bitwise_and, "or": np.bitwise_or,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": np.not_equal,
}.items():  # fmt: skip
    setattr(Value, f"__{name}__", _operator(do, False))
    setattr(Value, f"__r{name}__", _operator(do, True))


class Pointer:
    """Addresses in a tensor's memory; outside of it nothing is read or written."""

    def __init__(self, memory: np.ndarray, at: Any = 0) -> None:
        self.memory, self.at = memory, np.asarray(at, dtype=np.int64)
        self.dtype = Names(element_ty=memory.dtype.type)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.at + plain(other))

    def __getitem__(self, at: Any) -> Pointer:
        return Pointer(self.memory, self.at[at])

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        seen, at = np.broadcast_arrays(np.asarray(plain(mask)), self.at)
        assert ((at >= 0) & (at < len(self.memory)))[seen].all(), "outside of the tensor"
        return seen, np.where(seen, at, 0)


def pointer(t: Tensor) -> Pointer:
    size = t.untyped_storage().nbytes() // t.itemsize - t.storage_offset()
    flat = torch.as_strided(t, (size,), (1,))
    if t.dtype in STORED:
        bits, dtype = STORED[t.dtype]
        return Pointer(flat.view(bits).numpy().view(dtype))
    return Pointer(flat.numpy())


def load(at: Pointer, mask: Any = True, other: Any = 0) -> Value:
    seen, places = at.places(mask)
    empty = np.asarray(other).astype(at.memory.dtype)
    return Value(np.where(seen, at.memory[places] if len(at.memory) else empty, empty))


def store(at: Pointer, value: Value, mask: Any = True) -> None:
    seen, places = at.places(mask)
    at.memory[places[seen]] = value.a[seen]


class Memory:
    """A part of shared memory."""

    def __init__(self, a: np.ndarray) -> None:
        self.a, self.dtype = a, a.dtype.type

    def index(self, i: Any) -> Any:
        part = self.a[int(plain(i))]
        return part[0] if isinstance(part[0], Barrier) else Memory(part)

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return Memory(self.a[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, order: list[int]) -> Memory:
        return Memory(self.a.transpose(order))

    def load(self, layout: Any) -> Value:
        return Value(self.a.copy())

    def store(self, value: Value) -> None:
        assert value.a.dtype == self.a.dtype and value.a.shape == self.a.shape
        self.a[...] = value.a


def allocate(dtype: Any, shape: list[int], layout: Any) -> Memory:
    if dtype is np.int64:
        return Memory(np.array([[Barrier()] for _ in range(shape[0])], dtype=object))
    empty = np.nan if np.dtype(dtype) != np.int32 else -77777
    return Memory(np.full(shape, empty, dtype=dtype))


class Barrier:
    """An mbarrier of ``count`` arrivals."""

    failed = threading.Event()

    def __init__(self) -> None:
        self.phase, self.count, self.came, self.changed = 0, 1, 0, threading.Condition()

    def init(self, count: int) -> None:
        self.count = count

    def arrive(self) -> None:
        with self.changed:
            self.came += 1
            if self.came == self.count:
                self.phase, self.came = self.phase ^ 1, 0
            self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            came = self.changed.wait_for(
                lambda: self.phase != phase or self.failed.is_set(), STUCK
            )
        assert came and not self.failed.is_set(), "nobody arrives"


def load_async(to: Memory, at: Pointer, mask: Any) -> None:
    to.a[...] = np.nan
    local.asked = [*getattr(local, "asked", []), (to, load(at, mask))]


def commit_group() -> None:
    local.groups = [*getattr(local, "groups", []), local.asked]
    local.asked = []


def wait_group(count: int) -> None:
    """Until no more than so many of the latest groups are on their way."""
    groups = getattr(local, "groups", [])
    for group in groups[: len(groups) - count]:
        for to, value in group:
            to.store(value)
    local.groups = groups[len(groups) - count :] if count else []


class Products:
    """Sums of products that are on their way."""

    def __init__(self, base: np.ndarray, parts: list[tuple[Any, Any, np.ndarray]]) -> None:
        self.base, self.parts = base, parts


def product(a: Any, b: Any) -> np.ndarray:
    return a.a.astype(np.float32) @ b.a.astype(np.float32)


def warpgroup_mma(a: Any, b: Memory, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    acc = acc if isinstance(acc, Products) else Products(plain(acc) * use_acc, [])
    return Products(acc.base, [*acc.parts, (a, b, product(a, b))])


def warpgroup_mma_wait(count: int, deps: list[Products]) -> Value:
    total = deps[0].base
    for a, b, early in deps[0].parts:
        assert np.array_equal(early, product(a, b), equal_nan=True), "overwritten too early"
        total = total + early
    return Value(total)


def warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
    errors: list[BaseException] = []

    def run(function: Any, arguments: Any, program: Any) -> None:
        local.program = program
        try:
            with np.errstate(all="ignore"):
                function(*arguments)
        except BaseException as error:
            errors.append(error)
            Barrier.failed.set()

    threads = [threading.Thread(target=run, args=(*p, local.program)) for p in partitions]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    Barrier.failed.clear()
    if errors:
        raise errors[0]


def _where(seen: Any, x: Any, y: Any) -> Value:
    x, y = (np.float32(v) if isinstance(v, float) else plain(v) for v in (x, y))
    return Value(np.where(plain(seen), x, y))


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _jit(fn: Any = None, **_: Any) -> Any:
    return fn if fn else lambda made: made


LANGUAGE = Names(
    constexpr=lambda x: x, SliceLayout=_nothing, BlockedLayout=_nothing, NVMMASharedLayout=_nothing,
    SwizzledSharedLayout=_nothing, NVMMADistributedLayout=_nothing, DotOperandLayout=_nothing,
    DistributedLinearLayout=_nothing, barrier=_nothing, static_range=range, cdiv=common.cdiv,
    int1=np.bool_, int32=np.int32, int64=np.int64, uint64=np.uint64, float32=np.float32,
    bfloat16=ml_dtypes.bfloat16, float16=np.float16, load=load, store=store,
    program_id=lambda axis: local.program[0], num_programs=lambda axis: local.program[1],
    arange=lambda start, end, layout: Value(np.arange(start, end, dtype=np.int32)),
    zeros=lambda shape, dtype, layout: Value(np.zeros(shape, dtype)),
    full=lambda shape, value, dtype, layout: Value(np.full(shape, value, dtype)),
    where=_where, maximum=lambda x, y: Value(np.fmax(typed(x), typed(y))),
    minimum=lambda x, y: Value(np.fmin(typed(x), typed(y))),
    max=lambda x, axis: Value(np.fmax.reduce(x.a, axis)), exp2=lambda x: Value(np.exp2(x.a)),
    sum=lambda x, axis: Value(x.a.sum(axis)), reshape=lambda x, shape: Value(x.a.reshape(shape)),
    min=lambda x, axis: Value(np.fmin.reduce(x.a, axis)),
    convert_layout=lambda x, layout, **_: x, allocate_shared_memory=allocate,
    inline_asm_elementwise=lambda *_, **__: Value(np.int32(0)), warp_specialize=warp_specialize,
)  # fmt: skip
GLUON = Names(
    jit=_jit, language=LANGUAGE, gluon=Names(jit=_jit), fence_async_shared=_nothing,
    async_copy=Names(async_load=load_async, commit_group=commit_group, wait_group=wait_group),
    mbarrier=Names(MBarrierLayout=_nothing, init=Barrier.init, wait=Barrier.wait,
                   arrive=lambda bar, count: bar.arrive()),
    warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
)  # fmt: skip
COMMON = Names(
    INTERPRET=True,
    long=lambda x: Value(np.asarray(plain(x), dtype=np.int64)), narrow=lambda x, dtype: x.to(dtype),
    round_to=lambda x, dtype: x.to(dtype).to(np.float32),
    max_nan=lambda x, y: Value(np.maximum(x.a, np.asarray(plain(y), x.dtype))),
)  # fmt: skip
MODULES: dict[str, Any] = {"_common": COMMON}


def _imported(name: str, *rest: Any) -> Any:
    if name.startswith("triton"):
        return GLUON
    if rest and rest[-1] == 1:  # a module of the kernels
        return MODULES.get(name) or module(name)
    return __import__(name, *rest)


def module(name: str) -> Names:
    """A module of the kernels as Python of arrays."""
    path = pathlib.Path(inspect.getfile(common)).parent / f"{name}.py"
    scope = {"__name__": name, "__builtins__": {**vars(builtins), "__import__": _imported}}
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), scope)
    MODULES[name] = Names(**{k: v for k, v in scope.items() if not k.startswith("__")})
    return MODULES[name]


class Emulated:
    """A kernel of a module, launched like one."""

    def __init__(self, where: str, name: str) -> None:
        self.where, self.name = where, name

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(num_warps: int, **arguments: Any) -> None:
            given = {k: pointer(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            kernel = getattr(MODULES.get(self.where) or module(self.where), self.name)
            for program in range(grid[0]):
                local.program = (program, grid[0])
                kernel(**given)

        return launch
