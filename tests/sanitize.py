"""Every fused op and every sequence of the registry, once each, at odd sizes, on a GPU.

``make sanitize`` runs this under compute-sanitizer: reads and writes out of bounds, shared memory
that races, values used before they were written. It asserts nothing itself. ``python -m
tests.sanitize ops`` leaves the sequences out, in which torch's own kernels run as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from dsv4fuse import backend, ops
from dsv4fuse.fusion import Sizes, registry

from . import _calls

LENGTHS = (1, 3, 129)
# No multiples of a program's rows; lanes as in the models, which kernels are compiled for.
SIZES = Sizes(heads=6, groups=2, inter=768, experts=96, window=24)


def calls(
    device: str, lengths: Sequence[int] = LENGTHS, sequences: bool = True
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each op and of each variant of each fusion, at each number of tokens."""
    for length in lengths:
        for name, (args, kwargs) in _calls.calls(device, length).items():
            yield f"{name} of {length}", lambda n=name, a=args, k=kwargs: getattr(ops, n)(*a, **k)
        for fusion in registry().values() if sequences else ():
            for variant, example in fusion.examples.items():
                made = example(length, SIZES, device)
                options = {"select": "always", "inner": "eager", "verify": False}
                fused = torch.compile(
                    made.fn, backend=backend.dsv4fuse, options=options, dynamic=False
                )
                yield f"{fusion.name}, {variant} of {length}", lambda f=fused, m=made: f(*m.inputs)


def main(
    device: str = "cuda", lengths: Sequence[int] = LENGTHS, sequences: bool = True
) -> list[str]:
    """Makes the calls one by one, each finished before the next; their names."""
    done = []
    with torch.no_grad():
        for name, call in calls(device, lengths, sequences):
            torch._dynamo.reset()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            done.append(name)
    return done


if __name__ == "__main__":
    print(f"{len(main(sequences=sys.argv[1:] != ['ops']))} calls")
