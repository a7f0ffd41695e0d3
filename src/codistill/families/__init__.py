"""Architectures: what is specific to a family of models stands here, and nowhere else."""

from collections.abc import Mapping

from codistill.families.causal import CAUSAL
from codistill.families.family import Family
from codistill.families.masked import MASKED

FAMILIES: Mapping[str, Family] = {**MASKED, **CAUSAL}

__all__ = ["FAMILIES", "Family"]
