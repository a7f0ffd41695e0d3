"""Files that appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from codistill.files import write_file


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_file(file, "old")

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", no_space)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            write_file(file, b"new")
    assert [place.name for place in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_file(file, b"new")
    assert file.read_text() == "new"
