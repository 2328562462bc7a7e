"""Several ranks: the local shards are fused, the collectives left alone, the logits the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from dsv4fuse.kernels import _common
from torch import fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv4fuse import backend
from examples.deepseek_v4 import PRESETS, Transformer, randomize
from examples.deepseek_v4.parallel import parallelize

from .test_models import expected, expected_apart

NEAR = 1e-5  # of the largest logit, in fp32: the ranks' parts are summed in another order


@pytest.fixture
def four_ranks(monkeypatch):
    """Rank 1 of four, alone: collectives do nothing."""
    monkeypatch.setattr(_common, "INTERPRETED", False)
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    with torch.no_grad():
        yield dist.device_mesh.init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def collectives(monkeypatch):
    """Counts the collectives in a graph before and after the pass."""
    counts, run = [], backend.FusionPass.__call__

    def count(graph: fx.Graph) -> Counter[str]:
        names = (str(n.target) for n in graph.nodes if n.op == "call_function")
        return Counter(n for n in names if n.startswith("_c10d_functional"))

    def counted(self, graph):
        before = count(graph)
        run(self, graph)
        counts.append((before, count(graph)))

    monkeypatch.setattr(backend.FusionPass, "__call__", counted)
    return counts


def test_the_share_of_one_rank_is_fused_as_the_whole(four_ranks, monkeypatch):
    """As of Flash on four GPUs, this rank has 2 of 8 groups; of 16 heads 4, of 8 experts 2."""
    counts = collectives(monkeypatch)
    config = dataclasses.replace(
        PRESETS["tiny"], layers=("csa",), n_heads=16, o_groups=8, n_mtp_layers=0
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    randomize(model)
    share = parallelize(copy.deepcopy(model), four_ranks)
    attention, experts = share.layers[0].self_attn, share.layers[0].mlp.experts
    assert attention.sinks.tolist() == model.layers[0].self_attn.sinks[4:8].tolist()
    assert torch.equal(experts.down_proj, model.layers[0].mlp.experts.down_proj[2:4])

    share.allocate(2, 64)
    kinds = list(config.layers)
    options = {"select": "always", "inner": "eager", "strict": True}
    options["expect"] = expected(kinds, torch.bfloat16, decode=True)
    decode = torch.compile(share.decode, backend=backend.dsv4fuse, options=options, fullgraph=True)
    decode(torch.tensor([[3], [4]]), torch.tensor([[40], [41]]))
    ((before, after),) = counts
    assert before == after and before["_c10d_functional.all_reduce.default"] == 2 * len(kinds)


def test_what_does_not_divide_is_refused(four_ranks):
    with pytest.raises(ValueError, match="2 groups of heads cannot be split over 4 ranks"):
        parallelize(Transformer(PRESETS["tiny"]), four_ranks)


# Two processes ------------------------------------------------------------------------------------


def two_ranks(checkout, tmp_path, *arguments):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(checkout / "tests" / "_distributed_worker.py"), *map(str, arguments),
    ]  # fmt: skip
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        command, cwd=checkout, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(checkout, tmp_path):
    two_ranks(checkout, tmp_path, "parallel", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    counts = expected(["csa"], torch.float32, decode=True)
    assert not counts["expert_sort"]  # fp32, and no range is shown of what is an expert elsewhere
    counts["known_range"] = 1  # no expert is below the first rank's, none above the last one's
    assert first["taken"] == second["taken"] == {name: n for name, n in counts.items() if n}
    assert max(*first["errors"], *second["errors"]) < NEAR


@pytest.mark.long
@pytest.mark.parametrize("way", ["whole", "blocks", "pipeline"])
def test_fsdp_and_pipeline_stages(checkout, tmp_path, way):
    """All sites of the layers, in a prefill and a decode step; each stage has one layer."""
    two_ranks(checkout, tmp_path, way, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, found in enumerate(ranks):
        errors = found["errors"]
        assert len(errors) == (2 if (way, rank) != ("pipeline", 0) else 0)
        assert max(errors, default=0) < NEAR
        kinds = [("window",), ("csa",)][rank] if way == "pipeline" else ("window", "csa")
        by_hash = kinds.count("window")
        steps = (expected_apart(kinds, torch.float32, step, by_hash) for step in (False, True))
        wanted = sum(map(Counter, steps), Counter())
        if way == "whole" or (way, rank) == ("pipeline", 1):
            wanted["hyper_head"] = 2  # else it was not compiled, or lies on the other rank
        assert found["taken"] == dict(wanted)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["plain", "transformers"])
def test_the_example_on_two_ranks(checkout, tmp_path, model, dtype):
    if model == "transformers":
        pytest.importorskip("transformers.models.deepseek_v4")
    out = tmp_path / "found.json"
    arguments = ("--model", model, "--dtype", dtype, "--no-times", "--json", out)
    two_ranks(checkout, tmp_path, "example", tmp_path, *arguments)
    found = json.loads(out.read_text())
    assert found["taken"][0] == found["taken"][1] and len(found["taken"]) == 2
    assert found["taken"][0]["norm_rope_cache"] >= 8
    assert ("sink_attention" in found["taken"][0]) == (dtype == "bfloat16")
    for step in ("prefill", "decode"):
        e = found["steps"][step]
        assert e["ranks are equal"]
        if dtype == "float32":
            assert e["error"] < NEAR
        elif step == "prefill":  # of the few tokens of a decode step one flipped expert is too much
            assert e["off"][0] <= 1.25 * e["whole off"][0]
