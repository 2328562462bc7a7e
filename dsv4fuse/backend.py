"""The ways in: a torch.compile backend, a decorator, a pass for one's own Inductor configuration,
and ``explain``."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from dsv4fuse import (
    cache,
    compat,
    compile_workers,
    garbage,
    launches,
    pipeline,
    ranks,
    render,
    trial,
)
from dsv4fuse.fusion import register_ops, registry
from dsv4fuse.options import Options, debugging, disabled
from dsv4fuse.report import Break, FusionError, Report, Site

log = logging.getLogger("dsv4fuse")
Target = TypeVar("Target", bound=Callable[..., Any])
OptionsLike = Mapping[str, Any] | Options | None


class FusionPass(CustomGraphPass):
    """The pass as Inductor runs it, after whatever pass was configured there before.

    ``report`` collects what this pass did; it stays empty when Inductor's cache was warm.
    """

    def __init__(self, options: Options, before: Sequence[Any] = (), alone: bool = True) -> None:
        self.options, self.before, self.report = options, tuple(before), Report()
        self.alone = alone  # nobody asks, on a warm cache, whether its choices are the job's

    def __call__(self, graph: fx.Graph) -> None:
        for earlier in self.before:
            earlier(graph)
        try:
            launches.install()
            self.report += pipeline.run(graph, self.options)
        except Exception as error:
            if self.options.strict or debugging():
                raise
            log.exception("dsv4fuse failed on a graph, which goes to Inductor as it is")
            note = f"dsv4fuse failed on a graph ({error!r}), which went to Inductor as it was."
            self.report += Report(graphs=1, notes=[note])

    def __deepcopy__(self, memo: Any) -> FusionPass:
        """Itself: AOTInductor copies its configuration, and the report is read from this one."""
        return self

    def uuid(self) -> Any:
        """None (no caching) if an earlier pass has no identity of its own, or if another rank may
        have timed a site otherwise than the process that filled the cache."""
        if self.alone and ranks.several() and self.options.select in ("auto", "measure"):
            return None
        identities = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before]
        if any(identity is None for identity in identities):
            return None
        return cache.pass_uuid(self.options, [str(i) for i in identities])


def parse(options: OptionsLike) -> Options:
    """Options as given, their names of fusions checked too. Raises OptionError."""
    return Options.parse(options, registry())


def inductor_pass(options: OptionsLike = None) -> FusionPass:
    """The pass for one's own ``config_patches={"joint_custom_pre_pass": ...}``.

    It runs after the pass configured there now, if any. ``.report`` says what it did, and stays
    empty where Inductor's cache was warm. Raises OptionError for an unknown or ill-typed option.
    """
    return FusionPass(parse(options), compat.configured_passes())


def dsv4fuse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: OptionsLike = None,
    mode: str | None = None,
    **unused: Any,
) -> Callable[..., Any]:
    """The backend: ``torch.compile(model, backend="dsv4fuse", options={...})``; or ``mode``, as
    Inductor has them, which torch.compile does not take together with options.

    Raises OptionError for an unknown or ill-typed option, FusionError where ``expect`` or
    ``strict`` is not met.
    """
    parsed = parse(options)
    if (mode or "").startswith("max-autotune"):
        parsed = dataclasses.replace(parsed, autotune=True)
    register_ops()
    if disabled():
        return compat.compile_inner(gm, example_inputs, None, parsed.inner, mode)
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs):
        compile_workers.warm()  # which takes seconds
    if compat.will_be_differentiated(gm, example_inputs):
        report = Report(graphs=1, notes=[_TRAINING])
        compiled = compat.compile_inner(gm, example_inputs, None, parsed.inner, mode)
    else:
        with garbage.passed_by():
            compiled, report = _fused(gm, example_inputs, parsed, mode)
        _log(report)
    broken = compat.graph_break(gm)
    if broken is not None:
        report.breaks.append(Break(*broken))
        report.sites += _of_break(Break(*broken), parsed)
    _remember(gm, example_inputs, report)
    collected = _collecting.get()
    if collected is None:
        report.check(parsed)
    else:
        collected += report
    return compiled


def _fused(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, mode: str | None
) -> tuple[Callable[..., Any], Report]:
    """The graph compiled with the pass, and the report of the pass or, where Inductor's cache was
    warm, of the process that filled it."""
    fusing = FusionPass(options, compat.configured_passes(), alone=False)
    key = _key(gm, inputs, fusing)
    compiled = compat.compile_inner(gm, inputs, fusing, options.inner, mode)
    if not fusing.report.graphs:
        stored = cache.load_report(key) if key is not None else None
        if stored is not None and not trial.stale(stored.found()):
            stored.notes.append(_WARM)
            return compiled, stored
        # Nothing says what lies in the cache, or it is not what the job's other ranks run; and
        # then what lies beside it stays.
        key = None if stored is not None else key
        with compat.without_caches():
            compiled = compat.compile_inner(gm, inputs, fusing, options.inner, mode)
    if key is not None and fusing.report.graphs:
        cache.save_report(key, fusing.report)
    return compiled, fusing.report


_WARM = "Read back, since Inductor's cache was warm: lines are as they were when it was filled."


def _log(report: Report) -> None:
    """To torch's logs: TORCH_LOGS="dsv4fuse" and "+dsv4fuse", and the trace that tlparse reads.

    What somebody should look at is a warning, unless ``explain`` is about to show it anyway.
    """
    log.info("%s", render.headline(report))
    for site in report.sites:
        seen = _collecting.get() is not None or site.status in ("taken", "declined")
        words = (site.status, site.fusion, site.where, site.reason)
        log.log(logging.DEBUG if seen else logging.WARNING, "%s %s at %s: %s", *words)
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "dsv4fuse_report", "encoding": "json"},
        payload_fn=report.to_json,
    )


def _of_break(broken: Break, options: Options) -> list[Site]:
    """What the fusions have to say of a graph break."""
    found = {f.name: f.broken(broken.reason) for f in registry().values() if f.broken is not None}
    return [
        Site(name, "declined", "", broken.file, broken.line, sentence)
        for name, sentence in found.items()
        if sentence and options.wants(name)
    ]


_TRAINING = (
    "A graph whose gradient is wanted was passed on untouched: the fused kernels have no backward."
    " Call the model under torch.no_grad() or torch.inference_mode()."
)
# Of this thread alone: what another one compiles meanwhile is its own.
_collecting: contextvars.ContextVar[Report | None] = contextvars.ContextVar(
    "collecting", default=None
)


@contextlib.contextmanager
def collecting(report: Report) -> Iterator[None]:
    """Adds to ``report`` what is done to every graph compiled meanwhile; nothing is checked."""
    before = _collecting.set(report)
    try:
        yield
    finally:
        _collecting.reset(before)


def _key(gm: fx.GraphModule, inputs: Sequence[Any], fusing: FusionPass) -> str | None:
    """What the report of a graph is kept under; None when the pass has no identity."""
    identity = fusing.uuid()
    if identity is None:
        return None
    digest = hashlib.sha256(str(identity).encode())
    # The code without its comments: those hold file and line, which Inductor's key does not.
    for module in gm.modules():
        digest.update(module.code.encode() if isinstance(module, fx.GraphModule) else b"")
    for x in inputs:
        if isinstance(x, torch.Tensor):
            x = (tuple(x.shape), tuple(x.stride()), x.dtype, x.device)
        digest.update(str(x).encode())
    return digest.hexdigest()


def _remember(gm: fx.GraphModule, inputs: Sequence[Any], report: Report) -> None:
    """So that ``Report.of(model)`` finds it by the model's own tensors."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    report.belongs_to([*tensors, *gm.parameters(), *gm.buffers()])


@overload
def fuse(target: Target, /, **options: Any) -> Target: ...
@overload
def fuse(target: None = None, /, **options: Any) -> Callable[[Target], Target]: ...
def fuse(target: Any = None, /, **options: Any) -> Any:
    """Compile a module class, an instance or a function with this backend; a decorator too.

    ``@fuse`` and ``@fuse(select="always")`` on an ``nn.Module`` class compile each instance made
    from it; on an instance or a function, ``fuse(m)`` returns the compiled thing and leaves ``m``
    as it was. ``dynamic`` and ``fullgraph`` go to torch.compile, the rest are the backend's
    options. ``Report.of(m)`` is the report once it has run. Raises OptionError for an option that
    is unknown or ill-typed, TypeError for a target that is none of these.
    """
    if target is None:
        return lambda wanted: fuse(wanted, **options)
    passed: dict[str, Any] = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    parsed = parse(options)

    settings: dict[str, Any] = {"backend": dsv4fuse, "options": parsed.to_dict(), **passed}
    if isinstance(target, type):
        return _fuse_class(target, settings)
    if not callable(target):
        raise TypeError(_TARGETS)
    return torch.compile(target, **settings)


_TARGETS = "dsv4fuse.fuse takes an nn.Module class, a module or a function."


def _fuse_class(cls: Any, settings: dict[str, Any]) -> Any:
    """The class, its instances (not those of subclasses) compiled as they are made."""
    if not issubclass(cls, nn.Module):
        raise TypeError(_TARGETS)
    made = cls.__init__

    @functools.wraps(made)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if type(self) is cls:
            self.compile(**settings)

    cls.__init__ = __init__
    return cls


def explain(
    model: Callable[..., Any], *args: Any, options: OptionsLike = None, **kwargs: Any
) -> Report:
    """What would be fused in ``model(*args, **kwargs)``, what not, and why; graph breaks too.

    Compiles from scratch with ``inner="eager"`` (unless ``options`` say otherwise) and runs the
    model once, without gradients, on the shapes, dtypes and devices of the arguments; what the
    model itself writes (its caches) is written. The model stays as it was otherwise. Raises
    OptionError for an unknown or ill-typed option, and FusionError, with the report, where
    ``expect`` or ``strict`` is not met.
    """
    parsed = parse(options)
    if not isinstance(options, Options) and "inner" not in (options or {}):
        parsed = dataclasses.replace(parsed, inner="eager")
    report = Report()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return dsv4fuse(gm, inputs, options=parsed)

    with collecting(report), torch.no_grad(), compat.without_caches():
        torch.compile(model, backend=backend)(*args, **kwargs)
    try:
        report.check(parsed)
    except FusionError as error:
        raise FusionError(str(error), report) from None
    return report


