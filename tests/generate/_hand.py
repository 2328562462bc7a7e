"""What a drawn sequence is, and the hand that draws its pieces and remembers their names."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..spellings._case import BF16, FP16, FP32, Draw

T = TypeVar("T")
Fn = Callable[..., Any]
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
# Of the tokens, which may be symbols; not windows: torch does not know that as many rows of tables
# are a quarter of the rows of kv, a symbol of their own.
SIZES = ("B", "S", "T", "rows")
EPS = (0.0123, 1e-6, 1e-5, 0.25)  # no bf16 number, two usual ones, and one that decides much


@dataclass(frozen=True)
class Site:
    """A plain function, inputs for it, and what the pass must make of it.

    ``counts``: the sites of each fusion that must be taken. ``parts``: of those, how many must say
    that they do this as well. ``exact``: the result has eager's bits; otherwise an ``ulp`` rule or
    a sum in another order is part of the match. ``words``: the pieces that were drawn.
    """

    family: str
    words: Mapping[str, str]
    fn: Fn
    inputs: tuple[Any, ...]
    counts: Mapping[str, int]
    exact: bool = True
    parts: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (fusion, words)

    def __repr__(self) -> str:
        return f"{self.family}({', '.join(f'{k}: {v}' for k, v in self.words.items())})"


@dataclass
class Hand:
    """Draws pieces by name. ``fixed`` are names decided before: a replay with one piece exchanged
    is how a mutant comes to differ from its original in that piece and in nothing else."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    fixed: Mapping[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    loose: bool = False
    edits: dict[str, tuple[str, Sequence[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = Draw(int(self.pick("seed", {str(i): i for i in range(64)})))

    def pick(
        self, what: str, options: Mapping[str, T], *, loose: Sequence[str] | set[str] = (),
        mutants: Mapping[str, T] | None = None, of: str = "",
    ) -> T:  # fmt: skip
        """One of the options, by name. ``mutants`` are edits of the option ``of``."""
        name = self.fixed.get(what)
        if mutants:
            self.edits[what] = (of, tuple(f"MUTANT {n}" for n in mutants))
        known = dict(options) | {f"MUTANT {n}": m for n, m in (mutants or {}).items()}
        if name not in known:
            name = self.draw(st.sampled_from(list(options)))
        self.words[what] = name
        self.loose = self.loose or name in loose
        return known[name]

    def number(self, what: str, values: Sequence[T]) -> T:
        """One of the values; for a size of the input, any that was decided before."""
        options = {str(v): v for v in values}
        if what in SIZES and what in self.fixed:
            options |= {self.fixed[what]: ast.literal_eval(self.fixed[what])}
        return self.pick(what, options)

    def flag(self, what: str) -> bool:
        return self.pick(what, {"no": False, "yes": True})

    def dtype(self, what: str = "dtype", *names: str) -> torch.dtype:
        return self.pick(what, {n: DTYPES[n] for n in (names or ("bf16", "fp16", "fp32"))})

    def eps(self, norm: str) -> float:
        return self.number(f"{norm} eps", EPS)

    def tensor(self, what: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        """Random values in strides that are drawn: dense, or a part of something larger."""
        place = self.pick(f"{what} lies", PLACES if len(shape) > 1 else _DENSE)
        return place(self.random, shape, dtype)

    def seam(self, where: str) -> Callable[[Tensor], Tensor]:
        """A change of views and copies that changes no value."""
        return self.pick(f"seam {where}", SEAMS)

    def site(
        self, family: str, fn: Fn, inputs: tuple[Any, ...], counts: Mapping[str, int],
        exact: bool = True, *, parts: Sequence[str] = (),
    ) -> Site:  # fmt: skip
        said = {(family, words): 1 for words in parts}
        return Site(family, self.words, fn, inputs, counts, exact and not self.loose, said)


# ---- strides of inputs ---------------------------------------------------------------------------


def _dense(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return draw(*shape, dtype=dtype)


def _columns(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return draw(*shape[:-1], shape[-1] + 24, dtype=dtype)[..., 8 : 8 + shape[-1]]


def _every_second(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return draw(2 * shape[0], *shape[1:], dtype=dtype)[::2]


def _last_rows(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return draw(shape[0] + 3, *shape[1:], dtype=dtype)[3:]


_DENSE: dict[str, Fn] = {"dense": _dense}
PLACES: dict[str, Fn] = _DENSE | {
    "columns of a wider one": _columns,
    "every second row": _every_second,
    "the last rows": _last_rows,
}

# ---- seams ---------------------------------------------------------------------------------------


def _same(t: Tensor) -> Tensor:
    return t


SEAMS: dict[str, Callable[[Tensor], Tensor]] = {
    # more than once: most seams of most programs are none
    **dict.fromkeys(("none", "none.", "none..", "none...", "none...."), _same),
    "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.contiguous(),
    "reshape": lambda t: t.reshape(-1).view(t.shape),
    "rows": lambda t: t.reshape(-1, t.shape[-1]).reshape(t.shape),
    "unsqueeze": lambda t: t.unsqueeze(0).squeeze(0),
    "none index": lambda t: t[None][0],
    "transposed": lambda t: t.transpose(0, -1).transpose(0, -1),
    "moved": lambda t: t.movedim(-1, 0).movedim(0, -1),
    "swapped twice": lambda t: t.swapaxes(0, -1).swapaxes(-1, 0),
    "halves": lambda t: torch.cat(t.chunk(2, dim=-1), dim=-1),
    "rows apart": lambda t: torch.stack(t.unbind(0)) if t.dim() > 1 else t,
    "rows split": lambda t: torch.cat(t.split(1, dim=0)) if t.dim() > 1 else t,
    "lanes in pairs": lambda t: t.unflatten(-1, (-1, 2)).flatten(-2),
    "cast": lambda t: t.to(t.dtype),
    "wide and back": lambda t: t.float().to(t.dtype),
    "expand": lambda t: t.expand_as(t),
    "colon": lambda t: t[..., :],
    "narrow": lambda t: t.narrow(0, 0, t.shape[0]),
    "copy into empty": lambda t: torch.empty_like(t).copy_(t),
}
