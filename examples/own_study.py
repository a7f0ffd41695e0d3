"""A study of one's own: which divergence, where two models teach one another?"""

from dataclasses import replace

from codistill.study import Arm, Contrast, Scale, Study, edge, settings

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


def arms(scale: Scale, seed: int) -> list[Arm]:
    """Everything that is trained for one seed."""
    (at,) = settings(scale.masked, seed, passes=[1])
    pair = {role: at.learner(at.size.models[role]) for role in ("large", "small")}
    found = [at.arm("alone", {"small": pair["small"]})]
    for divergence in DIVERGENCES:
        edges = [edge("large", "small"), edge("small", "large")]
        found.append(at.arm(divergence, pair, *(replace(one, divergence=divergence) for one in edges)))
    return found


STUDY = Study(
    name="divergences",
    question="Which divergence is best between two models that teach one another?",
    arms=arms,
    contrasts=[Contrast(f"small: {name} − alone", f"{name}/small", "alone/small") for name in DIVERGENCES],
    curves=["alone/small", *(f"{name}/small" for name in DIVERGENCES)],
)
