"""What a study would train, before it starts."""

from codistill.study.arms import grouped, trained_names
from codistill.study.cells import Cells
from codistill.study.run import Request, missing_cells


def plan_lines(request: Request, jobs: int | None) -> list[str]:
    """A few lines for people: how many arms, how many of them are known, how many cohorts are left."""
    arms = request.arms
    left = missing_cells(arms, Cells(request.out))
    places = {arm.place for arm in left}
    wanted = ([arm for arm in group if arm.place in places] for group in grouped(arms, request.scale.most_members))
    groups = [group for group in wanted if group]
    models = sum(len(trained_names(group)) for group in groups)
    return [
        f"study {request.study.name} at {request.scale.name}, {request.seeds} seeds: {request.study.question}",
        f"{len(arms)} arms, {len(arms) - len(left)} known; left: {models} models in {len(groups)} cohorts",
    ]
