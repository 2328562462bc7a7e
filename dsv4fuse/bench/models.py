"""Whole models: one step of each, eager, compiled by Inductor and with dsv4fuse, side by side.

Each way gets a model of its own from the same seed, so that all start from the same state, and
compiles from scratch, its caches empty. What cannot run (out of memory, say) is a result too.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from dsv4fuse import backend, compat, measure, verify
from dsv4fuse.bench import launches, stopwatch
from dsv4fuse.bench.runs import Profile, Run
from dsv4fuse.factory import FactoryError
from dsv4fuse.report import Report, Site

log = logging.getLogger(__name__)
WAYS = ("eager", "inductor", "dsv4fuse")
MOST_COMPILATIONS = 10  # calls in which a way may compile before it is timed all the same
Made = tuple[Any, tuple[Any, ...], dict[str, Any]]  # model, args, kwargs


@torch.no_grad()
def run(
    make: Callable[[], Made],
    ways: Sequence[str] = WAYS,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda way: None,
    regional: bool = False,
    **about: Any,
) -> Run:
    """``make`` is called for each way and returns (model, args, kwargs); ``about`` are further
    fields of the Run. ``regional`` compiles each of the model's layers for itself. Raises
    OptionError for options that there are none of, FactoryError for a model without layers."""
    backend.parse(options)
    profiles: list[Profile] = []
    wanted: tuple[str, list[Tensor]] | None = None
    report, tokens = Report(), None
    if "inductor" in ways:
        _start_inductor()
    for way in ways:
        progress(way)
        step = _Step(make, way, options or {}, report, regional)
        profiles.append(step.profile(wanted))
        wanted, tokens = wanted or step.outputs, tokens or step.tokens
        del step
    return Run(
        **about, options=dict(options or {}), profiles=tuple(profiles), tokens=tokens,
        regional=regional, taken=report.counts(), sites=tuple(map(_kept, report.sites)),
    )  # fmt: skip


class _Step:
    """One way while it is measured: what was found so far outlives what then fails."""

    def __init__(
        self, make: Callable[[], Made], way: str, options: Mapping[str, Any], report: Report,
        regional: bool,
    ) -> None:  # fmt: skip
        self.make, self.way, self.options, self.report = make, way, options, report
        self.regional = regional
        self.found: dict[str, Any] = {}
        self.outputs: tuple[str, list[Tensor]] | None = None
        self.tokens: int | None = None

    def profile(self, wanted: tuple[str, list[Tensor]] | None) -> Profile:
        """Raises FactoryError where no model was made, and not for want of memory."""
        _forget()
        with compat.fresh_caches(), backend.collecting(self.report):
            try:
                self._measure(wanted)
            except torch.OutOfMemoryError:
                self.found["failed"] = "out of memory"
            except FactoryError as error:
                if not isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise
                self.found["failed"] = "out of memory while the model was made"
            except Exception as error:  # whatever a compiler or a kernel raises
                log.exception("%s could not run", self.way)
                self.found["failed"] = verify.said(error)
        return Profile(self.way, **self.found)

    def _measure(self, wanted: tuple[str, list[Tensor]] | None) -> None:
        torch.manual_seed(0)
        model, args, kwargs = self.make()
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        self.tokens = next((x.numel() for x in tensors if x.dtype == torch.int64), None)
        fn = _compiled(model, self.way, self.options, self.regional)
        call = lambda: fn(*args, **kwargs)  # noqa: E731
        values = self._compile(call, on_gpu)
        self.outputs = self.way, values
        if wanted is not None:
            self.found |= {"against": wanted[0], **compared(values, wanted[1])}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.found["ms"] = stopwatch.milliseconds(call, on_gpu)
        if on_gpu:
            self.found["peak"] = torch.cuda.max_memory_allocated()
        kernels = launches.launched(call, on_gpu)
        self.found |= {"kernels": kernels, "families": launches.families(kernels)}
        if on_gpu:
            self._replay(call)

    def _compile(self, call: Callable[[], Any], on_gpu: bool) -> list[Tensor]:
        """Calls until nothing is compiled any more; the floats of the first result, on the CPU."""
        spent, compilations, values = 0.0, 0, list[Tensor]()
        before = stopwatch.compile_seconds()
        for number in range(MOST_COMPILATIONS + 1):
            graphs = counters["stats"]["unique_graphs"]
            seconds, result = stopwatch.seconds(call, on_gpu)
            compiled = counters["stats"]["unique_graphs"] > graphs
            if number == 0:
                values = floats(result)
                if self.way == "dsv4fuse":
                    self.report.check(backend.parse(self.options))
            elif not compiled:
                break
            spent, compilations = spent + seconds, compilations + compiled
        self.found |= {"compile_s": spent, "compilations": compilations}
        if compilations:
            parts = {k: v - before[k] for k, v in stopwatch.compile_seconds().items()}
            self.found["parts"] = parts
        if self.way == "dsv4fuse":
            self.found |= {"pass_s": self.report.seconds, "spent": dict(self.report.spent)}
        return values

    def _replay(self, call: Callable[[], Any]) -> None:
        try:
            self.found["graph_ms"] = stopwatch.milliseconds(stopwatch.captured(call), True)
        except RuntimeError as error:  # something in it waits for the GPU, or memory
            self.found["note"] = f"no CUDA graph: {verify.said(error):.80}"


def _start_inductor() -> None:
    """What the first compilation of a process pays for (imports, workers) is no model's time."""
    with compat.fresh_caches():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))


def _compiled(model: Any, way: str, options: Mapping[str, Any], regional: bool) -> Any:
    if way == "eager":
        return model
    ours: dict[str, Any] = {"backend": backend.dsv4fuse, "options": dict(options)}
    how = ours if way == "dsv4fuse" else {}
    if not regional:
        return torch.compile(model, **how)
    for layer in _layers(model):
        layer.compile(**how)
    return model


def _layers(model: Callable[..., Any]) -> torch.nn.ModuleList:
    """The outermost list of modules in a model, or in that whose method it is."""
    owner = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)
    for module in owner.modules() if isinstance(owner, torch.nn.Module) else ():
        if isinstance(module, torch.nn.ModuleList):
            return module
    raise FactoryError("--regional compiles the layers of a ModuleList; the model has none.")


def _forget() -> None:
    """What earlier ways left: compiled code, memory, checks and times of sites."""
    torch._dynamo.reset()
    verify.forget()
    measure.forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def floats(result: Any) -> list[Tensor]:
    """The tensors of floats in what a model returned, on the CPU."""
    leaves = pytree.tree_leaves(result)
    return [x.detach().cpu() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def compared(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float | None]:
    """``error``, ``median`` and ``same`` of a Profile, the worst of several tensors; NaN where only
    one of them has numbers or their shapes differ. None: there are no rows."""
    if not wanted or [x.shape for x in found] != [x.shape for x in wanted]:
        return dict.fromkeys(("error", "median"), float("nan"))
    apart = []
    equal = rows = 0
    for x, y in zip(found, wanted, strict=True):
        largest = y.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        off = (x.float() - y.float()).abs() / largest
        apart.append(torch.stack((off.max(), off.median())))
        if x.dim() > 1:
            same = x.argmax(-1) == y.argmax(-1)
            equal, rows = equal + int(same.sum()), rows + same.numel()
    error, median = torch.stack(apart).amax(0).tolist()  # NaN is the largest
    return {"error": error, "median": median, "same": equal / rows if rows else None}


def _kept(site: Site) -> dict[str, Any]:
    """A site without file and line: what is kept goes to other people."""
    times = {k: v for k, v in site.detail.get("µs", {}).items() if k != "tokens"}
    kept = {"fusion": site.fusion, "status": site.status, "module": site.module, **times}
    return kept if site.status == "taken" else kept | {"reason": site.reason}
