"""Fine-tuning on GLUE-shaped data: it learns what can be learned, repeats itself to the bit, and says what is wrong."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from codistill.cohort import Cohort
from codistill.config import ModelConfig
from codistill.errors import UserError
from codistill.evaluate import finetune
from codistill.evaluate.encode import batch_of, encode, prediction_order, training_order
from codistill.evaluate.finetune import Labelled, Teaching, fine_tune, predict, predictions
from codistill.evaluate.glue import Group, TaskData, _Work, read_task
from codistill.evaluate.run import evaluate
from codistill.evaluate.sequences import SequencePredictor
from codistill.evaluate.server import server_lines
from codistill.evaluate.subjects import load_subject
from codistill.evaluate.tasks import GLUE, Examples, read_split
from codistill.models import new_model
from evaluations import QUICK, WORDS, glue_folder, labelled, model_folder, write

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return glue_folder(tmp_path_factory.mktemp("data"), "sst2", "stsb", "mnli", "wnli")


@pytest.fixture(scope="module")
def subject(folder):
    return load_subject("one", str(folder), CPU)


def tuned(subject, data, name, protocol=QUICK, *, seed=0, label_N=None, edges=(), precision=torch.float32):
    """Predictions on dev of copies of the subject, one a member."""
    task = read_task(data, name)
    train, dev = (
        encode(examples.texts, subject.tokenizer, max_length=32, with_types=False)
        for examples in (task.train, task.predicted[GLUE[name].splits[0]])
    )
    names = sorted({part for edge in edges for part in edge}) or ["one"]
    found = fine_tune(
        dict.fromkeys(names, subject.model),
        Labelled(train, task.train.label_N if label_N is None else label_N),
        GLUE[name].outputs,
        protocol,
        dict.fromkeys(names, protocol.learning_rates[0]),
        seed=seed,
        precision=precision,
        edges=edges,
    )
    return {name: predict(predictor, dev, precision) for name, predictor in found.items()}


def score(data, name, output_NC):
    dev = read_task(data, name).predicted[GLUE[name].splits[0]]
    return GLUE[name].scores(predictions(output_NC), dev.label_N)["score"]


@pytest.mark.parametrize("name", ["sst2", "mnli", "stsb"])
def test_what_can_be_learned_is_learned(subject, data, name):
    longer = replace(QUICK, epochs=9)
    assert score(data, name, tuned(subject, data, name, longer)["one"]) > 0.9


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_shuffled_labels_give_chance(subject, data, name):
    label_N = read_task(data, name).train.label_N
    shuffled = [np.random.default_rng(seed).permutation(label_N) for seed in range(3)]
    found = [score(data, name, tuned(subject, data, name, label_N=one)["one"]) for one in shuffled]
    assert abs(np.mean(found) - {"sst2": 0.5, "stsb": 0}[name]) < 0.2


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_bits(subject, data, precision):
    one, again, other = (tuned(subject, data, "mnli", seed=s, precision=precision)["one"] for s in (7, 7, 8))
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_an_edge_of_weight_0_changes_no_bit_and_another_does(subject, data, name):
    edge = [Teaching("a", "b")]
    alone = tuned(subject, data, name)["one"]
    without = tuned(subject, data, name, replace(QUICK, edge_weight=0.0), edges=edge)
    assert alone.tobytes() == without["a"].tobytes() == without["b"].tobytes()
    # Two copies of one model with one head and the same noise never differ, whoever teaches whom.
    pulled = tuned(subject, data, name, replace(QUICK, edge_weight=5.0), edges=edge)
    np.testing.assert_allclose(pulled["b"], alone, rtol=1e-3, atol=1e-3)


@pytest.fixture
def cohort(monkeypatch):
    """The members and edges that the next fine-tuning trains."""
    given = {}

    class Recorded(Cohort):
        def __init__(self, members, distillation=(), **more):
            given.update(members=members, edges=distillation)
            super().__init__(members, distillation, **more)

    monkeypatch.setattr(finetune, "Cohort", Recorded)
    return given


def test_an_edge_has_the_weight_and_temperature_of_the_protocol(subject, data, cohort):
    edges = [Teaching("a", "b"), Teaching("c", "b")]
    tuned(subject, data, "sst2", replace(QUICK, max_steps=1, edge_weight=2.5, temperature=4.0), edges=edges)
    found = [(edge.teacher, edge.student, edge.weight_at(0), edge.temperature) for edge in cohort["edges"]]
    assert found == [("a", "b", 2.5, 4.0), ("c", "b", 2.5, 4.0)]


def test_clipping_and_weight_decay_are_those_of_the_protocol(subject, data, cohort):
    tuned(subject, data, "sst2", replace(QUICK, max_steps=1, clip=0.25, weight_decay=0.3))
    (member,) = cohort["members"]
    decays = {(p.ndim > 1, group["weight_decay"]) for group in member.optimizer.param_groups for p in group["params"]}
    assert member.clip == 0.25
    assert decays == {(True, 0.3), (False, 0.0)}


def test_only_the_student_is_pulled_and_towards_its_teacher(subject, tmp_path):
    """The teacher stands nearly still, and so does a student that learns far more from it than from the labels."""
    other = load_subject("two", str(model_folder(tmp_path / "two", seed=1)), CPU)
    texts = labelled("sst2", 64, 0)
    encoded = encode([texts["sentence"]], subject.tokenizer, max_length=32, with_types=False)
    train, models = Labelled(encoded, np.array(texts["label"])), {"a": subject.model, "b": other.model}
    ask = {"seed": 0, "precision": torch.float32}

    def outputs(edges):
        strong, rates = replace(QUICK, epochs=5, edge_weight=20.0), {"a": 1e-6, "b": 1e-2}
        found = fine_tune(models, train, 2, strong, rates, edges=edges, **ask)
        return [predict(found[name], encoded, torch.float32) for name in "ab"]

    (a, b), (teacher, student) = outputs([]), outputs([Teaching("a", "b")])
    assert teacher.tobytes() == a.tobytes()
    assert np.abs(student - a).mean() < 0.5 * np.abs(b - a).mean()


def test_the_model_that_is_fine_tuned_stays_as_it_was(folder, subject, data):
    tuned(subject, data, "sst2")
    assert load_subject("one", str(folder), CPU).content == subject.content


# ---- batches -----------------------------------------------------------------------------------


def test_predictions_do_not_depend_on_the_padding(subject, data):
    task = read_task(data, "mnli")
    encoded = encode(task.train.texts, subject.tokenizer, max_length=32, with_types=False)
    found = tuned(subject, data, "mnli")["one"]  # the head that is used below is made by the same seed
    assert found.shape == (80, 3)
    rows = np.arange(len(encoded))
    together = batch_of(encoded, rows, None)
    alone = [batch_of(encoded, rows[i : i + 1], None) for i in range(20)]
    hidden = subject.model.model(**together.inputs).last_hidden_state
    for row, one in enumerate(alone):
        length = one.inputs["input_ids"].shape[1]
        torch.testing.assert_close(
            subject.model.model(**one.inputs).last_hidden_state[0], hidden[row, :length], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("order", [lambda lengths: training_order(lengths, 8, 0, 0), prediction_order])
def test_every_example_is_in_one_batch(order):
    lengths = np.random.default_rng(0).integers(3, 60, size=501)
    batches = list(order(lengths))
    assert sorted(np.concatenate(batches)) == list(range(501))


def test_batches_waste_little_padding():
    lengths = np.random.default_rng(0).geometric(0.05, size=5000).clip(3, 128)
    for batches in (training_order(lengths, 32, 0, 0), prediction_order(lengths)):
        padded = sum(len(rows) * lengths[rows].max() for rows in batches)
        assert padded < 1.1 * lengths.sum()


def test_training_orders_differ_from_epoch_to_epoch():
    one, other = (np.concatenate(training_order(np.ones(99), 8, 0, epoch)) for epoch in (0, 1))
    assert not np.array_equal(one, other)


def test_training_orders_differ_from_seed_to_seed():
    one, other = (np.concatenate(training_order(np.ones(99), 8, seed, 0)) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_the_mean_is_over_the_tokens_of_a_text_and_not_its_padding(subject):
    encoded = encode([["the cat", "the dog sat on a mat and ran"]], subject.tokenizer, max_length=32, with_types=False)
    predictor = SequencePredictor(subject.model, 2, pooling="mean", dropout=0.0, seed=0).eval()
    together, alone = batch_of(encoded, np.arange(2), None), batch_of(encoded, np.arange(1), None)
    assert together.inputs["attention_mask"][0].tolist() == [1, 1, 1, 1] + [0] * (encoded.length_N[1] - 4)
    with torch.no_grad():
        wanted = predictor.head(subject.model.base_model(**alone.inputs).last_hidden_state[0].mean(0))
        found = predictor(together.inputs, together.rows_N)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2"])
def test_a_model_is_told_which_text_a_token_is_of_if_it_asks(family, tmp_path):
    model = load_subject("one", str(model_folder(tmp_path / family, family=family)), CPU).model
    ids, types = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    predictor = SequencePredictor(model, 2, pooling="mean", dropout=0.0, seed=0).eval()
    with torch.no_grad():
        hidden_BTD = model.base_model(ids, **({"token_type_ids": types} if family == "bert" else {})).last_hidden_state
        found = predictor({"input_ids": ids, "token_type_ids": types}, torch.arange(1))
    torch.testing.assert_close(found, predictor.head(hidden_BTD.mean(1)), rtol=1e-4, atol=1e-6)


def test_texts_are_framed_and_cut_at_the_longer_one(subject):
    encoded = encode([["the cat", "good " * 10_000], ["sat", "dog"]], subject.tokenizer, max_length=12, with_types=True)
    ids = [subject.tokenizer.convert_ids_to_tokens(row) for row in encoded.ids]
    assert ids[0] == ["[CLS]", "the", "cat", "[SEP]", "sat", "[SEP]"]
    assert ids[1] == ["[CLS]", *["good"] * 8, "[SEP]", "dog", "[SEP]"]
    assert encoded.types[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert encoded.num_truncated == 1


# ---- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "pooling", "pooled"),
    [
        ("bert", "first", lambda hidden_TD: hidden_TD[0]),
        ("bert", "mean", lambda hidden_TD: hidden_TD.mean(0)),
        ("llama", "last", lambda hidden_TD: hidden_TD[-1]),
    ],
)
def test_a_text_is_pooled_from_its_own_tokens_whatever_stands_behind_it(family, pooling, pooled):
    """The oracle: each text alone through the backbone of Hugging Face, and then the head."""
    config = ModelConfig(family=family, layers=1, width=32, heads=2)
    model = new_model(config, vocabulary=50, length=16, tokenizer=None, seed=0, name="one")
    made = SequencePredictor(model, 3, pooling=pooling, dropout=0.0, seed=0).eval()
    lengths = (9, 4, 1)
    ids_BT = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        found_ND = made({"input_ids": ids_BT, "attention_mask": mask_BT}, torch.arange(3))
        alone = [model.eval().base_model(ids_BT[row : row + 1, :length])[0][0] for row, length in enumerate(lengths)]
        torch.testing.assert_close(found_ND, made.head(torch.stack([pooled(hidden_TD) for hidden_TD in alone])))
        unpadded_ND = made({"input_ids": ids_BT[:1]}, torch.arange(1))
        torch.testing.assert_close(unpadded_ND, found_ND[:1])


def test_edges_of_classes_are_divergences_and_of_numbers_squared_errors(subject, data):
    """One step from the same point: the logged losses, against formulas written out here."""
    from codistill.cohort import Distillation, Member

    for name, divergence in (("mnli", "forward_kl"), ("stsb", "squared_error")):
        train = read_task(data, name).train
        encoded = encode(train.texts, subject.tokenizer, max_length=32, with_types=False)
        made = [
            SequencePredictor(subject.model, GLUE[name].outputs, pooling="mean", dropout=0.0, seed=seed)
            for seed in (1, 2)
        ]
        batch = batch_of(encoded, np.arange(16), train.label_N)
        with torch.no_grad():
            a, b = (p.eval()(batch.inputs, batch.rows_N) @ p.output_weight.T + p.output_bias for p in made)
        members = [
            Member("a", made[0]),
            Member("b", made[1], torch.optim.SGD(made[1].parameters(), lr=0.0), lr=lambda step: 0.0),
        ]
        made[1].backbone.config.attention_dropout = 0.0
        for part in made[1].modules():
            part.p = 0.0 if isinstance(part, torch.nn.Dropout) else getattr(part, "p", None)
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.0
        metrics = Cohort(members, [Distillation("a", "b", divergence)]).step(0, [batch])
        if name == "stsb":
            wanted = ((b - a) ** 2).mean(), ((b[:, 0] - batch.labels_N) ** 2).mean()
        else:
            soft = kl_div(log_softmax(b, -1), log_softmax(a, -1), log_target=True, reduction="batchmean")
            wanted = soft, torch.nn.functional.cross_entropy(b, batch.labels_N)
        torch.testing.assert_close(torch.stack([metrics["b/from_a"], metrics["b/hard"]]), torch.stack(wanted))


def test_numbers_refuse_an_edge_between_distributions():
    from codistill.kernels import Edge, linear_cohort_regression

    hidden = {name: torch.zeros(2, 3) for name in "ab"}
    weight, bias = ({name: torch.zeros(*shape) for name in "ab"} for shape in ((1, 3), (1,)))
    with pytest.raises(UserError, match="use squared_error"):
        linear_cohort_regression(
            hidden, weight, bias, torch.zeros(2), hard_weight={"a": 1.0, "b": 1.0}, edges=[Edge("a", "b")]
        )


def test_the_loss_of_numbers_is_its_equation_with_all_weights_and_gradients():
    from codistill.kernels import Edge, linear_cohort_regression

    torch.manual_seed(0)
    hidden = {"a": torch.randn(5, 3, requires_grad=True), "b": torch.randn(5, 4, requires_grad=True)}
    weight = {name: torch.randn(1, x.shape[1], requires_grad=True) for name, x in hidden.items()}
    bias = {"a": torch.randn(1, requires_grad=True), "b": None}
    labels, rows = torch.randn(5), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    edges = [Edge("a", "b", 3.0, divergence="squared_error"), Edge("b", "a", 0.25, divergence="squared_error")]
    given = {"hard_weight": {"a": 2.0, "b": 0.5}, "edges": edges, "row_weight": rows}
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cohort_regression(hidden, weight, bias, labels, **given)
        part = linear_cohort_regression(hidden, weight, bias, labels, denominator=torch.tensor(9.0), **given)
    a = (hidden["a"] * weight["a"]).sum(1) + bias["a"]
    b = (hidden["b"] * weight["b"]).sum(1)
    mean = lambda errors: (rows * errors.square()).sum() / rows.sum()  # noqa: E731
    hard, soft = {"a": mean(a - labels), "b": mean(b - labels)}, (mean(b - a.detach()), mean(a - b.detach()))
    total = 2.0 * hard["a"] + 0.5 * hard["b"] + 3.0 * soft[0] + 0.25 * soft[1]
    torch.testing.assert_close([loss.total, loss.hard, loss.soft], [total, hard, soft])
    torch.testing.assert_close(part.total, total * rows.sum() / 9)
    learned = [*hidden.values(), *weight.values(), bias["a"]]
    torch.testing.assert_close(torch.autograd.grad(loss.total, learned), torch.autograd.grad(total, learned))


# ---- whole evaluations -------------------------------------------------------------------------


def cells(results):
    return {(c["model"], c["task"], c["seed"]): c for c in results["cells"]}


def test_what_is_known_is_not_computed_again(folder, data, tmp_path, monkeypatch):
    first = evaluate([str(folder)], ["glue/sst2"], tmp_path / "out", data=data, seeds=2, protocol=QUICK)

    def fails(*args, **kwargs):
        raise RuntimeError("computed anew")

    monkeypatch.setattr(sys.modules["codistill.evaluate.glue"], "fine_tune", fails)
    again = evaluate([str(folder)], ["glue/sst2"], tmp_path / "out", data=data, seeds=2, protocol=QUICK)
    assert first == again
    assert not any(cell["failed"] for cell in first["cells"])
    other = evaluate([str(folder)], ["glue/sst2"], tmp_path / "out", data=data, protocol=replace(QUICK, epochs=1))
    assert other["cells"][0]["failed"] == "computed anew"


def test_an_interrupted_evaluation_goes_on(folder, data, tmp_path, monkeypatch):
    from codistill.evaluate import glue

    real, calls = glue.fine_tune, []

    def stopped(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(glue, "fine_tune", stopped)
    ask = {"data": data, "seeds": 3, "protocol": replace(QUICK, epochs=1)}
    with pytest.raises(KeyboardInterrupt):
        evaluate([str(folder)], ["glue/wnli"], tmp_path / "out", **ask)
    evaluate([str(folder)], ["glue/wnli"], tmp_path / "out", **ask)
    assert calls == [0, 1, 1, 2]


def test_a_failed_cell_holds_its_reason_and_no_number(folder, data, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no memory\nleft")

    monkeypatch.setattr(sys.modules["codistill.evaluate.glue"], "fine_tune", fails)
    results = evaluate([str(folder)], ["glue/wnli"], tmp_path / "out", data=data, protocol=QUICK)
    assert cells(results)["one", "glue/wnli", 0] | {"failed": "no memory left", "score": None} == results["cells"][0]
    assert results["comparisons"]["averages"]["one"]["with_wnli"]["mean"] is None
    assert not list((tmp_path / "out" / "cells").iterdir())


def test_a_cohort_reports_the_taught_beside_the_lone(folder, data, tmp_path):
    other = model_folder(tmp_path / "two", seed=1)
    ask = {"data": data, "protocol": QUICK}
    models = [str(folder), str(other)]
    results = evaluate(models, ["glue/sst2"], tmp_path / "out", distill=["one:two", "two:one"], **ask)
    assert {c["model"] for c in results["cells"]} == {"one", "two", "one taught by two", "two taught by one"}
    lone = evaluate([str(other)], ["glue/sst2"], tmp_path / "lone", **ask)
    assert cells(results)["two", "glue/sst2", 0] == cells(lone)["two", "glue/sst2", 0]


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_a_learning_rate_is_chosen_by_a_slice_of_the_training_set(folder, data, tmp_path, checkpoint):
    grid = replace(QUICK, learning_rates=[1e-9, 1e-2], checkpoint=checkpoint)
    results = evaluate([str(folder)], ["glue/sst2"], tmp_path / "out", data=data, seeds=2, protocol=grid)
    assert [cell["counted"]["learning_rate"] for cell in results["cells"]] == [1e-2, 1e-2]
    assert min(cell["score"] for cell in results["cells"]) > 0.8


@pytest.mark.parametrize(
    ("examples", "most", "steps"), [(8, None, 6), (9, None, 9), (12, None, 9), (13, None, 12), (9, 5, 5), (9, 50, 9)]
)
def test_an_epoch_has_a_step_for_the_last_few_examples_too(examples, most, steps):
    from codistill.evaluate.finetune import num_steps

    assert num_steps(examples, replace(QUICK, epochs=3, batch=4, max_steps=most)) == steps


def test_the_best_epoch_is_kept(subject, data):
    from codistill.evaluate.finetune import Best

    seen = iter([0.1, 0.7, 0.3])
    best, kept = Best(lambda predictor: next(seen)), []
    predictor = torch.nn.Linear(2, 2)
    for _ in range(3):
        torch.nn.init.normal_(predictor.weight)
        kept.append(predictor.weight.detach().clone())
        best({"one": predictor})
    best.restore({"one": predictor})
    torch.testing.assert_close(predictor.weight.detach(), kept[1], rtol=0, atol=0)


def test_mismatched_is_predicted_where_present_and_scored_beside(folder, data, tmp_path):
    results = evaluate([str(folder)], ["glue/mnli"], tmp_path / "out", data=data, protocol=QUICK)
    scores = results["cells"][0]["scores"]
    assert scores.keys() == {"accuracy", "accuracy_mismatched"}
    assert results["cells"][0]["score"] == scores["accuracy"]
    assert (tmp_path / "out/predictions/one/seed-0/dev/MNLI-mm.tsv").is_file()


def test_what_choices_are_made_by_is_not_trained_on(subject):
    """Row i has i cats and the label i / 10: a tenth of 40 is kept apart, and every row is in one part."""
    rows = np.arange(1, 41)
    train = Examples((["cat " * row for row in rows], ["dog"] * 40), rows.astype(np.float32) / 10, "here")
    rest, held = _Work(
        Group({"one": subject}), TaskData("stsb", train, {}), replace(QUICK, max_length=64), torch.float32
    )._slices()
    assert (len(rest.encoded), len(held.encoded)) == (36, 4)
    labels = np.concatenate([rest.label_N, held.label_N])
    np.testing.assert_array_equal(np.sort(labels), train.label_N)
    lengths = np.concatenate([rest.encoded.length_N, held.encoded.length_N])
    np.testing.assert_array_equal(lengths, np.round(10 * labels) + 4)  # [CLS] … [SEP] dog [SEP]


def test_each_split_of_mnli_is_scored_with_its_own_predictions_and_labels(subject):
    """3 of 4 and 2 of 4 are right; either split's predictions with the other's labels would be 1 of 4."""
    labels = {"dev_matched": [0, 1, 2, 0], "dev_mismatched": [1, 1, 0, 2]}
    texts = (["cat"] * 4, ["dog"] * 4)
    splits = {split: Examples(texts, np.array(label), "here") for split, label in labels.items()}
    work = _Work(Group({"one": subject}), TaskData("mnli", splits["dev_matched"], splits), QUICK, torch.float32)
    outputs = {"dev_matched": np.eye(3)[[0, 1, 2, 1]], "dev_mismatched": np.eye(3)[[1, 1, 1, 1]]}
    found = work._content(outputs, 1e-2, 1)
    assert found["score"] == 0.75
    assert found["scores"] == {"accuracy": 0.75, "accuracy_mismatched": 0.5}
    assert (found["predictions"], found["labels"]) == ([0, 1, 2, 1], labels["dev_matched"])
    assert found["others"] == {"dev_mismatched": [1, 1, 1, 1]}


def test_a_sample_of_a_task_is_labelled_as_such(folder, data, tmp_path):
    results = evaluate([str(folder)], ["glue/wnli"], tmp_path / "out", data=data, protocol=QUICK)
    assert results["cells"][0]["counted"]["partial"] == {"train": "320 of 635", "dev": "80 of 71"}


# ---- the server's format -----------------------------------------------------------------------


def test_server_files():
    assert server_lines(GLUE["qnli"], [0, 1]) == ["index\tprediction", "0\tentailment", "1\tnot_entailment"]
    spelled = ["0\tentailment", "1\tneutral", "2\tcontradiction"]
    assert server_lines(GLUE["mnli"], [0, 1, 2]) == ["index\tprediction", *spelled]
    assert server_lines(GLUE["cola"], [1]) == ["index\tprediction", "0\t1"]
    assert server_lines(GLUE["stsb"], [5.7, 2.00049]) == ["index\tprediction", "0\t5.000", "1\t2.000"]
    wanted = {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI"}
    assert {task.file for task in GLUE.values()} == wanted


def test_the_test_split_needs_no_labels(folder, tmp_path):
    glue_folder(tmp_path / "data", "rte")
    columns = labelled("rte", 5, 9)
    write(tmp_path / "data/glue/rte/test.parquet", columns | {"label": [-1] * 5})
    evaluate([str(folder)], ["glue/rte"], tmp_path / "out", data=tmp_path / "data", protocol=QUICK)
    lines = (tmp_path / "out/predictions/one/seed-0/test/RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == list("01234")


def test_predictions_are_those_of_the_last_evaluation(folder, data, tmp_path):
    """And what somebody else put there stays."""
    place, ask = tmp_path / "out/predictions", {"data": data, "protocol": replace(QUICK, epochs=1)}

    def written() -> list[str]:
        return sorted(str(file.relative_to(place)) for file in place.rglob("*.*"))

    evaluate([str(folder)], ["glue/wnli,glue/sst2"], tmp_path / "out", seeds=2, **ask)
    assert written() == [f"one/seed-{seed}/dev/{task}.tsv" for seed in (0, 1) for task in ("SST-2", "WNLI")]
    (place / "one/seed-0/dev/mine.tsv").write_text("mine")
    evaluate([str(folder)], ["glue/wnli"], tmp_path / "out", **ask)
    assert written() == ["one/seed-0/dev/WNLI.tsv", "one/seed-0/dev/mine.tsv"]
    assert not (place / "one/seed-1").exists()


# ---- bad input ---------------------------------------------------------------------------------


def other_tasks_run(folder, data, out, task, message, **more):
    """`task` fails with `message` in one line, and wnli has its score all the same."""
    results = evaluate([str(folder)], [task, "glue/wnli"], out, data=data, protocol=QUICK, **more)
    by_task = {cell["task"]: cell for cell in results["cells"]}
    assert message in by_task[task]["failed"]
    assert "\n" not in by_task[task]["failed"]
    assert by_task[task]["score"] is None
    assert by_task["glue/wnli"]["score"] is not None
    return results


def test_an_unknown_task_is_named_with_the_nearest(folder, data, tmp_path):
    results = other_tasks_run(folder, data, tmp_path / "out", "glue/colla", "did you mean glue/cola")
    assert "there is no task 'glue/colla'" in json.dumps(results)
    with pytest.raises(UserError, match="did you mean blimp"):
        evaluate([str(folder)], ["blimpp"], tmp_path / "other", data=data)


def test_a_missing_split(folder, data, tmp_path):
    other_tasks_run(folder, data, tmp_path / "out", "glue/rte", "glue/rte: no train split in")
    write(data / "glue/rte/train.parquet", labelled("rte", 9, 0))
    other_tasks_run(folder, data, tmp_path / "out", "glue/rte", "glue/rte: no dev split in")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentence": None}, "no column 'sentence', only label; glue/sst2 needs it"),
        ({"label": None}, "no column 'label'"),
        ({"label": [0, 2]}, "the label of row 1 is 2; wanted a class from 0 to 1"),
        ({"label": [0, None]}, "the label of row 1 is None"),
        ({"label": [0.5, 1.0]}, "the label of row 0 is 0.5"),
        ({"sentence": ["a", None]}, "'sentence' of row 1 is None; wanted text"),
    ],
)
def test_a_file_that_is_not_the_task(tmp_path, change, message):
    columns = {"sentence": ["the cat", "a dog"], "label": [0, 1]} | change
    write(tmp_path / "glue/sst2/train.parquet", {name: column for name, column in columns.items() if column})
    with pytest.raises(UserError, match=message):
        read_split(tmp_path, "sst2", "train")


@pytest.mark.parametrize("label", [5.5, -0.1, float("nan")])
def test_a_score_out_of_range(tmp_path, label):
    write(tmp_path / "stsb/train.parquet", {"sentence1": ["a"], "sentence2": ["b"], "label": [label]})
    with pytest.raises(UserError, match="wanted a number from 0 to 5"):
        read_split(tmp_path, "stsb", "train")


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.parquet").write_text("sentence,label\n")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_split(tmp_path, "sst2", "train")


def test_the_names_of_the_hub_are_understood(tmp_path):
    write(tmp_path / "sst2/validation-00000-of-00002.parquet", {"sentence": ["a"], "label": [1]})
    write(tmp_path / "sst2/validation-00001-of-00002.parquet", {"sentence": ["b"], "label": [0]})
    write(tmp_path / "sst2/train_extra.parquet", {"sentence": ["c"], "label": [0]})
    assert read_split(tmp_path, "sst2", "dev").texts == (["a", "b"],)
    assert read_split(tmp_path, "sst2", "train") is None


def test_without_a_folder_the_data_comes_from_the_hub_or_not_at_all():
    with pytest.raises(UserError, match="install codistill's extra `data`"):
        read_split(None, "sst2", "train")


def test_an_empty_sentence_is_scored_and_a_long_one_cut_and_counted(folder, tmp_path):
    glue_folder(tmp_path / "data", "sst2")
    columns = labelled("sst2", 40, 3)
    columns["sentence"][:2] = ["", "good " * 10_000]
    write(tmp_path / "data/glue/sst2/dev.parquet", columns)
    results = evaluate([str(folder)], ["glue/sst2"], tmp_path / "out", data=tmp_path / "data", protocol=QUICK)
    assert results["cells"][0]["counted"]["truncated"] == {"train": 0, "dev": 1}
    assert results["cells"][0]["score"] > 0.8


def test_models_of_other_tokenizers_do_not_teach_one_another(folder, data, tmp_path):
    other = model_folder(tmp_path / "two", words=WORDS[::2])
    results = evaluate(
        [str(folder), str(other)], ["glue/wnli"], tmp_path / "out", data=data, distill=["one:two"], protocol=QUICK
    )
    found = {cell["model"]: cell for cell in results["cells"]}
    assert "different tokenizers" in found["one and two"]["failed"]
    assert found["one"]["score"] is not None


@pytest.mark.parametrize(
    ("edge", "message"),
    [("one:three", "'three' is none of the models, one"), ("one", "'' is none"), ("one:one", "cannot teach itself")],
)
def test_an_edge_to_nobody(folder, data, tmp_path, edge, message):
    with pytest.raises(UserError, match=message):
        evaluate([str(folder)], ["glue/wnli"], tmp_path / "out", data=data, distill=[edge])
