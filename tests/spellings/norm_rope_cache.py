"""RMSNorm → rope → cache write for q and kv, spelled and misspelled.

One piece (norm, rope, layout, fake quant, write) is changed at a time; the pieces themselves are
in the files with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _norms, _quants, _ropes
from ._case import BF16, FP16, FP32, Case, Draw, plain
from ._writes import DECODE, FLAT, PREFILL, Write
from ._writes import MISSES as WRITE_MISSES
from ._writes import MUTANTS as WRITE_MUTANTS

NAME = "norm_rope_cache"
DIM, ROPE, GROUP = 48, 16, 16
BATCH, SEQ, HEADS = 2, 5, 3
Fn = Callable[..., Any]
NORM, TURN = _norms.BF16_WEIGHT["hf_weighted"], _ropes.REAL["slices_and_stack"]


def _case(fn: Fn, inputs: Fn, *parts: str, **more: Any) -> Case:
    count = more.pop("count", 1)
    return Case(plain(fn), inputs, {NAME: count} if count else {}, parts, **more)


def tables(draw: Draw, *lead: int, dtype: torch.dtype | None = FP32) -> tuple[Tensor, ...]:
    """cos and sin, or for dtype None the complex frequencies."""
    cos, sin = draw.angles(*lead, ROPE // 2)
    return (torch.complex(cos, sin),) if dtype is None else (cos.to(dtype), sin.to(dtype))


def q_inputs(
    dtype: torch.dtype = BF16, weight: torch.dtype | None = None, table: Any = FP32
) -> Callable[[], tuple[Tensor, ...]]:
    """q ``[B,S,H,D]``, weight, tables ``[B,S,1,R/2]``."""

    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        x, w = draw(BATCH, SEQ, HEADS, DIM, dtype=dtype), draw(DIM, dtype=weight or dtype)
        return (x, w, *tables(draw, BATCH, SEQ, 1, dtype=table))

    return inputs


def q_case(norm: Fn, rope: Fn, inputs: Fn | None = None, *parts: str, **more: Any) -> Case:
    def fn(x: Tensor, w: Tensor, *table: Tensor) -> Tensor:
        return rope(norm(x, w), *table)

    return _case(fn, inputs or q_inputs(), *(parts or ("Q: norm", "rope")), **more)


SPELLINGS: dict[str, Case] = {}
for _table, _weight in ((_norms.PLAIN, None), (_norms.BF16_WEIGHT, None)):
    for _name, _norm in _table.items():
        SPELLINGS[f"norm: {_name}"] = q_case(_norm, TURN, exact=_name not in _norms.LOOSE)
for _name, _norm in _norms.FP32_WEIGHT.items():
    SPELLINGS[f"norm: {_name}"] = q_case(
        _norm, TURN, q_inputs(weight=FP32), exact=_name not in _norms.LOOSE
    )
for _dtype in (FP16, FP32):
    for _name in ("hf_unweighted", "once", "hf_weighted", "functional", "every_weighted"):
        SPELLINGS[f"norm: {_name}, {_dtype}"] = q_case(
            (_norms.PLAIN | _norms.BF16_WEIGHT)[_name], TURN, q_inputs(_dtype)
        )
for _name, _rope in _ropes.REAL.items():
    SPELLINGS[f"rope: {_name}"] = q_case(NORM, _rope)
for _name, _rope in _ropes.COMPLEX.items():
    SPELLINGS[f"rope: {_name}"] = q_case(NORM, _rope, q_inputs(table=None))
for _name, _rope in _ropes.EVERY.items():
    SPELLINGS[f"rope: {_name}"] = q_case(NORM, _rope, q_inputs(table=BF16))
for _dtype in (FP16, FP32):
    for _name in ("hf", "copy_into_the_slice", "slices_and_stack"):
        SPELLINGS[f"rope: {_name}, {_dtype}"] = q_case(NORM, _ropes.REAL[_name], q_inputs(_dtype))
SPELLINGS |= {
    "the reference's q": q_case(
        _norms.PLAIN["reference_in_place"], _ropes.COMPLEX["reference"], q_inputs(table=None)
    ),
    "transformers' q": q_case(
        _norms.PLAIN["hf_unweighted"], _ropes.REAL["hf"], q_inputs(table=BF16)
    ),
    "rope of rounded tables": q_case(NORM, _ropes.REAL["hf"], q_inputs(table=BF16)),
    "no norm": q_case(lambda x, w: x, TURN, None, "Q: rope"),
    "dynamic batch and sequence": q_case(
        NORM, TURN, dynamic={0: (0, 1), 2: (0, 1), 3: (0, 1)}
    ),
    "dynamic, complex": q_case(
        NORM, _ropes.COMPLEX["reference"], q_inputs(table=None), dynamic={0: (0, 1), 2: (0, 1)}
    ),
    "dynamic, by halves": q_case(
        NORM, _ropes.REAL["hf"], dynamic={0: (0, 1), 2: (0, 1), 3: (0, 1)}
    ),
}


# ---- layouts -----------------------------------------------------------------------------------


def _layout(shape: tuple[int, ...], table: tuple[int, ...], fn: Fn | None = None) -> Case:
    """x of a shape and tables of a shape that broadcasts against it."""

    def inputs() -> tuple[Tensor, ...]:
        draw = Draw()
        return (draw(*shape), draw(DIM), *tables(draw, *table))

    def straight(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return TURN(NORM(x, w), cos, sin)

    return _case(fn or straight, inputs, "norm", "rope")


def _heads_out(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, S, H·D] from a linear, normed and turned heads first, as transformers does."""
    q = x.view(BATCH, SEQ, HEADS, DIM).transpose(1, 2)
    return TURN(NORM(q, w), cos.unsqueeze(1), sin.unsqueeze(1))


def _tokens_out(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = x.unflatten(-1, (HEADS, DIM))
    return TURN(NORM(q, w), cos[:, :, None], sin[:, :, None]).flatten(-2)


def _slice_of_qkv(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, _ = x.split([HEADS * DIM, DIM], dim=-1)
    return TURN(NORM(q.unflatten(-1, (HEADS, DIM)), w), cos.unsqueeze(2), sin.unsqueeze(2))


def _by_position(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    positions = torch.arange(SEQ) * 2 % 7
    return TURN(NORM(x, w), cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))


def _slice_of_tables(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t[2 : 2 + SEQ].view(1, SEQ, 1, -1) for t in (cos, sin))
    return TURN(NORM(x, w), cos, sin)


B, S, H = BATCH, SEQ, HEADS
SPELLINGS |= {
    "layout: tokens first": _layout((B, S, H, DIM), (B, S, 1)),
    "layout: heads first": _layout((B, H, S, DIM), (B, 1, S)),
    "layout: heads by transpose": _layout((B, S, H * DIM), (B, S), _heads_out),
    "layout: heads merged again": _layout((B, S, H * DIM), (B, S), _tokens_out),
    "layout: slice of a joint projection": _layout((B, S, (H + 1) * DIM), (B, S), _slice_of_qkv),
    "layout: flat": _layout((S, H, DIM), (S, 1)),
    "layout: flat heads first": _layout((H, S, DIM), (S,)),
    "layout: rows": _layout((S, DIM), (S,)),
    "layout: kv": _layout((B, S, DIM), (B, S)),
    "layout: kv, shared positions": _layout((B, S, DIM), (S,)),
    "layout: kv with a head axis": _layout((B, 1, S, DIM), (B, 1, S)),
    "layout: shared positions": _layout((B, S, H, DIM), (S, 1)),
    "layout: shared, unit batch": _layout((B, S, H, DIM), (1, S, 1)),
    "layout: shared, heads first": _layout((B, H, S, DIM), (S,)),
    "layout: shared, heads first, four axes": _layout((B, H, S, DIM), (1, 1, S)),
    "layout: one position": _layout((B, H, DIM), ()),
    "layout: decode at one position": _layout((B, 1, H, DIM), (1, 1, 1)),
    "layout: decode at one position, heads first": _layout((B, H, 1, DIM), (1, 1, 1)),
    "layout: kv at one position": _layout((B, 1, DIM), (1, 1)),
    "layout: batch of one": _layout((1, S, H, DIM), (1, S, 1)),
    "layout: sequence of one": _layout((B, 1, H, DIM), (B, 1, 1)),
    "layout: one head": _layout((B, S, 1, DIM), (B, S, 1)),
    "layout: a single row": _layout((1, 1, 1, DIM), (1, 1, 1)),
    "layout: a vector": _layout((DIM,), ()),
    "layout: tables by position": _layout((S, H, DIM), (7,), _by_position),
    "layout: slice of the tables": _layout((B, S, H, DIM), (9,), _slice_of_tables),
}


# ---- kv: fake quant and write ------------------------------------------------------------------


def kv_inputs(write: Write) -> Callable[[], tuple[Any, ...]]:
    """kv rows, weight, tables, the cache and where to write."""

    def inputs() -> tuple[Any, ...]:
        draw = Draw()
        rows = draw(*write.rows, DIM)
        table = tables(draw, *write.rows)
        return (rows, draw(DIM), *table, draw(*write.cache, DIM), *write.where(draw))

    return inputs


def kv_case(write: Write, change: Fn = lambda y: y, *parts: str, **more: Any) -> Case:
    def fn(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, *where: Any) -> Any:
        return write.fn(cache, change(TURN(NORM(x, w), cos, sin)), *where)

    return _case(
        fn, kv_inputs(write), *(parts or ("Kv: norm", "rope", "cache write")), **more
    )


def in_place(pieces: dict[str, Fn]) -> Fn:
    """Fake quant of the nope lanes, copied over them as the reference does."""

    def change(y: Tensor) -> Tensor:
        y = y.clone()
        y[..., :-ROPE].copy_(_quants.fake(y[..., :-ROPE], GROUP, **pieces))
        return y

    return change


def joined(pieces: dict[str, Fn]) -> Fn:
    def change(y: Tensor) -> Tensor:
        nope, turned = y.split([DIM - ROPE, ROPE], dim=-1)
        return torch.cat((_quants.fake(nope, GROUP, **pieces), turned), dim=-1)

    return change


WRITES = FLAT | DECODE | PREFILL
SPELLINGS |= {f"write: {name}": kv_case(write) for name, write in WRITES.items()}
for _name, _pieces in _quants.VARIANTS.items():
    SPELLINGS[f"fake quant: {_name}"] = kv_case(
        FLAT["slots"], joined(_pieces), "norm", "rope → fake quant → cache write"
    )
SPELLINGS |= {
    f"fake quant in place: {name}": kv_case(
        FLAT["slots"], in_place(_quants.VARIANTS[name]), "fake quant → cache write"
    )
    for name in ("default", "pow2")
}


def _both(q: Tensor, kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor):
    """The decode or prefill step of a layer: q and kv turned by the same tables."""
    q = _ropes.REAL["hf"](_norms.PLAIN["hf_unweighted"](q, w), cos.unsqueeze(2), sin.unsqueeze(2))
    kv = _ropes.REAL["hf"](NORM(kv, w), cos, sin)
    cache[torch.arange(BATCH)[:, None], at % cache.shape[1]] = kv
    return q


def _both_inputs() -> tuple[Tensor, ...]:
    draw = Draw()
    q, kv, w = draw(B, S, H, DIM), draw(B, S, DIM), draw(DIM)
    at = torch.arange(S) + torch.tensor([[3], [9]])
    return q, kv, w, *tables(draw, B, S), draw(B, 8, DIM), at


def _several(q: Tensor, kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, at: Tensor):
    """Two layers with one weight and one cache each, unrelated work in between."""
    out = []
    for layer in (0, 1):
        q = _both(q, kv, w, cos, sin, cache[layer], at)
        kv = kv * 0.5 + q.mean(2)
        out += [q, q.float().sum(-1)]
    return out


def _busy(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Every intermediate has a second reader."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _norms.EPS)
    normed = wide * rstd
    y = w * normed.to(x.dtype)
    z = TURN(y, cos, sin)
    return z, rstd, normed.sum(-1), y, z.abs().amax()


class Layer(nn.Module):
    """Weights and the cache belong to the module."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm = norm(DIM, eps=_norms.EPS, dtype=BF16)
        self.norm.weight.data.copy_(Draw(4)(DIM))
        self.register_buffer("cache", Draw(5)(B, 8, DIM))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        y = TURN(self.norm(x), cos, sin)
        self.cache[torch.arange(B)[:, None], at % 8] = y
        return self.cache[:, :2]


def _layer_inputs() -> tuple[Tensor, ...]:
    _, kv, _, cos, sin, _, at = _both_inputs()
    return kv, cos, sin, at


BOTH = ("Q: norm", "kv: norm", "rope → cache write")
SPELLINGS |= {
    "q and kv": _case(_both, _both_inputs, *BOTH),
    "q and kv, dynamic": _case(
        _both, _both_inputs, *BOTH, dynamic={0: (1,), 1: (1,), 3: (1,), 4: (1,), 6: (1,)}
    ),
    "two layers in one buffer": _case(
        _several, lambda: (*_both_inputs()[:5], Draw(3)(2, B, 8, DIM), _both_inputs()[6]), count=2
    ),
    "a module with a cache": Case(
        Layer, _layer_inputs, {NAME: 1}, ("Kv: norm", "rope → cache write")
    ),
    "other readers": _case(_busy, q_inputs(), "Q: norm", "rope"),
}

MUTANTS: dict[str, Case] = {}
_HF = SPELLINGS["norm: hf_weighted"]
for _name, _norm in _norms.MUTANTS.items():
    MUTANTS[f"norm: {_name}"] = q_case(
        _norm, TURN, None, "Q: rope", absent=("norm",), like=_HF
    )
for _name, _rope in _ropes.MUTANTS.items():
    _left = _ropes.STILL_ROPES.get(_name, "")
    MUTANTS[f"rope: {_name}"] = q_case(NORM, _rope, None, _left, count=int(bool(_left)), like=_HF)
for _name, _pieces in _quants.MUTANTS.items():
    if _name != "maximum_of_the_row":
        MUTANTS[f"fake quant: {_name}"] = kv_case(
            FLAT["slots"], joined(_pieces), "norm", absent=("quant", "write"),
            like=SPELLINGS["fake quant: default"],
        )  # fmt: skip
for _name, (_write, _like) in WRITE_MUTANTS.items():
    MUTANTS[f"write: {_name}"] = kv_case(
        _write, lambda y: y, "norm", "rope", absent=("write",), like=SPELLINGS[f"write: {_like}"]
    )

KNOWN_MISSES: dict[str, Case] = {
    f"norm: {name}": q_case(norm, TURN, why=why, exact=False)
    for name, (norm, why) in _norms.MISSES.items()
}
KNOWN_MISSES |= {
    f"rope: {name}": q_case(NORM, rope, why=why, exact=False)
    for name, (rope, why) in _ropes.MISSES.items()
}
KNOWN_MISSES |= {
    f"write: {name}": kv_case(write, why=why) for name, (write, why) in WRITE_MISSES.items()
}
