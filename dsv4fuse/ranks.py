"""What the ranks of a distributed job agree on, so that all take the same sites.

Tensors that every rank computes for itself (the router's choice, the residual streams) must be
equal to the bit, so a site whose kernel was timed must be taken by all ranks or by none. A
collective would make each rank wait for the others to compile the same graph, and hang where one
has another graph or finds its own in a warm cache. So the first rank to decide writes its answer
into the store of the process group, and the others read it there: nobody waits.
"""

from __future__ import annotations

import functools
import json
import logging
from typing import TypeVar

import torch.distributed as dist

log = logging.getLogger("dsv4fuse")
Answer = TypeVar("Answer")


def several() -> bool:
    """Is this one of several ranks?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agreed(key: str, answer: Answer) -> Answer:
    """The job's answer to ``key``: this rank's, unless another one was first.

    An answer is made of JSON values. Where the store cannot be asked, this rank's own, with a
    warning.
    """
    if not several():
        return answer
    try:
        store = dist.distributed_c10d._get_default_store()
        first: bytes = store.compare_set(f"dsv4fuse/{key}", "", json.dumps(answer))
        return json.loads(first)
    except Exception as error:  # whatever a store raises: its server may be gone
        _warn(f"the ranks could not agree, this one decides for itself: {error!r}")
        return answer


@functools.cache
def _warn(sentence: str) -> None:
    """Once for all sites."""
    log.warning(sentence)


def known(key: str) -> bool:
    """Has a rank answered ``key``? False too where the store cannot be asked."""
    if not several():
        return False
    try:
        return bool(dist.distributed_c10d._get_default_store().check([f"dsv4fuse/{key}"]))
    except Exception:
        return False
