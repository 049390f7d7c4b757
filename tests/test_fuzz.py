"""Files of anybody: whatever they hold, reading them ends in a result or in one line, soon and in little memory."""

import gzip
import json
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from llmprune import calibration, data
from llmprune.checkpoint import Source
from llmprune.checkpoint.header import MAX_HEADER_BYTES
from llmprune.checkpoint.source import INDEX, SINGLE
from llmprune.errors import DataError, LlmpruneError, RecipeError
from llmprune.model import Streamed
from llmprune.model.sites import sites_of
from llmprune.recipe import Recipe
from llmprune.recipefiles import read_recipe

MEMORY = 1 << 30  # bytes that reading may take beyond what the process has
SECONDS = 60  # after which reading counts as hanging


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.model("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What asks for more memory gets an error that is none of ours."""
    torch.ones(1).sum()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def one_line_or_a_result() -> Iterator[None]:
    def hangs(*arguments: Any) -> NoReturn:
        raise AssertionError(f"not done after {SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    except LlmpruneError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 5_000, str(error)[:500]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def read_whole(source: Source) -> None:
    source.output_bytes()
    source.fingerprint()
    for name, entry in source.entries.items():
        with suppress(LlmpruneError):
            _ = entry.torch_dtype
            assert sum(chunk.numel() for chunk in source.chunks(name)) == entry.count


numbers = st.one_of(
    st.integers(-5, 70), st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63)]), st.floats(), st.booleans()
)
words = st.one_of(st.text(max_size=8), st.sampled_from(["", ".", "..", "../x", "/etc/passwd", "a\0b", "x" * 300, "é"]))
values = st.recursive(
    st.one_of(st.none(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with a few of them changed, left out, doubled or cut off, mostly at the front."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(data), 600) - 1)))
        how = draw(st.sampled_from(["change", "drop", "repeat", "cut", "insert"]))
        if how == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif how == "drop":
            del data[at : at + draw(st.integers(1, 20))]
        elif how == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 20))]
        elif how == "cut":
            del data[draw(st.integers(0, len(data))) :]
        else:
            data[at:at] = draw(st.binary(max_size=6))
    return bytes(data)


def small_checkpoint() -> bytes:
    fields = {
        "__metadata__": {"format": "pt"},
        "v": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [6, 70]},
    }
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(70))


@fuzz(500)
@given(whole=damaged(small_checkpoint()))
def test_damaged_weights(whole: bytes, folder: Path) -> None:
    (folder / SINGLE).write_bytes(whole)
    with one_line_or_a_result():
        read_whole(Source.open(folder))


entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL"]), values),
        "shape": st.one_of(st.lists(st.integers(0, 8), max_size=3), values),
        "data_offsets": st.one_of(st.tuples(st.integers(0, 64), st.integers(0, 64)), values),
    }
)


@fuzz(500)
@given(header=st.dictionaries(words, st.one_of(entries, values), max_size=4), rest=st.integers(0, 80))
def test_headers_that_are_well_formed_json(header: Any, rest: int, folder: Path) -> None:
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(rest))
    with one_line_or_a_result():
        read_whole(Source.open(folder))


@fuzz(300)
@given(index=st.one_of(values, st.fixed_dictionaries({"weight_map": st.one_of(values, st.dictionaries(words, words))})))
def test_indexes(index: Any, folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    with one_line_or_a_result():
        read_whole(Source.open(folder))


@fuzz(150)
@given(data=st.data())
def test_damaged_indexes(data: st.DataObject, model: Path, folder: Path) -> None:
    (folder / INDEX).write_bytes(data.draw(damaged((model / INDEX).read_bytes())))
    with one_line_or_a_result():
        Source.open(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_configurations(family: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(family), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    @fuzz(100)
    @given(changes=st.dictionaries(st.sampled_from(sorted(config)), values, min_size=1, max_size=2))
    def change(changes: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with one_line_or_a_result():
            host = Streamed(Source.open(folder), torch.device("cpu"))
            assert sum(len(sites_of(stage)) for stage in [host.embedding, *host.blocks, host.head])

    change()


@pytest.mark.parametrize("name", ["num_local_experts", "num_hidden_layers", "vocab_size", "hidden_size", "head_dim"])
def test_a_configuration_of_a_model_that_no_file_backs_is_refused(name: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("qwen3-moe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert name in config
    (folder / "config.json").write_text(json.dumps(config | {name: 2**28}))
    with one_line_or_a_result(), pytest.raises(LlmpruneError):
        Streamed(Source.open(folder), torch.device("cpu"))


options = st.sampled_from(sorted(Recipe.__dataclass_fields__))


@fuzz(300)
@given(recipe=st.dictionaries(st.one_of(options, words), values, max_size=4))
def test_recipes(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
    with one_line_or_a_result():
        Recipe.of(read_recipe(tmp_path / "recipe.yaml")).to_json()


RECIPE = b"method: wanda\npattern: 2:4\nsamples: 8\nmethod_options: {}\nexclude: ['*.0.*', \"b\"]\nlength: 64\n"


@fuzz(300)
@given(
    text=st.one_of(
        damaged(RECIPE), st.binary(max_size=60), st.text(alphabet="[]{}:-&*!|>%@`'\"#,? \n\t01ae.", max_size=40)
    )
)
def test_damaged_recipes(text: bytes | str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with one_line_or_a_result():
        Recipe.of(read_recipe(tmp_path / "recipe.yaml")).to_json()


class Letters:
    """A tokenizer that makes every character a token."""

    chat_template = "there is one"

    def __call__(self, text: str, /, *, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return {"input_ids": [ord(letter) % tiny.VOCABULARY for letter in text]}

    def apply_chat_template(self, conversation: list[dict[str, str]], /, *, tokenize: bool) -> Any:
        return "".join(message["role"] + message["content"] for message in conversation)


def calibrate(path: Path) -> None:
    documents = data.read(path, "calibration")
    tokens = calibration.sample(documents, Letters(), samples=3, length=4, seed=0)
    calibration.check(tokens, vocabulary=tiny.VOCABULARY, context=tiny.CONTEXT)
    assert sum(len(batch) for batch in calibration.batches(tokens, 2)) == len(tokens.rows) > 0
    data.read(path, "evaluation")


columns = st.sampled_from(["text", "input_ids", "messages", "conversations", "content", "other"])
rows = st.lists(st.one_of(st.dictionaries(columns, values, max_size=2), values), max_size=4)
good_rows = st.one_of(
    st.lists(st.fixed_dictionaries({"text": st.text(max_size=30)}), min_size=1, max_size=5),
    st.lists(st.fixed_dictionaries({"input_ids": st.lists(st.integers(-1, 200), max_size=60)}), max_size=5),
)


@fuzz(300)
@given(rows=st.one_of(rows, good_rows), suffix=st.sampled_from([".jsonl", ".json", ".jsonl.gz"]))
def test_calibration_rows(rows: list[Any], suffix: str, tmp_path: Path) -> None:
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    with one_line_or_a_result():
        calibrate(path)


GOOD = b'{"text": "some words of a text"}\n{"text": "and more of them \\u00e9"}\n'
FILES = {
    ".jsonl": GOOD,
    ".json": b"[" + GOOD.replace(b"}\n{", b"}, {") + b"]",
    ".txt": GOOD,
    ".jsonl.gz": gzip.compress(GOOD),
}


@fuzz(300)
@given(data=st.data(), suffix=st.sampled_from(sorted(FILES)))
def test_damaged_calibration_files(data: st.DataObject, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data.draw(damaged(FILES[suffix])))
    with one_line_or_a_result():
        calibrate(path)


def test_a_recipe_that_doubles_itself_with_aliases_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)), "samples: *a59"]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with one_line_or_a_result(), pytest.raises(RecipeError, match="alias"):
        read_recipe(tmp_path / "bomb.yaml")


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "{a: " * 20_000, "- " * 20_000, "a: " + "9" * 10_000, "a: " + "1:" * 5_000 + "1"]
)
def test_a_recipe_that_is_nested_deeply_or_holds_long_numbers_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text(text)
    with one_line_or_a_result():
        Recipe.of(read_recipe(tmp_path / "deep.yaml"))


def test_a_gzip_file_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(MEMORY * 5 // 4 >> 24):
            file.write(bytes(1 << 24))
    with one_line_or_a_result(), pytest.raises(DataError, match="unpacks to more than"):
        data.read(path, "calibration")


@pytest.mark.parametrize("part", [b'"%07d":1,', b'"%07d":{"a":1},'])
def test_a_header_as_long_as_is_read_at_all_takes_little_memory(part: bytes, folder: Path) -> None:
    text = b"{" + b"".join(part % number for number in range(MAX_HEADER_BYTES // len(part % 0) - 2))[:-1] + b"}"
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text)
    del text
    with one_line_or_a_result():
        Source.open(folder)
