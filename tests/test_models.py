"""Whole models: how many sites are taken in each layer, and that nothing changes by it.

What is compared with: the model under torch's own ``aot_eager_decomp_partition``, which runs the
graph that the pass is given, node by node, without any of dsv4fuse. It differs from eager by
Inductor's decompositions alone (softmax, softplus, silu), as plain torch.compile does.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import pathlib
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from dsv4fuse.kernels import _common
from torch._inductor.utils import run_and_get_code
from transformers.integrations import moe

from dsv4fuse import Report, backend
from examples.deepseek_v4 import PRESETS, Transformer, randomize
from examples.deepseek_v4.generate import pad

from .test_plain_model import CSA, HCA, SIZES, YARN, caches, error, random_prompts

OURS = {"sliding_attention": "window", CSA: "csa", HCA: "hca"}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
# Of the largest logit. fp32: silu as exp and division against F.silu; the largest seen is 2e-6.
# bf16: Inductor's fp32 softmax may turn a rounding to bf16; with that alone 0.012 is seen.
NEAR = {torch.bfloat16: 0.03, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """Fused ops run their references: the interpreter takes minutes for a model."""
    monkeypatch.setattr(_common, "INTERPRETED", False)
    with torch.no_grad():
        yield


def expected(kinds, dtype, decode=False, by_hash=1):
    """Sites of each fusion in layers of these kinds, so many of which route by token id."""
    n, csa, wide = len(kinds), kinds.count("csa"), dtype == torch.float32
    # The chosen entries of a decode step of our plain model lie where its gather finds them.
    sparse = csa if decode else 0
    return {
        "norm_rope_cache": n + csa,  # q and kv are one site, the indexer's q another
        "compress_kv": 2 * csa + kinds.count("hca"),
        "indexer_logits": csa,
        "unsorted_topk": csa - sparse,  # a mask of them does not say in which order they came
        "sink_attention": 0 if wide else n - sparse,  # the kernel multiplies bf16
        "sparse_sink_attention": 0 if wide else sparse,
        "inv_rope_grouped_bmm": 0 if wide else n,  # sums kept in fp32 may not change their order
        "inv_rope_quant": n if wide else 0,
        "hyper_connection_pre": 1,  # in front of the first sublayer; behind the last one
        "hyper_connection_post": 1,
        "hyper_connection_post_pre_norm": 2 * n - 1,
        "hyper_head": 1,
        "moe_router": n,
        # Our plain model asks for the ends in bf16 only; a router's choice shows the range as well.
        "expert_sort": n - by_hash * wide,
        "expert_mm": 0 if wide else 2 * n,  # torch compiles a grouped product of bf16 only
        "clamp_swiglu_quant": 2 * n,  # routed experts, shared expert
    }


def expected_apart(kinds, dtype, decode=False, by_hash=1):
    """Sites in layers that are a graph each: nothing is fused across two of them, no head."""
    hashed = (int(i < by_hash) for i in range(len(kinds)))
    each = (expected([k], dtype, decode, h) for k, h in zip(kinds, hashed, strict=True))
    counts = sum(map(Counter, each), Counter())
    return {name: n for name, n in counts.items() if n and name != "hyper_head"}


def fused(fn, kinds, dtype, decode=False, more=None, dynamic=None, **options):
    counts = expected(kinds, dtype, decode) | (more or {})
    counts |= {name: options.pop(name) for name in list(options) if name in counts}
    options = {"select": "always", "inner": "eager", "strict": True} | options
    options["expect"] = counts
    compiled = dict(options=options, fullgraph=True, dynamic=dynamic)
    return torch.compile(fn, backend=backend.dsv4fuse, **compiled)


def unfused(fn):
    return torch.compile(fn, backend="aot_eager_decomp_partition", fullgraph=True)


def same(found, wanted, dtype):
    """bf16 to the bit; in fp32 there is no rounding left that would hide the last bit of silu."""
    if dtype == torch.bfloat16:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    else:
        assert error(found, wanted) < NEAR[dtype]


def few_turned(found, wanted, dtype):
    """In bf16 a sum in another order (the mixes of hyper-connections, attention) turns a last bit
    here and there: in 1 % of the values, by no more than two steps at a row's largest."""
    if dtype != torch.bfloat16:
        return same(found, wanted, dtype)
    off, largest = (found - wanted).abs().float(), wanted.abs().float().amax(-1, keepdim=True)
    assert (off > 0).float().mean() <= 0.01
    assert (off <= 2 * torch.finfo(dtype).eps * largest).all()


def as_near(found, eager, true):
    """Attention sums in another order, and a bf16 that flips may choose another expert or entry: no
    equal bits, but no further from the fp32 model than eager is."""
    off, own = ((x.float() - true).abs() for x in (found, eager))
    for share in (0.5, 0.9):
        assert off.quantile(share) <= 1.1 * own.quantile(share)


# transformers ------------------------------------------------------------------------------------


def transformers_model(dtype, loaded_from=None, **changes):
    """A small model with random weights in ``dtype``; by way of a folder it keeps in fp32 what
    transformers keeps when it loads a model, such as the weights of the norms."""
    hf = pytest.importorskip("transformers.models.deepseek_v4")
    sizes = SIZES | dict(
        num_hidden_layers=3,
        layer_types=["sliding_attention", CSA, HCA],
        mlp_layer_types=["hash_moe", "moe", "moe"],
    )
    config = hf.DeepseekV4Config(**sizes | changes, rope_parameters=YARN)
    model = hf.DeepseekV4ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.state_dict().items():
        if name.endswith("tid2eid"):
            weight.random_(SIZES["n_routed_experts"], generator=generator)
        elif weight.dim() == 1:  # norms, sinks, biases, hyper-connections
            weight.normal_(float("norm" in name), 0.3, generator=generator)
        elif "position_bias" in name:
            weight.normal_(0.0, 1.0, generator=generator)
        else:
            weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5, generator=generator)
    if loaded_from is None:
        model.to(dtype)
    else:
        model.save_pretrained(loaded_from)
        model = hf.DeepseekV4ForCausalLM.from_pretrained(loaded_from, dtype=dtype)
    # "eager" loops over the experts that were hit, a graph break; grouped_mm is one graph.
    model.config._experts_implementation = "grouped_mm"
    return model.eval()


@pytest.mark.parametrize("made", ["bf16", "fp32", "bf16-loaded"])
def test_transformers_prefill(made, tmp_path):
    dtype = torch.float32 if made == "fp32" else torch.bfloat16
    model = transformers_model(dtype, tmp_path if made == "bf16-loaded" else None)
    tokens = torch.randint(97, (2, 37), generator=torch.Generator().manual_seed(1))
    try:
        eager = model(tokens, use_cache=False).logits
    except RuntimeError as failure:  # 5.17 mixes fp32 norms into bf16 without a cast
        if made != "bf16-loaded" or "same dtype" not in str(failure):
            raise
        return  # not a model that runs, with or without dsv4fuse
    wanted = unfused(model)(tokens, use_cache=False).logits
    kinds = [OURS[kind] for kind in model.config.layer_types]
    # Experts that are elsewhere, where a router chose by top-k; a hash router's are of any range.
    # transformers 5.24 masks them only where experts are split.
    always = "sentinel_mask = None" not in inspect.getsource(moe)
    more = {"known_range": model.config.mlp_layer_types.count("moe") * always}
    more["expert_sort"] = len(kinds)
    found = fused(model, kinds, dtype, more=more)(tokens, use_cache=False).logits
    report = Report.of(model)
    if dtype == torch.bfloat16:
        as_near(found, eager, copy.deepcopy(model).float()(tokens, use_cache=False).logits)
        torch._dynamo.reset()
        rest = dict(exclude=["sink_attention"], sink_attention=0, inv_rope_grouped_bmm=len(kinds))
        found = fused(model, kinds, dtype, **rest)(tokens, use_cache=False).logits
    same(found, wanted, dtype)
    assert error(found.float(), eager.float()) < NEAR[dtype]
    assert report.graphs == 1 and not report.breaks
    places = ("modeling_deepseek_v4.py", "integrations/moe.py")
    assert all(any(p in site.where for p in places) for site in report.sites)


@pytest.mark.slow
def test_transformers_of_another_version(checkout):
    """The test above, and decode on the static cache, under a second transformers, where there is
    one (the Makefile makes it)."""
    other = os.environ.get("DSV4FUSE_TRANSFORMERS_ALT")
    if not other:
        pytest.skip("DSV4FUSE_TRANSFORMERS_ALT names no folder with another transformers")
    other = pathlib.Path(checkout, other).resolve()
    assert (other / "transformers").is_dir(), f"no transformers in {other}"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "DSV4FUSE_"))}
    env["PYTHONPATH"] = str(other)
    found = "import transformers; print(transformers.__file__)"
    run = dict(cwd=checkout, env=env, capture_output=True, text=True, timeout=600)
    where = subprocess.run([sys.executable, "-c", found], **run).stdout.strip()
    assert pathlib.Path(where).is_relative_to(other), where
    names = "test_transformers_prefill or test_generate_is_one_graph or test_a_plain_decode_loop"
    only = ("tests/test_models.py", "tests/test_hf_generate.py", "-k", names)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *only]
    done = subprocess.run(command, **run)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    assert "5 passed" in done.stdout, done.stdout


# The plain model of examples/deepseek_v4 ---------------------------------------------------------

LENGTHS, STEPS = (3, 13, 37), 20


def plain_models(dtype, n, **changes):
    """``n`` models with equal weights and caches of their own."""
    plain = dict(norm_eps=1e-2, swiglu_limit=1.0, n_mtp_layers=0)
    config = dataclasses.replace(PRESETS["tiny"], **plain, **changes)
    made = []
    torch.set_default_dtype(dtype)
    try:
        for _ in range(n):
            made.append(Transformer(config))
            randomize(made[-1])
    finally:
        torch.set_default_dtype(torch.float32)
    return made


def roll(prefill, decode):
    """The logits of prefill and STEPS decode steps; the tokens fed are fixed."""
    generator = torch.Generator().manual_seed(2)
    tokens, positions = pad(random_prompts(LENGTHS), "cpu")
    logits = [prefill(tokens, positions)]
    for step in range(STEPS):
        token = torch.randint(97, (len(LENGTHS), 1), generator=generator)
        logits.append(decode(token, torch.tensor(LENGTHS).unsqueeze(1) + step)[:, 0])
    return torch.stack(logits)


@DTYPES
def test_plain_model_prefill_and_decode(dtype):
    ours, bare, eager = plain_models(dtype, 3, layers=("window", "csa", "hca"))
    for model in (ours, bare, eager):
        model.allocate(len(LENGTHS), max(LENGTHS) + STEPS)
    kinds = ours.config.layers
    found = roll(fused(ours.prefill, kinds, dtype), fused(ours.decode, kinds, dtype, True))
    wanted = roll(unfused(bare.prefill), unfused(bare.decode))
    few_turned(found, wanted, dtype)
    assert error(found.float(), roll(eager.prefill, eager.decode).float()) < NEAR[dtype]
    counts = Counter(expected(kinds, dtype)) + Counter(expected(kinds, dtype, decode=True))
    assert Report.of(ours).counts() == dict(counts)

    left = caches(bare)
    assert len(left) == 3 + 2 * 3 + 3  # windows; csa's and the indexer's compressor, hca's
    for name, cache in caches(ours).items():
        # The spare last row takes what must not be kept, in any order.
        assert left[name].any(), f"{name} was never written"
        few_turned(cache[:, :-1], left[name][:, :-1], dtype)


@pytest.mark.slow
def test_inductor_writes_the_caches_in_place():
    (model,) = plain_models(torch.float32, 1, layers=("window", "hca"), window=29)
    model.allocate(2, 16 * 211)
    rows = {b.shape[1] for n, b in caches(model).items() if n.endswith("entries")}
    assert rows == {212}, "a number that nothing else in the model has"
    token, position = torch.tensor([[5], [6]]), torch.tensor([[15], [47]])
    before = {n: b.clone() for n, b in caches(model).items()}
    eager = model.decode(token, position)
    kept = {n: b.clone() for n, b in caches(model).items()}
    for name, cache in caches(model).items():
        cache.copy_(before[name])
    kinds = model.config.layers
    decode = fused(model.decode, kinds, torch.float32, True, inner="inductor")
    found, code = run_and_get_code(decode, token, position)
    assert error(found, eager) < NEAR[torch.float32]
    for name, cache in caches(model).items():
        same(cache[:, :-1], kept[name][:, :-1], torch.float32)
    (source,) = code
    assert "dsv4fuse" in source
    made = [eval(shape) for shape in re.findall(r"empty_strided\w*\((\([\d, ]+\)),", source)]
    shapes = {tuple(cache.shape) for cache in caches(model).values()}
    copied = [shape for shape in made if shape in shapes or 212 in shape]
    assert made and not copied, f"a cache was copied: {copied}"
