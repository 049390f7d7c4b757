"""What must not be written: tokens of the Hub, and what a name from a checkpoint would do to a terminal."""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub import constants

import llmprune
import tiny
from llmprune import cli
from llmprune.checkpoint import Sink
from llmprune.errors import CheckpointError

IDS = tiny.ids(4, 16)


TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"  # of the form of a real one


def interrupt(*arguments: Any) -> NoReturn:
    raise KeyboardInterrupt


def test_no_token_is_written_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level("DEBUG")
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sink, "commit", interrupt)
        llmprune.prune(source, tmp_path / "part", calibration=IDS)
    report = llmprune.prune(source, tmp_path / "out", calibration=IDS)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
    assert TOKEN not in caplog.text and TOKEN not in str(report)


@pytest.mark.parametrize(
    "arguments",
    [
        (f"https://me:{TOKEN}@huggingface.co/org/name", "out"),
        ("org/name", "out", "--revision", TOKEN),
        ("demo", "out", "--calibration", f"https://{TOKEN}@huggingface.co/rows.jsonl"),
        ("demo", "out", "--metod", TOKEN),
        ("demo", "out", "--samples", TOKEN),
    ],
)
def test_no_message_repeats_a_token(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["llmprune", "prune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capfd.readouterr()
    assert (stopped.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert TOKEN not in said.err and "//me" not in said.err


def test_names_from_a_checkpoint_cannot_write_to_the_terminal() -> None:
    error = CheckpointError("tensor \x1b[2J\x07evil\nllmprune: all is well\r has no shape")
    assert str(error) == "tensor [2J evil llmprune: all is well has no shape"
    assert len(str(CheckpointError("x" * 1_000_000))) <= 2_000


def test_notes_on_a_checkpoint_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"\x1b[2Jfield\n": 1}))
    report = llmprune.prune(source, tmp_path / "out", method="magnitude")
    (note,) = report.notes
    assert note.endswith("ignores: [2Jfield") and "\x1b" not in str(report)


def test_the_code_of_a_checkpoint_does_not_run_unasked(tmp_path: Path) -> None:
    """Where transformers knows the type it uses its own class; a tokenizer that needs its code is refused."""
    source, ran = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "ran"
    (source / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(own))
    llmprune.prune(source, tmp_path / "out", calibration=IDS)
    with pytest.raises(CheckpointError, match=r"runs code of its own.*--trust-remote-code"):
        llmprune.prune(source, tmp_path / "out2", calibration="demo")
    assert not ran.exists()
