"""The vocabulary loss: every member's cross-entropy and every edge's divergence over the same predicted rows."""

from codistill.kernels.loss import CohortLoss, Edge, linear_cohort_loss

__all__ = ["CohortLoss", "Edge", "linear_cohort_loss"]
