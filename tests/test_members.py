"""Members, batches and divergences of one's own: what is refused, and what a loop of one's own may rely on."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertLMHeadModel

from codistill import Batch, Cohort, Distillation, Member, Predictor, UserError
from codistill.divergences import forward_kl
from codistill.families import is_causal
from codistill.schedules import build
from cohorts import LENGTH, VOCABULARY, assert_same_bits, batch, member, parameters, predictor

RAMP = {"linear": [1, 0]}


# ---- divergences -------------------------------------------------------------------------------


def column(student, teacher, temperature):
    return forward_kl(student, teacher, temperature)[:, None]


def whole_mean(student, teacher, temperature):
    return forward_kl(student, teacher, temperature).mean()


@pytest.mark.parametrize(
    ("own", "came"),
    [
        (column, r"column gave shape \(20, 1\)"),
        (whole_mean, r"whole_mean gave shape \(\)"),
        (lambda student, teacher, tau: 0.5, "<lambda> gave a float"),
    ],
)
def test_a_divergence_that_does_not_give_one_loss_a_row_is_refused(own, came):
    cohort = Cohort([member("large"), member("small")], [Distillation("large", "small", own)])
    with pytest.raises(UserError, match=rf"^edge 'large' -> 'small': divergence {came}; .* each row, shape \(20,\)"):
        cohort.step(0, batch(1))


# ---- settings ----------------------------------------------------------------------------------


def lone(**settings) -> Member:
    built = predictor("lone", dropout=0.0)
    return Member("lone", built, SGD(built.parameters(), lr=1.0), **settings)


@pytest.mark.parametrize("clip", [0, -1.0, math.nan, None, "1"])
def test_a_clip_that_bounds_nothing_sensible_is_refused(clip):
    with pytest.raises(UserError, match=rf"^member 'lone': clip {clip!r}; wanted a number above 0 .*float\(\"inf\"\)"):
        lone(clip=clip)


@pytest.mark.parametrize("clip", [1, 0.5, np.float32(0.5), math.inf])
def test_a_clip_is_a_number_or_infinite(clip):
    cohort = Cohort([lone(clip=clip)])
    before = parameters(cohort, "lone")
    norm = cohort.step(0, batch(1))["lone/grad_norm"].item()
    moved = math.hypot(*((a - b).norm().item() for a, b in zip(before, parameters(cohort, "lone"), strict=True)))
    assert moved == pytest.approx(min(norm, clip), rel=1e-4)  # plain gradient descent at rate 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_trained_member_in_16_bits_is_refused_and_a_frozen_one_is_not(dtype):
    built = predictor("narrow").to(dtype)
    with pytest.raises(UserError, match=rf"^member 'narrow': .* is {dtype}; .* load it in float32.*precision=torch.bf"):
        Member("narrow", built, SGD(built.parameters(), lr=0.1))
    Member("narrow", predictor("narrow").to(dtype))


@pytest.mark.parametrize("precision", [torch.float16, torch.float64, "bfloat16", None])
def test_precisions_of_matrix_products_are_two(precision):
    with pytest.raises(UserError, match=rf"^precision: {precision!r}; wanted torch.float32 or torch.bfloat16"):
        Cohort([member("a")], precision=precision)


@pytest.mark.parametrize("given", [RAMP, "linear", [1, 0], torch.ones(2)])
def test_a_schedule_in_yaml_is_refused_where_a_function_is_wanted(given):
    wanted = r"wanted a number or a function of the step.*codistill\.schedules\.build"
    for name in ("lr", "hard_weight"):
        with pytest.raises(UserError, match=rf"^member 'lone': {name} .*; {wanted}"):
            lone(**{name: given})
    with pytest.raises(UserError, match=rf"^edge 'large' -> 'small': weight .*; {wanted}"):
        Distillation("large", "small", weight=given)


@pytest.mark.parametrize("given", [-1e-9, math.nan, math.inf, np.float32("nan")])
def test_a_number_that_is_negative_or_not_finite_is_refused_when_the_member_is_made(given):
    for name in ("lr", "hard_weight"):
        with pytest.raises(UserError, match=rf"^member 'lone': {name} .*; wanted a finite number of at least 0"):
            lone(**{name: given})


@pytest.mark.parametrize("given", [1, 0.5, np.float32(0.5), torch.tensor(0.5), build(RAMP, 4)])
def test_numbers_and_functions_of_the_step_are_taken(given):
    cohort = Cohort([lone(lr=given, hard_weight=given), member("b")], [Distillation("b", "lone", weight=given)])
    cohort.step(0, batch(1))
    assert cohort.failure() is None


# ---- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["predictor", "model", "backbone"])
def test_a_frozen_member_teaches_without_dropout_whoever_put_it_into_training_mode(part):
    def losses(touched: bool) -> list[float]:
        teacher = member("teacher", trained=False, dropout=0.5)
        student = predictor("student", dropout=0.0)
        members = [teacher, Member("student", student, SGD(student.parameters(), lr=0.0))]
        cohort = Cohort(members, [Distillation("teacher", "student")])
        model = teacher.predictor.model
        if touched:
            {"predictor": teacher.predictor, "model": model, "backbone": model.base_model}[part].train()
        return [cohort.step(step, batch(1))["student/from_teacher"].item() for step in range(2)]

    assert losses(touched=True) == losses(touched=False)


# ---- causal models -----------------------------------------------------------------------------


def texts(seed: int = 0) -> dict[str, torch.Tensor]:
    """As `DataCollatorForLanguageModeling(mlm=False)` gives them: labels are the tokens themselves, −100 at padding."""
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(LENGTH) < LENGTH - 3).long().expand_as(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_model_is_not_asked_to_copy_its_input(family):
    cohort = Cohort([member("a", family=family)])
    for given in (Batch.from_labels(texts()), [Batch.from_labels(texts(), causal=True), Batch.from_labels(texts())]):
        with pytest.raises(UserError, match=r"^step 0: the labels are the inputs .* 'a' .*pass causal=True"):
            cohort.step(0, given)
    cohort.step(0, Batch.from_labels(texts(), causal=True))


def test_labels_that_only_pick_the_rows_are_taken():
    student, teacher = member("s", family="gpt2"), member("t", family="gpt2", trained=False)
    student.hard_weight = lambda step: float(step > 0)
    cohort = Cohort([teacher, student], [Distillation("t", "s")])
    cohort.step(0, Batch.from_labels(texts()))
    with pytest.raises(UserError, match=r"^step 1: .* 's' \(causal\) would learn to copy"):
        cohort.step(1, Batch.from_labels(texts()))


def test_a_causal_class_of_a_masked_family_is_causal():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)
    assert is_causal(BertLMHeadModel(config))
    assert not is_causal(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "electra", "gpt2", "llama", "qwen3"])
def test_a_backbone_is_causal_where_its_language_model_is(family):
    model = predictor("a", family=family).model
    assert is_causal(model) == is_causal(model.base_model) == (family in ("gpt2", "llama", "qwen3"))


def test_labels_that_were_shifted_by_hand_or_are_masked_are_taken():
    given = texts()
    ahead = given["labels"].roll(-1, 1).index_fill(1, torch.tensor(LENGTH - 1), -100)
    assert not Batch.from_labels(given | {"labels": ahead}).copies_inputs
    same = torch.full_like(ahead, 7)  # the next token is the token itself
    same_ahead = Batch.from_labels({"input_ids": same, "labels": same.index_fill(1, torch.tensor(LENGTH - 1), -100)})
    assert not same_ahead.copies_inputs
    Cohort([member("b", family="gpt2")]).step(0, same_ahead)
    Cohort([member("a", family="bert")]).step(0, Batch.from_labels(given))  # masked models may be shown the token
    assert Batch.from_labels(given).to("meta").copies_inputs


def both_ways(kind=BertLMHeadModel, **settings) -> Member:
    """A BERT's causal class, which looks both ways unless its configuration says that it is a decoder."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    built = Predictor(kind(BertConfig(vocab_size=VOCABULARY, **sizes, **settings)), VOCABULARY)
    return Member("b", built, SGD(built.parameters(), lr=0.1))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("kind", [BertLMHeadModel, BertForMaskedLM])
def test_a_model_that_looks_both_ways_is_not_asked_for_the_next_token(kind, by_hand):
    given, lone = texts(), both_ways(kind)
    if by_hand:
        given["labels"] = given["labels"].roll(-1, 1).index_fill(1, torch.tensor(LENGTH - 1), -100)
    asked = Batch.from_labels(given, causal=not by_hand)
    with pytest.raises(
        UserError, match=r"^step 0: the labels are .* 'b' looks at these \(its config has is_decoder: f"
    ):
        Cohort([lone]).step(0, asked)
    student = both_ways(is_decoder=True)
    student.name = "a"
    with pytest.raises(UserError, match="'b' looks at these"):
        Cohort([Member("b", lone.predictor), student], [Distillation("b", "a")]).step(0, asked)


def test_a_model_is_asked_once_whether_it_looks_ahead_and_stays_as_it_was():
    lone = both_ways(is_decoder=True)
    lone.predictor.model.bert.encoder.layer[0].eval()
    modes = [part.training for part in lone.predictor.modules()]
    calls: list[torch.Tensor] = []
    lone.predictor.model.bert.register_forward_hook(lambda *given: calls.append(given[0]))
    cohort = Cohort([lone])
    for step in range(3):
        cohort.step(step, Batch.from_labels(texts(step), causal=True))
    assert len(calls) == 3 + 2
    assert [part.training for part in lone.predictor.modules()] == modes


def test_labels_of_masked_tokens_are_no_next_tokens_even_where_they_are_by_chance():
    ids = torch.tensor([[7, 7, 4, 9, 4, 11, 12, 13]])
    labels = torch.tensor([[-100, -100, 9, -100, 11, -100, -100, -100]])
    given = Batch.from_labels({"input_ids": ids, "labels": labels})
    assert not given.shows_next
    Cohort([both_ways(BertForMaskedLM)]).step(0, given)
    assert Batch.from_labels(texts(), causal=True).to("cpu").shows_next


def test_masked_and_causal_models_in_one_cohort_are_refused():
    with pytest.raises(UserError, match=r"^members: 'a' is a masked LM and 'b' a causal one; "):
        Cohort([member("a", family="bert"), member("b", family="gpt2", trained=False)])


# ---- compiled models ---------------------------------------------------------------------------


def test_a_wrapper_of_a_compiled_model_is_refused_and_its_backbone_compiles_in_place():
    model, graphs = predictor("a", family="bert", dropout=0.0).model, []
    with pytest.raises(UserError, match=r"wraps a BertForMaskedLM; give the model itself.*\.base_model\.compile\(\)"):
        Predictor(torch.compile(model), VOCABULARY)
    given = batch(1)
    plain = Predictor(model, VOCABULARY)(given.inputs, given.rows_N)
    model.base_model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    compiled = Predictor(model, VOCABULARY)(given.inputs, given.rows_N)
    assert graphs
    torch.testing.assert_close(compiled, plain)


def test_asking_whether_a_compiled_model_looks_ahead_compiles_nothing():
    lone, graphs = both_ways(is_decoder=True).predictor, []
    lone.model.base_model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert not lone.looks_ahead
    assert not graphs
    lone(batch(1).inputs, batch(1).rows_N)
    assert graphs


def test_what_spreads_a_model_over_devices_is_refused_with_the_remedy():
    wrapped = nn.DataParallel(predictor("a", family="bert").model)
    with pytest.raises(UserError, match=r"DataParallel wraps a BertForMaskedLM; give the model itself, .*\.start\(\)"):
        Predictor(wrapped, VOCABULARY)


def test_a_model_that_has_a_part_called_module_is_no_wrapper():
    model = predictor("a", family="bert").model
    model.module = nn.Linear(2, 2)
    model.config.model_type = "of my own"  # so that it is cut where its logits are proven
    assert Predictor(model, VOCABULARY).output_weight is model.get_output_embeddings().weight


# ---- saving ------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_resumes_bit_for_bit_from_what_the_documentation_saves(tmp_path):
    edges = [Distillation("large", "small", kind="hidden"), Distillation("small", "large")]

    def cohort(models) -> Cohort:
        made = [(name, Predictor(model, VOCABULARY)) for name, model in models.items()]
        return Cohort([Member(n, p, AdamW(p.parameters(), lr=1e-2)) for n, p in made], edges)

    def models(**widths):
        return {name: predictor(name, family="bert", width=width).model for name, width in widths.items()}

    straight = cohort(models(large=32, small=16))
    for step in range(4):
        if step == 2:
            for name, each in straight.members.items():
                each.predictor.model.save_pretrained(tmp_path / name)
                state = {"optimizer": each.optimizer.state_dict(), "projections": each.projections.state_dict()}
                torch.save(state, tmp_path / f"{name}.pt")
        expected = straight.step(step, batch(step))

    resumed = cohort({name: AutoModelForMaskedLM.from_pretrained(tmp_path / name) for name in ("large", "small")})
    for name, each in resumed.members.items():
        state = torch.load(tmp_path / f"{name}.pt")
        each.optimizer.load_state_dict(state["optimizer"])
        each.projections.load_state_dict(state["projections"])
    for step in range(2, 4):
        metrics = resumed.step(step, batch(step))
    assert metrics == expected
    for name in ("large", "small"):
        assert_same_bits(parameters(straight, name), parameters(resumed, name))
