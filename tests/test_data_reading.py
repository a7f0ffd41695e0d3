"""Sources, documents and units: every format gives the same text, bad input names file and place."""

import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill.data import documents as reading_room
from codistill.data.builtin import builtin_documents
from codistill.data.documents import PIECE, Reading, cut_point, read_source
from codistill.data.sources import find_sources, fingerprint
from codistill.data.units import Selection, fragments, sentences
from codistill.errors import UserError
from data_examples import documents, prose


def texts_of(name, **options):
    """Whole documents of one source."""
    found, held = [], ""
    for piece in read_source(find_sources([str(name)])[0], Reading(**options)):
        held += piece.text
        if piece.last:
            found.append(held)
            held = ""
    assert held == ""
    return found


def write_zst(path, content):
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(content)


def jsonl(texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)).encode()


@pytest.fixture
def texts():
    return [*documents(20), "línes\nand “quotes” ☃ 😀", "x"]


def test_every_row_format_gives_the_same_documents(texts, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    write_zst(tmp_path / "a.jsonl.zst", jsonl(texts))
    pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), tmp_path / "a.parquet", row_group_size=7)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert texts_of(tmp_path / name) == texts, name


def test_a_text_file_is_one_document_however_long(tmp_path):
    text = "\n\n".join(prose(400, i) + " é☃" for i in range(400))
    assert len(text) > 4 * PIECE
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert texts_of(tmp_path / "a.txt") == texts_of(tmp_path / "a.txt.gz") == [text]
    sizes = [len(piece.text) for piece in read_source(find_sources([tmp_path / "a.txt"])[0], Reading())]
    assert max(sizes) <= PIECE


def test_a_line_without_blanks_is_cut_between_characters(tmp_path):
    text = "☃" * 200_000
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt") == [text]


@settings(max_examples=200, deadline=None)
@given(st.text("ab. \n☃é", min_size=30, max_size=60))
def test_cuts_fall_between_characters(text):
    raw = text.encode()
    cut = cut_point(raw + b"." * 20, 3, 20)
    assert 3 < cut <= 23
    if raw[:3].decode(errors="ignore").encode() == raw[:3]:
        raw[:cut].decode()


def test_folders_and_globs_are_sorted(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "b/a.jsonl", "a.txt", "note.md"):
        (tmp_path / name).write_text("{}")
    names = [source.name.removeprefix(f"{tmp_path}/") for source in find_sources([str(tmp_path)])]
    assert names == ["a.txt", "b/a.jsonl", "z.txt"]
    assert [source.path.name for source in find_sources([f"{tmp_path}/*.txt"])] == ["a.txt", "z.txt"]
    assert [source.path.name for source in find_sources([f"{tmp_path}/**/*.jsonl"])] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.txt", "no such file"),
        ("no/*.txt", "no such file"),
        ("empty", "holds no .txt"),
        ("a.doc", "unknown kind"),
        ("builtin:perl", "there are builtin:python"),
    ],
)
def test_missing_sources(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match=message) as caught:
        find_sources([name])
    assert name in str(caught.value)


def test_no_source_at_all():
    with pytest.raises(UserError, match="no source was named"):
        find_sources([])


def test_fingerprints_of_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = find_sources([path])[0]
    first = fingerprint(source, tmp_path / "memory")
    monkeypatch.setattr("codistill.data.sources.hash_file", lambda path: "read again")
    assert fingerprint(source, tmp_path / "memory") == first
    path.write_text("four")
    assert fingerprint(source, tmp_path / "memory") == "read again"


# Bad input


def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        texts_of(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_utf8_is_refused_with_its_place_or_replaced_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good \xff\xfe bad \xef\xbf\xbd fine")
    refused(path, r"broken UTF-8 at byte 5 \(ff fe 20 62\); .* with `codistill prepare --bad-utf8 replace`")
    (tmp_path / "long.txt").write_bytes(b"x " * 500_000 + b"\xff")
    refused(tmp_path / "long.txt", "broken UTF-8 at byte 1000000 ")
    reading = Reading(bad_utf8="replace")
    (piece,) = read_source(find_sources([path])[0], reading)
    assert piece.text == "good \ufffd\ufffd bad \ufffd fine"
    assert reading.counts["replaced_utf8"] == 2


def test_broken_utf8_in_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    refused(tmp_path / "a.jsonl", "line 2: broken UTF-8")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half \\ud83d pair"}\n')
    refused(tmp_path / "b.jsonl", "line 1: broken UTF-8")
    broken = pa.array([b"fine", b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "row 1: broken UTF-8")


def test_the_mark_at_the_start_of_a_file_of_json_is_skipped_and_nowhere_else(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + jsonl(["one", "\ufefftwo"]))
    assert texts_of(tmp_path / "a.jsonl") == ["one", "\ufefftwo"]
    (tmp_path / "b.jsonl").write_bytes(jsonl(["one"]) + mark + jsonl(["two"]))
    refused(tmp_path / "b.jsonl", "line 2: not JSON")


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(reading_room, "LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["short", "y" * (1 << 20)]))
    refused(tmp_path / "a.jsonl", "line 2: longer than 1 MiB")


def test_truncated_files(tmp_path):
    content = jsonl(documents(200))
    write_zst(tmp_path / "a.jsonl.zst", content)
    pq.write_table(pa.table({"text": documents(50)}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name, message in (("a.jsonl.zst", "cut short"), ("a.jsonl.gz", "cut short"), ("a.parquet", "damaged")):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        refused(path, message)


def test_damage_inside_a_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": documents(300)}), path, compression="zstd")
    raw = bytearray(path.read_bytes())
    raw[200:260] = b"\x00" * 60
    path.write_bytes(raw)
    refused(path, "damaged or no Parquet file")


def test_missing_and_wrong_columns(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "no column 'text'; there are: body, n")
    refused(tmp_path / "a.parquet", "column 'n' holds int64, expected text", column="n")
    assert texts_of(tmp_path / "a.parquet", column="body") == ["x"]
    (tmp_path / "a.jsonl").write_text('{"body": "x", "n": 1}\n[1]\n')
    refused(tmp_path / "a.jsonl", "line 1: no column 'text'; there are: body, n")
    refused(tmp_path / "a.jsonl", "line 1: column 'n' holds a int", column="n")
    refused(tmp_path / "a.jsonl", "line 2: no column 'body'; there are: a list", column="body")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": \n')
    refused(tmp_path / "b.jsonl", "line 2: not JSON")


def test_hub_data_sets_are_streamed(monkeypatch):
    calls = []

    def load_dataset(*names, split, streaming):
        calls.append((names, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts_of("hub:owner/name:config:validation") == ["one", "two"]
    assert texts_of("hub:owner/name") == ["one", "two"]
    assert calls == [(("owner/name", "config"), "validation", True), (("owner/name",), "train", True)]
    refused("hub:owner/name", "row 0: no column 'body'; there are: text", column="body")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hub:owner/name", "it needs codistill's extra `data`")


# What is named more than once


def test_a_glob_of_all_folders_reads_every_file_once(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for place in (".", "deep", "deep/deeper"):
        (tmp_path / place / "a.txt").write_text(place)
    (tmp_path / "deep" / "picture.png").write_bytes(b"")
    for pattern in ("**", "**/*.txt"):
        found = [source.path.read_text() for source in find_sources([f"{tmp_path}/{pattern}"])]
        assert sorted(found) == [".", "deep", "deep/deeper"]


def test_a_file_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("once")
    with pytest.raises(UserError, match=r"a\.txt is named twice"):
        find_sources([str(tmp_path), str(tmp_path / "a.txt")])


# Built-in text


def test_builtin_text_is_prose_split_by_document():
    everything = list(builtin_documents("builtin:python"))
    train, validation = (list(builtin_documents(f"builtin:python/{part}")) for part in ("train", "validation"))
    assert sorted(train + validation) == sorted(everything)
    assert not set(train) & set(validation)
    assert 0.01 < len(validation) / len(everything) < 0.12
    assert sum(map(len, everything)) > 1_000_000
    assert any("The standard type hierarchy" in text for text in everything)
    assert any("Command-line parsing library" in text for text in everything)


# Units


def fragments_of(texts, pieces=None, **options):
    pieces = pieces or [reading_room.Piece(text, True) for text in texts]
    reading = Reading()
    return list(fragments(pieces, Selection(**options), reading)), reading.counts


def test_empty_documents_are_counted_and_left_out():
    found, counts = fragments_of(["one", "", " \n\t", "two"])
    assert [fragment.text for fragment in found] == ["one", "two"]
    assert counts["documents_read"] == 4
    assert counts["empty"] == 2


def test_sentences_and_paragraphs():
    text = 'He saw Mr. J. Smith. "Go!" he said.\n\nIt cost 3.5 pounds. Did it?\nYes (it did.) End'
    found, _ = fragments_of([text, "Last."], unit="sentence")
    assert [fragment.text for fragment in found] == [
        "He saw Mr. J. Smith.",
        '"Go!" he said.',
        "It cost 3.5 pounds.",
        "Did it?",
        "Yes (it did.)",
        "End",
        "Last.",
    ]
    assert [fragment.ends_document for fragment in found] == [False] * 5 + [True] * 2
    assert all(fragment.ends_unit for fragment in found)
    found, _ = fragments_of([text, "one\ntwo"], unit="paragraph")
    assert [fragment.text.split()[0] for fragment in found] == ["He", "It", "one", "two"]


@settings(max_examples=100, deadline=None)
@given(st.text("aB. !?\"'\n1", max_size=80))
def test_sentences_lose_no_letter(text):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_keeping_one_sentence_of_four():
    found, _ = fragments_of(
        ["A one. B two. C three.", "D four. E five.", "F six. G seven. H eight. I nine."], unit="sentence", keep_every=4
    )
    assert [fragment.text for fragment in found] == ["A one.", "E five.", "I nine."]
    assert all(fragment.ends_document for fragment in found)


def test_keeping_every_third_document():
    found, _ = fragments_of([str(i) for i in range(8)], keep_every=3)
    assert [fragment.text for fragment in found] == ["0", "3", "6"]


def test_a_document_in_pieces_ends_once():
    pieces = [reading_room.Piece("one ", False), reading_room.Piece("two", True), reading_room.Piece("three", True)]
    found, counts = fragments_of([], pieces)
    assert [(f.text, f.ends_unit, f.ends_document) for f in found] == [
        ("one ", False, False),
        ("two", True, True),
        ("three", True, True),
    ]
    assert counts["documents_read"] == 2


def test_the_held_out_share_is_by_content():
    texts = documents(400)
    low, _ = fragments_of(texts, share=(0.0, 0.25))
    high, _ = fragments_of(texts[::-1], share=(0.25, 1.0))
    assert sorted(f.text for f in low + high) == sorted(texts)
    assert 60 < len(low) < 140
