"""The benchmark's bookkeeping: what is measured, written, read back, drawn and refused.

The times themselves are a GPU's; one test there runs it as people do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from typer.testing import CliRunner

from dsv4fuse.__main__ import app
from dsv4fuse.bench import fusions as bench
from dsv4fuse.bench import fusions_table, workers
from dsv4fuse.fusion import Example, registry
from dsv4fuse.report import FusionError

MADE_ON = {"gpu": "a GPU", "capability": [9, 0], "torch": "2", "triton": "3", "date": "today"}
NAMES = [n for n, f in registry().items() if f.examples]


def row(fusion="f", variant="v", tokens=1, **more):
    return bench.Row(fusion, variant, "flash", tokens, **{
        "inductor": 4.0, "ours": 2.0, "floor": 1.0, "agrees": True, **more})  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "300"})


@pytest.fixture
def machine(monkeypatch):
    """A GPU that is not there: each site takes 4 and 2 µs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fusions_table, "environment", lambda: MADE_ON)
    calls = []

    def measure(fusion, variant, model, tokens):
        calls.append((fusion, variant, model, tokens))
        if tokens == 13:
            raise FusionError("Expected 1 site.\nand more")
        return row(fusion, variant, tokens, agrees=tokens != 17)

    monkeypatch.setattr(bench, "measure", measure)
    return calls


def test_every_variant_of_every_fusion(machine):
    result = run("--tokens", "1,64", "--model", "pro")
    assert result.exit_code == 0, result.output
    variants = [(n, v) for n in NAMES for v in registry()[n].examples]
    assert machine == [(n, v, "pro", t) for n, v in variants for t in (1, 64)]
    assert "host_sync" not in result.output and "ratio" in result.output


def test_a_folder_keeps_what_was_not_measured_again(tmp_path):
    """Rows of another day have its date; those of another GPU or version go."""

    def saved(counts, **made_on):
        made = MADE_ON | made_on
        bench.save([row("moe_router", "hash", t, date="") for t in counts], tmp_path, made)
        rows, _ = bench.load(tmp_path / "moe_router.json")
        return [(r.tokens, r.date) for r in rows]

    assert saved([1, 64]) == [(1, ""), (64, "")]
    assert saved([4, 64], date="tomorrow") == [(1, "today"), (4, ""), (64, "")]
    assert saved([64], date="later") == [(1, "today"), (4, "tomorrow"), (64, "")]
    assert saved([64], gpu="another") == [(64, "")]


def test_json_for_a_folder_and_for_a_file(machine, tmp_path):
    name = NAMES[0]
    assert run(name, "--tokens", "1,8", "--json", tmp_path / "into").exit_code == 0
    data = json.loads((tmp_path / "into" / f"{name}.json").read_text())
    assert [r["tokens"] for r in data["rows"]][:2] == [1, 8] and data["capability"] == [9, 0]
    assert {"variant", "inductor", "ours", "floor", "agrees"} <= set(data["rows"][0])
    assert [p.name for p in (tmp_path / "into").iterdir()] == [f"{name}.json"]
    assert run("--tokens", "1", "--json", tmp_path / "all.json").exit_code == 0
    rows, made_on = bench.load(tmp_path / "all.json")
    assert {r.fusion for r in rows} == set(NAMES) and made_on["gpu"] == "a GPU"


def test_measurements_in_the_tree_are_read():
    """Those beside the kernels, whatever columns their version of the benchmark wrote."""
    folder = bench.pathlib.Path(__file__).parents[1] / "kernels"
    files = [f for f in folder.glob("*.json") if f.stem in NAMES]
    assert files
    for file in files:
        rows, made_on = bench.load(file)
        assert rows and {r.fusion for r in rows} == {file.stem} and made_on["gpu"]


def test_what_goes_wrong_is_said_at_the_end(machine):
    result = run(NAMES[0], "--tokens", "1,13,17")
    assert result.exit_code == 1
    assert "at 13 tokens: Expected 1 site." in result.stderr and "and more" not in result.stderr
    assert "at 17 tokens differs from eager" in result.stderr and "WRONG" in result.stdout
    assert len([c for c in machine if c[3] == 17]) == len(registry()[NAMES[0]].examples)


def test_one_variant(machine):
    assert run(f"{NAMES[0]}:quant", "moe_router", "--tokens", "3").exit_code == 0
    assert [c[:2] for c in machine] == [
        (NAMES[0], "quant"), *(("moe_router", v) for v in registry()["moe_router"].examples)
    ]  # fmt: skip


@pytest.mark.parametrize("arguments, says", [
    (["nope"], "There is no 'nope' here, only"),
    (["moe_router:nope"], "There is no 'moe_router:nope'"),
    (["--model", "huge"], "There is no 'huge'"),
    (["--tokens", "1,x"], "positive numbers"), (["--tokens", "0"], "positive numbers"),
    (["--from", "absent.json"], "absent.json"),
    (["--e2e", "--against", "x.json"], "no fusions, --tokens or --against"),
])  # fmt: skip
def test_what_is_refused(machine, arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2 and says in result.stderr and not machine


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    assert result.exit_code == 2 and "There is no GPU here" in result.stderr


def test_a_damaged_file(tmp_path):
    for text in ("[]", '{"gpu": 1}', '{"rows": [{"fusion": "f"}]}', "{"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError):
            bench.load(tmp_path / "x.json")


def test_floor_by_bytes_and_by_operations():
    gpu = "NVIDIA H200"
    assert bench.floor(Example(print, (), 4_260_000), gpu) == pytest.approx(1.0)
    assert bench.floor(Example(print, (), 4_260_000, flops=1978 * 10**6), gpu) == pytest.approx(2.0)
    assert bench.floor(Example(print, (), 1), "another GPU") is None


def test_close():
    x = torch.tensor([[1.0, 100.0]])
    assert bench._close(x, x * (1 + 1e-7), 0.0) and not bench._close(x, x * 1.001, 0.0)
    assert bench._close(x, x * 1.001, 0.002)
    far = torch.tensor([[1.0, -torch.inf]])
    assert bench._close(far, far, 0.0) and not bench._close(far, far * 1.1, 0.0)
    assert bench._close(x.long(), x.long(), 0.0) and not bench._close(x.long(), x.long() + 1, 9.0)


def test_plot_of_what_was_measured(machine, tmp_path):
    assert run("--tokens", "1,64", "--json", tmp_path / "all.json").exit_code == 0
    picture = tmp_path / "times.png"
    result = run("--from", tmp_path / "all.json", "--plot", picture)
    if importlib.util.find_spec("matplotlib") is None:
        assert result.exit_code == 2 and "dsv4fuse[bench]" in result.stderr
    else:
        assert result.exit_code == 0, result.output
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_shown(machine, tmp_path):
    printed = run("moe_router", "--tokens", "1,64", "--json", tmp_path / "all.json").stdout
    assert run("--from", tmp_path / "all.json").stdout == printed and "moe_router" in printed
    assert "moe_router" not in run("--from", tmp_path / "all.json", "--model", "pro").stdout


@pytest.mark.parametrize("to_file", [True, False])
def test_how_far_two_runs_are_apart(tmp_path, to_file):
    """A row that is in one of them only counts in neither."""
    before = [row("moe_router", "hash", 1, ours=2.0), row("moe_router", "hash", 64, ours=3.0),
              row("moe_router", "topk", 64), row("moe_router", "hash", 8, ours=2.0)]  # fmt: skip
    after = [row("moe_router", "hash", 1, ours=2.08), row("moe_router", "hash", 64, ours=2.5),
             row("moe_router", "hash", 4), row("moe_router", "hash", 8, inductor=4.4)]  # fmt: skip
    then, now = tmp_path / "then.json" if to_file else tmp_path, tmp_path / "now.json"
    bench.save(before, then, MADE_ON)
    bench.save(after, now, MADE_ON)
    said = run("--from", now, "--against", then).stdout
    assert "Of 3 rows in both, 2 differ by 5% at most; 4.00% in the middle." in said
    (line,) = (x for x in said.splitlines() if "3.00" in x)
    assert [c.strip() for c in line.split("│")[1:-1]] == [
        "moe_router", "hash", "flash", "64", "3.00", "2.50", "20.0", "0.0"
    ]  # fmt: skip


def test_against_what_is_written_over(machine, tmp_path):
    """The rows as they were; and what cannot be read is said before anything is timed."""
    bench.save([row("moe_router", "hash", 1, ours=4.0)], tmp_path, MADE_ON)
    said = run("moe_router:hash", "--tokens", "1", "--json", tmp_path, "--against", tmp_path).stdout
    assert "Of 1 rows in both, 0 differ by 5% at most; 100.00% in the middle." in said
    machine.clear()
    assert run("--against", tmp_path / "absent.json").exit_code == 2 and not machine


def test_against_nothing(tmp_path):
    bench.save([row("moe_router", "hash", 1)], tmp_path / "now.json", MADE_ON)
    (tmp_path / "empty").mkdir()
    assert "No row is in both." in run("--from", tmp_path / "now.json", "--against",
                                       tmp_path / "empty").stdout  # fmt: skip
    refused = run("--from", tmp_path / "now.json", "--against", tmp_path / "absent.json")
    assert refused.exit_code == 2 and "absent.json" in refused.stderr


@pytest.mark.gpu
def test_one_fusion_on_a_gpu():
    made = bench.measure("moe_router", "topk", "flash", 64)
    assert made.agrees and 0 < made.ours < made.eager and made.ours_cold > 0


def test_workers_compile_all_before_one_is_timed(machine, monkeypatch, tmp_path):
    """Here threads; what a worker could not compile is said where it is measured."""
    done = []

    def compiled(site, ways):
        assert ways == 2 and not machine
        done.append(site)
        return "no such thing" if site[3] == 13 else None

    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda n, **_: ThreadPoolExecutor(n))
    monkeypatch.setattr(workers, "_compile", compiled)
    given = (NAMES[0], "--tokens", "1,13,64", "--workers", 3, "--json", tmp_path / "a.json")
    result = run(*given)
    assert result.exit_code == 1 and result.stderr.count("Expected 1 site.") == 2
    assert sorted(done) == sorted(machine) and len(done) == 6
    assert [r.tokens for r in bench.load(tmp_path / "a.json")[0]] == [1, 64, 1, 64]


AHEAD = """
from torch._dynamo.utils import counters
from dsv4fuse.bench import fusions, workers

if __name__ == "__main__":
    site = "moe_router", "topk", "flash", 64
    workers.compile_all([site], 2, lambda text: None)
    row = fusions.measure(*site)
    assert row.agrees and 0 < row.ours < row.eager, row
    print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.gpu
def test_compiled_ahead_on_a_gpu(checkout, tmp_path):
    """By other processes, into the caches on disk: nothing is left to compile, ours or Inductor's.
    In a process of its own, for the keys of those caches hold all that other tests have set."""
    program = tmp_path / "ahead.py"
    program.write_text(AHEAD)
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["2", "0"], done.stdout + done.stderr


def test_progress_counts_every_row(machine):
    steps, show = [], lambda *step: steps.append(step)
    rows, _ = fusions_table.run([NAMES[0]], ["flash", "pro"], [1, 64], None, show)
    assert len(steps) == len(rows) and {total for _, total in steps} == {len(rows)}
    assert steps[0][0].startswith(f"{NAMES[0]} (") and steps[0][0].endswith("1 tokens")
