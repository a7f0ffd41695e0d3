"""How the mutual step grows, as benchmarks/scaling/run.py measures it: one axis at a time, toy sizes here."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from codistill import plan as planning

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling" / "run.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their own names
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def toy(scaling):
    return scaling.Point(layers=2, width=64, vocabulary=3000, sequences=4, length=64)


def row_of(scaling, point):
    return scaling.measure(point, CPU, runs=1, rate=1e9)


def test_flops_grow_with_rows_vocabulary_and_members_as_the_products_do(scaling, toy):
    base, more_rows, more_words, more_members = (
        row_of(scaling, point)
        for point in (toy, replace(toy, share=0.6), replace(toy, vocabulary=6000), replace(toy, members=3))
    )
    rows = round(0.3 * 64) * 4
    assert base["rows"] == rows
    assert more_rows["rows"] == 2 * rows
    three_passes_of_two, multiply_add = 3 * 2, 2
    a_row = toy.width * (toy.vocabulary + toy.width)  # the output embedding, and the transform before it
    assert more_rows["flops"] - base["flops"] == three_passes_of_two * multiply_add * rows * a_row
    assert more_words["flops"] - base["flops"] == three_passes_of_two * multiply_add * rows * toy.width * 3000
    assert 2 * more_members["flops"] == 3 * base["flops"]
    assert 2 * more_members["parameters"] == 3 * base["parameters"]


@pytest.mark.parametrize(
    "change",
    [{}, {"members": 1}, {"members": 4}, {"share": 0.1}, {"share": 1.0}, {"vocabulary": 2**16}, {"width": 192}],
    ids=str,
)
def test_the_plan_is_within_15_percent_of_what_tensors_then_take(scaling, toy, change):
    row = row_of(scaling, replace(toy, **change))
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.15)
    states_and_parameters = 3 * 4 * row["parameters"]
    assert row["measured_bytes"] > states_and_parameters
    assert set(row["phases"]) == {"forward", "loss", "backward", "update"}
    assert row["tokens_per_second"] * row["seconds"]["median"] == pytest.approx(4 * 64)
    assert row["utilisation"] * row["seconds"]["median"] == pytest.approx(row["flops"] / 1e9)


def test_everybody_teaches_everybody(scaling, toy):
    edges = {(e.teacher, e.student) for e in scaling.run_of(replace(toy, members=4)).distillation}
    assert len(edges) == 4 * 3
    assert all(teacher != student for teacher, student in edges)


def test_what_does_not_fit_is_a_row_with_its_reason_and_no_number(scaling, toy, monkeypatch):
    monkeypatch.setattr(planning, "_free_bytes", lambda device: 1000)
    row = row_of(scaling, toy)
    assert row["reason"].startswith("needs 0.0 GiB, and")
    assert not {"seconds", "measured_bytes", "utilisation"} & set(row)


def test_what_runs_out_of_memory_is_a_row_with_its_reason(scaling, toy, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …")

    monkeypatch.setattr(scaling, "peak_of_tensors", no_memory)
    assert row_of(scaling, toy)["reason"].startswith("out of memory: [enforce fail")
    monkeypatch.setattr(scaling, "peak_of_tensors", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        row_of(scaling, toy)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_axis_varies_what_it_says_around_the_base(scaling, device):
    varied = {"size": {"layers", "width"}, "members": {"members"}, "rows": {"share"}, "vocabulary": {"vocabulary"}}
    base = asdict(scaling.BASES[device])
    for axis, fields in varied.items():
        points = [asdict(point) for point in scaling.points_of(axis, device)]
        assert base in points
        assert {key for point in points for key in point if point[key] != base[key]} == fields


def test_axes_can_be_measured_one_at_a_time_into_one_file_and_drawn(scaling, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "product_rate", lambda *_: 1e9)
    monkeypatch.setitem(scaling.RUNS, "cpu", 1)
    points = {"members": [toy, replace(toy, members=3)], "rows": [toy, replace(toy, share=0.5)]}
    monkeypatch.setattr(scaling, "points_of", lambda axis, _: points[axis])
    out, figure = tmp_path / "results" / "cpu.json", tmp_path / "figure.png"
    scaling.main(["--axes", "members", "--out", str(out)])
    scaling.main(["--axes", "rows", "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found["axes"]) == ["members", "rows"]
    assert [point["members"] for point in found["axes"]["members"]["points"]] == [2, 3]
    pytest.importorskip("matplotlib")
    scaling.main(["--axes", "--out", str(out), "--figure", str(figure)])
    assert json.loads(out.read_text()) == found
    assert figure.read_bytes().startswith(b"\x89PNG")
    drawn = scaling.figure_of(found)
    assert [axes.get_xlabel() for axes in drawn.axes] == ["members, all teaching all", "predicted rows"]
    by_flops, measured = drawn.axes[0].lines[:2]
    assert by_flops.get_ydata()[1] / by_flops.get_ydata()[0] == pytest.approx(1.5)
    medians = [point["seconds"]["median"] for point in found["axes"]["members"]["points"]]
    assert list(measured.get_ydata()) == medians


def test_axes_of_two_machines_are_not_put_into_one_file(scaling, tmp_path, monkeypatch):
    out = tmp_path / "cpu.json"
    out.write_text(json.dumps({"machine": {"device": "another"}, "axes": {}}))
    monkeypatch.setattr(scaling, "survey", None)  # nothing is measured that could not be kept
    with pytest.raises(SystemExit, match="was measured on another machine"):
        scaling.main(["--axes", "size", "--out", str(out)])
    out.write_text("{")
    with pytest.raises(SystemExit, match="is no result of this benchmark"):
        scaling.main(["--axes", "size", "--out", str(out)])


def test_nothing_to_draw_is_one_line(scaling, tmp_path):
    with pytest.raises(SystemExit, match="there is nothing to show"):
        scaling.main(["--axes", "--figure", str(tmp_path / "figure.png")])
