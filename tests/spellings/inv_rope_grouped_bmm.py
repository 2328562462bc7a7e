"""Inverse rope → grouped projection, with wide and e4m3 weights and through fp8 activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4fuse import atoms

from . import _quants, _ropes
from ._case import BF16, FP16, FP32, Case, Draw, plain

NAME = "inv_rope_grouped_bmm"
DIM, ROPE, HEADS, GROUPS, COLUMNS, BLOCK = 64, 16, 4, 2, 64, 32
BATCH, SEQ, WIDTH = 2, 5, HEADS // GROUPS * DIM
B, S, H, G, N, K = BATCH, SEQ, HEADS, GROUPS, COLUMNS, WIDTH
Fn = Callable[..., Any]
TURN = _ropes.REAL["slices_and_stack"]


def back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return TURN(x, cos, -sin)


def inputs(
    *lead: int, table: tuple[int, ...], dtype: torch.dtype = BF16, tables: Any = FP32,
    e4m3: bool = False, groups: int = GROUPS, dim: int = DIM,
) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
    """o, cos and sin (or for tables None the frequencies), the weights ``[G·N, K]`` as on disk."""

    def make(draw: Draw | None = None) -> tuple[Tensor, ...]:
        draw = draw or Draw()
        x, (cos, sin) = draw(*lead, dim, dtype=dtype), draw.angles(*table, ROPE // 2)
        turn = (torch.complex(cos, sin),) if tables is None else (cos.to(tables), sin.to(tables))
        k = HEADS // groups * dim
        w = draw(groups * N, k, dtype=FP32, scale=0.1)
        if not e4m3:
            return x, *turn, w.to(dtype)
        scale = draw(groups * N // BLOCK, k // BLOCK, dtype=FP32, scale=0.1).abs() + 0.01
        return x, *turn, (w * 100).to(torch.float8_e4m3fn), scale

    return make


def usual(**more: Any) -> Callable[[], tuple[Tensor, ...]]:
    return inputs(B, S, H, table=(B, S, 1), **more)


def _case(fn: Fn, make: Fn | None = None, *parts: str, **more: Any) -> Case:
    wanted = parts or ("nverse rope → projection of 2 groups",)
    return Case(plain(fn), make or usual(), {NAME: 1}, wanted, exact=False, **more)


# ---- the projection: heads [B, S, H, D], weights [G·N, K] → anything ----------------------------

PRODUCTS: dict[str, Fn] = {
    "einsum": lambda y, w: torch.einsum("bsgd,grd->bsgr", y.reshape(B, S, G, -1), w.view(G, N, K)),
    "einsum, flat": lambda y, w: torch.einsum(
        "bsgd,grd->bsgr", y.flatten(2).unflatten(-1, (G, -1)), w.unflatten(0, (G, -1))
    ).flatten(2),
    "einsum, heads apart": lambda y, w: torch.einsum(
        "bsghd,grhd->bsgr", y.unflatten(2, (G, -1)), w.view(G, N, -1, DIM)
    ),
    "einsum, groups first": lambda y, w: torch.einsum(
        "bsgd,grd->gbsr", y.reshape(B, S, G, -1), w.view(G, N, K)
    ),
    "bmm, as transformers": lambda y, w: _grouped_linear(y.reshape(B, S, G, -1), w).flatten(2),
    "bmm, tokens merged": lambda y, w: torch.bmm(
        y.reshape(-1, G, K).transpose(0, 1), w.view(G, N, K).transpose(1, 2)
    ).transpose(0, 1).reshape(-1, G * N),
    "bmm, groups' order": lambda y, w: torch.bmm(
        y.reshape(-1, G, K).transpose(0, 1), w.view(G, N, K).mT
    ),
    "matmul, unit axis": lambda y, w: (
        y.reshape(B, S, G, 1, K) @ w.view(G, N, K).transpose(-1, -2)
    ).squeeze(-2),
    "matmul, broadcast weights": lambda y, w: torch.matmul(
        y.reshape(B, S, G, K).permute(2, 0, 1, 3), w.view(G, N, K).mT.unsqueeze(1)
    ).permute(1, 2, 0, 3),
}  # fmt: skip


def _grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    w = weight.view(G, -1, x.shape[-1]).transpose(1, 2)
    y = torch.bmm(x.reshape(-1, G, x.shape[-1]).transpose(0, 1), w).transpose(0, 1)
    return y.reshape(*x.shape[:-2], G, -1)


def _then(product: Fn, turn: Fn = back) -> Fn:
    return lambda x, cos, sin, w: product(turn(x, cos, sin), w)


def _linear_groups(y: Tensor, w: Tensor) -> Tensor:
    parts = zip(y.reshape(B, S, G, -1).unbind(2), w.view(G, N, K).unbind(0), strict=True)
    return torch.stack([F.linear(a, b) for a, b in parts], dim=2)


class Attention(nn.Module):
    """The reference's end of attention: weights in a module, rope in place."""

    def __init__(self) -> None:
        super().__init__()
        self.wo_a = nn.Linear(K, G * N, bias=False, dtype=BF16)
        self.wo_b = nn.Linear(G * N, 24, bias=False, dtype=BF16)
        for seed, m in enumerate((self.wo_a, self.wo_b)):
            m.weight.data.copy_(Draw(seed + 3)(*m.weight.shape, scale=0.1))

    def forward(self, x: Tensor, freqs: Tensor, _: Tensor) -> Tensor:
        o = x * 2
        pairs = torch.view_as_complex(o[..., -ROPE:].float().unflatten(-1, (-1, 2)))
        o[..., -ROPE:].copy_(torch.view_as_real(pairs * freqs.conj()).flatten(-2))
        o = o.view(B, S, G, -1)
        wo_a = self.wo_a.weight.view(G, N, -1)
        return self.wo_b(torch.einsum("bsgd,grd->bsgr", o, wo_a).flatten(2))


EINSUM = PRODUCTS["einsum"]
SPELLINGS: dict[str, Case] = {}
for _name, _product in PRODUCTS.items():
    SPELLINGS[_name] = _case(_then(_product))
SPELLINGS |= {
    "the reference's module": Case(Attention, usual(tables=None), {NAME: 1}, exact=False),
    "heads first, as transformers": _case(
        lambda x, cos, sin, w: _grouped_linear(
            back(x.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2))
            .transpose(1, 2).reshape(B, S, G, -1), w
        )
    ),
    "attention heads first": _case(
        lambda x, cos, sin, w: EINSUM(back(x, cos, sin).transpose(1, 2), w),
        inputs(B, H, S, table=(B, 1, S)),
    ),
    "hf rope": _case(
        _then(EINSUM, lambda x, c, s: _ropes.REAL["hf"](x, c, -s)), usual(tables=BF16)
    ),
    "rope in the activation's dtype": _case(
        _then(EINSUM, lambda x, c, s: next(iter(_ropes.EVERY.values()))(x, c, -s)),
        usual(tables=BF16),
    ),
    "complex rope": _case(
        lambda x, f, w: EINSUM(_ropes.COMPLEX["reference"](x, f.conj()), w), usual(tables=None)
    ),
    "fp16": _case(_then(EINSUM), usual(dtype=FP16)),
    "flat tokens": _case(
        lambda x, c, s, w: torch.einsum(
            "tgd,grd->tgr", back(x, c, s).view(S, G, K), w.view(G, N, K)
        ),
        inputs(S, H, table=(S, 1)),
    ),
    "one token": _case(
        lambda x, c, s, w: torch.einsum("bsgd,grd->bsgr", back(x, c, s).view(1, 1, G, K),
                                        w.view(G, N, K)).flatten(2),
        inputs(1, 1, H, table=(1, 1, 1)),
    ),
    "decode": _case(
        lambda x, c, s, w: torch.einsum("bsgd,grd->bsgr", back(x, c, s).view(B, 1, G, K),
                                        w.view(G, N, K)),
        inputs(B, 1, H, table=(B, 1, 1)),
    ),
    "dynamic": _case(
        lambda x, c, s, w: torch.einsum(
            "bsgd,grd->bsgr", back(x, c, s).flatten(2).unflatten(-1, (G, -1)), w.view(G, N, K)
        ).flatten(2),
        dynamic={0: (0, 1), 1: (0, 1), 2: (0, 1)},
    ),
    "dynamic, as transformers": _case(
        lambda x, c, s, w: _grouped_linear(back(x, c, s).flatten(2).unflatten(-1, (G, -1)), w),
        dynamic={0: (1,), 1: (1,), 2: (1,)},
    ),
    "one group": _case(
        lambda x, c, s, w: F.linear(back(x, c, s).flatten(2), w),
        usual(groups=1), "projection of 1 groups",
    ),
    "a group for each head": _case(
        lambda x, c, s, w: torch.einsum("bshd,hrd->bshr", back(x, c, s), w.view(H, N, -1)),
        usual(groups=H), "projection of 4 groups",
    ),
    "product in fp32": _case(
        lambda x, c, s, w: EINSUM(back(x, c, s).float(), w.float()).to(x.dtype)
    ),
    "an intermediate's heads": _case(lambda x, c, s, w: EINSUM(back(x * 2, c, s), w)),
    "other readers of o": _case(lambda x, c, s, w: (EINSUM(back(x, c, s), w), x.float().sum(-1))),
    "other readers of the result": _case(
        lambda x, c, s, w: (lambda z: (z.flatten(2), z * 2))(EINSUM(back(x, c, s), w))
    ),
}  # fmt: skip

# ---- e4m3 weights: codes [G·N, K], scales [G·N / BLOCK, K / BLOCK] -------------------------------


def _repeated(w: Tensor, s: Tensor) -> Tensor:
    return w.float() * s.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def _blocks(w: Tensor, s: Tensor) -> Tensor:
    blocks = w.view(w.shape[0] // BLOCK, BLOCK, -1, BLOCK).float()
    return (blocks * s[:, None, :, None]).view(w.shape)


def _expanded(w: Tensor, s: Tensor) -> Tensor:
    return s[:, None, :, None].expand(-1, BLOCK, -1, BLOCK).reshape(w.shape) * w.to(FP32)


DEQUANT = {"repeat_interleave": _repeated, "blocks": _blocks, "expand": _expanded}
for _name, _wide in DEQUANT.items():
    SPELLINGS[f"e4m3: {_name}"] = _case(
        lambda x, c, s, w, ws, wide=_wide: EINSUM(back(x, c, s), wide(w, ws).to(x.dtype)),
        usual(e4m3=True), "2 groups (e4m3)",
    )  # fmt: skip
    SPELLINGS[f"e4m3: {_name}, product in fp32"] = _case(
        lambda x, c, s, w, ws, wide=_wide: EINSUM(back(x, c, s).float(), wide(w, ws)).bfloat16(),
        usual(e4m3=True), "2 groups (e4m3)",
    )  # fmt: skip
SPELLINGS["e4m3: as transformers"] = _case(
    lambda x, c, s, w, ws: PRODUCTS["bmm, as transformers"](
        back(x, c, s), _blocks(w, ws).to(x.dtype)
    ),
    usual(e4m3=True), "2 groups (e4m3)",
)  # fmt: skip


def _simulated(y: Tensor, pieces: dict[str, Any], lead: int = 2) -> Tensor:
    """The grouped heads through fp8 and back, in fp32."""
    codes, s = _quants.quantise(y.reshape(*y.shape[:lead], G, -1), BLOCK, **pieces)
    return (codes.float() * s).flatten(-2)


def _fp8(wide: Fn = _blocks, **pieces: Any) -> Fn:
    return lambda x, c, s, w, ws: torch.einsum(
        "bsgd,grd->bsgr", _simulated(back(x, c, s), pieces), wide(w, ws).view(G, N, -1)
    ).to(x.dtype)


SPELLINGS |= {
    "fp8: fp32 product": _case(_fp8(), usual(e4m3=True), "fp8 quant → projection of 2 groups"),
    "fp8: repeat_interleave": _case(_fp8(_repeated), usual(e4m3=True), "fp8 quant → projection"),
    "fp8: powers of two": _case(
        _fp8(**_quants.VARIANTS["pow2_methods"]), usual(e4m3=True), "fp8 quant → projection"
    ),
    "fp8: a block is a head": _case(
        _fp8(),
        usual(e4m3=True, dim=BLOCK), "fp8 quant → projection",
    ),
    "fp8: quantised head by head": _case(
        lambda x, c, s, w, ws: EINSUM(
            atoms.fake_quant(back(x, c, s).float(), group=BLOCK, floor=1e-4, scale="fp32"),
            _blocks(w, ws),
        ).to(x.dtype),
        usual(e4m3=True), "fp8 quant → projection",
    ),
}  # fmt: skip

# ---- one edit away -------------------------------------------------------------------------------

ROPE_ONLY = {"inv_rope_quant": 1}
_LIKE, _E4M3, _FP8 = SPELLINGS["einsum"], SPELLINGS["e4m3: blocks"], SPELLINGS["fp8: fp32 product"]


def _mutant(fn: Fn, make: Fn | None = None, like: Case = _LIKE, **more: Any) -> Case:
    return Case(plain(fn), make or usual(), ROPE_ONLY, exact=False, like=like, **more)


def _edited(edit: Fn) -> Case:
    return _mutant(lambda x, c, s, w: EINSUM(edit(back(x, c, s)), w))


def _still(fn: Fn, e4m3: bool = False, absent: tuple[str, ...] = ()) -> Case:
    """Still this projection, of other weights: those that the graph makes by itself."""
    like = _E4M3 if e4m3 else _LIKE
    return Case(plain(fn), usual(e4m3=e4m3), {NAME: 1}, absent=absent, exact=False, like=like)


MUTANTS: dict[str, Case] = {
    "heads in another order": _edited(lambda y: y.flip(2)),
    "heads interleaved in the groups": _mutant(
        lambda x, c, s, w: EINSUM(back(x, c, s).view(B, S, -1, G, DIM).transpose(2, 3), w)
    ),
    "lanes before heads": _edited(lambda y: y.transpose(-1, -2)),
    "tokens shifted": _edited(lambda y: y.roll(1, 1)),
    "scaled before the product": _edited(lambda y: y * 0.5),
    "rounded once more": _edited(lambda y: y.to(torch.float8_e4m3fn).to(BF16)),
    "other groups' weights": _still(
        lambda x, c, s, w: EINSUM(back(x, c, s), w.view(G, N, K).flip(0).flatten(0, 1))
    ),
    "weights of groups interleaved": _still(
        lambda x, c, s, w: EINSUM(back(x, c, s), w.view(N, G, K).transpose(0, 1).reshape(-1, K))
    ),
    "one group's weights for all": _still(
        lambda x, c, s, w: EINSUM(
            back(x, c, s), w.view(G, N, K)[:1].expand(G, -1, -1).reshape(-1, K)
        )
    ),
    "summed over the groups": _mutant(
        lambda x, c, s, w: torch.einsum(
            "bsgd,grd->bsr", back(x, c, s).view(B, S, G, K), w.view(G, N, K)
        )
    ),
    "products rounded": _mutant(
        lambda x, c, s, w: (back(x, c, s).view(B, S, G, 1, K) * w.view(G, N, K)).sum(-1)
    ),
    "of the unturned": _mutant(lambda x, c, s, w: (EINSUM(x, w), back(x, c, s))),
    "turned forward": Case(
        plain(lambda x, c, s, w: EINSUM(TURN(x, c, s), w)), usual(), {"norm_rope_cache": 1},
        exact=False, like=_LIKE,
    ),
    "e4m3: transposed scales": _still(
        lambda x, c, s, w, ws: EINSUM(back(x, c, s), _blocks(w, ws.t()).to(x.dtype)), True
    ),
    "e4m3: inverted scales": _still(
        lambda x, c, s, w, ws: EINSUM(back(x, c, s), _blocks(w, 1 / ws).to(x.dtype)), True
    ),
    "e4m3: rounded scales": _still(
        lambda x, c, s, w, ws: EINSUM(back(x, c, s), _blocks(w, ws.bfloat16()).to(x.dtype)),
        True, ("(e4m3)",),
    ),
    "e4m3: rounded twice": _still(
        lambda x, c, s, w, ws: EINSUM(back(x, c, s), _blocks(w, ws).half().to(x.dtype)),
        True, ("(e4m3)",),
    ),
    "e4m3: rounded product": _still(
        lambda x, c, s, w, ws: EINSUM(
            back(x, c, s), w.to(BF16) * _blocks(torch.ones_like(w), ws).to(BF16)
        ),
        True, ("(e4m3)",),
    ),
    "e4m3: scales of half blocks": _still(
        lambda x, c, s, w, ws: EINSUM(
            back(x, c, s), (w.float() * ws.repeat_interleave(BLOCK, 0).repeat(1, BLOCK)).to(x.dtype)
        ),
        True, ("(e4m3)",),
    ),
    "fp8: activations rounded": _mutant(
        lambda x, c, s, w, ws: EINSUM(
            _simulated(back(x, c, s), {}).to(x.dtype), _blocks(w, ws).to(x.dtype)
        ),
        usual(e4m3=True), _FP8, why="The module rounds the dequantised activations",
    ),
    "fp8: the next block's scale": _mutant(
        lambda x, c, s, w, ws: (lambda codes, t: EINSUM(
            (codes.float() * t.roll(1, -2)).flatten(-2), _blocks(w, ws)
        ).to(x.dtype))(*_quants.quantise(back(x, c, s).view(B, S, G, -1), BLOCK)),
        usual(e4m3=True), _FP8,
    ),
    "fp8: codes without their scale": _mutant(
        lambda x, c, s, w, ws: (lambda codes, t: EINSUM(
            codes.float().flatten(-2), _blocks(w, ws)
        ).to(x.dtype))(*_quants.quantise(back(x, c, s).view(B, S, G, -1), BLOCK)),
        usual(e4m3=True), _FP8,
    ),
}  # fmt: skip

KNOWN_MISSES: dict[str, Case] = {
    "the turned heads are wanted too": _case(
        lambda x, c, s, w: (lambda y: (EINSUM(y, w), y))(back(x, c, s)),
        why="the rotation is written anyway, so the product reads what is written",
    ),
    "sums kept in fp32": _case(
        lambda x, c, s, w: EINSUM(back(x, c, s).float(), w.float()),
        why="equal up to the order of a sum is no close bound for an fp32 result",
    ),
    "weights on the left": _case(
        _then(lambda y, w: w.view(G, N, K) @ y.reshape(-1, G, K).permute(1, 2, 0)),
        why="the result lies token by token within a column, which no kernel here writes",
    ),
    "a linear layer for each group": _case(
        _then(_linear_groups), why="each product reads a part of the heads, none reads all groups"
    ),
}
