"""What teaching does to a student grown by repeat-last at 0.7 of the rate, in 20 passes, with five seeds."""

from dataclasses import replace

from codistill.study import Arm, Scale
from codistill.study.grids import STUDIES

OF = STUDIES["dwt-remapping"]
(CONTRAST,) = (c for c in OF.contrasts if c.label == "repeat-last: taught − not, rate × 0.7")
NAMES = {"teacher-weak", CONTRAST.treated.split("/")[0], CONTRAST.control.split("/")[0]}


def arms(scale: Scale, seed: int) -> list[Arm]:
    """The two arms, and the teacher that both need."""
    return [arm for arm in OF.arms(scale, seed) if arm.regime == "20 passes" and arm.name in NAMES]


STUDY = replace(OF, name="five-seeds", arms=arms, contrasts=[CONTRAST], curves=[CONTRAST.treated], seeds=5)
