"""`bench_loss`: everybody computes the same loss or says why not, in turns, and the result is data."""

import json

import pytest
import torch

from codistill.bench import bench_loss, measure, providers
from codistill.bench.loss import _error, _exact_gradients
from codistill.errors import UserError

TINY = {"rows": 70, "vocabulary": 50, "width": 8, "runs": 2}


def test_the_result_is_data(tmp_path, capsys):
    chosen = ["bare products", "plain", "plain, all rows", "ours, chunked", "ours, reference", "quack, hard only"]
    result = bench_loss(**TINY, providers=chosen, out=tmp_path / "new" / "loss.json")
    assert json.loads((tmp_path / "new" / "loss.json").read_text()) == result
    rows = {row["provider"]: row for row in result["results"]}
    assert list(rows) == chosen
    assert result["setting"] == TINY | {"dtype": "float32"}
    assert result["machine"]["packages"]["torch"] == torch.__version__
    for name in chosen[:-1]:
        assert len(rows[name]["seconds"]["runs"]) == 2
        assert rows[name]["seconds"]["min"] <= rows[name]["seconds"]["median"] <= rows[name]["seconds"]["max"]
    assert all(rows[name]["error"] < 1e-5 for name in chosen[1:-1])
    assert "seconds" not in rows["quack, hard only"]
    assert "quack" in rows["quack, hard only"]["reason"] or "CUDA" in rows["quack, hard only"]["reason"]
    said = capsys.readouterr()
    assert "not run: quack, hard only" in said.out
    assert "gradients, 4 of 6: ours, chunked\n" in said.err
    assert "memory, 5 of 5: ours, reference\ntiming, turn 1 of 3\n" in said.err


def test_peaks_count_the_gradients(monkeypatch):
    """Each of two equal providers needs its gradients and more, whichever comes second."""
    monkeypatch.setitem(providers.PROVIDERS, "again", providers.Provider(providers.plain))
    size = {"rows": 70, "vocabulary": 20_000, "width": 256, "runs": 1}
    rows = bench_loss(**size, providers=["plain", "again"])["results"]
    for row in rows:
        assert row["peak_bytes"] is None or row["peak_bytes"] > 2 * 20_000 * 256 * 4


def test_a_different_loss_is_not_timed(monkeypatch):
    twice = lambda setting: lambda: 2 * providers.plain(setting)()  # noqa: E731
    monkeypatch.setitem(providers.PROVIDERS, "twice", providers.Provider(twice))
    (row,) = bench_loss(**TINY, providers=["twice"])["results"]
    assert "seconds" not in row
    assert row["reason"] == "RuntimeError: its gradient differs by 1.0e+00"


def test_what_there_is_no_memory_for_keeps_nothing_else_from_being_timed(monkeypatch):
    calls = iter(range(100))

    def peak(step, device):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")
        return 1

    monkeypatch.setattr("codistill.bench.loss.peak_bytes", peak)
    first, second = bench_loss(**TINY, providers=["plain", "ours, chunked"])["results"]
    assert first["reason"].startswith("OutOfMemoryError: CUDA out of memory")
    assert "seconds" not in first
    assert len(second["seconds"]["runs"]) == 2


@pytest.mark.parametrize("hard_only", [False, True])
def test_the_judge_is_autograd_in_float64(hard_only):
    setting = providers.random_setting("cpu", False, 70, 50, 8)
    wide = {
        kind: {m: t.detach().double().requires_grad_() for m, t in getattr(setting, kind).items()}
        for kind in ("hidden", "weight")
    }
    z = {m: torch.nn.functional.linear(wide["hidden"][m], wide["weight"][m]) for m in "ab"}
    loss = sum(torch.nn.functional.cross_entropy(z[m], setting.labels_N) for m in "ab")
    for student, teacher in ("ab", "ba") if not hard_only else ():
        log_p, log_t = z[student].log_softmax(-1), z[teacher].detach().log_softmax(-1)
        loss = loss + torch.nn.functional.kl_div(log_p, log_t, log_target=True, reduction="batchmean")
    loss.backward()
    expected = [tensor.grad for of in wide.values() for tensor in of.values()]
    assert _error(_exact_gradients(setting, hard_only), expected) < 1e-7


def test_turns_are_taken():
    seen = []
    steps = {name: lambda name=name: seen.append(name) for name in "abc"}
    found = measure.interleaved(steps, 3, "cpu")
    assert "".join(seen) == "abcbcacababc"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_long_timings_say_now_and_then_how_far_they_are(monkeypatch, capsys):
    clock = iter((0, 10, 20, 29, 36))
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    measure.interleaved({"a": lambda: None}, 4, "cpu")
    assert capsys.readouterr().err.splitlines() == [f"timing, turn {turn} of 5" for turn in (1, 3, 5)]


def test_peak_memory_is_of_the_step():
    peak = measure.peak_bytes(lambda: torch.ones(12_500_000).sum(), "cpu")
    if peak is None:
        pytest.skip("this system does not tell")
    assert 45e6 < peak < 80e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": ["mine"]}, "providers: 'mine' is unknown; known are 'bare products', 'ours, chunked', "),
        ({"dtype": "float16"}, "dtype: 'float16'; wanted 'float32' or 'bfloat16'"),
        ({"device": "tpu"}, "device: 'tpu' is not here"),
        ({"runs": 0}, "runs 0: at least one is needed"),
        ({"rows": 0}, "rows 0: at least one is needed"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        bench_loss(**TINY | options)
