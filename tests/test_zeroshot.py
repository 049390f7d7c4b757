"""Zero-shot tasks: the real lm-evaluation-harness on tasks in local files, where it is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune import cli
from llmprune.commands import evaluate as command
from llmprune.errors import DataError, RecipeError
from llmprune_eval.zeroshot import evaluate_tasks

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

ROOT = Path(__file__).parent.parent
QUESTIONS = [
    {"question": "The capital of", "choices": [" the", " zzz qqq"], "answer": 0},
    {"question": "He was born in", "choices": [" the", " xqj", " 1 9"], "answer": 1},
    {"question": "It is", "choices": [" a", " qq"], "answer": 0},
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one multiple-choice task, its data beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), "utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local_choice.yaml").write_text(TASK.format(file=data), "utf-8")
    return folder


def log_likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    start = len(tokenizer(question)["input_ids"])
    ids = torch.tensor(tokenizer(question + choice)["input_ids"])
    with torch.no_grad():
        scores = model(ids[None]).logits[0].float().log_softmax(-1)
    return float(scores[range(start - 1, len(ids) - 1), ids[start:]].sum())


@installed
def test_a_local_task_scores_as_its_definition_says(tasks: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmprune.locate import demo_folder

    model = AutoModelForCausalLM.from_pretrained(demo_folder(), dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    right = 0
    for row in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, str(row["question"]), choice) for choice in row["choices"]]  # type: ignore[attr-defined]
        right += max(range(len(scores)), key=scores.__getitem__) == row["answer"]
    found = evaluate_tasks(["demo"], ["local_choice"], include_path=tasks)
    (score,) = [score for score in found.scores if score.metric == "acc,none"]
    assert (score.task, score.model, score.shots) == ("local_choice", "demo", 0)
    assert score.value == pytest.approx(right / len(QUESTIONS)) and 0 < right < len(QUESTIONS)
    share = right / len(QUESTIONS)
    assert score.error == pytest.approx((share * (1 - share) / (len(QUESTIONS) - 1)) ** 0.5)
    assert "local_choice (acc,none, 0 shots)" in str(found)


@installed
def test_an_unknown_task_is_one_line(tasks: Path) -> None:
    with pytest.raises(DataError, match="knows no task 'local_choise': did you mean 'local_choice'"):
        evaluate_tasks(["demo"], ["local_choise"], include_path=tasks)


@installed
def test_an_unknown_task_is_named_before_any_text_or_model_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work was done before the tasks were checked")

    monkeypatch.setattr("llmprune_eval.perplexity.evaluate", never)
    monkeypatch.setattr("llmprune_eval.zeroshot.locate", never)
    for options in (["--data", "demo"], []):
        with pytest.raises(DataError, match="knows no task 'foo'"):
            cli.cli.main(["eval", "demo", "--tasks", "foo", *options], standalone_mode=False)


@installed
def test_the_json_of_tasks_is_alone_on_stdout(tasks: Path, tmp_path: Path) -> None:
    arguments = ["eval", "demo", "--tasks", "local_choice", "--include-path", str(tasks), "--json"]
    rooms = [str(ROOT / room) for room in (".", "kernels", "eval")]
    no_git = {"PYTHONPATH": os.pathsep.join(rooms), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    words = [sys.executable, "-m", "llmprune", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=os.environ | no_git)
    assert done.returncode == 0, done.stderr
    assert "fatal" not in done.stderr
    assert [row["task"] for row in json.loads(done.stdout)["tasks"]] == ["local_choice"]


def test_without_the_harness_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'llmprune\[lm-eval\]'"):
        evaluate_tasks(["demo"], ["arc_easy"])


def test_an_option_that_means_nothing_for_tasks_is_one_line() -> None:
    with pytest.raises(RecipeError, match="--save means nothing for --tasks: give --data too"):
        cli.cli.main(["eval", "demo", "--tasks", "arc_easy", "--save"], standalone_mode=False)


@pytest.mark.parametrize("save", [True, False])
def test_tasks_that_are_stopped_say_whether_the_figures_on_the_text_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], save: bool
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_require_known", lambda *_: None)
    monkeypatch.setattr(command, "_perplexities", lambda *_: None)
    monkeypatch.setattr(command, "_task_scores", stopped)
    monkeypatch.setattr(sys, "argv", ["llmprune", "eval", "demo", "--data", "demo", "--tasks", "a"] + ["--save"] * save)
    with pytest.raises(SystemExit):
        cli.main()
    kept = "figures on the text were added to llmprune.json" if save else "nothing was written"
    assert capsys.readouterr().err.strip() == f"llmprune: interrupted, {kept}"


def test_an_option_of_tasks_without_tasks_is_one_line() -> None:
    with pytest.raises(
        RecipeError, match="--limit goes with --tasks: give --tasks too; for a part of a text use --win"
    ):
        cli.cli.main(["eval", "demo", "--limit", "4"], standalone_mode=False)
    with pytest.raises(RecipeError, match="--include-path goes with --tasks: give --tasks too"):
        cli.cli.main(["eval", "demo", "--include-path", "."], standalone_mode=False)
