"""Ops of Gluon kernels: launched on a GPU as they are, elsewhere run as Python (``_gluon``)."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from dsv4fuse.kernels import _hopper as hopper
from torch import Tensor

from dsv4fuse import compat

from ._gluon import Emulated
from ._kernels import DEVICE, GPU, MARKS


@contextlib.contextmanager
def launched(monkeypatch: pytest.MonkeyPatch, op: ModuleType, processors: int) -> Iterator[None]:
    """Inside, at least one launch of an op's kernel; on its emulation if there is no GPU."""
    torch._dynamo.reset()  # a graph that was compiled for another launch would be run
    calls, launch = [], op.launch
    monkeypatch.setattr(op, "launch", lambda *a, **k: calls.append(1) or launch(*a, **k))
    if not GPU:
        emulated = Emulated(*op.KERNEL)
        monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
        monkeypatch.setattr(op, "kernel", lambda: emulated)
        monkeypatch.setattr(hopper, "processors", lambda device: processors)
    elif not hopper.is_hopper(torch.device(DEVICE)):
        pytest.skip("needs a GPU of compute capability 9")
    yield
    assert calls


def gpu_too(fn: Callable[..., None]) -> Callable[..., None]:
    """With the mark of a test that needs a GPU, where kernels are not interpreted."""
    for mark in (*MARKS, pytest.mark.usefixtures("hopper")):
        fn = mark(fn)
    return fn


def check_compiled_and_replayed(
    fn: Callable[..., Tensor], given: Callable[[int], tuple[Tensor, ...]], by_tokens: Sequence[int]
) -> None:
    """``given`` so many tokens, along axis 1 of the inputs ``by_tokens``."""
    compiled = torch.compile(fn, fullgraph=True)
    with compat.fresh_caches():  # in others lies the same graph as another launch
        for tokens in (200, 300, 301):
            inputs = given(tokens)
            for i in by_tokens:
                torch._dynamo.mark_dynamic(inputs[i], 1)
            wanted = fn(*inputs)
            assert torch.equal(compiled(*inputs), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fn(*inputs)
    for _ in range(2):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)


def built(name: str) -> list[dict[str, Any]]:
    """What an op's kernels are compiled to for an H200, by ``_hopper_built``."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, str(pathlib.Path(__file__).parent / "_hopper_built.py"), name]
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
