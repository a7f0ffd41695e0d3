"""The vocabulary loss: every member's cross-entropy and every edge's divergence over the same predicted rows, and the
squared errors that take its place where labels are numbers."""

from codistill.kernels.loss import CohortLoss, Edge, linear_cohort_loss
from codistill.kernels.problem import SparseLogits
from codistill.kernels.regression import linear_cohort_regression

__all__ = ["CohortLoss", "Edge", "SparseLogits", "linear_cohort_loss", "linear_cohort_regression"]
