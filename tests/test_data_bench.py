"""The measurement measures: rates of everything it names, and the process's cores as they were."""

import os

import pytest

from codistill.bench.data import bench_data
from codistill.errors import UserError
from data_examples import documents, vocabulary_file


def test_every_rate_is_there(tmp_path):
    for i, text in enumerate(documents(300, words=200)):
        (tmp_path / f"{i}.txt").write_text(text)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    rows = bench_data([f"{tmp_path}/[0-9]*.txt"], str(vocabulary_file(tmp_path)), seconds=0.01)
    assert [(row["what"], row["cores"]) for row in rows[:4]] == [
        ("tokenizers.encode_batch", 1),
        ("tokenizers.encode_batch_fast", 1),
        ("prepare", 1),
        ("prepare", 2),
    ]
    assert rows[0]["ratio"] == 1
    assert len(rows) == 9
    assert all(row["tokens_per_second"] > 0 for row in rows)
    if cores:
        assert os.sched_getaffinity(0) == cores


def test_few_documents_make_smaller_batches_of_one_a_row(tmp_path):
    """30 long documents: hundreds of rows of running text, and 30 of a document each."""
    for i, text in enumerate(documents(30, words=600)):
        (tmp_path / f"{i}.txt").write_text(text)
    rows = bench_data([f"{tmp_path}/[0-9]*.txt"], str(vocabulary_file(tmp_path)), length=16, seconds=0.01)
    assert [row["what"] for row in rows[4:]] == [
        "batches",
        "batches, whole words",
        "batches, within documents",
        "batches, padded, 30 rows",
        "batches, prefetched",
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_text_without_a_row_is_refused_by_the_name_of_the_argument(tmp_path):
    (tmp_path / "0.txt").write_text("the cat sat")
    text, tokenizer = [str(tmp_path / "0.txt")], str(vocabulary_file(tmp_path))
    with pytest.raises(UserError, match=r"^--length 100: the text has only 4 tokens; lower it, or give more text$"):
        bench_data(text, tokenizer, length=100)
    with pytest.raises(UserError, match=r"^--length 1: wanted at least 8 tokens"):
        bench_data(text, tokenizer, length=1)
