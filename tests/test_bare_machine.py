"""Machines that lack something, in processes of their own: a sentence, never a crash."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import torch
import torch.nn.functional as F
from dsv4fuse.backend import dsv4fuse as backend
def fn(x, cos, sin):
    h = x.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 0.01)).to(x.dtype)
    r = h[..., -16:].float()
    a, b = r[..., ::2], r[..., 1::2]
    t = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((h[..., :-16], t.to(x.dtype)), dim=-1)
x, cos, sin = torch.randn(5, 48).bfloat16(), torch.randn(5, 8), torch.randn(5, 8)
def run(**options):
    with torch.no_grad():
        out = torch.compile(fn, backend=backend, options=dict(options))(x, cos, sin)
    assert torch.equal(out, fn(x, cos, sin))
"""


def _process(body: str, checkout: pathlib.Path, tmp_path: pathlib.Path, **env: str) -> str:
    unset = {"TRITON_INTERPRET", "TORCHINDUCTOR_CACHE_DIR"}
    clean = {k: v for k, v in os.environ.items() if k not in unset}
    clean |= {"PYTHONPATH": str(checkout), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **env}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)], env=clean, capture_output=True, text=True,
        timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_fresh_process_needs_no_other_import(checkout, tmp_path):
    out = _process(
        PROGRAM + "import dsv4fuse\nrun(select='always', inner='eager')\n"
        "print(dsv4fuse.explain(fn, x, cos, sin, options={'select': 'always'}).counts())",
        checkout,
        tmp_path,
    )
    assert "{'norm_rope_cache': 1}" in out


@pytest.mark.parametrize("select", ["auto", "always"])
def test_without_triton(select, checkout, tmp_path):
    """Nothing is fused, the result is right, and the report says why."""
    hide = """
    import importlib.abc, sys
    class Hide(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError("No module named 'triton'", name="triton")
    sys.meta_path.insert(0, Hide())
    """
    out = _process(
        textwrap.dedent(hide) + PROGRAM + f"run(select='{select}', inner='eager')\n"
        f"import dsv4fuse\n"
        f"print(dsv4fuse.explain(fn, x, cos, sin, options={{'select': '{select}'}}))",
        checkout,
        tmp_path,
    )
    assert "declined" in out or "taken" in out
    assert select == "auto" or "riton" in out or "taken" in out


@pytest.mark.slow
def test_without_a_compiler(checkout, tmp_path):
    out = _process(
        PROGRAM + textwrap.dedent("""
        run(select="always", inner="eager")
        print("eager works")
        torch._dynamo.reset()
        turned = fn
        fn = lambda x, cos, sin: turned(x, cos, sin) * 2 + 1  # something is left to compile
        try:
            run(select="always")
            print("inductor works")
        except Exception as error:
            print("message:", str(error))
        """),
        checkout,
        tmp_path,
        CXX="/nonexistent",
    )
    assert "eager works" in out
    assert "compiler" in out.lower() or "/nonexistent" in out, out
