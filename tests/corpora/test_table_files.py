"""Text in the column of a table, in local files and in a stand-in for the hub."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.config import CorpusConfig
from lm.corpora import Corpus, open_corpus
from lm.corpora.hub import readings
from lm.errors import CorpusError

DOCUMENTS = ["one\ntwo", "NA", "12", "é"]
JOINED = "one\ntwo\nNA\n12\né"


def opened(source: Path | str, **options: object) -> Corpus:
    return open_corpus(CorpusConfig(source=str(source), **{"split_fractions": (0.5, 0.5), **options}))  # type: ignore[arg-type]


def joined(corpus: Corpus) -> str:
    return "".join("".join(split.chunks()) for split in corpus.splits.values())


def write(path: Path, documents: list[Any], column: str = "text") -> Path:
    rows = [{column: document, "number": number} for number, document in enumerate(documents)]
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif name.endswith(".json"):
        content = json.dumps(rows)
    elif name.endswith(".csv"):
        content = f"{column},number\n" + "".join(f'"{row[column] or ""}",{row["number"]}\n' for row in rows)
    else:
        pq.write_table(pa.table({column: documents}), path)
        return path
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz"])
def test_documents_of_a_table_are_joined_by_one_newline(tmp_path, name):
    corpus = opened(write(tmp_path / name, DOCUMENTS))
    assert joined(corpus) == JOINED
    assert joined(corpus) == JOINED  # and again
    assert corpus.name == "a"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_rows_without_text_are_left_out_with_one_notice(tmp_path, name, caplog):
    with caplog.at_level(logging.WARNING, "lm.corpora"):
        assert joined(opened(write(tmp_path / name, ["a", None, "b", None, "c"]))) == "a\nb\nc"
    assert [record.message for record in caplog.records] == [f"{tmp_path / name}: 2 rows without text were left out."]


def test_a_column_that_only_some_lines_have_is_read_where_it_is(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n{"text": "a"}\n\n{"text": "b"}\n')
    assert joined(opened(tmp_path / "a.jsonl")) == "a\nb"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_missing_column_is_answered_with_those_there_are(tmp_path, name):
    path = write(tmp_path / name, DOCUMENTS, column="content")
    with pytest.raises(CorpusError, match=re.escape(f"{path} has no column 'text'.")) as caught:
        opened(path)
    assert "content" in str(caught.value) and "--text-column" in str(caught.value)
    assert joined(opened(path, text_column="content")) == JOINED


def test_a_column_of_numbers_is_no_text(tmp_path):
    sentence = "column 'number' holds int values, not text, in 4 of 4 rows (line 1, line 2, line 3, line 4)"
    with pytest.raises(CorpusError, match=re.escape(sentence)):
        opened(write(tmp_path / "a.jsonl", DOCUMENTS), text_column="number")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_that_is_no_text_is_left_out_by_its_line_and_all_others_stay_as_they_are(tmp_path, name, caplog):
    documents = [f'He said "hi" {number}\nand left' for number in range(3000)]
    rows: list[Any] = [{"text": document} for document in documents]
    rows[1233] = {"text": 5}
    between = "\n" if name == "a.jsonl" else ",\n"
    content = between.join(map(json.dumps, rows))
    (tmp_path / name).write_text(content if name == "a.jsonl" else f"[{content}]")
    assert joined(opened(tmp_path / name)) == "\n".join([*documents[:1233], *documents[1234:]])
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / name}: 1 row whose 'text' is no text was left out (line 1,234)."
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"text": "one"}\n{"text": "two"}\n'),  # one object a line
        ("a.json", '{\n "text": "one"\n}\n{\n "text": "two"\n}'),
        ("a.json", '{"text": ["one", "two"], "n": [1]}'),  # columns
        ("a.json", '["one", "two"]'),
        ("a.jsonl", '[{"text": "one"},\n {"text": "two"}]\n'),
        ("a.csv", 'n,text\n1,"one"\n\n2,two\n'),
        ("a.csv", "n;text\n1;one\n2;two\n"),
        ("a.csv", "n\ttext\n1\tone\n2\ttwo\n"),
        ("a.csv", "text,n\rone,1\rtwo,2\r"),
    ],
)
def test_tables_in_other_shapes_are_read_too(tmp_path, name, content):
    (tmp_path / name).write_text(content, newline="")
    assert joined(opened(tmp_path / name)) == "one\ntwo"


def test_cells_of_csv_are_kept_as_they_are_written_however_long(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f'text\n"a ""quoted"", \r\n text\r and more"\n" b "\n{long}\n', newline="")
    assert joined(opened(tmp_path / "a.csv")) == f'a "quoted", \r\n text\r and more\n b \n{long}'


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": b}\n', "a.jsonl, line 2, is not JSON: Expecting value at column 10."),
        ("a.jsonl", b'{"text": "a"}\n\n\n{"text": }\n', "a.jsonl, line 4, is not JSON"),
        ("a.json", b'[{"text": "a"},\n{"text": b}]\n', "a.json, line 2, is not JSON: Expecting value at column 10."),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]\n', "a.json, line 2, is not JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}\n', "a.json, line 3, is not JSON"),
        ("a.json", b'[{"text": "aaa"},\n{"text": "\\ud800"}]', "a.json, line 2: The text holds U+D800, half of a"),
        ("a.jsonl", b'{"text": "aaa"}\n{"text": "\\udc00"}', "a.jsonl, line 2: The text holds U+DC00, half of a"),
        ("a.jsonl", b'{"text": "aaa"}\n{"text": "\\u0000"}', "a.jsonl, line 2: the text holds a zero character"),
        ("a.jsonl", b'{"text": "aaa"}\n{"text": "\0"}', "a.jsonl looks like a binary file: byte 26 (line 2) is zero"),
        ("a.csv", b'text,n\na,1\n"b\nc,3\n', "a.csv: the row that begins in line 3 opens a quotation mark"),
        ("a.csv", b"text,n\na,1\nb, c,2\n", "a.csv, line 3, has 3 cells, and the header 2"),
        ("a.csv", b"id;body\n1;a\n", "has no column 'text'. Columns, separated by ';': id, body; choose one with"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl is not UTF-8: byte 24 (line 2) is 0xff"),
        ("a.csv", b"text\na\n\xff\n", "a.csv is not UTF-8: byte 7 (line 3) is 0xff"),
        ("a.parquet", b"not parquet at all", "a.parquet cannot be read as a table"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"text\n", "a.csv is empty"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], "is damaged and cannot be unpacked"),
    ],
)
def test_a_broken_table_is_refused_naming_file_and_place(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(sentence)):
        opened(tmp_path / name)


def test_a_folder_of_tables_has_splits_and_shards(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ["a"])
    write(tmp_path / "train-00001-of-00002.parquet", ["b"])
    write(tmp_path / "validation-00000-of-00001.parquet", ["c"])
    corpus = opened(tmp_path)
    assert {name: "".join(split.chunks()) for name, split in corpus.splits.items()} == {"train": "a\nb", "valid": "c"}


# -- the hub: a stand-in, for none is reachable where the tests run ---------------------------------------


class Hub:
    """Stands in for `datasets.load_dataset`."""

    def __init__(self, data: dict[tuple[str, ...], Any]) -> None:
        self.data = data
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, *name: str, **options: Any) -> Any:
        assert "trust_remote_code" not in options
        self.calls.append(name)
        if name not in self.data:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name[0]!r} doesn't exist on the Hub.")
        return self.data[name]


def rows(*documents: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(documents)})


def hub(monkeypatch: pytest.MonkeyPatch, data: dict[tuple[str, ...], Any]) -> Hub:
    standing_in = Hub(data)
    monkeypatch.setattr(datasets, "load_dataset", standing_in)
    return standing_in


def test_hub_splits_are_mapped_and_others_ignored(monkeypatch):
    data = {"train": rows("a", "b"), "validation": rows("c"), "test": rows("d"), "unsupervised": rows("e")}
    hub(monkeypatch, {("owner/name",): datasets.DatasetDict(data)})
    corpus = opened("hf:owner/name")
    assert {name: "".join(split.chunks()) for name, split in corpus.splits.items()} == {
        "train": "a\nb",
        "valid": "c",
        "test": "d",
    }
    assert corpus.name == "owner-name" and corpus.source == "hf:owner/name"


def test_a_hub_data_set_with_one_split_is_cut_by_position(monkeypatch):
    hub(monkeypatch, {("stories",): datasets.DatasetDict({"train": rows("ab", "cd")})})
    corpus = opened("hf:stories", split_fractions=(0.6, 0.4))
    assert {name: "".join(split.chunks()) for name, split in corpus.splits.items()} == {"train": "ab\n", "valid": "cd"}
    assert corpus.notes == ("5 characters", "split by position 0.6,0.4")


def test_two_parts_are_owner_and_name_or_else_name_and_configuration(monkeypatch):
    assert readings("hf:a") == [("a", None)]
    assert readings("hf:a/b") == [("a/b", None), ("a", "b")]
    assert readings("hf:a/b/c") == [("a/b", "c")]
    standing_in = hub(monkeypatch, {("wikitext", "raw"): {"train": rows("a"), "validation": rows("b")}})
    assert joined(opened("hf:wikitext/raw")) == "ab"
    assert standing_in.calls == [("wikitext/raw",), ("wikitext", "raw")]


@pytest.mark.parametrize("source", ["hf:", "hf:a/b/c/d", "hf:a//b"])
def test_what_cannot_be_a_hub_name_is_refused(source):
    with pytest.raises(CorpusError, match="write hf:NAME"):
        opened(source)


def test_a_hub_data_set_that_is_not_there_or_lacks_a_split_is_one_sentence(monkeypatch):
    hub(monkeypatch, {("no-valid",): {"train": rows("a"), "test": rows("b")}, ("no-train",): {"test": rows("a")}})
    with pytest.raises(CorpusError, match="hf:nothing could not be loaded: Dataset 'nothing' doesn't exist"):
        opened("hf:nothing")
    with pytest.raises(CorpusError, match="no validation split; its splits are train, test"):
        opened("hf:no-valid")
    with pytest.raises(CorpusError, match="no training split; its splits are test"):
        opened("hf:no-train")
