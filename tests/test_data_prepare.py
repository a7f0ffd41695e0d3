"""Preparation: the tokens are the tokenizer's own, any number of processes and any kill give the same bytes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from codistill.data import encode, shards
from codistill.data.batches import Batches
from codistill.data.corpus import Corpus
from codistill.data.prepare import Progress, cache_folder, cached, prepare
from codistill.data.tokenizers import load_tokenizer, tokenizer_hash
from codistill.errors import MachineError, UserError
from codistill.objectives import CausalLM
from data_examples import VOCABULARY, documents, files_of, prose, vocabulary_file

SEP = VOCABULARY.index("[SEP]")


@pytest.fixture
def vocabulary(tmp_path):
    return str(vocabulary_file(tmp_path))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": [*documents(150), "", "  "]}), path)
    return str(path)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(encode, "BLOCK_CHARACTERS", 1000)


def expected_tokens(texts, vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    return [i for text in texts for i in [*tokenizer(text, add_special_tokens=False).input_ids, SEP]]


def test_tokens_are_the_tokenizers_own(source, vocabulary, tmp_path, small_shards):
    corpus = prepare([source], vocabulary, tmp_path / "out")
    texts = documents(150)
    assert corpus.tokens.tolist() == expected_tokens(texts, vocabulary)
    assert len(corpus.shards) > 2
    assert (corpus.num_documents, corpus.num_units, corpus.num_tokens) == (150, 150, corpus.tokens.size)
    assert corpus.manifest["counts"] == {"documents_read": 152, "empty": 2, "replaced_utf8": 0}
    assert corpus.tokenizer_hash == tokenizer_hash(load_tokenizer(vocabulary))
    starts = np.cumsum([0, *map(len, corpus.shards)])
    ends = np.concatenate([e + s for e, s in zip(corpus.document_ends, starts, strict=False)])
    assert (corpus.tokens[ends - 1] == SEP).all()
    assert ends.size == (corpus.tokens == SEP).sum() == 150
    tokenizer = corpus.tokenizer()
    third = corpus.tokens[ends[1] : ends[2] - 1]
    assert tokenizer.decode(third) == tokenizer.decode(tokenizer(texts[2], add_special_tokens=False).input_ids)


def test_unigram_counts(source, vocabulary, tmp_path, small_shards):
    corpus = prepare([source], vocabulary, tmp_path / "out")
    counts = corpus.unigram_counts()
    assert counts.shape == (len(VOCABULARY),)
    assert counts.tolist() == [int((corpus.tokens == i).sum()) for i in range(len(VOCABULARY))]


def test_a_long_document_is_the_same_as_in_one_piece(vocabulary, tmp_path):
    text = "\n".join(prose(300, i) for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    corpus = prepare([str(tmp_path / "a.txt")], vocabulary, tmp_path / "out")
    assert corpus.tokens.tolist() == expected_tokens([text], vocabulary)
    assert corpus.num_documents == 1


def test_byte_level_text_comes_back_whole(tmp_path):
    text = "\n".join(prose(300, i) for i in range(200)) + " ünï\n\n  end"
    (tmp_path / "a.txt").write_text(text)
    corpus = prepare([str(tmp_path / "a.txt")], "train:bpe:400", tmp_path / "out")
    tokenizer = corpus.tokenizer()
    assert tokenizer.decode(corpus.tokens[:-1]) == text
    assert corpus.tokens[:-1].tolist() == tokenizer(text, add_special_tokens=False).input_ids


def test_processes_change_no_byte(source, vocabulary, tmp_path, small_shards):
    for processes in (1, 3):
        prepare([source], vocabulary, tmp_path / f"out{processes}", held_out=0.2, processes=processes)
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out3")


def test_units_and_held_out_documents(source, vocabulary, tmp_path):
    corpus = prepare([source], vocabulary, tmp_path / "out", unit="sentence", held_out=0.2)
    apart = corpus.held_out()
    assert corpus.num_documents + apart.num_documents == 150
    assert 10 < apart.num_documents < 55
    assert corpus.num_units == sum(int((s == SEP).sum()) for s in corpus.shards) > corpus.num_documents
    with pytest.raises(UserError, match="--held-out"):
        apart.held_out()


def test_one_sentence_of_four(source, vocabulary, tmp_path):
    every = prepare([source], vocabulary, tmp_path / "a", unit="sentence")
    fourth = prepare([source], vocabulary, tmp_path / "b", unit="sentence", keep_every=4)
    starts = [0, *every.unit_ends[0].tolist()]
    kept = [every.tokens[starts[i] : starts[i + 1]] for i in range(0, every.num_units, 4)]
    assert fourth.tokens.tolist() == np.concatenate(kept).tolist()


def test_cache_is_keyed_by_content(source, vocabulary, tmp_path, monkeypatch):
    first = cached([source], vocabulary, cache=tmp_path / "cache")
    assert first.folder.is_relative_to(tmp_path / "cache")
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(Path(source).read_bytes())
    monkeypatch.setattr("codistill.data.prepare._fill", lambda *_: pytest.fail("prepared again"))
    assert cached([str(moved)], load_tokenizer(vocabulary), cache=tmp_path / "cache").folder == first.folder
    monkeypatch.undo()
    (tmp_path / "other.txt").write_text("the cat")
    assert cached([str(moved), str(tmp_path / "other.txt")], vocabulary, cache=tmp_path / "cache").num_documents == 151
    assert cached([str(moved)], vocabulary, unit="sentence", cache=tmp_path / "cache").folder != first.folder


def test_cached_opens_a_prepared_folder(source, vocabulary, tmp_path):
    prepare([source], vocabulary, tmp_path / "out")
    assert cached([str(tmp_path / "out")], vocabulary).folder == tmp_path / "out"
    (tmp_path / "other.txt").write_text("\n".join([*VOCABULARY, "more"]))
    with pytest.raises(UserError, match=r"prepared with the tokenizer vocab, but .*other\.txt has another"):
        cached([str(tmp_path / "out")], str(tmp_path / "other.txt"))


def with_roles(folder, vocabulary, **roles):
    """A tokenizer folder with this vocabulary and other tokens for what begins, ends and fills."""
    backend = load_tokenizer(vocabulary).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **roles).save_pretrained(folder)
    return str(folder)


def test_tokenizers_that_share_a_corpus_begin_and_fill_rows_each_with_its_own_token(source, vocabulary, tmp_path):
    """One cache, three tokenizers of one vocabulary: what was prepared for the first is read with the one named."""
    roles = [{"bos_token": "[CLS]"}, {"bos_token": "[MASK]", "pad_token": "[PAD]"}, {}]
    folders = [with_roles(tmp_path / str(n), vocabulary, eos_token="[SEP]", **more) for n, more in enumerate(roles)]
    made = [cached([source], folder, cache=tmp_path / "cache") for folder in folders]
    assert len({corpus.folder for corpus in made}) == 1
    begin = [Batches(c, CausalLM(), length=16, sequences=4).at(0)[0].inputs["input_ids"][:, 0].tolist() for c in made]
    assert begin[0] == [VOCABULARY.index("[CLS]")] * 4
    assert begin[1] == [VOCABULARY.index("[MASK]")] * 4
    assert len(set(begin[2])) > 1  # it has none, so rows begin with text
    assert [corpus.tokenizer().pad_token for corpus in made] == [None, "[PAD]", None]


def test_a_prepared_folder_whose_texts_end_with_another_token_is_refused(source, vocabulary, tmp_path):
    prepare([source], vocabulary, tmp_path / "out")
    other = with_roles(tmp_path / "other", vocabulary, eos_token="[CLS]")
    with pytest.raises(UserError, match=r"its texts end with '\[SEP\]', but those of .*other with '\[CLS\]'"):
        cached([str(tmp_path / "out")], other)


def test_a_cache_that_cannot_be_written_is_one_clear_error(source, vocabulary, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(MachineError, match=r"cache/corpora/.*: cannot be written \(Not a directory\)"):
        cached([source], vocabulary, cache=tmp_path / "cache")


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("CODISTILL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/codistill")
    monkeypatch.setenv("CODISTILL_CACHE", "/y")
    assert cache_folder() == Path("/y")


def test_progress_reaches_the_end(source, vocabulary, tmp_path, small_shards):
    seen: list[Progress] = []
    again = shutil.copy(source, tmp_path / f"again-{Path(source).name}")
    corpus = prepare([source, again], vocabulary, tmp_path / "out", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == 2 * Path(source).stat().st_size
    assert (seen[-1].tokens, seen[-1].documents) == (corpus.num_tokens, corpus.num_documents)
    assert seen[-1].tokens_per_second > 0


def test_other_folders_are_never_overwritten(source, vocabulary, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="mine: exists and is no prepared text"):
        prepare([source], vocabulary, tmp_path / "mine")
    prepare([source], vocabulary, tmp_path / "out")
    before = files_of(tmp_path / "out")
    prepare([source], vocabulary, tmp_path / "out")
    with pytest.raises(UserError, match="other sources or settings"):
        prepare([source], vocabulary, tmp_path / "out", unit="sentence")
    assert files_of(tmp_path / "out") == before
    assert files_of(tmp_path / "mine") == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "word"}, "there are document, paragraph, sentence"),
        ({"bad_utf8": "ignore"}, "there are refuse, replace"),
        ({"keep_every": 0}, "at least 1"),
        ({"held_out": 1.0}, "below 1"),
    ],
)
def test_bad_settings(options, message, source, vocabulary, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare([source], vocabulary, tmp_path / "out", **options)


def test_no_text_leaves_no_folder(vocabulary, tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    for tokenizer in (vocabulary, "train:wordpiece:300", "train:bpe:300"):
        with pytest.raises(UserError, match="no text found"):
            prepare([str(tmp_path / "a.txt")], tokenizer, tmp_path / "out")
    (tmp_path / "b.txt").write_text("the cat")
    with pytest.raises(UserError, match="fell into that part"):
        prepare([str(tmp_path / "b.txt")], vocabulary, tmp_path / "out", held_out=1e-9)
    assert not (tmp_path / "out").exists()


def test_bad_input_in_the_middle_leaves_no_folder(vocabulary, tmp_path, small_shards):
    lines = [json.dumps({"text": text}) for text in documents(100)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken"]))
    for processes in (1, 2):
        with pytest.raises(UserError, match="line 101: not JSON"):
            prepare([str(tmp_path / "a.jsonl")], vocabulary, tmp_path / "out", processes=processes)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("messages", [0, 2])
def test_a_dead_worker_is_one_clear_error(messages, source, vocabulary, tmp_path, small_shards, monkeypatch):
    program = tmp_path / "dies"
    loads = "; ".join(["import pickle, sys", *["pickle.load(sys.stdin.buffer)"] * messages, "sys.exit(3)"])
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{loads}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(MachineError, match=r"a worker process died \(exit status 3\)"):
        prepare([source], vocabulary, tmp_path / "out", processes=2)


def test_ids_outside_the_vocabulary(source, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr("codistill.data.tokenizers.vocabulary_size", lambda tokenizer: 20)
    with pytest.raises(UserError, match="its vocabulary has 20"):
        prepare([source], vocabulary, tmp_path / "out")


# Killed, full, and at the same time. Each scene runs in processes of its own.

SCENE = """
import os, signal, sys, json
sys.path[:] = json.loads({path!r})
from codistill.data import encode, shards
from codistill.data.batches import Batches
from codistill.data.prepare import prepare
shards.SHARD_TOKENS, encode.BLOCK_CHARACTERS = 3000, 1000
def run(out={out!r}, **options):
    return prepare([{source!r}], {vocabulary!r}, out, held_out=0.2, **options)
"""

KILLED = """
before = [0]
def counting(until):
    def step(*args):
        before[0] += 1
        if before[0] == until:
            os.kill(os.getpid(), signal.SIGKILL)
    return step
def child(until):
    if os.fork() == 0:
        step = counting(until)
        real = os.fsync
        os.fsync = lambda number: (step(), real(number))
        run(progress=step)
        os._exit(0)
    return os.wait()[1]
run(out={out!r} + "-whole")
until, deaths = 1, 0
while child(until):
    assert not os.path.exists({out!r}), "a killed run left a folder that looks complete"
    until, deaths = until + 13, deaths + 1
print(deaths)
"""


def play(scene, source, vocabulary, out):
    names = {"path": json.dumps(sys.path), "source": source, "vocabulary": vocabulary, "out": str(out)}
    code = (SCENE + scene).format(**names)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(source, vocabulary, tmp_path):
    deaths = play(KILLED, source, vocabulary, tmp_path / "killed")
    assert int(deaths) > 3
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "killed-whole")
    assert not (tmp_path / ".killed.partial").exists()


def test_finished_shards_are_not_encoded_again(source, vocabulary, tmp_path, small_shards, monkeypatch):
    class Stop(Exception):
        pass

    def stop_late(progress):
        if progress.tokens > 7000:
            raise Stop

    with pytest.raises(Stop):
        prepare([source], vocabulary, tmp_path / "out", progress=stop_late)
    encoded = []
    real = encode.encode_block
    monkeypatch.setattr(encode, "encode_block", lambda *args: encoded.append(real(*args)) or encoded[-1])
    corpus = prepare([source], vocabulary, tmp_path / "out")
    assert sum(block.tokens.size for block in encoded) == corpus.num_tokens - sum(map(len, corpus.shards[:2]))
    assert corpus.tokens.tolist() == expected_tokens(documents(150), vocabulary)


def test_damaged_work_is_done_again(source, vocabulary, tmp_path, small_shards):
    def stop_late(progress):
        if progress.tokens > 7000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], vocabulary, tmp_path / "out", progress=stop_late)
    first = tmp_path / ".out.partial" / "corpus" / "tokens-00000.bin"
    first.write_bytes(first.read_bytes()[::-1])
    assert prepare([source], vocabulary, tmp_path / "out").tokens.tolist() == expected_tokens(
        documents(150), vocabulary
    )


def test_a_full_disk_is_one_clear_error_and_work_goes_on(source, vocabulary, tmp_path, small_shards):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(MachineError, match=r"tokens-00000\.bin: cannot be written \(File too large\)"):
            prepare([source], vocabulary, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert prepare([source], vocabulary, tmp_path / "out").num_documents == 150


TOGETHER = """
from codistill.data import prepare as room
fills, real = [], room._fill
room._fill = lambda *args: fills.append(1) or real(*args)
def tell():
    run()
    os.write(1, str(len(fills)).encode() + bytes([10]))
if os.fork() == 0:
    tell()
    os._exit(0)
tell()
assert os.wait()[1] == 0
run(out={out!r} + "-alone")
"""


def test_two_at_the_same_time_make_one(source, vocabulary, tmp_path):
    fills = play(TOGETHER, source, vocabulary, tmp_path / "out")
    assert sorted(fills.split()) == ["0", "1"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "out-alone")


# The finished folder


def test_damage_is_found_when_a_corpus_is_opened(source, vocabulary, tmp_path):
    out = tmp_path / "out"
    prepare([source], vocabulary, out)
    path = out / "tokens-00000.bin"
    good, times = path.read_bytes(), path.stat()
    path.write_bytes(good[:-2])
    with pytest.raises(UserError, match=r"tokens-00000\.bin: \d+ bytes, the manifest says"):
        Corpus.open(out)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"tokens-00000\.bin: its SHA-256 is not"):
        Corpus.open(out)
    path.write_bytes(good)
    Corpus.open(out)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    Corpus.open(out)
    path.unlink()
    with pytest.raises(UserError, match=r"tokens-00000\.bin: missing"):
        Corpus.open(out)


def test_what_was_verified_is_not_hashed_again(source, vocabulary, tmp_path, monkeypatch):
    prepare([source], vocabulary, tmp_path / "out")
    monkeypatch.setattr("codistill.data.corpus.hash_file", lambda path: pytest.fail("hashed again"))
    Corpus.open(tmp_path / "out")


def test_ids_outside_the_vocabulary_in_a_foreign_shard(source, vocabulary, tmp_path):
    out = tmp_path / "out"
    prepare([source], vocabulary, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["tokenizer"]["vocabulary"] = 30
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / ".verified").unlink()
    with pytest.raises(UserError, match=r"tokens-00000\.bin: holds the id \d+, but the vocabulary has 30"):
        Corpus.open(out)


def test_folders_that_are_no_corpus(tmp_path):
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        Corpus.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": ')
    with pytest.raises(UserError, match="damaged"):
        Corpus.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="format 'other', expected"):
        Corpus.open(tmp_path)
