"""Times of one site, taken on the spot: Inductor's code for the user's own nodes, and the fused op.

Both begin with the pointwise values that only the site reads (``front``), are compiled from the
same random inputs of the site's real shapes and strides, checked by ``verify`` before, and replayed
under a CUDA graph (on a CPU: called). Times are remembered for the process and, as JSON beside the
reports, for later ones with the same sources, versions and device.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dsv4fuse import cache, compat, exact, replay, samples, verify
from dsv4fuse.fusion import Candidate
from dsv4fuse.options import Options

log = logging.getLogger("dsv4fuse")
Times = tuple[float, float]  # µs: Inductor, ours
_known: dict[str, Times | str] = {}


def times(
    candidate: Candidate, region: list[fx.Node], front: list[fx.Node], options: Options
) -> Times | str:
    """(Inductor's µs, ours) for this site, or a sentence why it could not be measured."""
    site = repr((candidate.fusion, verify.signature(candidate, [*front, *region])))
    key = hashlib.sha256((site + cache.pass_uuid(options, "times")).encode()).hexdigest()
    if key not in _known:
        stored = cache.load_times(key)
        if stored is None:
            with compat.outside_compilation():
                _known[key] = _measured(candidate, region, front)
            if not isinstance(_known[key], str):
                cache.save_times(key, _known[key])  # type: ignore[arg-type]
        else:
            _known[key] = stored
    return _known[key]


def forget() -> None:
    """Time every site anew, unless a file says otherwise, as a new process does."""
    _known.clear()


def _measured(candidate: Candidate, region: list[fx.Node], front: list[fx.Node]) -> Times | str:
    leaves = [n for n in samples.leaves(candidate, [*front, *region]) if n not in front]
    made = samples.draw(candidate, leaves) or {}
    values = [made[n] for n in leaves]
    tensors = [n for n, v in zip(leaves, values, strict=True) if isinstance(v, Tensor)]
    numbers = {n: v for n, v in zip(leaves, values, strict=True) if not isinstance(v, Tensor)}
    caches = [tensors.index(c) for c in candidate.caches]

    def plain(*given: Tensor) -> list[Tensor]:
        env = {**numbers, **dict(zip(tensors, given, strict=True))}
        env = exact.run([*front, *region], env, (*candidate.outputs, *candidate.updates))
        for place, update in zip(caches, candidate.updates, strict=True):
            given[place].copy_(env[update])
        return [env[n] for n in candidate.outputs]

    def fused(*given: Tensor) -> list[Tensor]:
        env = {**numbers, **dict(zip(tensors, given, strict=True))}
        env = exact.run(front, env, candidate.inputs)
        return list(candidate.call(*(env[n] for n in candidate.inputs)))

    inputs = [v for v in values if isinstance(v, Tensor)]
    try:
        inductor = _time(plain, inputs)
        # The op as it is, node by node, is no faster than what Inductor makes of it: where that is
        # fast enough, there is nothing to compile.
        bare = replayed(lambda: fused(*inputs)) if inputs[0].is_cuda else math.inf
        return inductor, bare if bare <= inductor else min(bare, _time(fused, inputs))
    except Exception as error:  # whatever a compiler, a kernel or an allocator raises
        log.info("measuring %s", candidate.fusion, exc_info=True)
        return f"It could not be measured: {verify.said(error)}."


def _time(fn: Callable[..., list[Tensor]], inputs: list[Tensor]) -> float:
    """The median µs of fn as Inductor compiles it."""
    from torch._inductor.compile_fx import compile_fx

    with compat.kept_ops():
        traced = make_fx(fn, tracing_mode="real")(*inputs)
    # What is timed is put into a graph here; Inductor need not, nor say why it cannot.
    patches = {"joint_custom_pre_pass": None, "triton.cudagraphs": False}
    compiled = compile_fx(traced, inputs, config_patches=patches)
    compiled(*inputs)
    if inputs[0].is_cuda:
        return replayed(lambda: compiled(*inputs))
    spans = []
    for _ in range(9):
        started = time.perf_counter()
        compiled(*inputs)
        spans.append(time.perf_counter() - started)
    return 1e6 * statistics.median(spans)


def replayed(call: Callable[[], object]) -> float:
    """The median µs of a call under a CUDA graph."""
    with compat.capturing():
        return statistics.median(replay.times(call, span=5e3, most=500))
