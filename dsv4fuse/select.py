"""Take a site or leave it to Inductor: never slower is a promise."""

from __future__ import annotations

import torch

from dsv4fuse.fusion import Candidate
from dsv4fuse.options import Options


def decline(candidate: Candidate, options: Options) -> str | None:
    """None to take the site, else the sentence why not."""
    if options.select == "always":
        return None
    if options.select == "never":
        return "select='never' leaves every site to Inductor."
    devices = {
        n.meta["val"].device.type
        for n in candidate.inputs
        if isinstance(n.meta["val"], torch.Tensor)
    }
    if devices != {"cuda"}:
        return "There is no GPU here: on a CPU the fused op is its plain PyTorch reference."
    return None
