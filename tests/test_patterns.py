"""Patterns: what can be asked for is read, and masks hold exactly what was asked for."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from llmprune import patterns
from llmprune.errors import PatternError
from llmprune.patterns import COMPARISON_GROUPS, NM, ComparisonGroup, Count, Pattern, Unstructured, parse
from llmprune.selection import lowest

NM_PATTERNS = [NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 5), NM(16, 32), NM(64, 128)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
finite_or_not = st.one_of(st.sampled_from([0.0, -1.0, 1.0, float("inf"), float("-inf")]), st.floats(width=16))
rows_of_scores = st.integers(1, 24).flatmap(
    lambda width: st.lists(st.lists(finite_or_not.filter(lambda x: x == x), min_size=width, max_size=width), min_size=1)
)


def scores(rows: int, columns: int, seed: int = 0, distinct: int = 0) -> Tensor:
    """Random scores; with `distinct`, of only that many values, so that most are tied."""
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        return torch.randint(0, distinct, (rows, columns), generator=generator).float()
    return torch.rand(rows, columns, generator=generator)


def marked_by_oracle(score_RC: Tensor, count: int) -> Tensor:
    return torch.tensor([oracle.remove_lowest(row, count) for row in score_RC.tolist()])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("50%", Unstructured(0.5)),
        ("0.5", Unstructured(0.5)),
        (0.5, Unstructured(0.5)),
        (".25", Unstructured(0.25)),
        (" 62.5 % ", Unstructured(0.625)),
        ("2:4", NM(2, 4)),
        ("4:8", NM(4, 8)),
        ("1:4", NM(1, 4)),
        ("8:16", NM(8, 16)),
        ("16:32", NM(16, 32)),
        ("64:128", NM(64, 128)),
    ],
)
def test_parse(text: Any, pattern: Pattern) -> None:
    assert parse(text) == pattern


@pytest.mark.parametrize(
    "text", ["0", "1", "0%", "100%", "150%", "1.5e3", "4:2", "0:4", "4:4", "abc", "", "2:4:8", "-0.5"]
)
def test_parse_refuses_in_one_line(text: str) -> None:
    with pytest.raises(PatternError) as error:
        parse(text)
    assert f"'{text}'" in str(error.value) and "\n" not in str(error.value)
    assert "did you mean" not in str(error.value)


def test_several_patterns_are_not_taken_for_a_misspelt_one() -> None:
    with pytest.raises(PatternError, match="one pattern is needed here, not '50%,2:4': only prune takes several"):
        parse("50%,2:4")


def test_parse_guesses_that_50_means_percent() -> None:
    with pytest.raises(PatternError, match="did you mean '50%'"):
        parse("50")


@pytest.mark.parametrize("pattern", [*NM_PATTERNS, Unstructured(0.5), Unstructured(0.625)])
def test_a_pattern_prints_as_what_parses_to_it(pattern: Unstructured | NM) -> None:
    assert parse(str(pattern)) == pattern


@settings(max_examples=200, deadline=None)
@given(rows=rows_of_scores, data=st.data())
def test_lowest_is_the_oracles_choice(rows: list[list[float]], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(rows[0])))
    dtype = data.draw(st.sampled_from(DTYPES))
    score_RC = torch.tensor(rows).to(dtype)
    assert torch.equal(lowest(score_RC, count), marked_by_oracle(score_RC, count))


@pytest.mark.parametrize("distinct", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 17, 63, 64])
def test_lowest_breaks_ties_by_index(distinct: int, count: int) -> None:
    score_RC = scores(9, 64, distinct=distinct)
    assert torch.equal(lowest(score_RC, count), marked_by_oracle(score_RC, count))


@pytest.mark.parametrize("distinct", [0, 2])
@pytest.mark.parametrize("chunk", [1, 48, 100, 1000])
def test_the_selection_does_not_depend_on_its_chunks(
    monkeypatch: pytest.MonkeyPatch, chunk: int, distinct: int
) -> None:
    score_RC = scores(13, 48, distinct=distinct)
    whole = lowest(score_RC, 20)
    monkeypatch.setattr("llmprune.selection._CHUNK_ELEMENTS", chunk)
    assert torch.equal(lowest(score_RC, 20), whole)


def test_float64_scores_that_float32_cannot_tell_apart_are_told_apart() -> None:
    score_RC = 1 + torch.rand(4, 64, dtype=torch.float64) * 1e-12
    assert torch.equal(lowest(score_RC, 20), marked_by_oracle(score_RC, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [0, 1, 3])
@pytest.mark.parametrize("group", COMPARISON_GROUPS)
@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.7, 0.999])
def test_unstructured_removes_exactly_what_was_asked_for(
    sparsity: float, group: ComparisonGroup, distinct: int, dtype: torch.dtype
) -> None:
    pattern = Unstructured(sparsity, group)
    keep_OI = pattern.keep(scores(7, 301, distinct=distinct).to(dtype))
    pattern.check(keep_OI)
    if group == "row":
        assert (~keep_OI).sum(1).tolist() == [int(301 * sparsity)] * 7
    else:
        assert int((~keep_OI).sum()) == int(7 * 301 * sparsity)


@pytest.mark.parametrize("distinct", [0, 1, 3])
@pytest.mark.parametrize("pattern", NM_PATTERNS, ids=str)
def test_nm_keeps_n_of_every_m(pattern: NM, distinct: int) -> None:
    score_OI = scores(5, 3 * pattern.m, distinct=distinct)
    keep_OI = pattern.keep(score_OI)
    pattern.check(keep_OI)
    groups = score_OI.reshape(-1, pattern.m)
    assert torch.equal(~keep_OI.reshape(-1, pattern.m), marked_by_oracle(groups, pattern.m - pattern.n))


def test_a_comparison_group_compares_within_itself_only() -> None:
    score_OI = scores(6, 300) + 10 * torch.arange(6)[:, None]
    assert (~Unstructured(0.5, "row").keep(score_OI)).sum(1).tolist() == [150] * 6
    assert (~Unstructured(0.5, "layer").keep(score_OI)).sum(1).tolist() == [300] * 3 + [0] * 3
    columns = scores(6, 300) + 10 * torch.arange(300)
    removed_I = (~Unstructured(0.5, "block").keep(columns)).sum(0)
    assert [int(part.sum()) for part in removed_I.split(128)] == [384, 384, 132]


def test_count_removes_its_part() -> None:
    pattern = Count(41, 96)
    keep_OI = pattern.keep(scores(8, 12, distinct=2))
    pattern.check(keep_OI)
    assert int((~keep_OI).sum()) == 41 and pattern.sparsity == 41 / 96
    assert pattern.misfit(8, 12) is None and pattern.misfit(8, 13) == "has 104 weights, not 96"


def test_nm_does_not_fit_a_width_that_m_does_not_divide() -> None:
    assert NM(2, 4).misfit(3, 8) is None
    assert NM(2, 4).misfit(4, 6) == "has 6 inputs, not divisible by 4"


@pytest.mark.parametrize(
    "pattern", [*NM_PATTERNS, Count(640, 1280), *(Unstructured(0.5, group) for group in COMPARISON_GROUPS)], ids=repr
)
def test_check_refuses_a_mask_with_one_weight_too_many_or_too_few(pattern: Pattern) -> None:
    columns = pattern.m * 2 if isinstance(pattern, NM) else 1280 // 2
    keep_OI = pattern.keep(scores(2, columns))
    for value in (True, False):
        wrong = keep_OI.clone()
        wrong[tuple((keep_OI != value).nonzero()[0])] = value
        with pytest.raises(PatternError):
            pattern.check(wrong)


def test_check_refuses_the_right_count_in_the_wrong_place() -> None:
    keep_OI = torch.tensor([[True, True, True, False, True, False, False, False]])
    Unstructured(0.5).check(keep_OI)
    with pytest.raises(PatternError, match="2:4 is violated in 2 groups of 4"):
        NM(2, 4).check(keep_OI)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("sparsity", [0.1, 0.29, 1 / 3, 0.57])
def test_block_budgets_add_up_to_the_whole(rows: int, sparsity: float) -> None:
    pattern = Unstructured(sparsity, "block")
    budgets = [pattern.block_budget(rows, *block) for block in patterns.column_blocks(777)]
    assert sum(budgets) == int(rows * 777 * sparsity)


def test_column_blocks_cover_every_column_once() -> None:
    assert patterns.column_blocks(300) == [(0, 128), (128, 256), (256, 300)]
    assert patterns.column_blocks(8, 3) == [(0, 3), (3, 6), (6, 8)]


def test_only_unstructured_takes_a_comparison_group() -> None:
    assert patterns.in_group(Unstructured(0.5), "row") == Unstructured(0.5, "row")
    assert patterns.in_group(NM(2, 4), "row") == NM(2, 4)
