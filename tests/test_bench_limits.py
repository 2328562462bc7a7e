"""``bench --limits``: what Nsight Compute prints is read, judged, kept and shown.

Its counters are a GPU's; here a script stands in for ``ncu``, and one test asks the real one.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from dsv4fuse import catalog
from dsv4fuse.__main__ import app
from dsv4fuse.bench import counters, fusions, limits, ncu, ncu_steps
from dsv4fuse.bench.steps import Step
from dsv4fuse.fusion import registry

MADE_ON = {"gpu": "a GPU", "capability": [9, 0], "torch": "2", "triton": "3", "date": "today"}
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"

# As ncu 2025 prints it, with fewer metrics: messages, header, units, launches.
PAGE = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "norm_quant_kernel" - 0: 0%....50%....100% - 11 passes
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg","Id:Domain:Start/Stop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","dram__bytes.sum","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","lts__throughput.avg.pct_of_peak_sustained_elapsed","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed","sm__warps_active.avg.pct_of_peak_sustained_active","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"
"","","","","","","","","","","","","","byte","%","ns","%","%","%","inst","inst","inst"
"0","4242","python3.12","127.0.0.1","4242  ""<default domain>:dsv4fuse row 0:none:none:none:none:none:none"" ","","norm_quant_kernel","1","7","(256, 1, 1)","(64, 2, 1)","0","9.0","524,288","3.25","1,856","5.5","n/a","12.4","3","6","1"
"1","4242","python3.12","127.0.0.1","4242  ""<default domain>:dsv4fuse row 1:none:none:none:none:none:none"" ","","norm_quant_kernel","1","7","(256, 1, 1)","(8192, 1, 1)","0","9.0","80,000,000","88.1","21,000","60.2","0","81","0","0","0"
"2","4242","python3.12","127.0.0.1","4242  ""<default domain>:dsv4fuse row 1:none:none:none:none:none:none"" ","","triton_poi_fused_add_0","1","7","(128, 1, 1)","(16, 1, 1)","0","9.0","1,000","1","2,000","1","0","20","0","2","1"
"""  # noqa: E501


def kernel(**more):
    return limits.Kernel("k", 10.0, 64, 128, **more)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "300"})


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU that is not there; and a function that puts a program called ncu on PATH."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for module in (ncu, ncu_steps):
        monkeypatch.setattr(module, "environment", lambda: MADE_ON)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))

    def install(body, folder="bin"):
        """What is called notes its arguments; ``page``, ``metrics``, ``sites`` are at hand."""
        file = tmp_path / folder / "ncu"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(
            f"#!{sys.executable}\nimport json, pathlib, sys\n"
            f"given = sys.argv[1:]\nfile = pathlib.Path(given[given.index('--log-file') + 1])\n"
            "metrics, sites = given[given.index('--metrics') + 1], json.loads(given[-1])\n"
            f"with open({str(tmp_path / 'calls')!r}, 'a') as calls:\n"
            f"    calls.write(json.dumps(given) + '\\n')\n"
            f"page = {PAGE!r}\n{body}\n"
        )
        file.chmod(0o755)
        return lambda: [json.loads(x) for x in (tmp_path / "calls").read_text().splitlines()]

    return install


# Reading -----------------------------------------------------------------------------------------


def test_a_page_is_read():
    found = counters.parsed(PAGE, 132)
    assert {n: [k.name for k in kernels] for n, kernels in found.items()} == {
        0: ["norm_quant_kernel"], 1: ["norm_quant_kernel", "triton_poi_fused_add_0"],
    }  # fmt: skip
    (first,) = found[0]
    assert first.us == pytest.approx(1.856) and first.megabytes == pytest.approx(0.524288)
    assert (first.programs, first.threads) == (128, 256)
    assert (first.dram, first.l2, first.tensor, first.l1) == (3.25, 5.5, None, None)
    assert first.stalls == (("long scoreboard", 60.0), ("barrier", 30.0))
    assert first.limit == (
        "latency (grid of 128 programs on 132 multiprocessors, 12 % occupancy; "
        "waits for long scoreboard)"
    )
    assert found[1][0].limit == "memory" and found[1][0].stalls == ()


@pytest.mark.parametrize("unit, us", [("us", 1856), ("msecond", 1856e3), ("fortnight", math.nan)])
def test_units(unit, us):
    page = PAGE.replace('"ns"', f'"{unit}"')
    assert counters.parsed(page, 132)[0][0].us == pytest.approx(us, nan_ok=True)


@pytest.mark.parametrize("text", ["", "==ERROR== nothing\n", PAGE.replace("dsv4fuse row", "other")])
def test_a_page_without_our_launches(text):
    assert counters.parsed(text, 132) == {}


# The rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, word", [
    ("dram", "memory"), ("l2", "L2"), ("l1", "L1 and shared memory"), ("tensor", "tensor cores"),
    ("issue", "issue of instructions"), ("sm", "arithmetic"),
])  # fmt: skip
def test_the_limit_is_what_is_at_80_percent(name, word):
    assert limits.limit(kernel(**{name: 80.0}), 132) == word
    assert limits.limit(kernel(**{name: 79.9}), 132).startswith("latency (grid of 64 programs on")
    assert limits.limit(kernel(occupancy=99.0, **{name: None}), 132).startswith("latency")


def test_the_limit_is_the_first_of_several():
    assert limits.limit(kernel(sm=99.0, tensor=85.0, l2=81.0), 132) == "L2"
    assert limits.limit(kernel(sm=99.0, tensor=85.0), 132) == "tensor cores"


# What is kept and shown --------------------------------------------------------------------------


def rows(fusion, variant, tokens, date="today"):
    found = counters.parsed(PAGE, 132)
    return [limits.Row(fusion, variant, "flash", tokens, tuple(found[1]), date)]


def test_a_file_keeps_rows_of_such_a_machine(tmp_path):
    file = tmp_path / "new" / "limits.json"
    limits.save(rows("norm_quant", "quant", 1), file, MADE_ON)
    limits.save(rows("norm_quant", "quant", 64), file, MADE_ON)
    limits.save(rows("norm_quant", "quant", 64, "later"), file, MADE_ON | {"date": "later"})
    found, made_on = limits.load(file)
    assert [(r.tokens, r.date) for r in found] == [(1, "today"), (64, "later")]
    assert found[0] == rows("norm_quant", "quant", 1)[0] and made_on["gpu"] == "a GPU"
    limits.save(rows("norm_quant", "quant", 8), file, MADE_ON | {"triton": "4"})
    assert [r.tokens for r in limits.load(file)[0]] == [8]


def test_a_damaged_file(tmp_path):
    for text in ("[]", '{"gpu": 1}', '{"rows": [{"fusion": "f"}]}', "{"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError):
            limits.load(tmp_path / "x.json")


def test_the_table_of_the_page(tmp_path):
    assert catalog.limits_table(tmp_path) == "No profile is kept yet."
    file = tmp_path / "kernels" / "limits.json"
    limits.save(rows("norm_quant", "quant", 64), file, MADE_ON)
    limits.save(rows("norm_quant", "two norms", 1), file, MADE_ON)
    limits.save(rows("norm_quant", "quant", 1), file, MADE_ON)
    limits.save(rows("norm_quant", "quant", 4), file, MADE_ON)  # not shown
    text = catalog.renewed("<!-- limits -->\n<!-- /limits -->\n", tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[1:3] for line in lines] == [
        ["two norms", "1"], ["quant", "1"], ["quant", "64"],
    ]  # fmt: skip
    wanted = "| 64 | `norm_quant_kernel` | 21.00 of 23.00 | memory | 88 | 60 | ? | 0 |  |"
    assert lines[2].endswith(wanted)


# The command -------------------------------------------------------------------------------------


def test_one_process_profiles_several_rows(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(ncu, "AT_ONCE", 2)
    calls = machine("file.write_text(page)")
    file = tmp_path / "limits.json"
    result = run("norm_quant", "moe_router", "--tokens", "64", "--limits", file)
    assert result.exit_code == 0, result.output
    assert "norm_quant_kernel" in result.stdout and "memory" in result.stdout
    found, made_on = limits.load(file)
    assert [(r.fusion, r.variant) for r in found] == [
        (name, v) for name in ("norm_quant", "moe_router") for v in registry()[name].examples
    ]
    assert made_on["multiprocessors"] == 132 and found[0].date == "today"
    assert [json.loads(given[-1])[0][0] for given in calls()] == ["norm_quant", "moe_router"]
    assert calls()[0][-4:-1] == [sys.executable, "-m", "dsv4fuse.bench.ncu"]


@pytest.mark.parametrize("error", ["ncu saw no kernel of it", "Failed to profile"])
def test_rows_that_cannot_run_are_said(machine, tmp_path, error):
    said = f"==ERROR== {error}\n" if "Failed" in error else ""
    machine(f"file.write_text({said!r} + page.replace('row 1', 'row 0'))\n"
            "print('dsv4fuse row 1: Expected 1 site')")  # fmt: skip
    result = run("norm_quant", "--tokens", "64,1024", "--limits", tmp_path / "limits.json")
    assert result.exit_code == 1
    assert "at 1024 tokens: Expected 1 site." in result.stderr
    assert result.stderr.count(f"{error}.") == 2
    assert len(limits.load(tmp_path / "limits.json")[0]) == 1


def test_a_metric_that_ncu_does_not_know_is_left_out(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(ncu, "AT_ONCE", 2)
    calls = machine(
        "if 'gmma' in metrics:\n"
        "    print('==ERROR== Failed to find metric "
        f"{STALLED.format('gmma')}')\n"
        "    sys.exit(1)\n"
        "file.write_text(page)"
    )
    result = run("norm_quant", "moe_router", "--limits", tmp_path / "limits.json", "--tokens", "1")
    assert result.exit_code == 0, result.output
    asked = [given[given.index("--metrics") + 1].split(",") for given in calls()]
    assert [len(counters.METRICS) - len(names) for names in asked] == [0, 1, 1]


@pytest.mark.parametrize("body, says", [
    ("print('==ERROR== ERR_NVGPUCTRPERM - The user does not have permission')\nsys.exit(1)",
     "may not read the counters of this GPU (ERR_NVGPUCTRPERM)"),
    ("file.write_text('==ERROR== LibraryNotLoaded\\n')", "counted nothing: LibraryNotLoaded"),
    ("sys.exit('no such module')", "counted nothing: no such module"),
])  # fmt: skip
def test_where_nothing_can_be_counted(machine, tmp_path, body, says):
    machine(body)
    result = run("norm_quant", "--limits", tmp_path / "limits.json")
    assert result.exit_code == 2 and says in result.stderr
    assert not (tmp_path / "limits.json").exists()


def test_rows_that_break_ncu_later_cost_no_others(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(ncu, "AT_ONCE", 2)
    machine("if sites[0][0] == 'norm_quant':\n    file.write_text(page)")
    result = run("norm_quant", "moe_router", "--tokens", 1, "--limits", tmp_path / "limits.json")
    assert result.exit_code == 1 and result.stderr.count("counted nothing") == 2
    assert {r.fusion for r in limits.load(tmp_path / "limits.json")[0]} == {"norm_quant"}


def test_ncu_is_found_in_the_toolkit(machine, tmp_path, monkeypatch):
    machine("", "cuda/bin")
    assert ncu.find() == str(tmp_path / "cuda" / "bin" / "ncu")
    machine("")
    assert ncu.find() == str(tmp_path / "bin" / "ncu")


@pytest.mark.skipif(os.path.exists("/usr/local/cuda/bin/ncu"), reason="there is one")
def test_without_ncu(machine, tmp_path):
    result = run("norm_quant", "--limits", tmp_path / "limits.json")
    assert result.exit_code == 2
    assert "no ncu (Nsight Compute) on PATH, in $CUDA_HOME/bin or in /usr/local" in result.stderr


@pytest.mark.parametrize("more, says", [
    (["--limits", "folder"], "--limits takes a FILE.json"),
    (["--limits", "x.json", "--json", "y"], "no --json, --plot, --from or --against"),
    (["--limits", "x.json", "--from", "y.json"], "no --json, --plot, --from or --against"),
    (["--limits", "x.json", "--e2e", "--json", "y"], "and no --regional, --ways, --json"),
    (["--limits", "x.json", "nope"], "There is no 'nope' here"),
])  # fmt: skip
def test_what_is_refused(machine, more, says):
    result = run(*more)
    assert result.exit_code == 2 and says in result.stderr


def test_a_file_of_something_else_is_refused_first(machine, tmp_path):
    machine("")
    (tmp_path / "limits.json").write_text('{"rows": [1]}')
    result = run("norm_quant", "--limits", tmp_path / "limits.json")
    assert result.exit_code == 2 and "holds no profile" in result.stderr
    assert not (tmp_path / "calls").exists()


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--limits", "x.json")
    assert result.exit_code == 2 and "There is no GPU here" in result.stderr


# A step of a whole model -------------------------------------------------------------------------


def test_launches_alike_are_joined():
    alike = [limits.Kernel("a", us, 64, 128) for us in (10.0, 30.0, 20.0)]
    found = limits.joined([limits.Kernel("b", 50.0, 1, 1), *alike])
    assert [(k.name, k.us, k.launches, k.total) for k in found] == [
        ("a", 30.0, 3, 60.0), ("b", 50.0, 1, 50.0),
    ]  # fmt: skip


def test_a_step_is_profiled(machine, tmp_path):
    """Ours and what multiplies; Inductor's pointwise kernels bear the names of products too."""
    other = PAGE.replace("row 0", "row 9").replace("row 1", "row 0")
    calls = machine(f"file.write_text({other.replace('fused_add_0', 'fused_bmm_0')!r})")
    file = tmp_path / "limits.json"
    result = run("--e2e", "--model", "hf", "--prefill", "--layers", 4, "--limits", file)
    assert result.exit_code == 0, result.output
    assert "prefill of hf (size flash, layers 4, experts 32" in result.stdout
    (row,), _ = limits.load(file)
    assert (row.fusion, row.variant, row.tokens) == ("hf", "prefill", 2048)
    (kernel,) = row.kernels
    assert (kernel.name, kernel.limit, kernel.launches) == ("norm_quant_kernel", "memory", 1)
    (given,) = calls()
    step, options = json.loads(given[-1])
    assert given[-3:-1] == ["-m", "dsv4fuse.bench.ncu_steps"] and options == {}
    assert step["given"] | {"layers": 4, "decode": False, "device": "cuda"} == step["given"]
    (only,) = (g for g in given if g.startswith("regex:"))
    assert {"nvjet", "norm_quant_kernel"} <= set(only.removeprefix("regex:").split("|"))


def test_the_table_of_steps(tmp_path):
    """The launches with the most time, in percent of that of all that were profiled."""
    assert catalog.step_limits_table(tmp_path) == "No profile is kept yet."
    many = [limits.Kernel(f"k{i}", 2.0**i, 1, 1, limit="memory", dram=88.0) for i in range(12)]
    own = limits.joined([*many, limits.Kernel("k11", 1.0, 1, 1)])
    row = limits.Row("hf", "decode", "size flash", 4, tuple(own), "today")
    limits.save([row], tmp_path / "examples" / "results" / "hf_limits.json", MADE_ON)
    lines = catalog.step_limits_table(tmp_path).splitlines()
    assert len(lines) == 2 + 10
    assert lines[2].startswith("| decode of hf | `k11` | 2 | 50 | 2048.00 | memory | 88 |")


def test_a_step_that_cannot_run_is_said(machine, tmp_path):
    machine("print('dsv4fuse row 0: out of memory')")
    file = tmp_path / "limits.json"
    result = run("--e2e", "--model", "plain", "--decode", "--limits", file)
    assert result.exit_code == 1 and "plain decode: out of memory." in result.stderr
    assert not file.exists()


@pytest.mark.parametrize("more, says", [
    (["--limits", "x"], "takes a FILE.json"),
    (["--limits", "x.json", "--regional"], "no --regional"),
    (["--limits", "x.json", "--options", "{"], "is not JSON"),
    (["--limits", "x.json", "--options", '{"nope": 1}'], "nope"),
    (["--limits", "x.json", "--model", "no_such:thing"], "no_such"),
])  # fmt: skip
def test_what_a_step_is_refused(machine, more, says):
    machine("")
    result = run("--e2e", *more)
    assert result.exit_code == 2 and says in result.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_the_child_shows_the_profiler_one_step(monkeypatch, capsys, fails):
    seen = []

    def model(x):
        seen.append(x)
        return x

    def build(factory, **given):
        assert (factory, given) == ("examples.models:hf", {"size": "tiny"})
        if fails:
            raise RuntimeError("no room")
        return model, (1,), {}

    monkeypatch.setattr(ncu_steps, "build", build)
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "profile", nullcontext)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: nullcontext(seen.append(name)))
    ncu_steps.child(Step("hf", "prefill", {"size": "tiny"}), {})
    assert seen == ([] if fails else [1, 1, 1, "dsv4fuse row 0", 1])
    assert capsys.readouterr().out == "dsv4fuse row 0: no room\n" * fails


# The process that is profiled --------------------------------------------------------------------


def test_the_child_shows_the_profiler_one_call_of_each_row(monkeypatch, capsys):
    """On a CPU: three calls before the range, one inside, the next row after one that fails."""
    seen = []

    @contextmanager
    def within(name):
        seen.append(name)
        yield
        seen.append("end")

    def example(*site):
        if site[3] == 13:
            raise RuntimeError("no room.\nand more")
        return SimpleNamespace(inputs=(site[3],))

    monkeypatch.setattr(fusions, "example", example)
    monkeypatch.setattr(fusions, "both_ways", lambda name, made: (seen.append, None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "profile", nullcontext)
    monkeypatch.setattr(torch.cuda.nvtx, "range", within)
    ncu.child([("f", "v", "flash", 13), ("f", "v", "flash", 64)])
    assert seen == [64, 64, 64, "dsv4fuse row 1", 64, "end"]
    assert capsys.readouterr().out == "dsv4fuse row 0: no room\n"


@pytest.mark.gpu
def test_one_row_on_a_gpu(tmp_path):
    """Every metric that is asked for is one that this ncu has."""
    file = tmp_path / "limits.json"
    try:
        assert ncu.run(["norm_quant"], ["flash"], [8192], file) == []
    except ncu.NcuError as error:
        pytest.skip(str(error))
    for row in limits.load(file)[0]:
        assert row.longest.name == "norm_quant_kernel" and row.longest.us > 0
        assert all(value is not None for value in vars(row.longest).values()), row
        assert len(row.longest.stalls) == 2
