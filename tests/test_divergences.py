"""Divergences against fractions worked out by hand and against scipy, an oracle that shares no code."""

import math

import numpy as np
import pytest
import scipy.special
import torch

from codistill.divergences import DIVERGENCES, forward_kl, jensen_shannon, reverse_kl


def two_classes(p: float) -> torch.Tensor:
    return torch.log(torch.tensor([[p, 1 - p]], dtype=torch.float64))


def test_by_hand():
    student, teacher = two_classes(1 / 4), two_classes(1 / 2)
    assert forward_kl(student, teacher).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert reverse_kl(student, teacher).item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    by_hand = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5))
    assert jensen_shannon(student, teacher).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_against_scipy(name, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 11, dtype=torch.float64) * 3
    p = scipy.special.softmax(student.numpy() / temperature, axis=-1)
    t = scipy.special.softmax(teacher.numpy() / temperature, axis=-1)
    m = (p + t) / 2
    expected = {
        "forward_kl": scipy.special.rel_entr(t, p).sum(-1),
        "reverse_kl": scipy.special.rel_entr(p, t).sum(-1),
        "jensen_shannon": (scipy.special.rel_entr(p, m) + scipy.special.rel_entr(t, m)).sum(-1) / 2,
        "squared_error": ((student - teacher).numpy() ** 2).mean(-1) / temperature**2,
    }[name]
    got = DIVERGENCES[name](student, teacher, temperature)
    torch.testing.assert_close(got, torch.from_numpy(temperature**2 * expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_model_does_not_differ_from_itself(name):
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(1))
    assert DIVERGENCES[name](logits, logits, 2.0).abs().max() == 0


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_models_that_are_close_are_told_apart_in_float32(divergence):
    """Logits that differ by 1e-3 are 5e-7 nats apart: less than a float32 says of any of their log-probabilities."""
    draw = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(8, 1000, generator=draw)
    student = teacher + 1e-3 * torch.randn(8, 1000, generator=draw)
    log_p, log_t = (scipy.special.log_softmax(z.double().numpy(), axis=-1) for z in (student, teacher))
    a, b = (log_t, log_p) if divergence is forward_kl else (log_p, log_t)
    expected = torch.from_numpy((np.exp(a) * (a - b)).sum(-1))
    torch.testing.assert_close(divergence(student, teacher).double(), expected, rtol=0.1, atol=0)


def test_soft_gradient_has_hintons_limit():
    """For large τ the gradient of forward KL tends to the difference of the centred logits ÷ V (docs/equations.md)."""
    torch.manual_seed(2)
    student, teacher = torch.randn(2, 3, 50, dtype=torch.float64)
    student.requires_grad_()
    forward_kl(student, teacher, 1000.0).sum().backward()
    centred = lambda z: z - z.mean(-1, keepdim=True)  # noqa: E731
    limit = (centred(student.detach()) - centred(teacher)) / 50
    assert (student.grad - limit).norm() / limit.norm() < 0.01


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 5\) \(student\) with \(2, 6\) \(teacher\)"):
        forward_kl(torch.zeros(2, 5), torch.zeros(2, 6))
