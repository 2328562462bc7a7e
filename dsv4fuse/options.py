"""What a person can ask of dsv4fuse, checked before anything is compiled.

``torch.compile(model, backend="dsv4fuse", options={...})`` hands the whole mapping to us, so a
name that is not ours is an error here: a misspelt option that does nothing is worse than none.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

Numerics = Literal["faithful", "precise"]
Select = Literal["auto", "measure", "always", "never"]
Inner = Literal["inductor", "eager"]

#: The values that each choice option takes.
CHOICES: dict[str, tuple[str, ...]] = {
    "numerics": ("faithful", "precise"),
    "select": ("auto", "measure", "always", "never"),
    "inner": ("inductor", "eager"),
}

_FLAGS = ("verify", "strict", "autotune")


class OptionError(ValueError):
    """An option of dsv4fuse has an unknown name, a wrong type or an unknown value."""


def disabled() -> bool:
    """True when the environment variable ``DSV4FUSE_DISABLE`` asks that all graphs pass through.

    Read at every call, so that it can be set after the import.
    """
    return _switched_on("DSV4FUSE_DISABLE")


def debugging() -> bool:
    """True when ``DSV4FUSE_DEBUG`` asks that an error inside dsv4fuse be raised, not reported."""
    return _switched_on("DSV4FUSE_DEBUG")


def only() -> tuple[str, ...] | None:
    """The sites that ``DSV4FUSE_ONLY`` leaves on (``fusion`` or ``fusion#number``); None: all."""
    text = os.environ.get("DSV4FUSE_ONLY")
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Options:
    """The options of one use of dsv4fuse. Immutable, hashable, and valid once constructed.

    Names of fusions can only be checked against a registry: use :meth:`parse` for that.
    """

    fusions: tuple[str, ...] | None = None
    """Only these fusions; ``None`` means all."""
    exclude: tuple[str, ...] = ()
    """Never these fusions."""
    numerics: Numerics = "faithful"
    """``faithful`` rounds where the module rounds; ``precise`` keeps fp32 to the last rounding."""
    verify: bool = True
    """Compare every site with the region it replaces, on random inputs, before it is taken."""
    select: Select = "auto"
    """``auto`` follows the data measured on such a GPU, and measures each site on any other;
    ``measure`` times each site on the spot; the others do as they say."""
    expect: Mapping[str, int] | None = field(default=None, hash=False)
    """How many sites of each fusion must be taken; any other count is an error."""
    strict: bool = False
    """A near-miss or a rejected site is an error."""
    autotune: bool = False
    """Try, at each site, all launch shapes of its kernels' tables, and use the fastest."""
    inner: Inner = "inductor"
    """What compiles the rewritten graph; ``eager`` runs it node by node."""

    def __post_init__(self) -> None:
        """Check the values and bring lists, sets and mappings to their immutable or own form."""
        put = object.__setattr__
        if self.fusions is not None:
            put(self, "fusions", _names("fusions", self.fusions))
        put(self, "exclude", _names("exclude", self.exclude))
        for option, valid in CHOICES.items():
            _one_of(f"Option {option!r}", getattr(self, option), valid)
        for option in _FLAGS:
            _flag(option, getattr(self, option))
        if self.expect is not None:
            put(self, "expect", _expectations(self.expect))

    @classmethod
    def parse(
        cls, value: Mapping[str, Any] | Options | None, known_fusions: Iterable[str]
    ) -> Options:
        """Options from a mapping, another ``Options`` or ``None``, with fusion names checked.

        ``known_fusions`` are the names of the registry; every name given must be one of them.
        """
        if value is None:
            return cls()
        if isinstance(value, Options):
            options = value
        elif isinstance(value, Mapping):
            valid = [f.name for f in dataclasses.fields(cls)]
            for name in value:
                if name not in valid:
                    raise OptionError(_unknown_option(name, valid))
            options = cls(**value)
        else:
            raise OptionError(
                f"The options of dsv4fuse must be a mapping or dsv4fuse.Options, "
                f"not {_kind(value)}. {_shape_hint()}"
            )
        options._check_fusions(tuple(known_fusions))
        return options

    def _check_fusions(self, known: tuple[str, ...]) -> None:
        given = {
            "fusions": self.fusions or (),
            "exclude": self.exclude,
            "expect": tuple(self.expect or ()),
        }
        for option, names in given.items():
            for name in names:
                _one_of(f"The fusion {name!r} in option {option!r}", name, known, "fusion")
        for name in self.expect or ():
            if not self.wants(name) and (self.expect or {})[name] > 0:
                raise OptionError(
                    f"Option 'expect' asks for sites of {name!r}, but 'fusions' or 'exclude' "
                    f"switches that fusion off. Change one of them."
                )

    def wants(self, fusion: str) -> bool:
        """True when ``fusion`` is switched on by ``fusions`` and not off by ``exclude``."""
        return fusion not in self.exclude and (self.fusions is None or fusion in self.fusions)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values, in a stable order; ``parse`` reads them back."""
        return {
            "fusions": None if self.fusions is None else list(self.fusions),
            "exclude": list(self.exclude),
            "numerics": self.numerics,
            "verify": self.verify,
            "select": self.select,
            "expect": None if self.expect is None else dict(sorted(self.expect.items())),
            "strict": self.strict,
            "autotune": self.autotune,
            "inner": self.inner,
        }


def _names(option: str, value: object) -> tuple[str, ...]:
    """A sorted or ordered collection of names as a tuple; a bare string is a common slip."""
    if isinstance(value, str):
        raise OptionError(
            f"Option {option!r} must be a list of names, not the string {value!r}. "
            f"Write {option}=[{value!r}]."
        )
    if not isinstance(value, Collection) or isinstance(value, (bytes, Mapping)):
        raise OptionError(f"Option {option!r} must be a list of names, not {_kind(value)}.")
    for name in value:
        if not isinstance(name, str):
            raise OptionError(f"Option {option!r} must hold names, but it holds {_kind(name)}.")
    names = cast("Collection[str]", value)
    # A set has no order of its own: sort it, so that equal options have equal hashes and uuids.
    return tuple(sorted(names) if isinstance(names, (set, frozenset)) else dict.fromkeys(names))


def _flag(option: str, value: object) -> None:
    # 1 and "yes" are refused: bool("false") is True, and nobody means that.
    if not isinstance(value, bool):
        raise OptionError(f"Option {option!r} must be True or False, not {_kind(value)}.")


def _expectations(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise OptionError(
            "Option 'expect' must map names of fusions to counts, such as "
            f"{{'norm_rope': 43}}, not {_kind(value)}."
        )
    for name, count in value.items():
        if not isinstance(name, str):
            raise OptionError(f"Option 'expect' must have names as keys, not {_kind(name)}.")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise OptionError(
                f"Option 'expect' must give a count of 0 or more for {name!r}, not {_kind(count)}."
            )
    return dict(value)


def _one_of(subject: str, value: object, valid: Iterable[str], what: str = "value") -> None:
    valid = tuple(valid)
    if isinstance(value, str) and value in valid:
        return
    if not isinstance(value, str):
        raise OptionError(f"{subject} must be one of {_list(valid)}, not {_kind(value)}.")
    # A subject that quotes the value already reads as a sentence; an option's name does not.
    named = subject if repr(value) in subject else f"{subject} has the value {value!r}, which"
    raise OptionError(f"{named} is unknown.{_closest(value, valid)} {_valid(what, valid)}")


def _unknown_option(name: object, valid: list[str]) -> str:
    close = _closest(name, valid) if isinstance(name, str) else ""
    return (
        f"dsv4fuse has no option {name!r}.{close} {_valid('option', valid)} "
        f"Options of Inductor itself are set through torch._inductor.config, not here."
    )


def _closest(name: str, valid: Iterable[str]) -> str:
    # Compared without case and with one separator: "Norm-Rope" is meant as "norm_rope".
    plain = {v.lower().replace("-", "_"): v for v in valid}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1, cutoff=0.5)
    return f" Did you mean {plain[close[0]]!r}?" if close else ""


def _valid(what: str, valid: Collection[str]) -> str:
    if not valid:
        return f"There is no {what} to name here."
    return f"Valid {what}s are {_list(valid)}."


def _list(names: Iterable[str]) -> str:
    return ", ".join(repr(n) for n in names)


def _kind(value: object) -> str:
    return f"{type(value).__name__} ({value!r:.60})"


def _shape_hint() -> str:
    return 'For example: torch.compile(model, backend="dsv4fuse", options={"strict": True}).'
