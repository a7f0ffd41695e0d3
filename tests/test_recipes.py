"""Recipes: each is data for the one step, at three sizes."""

import re

import pytest
import torch

from codistill.errors import UserError
from codistill.models import Predictor, new_model
from codistill.recipes import RECIPES, check_teachers, find

# Published sizes in millions: 6 layers x 768 with a tied masked-LM head is BERT's 66.99M (research/papers.md §1.2);
# without a pooler the four-layer teacher has 52.2M + the head's transform and bias (0.6M + 0.03M).
PAPER_MILLIONS = {"large": 66.99, "small": 52.81}
# Lu and Liu's 1.7B and 0.7B, as far as they are stated. By hand for Qwen3's shape with tied embeddings, width D:
# 151,936 D + layers (2 D² + 2 D² · key-value heads / heads + 9 D² + two norms of D, two of a head) + a norm of D.
CAUSAL_MILLIONS = {"large": 1720.57, "small": 705.73}


def edges(name: str) -> set[tuple[str, str]]:
    return {(e.teacher, e.student) for e in find(name).distillation}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("standalone", set()),
        ("kd", {("teacher", "small")}),
        ("dwt", {("weak", "large")}),
        ("dwt-strong", {("weak", "large")}),
        ("dwt-decay", {("weak", "large")}),
        ("inherit", {("weak", "large")}),
        ("standalone-clm", set()),
        ("kd-clm", {("teacher", "small")}),
        ("dwt-clm", {("weak", "large")}),
        ("inherit-clm", {("weak", "large")}),
        ("mix-clm", {("weak", "large")}),
        ("ctcd-clm", {("large", "small"), ("small", "large")}),
        ("ctcd", {("large", "small"), ("small", "large")}),
        ("quickstart", {("large", "small"), ("small", "large")}),
        ("one-way", {("large", "small")}),
        ("reverse", {("small", "large")}),
        (
            "community",
            {(t, s) for t in ("teacher", "weak") for s in ("large", "small")}
            | {("large", "small"), ("small", "large")},
        ),
    ],
)
def test_who_teaches_whom(name, expected):
    assert edges(name) == expected


def test_the_weak_teachers_weights():
    assert [find(f"dwt{kind}").distillation[0].weight for kind in ("", "-strong", "-decay")] == [
        1.0,
        4.0,
        {"linear": [4.0, 1.0]},
    ]


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_builds_on_the_meta_device(name, size):
    run = find(f"{name}:{size}")
    causal = run.objective.name == "clm"
    vocabulary = {"tiny": 4096}.get(size, 151_936 if causal else 30_522)
    for role, member in run.members.items():
        if member.model is None:
            continue
        with torch.device("meta"):
            model = new_model(
                member.model, vocabulary=vocabulary, length=run.data.length, tokenizer=None, seed=0, name=role
            )
        predictor = Predictor(model, vocabulary)
        assert predictor.output_weight.shape == (vocabulary, member.model.width)
        assert causal or predictor.output_bias.shape == (vocabulary,)
        if size == "paper":
            millions = predictor.num_parameters / 1e6
            published = CAUSAL_MILLIONS if causal else PAPER_MILLIONS
            assert millions == pytest.approx(published[role.removesuffix("-alone")], abs=0.01)


def test_a_recipe_without_its_teacher_says_how_to_make_one():
    with pytest.raises(UserError, match=r"make it with `codistill train standalone:tiny --set .*layers=4 --out runs/"):
        check_teachers(find("dwt:tiny"))
    check_teachers(find("ctcd:tiny"))
    command = (
        "codistill train standalone-clm:paper --set members.large.model.layers=26 --set members.large.model.width=1280 "
        "--set members.large.model.heads=20 --set members.large.model.key_value_heads=10 --set steps=28611 "
        "--out runs/standalone-clm-paper-26-layers"
    )
    with pytest.raises(UserError, match=re.escape(f"`{command}`")):
        check_teachers(find("mix-clm:paper"))


def test_the_mixed_shares_add_to_one():
    run = find("mix-clm")
    assert run.members["large"].hard_weight + run.distillation[0].weight == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ctdc", r"no recipe or file 'ctdc' \(did you mean ctcd\?\)"),
        ("ctcd:", "recipe 'ctcd' has no size ''; there are tiny"),
        ("ctcd:huge", r"recipe 'ctcd' has no size 'huge'; there are tiny, small, paper"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        find(name)
