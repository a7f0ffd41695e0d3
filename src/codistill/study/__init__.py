"""Studies: a question, a grid of arms, seeds, a table, a figure.

The names that a study of one's own is written with (docs/studies.md); `codistill study FILE.py` runs it.
"""

from codistill.study.arms import Arm, of_arm
from codistill.study.design import Contrast, Setting, Study, edge, frozen, settings
from codistill.study.scales import Scale

__all__ = ["Arm", "Contrast", "Scale", "Setting", "Study", "edge", "frozen", "of_arm", "settings"]
