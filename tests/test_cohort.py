"""The contract of one training step (docs/concepts.md): who learns, from what, and with which bits."""

import itertools

import pytest
import torch
from torch.nn import functional
from torch.optim import SGD, AdamW

from codistill.cohort import Cohort, Distillation, Member
from codistill.distributed import Ranks
from codistill.objectives import Batch
from codistill.schedules import build, constant
from cohorts import Looks, assert_same_bits, batch, member, parameters, predictor, run

FAMILIES = ["modernbert", "llama", "gpt2"]
BOTH_WAYS = [Distillation("large", "small"), Distillation("small", "large")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_members_bits_do_not_depend_on_whether_it_teaches(family):
    silent = run(Cohort([member("large", 2, family=family), member("small", family=family)]))
    teaching = run(
        Cohort([member("large", 2, family=family), member("small", family=family)], [Distillation("large", "small")])
    )
    assert_same_bits(parameters(silent, "large"), parameters(teaching, "large"))
    with pytest.raises(AssertionError):
        assert_same_bits(parameters(silent, "small"), parameters(teaching, "small"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_member_without_edges_does_not_notice_its_company(family):
    alone = run(Cohort([member("lone", 2, family=family)]))
    company = [
        member("small", family=family),
        member("lone", 2, family=family),
        member("large", 3, family=family),
        member("guest", family=family, trained=False),
    ]
    among = run(Cohort(company, [*BOTH_WAYS, Distillation("guest", "large"), Distillation("lone", "small")]))
    assert_same_bits(parameters(alone, "lone"), parameters(among, "lone"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_repeats_its_original_bit_for_bit(family):
    alone = run(Cohort([member("large", 2, family=family)]))
    beside = run(
        Cohort(
            [
                member("large", 2, family=family),
                member("small", family=family),
                member("twin", 2, family=family, noise_key="large"),
            ],
            BOTH_WAYS,
        )
    )
    assert_same_bits(parameters(alone, "large"), parameters(beside, "twin"))


def test_an_edge_of_weight_zero_changes_no_bit():
    without = run(Cohort([member("large", 2), member("small")]))
    edge = Distillation("large", "small", weight=constant(0.0))
    assert_same_bits(
        parameters(without, "small"),
        parameters(run(Cohort([member("large", 2), member("small")], [edge])), "small"),
    )


def test_a_frozen_teacher_is_run_only_while_an_edge_of_it_weighs_something():
    teacher, student = member("teacher", trained=False), member("student")
    calls = []
    teacher.predictor.register_forward_hook(lambda *_: calls.append(1))
    before = [p.clone() for p in teacher.parameters]
    edge = Distillation("teacher", "student", weight=build({"step": {0: 1.0, 3: 0.0}}, 6))
    run(Cohort([teacher, student], [edge]), range(6), micro_batches=1)
    assert len(calls) == 3
    assert_same_bits(before, teacher.parameters)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters)


def sgd(name: str, layers: int = 1) -> Member:
    """Plain gradient descent, because Adam's first steps turn rounding of tiny gradients into whole updates."""
    built = predictor(name, layers, dropout=0.0)
    return Member(name, built, SGD(built.parameters(), lr=0.0, fused=True), lr=constant(0.1), clip=1e9)


def union(batches: list[Batch]) -> Batch:
    ids = torch.cat([b.inputs["input_ids"] for b in batches])
    starts = torch.tensor([0, *(b.inputs["input_ids"].numel() for b in batches[:-1])]).cumsum(0)
    rows = torch.cat([b.rows_N + start for b, start in zip(batches, starts, strict=True)])
    return Batch({"input_ids": ids}, rows, torch.cat([b.labels_N for b in batches]))


def test_micro_batches_equal_one_batch_of_their_union():
    parts = [batch(1, rows=20), batch(2, sequences=2, rows=3), batch(3, rows=11)]
    split, whole = (Cohort([sgd("large", 2), sgd("small")], BOTH_WAYS) for _ in range(2))
    split_metrics = split.step(0, parts)
    whole_metrics = whole.step(0, [union(parts)])
    assert split_metrics.keys() == whole_metrics.keys()
    for key, value in whole_metrics.items():
        torch.testing.assert_close(split_metrics[key], value, rtol=1e-5, atol=1e-6)
    for name in ("large", "small"):
        for a, b in zip(parameters(split, name), parameters(whole, name), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_rows_of_weight_zero_do_not_count():
    full = batch(1, rows=12)
    padded = Batch(
        full.inputs,
        torch.cat([full.rows_N, torch.zeros(3, dtype=torch.int64)]),
        torch.cat([full.labels_N, torch.zeros(3, dtype=torch.int64)]),
        torch.cat([torch.ones(12), torch.zeros(3)]),
    )
    one, other = (Cohort([sgd("large", 2), sgd("small")], BOTH_WAYS) for _ in range(2))
    one.step(0, [full])
    other.step(0, [padded])
    for a, b in zip(parameters(one, "large"), parameters(other, "large"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_batch_without_predicted_rows_trains_nothing_and_breaks_nothing():
    cohort = Cohort([sgd("large"), sgd("small")], BOTH_WAYS)
    before = parameters(cohort, "large")
    metrics = cohort.step(0, [batch(1, rows=0)])
    assert metrics["large/hard"] == 0
    assert metrics["large/from_small"] == 0
    assert_same_bits(before, parameters(cohort, "large"))
    assert cohort.failure() is None


def hand_written_step(models, optimizers, batches, weights, temperature):
    """Two plain Hugging Face models, all positions, torch's own losses: shares nothing with the package."""
    rows = sum(len(b.labels_N) for b in batches)
    losses = {}
    for b in batches:
        logits = {n: m(**b.inputs).logits.flatten(0, 1)[b.rows_N] for n, m in models.items()}
        total = 0
        for name, other in (("large", "small"), ("small", "large")):
            hard = functional.cross_entropy(logits[name], b.labels_N, reduction="sum") / rows
            soft = functional.kl_div(
                torch.log_softmax(logits[name] / temperature, -1),
                torch.softmax(logits[other].detach() / temperature, -1),
                reduction="sum",
            )
            soft = temperature**2 * soft / rows
            losses[name] = losses.get(name, 0) + hard.item()
            losses[name, other] = losses.get((name, other), 0) + soft.item()
            total = total + hard + weights[name] * soft
        total.backward()
    for name, model in models.items():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        optimizers[name].step()
        optimizers[name].zero_grad()
    return losses


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_step_agrees_with_a_hand_written_loop_in_float64(family):
    torch.set_default_dtype(torch.float64)
    try:
        built = {n: predictor(n, layers, family=family, dropout=0.0) for n, layers in (("large", 2), ("small", 1))}
        plain = {
            n: predictor(n, layers, family=family, dropout=0.0).model for n, layers in (("large", 2), ("small", 1))
        }
        optimizers = {n: AdamW(m.parameters(), lr=1e-3, weight_decay=0.1) for n, m in plain.items()}
        weights = {"large": 0.5, "small": 2.0}
        cohort = Cohort(
            [
                Member(n, p, AdamW(p.parameters(), lr=0.0, weight_decay=0.1, fused=True), lr=constant(1e-3), clip=0.7)
                for n, p in built.items()
            ],
            [
                Distillation("small", "large", weight=constant(0.5), temperature=2.0),
                Distillation("large", "small", weight=constant(2.0), temperature=2.0),
            ],
        )
        for step in range(3):
            batches = [batch(10 * step), batch(10 * step + 1, rows=7)]
            metrics = cohort.step(step, batches)
            losses = hand_written_step(plain, optimizers, batches, weights, temperature=2.0)
            for name, other in (("large", "small"), ("small", "large")):
                assert metrics[f"{name}/hard"].item() == pytest.approx(losses[name], rel=1e-6)
                assert metrics[f"{name}/from_{other}"].item() == pytest.approx(losses[name, other], rel=1e-6)
        for name, model in plain.items():
            for a, b in zip(cohort.members[name].parameters, model.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_step_that_is_not_finite_changes_no_parameter_and_is_named():
    cohort = run(Cohort([member("large", 2), member("small")], BOTH_WAYS), range(2))
    with torch.no_grad():
        cohort.members["small"].predictor.output_bias[0] = float("nan")
    before = parameters(cohort, "large"), parameters(cohort, "small")
    cohort.step(2, [batch(5)])
    cohort.step(3, [batch(6)])
    assert_same_bits(before[0], parameters(cohort, "large"))
    torch.testing.assert_close(before[1], parameters(cohort, "small"), rtol=0, atol=0, equal_nan=True)
    assert cohort.failure() == (2, ["small"])
    assert "step 2: the loss or gradient of small was not finite" in str(cohort.failure())


@pytest.mark.parametrize("new_optimizer", [AdamW, SGD, torch.optim.Adagrad])
def test_any_optimizer_is_kept_from_updates_that_are_not_finite(new_optimizer):
    built = predictor("lone")
    cohort = Cohort([Member("lone", built, new_optimizer(built.parameters(), lr=0.0), lr=constant(1e-2))])
    before = parameters(cohort, "lone")
    cohort.step(0, [batch(1)])
    after = parameters(cohort, "lone")
    with pytest.raises(AssertionError):
        assert_same_bits(before, after)
    bad = batch(2)
    cohort.step(
        1, [Batch(bad.inputs, bad.rows_N, bad.labels_N, torch.full_like(bad.labels_N, torch.inf, dtype=torch.float32))]
    )
    assert_same_bits(after, parameters(cohort, "lone"))
    assert cohort.failure() == (1, ["lone"])


def test_a_step_that_is_not_finite_can_be_skipped_and_counted():
    members = [member("large", 2), member("small")]
    cohort = run(Cohort(members, BOTH_WAYS, skip_non_finite=True), range(2))
    before = parameters(cohort, "large")
    bias = cohort.members["small"].predictor.output_bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[0] = float("inf")
    cohort.step(2, [batch(5)])
    assert_same_bits(before, parameters(cohort, "large"))
    with torch.no_grad():
        bias.copy_(kept)
    cohort.step(3, [batch(6)])
    assert cohort.num_skipped() == 1
    assert cohort.failure() is None
    with pytest.raises(AssertionError):
        assert_same_bits(before, parameters(cohort, "large"))


def noisy(
    name: str = "lone", *, seed: int = 0, step: int = 0, micro_batches: int = 1, rank: int = 0
) -> list[torch.Tensor]:
    """The features of a new member with dropout in each micro-batch of a step, all of which are the same batch."""
    mine, found = Member(name, built := predictor("lone", dropout=0.5), SGD(built.parameters())), []
    built.register_forward_hook(lambda *called: found.append(called[-1].detach()))
    Cohort([mine], seed=seed, ranks=Ranks(rank=rank)).gradients(step, [batch(1)] * micro_batches)
    return found


def test_noise_is_drawn_anew_for_each_seed_step_micro_batch_rank_and_member():
    drawn = [*noisy(micro_batches=2), *noisy(step=1), *noisy(seed=1), *noisy(rank=1), *noisy("other")]
    torch.manual_seed(5)  # which has no part in it
    assert_same_bits(drawn[:2], noisy(micro_batches=2))
    for one, other in itertools.combinations(drawn, 2):
        assert (one - other).abs().max() > 0.1 * one.abs().max()


def test_each_member_has_its_own_learning_rate_schedule():
    cohort = Cohort([member("large"), member("small")])
    cohort.members["large"].lr = build({"step": {0: 0.0, 2: 1e-2}}, 10)
    before = parameters(cohort, "large"), parameters(cohort, "small")
    run(cohort, range(2))
    assert_same_bits(before[0], parameters(cohort, "large"))
    with pytest.raises(AssertionError):
        assert_same_bits(before[1], parameters(cohort, "small"))


def test_the_weight_of_the_labels_may_follow_the_step():
    """Without edges a gradient is as large as that weight."""
    cohort = Cohort([member("lone", dropout=0.0)])
    cohort.members["lone"].hard_weight = build({"linear": [2.0, 0.0]}, 8)
    found = {}
    for step in (0, 4, 6):
        cohort.gradients(step, [batch(1)])
        found[step] = [parameter.grad.clone() for parameter in cohort.members["lone"].parameters]
        cohort.members["lone"].optimizer.zero_grad()
    for twice, once, half in zip(*found.values(), strict=True):
        torch.testing.assert_close(twice, 2 * once)
        torch.testing.assert_close(half, once / 2)
    assert any(gradient.any() for gradient in found[0])


def test_bfloat16_keeps_parameters_and_losses_in_float32():
    cohort = Cohort([member("large", 2), member("small")], BOTH_WAYS, precision=torch.bfloat16)
    metrics = cohort.step(0, [batch(1)])
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert all(p.dtype == torch.float32 for p in cohort.members["large"].parameters)
    exact = Cohort([member("large", 2), member("small")], BOTH_WAYS).step(0, [batch(1)])
    assert metrics["large/hard"].item() == pytest.approx(exact["large/hard"].item(), rel=1e-2)


def test_a_step_waits_for_the_device_nowhere_but_where_there_is_none():
    cohort = Cohort(
        [member("ann", 2), member("bob"), member("eve", trained=False)],
        [Distillation("ann", "bob"), Distillation("bob", "ann"), Distillation("eve", "ann", temperature=2.0)],
    )
    batches = [batch(1), batch(2)]
    run(cohort, steps=[0])
    with Looks() as looks:
        cohort.step(1, batches)
    # Both of these are asked on a CPU only, where looking is free.
    on_a_cpu = ("problem.py: low, high = labels.min()", 'chunked.py: if upstream.device.type != "cpu" or')
    assert looks.found
    assert [found for found in looks.found if not found.startswith(on_a_cpu)] == []
    with Looks() as looks:
        cohort.failure()
    assert looks.found
