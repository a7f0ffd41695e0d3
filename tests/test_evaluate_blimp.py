"""Zero-shot scores against a model run the slow way."""

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import GPT2Config, GPT2LMHeadModel

from codistill.errors import UserError
from codistill.evaluate import zero_shot
from codistill.evaluate.blimp import encode_sentences, likelihoods, read_pairs, score_pairs
from codistill.evaluate.run import evaluate
from codistill.evaluate.subjects import load_subject
from codistill.evaluate.zero_shot import blimp_job, find_text
from codistill.models import Predictor
from codistill.scores import Score
from evaluations import QUICK, model_folder, pairs, sentences, write

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["modernbert", "bert"])
def subject(request, tmp_path_factory):
    place = model_folder(tmp_path_factory.mktemp("models") / request.param, layers=2, family=request.param)
    return load_subject("one", str(place), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "one")


def test_pseudo_log_likelihoods(subject):
    """Each sentence alone, each token masked alone, through the whole model."""
    texts = [*sentences(25, 0), "cat", "cat", "zebra zoo"]
    tokenizer, model = subject.tokenizer, subject.model
    encoded = encode_sentences(texts, tokenizer, is_causal=False, max_length=64)
    found = likelihoods(subject.predictor(), encoded, mask=tokenizer.mask_token_id, precision=torch.float32)
    for text, value in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        total = 0.0
        for place in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                total += log_softmax(model(input_ids=masked).logits[0, place], -1)[ids[0, place]].item()
        assert value == pytest.approx(total, rel=1e-5)


def test_log_likelihoods_of_a_causal_model(folder):
    tokenizer = load_subject("one", str(folder), CPU).tokenizer
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    texts = sentences(20, 0)
    encoded = encode_sentences(texts, tokenizer, is_causal=True, max_length=32)
    found = likelihoods(Predictor(model, 100), encoded, mask=None, precision=torch.float32)
    for text, value in zip(texts, found, strict=True):
        ids = torch.tensor([[tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert value == pytest.approx(-loss * (ids.shape[1] - 1), rel=1e-5)


def test_no_bit_depends_on_the_threads(folder):
    subject = load_subject("one", str(folder), CPU)
    encoded = encode_sentences(sentences(300, 0), subject.tokenizer, is_causal=False, max_length=64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(likelihoods(subject.predictor(), encoded, mask=4, precision=torch.bfloat16))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0].tobytes() == found[1].tobytes()


def test_shares_by_field_and_paradigm_and_ties(tmp_path):
    write(tmp_path / "blimp/test.parquet", pairs(6))
    scores = score_pairs(read_pairs(tmp_path), np.array([1.0, 2, 3, 1, 2, 3]), np.array([0.0, 3, 3, 0, 1, 2]))
    assert scores == {
        "score": 4 / 6,
        "fields": {"semantics": 1.0, "syntax": 0.5},
        "paradigms": {"paradigm 0": 1.0, "paradigm 1": 0.5, "paradigm 2": 0.5},
        "ties": 1,
    }


def test_the_score_is_the_share_of_pairs_whose_good_sentence_is_the_likelier_one(folder, tmp_path, monkeypatch):
    """Of a model to which a word more is less likely: two good sentences are the shorter ones, the third is not, and
    the fourth is as likely as the bad one."""
    good, bad = ["cat", "cat sat", "dog ran far", "cat"], ["the cat sat", "the cat sat on", "dog", "dog"]
    write(tmp_path / "blimp/test.parquet", pairs(4, sentence_good=good, sentence_bad=bad))
    monkeypatch.setattr(
        zero_shot, "likelihoods", lambda predictor, sentences, **more: -np.array([len(ids) for ids in sentences.ids])
    )
    subject = load_subject("one", str(folder), CPU)
    found = blimp_job(subject, read_pairs(tmp_path), None, QUICK, torch.float32).compute(lambda done: None)[0]
    assert found["score"] == found["scores"]["score"] == 2 / 4
    assert found["predictions"] == [1, 1, 0, 0]


def test_a_field_that_is_written_in_two_ways_is_one(tmp_path):
    write(tmp_path / "blimp/test.parquet", pairs(3, field=["syntax", "syntax/semantics", "syntax_semantics"]))
    assert read_pairs(tmp_path).field == ["syntax", "syntax_semantics", "syntax_semantics"]


def test_a_limit_is_a_limit_of_each_paradigm(tmp_path):
    write(tmp_path / "blimp/test.parquet", pairs(20))
    found = read_pairs(tmp_path, 2)
    assert sorted(found.paradigm) == [f"paradigm {i}" for i in (0, 0, 1, 1, 2, 2)]
    assert list(found.good) == sentences(20, 1)[:6]


def test_a_long_sentence_is_cut_and_counted(folder, tmp_path):
    write(tmp_path / "blimp/test.parquet", pairs(3, sentence_bad=["cat " * 10_000, "cat", "dog"]))
    cell = evaluate([str(folder)], ["blimp"], tmp_path / "out", data=tmp_path, protocol=QUICK)["cells"][0]
    assert cell["counted"]["truncated"] == 1
    assert cell["counted"]["pairs"] == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (pairs(3, sentence_bad=["", "cat", "dog"]), "'' has no token, so it has no likelihood"),
        ({"UID": ["a"], "field": ["b"], "sentence_good": ["c"]}, "no column 'sentence_bad'"),
    ],
)
def test_bad_pairs_are_a_failed_cell(folder, tmp_path, columns, message):
    write(tmp_path / "blimp/test.parquet", columns)
    results = evaluate([str(folder)], ["blimp"], tmp_path / "out", data=tmp_path)
    assert message in results["cells"][0]["failed"]
    assert results["cells"][0]["score"] is None


def test_no_pairs_at_all(tmp_path):
    with pytest.raises(UserError, match=r"blimp: give --data DIR, a folder with blimp/\*\.parquet"):
        read_pairs(tmp_path)


# ---- held-out text -----------------------------------------------------------------------------


def test_held_out_text_scores_as_in_training(folder, text, tmp_path):
    from codistill.data.batches import held_out
    from codistill.data.prepare import cached
    from codistill.data.tokenizers import tokenizer_hash
    from codistill.objectives import MaskedLM
    from codistill.scores import held_out as score

    subject = load_subject("one", str(folder), CPU)
    corpus = cached([str(text)], subject.tokenizer)
    batches = held_out(corpus, MaskedLM(0.15), length=32, sequences=64, seed=0)
    wanted = score(subject.predictor(), batches, torch.float32)
    cell = evaluate([str(folder)], ["mlm"], tmp_path / "out", text=[str(text)], protocol=QUICK)["cells"][0]
    assert cell["score"] == pytest.approx(wanted.loss, rel=1e-2)  # which bfloat16 is allowed
    assert cell["scores"]["perplexity"] == pytest.approx(np.exp(cell["score"]))
    assert cell["counted"]["rows"] == wanted.rows
    how = {"tokens_a_row": 32, "objective": "mlm", "tokenizer": tokenizer_hash(subject.tokenizer), "column": "text"}
    assert cell["counted"]["scored_as"] == how


def test_every_predicted_token_counts_alike_whatever_source_it_is_of():
    """30 tokens at a loss of 1 and 10 at 3: 60 / 40; their accuracies 0.2 and 0.6: 12 / 40."""
    found = zero_shot._summary({"a/test.txt": Score(1.0, 0.2, 30), "b/test.txt": Score(3.0, 0.6, 10)}, {})
    assert found["score"] == pytest.approx(1.5)
    assert found["scores"] == pytest.approx({"loss": 1.5, "perplexity": np.exp(1.5), "accuracy": 0.3})
    assert found["counted"]["rows"] == 40


def test_the_text_is_what_is_named_or_the_test_files(tmp_path):
    write(tmp_path / "text/one/test.parquet", {"text": ["a"]})
    write(tmp_path / "text/one/train.parquet", {"text": ["a"]})
    assert find_text([], tmp_path) == [str(tmp_path / "text/one/test.parquet")]
    assert find_text(["mine.txt"], tmp_path) == ["mine.txt"]
    with pytest.raises(UserError, match="name some with --text"):
        find_text([], None)
