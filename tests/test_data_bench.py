"""The measurement measures: rates of everything it names, and the process's cores as they were."""

import os

from codistill.bench.data import bench_data
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
