"""The Python API: public names, batches, members and predictors of one's own, and what is wrong with them in a line."""

import importlib
import inspect
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import ExponentialLR

import codistill
from codistill import Batch, Cohort, Distillation, Edge, Member, Predictor, UserError, linear_cohort_loss
from codistill.divergences import forward_kl
from cohorts import LENGTH, VOCABULARY, assert_same_bits, batch, member, parameters, predictor

BOTH_WAYS = [Distillation("large", "small"), Distillation("small", "large")]


# ---- names -------------------------------------------------------------------------------------


def test_the_public_names_are_about_a_dozen_and_documented():
    assert len(codistill.__all__) <= 15
    assert sorted(codistill.__all__, key=str.lower) == sorted(codistill._HOME, key=str.lower)
    for name in codistill.__all__:
        value = getattr(codistill, name)
        assert len(inspect.getdoc(value)) > 60, name
        assert not isinstance(value, ModuleType), name


def test_train_stays_the_function_whoever_imports_its_module():
    module = importlib.import_module("codistill.train")
    codistill.train = module  # as the import system does with a submodule
    from codistill import train

    assert train is module.train
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        codistill.nothing  # noqa: B018


def test_public_functions_and_methods_say_their_types():
    assert (Path(codistill.__file__).parent / "py.typed").exists()
    for name in codistill.__all__:
        value = getattr(codistill, name)
        own = [f for key, f in vars(value).items() if inspect.isfunction(f) and (key == "__init__" or key[0] != "_")]
        for function in [value] if inspect.isfunction(value) else own:
            untyped = set(inspect.signature(function).parameters) - set(function.__annotations__) - {"self"}
            assert not untyped, f"{function.__qualname__}: {untyped}"
            assert function.__name__ == "__init__" or inspect.getdoc(function), function.__qualname__


# ---- batches -----------------------------------------------------------------------------------


def collated(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=draw)
    labels = ids.where(torch.rand(ids.shape, generator=draw) < 0.3, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_labels_as_hugging_face_takes_them_give_its_own_loss(family):
    built = predictor("a", family=family, dropout=0.0)
    given = collated()
    made = Batch.from_labels(given, causal=family == "gpt2")
    assert set(made.inputs) == {"input_ids", "attention_mask"}
    cohort = Cohort([Member("a", built, SGD(built.parameters(), lr=0.0))])
    expected = built.model(**given).loss
    assert cohort.step(0, made)["a/hard"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_is_taken_alone_or_in_a_list_and_moves():
    one, other = (Cohort([member("a", dropout=0.0)]) for _ in range(2))
    assert one.step(0, batch(1))["a/hard"] == other.step(0, [batch(1)])["a/hard"]
    weighted = Batch(batch(1).inputs, batch(1).rows_N, batch(1).labels_N, torch.ones(20), (1, 2))
    moved = weighted.to("meta")
    assert moved.sample_ids == (1, 2)
    tensors = [*moved.inputs.values(), moved.rows_N, moved.labels_N, moved.row_weight_N]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch(1).to("meta").row_weight_N is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "^batch: input_ids, attention_mask, labels; wanted labels too"),
        ({"labels": torch.zeros(3, 5, dtype=torch.int64)}, r"^labels: torch.int64 of shape \(3, 5\); .*\(3, 16\)"),
        ({"labels": torch.zeros(3, LENGTH)}, "^labels: torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64), "input_ids": None}, r"wanted int64 of shape \(sequences, pos"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Batch.from_labels(collated() | change)


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_labels_outside_the_vocabulary_are_refused(label):
    given = collated()
    given["labels"][0, 0] = label
    with pytest.raises(UserError, match=f"^labels: {label} is outside the vocabulary of {VOCABULARY}"):
        Cohort([member("a")]).step(0, Batch.from_labels(given))


# ---- members -----------------------------------------------------------------------------------


def test_a_learning_rate_of_ones_own_is_left_alone():
    built = predictor("a")
    optimizer = SGD(built.parameters(), lr=0.5)
    schedule = ExponentialLR(optimizer, 0.1)
    cohort = Cohort([Member("a", built, optimizer)])
    rates = []
    for step in range(3):
        cohort.step(step, batch(step))
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates == pytest.approx([0.5, 0.05, 0.005])


def test_numbers_and_functions_say_the_same():
    def cohort(number):
        built = [(name, predictor(name, dropout=0.0)) for name in ("large", "small")]
        members = [Member(n, p, SGD(p.parameters(), lr=0.0), lr=number(0.3), hard_weight=number(0.5)) for n, p in built]
        return Cohort(members, [Distillation("large", "small", weight=number(2.0))])

    one, other = cohort(lambda value: value), cohort(lambda value: lambda step: value)
    for step in range(2):
        one.step(step, batch(step)), other.step(step, batch(step))
    assert_same_bits(parameters(one, "small"), parameters(other, "small"))


def test_several_optimizers_share_a_members_parameters_out():
    built = predictor("a", dropout=0.0)
    matrices = [p for n, p in built.named_parameters() if p.ndim == 2 and "embeddings" not in n]
    others = [p for p in built.parameters() if all(p is not matrix for matrix in matrices)]
    cohort = Cohort([Member("a", built, [Muon(matrices, lr=1e-2), AdamW(others, lr=1e-2)])])
    assert cohort.trained[0].is_trained
    before = parameters(cohort, "a")
    losses = [cohort.step(step, batch(1))["a/hard"].item() for step in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters(cohort, "a"), strict=True))
    with torch.no_grad():
        built.output_bias[0] = float("inf")
    before = parameters(cohort, "a")
    cohort.step(20, batch(1))
    assert_same_bits(before, parameters(cohort, "a"))


def test_parameters_that_were_frozen_stay_so():
    built = predictor("a", dropout=0.0)
    embedding = built.model.get_input_embeddings().weight.requires_grad_(False)
    cohort = Cohort([Member("a", built, SGD(built.parameters(), lr=0.1)), member("b")], [Distillation("b", "a")])
    before, others = embedding.clone(), parameters(cohort, "a")
    cohort.step(0, batch(1))
    assert torch.equal(before, embedding)
    assert cohort.failure() is None
    assert any(not torch.equal(old, new) for old, new in zip(others, parameters(cohort, "a"), strict=True))


def test_a_member_with_nothing_left_to_train_is_refused():
    built = predictor("a").requires_grad_(False)
    with pytest.raises(UserError, match=r"^member 'a': .* nothing is left to train; unfreeze some, or give no optim"):
        Member("a", built, SGD(built.parameters(), lr=0.1))
    with pytest.raises(UserError, match=r"^member 'a': its optimizer has none of its parameters"):
        Member("a", predictor("a"), SGD(predictor("b").parameters(), lr=0.1))
    with pytest.raises(UserError, match=r"^members: none is trained"):
        Cohort([Member("a", predictor("a"))])


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([Distillation("large", "huge")], "no member 'huge'"),
        ([Distillation("large", "old")], "'old' is frozen and cannot learn"),
        ([Distillation("large", "small")] * 2, "keep one edge of each kind between two members"),
    ],
)
def test_edges_that_lead_nowhere_are_refused(edges, message):
    with pytest.raises(UserError, match=message):
        Cohort([member("large"), member("small"), member("old", trained=False)], edges)


@pytest.mark.parametrize("given", [[], {"input_ids": torch.ones(1, 4)}, [{"input_ids": torch.ones(1, 4)}]])
def test_what_is_no_batch_is_refused(given):
    with pytest.raises(UserError, match=r"step 0: .* came in where a Batch or several are wanted"):
        Cohort([member("a")]).step(0, given)


def test_members_that_share_a_model_are_refused():
    built = predictor("a")
    members = [Member(name, built, SGD(built.parameters(), lr=0.1)) for name in ("a", "b")]
    with pytest.raises(UserError, match="'a' and 'b' share parameters"):
        Cohort(members)


def test_an_optimizer_has_all_of_its_members_parameters_and_no_others():
    built, other = predictor("a"), predictor("b")
    with pytest.raises(UserError, match=r"'a': no optimizer has model\..* \(\d+ such\)"):
        Member("a", built, SGD(list(built.parameters())[:2], lr=0.1))
    with pytest.raises(UserError, match="'a': its optimizer has parameters that are not its own"):
        Member("a", built, SGD([*built.parameters(), *other.parameters()], lr=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": "large"}, "'large' cannot teach itself"),
        ({"divergence": "kl"}, "divergence 'kl'; wanted forward_kl"),
        ({"weight": -1.0}, r"weight -1\.0; wanted a finite number of at least 0"),
        ({"weight": math.nan}, r"weight nan; wanted a finite number of at least 0"),
        ({"weight": 10**400}, r"weight 10+; wanted a finite number of at least 0"),
        ({"temperature": 0}, r"temperature 0; wanted a finite number above 0"),
        ({"temperature": -2.0}, r"temperature -2\.0; wanted a finite number above 0"),
        ({"temperature": math.nan}, r"temperature nan; wanted a finite number above 0"),
        ({"temperature": None}, r"temperature None; wanted a finite number above 0"),
    ],
)
def test_an_edge_that_cannot_be_is_refused_when_it_is_made(settings, message):
    with pytest.raises(UserError, match=message):
        Distillation(**{"teacher": "large", "student": "small", **settings})


def test_members_of_different_vocabularies_are_refused():
    one, other = member("a"), member("b")
    other.predictor.vocabulary = 40
    with pytest.raises(UserError, match=r"different vocabularies \(a 50, b 40\)"):
        Cohort([one, other])


def test_two_members_of_one_name_are_refused():
    with pytest.raises(UserError, match="members: a, a; give each a name of its own"):
        Cohort([member("a"), member("a")])


# ---- predictors --------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, vocabulary: int = VOCABULARY):
        super().__init__()
        self.words, self.output = nn.Embedding(VOCABULARY, 6), nn.Linear(6, vocabulary)

    def features(self, inputs, rows_N):
        return self.words(inputs["input_ids"]).cumsum(1).tanh().flatten(0, 1)[rows_N]

    def logits(self, inputs, rows_N):
        return self.output(self.features(inputs, rows_N))


def small(given: str, vocabulary: int = VOCABULARY) -> tuple[Small, Predictor]:
    torch.manual_seed(3)
    module = Small(vocabulary)
    if given == "logits":
        return module, Predictor.from_module(module, module.logits, vocabulary=VOCABULARY)
    return module, Predictor.from_module(module, module.features, module.output, vocabulary=VOCABULARY)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY + 14])
@pytest.mark.parametrize("given", ["features", "logits"])
def test_any_module_learns_and_teaches_by_its_features_or_its_logits(given, vocabulary):
    module, own = small(given, vocabulary)
    plain, _ = small(given, vocabulary)
    other, beside = (predictor("other", dropout=0.0) for _ in range(2))
    edges = [Distillation("other", "own"), Distillation("own", "other")]
    members = [Member("own", own, SGD(own.parameters(), lr=1.0), clip=1e9)]
    members += [Member("other", other, SGD(other.parameters(), lr=1.0), clip=1e9)]
    metrics = Cohort(members, edges).step(0, batch(1))
    given_batch = batch(1)
    logits = [plain.logits(given_batch.inputs, given_batch.rows_N)[:, :VOCABULARY]]
    logits.append(beside.model(**given_batch.inputs).logits.flatten(0, 1)[given_batch.rows_N])
    kl = [
        functional.kl_div(a.log_softmax(-1), b.detach().softmax(-1), reduction="batchmean")
        for a, b in (logits, logits[::-1])
    ]
    assert metrics["own/from_other"].item() == pytest.approx(kl[0].item(), rel=1e-4)
    assert metrics["other/from_own"].item() == pytest.approx(kl[1].item(), rel=1e-4)
    hard = [functional.cross_entropy(z, given_batch.labels_N) for z in logits]
    before = [p.detach().clone() for p in plain.parameters()]
    sum([*kl, *hard]).backward()
    for old, new, like in zip(before, module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(old - new, like.grad, rtol=1e-3, atol=1e-6)


class Placed(nn.Module):
    """Calls its positions as RoBERTa does, which counts them from its padding token, and has windows as ModernBERT."""

    def __init__(self):
        super().__init__()
        self.config = transformers.ModernBertConfig(num_hidden_layers=3, sliding_window=2)
        self.position_embeddings, self.output = nn.Embedding(20, 6, padding_idx=1), nn.Linear(6, VOCABULARY)

    def features(self, inputs, rows_N):
        self.seen = inputs
        return self.position_embeddings(inputs["position_ids"]).flatten(0, 1)[rows_N]


def test_a_module_of_ones_own_gets_a_batchs_inputs_as_they_are():
    module = Placed()
    own = Predictor.from_module(module, module.features, module.output, vocabulary=VOCABULARY)
    given = {"position_ids": torch.arange(4)[None], "attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    own(given, torch.arange(4))
    assert {name: id(tensor) for name, tensor in module.seen.items()} == {n: id(t) for n, t in given.items()}


def test_a_divergence_of_ones_own_is_the_named_one_if_it_says_the_same():
    def cohort(divergence):
        edges = [Distillation("large", "small", divergence, temperature=2.0)]
        return Cohort([member("large", dropout=0.0), member("small", dropout=0.0)], edges)

    named, own = cohort("forward_kl"), cohort(lambda student, teacher, tau: forward_kl(student, teacher, tau))
    key = "small/from_large"
    assert named.step(0, batch(1))[key].item() == pytest.approx(own.step(0, batch(1))[key].item(), rel=1e-5)


@torch.no_grad()
def without_gradients(student, teacher, temperature):
    return forward_kl(student, teacher, temperature)


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        (without_gradients, "without_gradients gave a loss without a gradient, so 'small' would not learn"),
        (
            lambda student, teacher, tau: forward_kl(student, teacher, tau).detach(),
            "<lambda> gave a loss without a grad",
        ),
        (lambda student, teacher, tau: teacher.logsumexp(-1), "<lambda> gave a loss without a gradient"),
        (
            lambda student, teacher: student.sum(-1),
            "<lambda> failed with .* 2 positional arguments but 3 were given.; w",
        ),
        (
            lambda s, t, tau: s.sum("v", 1, 2, 3),
            "<lambda> failed with '.*; wanted a function of the student's logits, the t",
        ),
    ],
)
def test_a_divergence_of_ones_own_that_cannot_teach_is_refused_by_its_edge(divergence, message):
    cohort = Cohort([member("large"), member("small")], [Distillation("large", "small", divergence)])
    with pytest.raises(UserError, match=f"^edge 'large' -> 'small': divergence .*{message}") as refusal:
        cohort.step(0, batch(1))
    assert "\n" not in str(refusal.value)
    assert isinstance(refusal.value.__cause__, TypeError) == ("failed" in message)


def test_a_divergence_needs_no_gradient_where_none_is_asked_for():
    hidden = {name: torch.randn(5, 11) for name in ("a", "b")}
    settings = {"hard_weight": {"a": 0.0, "b": 0.0}, "edges": [Edge("a", "b", divergence=without_gradients)]}
    loss = linear_cohort_loss(hidden, dict.fromkeys("ab"), {}, torch.zeros(5, dtype=torch.int64), **settings)
    assert loss.soft[0] > 0


@pytest.mark.parametrize("given", ["features", "logits"])
def test_features_without_a_gradient_are_refused_unless_what_is_behind_them_is_frozen(given):
    module, _ = small(given)
    function = torch.no_grad()(getattr(module, given))
    own = Predictor.from_module(module, function, *[module.output][: given == "features"], vocabulary=VOCABULARY)
    learner = Member("own", own, SGD(own.parameters(), lr=0.1))
    cohort = Cohort([learner, member("other")])
    with pytest.raises(
        UserError, match=r"^member 'own': its features have no gradient, so model\.words\.weight \("
    ) as said:
        cohort.step(0, batch(1))
    assert "\n" not in str(said.value)
    module.words.requires_grad_(False)
    if given == "features":
        before = module.output.weight.detach().clone()
        cohort.step(0, batch(1))
        assert not torch.equal(module.output.weight, before)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (nn.Identity(), "^output: Identity has no weight; wanted an output embedding of at least 50 rows"),
        (nn.Linear(6, 40), r"^output: Linear has a weight of shape \(40, 6\); wanted"),
        (nn.LayerNorm(6), r"^output: LayerNorm has a weight of shape \(6,\); wanted"),
    ],
)
def test_what_is_no_output_embedding_is_refused(output, message):
    with pytest.raises(UserError, match=message):
        Predictor.from_module(Small(), Small().features, output, vocabulary=VOCABULARY)


def test_an_output_embedding_that_is_no_part_of_its_module_is_refused():
    class Headless(nn.Module):
        def __init__(self, words: nn.Module):
            super().__init__()
            self.words, self.output = words, nn.Linear(6, VOCABULARY)

    head, words = nn.Linear(6, VOCABULARY), nn.Embedding(VOCABULARY, 6)
    module = Headless(words)
    Predictor.from_module(module, lambda *_: None, module.output, vocabulary=VOCABULARY)
    Predictor.from_module(module, lambda *_: None, words, vocabulary=VOCABULARY)
    with pytest.raises(
        UserError, match=r"^output: its weight is none of the parameters of this Headless, .*; make it a"
    ):
        Predictor.from_module(module, lambda *_: None, head, vocabulary=VOCABULARY)
    outside = nn.Linear(6, VOCABULARY)
    outside.weight = words.weight
    with pytest.raises(UserError, match=r"^output: its bias is none of the parameters"):
        Predictor.from_module(module, lambda *_: None, outside, vocabulary=VOCABULARY)


def test_logits_narrower_than_the_vocabulary_are_refused():
    module = Small(40)
    own = Predictor.from_module(module, module.logits, vocabulary=VOCABULARY)
    with pytest.raises(UserError, match=r"^vocabulary: 50, but 'own' has 40 rows; it cannot be padded"):
        Cohort([Member("own", own, SGD(own.parameters(), lr=0.1))]).step(0, batch(1))


def test_the_loss_alone_takes_tensors():
    """For those who have a loop and need nothing but the loss."""
    torch.manual_seed(0)
    hidden = {name: torch.randn(5, 8, requires_grad=True) for name in ("a", "b")}
    weight = {name: torch.randn(11, 8, requires_grad=True) for name in ("a", "b")}
    labels, hard_weight = torch.randint(11, (5,)), {"a": 1.0, "b": 1.0}
    loss = linear_cohort_loss(hidden, weight, {}, labels, hard_weight=hard_weight, edges=[Edge("a", "b")])
    loss.total.backward()
    assert all(tensor.grad is not None for tensor in (*hidden.values(), *weight.values()))


def test_a_model_that_is_not_a_language_model_is_refused():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    with pytest.raises(UserError, match=r"^'vit': no output embedding was found in this ViTModel"):
        Predictor(model, VOCABULARY)
