"""What a study is: a question, arms, the contrasts fixed beforehand, and how to write arms down shortly."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from codistill.config import DistillationConfig, MemberConfig, ModelConfig, Run
from codistill.recipes.sizes import Size
from codistill.schedules import Spec
from codistill.study.arms import Arm, of_arm
from codistill.study.scales import Scale

ONE_PASS = "one pass"
_TEACHER_SEED = 1000  # added to a study's seed: a teacher has seen other batches, or the same in another order


@dataclass(frozen=True)
class Contrast:
    """A difference to be shown, treated − control, both "ARM/ROLE"; a negative one of the loss is an improvement.
    With `than` it is an interaction: by how much this difference exceeds that one."""

    label: str
    treated: str
    control: str
    than: "Contrast | None" = None

    @property
    def terms(self) -> list[tuple[str, int]]:
        """("ARM/ROLE", +1 or −1) of all models in it; their sum is the difference."""
        subtracted = [(name, -sign) for name, sign in self.than.terms] if self.than else []
        return [(self.treated, 1), (self.control, -1), *subtracted]

    @property
    def names(self) -> set[str]:
        """ "ARM/ROLE" of all models in it."""
        return {name for name, _ in self.terms}


@dataclass(frozen=True)
class Study:
    """`arms`: of one seed, for a scale. `curves`: "ARM/ROLE" of those whose learning curves are drawn. `along`:
    contrasts of the loss are told along training too, not only at its end. `over_passes`: drawn over the passes too.
    """

    name: str
    question: str
    arms: Callable[[Scale, int], list[Arm]]
    contrasts: Sequence[Contrast]
    curves: Sequence[str]
    seeds: int = 3
    along: bool = False
    over_passes: bool = False


@dataclass(frozen=True)
class Setting:
    """What the arms of one regime and seed have in common."""

    size: Size
    regime: str
    seed: int
    tokens: int | None

    def arm(self, name: str, members: dict[str, MemberConfig], *edges: DistillationConfig, **changes: Any) -> Arm:
        """An arm with these members and edges; `changes` to its run."""
        run = Run(
            objective=self.size.objective,
            data=replace(self.size.data, tokens=self.tokens),
            members=members,
            distillation=list(edges),
            steps=self.size.steps,
            batch=self.size.batch,
            checkpoint=self.size.checkpoint,
            evaluate=self.size.evaluate,
            log=self.size.log,
            seed=self.seed,
        )
        return Arm(name, self.regime, self.seed, replace(run, **changes))

    def teacher(self, name: str, model: ModelConfig, steps: int | None = None) -> Arm:
        """An arm that trains the model of a frozen teacher, as its role `teacher`."""
        steps = steps or self.size.teacher_steps or self.size.steps
        return self.arm(name, {"teacher": self.learner(model)}, steps=steps, seed=self.seed + _TEACHER_SEED)

    def learner(self, model: ModelConfig, **changes: Any) -> MemberConfig:
        """A model that is trained from a random start."""
        return replace(self.size.learner, model=model, **changes)


def settings(size: Size, seed: int, passes: Iterable[int] = (1, 20)) -> list[Setting]:
    """The regimes of a study at equal steps: one pass over enough text, and several over so much less of it."""
    tokens = size.steps * size.batch.sequences * size.data.length
    return [Setting(size, ONE_PASS if n == 1 else f"{n} passes", seed, None if n == 1 else tokens // n) for n in passes]


def frozen(arm: str, role: str = "teacher") -> MemberConfig:
    """A frozen member: the model `role` of another arm."""
    return MemberConfig(path=of_arm(arm, role), frozen=True)


def edge(teacher: str, student: str, weight: Spec = 1.0, temperature: float = 1.0) -> DistillationConfig:
    """An edge with forward KL, as in both papers."""
    return DistillationConfig(teacher=teacher, student=student, weight=weight, temperature=temperature)


def times(schedule: Spec, by: float) -> Spec:
    """A schedule of the same form with another peak."""
    if not isinstance(schedule, dict):
        return schedule * by
    ((name, (peak, *rest)),) = schedule.items()
    return {name: [peak * by, *rest]}
