"""What a page says of a folder: a run, a study or an evaluation."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from codistill.blocks import Block, Heading, Listing, Picture, Table, Text, Written
from codistill.errors import UserError
from codistill.loading import to_yaml
from codistill.report.run import (
    curves_figure,
    read_results,
    scores_of,
    skipped_steps,
    taught_by,
    untaught_twins,
    versus,
)
from codistill.study import Arm, Study
from codistill.study.figure import costs_figure, figure_of
from codistill.study.grids import STUDIES
from codistill.study.page import study_blocks, text_used
from codistill.study.run import made_in, summary
from codistill.study.scales import SCALES


def section(folder: Path, studies: Sequence[Study] = ()) -> list[Block]:
    """The blocks of one folder; UserError where it is none of the three. `studies`: besides those of codistill."""
    with results_of(folder) as results:
        if (folder / "run.yaml").is_file():
            return _run(folder, results)
        if "study" in results:
            return _study(folder, results, {**STUDIES, **{study.name: study for study in studies}})
        return _evaluation(folder, results)


@contextmanager
def results_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Gives what is in the folder's results.json; UserError where there is none, or one that what is done with it does
    not understand."""
    try:
        results = read_results(folder)
        assert isinstance(results, dict)
    except (OSError, ValueError, AssertionError):
        raise UserError(
            f"{folder}: no results.json that can be read; give folders of finished runs, studies or evaluations"
        ) from None
    try:
        yield results
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder}: its results.json is no run's, study's or evaluation's of this version") from None


# ---- a run ---------------------------------------------------------------------------------------


def _run(folder: Path, results: Mapping[str, Any]) -> list[Block]:
    held_out = results["held_out"]
    stopped = ", stopped early" if results.get("stopped_early") else ""
    facts = (
        f"A single run: {results['steps']:,} steps{stopped}, {results['tokens']:,} tokens, {results['seconds']:.0f} s "
        f"in {results.get('precision', 'an unknown precision')}, seed {results.get('seed', 'unknown')}. Unigram "
        f"cross-entropy of the {held_out['rows']:,} held-out tokens: {held_out['unigram_loss']:.3f} nats."
    )
    name = folder.resolve().name
    return [
        Heading(f"Run {name}"),
        Text(facts),
        *([Text(skipped_steps(results), important=True)] if skipped_steps(results) else []),
        members_table(results["members"]),
        *picture(f"{name}-curves.svg", lambda: curves_figure(folder), f"Held-out loss of {name} along training."),
        Listing("the resolved configuration", (folder / "run.yaml").read_text(encoding="utf-8")),
    ]


def members_table(members: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each member of a run is, cost and scores."""
    alone = untaught_twins(members)
    head = ["member", "taught by", "parameters", "FLOPs (of teachers)", "loss, nats", "perplexity", "accuracy"]
    head += ["loss vs. alone"] if alone else []
    rows = [
        _member(name, member) + ([versus(member, members.get(alone.get(name, "")))] if alone else [])
        for name, member in members.items()
    ]
    return Table(head, rows, words=(1,))


def _member(name: str, member: Mapping[str, Any]) -> list[str]:
    flops = member.get("flops", {"own": None, "teachers": 0})
    cost = "not counted" if flops["own"] is None else f"{sum(flops.values()):.3g}"
    teachers = f" ({flops['teachers']:.2g})" if flops["teachers"] else ""
    return [name, taught_by(member), f"{member['parameters'] / 1e6:.2f} M", cost + teachers, *scores_of(member)]


# ---- a study -------------------------------------------------------------------------------------


def _study(folder: Path, results: Mapping[str, Any], studies: Mapping[str, Study]) -> list[Block]:
    name = results["study"]
    if results["scale"] not in SCALES:
        raise UserError(f"{folder}: a study at {results['scale']!r}, a scale that this version does not have")
    if name not in studies:
        raise UserError(
            f"{folder}: no study of this version is called {name!r}; if it is your own, give its --study FILE"
        )
    request, cells = made_in(folder, studies[name], SCALES[results["scale"]], results["arms"])
    found = summary(request, cells)
    first = [arm for arm in request.arms if arm.seed == 0]
    return [
        Heading(f"Study {name}"),
        Text(found["question"]),
        Text(text_used(cells)),
        *_answer(folder),
        *picture(f"{name}.svg", lambda: figure_of(request.study, found, cells), _SHOWN),
        *study_blocks(found),
        *picture(f"{name}-costs.svg", lambda: costs_figure(found), "Quality against what it took to train."),
        *(
            Listing(f"{arm.regime}, {arm.name}: configuration of seed 0, but for the text", _settings(arm))
            for arm in first
        ),
    ]


def _settings(arm: Arm) -> str:
    """The configuration of an arm without the text, which --data gives in place of what its recipe has."""
    return to_yaml(replace(arm.run, data=replace(arm.run.data, train=[], validation=[])))


_SHOWN = (
    "Held-out loss along training, mean and standard deviation over seeds; and the differences with 95 % intervals "
    "over seeds."
)


def _answer(folder: Path) -> list[Block]:
    """What the study's own page answers, if somebody has written one."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    _, heading, after = text.partition("## Answer\n")
    return [Written(after.partition("\n## ")[0].strip())] if heading else []


# ---- an evaluation -------------------------------------------------------------------------------


def _evaluation(folder: Path, results: Mapping[str, Any]) -> list[Block]:
    found = results["comparisons"]
    models = list(found["averages"])
    scores = [[task, *(_score(task, of.get(m)) for m in models)] for task, of in found["tasks"].items()]
    blocks: list[Block] = [
        Heading(f"Evaluation {folder.resolve().name}"),
        Text(f"Mean ± standard deviation over {results['seeds']} fine-tuning seeds where there are any."),
        *_kept(results),
        Table(["task", *models], scores),
    ]
    rows = [_paired(task, model, d) for task, of in found["paired"].items() for model, d in of.items()]
    if rows:
        blocks += [
            Text(f"Differences to {found['reference']}, with 95 % intervals over seeds and over examples."),
            Table(["task", "model", "seeds", "difference", "over seeds", "over examples"], rows, words=(1, 4, 5)),
        ]
    failed = [[c["task"], c["model"], c["failed"]] for c in results["cells"] if c["failed"]]
    return blocks + ([Table(["failed", "model", "why"], failed, words=(1, 2))] if failed else [])


def _kept(results: Mapping[str, Any]) -> list[Block]:
    others = results.get("kept")  # evaluations of earlier versions do not say it
    return [Text(f"Of the last call; {others} more cells of earlier calls are kept there.")] if others else []


def _score(task: str, of: Mapping[str, Any] | None) -> str:
    if of is None or of["mean"] is None:
        return ""
    scale = 1 if task == "mlm" else 100
    return f"{scale * of['mean']:.2f}" + ("" if of["sd"] is None else f" ± {scale * of['sd']:.2f}")


def _paired(task: str, model: str, of: Mapping[str, Any]) -> list[str]:
    scale = 1 if task == "mlm" else 100
    mean = "" if of["mean"] is None else f"{scale * of['mean']:+.2f}"
    intervals = [
        "" if i is None else f"[{scale * i[0]:+.2f}, {scale * i[1]:+.2f}]"
        for i in (of["interval"], of["examples_interval"])
    ]
    return [task, model, str(of["seeds"]), mean, *intervals]


def picture(name: str, figure_of: Any, caption: str) -> list[Block]:
    """The figure as SVG; a line in its place where matplotlib is not installed."""
    try:
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": name}), io.StringIO() as file:
            figure_of().savefig(file, format="svg", metadata={"Date": None})
            return [Picture(name, file.getvalue(), caption)]
    except ImportError:
        return [Text("No figure: codistill's extra `report` brings matplotlib.", important=True)]
