"""How a run's text becomes its rows: columns, units, packing. Oracles: the tokenizer itself, and transformers' loss."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from codistill.build import build
from codistill.data.prepare import prepare
from codistill.data.tokenizers import load_tokenizer, train_tokenizer
from codistill.distributed import ALONE
from codistill.errors import UserError
from codistill.plan import plan
from codistill.texts import batches_of, corpora
from codistill.train import Stopped, train
from runs import assert_same_run, refused, small_run

CPU = torch.device("cpu")
DOCUMENTS = 60


@pytest.fixture
def sentences(text, tmp_path) -> tuple[Path, list[str]]:
    """A .jsonl file whose column `body` holds documents of two sentences each, and the sentences."""
    found = [f"{words.strip().capitalize()}." for words in text.read_text().split(". ")[: 2 * DOCUMENTS]]
    rows = [{"id": n, "body": f"{one} {two}"} for n, (one, two) in enumerate(zip(found[::2], found[1::2], strict=True))]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file, found


def by_sentence(file: Path, *more: str, recipe: str = "standalone"):
    settings = ["data.column=body", "data.unit=sentence", "data.packing=padded", "data.length=24", "precision=float32"]
    return small_run(recipe, file, *settings, *more)


def texts_of(batch) -> set[tuple[int, ...]]:
    """The rows of a batch as they were before masking, without padding."""
    ids = batch.inputs["input_ids"].clone()
    ids.view(-1)[batch.rows_N] = batch.labels_N
    mask = batch.inputs["attention_mask"]
    return {tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)}


def test_a_row_is_one_sentence_of_the_column(sentences):
    file, wanted = sentences
    built = build(by_sentence(file), CPU)
    expected = {tuple(built.tokenizer(sentence)["input_ids"]) for sentence in wanted}
    assert built.batches.num_rows == len(wanted)
    steps = range(len(wanted) // 8)
    seen = set().union(*(texts_of(batch) for step in steps for batch in built.batches.at(step)))
    assert seen == expected
    assert set().union(*map(texts_of, built.held_out)) <= expected


def test_raw_text_that_is_scored_on_is_cut_as_the_prepared_text_is(sentences, tmp_path):
    file, wanted = sentences
    prepare([str(file)], "train:wordpiece:300", tmp_path / "prepared", column="body", unit="sentence")
    prepared = [f"data.train=[{tmp_path / 'prepared'}]", "data.tokenizer=null", "data.unit=document"]
    _, score_on = corpora(by_sentence(file, *prepared), ALONE)
    assert sum(len(ends) for ends in score_on.unit_ends) == len(wanted)


def test_what_is_asked_of_held_out_text_depends_on_the_seed_and_the_text_does_not(sentences):
    file, _ = sentences
    one, again, other = (build(by_sentence(file, f"seed={seed}"), CPU).held_out for seed in (1, 1, 2))
    assert all(torch.equal(a.rows_N, b.rows_N) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a.rows_N, b.rows_N) for a, b in zip(one, other, strict=True))
    assert list(map(texts_of, one)) == list(map(texts_of, other))


def test_one_unit_of_every_four_is_trained_on_and_all_are_scored_on(sentences):
    file, wanted = sentences
    train_on, score_on = corpora(by_sentence(file, "data.keep_every=4"), ALONE)
    assert (train_on.num_units, score_on.num_units) == (len(wanted) // 4, len(wanted))


def test_whole_words_are_masked_or_left(sentences):
    """Every piece of a word that has a masked piece is masked too."""
    file, _ = sentences
    run = by_sentence(file, "objective.whole_word=true", "data.tokenizer=train:wordpiece:64", "data.length=64")
    built, pieces = build(run, CPU), 0
    vocabulary = built.tokenizer.convert_ids_to_tokens(range(len(built.tokenizer)))
    for batch in (batch for step in range(8) for batch in built.batches.at(step)):
        ids = batch.inputs["input_ids"].clone()
        ids.view(-1)[batch.rows_N] = batch.labels_N
        chosen = torch.zeros(ids.numel(), dtype=torch.bool)
        chosen[batch.rows_N[batch.row_weight_N > 0]] = True
        goes_on = torch.tensor([vocabulary[token].startswith("##") for token in ids.flatten()])
        assert torch.equal(chosen[1:][goes_on[1:]], chosen[:-1][goes_on[1:]])
        pieces += int((chosen & goes_on).sum())
    assert pieces > 20


def test_a_run_over_padded_rows_is_scored_as_transformers_scores_them_and_resumes(sentences, tmp_path):
    run = by_sentence(sentences[0], recipe="ctcd")
    straight, out = train(run, tmp_path / "straight"), tmp_path / "run"
    with pytest.raises(Stopped):
        train(run, out, stop_at=10)
    assert_same_run(straight, train(run, out, resume=True))
    results = json.loads((straight / "results.json").read_text())
    built, total, rows = build(run, CPU), 0.0, 0.0
    model = AutoModelForMaskedLM.from_pretrained(straight / "members" / "small").eval()
    for batch in built.held_out:
        kept = batch.row_weight_N > 0
        labels = torch.full(batch.inputs["input_ids"].shape, -100)
        labels.view(-1)[batch.rows_N[kept]] = batch.labels_N[kept]
        with torch.no_grad():
            total += float(model(**batch.inputs, labels=labels).loss) * int(kept.sum())
        rows += int(kept.sum())
    assert results["held_out"]["rows"] == rows
    assert results["members"]["small"]["loss"] == pytest.approx(total / rows, abs=1e-5)


def test_padding_changes_no_causal_loss(sentences):
    """A row of one sentence in the company of padding: the rows of weight 1 are those of the sentence."""
    run = by_sentence(sentences[0], recipe="standalone-clm")
    batches = batches_of(run, corpora(run, ALONE)[0])
    for batch in batches.at(0):
        weight = batch.row_weight_N.view(len(batch.lengths_B), -1)
        assert torch.equal(weight.sum(1).long(), batch.lengths_B - 1)


def test_what_padded_rows_cut_off_is_told(text, tmp_path, capsys):
    """The prose is one document: of its tokens 31 stand behind [CLS] in the only row."""
    run = small_run("standalone", text, "data.packing=padded", "batch={sequences: 1}", "evaluate.sequences=1")
    train_on, _ = corpora(run, ALONE)
    assert f"{1 - 31 / train_on.num_tokens:.1%} of the training text is not used" in capsys.readouterr().err


def test_text_that_the_tokenizer_does_not_know_is_told(text, tmp_path, capsys):
    """A tokenizer of English on Russian: every word is [UNK], and the separators are not."""
    folder = tmp_path / "tokenizer"
    train_tokenizer("wordpiece", 300, [text.read_text()]).save_pretrained(folder)
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("\n\n".join(["кошка сидит на ковре и смотрит на собаку"] * 60))
    corpora(small_run("standalone", text, f"data.tokenizer={folder}"), ALONE)
    assert "[UNK]" not in capsys.readouterr().err
    run = small_run("standalone", foreign, f"data.tokenizer={folder}")
    found = corpora(run, ALONE)
    told = capsys.readouterr().err
    for part, corpus in zip(("train", "validation"), found, strict=True):
        known = corpus.tokens != load_tokenizer(folder).unk_token_id
        assert f"data.{part}: {1 - known.mean():.1%} of its tokens are [UNK]" in told
        assert known.mean() < 0.2


def test_a_prepared_folder_of_other_units_is_refused(sentences, tmp_path):
    folder = tmp_path / "prepared"
    prepare([str(sentences[0])], "train:wordpiece:200", folder, column="body")
    refused(
        r"data.unit sentence: .*prepared was prepared with unit document; prepare it anew with sentence, or leave",
        by_sentence(folder, "data.tokenizer=null"),
        tmp_path / "run",
    )
    refused(
        r"with a tokenizer of its own; use that with --set data.tokenizer=null", by_sentence(folder), tmp_path / "run"
    )
    left_out = small_run("standalone", folder, "data.tokenizer=null")
    assert corpora(left_out, ALONE)[0].folder == folder


def test_the_plan_counts_the_passes_that_the_run_counts(sentences, tmp_path):
    """Of a prepared folder, whose tokenizer both take, in rows that are padded."""
    folder = tmp_path / "prepared"
    prepare([str(sentences[0])], "train:wordpiece:200", folder, column="body", unit="sentence")
    settings = ["data.packing=padded", "data.tokenizer=null", "data.length=24", "precision=float32"]
    run = small_run("standalone", folder, *settings)
    results = json.loads((train(run, tmp_path / "run") / "results.json").read_text())
    assert plan(run, CPU).passes == pytest.approx(results["passes"], abs=1e-3)
    assert results["passes"] == pytest.approx(20 * 8 / (2 * DOCUMENTS), abs=1e-3)


def test_what_is_no_packing_or_unit_is_refused(text):
    for setting in ("data.packing=tight", "data.unit=page", "data.keep_every=0", "objective.whole_word=2"):
        with pytest.raises(UserError, match=rf"^{setting.split('=')[0]}: "):
            small_run("standalone", text, setting)
