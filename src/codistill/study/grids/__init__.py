"""The studies, by name."""

from collections.abc import Mapping

from codistill.study.design import Study
from codistill.study.grids.causal import CAUSAL
from codistill.study.grids.ctcd import PAIRS
from codistill.study.grids.dwt import DWT
from codistill.study.grids.size import SIZE
from codistill.study.grids.when import WHEN_IT_PAYS

STUDIES: Mapping[str, Study] = {study.name: study for study in (*DWT, *PAIRS, WHEN_IT_PAYS, SIZE, CAUSAL)}
