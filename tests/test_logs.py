"""dsv4fuse in torch's logs: TORCH_LOGS and TORCH_TRACE, progress of the long commands."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import dsv4fuse
from dsv4fuse import backend

PROGRAM = """
import torch, torch.nn.functional as F
from dsv4fuse.backend import dsv4fuse
def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
options = {"select": "always", "inner": "eager"}
with torch.no_grad():
    torch.compile(swiglu, backend=dsv4fuse, options=options)(torch.randn(4, 64))
"""


def ran(checkout, **env):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_", "TRITON_"))}
    env = {**keep, "PYTHONPATH": str(checkout), **env}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_every_site_is_logged_and_traced(checkout, tmp_path):
    """From a checkout too, where a walk over all modules of the package once had no end."""
    text = ran(checkout, TORCH_LOGS="+dsv4fuse", TORCH_TRACE=str(tmp_path))
    assert "dsv4fuse: 1 of 1 sites fused in 1 graph" in text
    assert "taken clamp_swiglu_quant at" in text
    (trace,) = tmp_path.glob("*.log")
    lines = trace.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"dsv4fuse_report"' in line)
    payload = lines[at + 1].strip()
    assert dsv4fuse.Report.from_json(payload).counts() == {"clamp_swiglu_quant": 1}
    assert json.loads(lines[at].partition("{")[1] + lines[at].partition("{")[2])


def test_no_package_of_a_checkout_holds_itself():
    import pkgutil

    names = {m.name for m in pkgutil.iter_modules(dsv4fuse.__path__)}
    assert "backend" in names and not {"dsv4fuse", "examples", "tests"} & names


def near(x):
    gate, up = x.float().chunk(2, dim=-1)
    return (gate / (2 + torch.exp(-gate)) * up).to(x.dtype)


def test_only_what_is_to_be_looked_at_is_a_warning(caplog):
    both = lambda x, y: (near(x), F.silu(y[:, :32]) * y[:, 32:])  # noqa: E731
    x, y = torch.randn(2, 4, 64).bfloat16()
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "dsv4fuse"):
        options = {"select": "always", "inner": "eager"}
        torch.compile(both, backend=backend.dsv4fuse, options=options)(x, y)
    levels = {r.levelname: r.getMessage() for r in caplog.records if r.name == "dsv4fuse"}
    assert levels["INFO"].startswith("dsv4fuse: 1 of 2 sites")
    assert levels["DEBUG"].startswith("taken") and levels["WARNING"].startswith("near-miss")


def test_explain_does_not_warn_of_what_it_returns(caplog):
    with caplog.at_level(logging.DEBUG, "dsv4fuse"):
        report = dsv4fuse.explain(near, torch.randn(4, 64).bfloat16())
    assert report.with_status("near-miss")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
