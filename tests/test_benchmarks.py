"""Timing itself is no test; how times become ratios is."""

import pytest

from krause_repro.benchmarks import BENCHMARKS, compare, format_rows, interleave, training_step
from krause_repro.recipes import get_recipe


def test_every_contender_runs_once_a_round_and_the_order_rotates():
    calls = []
    seconds = interleave({name: lambda n=name: calls.append(n) for name in "abc"}, rounds=3, warmup=1)
    assert [len(times) for times in seconds.values()] == [3, 3, 3]
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]


def test_ratios_are_taken_within_a_round():
    rows = compare({"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 2.0]}, "fast")
    assert rows[0]["ratio"] == pytest.approx(2.0) and rows[0]["ratio_quartiles"] == pytest.approx([2.0, 2.5])
    assert rows[0]["seconds"] == pytest.approx(4.0) and rows[1]["ratio"] == 1.0


def test_a_training_step_trains():
    import torch

    recipe = get_recipe("kvit_t/fashion_mnist").at("smoke")
    step = training_step(recipe, 2)
    parameters = {id(p): p.detach().clone() for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)
                  for p in cell.cell_contents.parameters()}
    step()
    model = next(c.cell_contents for c in step.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    assert any(not torch.equal(parameters[id(p)], p) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_table_names_case_contender_and_ratio():
    rows = [{"case": "c", **row} for row in compare({"a": [2.0], "b": [1.0]}, "b")]
    assert "c" in format_rows(rows) and "2.00" in format_rows(rows).splitlines()[1]


def test_benchmarks_are_callables_by_name():
    assert set(BENCHMARKS) >= {"training-step", "dynamics"} and all(callable(make) for make in BENCHMARKS.values())
