"""The metrics file: what a resumed run finds in it, and spikes. Held-out scores against arithmetic."""

import json
from math import log

import numpy as np
import pytest
import torch

from codistill.metrics import MetricsLog, read_metrics
from codistill.objectives import Batch
from codistill.scores import Score, held_out, unigram_cross_entropy


def hard(value: float) -> dict[str, torch.Tensor]:
    return {"large/hard": torch.tensor(value), "large/grad_norm": torch.tensor(1.0)}


def filled(file, losses) -> MetricsLog:
    log = MetricsLog(file, 0, tokens_per_step=8)
    for step, loss in enumerate(losses, start=1):
        log.write(step, hard(loss))
        log.write_held_out(step, {})
    return log


def test_a_loss_far_above_its_recent_course_is_a_spike(tmp_path):
    log = filled(tmp_path / "metrics.jsonl", [3 - step / 100 for step in range(20)])
    assert "spike: large" in log.write(21, hard(5.0)).note
    assert "spike" not in log.write(22, hard(2.8)).note
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "large/hard" in line]
    assert [line["step"] for line in lines if "spikes" in line] == [21]
    assert lines[-2]["spikes"] == ["large"]


def test_a_loss_that_is_not_finite_spoils_no_later_judgement(tmp_path):
    log = filled(tmp_path / "metrics.jsonl", [3.0, 2.9] * 6)
    log.write(13, hard(float("nan")))
    assert "spike: large" in log.write(14, hard(9.0)).note


def test_what_is_no_number_is_null_in_the_file(tmp_path):
    """JSON knows no NaN, and a failure must not become a number for whoever reads the file."""
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file, 0, 1)
    log.write(1, {"a/hard": torch.tensor(float("nan")), "b/hard": torch.tensor(2.0)})
    log.write_held_out(1, {"a": Score(float("inf"), 0.5, 3)})
    text = file.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_metrics(file)[0]["a/hard"] is None
    assert read_metrics(file)[1]["held_out"]["a"] == {"loss": None, "accuracy": 0.5}
    assert set(MetricsLog(file, 1, 1).recent) == {"b/hard"}


def test_a_resumed_log_judges_like_the_straight_one(tmp_path):
    losses = [3 - step / 100 for step in range(70)]
    straight = filled(tmp_path / "straight.jsonl", losses)
    filled(tmp_path / "resumed.jsonl", [*losses, 1.0, 1.0])
    resumed = MetricsLog(tmp_path / "resumed.jsonl", 70, tokens_per_step=8)
    assert resumed.recent == straight.recent
    assert [line["step"] for line in read_metrics(tmp_path / "resumed.jsonl")][-1] == 70


def test_the_count_of_skipped_steps_goes_on(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, tokens_per_step=8)
    log.write(1, hard(1.0), skipped=3)
    resumed = MetricsLog(tmp_path / "metrics.jsonl", 1, tokens_per_step=8)
    resumed.write(2, hard(1.0), skipped=1)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped"] == 4


def test_steps_that_were_skipped_since_the_last_line_are_not_forgotten(tmp_path):
    """A checkpoint at step 7 knows of a step skipped at 6, though the next line is due at 10."""
    log = filled(tmp_path / "metrics.jsonl", [1.0])
    log.write_skipped(7, 1)
    log.write_skipped(7, 1)
    assert [line["skipped"] for line in read_metrics(log.file) if "skipped" in line] == [1]
    resumed = MetricsLog(log.file, 7, tokens_per_step=8)
    resumed.write(10, hard(1.0), skipped=0)
    assert read_metrics(log.file)[-1]["skipped"] == 1


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1, "large/hard": 1.0}) + "\n" + '{"step": 2, "lar')
    MetricsLog(file, 5, tokens_per_step=8).write(6, hard(1.0))
    assert [line["step"] for line in read_metrics(file)] == [1, 6]


# ---- held-out scores ---------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A predictor whose logits are its inputs."""

    def forward(self, inputs, rows_N):
        return inputs["input_ids"][rows_N]

    def logits(self, features_NV):
        return features_NV


def batch(labels, weights=None, logits=(0.0, 0.0)) -> Batch:
    count = len(labels)
    weight_N = None if weights is None else torch.tensor(weights)
    return Batch({"input_ids": torch.tensor([logits] * count)}, torch.arange(count), torch.tensor(labels), weight_N)


def test_rows_of_weight_0_are_no_guesses():
    """Always ¾ for token 0: it is right about two of the three rows that count, and the two others say nothing."""
    sure = (log(3), 0.0)
    found = held_out(Fixed(), [batch([0, 1, 0, 0], [1.0, 1, 0, 0], sure), batch([0], logits=sure)])
    assert found.rows == 3
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == pytest.approx((2 * log(4 / 3) + log(4)) / 3)


class Noisy(Fixed):
    """In training it says the opposite."""

    def logits(self, features_NV):
        return -features_NV if self.training else features_NV


@pytest.mark.parametrize("training", [True, False])
def test_a_score_is_of_the_model_at_rest_and_leaves_it_as_it_was(training):
    model = Noisy().train(training)
    assert held_out(model, [batch([0], logits=(log(3), 0.0))]).loss == pytest.approx(log(4 / 3))
    assert model.training == training


def test_the_unigram_loss_counts_one_more_of_each_token_and_only_rows_with_weight():
    """Of 3, 1 and 0 times: p = 4/7, 2/7 and 1/7. Each is predicted once: ⅓ ln(7³ / 8) = ln 3.5."""
    batches = [batch([0, 1]), batch([2, 0, 0], [1.0, 0, 0])]
    everything = np.ones(3, dtype=bool)
    assert unigram_cross_entropy(np.array([3, 1, 0]), batches, everything) == pytest.approx(log(3.5))


def test_the_unigram_loss_spends_nothing_on_tokens_that_are_never_asked_for():
    """Token 2 ends a hundred texts and is never masked: p = 4/6 and 2/6, as if it were not there."""
    batches = [batch([0, 1]), batch([2, 0], [0.0, 0.0])]
    found = unigram_cross_entropy(np.array([3, 1, 100]), batches, np.array([True, True, False]))
    assert found == pytest.approx((log(6 / 4) + log(6 / 2)) / 2)
