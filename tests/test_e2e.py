"""``bench --e2e``: whole models measured in several ways, kept, shown again, drawn and refused."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

from dsv4fuse.__main__ import app
from dsv4fuse.bench import launches, machine, runs
from dsv4fuse.bench import models as e2e
from dsv4fuse.bench import models_table as e2e_table
from dsv4fuse.bench.runs import Profile, Run
from dsv4fuse.fusion import registry

FACTORIES = """
import torch
import torch.nn.functional as F

def swiglu(gate_up):
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (F.silu(gate) * up).to(gate_up.dtype)

class Two(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table = torch.nn.Embedding(16, 2 * width, dtype=torch.bfloat16)
    def forward(self, tokens):
        return swiglu(self.table(tokens))

made = []
def small(layers=1, device="cpu"):
    made.append((layers, torch.initial_seed()))
    return Two(64 * layers).to(device), (torch.arange(6, device=device).view(2, 3) % 16,)

def large():
    model, args = small()
    def step(tokens):
        if not torch.compiler.is_compiling():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB.\\nand more")
        return model(tokens)
    return step, args

def larger():
    raise torch.OutOfMemoryError("no room for the weights")

def counting():
    model, args = small()
    state = {"calls": 0}
    def step(tokens):
        state["calls"] += 1
        return model(tokens) * (1.0 if state["calls"] < 3 else 2.0)
    return step, args

def strange():
    return small()[0], (torch.arange(6).view(2, 3).float(),)
"""


@pytest.fixture(autouse=True)
def _references(monkeypatch, tmp_path):
    """Fused ops run their references; caches of this test alone."""
    from dsv4fuse.kernels import _common

    monkeypatch.setattr(_common, "INTERPRETED", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of factories, as a user writes one."""
    name = f"models_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def measured(*arguments, file):
    result = bench("--e2e", *arguments, "--json", file)
    assert result.exit_code == 0, result.output
    found, made_on = runs.load(file)
    assert made_on == machine.environment() | {"date": made_on["date"]}
    return found, result.stdout


def cells(output, row):
    """The cells of a row of the last table that has it."""
    line = [x for x in output.splitlines() if x.startswith(f"│ {row} ")][-1]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


# Real models -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model, step", [("plain", "decode"), ("hf", "prefill")])
def test_a_tiny_model(model, step, tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "kept.json"
    (run,), printed = measured("--model", model, f"--{step}", "--layers", 1, file=file)
    eager, fused = run.profiles
    assert (eager.name, fused.name, run.step) == ("eager", "dsv4fuse", step)
    assert run.sizes == {"size": "tiny", "layers": 1, "experts": 8, "batch": 2, "length": 48}
    assert run.tokens == (2 if step == "decode" else 96)
    assert {"norm_rope_cache", "moe_router", "sink_attention"} <= set(run.taken)
    assert {s["status"] for s in run.sites} == {"taken"}
    assert len(run.sites) == sum(run.taken.values()) == fused.families["dsv4fuse"][0]
    assert "dsv4fuse" not in eager.families and 2 * fused.launches < eager.launches
    assert fused.against == "eager" and 0 <= fused.median <= fused.error < 0.02
    assert fused.same > 0.9
    assert 0 < fused.pass_s < fused.compile_s and fused.compilations == 1
    assert eager.compilations == 0 and min(eager.ms, fused.ms) > 0
    assert fused.peak is fused.graph_ms is None  # there is no GPU
    assert bench("--e2e", "--from", file).stdout == printed
    assert cells(printed, "sites taken") == ["–", str(len(run.sites))]
    assert "says nothing" not in printed and "say nothing about its speed" in printed


@pytest.mark.long
@pytest.mark.parametrize("model", ["plain", "hf"])
def test_prefill_and_decode_of_all_layers(model, tmp_path):
    pytest.importorskip("transformers")
    found, _ = measured("--model", model, file=tmp_path / "kept.json")
    assert [run.step for run in found] == ["prefill", "decode"]
    for run in found:
        assert {"compress_kv", "indexer_logits"} <= set(run.taken)
        assert {site["status"] for site in run.sites} == {"taken"}
        # A bf16 that turns chooses another expert or entry: see test_models.as_near.
        assert run.of("dsv4fuse").median < 0.01 and run.of("dsv4fuse").same > 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["plain", "hf"])
def test_a_step_on_a_gpu(model, tmp_path):
    given = ("--size", "tiny", "--layers", 2, "--experts", 8, "--batch", 16, "--length", 48)
    options = ("--options", '{"select": "always"}')
    (run,), printed = measured("--model", model, "--decode", *given, *options,
                               file=tmp_path / "kept.json")  # fmt: skip
    eager, inductor, fused = run.profiles
    assert not any(p.failed for p in run.profiles)
    assert 0 < fused.launches < inductor.launches < eager.launches
    assert "dsv4fuse" not in inductor.families and fused.families["dsv4fuse"][0] > 0
    assert 0 < fused.graph_ms < fused.ms and fused.peak > 0
    # As above: a row in which a bf16 turned may be far off, of Inductor's too (0.11 was seen).
    for way in (inductor, fused):
        assert way.median < 0.01 and way.same > 0.8, (way.name, way.median, way.same, way.error)
    assert cells(printed, "launches") == [str(p.launches) for p in run.profiles]


# A model of the user's ---------------------------------------------------------------------------


def test_a_factory_is_asked_for_what_it_takes(own, tmp_path):
    arguments = ("--model", f"{own}:small", "--layers", 2)
    (run,), printed = measured(*arguments, file=tmp_path / "kept.json")
    assert run.sizes == {"layers": 2} and run.step == "" and run.tokens == 6
    assert run.taken == {"clamp_swiglu_quant": 1} and run.of("dsv4fuse").error < 0.01
    assert sys.modules[own].made == [(2, 0), (2, 0)]  # one for each way, from the same seed
    assert f"a call of {own}:small (layers 2)" in printed
    refused = bench("--e2e", *arguments, "--decode")
    assert refused.exit_code == 2
    assert "does not take 'decode', only: layers, device." in refused.stderr


def test_what_cannot_run_is_a_cell(own, tmp_path):
    (run,), printed = measured("--model", f"{own}:large", file=tmp_path / "kept.json")
    assert run.of("eager") == Profile("eager", failed="out of memory")
    assert run.of("dsv4fuse").ms > 0 and run.of("dsv4fuse").error is None
    assert cells(printed, "ms")[0] == "out of memory" and run.taken == {"clamp_swiglu_quant": 1}


def test_no_memory_for_the_weights(own):
    result = bench("--e2e", "--model", f"{own}:larger")
    assert result.exit_code == 1 and "dsv4fuse could not run everything" in result.stderr
    assert cells(result.stdout, "ms") == ["out of memory while the model was made"] * 2


def test_an_expectation_that_is_missed_is_a_cell(own):
    result = bench("--e2e", "--model", f"{own}:small", "--options", '{"expect": {"moe_router": 1}}')
    assert result.exit_code == 1
    assert cells(result.stdout, "ms")[1].startswith("Expected 1 site of 'moe_router'")


def test_every_compilation_counts(own, tmp_path):
    (run,), _ = measured("--model", f"{own}:counting", file=tmp_path / "kept.json")
    assert run.of("eager").compilations == 0 and run.of("dsv4fuse").compilations > 1
    assert run.taken["clamp_swiglu_quant"] == run.of("dsv4fuse").compilations


@pytest.mark.long
def test_layer_by_layer(tmp_path):
    """Of one kind two layers share a graph; embedding, head and norm stay as they are."""
    file = tmp_path / "kept.json"
    sizes = ("--layers", 3, "--experts", 4, "--length", 12)
    (run,), printed = measured("--model", "plain", "--decode", *sizes, "--regional", file=file)
    eager, fused = run.profiles
    assert run.regional and run.title.endswith(", layer by layer")
    assert 0 < run.taken["norm_rope_cache"] and "hyper_head" not in run.taken
    assert fused.launches < eager.launches and fused.error < 0.02
    assert bench("--e2e", "--from", file).stdout == printed


@pytest.mark.long
def test_against_inductor_alone(own, tmp_path):
    arguments = ("--model", f"{own}:small", "--ways", "inductor,dsv4fuse")
    (run,), _ = measured(*arguments, file=tmp_path / "kept.json")
    assert [p.name for p in run.profiles] == ["inductor", "dsv4fuse"]
    assert run.options == {"select": "always"} and run.of("dsv4fuse").against == "inductor"


@pytest.mark.parametrize("arguments, says", [
    (["--e2e", "moe_router"], "takes no fusions, --tokens"),
    (["--e2e", "--tokens", "1"], "takes no fusions, --tokens"),
    (["--layers", "2", "--ways", "eager"], "Only --e2e knows --layers, --ways."),
    (["--regional"], "Only --e2e knows --regional."),
    (["--e2e", "--ways", "eager,fast"], "not fast"),
    (["--e2e", "--model", "no.such:model"], "There is no module 'no'"),
    (["--e2e", "--model", "plain", "--options", '{"selct": 1}'], "Did you mean 'select'?"),
    (["--e2e", "--model", "plain", "--options", "{"], "is not JSON"),
    (["--e2e", "--model", "hf", "--size", "pro"], "tiny and flash, not pro"),
    (["--e2e", "--from", "absent.json"], "absent.json"),
])  # fmt: skip
def test_what_is_refused(arguments, says):
    result = bench(*arguments)
    assert result.exit_code == 2 and says in result.stderr


def test_no_layers_to_compile(own):
    result = bench("--e2e", "--model", f"{own}:small", "--regional")
    assert result.exit_code == 2 and "the layers of a ModuleList" in result.stderr


def test_an_input_that_the_model_cannot_take(own):
    result = bench("--e2e", "--model", f"{own}:strange")
    assert result.exit_code == 1 and "Expected tensor for argument" in result.stdout


# The figures -------------------------------------------------------------------------------------


def test_whose_a_kernel_is():
    """Names as the profiler shows them, whatever operations or endings are in them."""
    names = {
        "moe_router_kernel": "dsv4fuse", "grouped_kernel_0": "dsv4fuse",
        "dsv4fuse::clamp_swiglu": "dsv4fuse",
        "triton_poi_fused_bmm_copy_3": "Inductor", "triton_red_fused_mean_topk_0": "Inductor",
        "triton_tem_fused_mm_12": "matrix products", "nvjet_tst_128x64": "matrix products",
        "void cutlass::Kernel2<cutlass_80_tensorop>": "matrix products",
        "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>": "other ATen",
        "void at::native::reduce_kernel<512, 1>": "other ATen",
        "void at::native::sbtopk::gatherTopK<float>": "sort and top-k",
        "Memset (Device)": "copies and fills", "some_kernel": "other",
    }  # fmt: skip
    assert {name: launches.family(name) for name in names} == names


def test_every_op_of_ours_has_a_kernel_by_name():
    assert {"clamp_swiglu_kernel", "norm_rope_kernel", "compress_kernel"} <= launches.kernel_names()


def test_operations_inside_others_do_not_count():
    x = torch.ones(4, 4)
    found = launches.launched(lambda: torch.nn.functional.linear(x, x) + 1, on_gpu=False)
    assert {name: n for name, (n, _) in found.items()} == {"aten::linear": 1, "aten::add": 1}
    assert set(launches.families(found)) == {"matrix products", "other ATen"}


def test_compared():
    def compared(*tensors):
        return tuple(e2e.compared(*tensors).get(k) for k in ("error", "median", "same"))

    x = torch.tensor([[1.0, 8.0], [4.0, 2.0]])
    assert compared([x], [x]) == (0.0, 0.0, 1.0)
    assert compared([x + torch.tensor([0.0, 4.0])], [x]) == (0.5, 0.0, 0.5)
    assert compared([x + 4.0], [x]) == (0.5, 0.5, 1.0)
    assert compared([torch.ones(3)], [torch.ones(3)]) == (0.0, 0.0, None)
    assert compared([torch.zeros(2, 2)], [torch.zeros(2, 2)]) == (0.0, 0.0, 1.0)
    for wrong in ([x * math.nan, x], [x, x * math.nan]):  # wherever it stands
        assert all(map(math.isnan, compared(wrong, [x, x])[:2]))
    for shapes in (([x], [x[:1]]), ([x], []), ([], [])):
        assert all(map(math.isnan, compared(*shapes)[:2]))


def site(ours, inductor=10.0, status="taken", fusion="f"):
    return {"fusion": fusion, "status": status, "module": "", "inductor": inductor, "ours": ours,
            "measured": "here"}  # fmt: skip


def test_no_site_slower_than_inductor_can_be_read_off():
    sites = (site(5.0), site(5.0), site(10.2), site(30.0, status="declined"))
    run = Run("m", "", {}, {}, (), sites=(*sites, {"fusion": "g", "status": "taken"}))
    assert e2e_table.site_rows(run) == [
        ("f", "1", "declined", "10.00", "30.00", "3.00", "here"),
        ("f", "1", "taken", "10.00", "10.20", "1.02", "here"),
        ("f", "2", "taken", "10.00", "5.00", "0.50", "here"),
    ]
    assert e2e_table.verdict(run) == (
        "Of 4 sites taken, 0 are slower than Inductor's code by more than 2 %; "
        "the largest ratio is 1.02. 1 were not timed."
    )

    def verdict(*sites):
        return e2e_table.verdict(Run("m", "", {}, {}, (), sites=sites))

    assert "1 are slower" in verdict(site(10.3))
    assert verdict(site(30.0, status="declined")) == "No site was taken."
    assert verdict({"fusion": "g", "status": "taken"}) == "None of the 1 sites taken was timed."


def test_times_of_sites_come_from_the_report(own, monkeypatch, tmp_path):
    """``select="measure"`` with the stopwatch replaced: both times end in the second table."""
    answers = iter([10.0, 2.5])
    monkeypatch.setattr("dsv4fuse.measure._time", lambda fn, inputs: next(answers))
    given = ("--model", f"{own}:small", "--options", '{"select": "measure"}')
    (run,), printed = measured(*given, file=tmp_path / "kept.json")
    assert [(s["inductor"], s["ours"]) for s in run.sites] == [(10.0, 2.5)]
    assert cells(printed, "clamp_swiglu_quant") == ["1", "taken", "10.00", "2.50", "0.25", "here"]
    assert "Of 1 sites taken, 0 are slower" in printed


def test_tokens_per_second_and_figures_in_the_table():
    fused = Profile("dsv4fuse", ms=4.0, graph_ms=2.0, peak=3 * 10**9, families={"f": (7, 1.5)})
    failed = Profile("eager", failed="out of memory")
    run = Run("m", "decode", {}, {}, (failed, fused), tokens=4, taken={"a": 2})
    rows = {row[0]: row[1:] for row in e2e_table.rows(run, on_gpu=True)}
    assert rows["ms"] == ("out of memory", "4.000") and rows["tokens/s"] == ("–", "2000")
    assert rows["launches"] == ("–", "7") and rows["  f"] == ("–", "7 in 1.500 ms")
    assert rows["peak memory, GB"] == ("–", "3.00") and rows["  a"] == ("–", "2")
    assert "largest difference" not in rows and "compiling, s" not in rows


# What is kept ------------------------------------------------------------------------------------


def test_committed_runs_are_read(checkout):
    files = sorted((checkout / "examples" / "results").glob("*_flash_*.json"))
    assert len(files) == 2
    for file in files:
        (run,), made_on = runs.load(file)
        assert made_on["gpu"] == "NVIDIA H200" and made_on["date"]
        assert [p.name for p in run.profiles] == ["eager", "inductor", "dsv4fuse"]
        assert all(p.ms > p.graph_ms > 0 and p.error < 0.5 for p in run.profiles[1:])
        assert set(run.taken) <= set(registry())
        shown = bench("--e2e", "--from", file).stdout
        assert f"{run.of('dsv4fuse').graph_ms:.3f}" in shown and "say nothing" not in shown


def test_a_damaged_file(tmp_path):
    file = tmp_path / "x.json"
    for text in ("[]", "{", '{"runs": [1]}', '{"runs": [{"model": "m"}]}', '{"rows": []}',
                 '{"runs": [{"model": "m", "step": "", "sizes": {}, "options": {}, '
                 '"profiles": [{"name": "eager", "families": {"f": 1}}]}]}'):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError):
            runs.load(file)
        assert bench("--e2e", "--from", file).exit_code == 2


def test_nothing_measured_is_not_written(tmp_path):
    file = tmp_path / "x.json"
    runs.save([Run("m", "", {}, {}, (Profile("eager", ms=0.5),))], {"gpu": None}, file)
    assert json.loads(file.read_text())["runs"][0]["profiles"] == [{"name": "eager", "ms": 0.5}]


def test_a_picture_of_what_is_kept(checkout, tmp_path):
    file = checkout / "examples" / "results" / "hf_flash_prefill_2048.json"
    picture = tmp_path / "launches.svg"
    result = bench("--e2e", "--from", file, "--plot", picture)
    if importlib.util.find_spec("matplotlib") is None:
        assert result.exit_code == 2 and "dsv4fuse[bench]" in result.stderr
    else:
        assert result.exit_code == 0, result.output
        (run,), _ = runs.load(file)
        drawn = picture.read_text()
        assert all(str(run.of(way).launches) in drawn for way in ("inductor", "dsv4fuse"))
