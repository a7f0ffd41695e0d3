"""The vocabulary loss: every member's cross-entropy and every edge's divergence over the same predicted rows."""

from codistill.kernels.loss import CohortLoss, Edge, linear_cohort_loss
from codistill.kernels.problem import SparseLogits

__all__ = ["CohortLoss", "Edge", "SparseLogits", "linear_cohort_loss"]
