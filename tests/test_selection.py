"""Selection on GPUs: the marks of a sort, for any scores, without a word to the host."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from llmprune import kernels
from llmprune.patterns import NM, Count, Unstructured
from pretended_gpu import pretended_gpu

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
scores = st.one_of(st.sampled_from([0.0, -0.0, -1.0, 1.0, float("inf"), float("-inf")]), st.floats(width=16))
rows_of_scores = st.integers(1, 24).flatmap(
    lambda width: st.lists(st.lists(scores.filter(lambda x: x == x), min_size=width, max_size=width), min_size=1)
)


def by_oracle(score_RC: Tensor, count: int) -> Tensor:
    return torch.tensor([oracle.remove_lowest(row, count) for row in score_RC.tolist()])


@settings(max_examples=200, deadline=None)
@given(rows=rows_of_scores, dtype=st.sampled_from(DTYPES), data=st.data())
def test_it_marks_what_a_sort_marks(rows: list[list[float]], dtype: torch.dtype, data: Any) -> None:
    count = data.draw(st.integers(1, len(rows[0])))
    score_RC = torch.tensor(rows).to(dtype)
    assert torch.equal(kernels.lowest(score_RC, count), by_oracle(score_RC, count))


@pytest.mark.parametrize("count", [1, 5000, 32768, 65535, 65536])
@pytest.mark.parametrize("distinct", [0, 1, 2, 300])
def test_counts_are_exact_in_a_large_matrix(distinct: int, count: int) -> None:
    score = torch.randn(1, 65536, generator=torch.Generator().manual_seed(0)).abs()
    score = (score * distinct).round() if distinct else score
    marked = kernels.lowest(score, count)
    assert sorted(marked[0].nonzero().flatten().tolist()) == sorted(score[0].argsort(stable=True)[:count].tolist())


def test_scores_that_differ_in_the_last_bit_are_told_apart() -> None:
    score = torch.full((1, 64), 0.3).view(torch.int32).add_(torch.randperm(64, dtype=torch.int32)).view(torch.float32)
    double = 1 + torch.rand(4, 64, dtype=torch.float64) * 1e-12
    for score_RC in (score, double):
        assert torch.equal(kernels.lowest(score_RC, 20), by_oracle(score_RC, 20))


@pytest.mark.parametrize(
    "pattern",
    [NM(2, 4), NM(8, 16), Count(100, 7 * 304), *(Unstructured(0.37, group) for group in ("row", "layer", "block"))],
    ids=repr,
)
def test_patterns_choose_the_same_on_a_gpu(pattern: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    score_OI = torch.randint(0, 40, (7, 304), generator=torch.Generator().manual_seed(0)).float()
    expected_OI = pattern.keep(score_OI)
    monkeypatch.setattr("llmprune.selection.is_on_cpu", lambda tensor: False)
    assert torch.equal(pattern.keep(score_OI), expected_OI)


@pytest.mark.parametrize(
    ("pattern", "most"),
    [(Unstructured(0.5), 12), (Unstructured(0.5, "row"), 12), (Count(5, 1 << 20), 12), (NM(2, 4), 20)],
)
def test_a_gpu_is_never_waited_for(pattern: Any, most: int) -> None:
    with pretended_gpu() as gpu:
        keep_OI = pattern.keep(torch.rand(1024, 1024).to("cuda"))
        assert keep_OI.shape == (1024, 1024) and keep_OI.dtype == torch.bool
    assert 5 < gpu.done.total <= most and not gpu.done.waits, gpu.done
