"""The script that runs on a GPU machine, run without one: everything but the GPU itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")
def test_the_suite_runs_through_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {
        "PYTHON": sys.executable,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", "scripts/gpu_suite.sh", "--tiny", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [json.loads(line) for line in (tmp_path / "out" / "stages.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["status"]) for row in stages] == [
        ("imports", 0), ("tests", 0), ("products", 0), ("decode", 0),
    ]  # fmt: skip
    where, *products = [json.loads(line) for line in (tmp_path / "out" / "products.jsonl").read_text().splitlines()]
    assert where["row"] == "where" and where["versions"]["torch"]
    assert {row["pattern"] for row in products} == {"2:4", "50%", "60%", "70%"}
    assert {row["kernel"] for row in products} == {"dense", "mma_sp", "two_four", "expand", "bitmask"}
    assert all(row["error"] < 0.01 and row["seconds"][1] <= row["seconds"][0] <= row["seconds"][2] for row in products)
    decode = [json.loads(line) for line in (tmp_path / "out" / "decode.jsonl").read_text().splitlines()[1:]]
    assert {(row["pattern"], row["side"]) for row in decode} == {
        (pattern, side) for pattern in ("2:4", "50%") for side in ("dense", "sparse")
    }
    assert all(row["tokens_per_s"] > 0 and row["choices"] for row in decode)


@pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")
def test_packages_that_the_caller_has_brought_along_are_found(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "path: $PYTHONPATH"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": "/brought/along"}
    command = ["bash", "scripts/gpu_suite.sh", "--tiny", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (path, *_) = [line.removeprefix("path: ") for line in done.stdout.splitlines() if line.startswith("path: ")]
    assert path.split(":")[0] == str(ROOT) and path.split(":")[-1] == "/brought/along"
