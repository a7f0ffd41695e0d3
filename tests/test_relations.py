"""Edges below the logits against oracles that share no code: loops over numpy, and Hugging Face's own hidden states."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import torch
from safetensors.torch import load_file
from torch.optim import SGD, AdamW

from codistill.cohort import Cohort, Distillation, Member
from codistill.config import Layers
from codistill.data.packing import document_mask
from codistill.data.tokenizers import Vocabulary
from codistill.distributed import Ranks, start
from codistill.errors import UserError
from codistill.loading import load, parse_yaml, to_dict, to_yaml
from codistill.models import Predictor, new_model
from codistill.objectives import Batch, CausalLM, MaskedLM
from codistill.relations import hidden_error, relation_kl
from codistill.schedules import constant
from codistill.train import Stopped, train
from cohorts import LENGTH, VOCABULARY, ModelConfig, assert_same_bits, batch, member, parameters, run
from ranks import on_ranks
from runs import assert_same_run, small_run

HIDDEN = Distillation("large", "small", kind="hidden", layers=Layers(student=[1, 2], teacher=[1, 3]), weight=0.5)
RELATION = Distillation("large", "small", kind="relation", relation_heads=4, weight=2.0)


def padded(seed: int, sequences: int = 3, rows: int = 9) -> Batch:
    plain = batch(seed, sequences, rows)
    lengths_B = torch.tensor([LENGTH, LENGTH - 5, 7, 3])[:sequences]
    mask_BT = (torch.arange(LENGTH) < lengths_B[:, None]).long()
    return Batch({**plain.inputs, "attention_mask": mask_BT}, plain.rows_N, plain.labels_N)


def sized(name: str, layers: int, width: int, family: str = "bert", optimizer=SGD) -> Member:
    config = ModelConfig(family=family, layers=layers, width=width, heads=width // 8)
    model = new_model(config, vocabulary=VOCABULARY, length=LENGTH, tokenizer=None, seed=0, name=name)
    built = Predictor(model, VOCABULARY)
    learner = None if optimizer is None else optimizer(built.parameters(), lr=0.0)
    return Member(name, built, learner, lr=constant(0.1), clip=1e9)


def pair(edges, family: str = "bert", optimizer=SGD, teacher=SGD, width: int = 16) -> Cohort:
    return Cohort([sized("large", 3, 32, family, teacher), sized("small", 2, width, family, optimizer)], edges)


# ---- formulas ----------------------------------------------------------------------------------


def relation_loss_by_loops(student, teacher, heads: int, lengths) -> float:
    """MiniLMv2's loss of one kind of vectors, word for word: sums over heads and positions of each sequence."""
    total, positions = 0.0, sum(lengths)
    for sequence, length in enumerate(lengths):
        for head in range(heads):
            relations = []
            for vectors in (student, teacher):
                width = vectors.shape[-1] // heads
                a = vectors[sequence, :length, head * width : (head + 1) * width]
                relations.append(scipy.special.softmax(a @ a.T / math.sqrt(width), axis=-1))
            for position in range(length):
                p, t = relations[0][position], relations[1][position]
                total += sum(t[i] * math.log(t[i] / p[i]) for i in range(length))
    return total / (heads * positions)


@pytest.mark.parametrize(("heads", "widths"), [(1, (3, 5)), (4, (8, 12)), (12, (24, 24))])
def test_a_relation_edge_is_minilm_v2s_loss(heads, widths):
    draw = np.random.default_rng(heads)
    student, teacher = (draw.normal(size=(3, 7, width)) * 2 for width in widths)
    lengths = [7, 4, 1]
    seen = torch.arange(7) < torch.tensor(lengths)[:, None]
    got_BT = relation_kl(torch.from_numpy(student), torch.from_numpy(teacher), heads, seen[:, None, None])
    expected = relation_loss_by_loops(student, teacher, heads, lengths)
    assert (got_BT * seen).sum().item() / sum(lengths) == pytest.approx(expected, rel=1e-10)


def test_hidden_error_by_hand_and_without_a_gradient_for_the_teacher():
    student, teacher = torch.tensor([[[1.0, 3.0]]], requires_grad=True), torch.tensor([[[0.0, 1.0]]]).requires_grad_()
    error = hidden_error(student, teacher)
    assert error.tolist() == [[2.5]]
    error.sum().backward()
    assert student.grad.tolist() == [[[1.0, 2.0]]]
    assert teacher.grad is None


# ---- in a cohort -------------------------------------------------------------------------------


def projections_of(model, states):
    """Queries, keys and values of the last layer from what goes into it."""
    if model.config.model_type == "bert":
        attention = model.bert.encoder.layer[-1].attention.self
        return [part(states[-2]) for part in (attention.query, attention.key, attention.value)]
    layer = model.model.layers[-1]
    return layer.attn.Wqkv(layer.attn_norm(states[-2])).chunk(3, -1)


def last_layers_output(model, given):
    """Before any final norm, which Hugging Face's last hidden state may already have behind it."""
    kept = []
    layer = model.bert.encoder.layer[-1] if model.config.model_type == "bert" else model.model.layers[-1]
    handle = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    states = model(**given.inputs, output_hidden_states=True).hidden_states
    handle.remove()
    return [*states[:-1], kept[0]]


def expected_loss(models, given, projections):
    """Sums over positions that are not padding of the hidden and the relation edge, and how many positions."""
    states = {name: last_layers_output(model, given) for name, model in models.items()}
    mask_BT = given.inputs.get("attention_mask", torch.ones_like(given.inputs["input_ids"]))
    hidden = 0
    for weight, (student, teacher) in zip(projections, ((1, 1), (2, 3)), strict=True):
        change = states["small"][student] @ weight.T - states["large"][teacher].detach()
        hidden = hidden + (change.pow(2).mean(-1) * mask_BT).sum()
    relation = 0
    vectors = [projections_of(models[name], states[name]) for name in ("small", "large")]
    for of_student, of_teacher in zip(*vectors, strict=True):
        for sequence, length in enumerate(mask_BT.sum(1).tolist()):
            logs = []
            for vectors_BTD in (of_student, of_teacher.detach()):
                a = vectors_BTD[sequence, :length].reshape(length, 4, -1).movedim(1, 0)
                logs.append((a @ a.mT / math.sqrt(a.shape[-1])).log_softmax(-1))
            relation = relation + torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True) / 4
    return hidden, relation, mask_BT.sum()


@pytest.mark.parametrize("new_batch", [batch, padded])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_step_with_edges_below_the_logits_agrees_with_a_hand_written_one(family, new_batch):
    torch.set_default_dtype(torch.float64)
    try:
        cohort = pair([HIDDEN, RELATION], family)
        plain = pair([], family)
        models = {name: plain.members[name].predictor.model for name in ("large", "small")}
        weights = [p.weight.detach().clone().requires_grad_() for p in cohort.members["small"].projections.values()]
        assert [tuple(weight.shape) for weight in weights] == [(32, 16)] * 2
        batches = [new_batch(1), new_batch(2, sequences=2, rows=4)]
        before = {name: parameters(cohort, name) for name in ("large", "small")}
        parts = [expected_loss(models, given, weights) for given in batches]
        hidden, relation, positions = (sum(values) for values in zip(*parts, strict=True))
        hidden, relation = hidden / positions, relation / positions
        rows = sum(len(given.labels_N) for given in batches)
        hard = 0
        for model in models.values():
            for given in batches:
                logits_NV = model(**given.inputs).logits.flatten(0, 1)[given.rows_N]
                hard = hard + torch.nn.functional.cross_entropy(logits_NV, given.labels_N, reduction="sum") / rows
        (hard + 0.5 * hidden + 2.0 * relation).backward()
        metrics = cohort.step(0, batches)
        assert metrics["small/hidden_from_large"].item() == pytest.approx(hidden.item(), rel=1e-9)
        assert metrics["small/relation_from_large"].item() == pytest.approx(relation.item(), rel=1e-9)
        for name, model in models.items():
            extra = weights if name == "small" else []
            for old, new, like in zip(
                before[name], parameters(cohort, name), [*model.parameters(), *extra], strict=True
            ):
                gradient = torch.zeros_like(old) if like.grad is None else like.grad
                torch.testing.assert_close(old - new, 0.1 * gradient, rtol=1e-6, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_micro_batches_of_different_lengths_equal_their_union():
    parts = [padded(1), padded(2, sequences=2, rows=4)]
    union = Batch(
        {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs},
        torch.cat([parts[0].rows_N, parts[1].rows_N + 3 * LENGTH]),
        torch.cat([part.labels_N for part in parts]),
    )
    split, whole = (pair([HIDDEN, RELATION]) for _ in range(2))
    one, other = split.step(0, parts), whole.step(0, union)
    assert one.keys() == other.keys()
    for key, value in other.items():
        torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-6)
    for a, b in zip(parameters(split, "small"), parameters(whole, "small"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("edge", [HIDDEN, RELATION])
def test_a_teacher_does_not_notice_that_it_teaches_and_a_student_does(edge):
    silent, teaching = pair([]), pair([edge])
    for cohort in (silent, teaching):
        run(cohort, range(2))
    assert_same_bits(parameters(silent, "large"), parameters(teaching, "large"))
    own = len(parameters(silent, "small"))
    with pytest.raises(AssertionError):
        assert_same_bits(parameters(silent, "small"), parameters(teaching, "small")[:own])


def hooks(cohort: Cohort) -> int:
    modules = [part for one in cohort.members.values() for part in one.predictor.modules()]
    return sum(len(part._forward_hooks) for part in modules)


def test_nothing_is_kept_where_no_edge_asks_and_no_hook_stays():
    cohort = pair([Distillation("large", "small", kind="hidden", weight=lambda step: float(step > 0))])
    seen = []
    for one in cohort.members.values():
        one.predictor.register_forward_pre_hook(lambda *_: seen.append(hooks(cohort)))
    metrics = cohort.step(0, batch(1))
    assert seen == [0, 0]
    assert "small/hidden_from_large" not in metrics
    assert "small/hidden_from_large" in cohort.step(1, batch(2))
    assert seen == [0, 0, 1, 1]
    assert hooks(cohort) == 0


def test_a_frozen_teacher_of_states_alone_computes_no_logits():
    metrics = pair([HIDDEN], teacher=None).step(0, batch(1))
    assert set(metrics) == {"small/hard", "small/hidden_from_large", "small/grad_norm"}
    both = pair([HIDDEN, RELATION, Distillation("large", "small", "squared_error")], teacher=None)
    assert {"small/from_large", "small/relation_from_large", "large/hard"} <= set(both.step(0, batch(1)))


def test_projections_belong_to_seed_and_members_and_only_where_widths_differ():
    one, other = (pair([HIDDEN]).members["small"].projections for _ in range(2))
    assert list(one) == ["large-1-1", "large-3-2"]
    assert_same_bits(list(one.parameters()), list(other.parameters()))
    assert not torch.equal(one["large-1-1"].weight, one["large-3-2"].weight)
    assert not pair([HIDDEN], width=32).members["small"].projections
    wider = pair([HIDDEN], width=48)
    assert {tuple(p.shape) for p in wider.members["small"].projections.parameters()} == {(32, 48)}
    assert wider.step(0, batch(1))["small/hidden_from_large"] > 0
    assert not pair([RELATION]).members["small"].projections


def test_projections_begin_as_the_members_keys_say_and_not_their_names():
    def projections(teacher: str, key: str):
        members = [sized("large", 3, 32), sized("small", 2, 16)]
        members[0].name, members[0].noise_key = teacher, key
        return list(Cohort(members, [replace(HIDDEN, teacher=teacher)]).members["small"].projections.parameters())

    assert_same_bits(projections("large", "large"), projections("arm--large", "large"))
    assert not torch.equal(projections("large", "large")[0], projections("large", "other")[0])


def test_the_student_comes_closer_in_states_and_relations():
    cohort = pair([HIDDEN, RELATION], optimizer=AdamW, teacher=None)
    for one in cohort.members.values():
        one.lr = 3e-3
    first, *_, last = [cohort.step(step, batch(7, rows=2)) for step in range(60)]
    for key in ("small/hidden_from_large", "small/relation_from_large"):
        assert last[key] < 0.5 * first[key]


def llamas_vectors(model, inputs):
    """Queries, keys and values of a Llama's last layer (B, T, D)."""
    layer = model.model.layers[-1]
    state = layer.input_layernorm(model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-2])
    return [part(state) for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]


@pytest.mark.parametrize("begins", [[0], [0, 5, 6]])
@torch.no_grad()
def test_relations_of_causal_models_see_nothing_later_and_no_other_document(begins):
    """Position by position, over the positions from its document's beginning up to itself."""
    cohort = pair([RELATION], "llama")
    models = [cohort.members[name].predictor.model for name in ("small", "large")]
    given = batch(1, sequences=2, rows=9)
    first = [max(begin for begin in begins if begin <= i) for i in range(LENGTH)]
    if len(begins) > 1:
        given.inputs["position_ids"] = torch.tensor([i - b for i, b in enumerate(first)]).expand(2, -1).contiguous()
    expected = 0.0
    for student, teacher in zip(*(llamas_vectors(model, given.inputs) for model in models), strict=True):
        for sequence, i, head in np.ndindex(2, LENGTH, 4):
            logs = []
            for vectors_BTD in (student, teacher):
                a = vectors_BTD[sequence, first[i] : i + 1].unflatten(-1, (4, -1))[:, head]
                logs.append((a @ a[-1] / math.sqrt(a.shape[-1])).log_softmax(-1))
            expected += torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True).item() / 4
    with torch.enable_grad():
        metrics = cohort.gradients(0, given)
    assert metrics["small/relation_from_large"].item() == pytest.approx(expected / (2 * LENGTH), rel=1e-3)


@pytest.mark.parametrize(("objective", "family"), [(CausalLM(), "llama"), (MaskedLM(0.3), "bert")])
def test_padding_that_no_mask_names_does_not_count(objective, family):
    """The rows of a padded batch, each alone and cut to its length, give the same losses by position."""
    draw, lengths_B = np.random.default_rng(0), np.array([LENGTH, 9, 4])
    ids_BT = draw.integers(5, VOCABULARY, (3, LENGTH))
    positions_BT = np.arange(LENGTH) - np.where(np.arange(LENGTH) < lengths_B[:, None], 0, lengths_B[:, None])
    # Masked models are told of documents, of which the padding is one; causal ones of nothing.
    inputs = {"position_ids": positions_BT, "attention_mask": document_mask(positions_BT)}
    inputs = inputs if objective.looks_ahead else {}
    key_B, vocabulary = (
        np.arange(3, dtype=np.uint64),
        Vocabulary(VOCABULARY, 2, 3, 0, 4, *[np.zeros(VOCABULARY, bool)] * 3),
    )
    given = objective.batch(ids_BT, lengths_B, key_B, vocabulary, inputs)
    cohort = pair([HIDDEN, RELATION], family)
    whole = cohort.gradients(0, given)
    expected = dict.fromkeys(("small/hidden_from_large", "small/relation_from_large"), 0.0)
    for row, length in enumerate(lengths_B):
        alone = Batch(
            {"input_ids": given.inputs["input_ids"][row : row + 1, :length]}, torch.tensor([0]), torch.tensor([7])
        )
        for name, loss in cohort.gradients(0, alone).items():
            if name in expected:
                expected[name] += loss.item() * length / lengths_B.sum()
    assert {name: whole[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_mask_that_is_added_says_the_same_as_one_of_booleans():
    given = batch(1, sequences=2, rows=9)
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask[..., 9:] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found = []
    for one in (mask, added):
        inputs = {**given.inputs, "attention_mask": one}
        found.append(pair([RELATION]).step(0, Batch(inputs, given.rows_N, given.labels_N)))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_projection_decays_as_its_students_matrices_do(decay):
    """Without a gradient AdamW leaves of a matrix 1 − lr · decay."""
    cohort = pair([HIDDEN], optimizer=lambda parameters, lr: adamw_of(parameters, lr, decay))
    (projection, *_) = cohort.members["small"].projections.values()
    before = projection.weight.detach().clone()
    for optimizer in cohort.members["small"].optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(projection.weight.detach(), before * (1 - 0.1 * decay))


def test_of_several_optimizers_the_last_trains_a_projection_as_its_first_group():
    def optimizers(parameters, lr: float):
        one, two, *rest = parameters
        return SGD([one], lr=0.5), SGD([{"params": [two], "lr": 0.25}, {"params": rest, "lr": 0.125}], lr=lr)

    student = pair([HIDDEN], optimizer=optimizers).members["small"]
    held = [[group["lr"] for group in optimizer.param_groups] for optimizer in student.optimizers]
    assert held == [[0.5], [0.25, 0.125, 0.25]]
    assert_same_bits(student.optimizers[1].param_groups[-1]["params"], list(student.projections.parameters()))


def adamw_of(parameters, lr: float, decay: float):
    """As `codistill.build.adamw` has it: decay is a group's, and the optimizer's default another."""
    parameters = list(parameters)
    groups = [([p for p in parameters if p.ndim > 1], decay), ([p for p in parameters if p.ndim <= 1], 0.0)]
    return AdamW([{"params": ps, "weight_decay": d} for ps, d in groups], lr=lr, fused=True)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "deberta-v2", "gpt2", "llama", "gemma3_text"])
def test_every_family_gives_its_states_and_relations(family):
    cohort = pair([HIDDEN, RELATION], family)
    metrics = cohort.step(0, padded(1))
    assert all(metrics[f"small/{kind}_from_large"] > 0 for kind in ("hidden", "relation"))
    assert cohort.failure() is None


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradient_checkpointing_changes_nothing(family):
    plain, thrifty = (pair([HIDDEN, RELATION], family) for _ in range(2))
    for one in thrifty.members.values():
        model = one.predictor.model  # renamed in the course of transformers 5
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for cohort in (plain, thrifty):
        cohort.step(0, [padded(1), padded(2)])
    for a, b in zip(parameters(plain, "small"), parameters(thrifty, "small"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ---- runs --------------------------------------------------------------------------------------


def inner_run(text, *more: str):
    tree = to_dict(small_run("kd", text, "steps=6", "checkpoint.every=2", "log.every=1", *more))
    tree["members"] = {
        "large": {"model": {"family": "modernbert", "layers": 2, "width": 48, "heads": 4}},
        "small": {"model": {"family": "bert", "layers": 1, "width": 32, "heads": 4, "dropout": 0.1}},
    }
    edges = """
    - {teacher: large, student: small, divergence: squared_error}
    - {teacher: large, student: small, kind: hidden, layers: {student: [1], teacher: [2]}, weight: {linear: [1, 0]}}
    - {teacher: large, student: small, kind: relation, relation_heads: 8}
    - {teacher: small, student: large, kind: relation, layers: {student: [1], teacher: [1]}}
    """
    tree["distillation"] = parse_yaml(edges, "edges")
    tree["data"]["tokenizer"] = "train:wordpiece:300"
    return load(tree)


def test_a_run_with_every_kind_of_edge_resumes_bit_for_bit_and_saves_the_model_alone(text, tmp_path):
    run = inner_run(text)
    assert load(parse_yaml(to_yaml(run), "round trip")) == run
    straight = train(run, tmp_path / "straight")
    with pytest.raises(Stopped):
        train(run, tmp_path / "stopped", stop_at=4)
    saved = tmp_path / "stopped" / "checkpoints" / "step-00000004" / "small" / "projections.safetensors"
    assert {name: tuple(tensor.shape) for name, tensor in load_file(saved).items()} == {"large-2-1.weight": (48, 32)}
    train(run, tmp_path / "stopped", resume=True)
    assert_same_run(straight, tmp_path / "stopped")
    assert not [name for name in load_file(straight / "members/small/model.safetensors") if "large" in name]
    line = json.loads((straight / "metrics.jsonl").read_text().splitlines()[0])
    assert {"small/from_large", "small/hidden_from_large", "small/relation_from_large"} <= set(line)


def on_a_rank(engine: str, kinds: tuple[str, ...], world: int):
    ranks = start(engine, "cpu")
    members = [sized(*size, optimizer=None) for size in (("large", 3, 32), ("small", 2, 16))]
    for one in members:
        one.predictor.requires_grad_()
        ranks.place(one.predictor)
    learners = [
        Member(one.name, one.predictor, AdamW(one.predictor.parameters(), lr=0.0, eps=1e-3), lr=1e-2, clip=0.1)
        for one in members
    ]
    cohort = Cohort(learners, [edge for edge in (HIDDEN, RELATION) if edge.kind in kinds], ranks=ranks)
    metrics = []
    for step in range(3):
        every = [padded(10 * step + i, sequences=2 + i % 2, rows=4 + i) for i in range(2 * world)]
        metrics.append(cohort.step(step, every[ranks.rank :: ranks.world] if ranks.world > 1 else every))
    return [{key: value.clone() for key, value in line.items()} for line in metrics]


@pytest.mark.parametrize(("engine", "kinds"), [("ddp", ("hidden", "relation")), ("fsdp2", ("hidden",))])
def test_two_ranks_take_the_step_of_one(engine, kinds):
    alone = on_a_rank("auto", kinds, 2)
    for of_rank in on_ranks(on_a_rank, engine, kinds, 2):
        for expected, line in zip(alone, of_rank, strict=True):
            assert expected.keys() == line.keys()
            for key, value in expected.items():
                torch.testing.assert_close(line[key], value, rtol=1e-4, atol=1e-6)


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "state"}, "kind 'state'; wanted logits, hidden or relation"),
        ({"layers": Layers(student=[1], teacher=[1])}, "layers are for the kinds hidden and relation"),
        ({"kind": "hidden", "temperature": 2.0}, "divergence and temperature are for the kind logits, not hidden"),
        ({"kind": "relation", "divergence": "reverse_kl"}, "divergence and temperature are for the kind logits"),
        ({"kind": "hidden", "relation_heads": 2}, "relation_heads are for the kind relation, not hidden"),
        ({"kind": "hidden", "layers": Layers(student=[1, 2], teacher=[1])}, "2 of the student and 1 of the teacher"),
        ({"kind": "hidden", "layers": Layers(student=[], teacher=[])}, "give pairs"),
        ({"kind": "hidden", "layers": Layers(student=[0], teacher=[1])}, "layers: 0; layers are counted from 1"),
        (
            {"kind": "hidden", "layers": Layers(student=[2, 1, 2], teacher=[1, 1, 1])},
            "the student's 2 and the teacher's 1 are paired 2 times; give a pair once",
        ),
        ({"kind": "hidden", "layers": Layers(student=[1], teacher=[4])}, "member 'large': layer 4 of 3"),
        ({"kind": "relation", "relation_heads": 3}, "3 relation heads do not divide .* 16 wide"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as refusal:
        pair([Distillation("large", "small", **settings)])
    assert "\n" not in str(refusal.value)


def test_relations_under_fsdp2_are_refused():
    with pytest.raises(UserError, match="relation edges need ddp or single, not fsdp2"):
        Cohort([member("large"), member("small")], [RELATION], ranks=Ranks(engine="fsdp2"))


def test_a_configuration_is_refused_before_anything_is_built():
    tree = {"members": {"a": {"model": {}}, "b": {"model": {}}}}
    edge = {"teacher": "a", "student": "b", "kind": "hidden", "layers": {"student": [1, 2], "teacher": [1]}}
    with pytest.raises(UserError, match=r"^distillation\.0: layers: 2 of the student and 1 of the teacher"):
        load({**tree, "distillation": [edge]})
    with pytest.raises(UserError, match=r"^distillation\.0\.layers\.teacher: missing"):
        load({**tree, "distillation": [edge | {"layers": {"student": [1]}}]})


def test_a_module_whose_layers_cannot_be_told_is_refused():
    plain = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, VOCABULARY))
    built = Predictor.from_module(plain, lambda inputs, rows_N: plain[0](inputs["input_ids"].flatten()[rows_N]),
                                  plain[1], vocabulary=VOCABULARY)  # fmt: skip
    own = Member("own", built, SGD(built.parameters(), lr=0.1))
    with pytest.raises(UserError, match="member 'own': Sequential has no list of layers"):
        Cohort([own, member("other")], [Distillation("other", "own", kind="hidden")])


def test_compiled_layers_cannot_be_looked_into(text):
    settings = ["distillation.0.kind=hidden", "distillation.0.layers={student: [1], teacher: [1]}"]
    small_run("one-way:tiny", text, *settings)
    with pytest.raises(UserError, match="compile: edges of kind hidden look into layers"):
        small_run("one-way:tiny", text, *settings, "compile=true")
