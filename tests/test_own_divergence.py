"""A divergence of one's own in a whole run: FILE.py:FUNCTION. The oracle is a named one, written again by hand."""

import json
from pathlib import Path

import pytest
import torch

from codistill.divergences import forward_kl
from codistill.errors import UserError
from codistill.own_code import function_of
from codistill.train import Stopped, train
from runs import refused, small_run

BY_HAND = """
def kl(student_NV, teacher_NV, temperature):
    p, t = ((z / temperature).softmax(-1) for z in (student_NV, teacher_NV))
    return temperature**2 * (t * (t.log() - p.log())).sum(-1)
"""


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "mine.py"
    place.write_text(BY_HAND)
    return place


def run_with(text, divergence, *more):
    edges = [
        f"distillation.{n}={{teacher: {t}, student: {s}, temperature: 2, divergence: '{divergence}'}}"
        for n, (t, s) in enumerate((("large", "small"), ("small", "large")))
    ]
    return small_run("ctcd", text, "steps=4", "precision=float32", *edges, *more)


def losses(out):
    return [member["loss"] for member in json.loads((out / "results.json").read_text())["members"].values()]


def test_it_trains_as_the_named_one_that_it_repeats(text, file, tmp_path):
    own = train(run_with(text, f"{file}:kl"), tmp_path / "own")
    named = train(run_with(text, "forward_kl"), tmp_path / "named")
    other = train(run_with(text, "reverse_kl"), tmp_path / "other")
    assert losses(own) == pytest.approx(losses(named), rel=1e-6)
    assert losses(own) != pytest.approx(losses(other), rel=1e-6)
    card = (own / "members" / "small" / "README.md").read_text()
    assert "mine.py:kl" in card
    assert str(tmp_path) not in card


def test_another_function_on_resumption_is_noticed(text, file, tmp_path):
    run = run_with(text, f"{file}:kl")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    file.write_text(BY_HAND + "\n# another\n")
    refused("provenance.divergences: the run was made with .*mine.py:kl", run, tmp_path / "run", resume=True)
    file.write_text(BY_HAND)
    train(run, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        (BY_HAND, "mine.py:cl", "distillation.0.divergence: .*mine.py' has no function 'cl'; wanted FILE.py:FUNCTION"),
        (BY_HAND, "nine.py:kl", "distillation.0.divergence: there is no file '.*nine.py'; wanted FILE.py:FUNCTION"),
        ("x = 1\ny = x / 0\n", "mine.py:kl", "mine.py: ZeroDivisionError in line 2: division by zero"),
    ],
)
def test_what_is_not_there_is_said_before_any_text_is_read(content, spec, message, text, tmp_path):
    (tmp_path / "mine.py").write_text(content)
    run = run_with(tmp_path / "no.txt", f"{tmp_path}/{spec}")
    refused(message, run, tmp_path / "run")


def test_a_misspelled_name_is_refused_when_it_is_read(text):
    with pytest.raises(
        UserError, match=r"distillation.0: divergence 'forward_kk' \(did you mean forward_kl\?\); wanted"
    ):
        run_with(text, "forward_kk")


def test_the_one_in_the_docs_is_a_divergence(tmp_path):
    """0 between equal logits, positive between others; and with all tokens it is forward KL."""
    page = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text()
    listing = page.split("```python\n# mine.py\n")[1].split("```")[0]
    (tmp_path / "documented.py").write_text(listing)
    own = function_of(f"{tmp_path}/documented.py:top_k_kl", "here")
    one, other = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    assert own(one, one, 2.0).abs().max() < 1e-12
    torch.testing.assert_close(own(one, other, 2.0), forward_kl(one, other, 2.0))
