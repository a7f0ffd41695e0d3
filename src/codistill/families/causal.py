"""Families of causal language models."""

from collections.abc import Mapping

from codistill.families.family import Family

CAUSAL: Mapping[str, Family] = {}
