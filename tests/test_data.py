"""Specs, files and Python rows become documents, and what cannot be read fails in one line."""

import gzip
import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune import data, hub
from llmprune.data import Documents
from llmprune.errors import DataError

ROWS = [{"text": "first\n"}, {"text": ""}, {"text": " second"}]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def put(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("purpose", "separator"), [("calibration", " "), ("evaluation", "\n\n")])
def test_demo_is_wikitext_as_the_hub_has_it(purpose: Any, separator: str) -> None:
    documents = data.read("demo", purpose)
    assert (documents.name, documents.kind, documents.joined, documents.separator) == ("demo", "text", True, separator)
    assert documents.rows[0] == "" and documents.rows[1].startswith(" = ") and documents.rows[1].endswith(" = \n")
    assert all(row == "" or (row.endswith("\n") and row.strip()) for row in documents.rows)
    assert 300_000 < sum(len(row.encode()) for row in documents.rows) <= 400_000


def test_the_demo_excerpts_do_not_overlap() -> None:
    paragraphs = [
        {row for row in data.read("demo", purpose).rows if len(row) > 80} for purpose in ("calibration", "evaluation")
    ]
    assert not paragraphs[0] & paragraphs[1]


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
@pytest.mark.parametrize("name", ["a.txt", "a.text", "a.raw", "a.md", "a.TXT", "a.txt.gz", "a.raw.gz"])
def test_a_text_file_is_one_text_as_it_stands(tmp_path: Path, name: str, purpose: Any) -> None:
    text = "\ufeff one\r\n\r\ntwo \n\n"
    documents = data.read(put(tmp_path / name, text), purpose)
    assert documents == Documents(str(tmp_path / name), "text", [text], True, "")


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
@pytest.mark.parametrize("name", ["ptb.txt", "ptb.train.txt", "ptb.valid.txt", "ptb.test.txt.gz", "PTB.test.TXT"])
@pytest.mark.parametrize("text", [" a <unk> \n N cats\\/dogs \n", " a <unk>\n N cats\\/dogs\n"])
def test_the_sentences_of_a_file_of_ptb_are_joined_as_those_of_the_hub(
    tmp_path: Path, text: str, name: str, purpose: Any
) -> None:
    documents = data.read(put(tmp_path / name, text), purpose)
    assert documents == Documents(str(tmp_path / name), "text", ["a <unk>", "N cats\\/dogs"], True, " ")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
@pytest.mark.parametrize(("purpose", "joined", "separator"), [("calibration", False, ""), ("evaluation", True, "\n\n")])
def test_json_lines(tmp_path: Path, suffix: str, purpose: Any, joined: bool, separator: str) -> None:
    path = put(tmp_path / f"a{suffix}", "\ufeff" + lines(ROWS) + "\n  \n")
    documents = data.read(str(path), purpose)
    assert documents == Documents(str(path), "text", [row["text"] for row in ROWS], joined, separator)


@pytest.mark.parametrize(
    "value",
    [ROWS, {"data": ROWS}, {"version": 1, "rows": ROWS}, [row["text"] for row in ROWS]],
    ids=["array", "object", "object with more", "strings"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_files(tmp_path: Path, value: Any, indent: int | None) -> None:
    path = put(tmp_path / "a.json", json.dumps(value, indent=indent))
    assert data.read(path, "calibration").rows == [row["text"] for row in ROWS]


def test_a_json_object_with_a_known_column_is_one_row(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", '{"input_ids": [1, 2, 3]}')
    assert data.read(path, "calibration").rows == [[1, 2, 3]]


def test_json_strings_may_hold_any_line_end(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\r\n')
    assert data.read(path, "calibration").rows == ["a\u2028b\u0085c", "d"]


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "kind", "value"),
    [
        ({"input_ids": [1, 2], "messages": MESSAGES, "text": "t"}, "input_ids", [1, 2]),
        ({"text": "t", "messages": MESSAGES}, "messages", MESSAGES),
        ({"conversations": MESSAGES, "content": "c"}, "messages", MESSAGES),
        ({"content": "c", "text": "t"}, "text", "t"),
        ({"content": "c", "title": "x"}, "text", "c"),
        ({"sentence": "s"}, "text", "s"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "messages",
            MESSAGES,
        ),
    ],
)
@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_the_choice_of_column(tmp_path: Path, row: Any, kind: str, value: Any, purpose: Any) -> None:
    documents = data.read(put(tmp_path / "a.jsonl", lines([row, row])), purpose)
    assert (documents.kind, documents.rows) == (kind, [value, value])
    assert documents.joined == (kind == "text" and purpose == "evaluation")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\n", "is empty"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", '{"data": []}', "is empty"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text (byte 3)"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', "line 3 is not JSON"),
        ("a.json", '{"text": "a"}\n{"text": }\n', "line 2 is not JSON"),
        ("a.json", '[\n{"text": "a"},\n{"text": }\n]', "line 3 is not JSON"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", "3", "holds one int"),
        ("a.json", '{"a": [1], "b": [2]}', "holds 2 lists; expected one list of rows"),
        ("a.csv", "a,b", "unknown kind of file '.csv'; known: .txt"),
        ("a", "a", "unknown kind of file ''"),
        ("a.jsonl", '{"title": "a", "id": 1}', "has the columns title, id; expected one of input_ids, messages"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', "'text' of row 2 is not text (it is a int)"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', "'text' of row 2 is not text (it is a NoneType)"),
        ("a.jsonl", '{"text": "a"}\n4', "'text' of row 2 is not text (it is a int)"),
        ("a.jsonl", '{"input_ids": [1]}\n{"input_ids": []}', "row 2 is not a list of token ids (it is an empty list)"),
        ("a.jsonl", '{"input_ids": ["a"]}', "row 1 is not a list of token ids (it is a list that starts with a str)"),
        ("a.jsonl", '{"input_ids": [1.5]}', "row 1 is not a list of token ids"),
        ("a.jsonl", '{"input_ids": [true]}', "row 1 is not a list of token ids"),
        ("a.jsonl", '{"input_ids": [99999999999999999999]}', "row 1 is not a list of token ids"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "row 1 is not a list of messages with role and content"),
        ("a.jsonl", '{"messages": "hi"}', "row 1 is not a list of messages with role and content (it is a str)"),
        ("a.jsonl", '{"messages": ["hi"]}', "row 1 is not a list of messages"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        data.read(put(tmp_path / name, content), "calibration")
    assert message in one_line(error) and str(tmp_path / name) in one_line(error)


@pytest.mark.parametrize(
    "content", [b"plain", gzip.compress(b"some text" * 99, mtime=0)[:-20]], ids=["plain", "cut short"]
)
def test_bad_gzip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(DataError, match="is not a complete gzip file"):
        data.read(tmp_path / "a.txt.gz", "calibration")


@pytest.mark.parametrize("spec", ["no.txt", "no.jsonl.gz", "./no", "/no/such", "~/no/such/file", "org/no.json"])
def test_what_looks_like_a_path_is_never_sought_on_the_hub(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        data.read(spec, "calibration")
    assert one_line(error) == f"{spec}: no such file"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; give a file in it"):
        data.read(str(tmp_path), "calibration")


def test_a_local_file_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    put(tmp_path / "org" / "name", "a")
    with pytest.raises(DataError, match="unknown kind of file"):
        data.read("org/name", "calibration")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitext", "did you mean 'wikitext2'?"),
        ("Demo", "did you mean 'demo'?"),
        ("", "known: c4, demo, ptb, wikitext2"),
    ],
)
def test_unknown_names(spec: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        data.read(spec, "calibration")
    assert one_line(error).startswith(f"unknown data '{spec}'") and message in one_line(error)


@pytest.mark.parametrize("spec", [7, None, {"text": "a"}])
def test_other_objects_are_refused(spec: Any) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="data cannot be a"):
        data.read(spec, "calibration")


@pytest.mark.parametrize(
    ("rows", "kind"),
    [(["a", "b"], "text"), ([[1, 2], [3]], "input_ids"), ([MESSAGES], "messages"), ([{"text": "a"}], "text")],
)
def test_lists(rows: list[Any], kind: str) -> None:
    documents = data.read(rows, "calibration")
    assert (documents.kind, documents.joined, len(documents.rows)) == (kind, False, len(rows))
    assert data.read(rows, "evaluation").separator == ("\n\n" if kind == "text" else "")


@given(st.lists(st.lists(st.integers(0, 2**31), min_size=1), min_size=1))
def test_token_ids_stay_as_they_are(rows: list[list[int]]) -> None:
    assert data.read(rows, "calibration").rows == rows
    assert data.read([torch.tensor(row) for row in rows], "evaluation").rows == rows


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(DataError, match="a list of 0 rows is empty"):
        data.read([], "calibration")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tensors(dtype: torch.dtype) -> None:
    documents = data.read(torch.arange(6, dtype=dtype).reshape(2, 3), "calibration")
    assert (documents.kind, documents.rows, documents.joined) == ("input_ids", [[0, 1, 2], [3, 4, 5]], False)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(0, 3, dtype=torch.int64), torch.ones(1, 1) > 0],
)
def test_bad_tensors(tensor: torch.Tensor) -> None:
    with pytest.raises(DataError, match="must hold token ids as integers"):
        data.read(tensor, "calibration")


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path: Path, name: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "raw"))
    path = put(tmp_path / name, (tmp_path / "raw").read_bytes())
    documents = data.read(path, "calibration")
    assert (list(documents.rows), documents.joined) == ([row["text"] for row in ROWS], False)
    assert data.read(path, "evaluation") == Documents(str(path), "text", [row["text"] for row in ROWS], True, "\n\n")


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError) as error:
        data.read(put(tmp_path / "a.parquet", "PAR1 not really"), "calibration")
    assert "is not a readable parquet file" in one_line(error)


@pytest.mark.parametrize("spec", ["a.parquet", "c4", "org/name"])
def test_without_datasets(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.parquet", "x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        data.read(spec, "calibration")
    assert data.read("demo", "calibration").rows


@pytest.mark.parametrize(
    ("columns", "kind", "rows"),
    [
        ({"text": ["a", "b"]}, "text", ["a", "b"]),
        ({"input_ids": [[1], [2, 3]], "text": ["a", "b"]}, "input_ids", [[1], [2, 3]]),
        ({"messages": [MESSAGES]}, "messages", [MESSAGES]),
    ],
)
def test_datasets(columns: dict[str, Any], kind: str, rows: list[Any]) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(columns).with_format("numpy")
    documents = data.read(table, "calibration")
    assert (documents.kind, list(documents.rows), documents.joined) == (kind, rows, False)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1]}, "has the columns label"),
        ({"text": []}, "is empty"),
        ({"text": [1, 2]}, "'text' of row 1 is not text"),
    ],
)
def test_bad_datasets(columns: dict[str, Any], message: str) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError) as error:
        data.read(datasets.Dataset.from_dict(columns), "calibration")
    assert message in one_line(error)


class FakeHub:
    """Stands for `datasets.load_dataset`: keeps what was asked for, answers with made-up splits."""

    def __init__(self, splits: dict[str, dict[str, list[Any]]]) -> None:
        datasets = import_module("datasets")
        self.splits = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, repo: str, config: str | None, *, data_files: Any, revision: str | None) -> Any:
        self.asked.append((repo, config, data_files, revision))
        return self.splits


def with_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, dict[str, list[Any]]]) -> FakeHub:
    datasets = pytest.importorskip("datasets")
    fake = FakeHub(splits)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    return fake


PTB = ("ptb-text-only/ptb_text_only", None)
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", None, None)
C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
C4_VALIDATION = {"train": "en/c4-validation.00000-of-00008.json.gz"}


@pytest.mark.parametrize(
    ("spec", "purpose", "asked", "rows", "separator"),
    [
        ("wikitext2", "calibration", WIKITEXT, ["a", "b"], " "),
        ("wikitext2", "evaluation", WIKITEXT, ["c"], "\n\n"),
        (
            "ptb",
            "calibration",
            (*PTB, {"train": "penn_treebank/train/*.parquet"}, "refs/convert/parquet"),
            ["a", "b"],
            " ",
        ),
        ("c4", "calibration", ("allenai/c4", None, C4_TRAIN, None), ["a", "b"], None),
        ("org/name", "calibration", ("org/name", None, None, None), ["a", "b"], None),
        ("org/name", "evaluation", ("org/name", None, None, None), ["c"], "\n\n"),
        ("org/name:conf", "evaluation", ("org/name", "conf", None, None), ["c"], "\n\n"),
        ("org/name:conf:train", "evaluation", ("org/name", "conf", None, None), ["a", "b"], "\n\n"),
    ],
)
def test_hub_data(
    monkeypatch: pytest.MonkeyPatch, spec: str, purpose: Any, asked: Any, rows: list[str], separator: str | None
) -> None:
    fake = with_hub(monkeypatch, {"train": {"text": ["a", "b"]}, "test": {"text": ["c"]}})
    documents = data.read(spec, purpose)
    assert fake.asked == [asked]
    assert (documents.name, documents.kind, list(documents.rows)) == (spec, "text", rows)
    assert (documents.joined, documents.separator) == (separator is not None, separator or "")


def test_ptb_is_evaluated_on_its_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = with_hub(monkeypatch, {"train": {"sentence": ["a", "b"]}})
    assert data.read("ptb", "evaluation") == Documents("ptb", "text", ["a", "b"], True, " ")
    assert fake.asked == [(*PTB, {"train": "penn_treebank/test/*.parquet"}, "refs/convert/parquet")]


def test_c4_is_evaluated_on_its_first_1100_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = with_hub(monkeypatch, {"train": {"text": [str(number) for number in range(1200)]}})
    documents = data.read("c4", "evaluation")
    assert (list(documents.rows), documents.separator) == ([str(number) for number in range(1100)], " ")
    assert fake.asked == [("allenai/c4", None, C4_VALIDATION, None)]


@pytest.mark.parametrize("split", ["validation", "train"])
def test_the_split_for_evaluation_where_there_is_no_test_split(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    splits = {"train": {"text": ["train"]}, "validation": {"text": ["validation"]}}
    with_hub(monkeypatch, {name: splits[name] for name in (("train",) if split == "train" else splits)})
    assert data.read("org/name", "evaluation").rows == [split]


@pytest.mark.parametrize(
    ("spec", "message"),
    [("org/name:conf:tset", "has no split 'tset'; did you mean 'test'?"), ("org/name", "no split for calibration")],
)
def test_missing_splits(monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    with_hub(monkeypatch, {"test": {"text": ["c"]}})
    with pytest.raises(DataError) as error:
        data.read(spec, "calibration")
    assert message in one_line(error)


@pytest.mark.parametrize(("purpose", "option"), [("calibration", "--calibration FILE"), ("evaluation", "--data FILE")])
@pytest.mark.parametrize(("spec", "repo"), [("c4", "allenai/c4"), ("org/name:conf", "org/name")])
def test_hub_data_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, repo: str, purpose: Any, option: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    # a sleep between retries fails the test.
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("retried"))
    with pytest.raises(DataError) as error:
        data.read(spec, purpose)
    message = one_line(error)
    assert all(part in message for part in (f"'{spec}'", repo, "does not answer", "cached", option))
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_failure_of_datasets_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ValueError("Config name is missing.\nPlease pick one")

    fake = SimpleNamespace(load_dataset=fail)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(DataError) as error:
        data.read("org/name", "calibration")
    assert "org/name: ValueError: Config name is missing." in one_line(error)
