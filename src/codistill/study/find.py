"""A study by its name, or from a Python file of one's own, with everything that can be wrong with it found before
anything is trained.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from codistill.config import Data, Run
from codistill.errors import UserError, did_you_mean
from codistill.loading import load, to_dict
from codistill.own_code import module_of, tried
from codistill.study.arms import Arm, grouped, keys_of, merged
from codistill.study.design import Study
from codistill.study.grids import STUDIES
from codistill.study.scales import Scale

_TEXT = ["text"]  # for a look at what a run says but for its text
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def find_study(name: str) -> Study:
    """The study of that name, or the `STUDY` of the Python file `name`; UserError where there is none."""
    if name.endswith(".py"):
        return _in_file(Path(name))
    if name in STUDIES:
        return STUDIES[name]
    raise UserError(
        f"there is no study {name!r}{did_you_mean(name, STUDIES)}; the studies are {', '.join(STUDIES)}, or a file of "
        "your own, as in mine.py (docs/studies.md)"
    )


def _in_file(file: Path) -> Study:
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; give a study's name or a Python file that has a STUDY")
    module = module_of(file.absolute())
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise UserError(f"{file}: its STUDY is {study!r}; give it STUDY = Study(…), of codistill.study")
    if study.name in STUDIES:
        raise UserError(f"{file}: codistill has a study {study.name!r} itself; give yours another name")
    return replace(study, arms=lambda scale, seed: tried(file, lambda: study.arms(scale, seed)))


def check_study(study: Study, scale: Scale) -> None:
    """UserError where the study's arms, contrasts or curves do not fit together, or a cohort of it is no valid run."""
    if study.seeds < 1:
        raise UserError(f"study {study.name}: seeds {study.seeds}; at least one is needed")
    arms = study.arms(scale, 0)
    _check_arms(study, arms)
    _check_sources(study, arms)
    _check_names(study, arms)
    _check_seeds(study, arms, study.arms(scale, 1))
    for arm in arms:
        _check_run(
            f"study {study.name}, arm {arm.name}",
            replace(arm.run, data=replace(arm.run.data, train=_TEXT, validation=_TEXT)),
        )
    for group in grouped(arms, scale.most_members):
        run = merged(group, Data(train=_TEXT, validation=_TEXT), {of: "folder" for arm in group for of in arm.sources})
        _check_run(f"study {study.name}, the cohort of {', '.join(arm.name for arm in group)}", run)


def _check_run(whose: str, run: Run) -> None:
    try:
        load(to_dict(run))
    except UserError as error:
        raise UserError(f"{whose}: {error}") from None


def _check_arms(study: Study, arms: Sequence[Arm]) -> None:
    if not arms:
        raise UserError(f"study {study.name}: it has no arms; have its function return some")
    strange = next((arm for arm in arms if not isinstance(arm, Arm)), None)
    if strange is not None:
        raise UserError(f"study {study.name}: its function returned {strange!r} among the arms; wanted Arm")
    name = next((arm.name for arm in arms if not _NAME.fullmatch(arm.name)), None)
    if name is not None:
        raise UserError(f"study {study.name}: an arm is called {name!r}; use letters, digits, - and _")
    twice = [place for place, count in Counter(arm.place for arm in arms).items() if count > 1]
    if twice:
        regime, name, _ = twice[0]
        raise UserError(f"study {study.name}: two arms are called {name!r} in the regime {regime!r}; rename one")
    texts = {
        (of.tokenizer, of.column, of.unit, of.keep_every, *of.train, *of.validation)
        for of in (arm.run.data for arm in arms)
    }
    if len(texts) > 1:
        raise UserError(
            f"study {study.name}: its arms have several tokenizers or texts, whose losses cannot stand in one table; "
            "give each a study of its own (the text is --data's to say)"
        )


def _check_sources(study: Study, arms: Sequence[Arm]) -> None:
    """Every model that an arm learns or starts from is one that another arm of its regime trains, and no arm needs
    itself in turn."""
    trained = {(arm.regime, arm.name): arm.run.trained for arm in arms}
    for arm in arms:
        for source, role in arm.sources:
            there = trained.get((arm.regime, source))
            if there is not None and role not in there:
                raise UserError(
                    f"study {study.name}, arm {arm.name}: it needs {source}/{role}, and the arm {source!r} trains "
                    f"{', '.join(there)}{did_you_mean(role, there)}"
                )
            if there is None:
                raise UserError(
                    f"study {study.name}, arm {arm.name}: it needs {source}/{role}, and {source!r} is no arm of the "
                    f"study in the regime {arm.regime!r}{did_you_mean(source, [each.name for each in arms])}"
                )
    grouped(arms, 1)  # which refuses circles


def _check_seeds(study: Study, arms: Sequence[Arm], others: Sequence[Arm]) -> None:
    """The function heeds the seed that it is called with: `arms` are those of 0, `others` of 1."""
    wrong = next((arm for seed, of in ((0, arms), (1, others)) for arm in of if arm.seed != seed), None)
    first, second = keys_of(arms), keys_of(others)
    if wrong is None and {place[:2] for place in first} != {place[:2] for place in second}:
        raise UserError(f"study {study.name}: its arms have other names for seed 1 than for seed 0; give all the same")
    if wrong is None:
        wrong = next((arm for arm in others if second[arm.place] in first.values()), None)
    if wrong is not None:
        raise UserError(
            f"study {study.name}: the arm {wrong.name!r} does not heed the seed that its function is called with; "
            "give it to `settings`"
        )


def _check_names(study: Study, arms: Sequence[Arm]) -> None:
    """Every contrast has both sides in one regime, every curve is there."""
    regimes: dict[str, set[str]] = {}
    for arm in arms:
        regimes.setdefault(arm.regime, set()).update(f"{arm.name}/{role}" for role in arm.run.trained)
    known = sorted(set().union(*regimes.values()))
    wanted = [(f"contrast {c.label!r}", c.names) for c in study.contrasts]
    for where, names in [*wanted, *((f"curve {name!r}", {name}) for name in study.curves)]:
        for name in sorted(names - {*known}):
            raise UserError(
                f"study {study.name}, {where}: no arm trains {name!r}{did_you_mean(name, known)}; wanted ARM/ROLE, one "
                f"of {', '.join(known)}"
            )
        if not any(names <= there for there in regimes.values()):
            raise UserError(f"study {study.name}, {where}: no regime has all of it; compare within one")
