"""Zero-shot accuracy and the like, by stock lm-evaluation-harness: an extra, `pip install 'llmprune[lm-eval]'`."""

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llmprune.errors import DataError, RecipeError, did_you_mean
from llmprune.hub import brief
from llmprune.locate import locate
from llmprune.options import require_dtype, require_whole, resolve_device

_RESAMPLES = 1000  # for standard errors that have no formula


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Attributes:
        metric: with the harness's filter after a comma, such as `acc,none`.
        error: standard error, None where the harness gives none.
    """

    model: str
    task: str
    metric: str
    value: float
    error: float | None
    shots: int


@dataclass(frozen=True)
class TaskScores:
    """What lm-evaluation-harness found, and its version, which figures depend on."""

    scores: list[TaskScore]
    harness: str

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {"tasks": [asdict(score) for score in self.scores], "lm_eval": self.harness}

    def __str__(self) -> str:
        lines = [f"tasks by lm-evaluation-harness {self.harness}"]
        for score in self.scores:
            error = "" if score.error is None else f" ± {score.error:.4f}"
            name = f"{score.task} ({score.metric}, {score.shots} shots)"
            lines.append(f"  {score.model}  {name:40}  {score.value:.4f}{error}")
        return "\n".join(lines)


def evaluate_tasks(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> TaskScores:
    """Run tasks of lm-evaluation-harness on models.

    Args:
        models: folders, Hub ids, or `demo`.
        tasks: names that the harness knows, or of YAML files in `include_path`.
        shots: examples in the prompt; None is the task's own number.
        limit: examples a task, for a quick look; the figures are then no results.

    Raises:
        RecipeError: the harness is not installed, or a device or dtype is unknown.
        DataError: a task is unknown, or its data cannot be read.
    """
    for name, value in (("shots", shots), ("limit", limit), ("batch_size", batch_size)):
        require_whole(name, value, 0 if name == "shots" else 1)
    require_dtype(dtype)
    manager = known_tasks(tasks, include_path)
    import lm_eval
    import lm_eval.evaluator

    place = resolve_device(device)
    with _quietly(), _without_git(lm_eval.evaluator):
        scores: list[TaskScore] = []
        for model in models:
            arguments = {"pretrained": str(locate(model)), "dtype": dtype, "trust_remote_code": trust_remote_code}
            try:
                found = lm_eval.simple_evaluate(
                    model="hf", model_args=arguments, tasks=list(tasks), num_fewshot=shots, limit=limit,
                    device=str(place), batch_size=batch_size or 1, task_manager=manager, bootstrap_iters=_RESAMPLES,
                )  # fmt: skip
            except (OSError, ValueError, KeyError) as error:  # a data set that is missing or of another layout
                raise DataError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {brief(error)}") from error
            scores += _scores(str(model), found)
    return TaskScores(scores, lm_eval.__version__)


def known_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """Return the harness's list of tasks, which is made without a model, once these are found to be in it.

    Raises:
        RecipeError: the harness is not installed.
        DataError: a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("--tasks needs lm-evaluation-harness: pip install 'llmprune[lm-eval]'")
    from lm_eval.tasks import TaskManager

    with _quietly():
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            raise DataError(f"lm-evaluation-harness knows no task '{task}': {did_you_mean(task, manager.all_tasks)}")
    return manager


def _scores(model: str, found: dict[str, Any]) -> Iterator[TaskScore]:
    for task, figures in found["results"].items():
        for metric, value in figures.items():
            name, comma, kind = metric.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, float | int):
                error = figures.get(f"{name}_stderr,{kind}")
                shots = int(found["n-shot"].get(task, 0))
                yield TaskScore(model, task, metric, float(value), error if isinstance(error, float) else None, shots)


@contextmanager
def _without_git(evaluator: Any) -> Iterator[None]:
    """Keep the harness from asking git for the commit of the working folder: outside of git that complains on stderr."""
    with patch.object(evaluator, "get_git_commit_hash", lambda: None, create=True):
        yield


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the harness's log and its prints from stdout, which may have to hold JSON alone."""
    logging.disable(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(logging.NOTSET)
