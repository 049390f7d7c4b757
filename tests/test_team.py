"""Several ranks prune as one process does, to the byte; and when one is lost, the others say so and are resumed."""

from pathlib import Path
from typing import Any

import pytest

import faults
import tiny
from ranks import Job, Ranks, prune_all

IDS = tiny.ids(5, 16).tolist()
FAMILIES = ("llama", "gemma2", "gpt2", "qwen3-moe")
RECIPES: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "calibration": IDS},
    "sparsegpt": {"method": "sparsegpt", "calibration": IDS},
    "balanced": {"preset": "balanced", "calibration": IDS},
}
# What else has ways of its own: methods, orders, ends of the model, budgets, uneven shares, more ranks than batches.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "2:4, fast": ("llama", {"preset": "fast", "pattern": "2:4", "calibration": IDS}),
    "true sequential": ("llama", {"true_sequential": True, "calibration": IDS}),
    "true sequential, experts": ("qwen3-moe", {"true_sequential": True, "calibration": IDS}),
    "one sequence": ("llama", {"calibration": IDS[:1]}),
    "one sequence, in order": ("llama", {"preset": "fast", "calibration": IDS[:1]}),
    "three sequences, experts": ("qwen3-moe", {"calibration": IDS[:3], "method": "ria"}),
    "batches of two": ("llama", {"calibration": IDS, "batch_size": 2}),
    "head": ("llama", {"calibration": IDS, "include": "lm_head.weight", "method": "obd"}),
    "no calibration": ("llama", {"method": "magnitude", "comparison_group": "model", "include": "*"}),
    "random": ("gpt2", {"method": "random"}),
    "exchanges": ("llama", {"method": "sparseswaps", "calibration": IDS, "dtype": "bfloat16"}),
}
CASES = {f"{family}, {name}": (family, recipe) for family in FAMILIES for name, recipe in RECIPES.items()} | MORE


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tiny checkpoint of each family."""
    folder = tmp_path_factory.mktemp("sources")
    return {family: tiny.save(tiny.model(family), folder / family) for family in FAMILIES}


def jobs(sources: dict[str, Path], out: Path) -> list[Job]:
    return [((sources[family], out / name), options) for name, (family, options) in CASES.items()]


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of what one process makes of all cases."""
    out = tmp_path_factory.mktemp("alone")
    ranks = Ranks(1, out / "said", prune_all, jobs(sources, out))
    assert ranks.codes() == [0], ranks.said(0)
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_prune_as_one_process_does(size: int, sources: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    ranks = Ranks(size, tmp_path / "said", prune_all, jobs(sources, tmp_path))
    assert ranks.codes() == [0] * size, [ranks.said(rank) for rank in range(size)]
    for name in CASES:
        assert faults.content(tmp_path / name) == faults.content(alone / name), name
