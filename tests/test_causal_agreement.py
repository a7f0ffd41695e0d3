"""Causal training against references that share no code with it: a plain PyTorch loop, and TRL's own loss."""

import ast
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.optim import AdamW

from codistill.cohort import Cohort, Distillation, Member
from codistill.config import ModelConfig
from codistill.data.order import keyed
from codistill.data.tokenizers import Vocabulary
from codistill.kernels import Edge, linear_cohort_loss
from codistill.models import Predictor, new_model
from codistill.objectives import CausalLM
from codistill.schedules import constant

SIZE, LENGTH = 50, 16
VOCABULARY = Vocabulary(SIZE, 2, 3, 0, None, np.arange(SIZE) < 5, np.zeros(SIZE, bool), np.arange(5, SIZE))
LAYERS = {"large": 2, "small": 1}


def model(family: str, name: str):
    config = ModelConfig(family=family, layers=LAYERS[name], width=32, heads=2)
    return new_model(config, vocabulary=SIZE, length=LENGTH, tokenizer=None, seed=0, name=name)


def tokens(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(5, SIZE, (4, LENGTH))


def plain_step(models, optimizers, ids, share: float, temperature: float) -> dict:
    """(1 − a)·hard + a·τ²·KL for both of two models, of all positions, with the shift done by hand."""
    logits = {name: each(torch.from_numpy(ids)).logits[:, :-1] for name, each in models.items()}
    labels = torch.from_numpy(ids)[:, 1:]
    losses, total = {}, 0
    for name, other in (("large", "small"), ("small", "large")):
        hard = functional.cross_entropy(logits[name].transpose(1, 2), labels)
        target = torch.softmax(logits[other].detach() / temperature, -1)
        soft = -(target * torch.log_softmax(logits[name] / temperature, -1)).sum(-1).mean()
        soft = temperature**2 * (soft + (target * target.log()).sum(-1).mean())
        losses[f"{name}/hard"], losses[f"{name}/from_{other}"] = hard.item(), soft.item()
        total = total + (1 - share) * hard + share * soft
    total.backward()
    for name, each in models.items():
        torch.nn.utils.clip_grad_norm_(each.parameters(), 0.7)
        optimizers[name].step()
        optimizers[name].zero_grad()
    return losses


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_the_causal_step_agrees_with_a_plain_loop(family):
    plain = {name: model(family, name) for name in LAYERS}
    optimizers = {name: AdamW(m.parameters(), lr=1e-3, weight_decay=0.1) for name, m in plain.items()}
    members = []
    for name in LAYERS:
        built = Predictor(model(family, name), SIZE)
        optimizer = AdamW(built.parameters(), lr=0.0, weight_decay=0.1, fused=True)
        members.append(Member(name, built, optimizer, constant(1e-3), hard_weight=constant(0.6), clip=0.7))
    edges = [Distillation(a, b, weight=constant(0.4), temperature=2.0) for a, b in (LAYERS, reversed(LAYERS))]
    cohort = Cohort(members, edges)
    for step in range(4):
        ids = tokens(step)
        halves = [
            CausalLM().batch(part, np.full(2, LENGTH), keyed(0, np.arange(2)), VOCABULARY)
            for part in (ids[:2], ids[2:])
        ]
        metrics = {key: value.item() for key, value in cohort.step(step, halves).items() if "grad_norm" not in key}
        assert metrics == pytest.approx(plain_step(plain, optimizers, ids, 0.4, 2.0), rel=1e-6)
    for name, each in plain.items():
        for ours, theirs in zip(cohort.members[name].parameters, each.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def trls_loss():
    """TRL's `generalized_jsd_loss` alone, from its source: its module imports more than this machine has."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    source = (Path(spec.origin).parent / "experimental" / "gkd" / "gkd_trainer.py").read_text()
    [function] = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "generalized_jsd_loss"
    ]
    function.decorator_list = []
    scope = {"torch": torch, "F": functional}
    exec(compile(ast.Module([function], []), "trl", "exec"), scope)
    return scope["generalized_jsd_loss"]


def published_loss(student, teacher, labels, beta, temperature):
    """Generalised JSD as published (Agarwal et al. 2024, eq. 1), mean over the labelled positions, no τ²."""
    p_teacher, p_student = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if beta in (0, 1):  # the limits, divided by β and 1 − β
        rows = kl(p_teacher, p_student) if beta == 0 else kl(p_student, p_teacher)
    else:
        mixture = beta * p_teacher + (1 - beta) * p_student
        rows = beta * kl(p_teacher, mixture) + (1 - beta) * kl(p_student, mixture)
    return rows[labels != -100].mean()


DIVERGENCE_OF_BETA = {0: "forward_kl", 1: "reverse_kl", 0.5: "jensen_shannon"}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0, 1, 0.5])
@pytest.mark.parametrize("of", [published_loss, trls_loss])
def test_soft_losses_are_the_generalised_jsd_times_the_temperature_squared(of, beta, temperature):
    theirs = trls_loss() if of is trls_loss else published_loss
    draw = torch.Generator().manual_seed(1)
    hidden = {m: torch.randn(12, 8, generator=draw).requires_grad_(m == "student") for m in ("student", "teacher")}
    weight = {m: torch.randn(SIZE, 8, generator=draw) for m in hidden}
    labels = torch.randint(SIZE, (12,), generator=draw)
    counts = torch.arange(12) % 4 != 3
    edge = Edge("teacher", "student", 1.0, temperature, DIVERGENCE_OF_BETA[beta])
    ours = linear_cohort_loss(
        hidden,
        weight,
        {},
        labels,
        hard_weight={"student": 0.0, "teacher": 0.0},
        edges=[edge],
        row_weight=counts.double(),
    ).total
    (gradient,) = torch.autograd.grad(ours, hidden["student"])
    logits = {m: (hidden[m] @ weight[m].T)[None] for m in hidden}
    masked = torch.where(counts, labels, -100)[None]
    loss = theirs(logits["student"], logits["teacher"], labels=masked, beta=beta, temperature=temperature)
    (expected,) = torch.autograd.grad(loss, hidden["student"])
    torch.testing.assert_close(ours, temperature**2 * loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, temperature**2 * expected, rtol=1e-6, atol=1e-12)
