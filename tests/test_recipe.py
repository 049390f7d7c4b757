"""Recipes: every option is checked before any work, and a wrong one is named with the way out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune import methods
from llmprune.errors import LlmpruneError, PatternError, RecipeError
from llmprune.locate import DEMO
from llmprune.methods.magnitude import Magnitude
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.methods.wanda import Wanda
from llmprune.options import resolve_device
from llmprune.patterns import NM, ComparisonGroup, Unstructured
from llmprune.presets import PRESETS, as_yaml
from llmprune.recipe import Recipe
from llmprune.recipefiles import read_recipe
from llmprune.statistics import Gradient, Gram

GOOD: dict[str, Any] = {
    "method": "wanda",
    "pattern": "2:4",
    "comparison_group": None,
    "method_options": {},
    "calibration": "c4",
    "samples": 3,
    "length": 64,
    "seed": 7,
    "device": "cpu",
    "dtype": "bfloat16",
    "batch_size": 2,
    "true_sequential": True,
    "dense_target": 0.0,
    "allocation": "uniform",
    "allocation_range": 0.1,
    "sparsities": {},
    "overrides": {"*.q_proj.weight": {"method": "magnitude", "pattern": "40%"}},
    "tune_epochs": 2,
    "tune_rate": 0.1,
    "autocast": True,
    "deterministic": True,
    "include": ("lm_head.weight",),
    "exclude": ("*.0.*",),
    "revision": "main",
    "trust_remote_code": True,
}


def message(options: dict[str, Any], kind: type[LlmpruneError] = RecipeError) -> str:
    with pytest.raises(kind) as error:
        Recipe.of(options)
    assert "\n" not in str(error.value)
    return str(error.value)


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    return path


def test_every_field_is_heard() -> None:
    recipe = Recipe.of(GOOD)
    assert {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)} == GOOD
    assert GOOD.keys() == {field.name for field in dataclasses.fields(recipe)}


def test_nothing_asked_for_is_sparsegpt_at_half() -> None:
    recipe = Recipe.of({})
    assert recipe == Recipe()
    assert (recipe.solver(), recipe.target()) == (SparseGPT(), Unstructured(0.5, "block"))
    assert recipe.compute_dtype() is None


@pytest.mark.parametrize(
    ("name", "near"),
    [("metod", "method"), ("patern", "pattern"), ("sample", "samples"), ("batchsize", "batch_size")],
)
def test_an_unknown_option_gets_the_nearest_name(name: str, near: str) -> None:
    assert message({name: 1}) == f"unknown option '{name}': did you mean '{near}'?"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, not 0"),
        ({"samples": "8"}, "samples must be a whole number of at least 1, not '8'"),
        ({"samples": True}, "not True"),
        ({"length": 1}, "length must be a whole number of at least 2, not 1"),
        ({"batch_size": 0.5}, "batch_size must be a whole number"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"dtype": "float8"}, "unknown dtype 'float8': did you mean 'float"),
        ({"dtype": None}, "unknown dtype 'None'"),
        ({"dtype": torch.float16}, "unknown dtype 'torch.float16': did you mean 'float16'"),
        ({"true_sequential": "no"}, "true_sequential must be true or false, not 'no'"),
        ({"trust_remote_code": "no"}, "trust_remote_code must be true or false, not 'no'"),
        ({"include": 5}, "include must be a glob or a list of globs, not 5"),
        ({"exclude": ["a", 1]}, "exclude must be a glob or a list of globs"),
        ({"method_options": ["damp"]}, "method_options must map names to values"),
        ({"method": "wand"}, "unknown method 'wand': did you mean 'wanda'"),
        ({"method": 5}, "method must be a name or a method object, not 5"),
        ({"method": Wanda}, "method must be a name or a method object"),
        ({"method": Wanda(), "method_options": {"damp": 1}}, "set them in wanda itself"),
        ({"method_options": {"dampp": 1}}, "method 'sparsegpt' has no option 'dampp'"),
        ({"method_options": {"damp": True}}, "method 'sparsegpt': damp=True is not a float"),
        ({"method_options": {1: 2}}, "method 'sparsegpt' has no option '1': known: arithmetic, block_size, damp"),
        ({"preset": ["fast"]}, "unknown preset '['fast']': did you mean 'fast'?"),
        ({"preset": "best", "overrides": {4: {"pattern": "2:4"}}}, "overrides: a glob must be text, not 4"),
        ({"sparsities": {4: "40%"}}, "sparsities: a glob must be text, not 4"),
        ({"allocation_range": True}, "allocation_range must be a number between 0 and 1, not True"),
        ({"tune_rate": True}, "tune_rate must be a number above 0, not True"),
        ({"preset": "best", "samples": 1}, "tune_epochs holds out a tenth of the samples: ask for more"),
        ({"comparison_group": "rows"}, "unknown comparison_group 'rows': did you mean 'row'"),
        ({"comparison_group": 5}, "unknown comparison_group '5'"),
        ({"comparison_group": "layer"}, "sparsegpt cannot compare per layer: it takes row, block"),
        (
            {"comparison_group": "model", "method": "wanda"},
            "wanda cannot compare per model: it takes row, layer, block",
        ),
        ({"comparison_group": "row", "pattern": "2:4"}, "'row' has no meaning for 2:4"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], part: str) -> None:
    assert part in message(options)


def test_a_wrong_pattern_is_named() -> None:
    assert "4:2" in message({"pattern": "4:2"}, PatternError)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", None, 99])
def test_a_device_that_is_not_here_is_named(device: Any) -> None:
    assert message({"device": device}) == f"device '{device}' is not available here; use --device cpu or --device auto"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_by_name_or_as_torch_has_it(device: Any) -> None:
    recipe = Recipe.of({"device": device})
    assert recipe.place() == torch.device("cpu") and recipe.to_json()["device"] == "cpu"


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"method": "magnitude"}, Unstructured(0.5, "layer")),
        ({"method": "wanda"}, Unstructured(0.5, "row")),
        ({"method": "sparsegpt"}, Unstructured(0.5, "block")),
        ({"method": "sparsegpt", "comparison_group": "row"}, Unstructured(0.5, "row")),
        ({"method": "magnitude", "comparison_group": "model", "pattern": 0.7}, Unstructured(0.7, "model")),
        ({"method": "wanda", "pattern": "4:8"}, NM(4, 8)),
    ],
)
def test_the_comparison_group_is_the_methods_own_unless_asked_for(options: dict[str, Any], target: Any) -> None:
    assert Recipe.of(options).target() == target


@pytest.mark.parametrize("method", methods.names())
def test_weights_compete_as_in_the_methods_paper(method: str) -> None:
    per_row, per_block = ("wanda", "ria", "dsnot", "sparseswaps"), ("sparsegpt",)
    group: ComparisonGroup = "row" if method in per_row else "block" if method in per_block else "layer"
    assert Recipe.of({"method": method}).target() == Unstructured(0.5, group)


def test_a_method_object_is_taken_as_it_is() -> None:
    recipe = Recipe.of({"method": SparseGPT(damp=0.5)})
    assert recipe.solver() == SparseGPT(damp=0.5)
    assert recipe.to_json()["method"] == "sparsegpt"
    told = {"damp": 0.5, "block_size": 128, "arithmetic": "paper", "sampling_damp": 0.0}
    assert recipe.to_json()["method_options"] == told
    assert Recipe.of({"method": Magnitude()}).target() == Unstructured(0.5, "layer")


@pytest.mark.parametrize(("given", "globs"), [("a*", ("a*",)), (["a", "b"], ("a", "b")), (None, ()), ((), ())])
def test_globs_may_be_one_many_or_none(given: Any, globs: tuple[str, ...]) -> None:
    assert Recipe.of({"include": given}).include == globs


@pytest.mark.parametrize(
    ("calibration", "told"), [(None, None), ("c4", "c4"), (Path("a.txt"), "a.txt"), (["a text"], "in memory")]
)
def test_the_json_of_a_recipe_is_json(calibration: Any, told: str | None) -> None:
    fields = Recipe.of({"calibration": calibration, "pattern": 0.5}).to_json()
    assert json.loads(json.dumps(fields))["calibration"] == told
    assert fields["comparison_group"] == "block" and fields["pattern"] == "0.5"


def test_the_json_of_a_recipe_is_a_recipe() -> None:
    fields = Recipe.of(GOOD).to_json()
    assert Recipe.of(fields).to_json() == fields


def test_the_json_of_a_shared_out_sparsity_is_a_recipe() -> None:
    shared = {"allocation": "owl", "pattern": "50%", "sparsities": {"*.down_proj.weight": 0.4}}
    fields = Recipe.of(GOOD | shared).to_json()
    assert Recipe.of(fields).to_json() == fields and fields["sparsities"] == {"*.down_proj.weight": "0.4"}


def test_demo_calibrates_on_its_own_text() -> None:
    assert Recipe().for_model(DEMO).calibration == DEMO
    assert Recipe(calibration="c4").for_model(DEMO).calibration == "c4"
    assert Recipe().for_model("elsewhere").calibration is None


def test_a_file_holds_options(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "method: wanda\npattern: 50%\nsamples: 8\nexclude: ['*.0.*']\nlength:\n")
    options = read_recipe(path)
    assert options == {"method": "wanda", "pattern": "50%", "samples": 8, "exclude": ["*.0.*"], "length": None}
    assert Recipe.of(options).exclude == ("*.0.*",)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16", "16:32", "64:128"])
def test_an_nm_pattern_in_a_file_needs_no_quotes(tmp_path: Path, pattern: str) -> None:
    assert read_recipe(recipe_file(tmp_path, f"pattern: {pattern}\nseed: 10\n")) == {"pattern": pattern, "seed": 10}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- wanda\n- 50%\n", "must map option names to values"),
        ("", "must map option names to values"),
        ("wanda", "must map option names to values"),
        ("1: wanda", "must map option names to values"),
        ("method: [wanda", "is not valid YAML"),
        ("seed: 2024-99-99", "is not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("seed: 1\nmethod: wanda\nseed: 2\n", "'seed' stands twice in one mapping"),
        ("overrides:\n  '*.mlp.*': {pattern: 2:4}\n  '*.mlp.*': {method: wanda}\n", "'*.mlp.*' stands twice"),
        ("method_options: damp\n", "method_options must map names to values, not 'damp'"),
        ("method_options:\n", "method_options must map names to values, not None"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, part: str) -> None:
    path = recipe_file(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert str(path) in str(error.value) and part in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"method: \xff\xfe")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        read_recipe(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dense_target": 1.5, "true_sequential": True}, "from 0 to 1"),
        ({"dense_target": "half", "true_sequential": True}, "from 0 to 1"),
        ({"dense_target": True, "true_sequential": True}, "from 0 to 1, or 'auto', not True"),
        ({"dense_target": 0.5}, "needs true_sequential"),
        ({"dense_target": "auto"}, "needs true_sequential"),
        ({"dense_target": 0.5, "true_sequential": True, "method": "wanda"}, "wanda fits no outputs"),
    ],
)
def test_a_dense_target_that_cannot_be_met_is_refused(options: dict[str, Any], says: str) -> None:
    assert says in message(options)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_recipe_and_what_is_given_beside_it_wins(name: str) -> None:
    recipe = Recipe.of({"preset": name})
    assert recipe.method == PRESETS[name]["method"]
    assert recipe.dense_target == "auto"
    assert Recipe.of({"preset": name, "dense_target": 0.25}).dense_target == 0.25
    assert Recipe.of({"preset": name, "method_options": {"damp": 0.5}}).method_options["damp"] == 0.5


def test_another_method_than_the_presets_keeps_its_own_hyper_parameters() -> None:
    assert Recipe.of({"preset": "balanced", "method": "sparsegpt"}).solver() == SparseGPT()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_a_preset_goes_with_every_method(name: str, method: str, pattern: str) -> None:
    recipe = Recipe.of({"preset": name, "method": method, "pattern": pattern})
    assert bool(recipe.dense_target) == (recipe.solver().needs is Gram)
    sums_inputs = recipe.needs not in (None, Gradient)
    assert (recipe.tune_epochs > 0) == (name == "best" and sums_inputs)
    assert recipe.autocast == sums_inputs
    if recipe.solver().needs is not Gram:
        assert f"{method} fits no outputs: leave out dense_target" in message(
            {"preset": name, "method": method, "dense_target": 0.5}
        )


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    assert "unknown preset 'balance': did you mean 'balanced'" in message({"preset": "balance"})


def test_a_preset_may_stand_in_a_recipe_file(tmp_path: Path) -> None:
    assert Recipe.of(read_recipe(recipe_file(tmp_path, "preset: fast\nseed: 3"))).seed == 3


def test_printed_presets_are_recipe_files(tmp_path: Path) -> None:
    for text in as_yaml().split("# ")[1:]:
        title, body = text.split("\n", 1)
        name, _, groups = title.partition(", ")
        pattern = {"pattern": "2:4" if groups else "50%"}
        assert Recipe.of(read_recipe(recipe_file(tmp_path, body)) | pattern) == Recipe.of({"preset": name} | pattern)


def test_auto_is_the_first_gpu_with_its_number_as_tensors_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: empty(size).as_subclass(_OnFirstGpu))
    for name in ("auto", "cuda"):
        assert resolve_device(name) == torch.device("cuda:0") != torch.device("cuda")


class _OnFirstGpu(torch.Tensor):
    device = torch.device("cuda:0")
