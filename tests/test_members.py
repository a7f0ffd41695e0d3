"""Members, batches and divergences of one's own: what is refused in a line, and what a loop of one's own may rely on."""

import pytest

from codistill import Cohort, Distillation, UserError
from codistill.divergences import forward_kl
from cohorts import batch, member

RAMP = {"linear": [1, 0]}


# ---- divergences -------------------------------------------------------------------------------


def column(student, teacher, temperature):
    return forward_kl(student, teacher, temperature)[:, None]


def whole_mean(student, teacher, temperature):
    return forward_kl(student, teacher, temperature).mean()


@pytest.mark.parametrize(
    ("own", "came"),
    [
        (column, r"column gave shape \(20, 1\)"),
        (whole_mean, r"whole_mean gave shape \(\)"),
        (lambda student, teacher, tau: 0.5, "<lambda> gave a float"),
    ],
)
def test_a_divergence_that_does_not_give_one_loss_a_row_is_refused(own, came):
    cohort = Cohort([member("large"), member("small")], [Distillation("large", "small", own)])
    with pytest.raises(UserError, match=rf"^edge 'large' -> 'small': divergence {came}; .* each row, shape \(20,\)"):
        cohort.step(0, batch(1))


# ---- settings ----------------------------------------------------------------------------------


# ---- modes -------------------------------------------------------------------------------------


# ---- causal models -----------------------------------------------------------------------------


# ---- compiled models ---------------------------------------------------------------------------


# ---- saving ------------------------------------------------------------------------------------
