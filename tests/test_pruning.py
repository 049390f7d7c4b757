"""The real program on tiny checkpoints: what it writes, that it is exact, and that failures leave nothing."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import llmprune
import tiny
from llmprune import kernels, methods
from llmprune.errors import (
    CheckpointError,
    DataError,
    LlmpruneError,
    NumericalError,
    PatternError,
    RecipeError,
    UnsupportedModelError,
)
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.model import streamed_logits
from llmprune.report import Report

METHODS = ["magnitude", "random", "wanda", "sparsegpt"]
IDS = tiny.ids(6, 24)

Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return a function that saves a tiny model once and returns its folder, which tests do not write to."""
    place, done = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def save(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
        name = f"{family}-{dtype}-{seed}"
        if name not in done:
            done[name] = tiny.save(tiny.model(family, dtype, seed), place / name)
        return done[name]

    return save


@pytest.fixture(autouse=True)
def nothing_is_left_over(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.replaced"))


def prune(source: Path, out: Path, **options: Any) -> Report:
    return llmprune.prune(source, out, **{"calibration": IDS} | options)


def stored_layout(folder: Path) -> dict[str, list[tuple[str, list[int], str]]]:
    """Return name, shape and dtype of every tensor, in the order of each file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118
            found[path.name] = [(name, part.get_shape(), part.get_dtype()) for name, part in slices]
    return found


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Compare what both have: a tied head is in a model's state, but not in its file."""
    return all(tiny.same_bytes(a[name], b[name]) for name in a.keys() & b.keys())


def without_times(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    measured = ("timings", "peak_memory_bytes", "memory_bytes")
    return {name: value for name, value in report.items() if name not in measured}


def require_exact(family: str, method: str, pattern: str, report: Report, tensors: dict[str, Tensor]) -> None:
    for site in report.sites:
        stored = tensors[site.name]
        weight_OI = stored.T if family == "gpt2" else stored
        assert tuple(weight_OI.shape) == site.shape
        empty_OI = weight_OI == 0
        assert not bool((empty_OI & torch.signbit(weight_OI)).any())
        if pattern == "2:4":
            assert bool((empty_OI.reshape(-1, 4).sum(1) == 2).all())
        elif method == "wanda":
            assert bool((empty_OI.sum(1) == int(site.shape[1] * 0.5)).all())
        assert int(empty_OI.sum()) == site.zeros == int(weight_OI.numel() * 0.5)


def expected_sites(family: str) -> int:
    blocks = tiny.config(family).num_hidden_layers
    return int(blocks * {"gpt2": 4, "opt": 6}.get(family, 7))


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "gemma2"])
def test_a_checkpoint_is_pruned_exactly_and_nothing_else_changes(
    family: str, method: str, pattern: str, saved: Saved, tmp_path: Path
) -> None:
    source, out = saved(family), tmp_path / "out"
    report = prune(source, out, method=method, pattern=pattern)
    assert torch.equal(tiny.logits(tiny.load(out), IDS), streamed_logits(out, IDS))

    names = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"llmprune.json"}
    assert len(stored_layout(source)) > 1
    assert stored_layout(out) == stored_layout(source)
    for name in (name for name in names if not name.endswith(".safetensors")):
        assert (out / name).read_bytes() == (source / name).read_bytes()

    before, after = tiny.tensors(source), tiny.tensors(out)
    assert len(report.sites) == expected_sites(family)
    require_exact(family, method, pattern, report, after)
    dense = before.keys() - {site.name for site in report.sites}
    assert all(tiny.same_bytes(before[name], after[name]) for name in dense)
    assert llmprune.inspect(out).verified


def test_the_config_says_nothing_of_quantization_or_sparsity(saved: Saved, tmp_path: Path) -> None:
    prune(saved("llama"), tmp_path / "out", method="magnitude")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "sparsity_config", "compression_config"}


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda"])
def test_mask_methods_leave_survivors_as_they_are(method: str, saved: Saved, tmp_path: Path) -> None:
    report = prune(saved("qwen3", torch.bfloat16), tmp_path / "out", method=method)
    before, after = tiny.tensors(saved("qwen3", torch.bfloat16)), tiny.tensors(tmp_path / "out")
    for site in report.sites:
        assert torch.equal(after[site.name], before[site.name] * (after[site.name] != 0))


def test_the_report_says_what_was_done(saved: Saved, tmp_path: Path) -> None:
    report = prune(saved("llama"), tmp_path / "out", method="wanda", pattern="2:4", seed=7)
    written = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert written == json.loads(json.dumps(report.to_json())) | {
        name: written[name] for name in ("peak_memory_bytes", "companions")
    }
    assert written["seed"] == written["recipe"]["seed"] == 7
    assert (written["recipe"]["method"], written["recipe"]["pattern"]) == ("wanda", "2:4")
    assert written["calibration"]["sequences"] == len(IDS)
    assert written["calibration"]["tokens"] == IDS.numel()
    assert len(written["calibration"]["fingerprint"]) == 64
    assert written["versions"].keys() >= {"python", "torch", "transformers", "safetensors"}
    assert written["timings"].keys() >= {"load", "copy", "statistics", "solve", "forward", "write"}
    assert written["peak_memory_bytes"]["host"] > 0
    for site in written["sites"]:
        assert site["sparsity"] == 0.5
        assert 0 < site["error"] < 1
        assert site["tokens"] == IDS.numel()
    assert written["sparsity"]["sites"] == 0.5
    zeros = sum(int((tensor == 0).sum()) for tensor in tiny.tensors(tmp_path / "out").values())
    assert written["sparsity"]["all_parameters"] == zeros / written["parameters"]["all"]
    assert written["left_dense"] == {"model.embed_tokens.weight": "embedding", "lm_head.weight": "output head"}
    assert "21 matrices in 3 blocks" in str(report)


def test_the_reported_error_is_that_of_the_outputs(saved: Saved, tmp_path: Path) -> None:
    """For the first group of the first block, whose inputs pruning does not change."""
    report = prune(saved("llama"), tmp_path / "out", method="sparsegpt")
    dense, sparse = tiny.load(saved("llama")), tiny.load(tmp_path / "out")
    seen: list[Tensor] = []
    q_proj = dense.model.layers[0].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tiny.logits(dense, IDS)
    expected, found = q_proj(seen[0]), sparse.model.layers[0].self_attn.q_proj(seen[0])
    error = ((expected - found).square().sum() / expected.square().sum()).item()
    (site,) = (site for site in report.sites if site.name == "model.layers.0.self_attn.q_proj.weight")
    assert site.error == pytest.approx(error, rel=1e-3)
    assert site.error_norm == "gram"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_loaded_model_gets_the_weights_of_the_streamed_run(
    method: str, family: str, dtype: torch.dtype, saved: Saved, tmp_path: Path
) -> None:
    source = saved(family, dtype)
    prune(source, tmp_path / "out", method=method)
    model = tiny.load(source)
    llmprune.prune(model, method=method, calibration=IDS)
    assert same_weights(weights_of(model), tiny.tensors(tmp_path / "out"))


def test_a_model_in_training_mode_is_pruned_without_dropout(saved: Saved, tmp_path: Path) -> None:
    prune(saved("gpt2"), tmp_path / "out")
    model = tiny.load(saved("gpt2")).train()
    llmprune.prune(model, calibration=IDS)
    assert same_weights(weights_of(model), tiny.tensors(tmp_path / "out"))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_model_offloaded_to_the_host_is_pruned_there(method: str, family: str, saved: Saved, tmp_path: Path) -> None:
    prune(saved(family), tmp_path / "out", method=method)
    model = tiny.load(saved(family))
    cpu_offload(model, execution_device=torch.device("cpu"))
    llmprune.prune(model, method=method, calibration=IDS)
    assert torch.equal(tiny.logits(model, IDS), streamed_logits(tmp_path / "out", IDS))


def test_a_dispatched_model_is_pruned_in_place(saved: Saved, tmp_path: Path) -> None:
    prune(saved("llama"), tmp_path / "out")
    model = tiny.load(saved("llama"))
    dispatch_model(model, device_map={"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    llmprune.prune(model, calibration=IDS)
    assert same_weights(weights_of(model), tiny.tensors(tmp_path / "out"))


def test_a_model_offloaded_to_disk_is_refused_before_any_change(saved: Saved, tmp_path: Path) -> None:
    model = tiny.load(saved("llama"))
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    dispatch_model(model, device_map=places, main_device="cpu", offload_dir=str(tmp_path / "offload"))
    before = tiny.logits(model, IDS)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\..*offloaded to disk") as caught:
        llmprune.prune(model, method="magnitude")
    assert "\n" not in str(caught.value)
    assert torch.equal(tiny.logits(model, IDS), before)


def test_negative_zeros_of_a_loaded_model_become_positive() -> None:
    model = tiny.model("llama")
    up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    up.data[:3] = -0.0
    llmprune.prune(model, method="random")
    assert not bool(((up == 0) & torch.signbit(up)).any())


def test_an_output_folder_for_a_loaded_model_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="save_pretrained"):
        llmprune.prune(tiny.load(saved("llama")), tmp_path / "out", method="magnitude")


def test_a_checkpoint_needs_an_output_folder(saved: Saved) -> None:
    with pytest.raises(RecipeError, match="output folder"):
        llmprune.prune(saved("llama"), method="magnitude")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes(method: str, saved: Saved, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prune(saved("llama", torch.bfloat16), tmp_path / name, method=method, seed=3)
    for path in (tmp_path / "one").iterdir():
        if path.name != "llmprune.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert without_times(tmp_path / "one" / "llmprune.json") == without_times(tmp_path / "two" / "llmprune.json")


@pytest.mark.parametrize("options", [{"preset": "balanced"}, {"method": "wanda", "pattern": ["50%", "2:4"]}])
def test_a_default_device_of_the_user_s_changes_nothing(options: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    """As in a notebook that begins with `torch.set_default_device("cuda")`; from `meta` nothing could be read."""
    prune(saved("llama"), tmp_path / "plain", **options)
    torch.set_default_device("meta")
    try:
        prune(saved("llama"), tmp_path / "out", device="cpu", **options)
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
    for path in (tmp_path / "plain").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "plain")).read_bytes()


def test_only_operations_that_repeat_themselves_are_used_where_that_is_asked_for(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    plain = SparseGPT.solve

    def solve(*arguments: Any) -> Any:
        modes.append(torch.are_deterministic_algorithms_enabled())
        return plain(*arguments)

    monkeypatch.setattr(SparseGPT, "solve", solve)
    for name, wanted in (("free", False), ("repeatable", True)):
        prune(saved("qwen3-moe"), tmp_path / name, deterministic=wanted)
        assert set(modes) == {wanted} and not torch.are_deterministic_algorithms_enabled()
        modes.clear()
    assert same_weights(tiny.tensors(tmp_path / "free"), tiny.tensors(tmp_path / "repeatable"))


def test_an_operation_that_does_not_repeat_itself_is_refused_by_name(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve(*arguments: Any) -> NoReturn:
        raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic")

    monkeypatch.setattr(SparseGPT, "solve", solve)
    says = "put_ does not have a deterministic implementation: run without --deterministic"
    with pytest.raises(UnsupportedModelError, match=says):
        prune(saved("llama"), tmp_path / "out", deterministic=True)


def test_another_seed_draws_another_random_mask(saved: Saved, tmp_path: Path) -> None:
    for seed in (0, 1):
        prune(saved("llama"), tmp_path / str(seed), method="random", seed=seed)
    assert not same_weights(tiny.tensors(tmp_path / "0"), tiny.tensors(tmp_path / "1"))


@pytest.mark.parametrize("options", [{"method": "random"}, {"preset": "best"}], ids=str)
def test_any_whole_number_is_a_seed(options: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    report = llmprune.prune(saved("llama"), tmp_path / "out", seed=10**30, calibration=IDS, **options)
    assert report.zeros == report.site_parameters // 2


def test_another_seed_or_data_gives_another_fingerprint(tmp_path: Path, saved: Saved) -> None:
    def fingerprint(name: str, **options: Any) -> str:
        report = prune(saved("llama"), tmp_path / name, method="wanda", **options)
        assert report.calibration is not None
        return str(report.calibration["fingerprint"])

    assert fingerprint("a") == fingerprint("b") != fingerprint("c", calibration=tiny.ids(seed=2))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_batch_size_changes_next_to_nothing(method: str, batch_size: int, saved: Saved, tmp_path: Path) -> None:
    prune(saved("llama"), tmp_path / "one", method=method, batch_size=6)
    report = prune(saved("llama"), tmp_path / "two", method=method, batch_size=batch_size)
    one, two = tiny.tensors(tmp_path / "one"), tiny.tensors(tmp_path / "two")
    differing = sum(int(((one[site.name] == 0) != (two[site.name] == 0)).sum()) for site in report.sites)
    assert differing <= 1e-3 * report.site_parameters


def test_rows_of_several_lengths_are_all_used(saved: Saved, tmp_path: Path) -> None:
    rows = [IDS[0].tolist(), IDS[1, :9].tolist(), IDS[2, :9].tolist(), IDS[3].tolist()]
    report = prune(saved("llama"), tmp_path / "out", method="wanda", calibration=rows)
    assert {site.tokens for site in report.sites} == {24 + 9 + 9 + 24}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_true_sequential_is_exact_and_another_result(family: str, saved: Saved, tmp_path: Path) -> None:
    prune(saved(family), tmp_path / "one")
    report = prune(saved(family), tmp_path / "two", true_sequential=True)
    two = tiny.tensors(tmp_path / "two")
    require_exact(family, "sparsegpt", "50%", report, two)
    assert len(report.sites) == expected_sites(family)
    assert not same_weights(tiny.tensors(tmp_path / "one"), two)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_the_output_head_is_pruned_where_that_is_asked_for(
    family: str, method: str, saved: Saved, tmp_path: Path
) -> None:
    report = prune(saved(family), tmp_path / "out", method=method, include="lm_head.weight")
    assert len(report.sites) == expected_sites(family) + 1
    assert report.sites[-1].name == "lm_head.weight"
    head = tiny.load(tmp_path / "out").lm_head.weight
    assert int((head == 0).sum()) == head.numel() // 2
    assert torch.equal(tiny.logits(tiny.load(tmp_path / "out"), IDS), streamed_logits(tmp_path / "out", IDS))
    assert llmprune.inspect(tmp_path / "out").verified


def test_a_loaded_models_tied_head_is_pruned_as_the_streamed_one(saved: Saved, tmp_path: Path) -> None:
    prune(saved("llama-tied"), tmp_path / "out", include="lm_head.weight")
    model = tiny.load(saved("llama-tied"))
    llmprune.prune(model, calibration=IDS, include="lm_head.weight")
    assert same_weights(weights_of(model), tiny.tensors(tmp_path / "out"))


@pytest.mark.parametrize("group", ["layer", "model"])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_magnitude_prunes_the_embedding_where_that_is_asked_for(
    family: str, group: str, saved: Saved, tmp_path: Path
) -> None:
    report = prune(
        saved(family), tmp_path / "out", method="magnitude", include="*embed_tokens*", comparison_group=group
    )
    weight = tiny.tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert report.sites[0].name == "model.embed_tokens.weight"
    assert int((weight == 0).sum()) == report.sites[0].zeros > 0
    assert report.zeros == report.site_parameters // 2
    assert torch.equal(tiny.logits(tiny.load(tmp_path / "out"), IDS), streamed_logits(tmp_path / "out", IDS))


@pytest.mark.parametrize("group", ["layer", "model"])
def test_a_matrix_that_is_both_embedding_and_head_is_pruned_and_counted_once(
    group: str, saved: Saved, tmp_path: Path
) -> None:
    report = prune(saved("llama-tied"), tmp_path / "out", method="magnitude", include="*", comparison_group=group)
    after = tiny.tensors(tmp_path / "out")
    assert report.left_dense == {"lm_head.weight": "one with model.embed_tokens.weight"}
    assert report.zeros == sum(int((tensor == 0).sum()) for tensor in after.values()) == report.site_parameters // 2


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_embedding_has_no_inputs_to_see(method: str, saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"embed_tokens\.weight is an embedding.*{method}"):
        prune(saved("llama"), tmp_path / "out", method=method, include="*embed_tokens*")


def test_excluded_matrices_stay_as_they_are(saved: Saved, tmp_path: Path) -> None:
    report = prune(saved("llama"), tmp_path / "out", method="magnitude", exclude=["*.mlp.*", "model.layers.1.*"])
    assert {site.name.split(".")[2] for site in report.sites} == {"0", "2"}
    assert all("self_attn" in site.name for site in report.sites)
    assert report.left_dense["model.layers.1.mlp.up_proj.weight"] == "excluded"
    before, after = tiny.tensors(saved("llama")), tiny.tensors(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {s.name for s in report.sites}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused_with_the_nearest_name(
    option: str, saved: Saved, tmp_path: Path
) -> None:
    wrong = "model.layers.0.mlp.up_prj.weight"
    with pytest.raises(RecipeError, match=rf"--{option} '{wrong}'.*did you mean 'model\.layers\.0\.mlp\.up_proj"):
        prune(saved("llama"), tmp_path / "out", **{option: wrong})


def test_excluding_everything_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing is left to prune"):
        prune(saved("llama"), tmp_path / "out", exclude="*")


@pytest.mark.parametrize("group", ["row", "layer", "block"])
def test_wanda_follows_the_comparison_group(group: str, saved: Saved, tmp_path: Path) -> None:
    report = prune(saved("llama"), tmp_path / "out", method="wanda", pattern="30%", comparison_group=group)
    for site in report.sites:
        empty_OI = tiny.tensors(tmp_path / "out")[site.name] == 0
        rows, columns = site.shape
        if group == "row":
            assert bool((empty_OI.sum(1) == int(columns * 0.3)).all())
        else:
            assert int(empty_OI.sum()) == int(rows * columns * 0.3)
            assert len(set(empty_OI.sum(1).tolist())) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("include", [(), ("lm_head.weight",), ("*embed_tokens.weight", "lm_head.weight")])
def test_one_threshold_over_the_model_is_exact(
    include: tuple[str, ...], dtype: torch.dtype, saved: Saved, tmp_path: Path
) -> None:
    source = saved("llama", dtype)
    options = {"method": "magnitude", "pattern": "37%", "comparison_group": "model", "include": include}
    report = prune(source, tmp_path / "out", **options)
    before, after = tiny.tensors(source), tiny.tensors(tmp_path / "out")
    magnitudes = torch.cat([before[site.name].flatten() for site in report.sites]).abs().float()
    removed = torch.cat([after[site.name].flatten() for site in report.sites]) == 0
    budget = int(len(magnitudes) * 0.37)
    threshold = magnitudes.sort().values[budget - 1]
    assert report.zeros == int(removed.sum()) == budget
    assert bool(removed[magnitudes < threshold].all())
    assert not bool(removed[magnitudes > threshold].any())
    assert len({site.zeros / (site.shape[0] * site.shape[1]) for site in report.sites}) > 1


def test_a_loaded_model_follows_one_threshold_too(saved: Saved, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "magnitude", "comparison_group": "model", "include": "lm_head.weight"}
    prune(saved("llama-tied"), tmp_path / "out", **options)
    model = tiny.load(saved("llama-tied"))
    llmprune.prune(model, **options)
    assert same_weights(weights_of(model), tiny.tensors(tmp_path / "out"))


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_dead_inputs_and_equal_weights_do_not_upset_the_counts(method: str, pattern: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "m")
    before = tiny.tensors(source)
    up, down = (before[f"model.layers.1.mlp.{part}_proj.weight"].clone() for part in ("up", "down"))
    up[5:7] = 0  # these columns of the inputs of down_proj are always zero
    query = torch.full_like(before["model.layers.0.self_attn.q_proj.weight"], -0.25)
    changes = {
        "model.layers.1.mlp.up_proj.weight": up,
        "model.layers.1.mlp.down_proj.weight": (down * 4).round() / 4 + 0.125,
        "model.layers.0.self_attn.q_proj.weight": query,
    }
    tiny.rewrite(source, **changes)
    options = {"method": method, "pattern": pattern, "exclude": "model.layers.1.mlp.up_proj.weight"}
    report = prune(source, tmp_path / "out", **options)
    require_exact("llama", method, pattern, report, tiny.tensors(tmp_path / "out"))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_computing_in_float32_keeps_the_stored_dtype(method: str, saved: Saved, tmp_path: Path) -> None:
    source = saved("llama", torch.bfloat16)
    report = prune(source, tmp_path / "out", method=method, dtype="float32")
    assert stored_layout(tmp_path / "out") == stored_layout(source)
    after = tiny.tensors(tmp_path / "out")
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    require_exact("llama", method, "50%", report, after)


def test_rounding_to_the_stored_dtype_makes_no_negative_zeros(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data.mul_(1e-6)  # near the smallest number of float16
    source = tiny.save(model.half(), tmp_path / "m")
    prune(source, tmp_path / "out", dtype="float32")
    up = tiny.tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert int((up == 0).sum()) >= up.numel() // 2
    assert not bool(((up == 0) & torch.signbit(up)).any())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_tensors_without_the_base_models_prefix_are_pruned(family: str, tmp_path: Path) -> None:
    """As the first GPT-2 and OPT checkpoints name them."""
    model = tiny.model(family, tie_word_embeddings=True)
    source = tiny.save_base(model, tmp_path / "m")
    report = prune(source, tmp_path / "out", pattern="2:4", include="lm_head.weight")
    after = tiny.tensors(tmp_path / "out")
    assert stored_layout(tmp_path / "out") == stored_layout(source)
    assert sum(int((tensor == 0).sum()) for tensor in after.values()) == report.zeros
    assert torch.equal(tiny.logits(tiny.load(tmp_path / "out"), IDS), streamed_logits(tmp_path / "out", IDS))
    assert llmprune.inspect(tmp_path / "out").verified


def test_a_tied_embedding_that_is_pruned_as_the_head_is_not_called_dense(saved: Saved, tmp_path: Path) -> None:
    report = prune(saved("llama-tied"), tmp_path / "out", method="magnitude", include="lm_head.weight")
    assert report.left_dense["model.embed_tokens.weight"] == "one with lm_head.weight"
    assert llmprune.inspect(tmp_path / "out").left_dense == report.left_dense


def test_what_lies_outside_the_blocks_is_listed_as_dense(saved: Saved, tmp_path: Path) -> None:
    report = prune(saved("gpt2"), tmp_path / "out", method="magnitude")
    assert report.left_dense["transformer.wpe.weight"] == "outside the decoder blocks"


class Twice(nn.ModuleList):
    """Blocks that a model runs one after another, and then all over again."""

    def __getitem__(self, place: Any) -> Any:
        return [*self, *self] if isinstance(place, slice) else super().__getitem__(place)


def test_a_model_that_runs_its_blocks_again_is_refused() -> None:
    model: Any = tiny.model("llama")
    model.model.layers = Twice(list(model.model.layers))
    with pytest.raises(UnsupportedModelError, match=r"from model\.layers\.2 back to model\.layers\.0"):
        llmprune.prune(model, method="wanda", calibration=IDS)


def fail(*args: Any, **kwargs: Any) -> NoReturn:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_failing_run_leaves_no_output_and_keeps_an_old_one(
    overwrite: bool, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if overwrite:
        prune(saved("opt"), out, method="magnitude")
    monkeypatch.setattr(SparseGPT, "solve", fail)
    with pytest.raises(ZeroDivisionError):
        prune(saved("llama"), out, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * overwrite
    if overwrite:
        assert stored_layout(out) == stored_layout(saved("opt"))


def test_a_weight_that_is_not_finite_stops_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    source, name = tiny.save(tiny.model("llama"), tmp_path / "m"), "model.layers.2.self_attn.o_proj.weight"
    damaged = tiny.tensors(source)[name].clone()
    damaged[3, 4] = float("nan")
    tiny.rewrite(source, **{name: damaged})
    with pytest.raises(NumericalError, match=name):
        prune(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_overwrite_replaces_an_earlier_output(saved: Saved, tmp_path: Path) -> None:
    prune(saved("opt"), tmp_path / "out", method="magnitude")
    with pytest.raises(CheckpointError, match="--overwrite"):
        prune(saved("llama"), tmp_path / "out", method="magnitude")
    prune(saved("llama"), tmp_path / "out", method="magnitude", overwrite=True)
    assert stored_layout(tmp_path / "out") == stored_layout(saved("llama"))


def test_an_output_can_be_pruned_again(saved: Saved, tmp_path: Path) -> None:
    prune(saved("llama"), tmp_path / "one", method="magnitude", pattern="30%")
    prune(tmp_path / "one", tmp_path / "two", method="magnitude", pattern="60%")
    assert llmprune.inspect(tmp_path / "two").verified


def with_a_spare_matrix(source: Path) -> Any:
    model = tiny.load(source)
    model.model.layers[1].spare = nn.Linear(64, 64)
    return model


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_site_that_never_sees_an_input_stays_dense_and_is_reported(
    method: str, true_sequential: bool, saved: Saved
) -> None:
    model = with_a_spare_matrix(saved("llama"))
    report = llmprune.prune(model, method=method, calibration=IDS, true_sequential=true_sequential)
    assert report.left_dense["model.layers.1.spare.weight"] == "never given an input"
    assert bool(model.model.layers[1].spare.weight.all())
    assert len(report.sites) == expected_sites("llama")


def test_a_report_without_any_pruned_site_can_be_read(saved: Saved) -> None:
    model = with_a_spare_matrix(saved("llama"))
    report = llmprune.prune(model, method="wanda", calibration=IDS, exclude=["*proj*"])
    assert "0 matrices" in str(report)
    assert report.to_json()["sparsity"]["sites"] == 0


WRONG_CALIBRATION: dict[str, tuple[dict[str, Any], type[LlmpruneError], str]] = {
    "id outside the vocabulary": (
        {"calibration": [[1, 2, tiny.VOCABULARY]]},
        DataError,
        rf"row 1 holds the token id {tiny.VOCABULARY}",
    ),
    "negative id": ({"calibration": [[1, -1]]}, DataError, "row 1 holds the token id -1"),
    "row longer than the context": (
        {"calibration": [[1] * 8, [1] * (tiny.CONTEXT + 1)]},
        DataError,
        rf"row 2 has {tiny.CONTEXT + 1} tokens, but the model has {tiny.CONTEXT} positions",
    ),
    "length beyond the context": (
        {"length": tiny.CONTEXT + 1, "calibration": "some text"},
        DataError,
        rf"length {tiny.CONTEXT + 1} is more than the model's context of {tiny.CONTEXT}",
    ),
    "pattern that does not divide the inputs": (
        {"pattern": "3:7"},
        PatternError,
        r"layers\.0\.self_attn\.q_proj\.weight has 64 inputs, not divisible by 7",
    ),
    "pattern that divides some": (
        {"pattern": "32:64"},
        PatternError,
        r"layers\.0\.mlp\.down_proj\.weight has 96 inputs, not divisible by 64",
    ),
}


@pytest.mark.parametrize(("options", "error", "says"), WRONG_CALIBRATION.values(), ids=WRONG_CALIBRATION)
def test_mistakes_are_found_before_any_work(
    options: dict[str, Any],
    error: type[LlmpruneError],
    says: str,
    saved: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmprune.checkpoint.Sink.__enter__", fail)
    monkeypatch.setattr("llmprune.model.Streamed.load", fail)
    with pytest.raises(error, match=says) as caught:
        prune(saved("llama"), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("true_sequential", [True, False])
def test_an_expert_that_only_later_batches_reach_is_pruned_too(true_sequential: bool, saved: Saved) -> None:
    model = tiny.load(saved("llama"))
    experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
    block = model.model.layers[0]  # what it is given does not change while it is pruned
    block.experts, plain = experts, block.self_attn.forward
    batches: list[float] = []

    def routed(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        first = float(hidden_states[0, 0, 0])
        batches.extend([] if first in batches else [first])
        experts[min(1, batches.index(first))](hidden_states)
        return plain(hidden_states=hidden_states, **kwargs)

    block.self_attn.forward = routed
    report = llmprune.prune(model, method="wanda", calibration=IDS, batch_size=1, true_sequential=true_sequential)
    assert not [name for name in report.left_dense if "experts" in name]
    assert all(float((expert.get_parameter("weight") == 0).float().mean()) == 0.5 for expert in experts)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [*({"method": method} for method in methods.names()), {"preset": "balanced"}, {"preset": "best", "pattern": "2:4"}],
    ids=str,
)
def test_the_callers_default_dtype_changes_nothing(options: dict[str, Any], dtype: torch.dtype, saved: Saved) -> None:
    plain, within = tiny.load(saved("llama")), tiny.load(saved("llama"))
    llmprune.prune(plain, calibration=IDS, **options)
    with default_dtype(dtype):
        llmprune.prune(within, calibration=IDS, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), within.parameters(), strict=True))


def test_a_tokenizer_for_a_model_on_disk_is_refused(saved: Saved, tmp_path: Path) -> None:
    for pattern in ("50%", ["50%", "2:4"]):
        with pytest.raises(RecipeError, match="a tokenizer goes with a loaded model"):
            llmprune.prune(saved("llama"), tmp_path / "out", pattern=pattern, tokenizer=object(), calibration=IDS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_the_callers_modes_change_nothing(mode: Callable[[], Any], saved: Saved) -> None:
    plain, within = tiny.load(saved("llama")), tiny.load(saved("llama"))
    llmprune.prune(plain, method="sparsegpt", pattern="2:4", calibration=IDS)
    with mode():
        llmprune.prune(within, method="sparsegpt", pattern="2:4", calibration=IDS)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), within.parameters(), strict=True))


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"device": "cpu"}, {"revision": "main"}])
def test_options_that_mean_nothing_for_a_loaded_model_are_refused(option: dict[str, Any], saved: Saved) -> None:
    with pytest.raises(RecipeError, match="means nothing for a loaded model"):
        llmprune.prune(tiny.load(saved("llama")), method="magnitude", **option)


def test_an_encoder_in_memory_is_refused() -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForMaskedLM(config)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is not a causal language model"):
        llmprune.prune(model, method="magnitude")


def test_a_loaded_model_with_nan_is_refused_before_anything_is_pruned(saved: Saved) -> None:
    model = tiny.load(saved("llama"))
    blocks = model.model.layers
    with torch.no_grad():
        blocks[-1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"up_proj.weight holds NaN"):
        llmprune.prune(model, method="magnitude")
    assert bool(blocks[0].self_attn.q_proj.weight.all())


@pytest.mark.parametrize(
    ("method", "faster", "said"),
    [
        ("magnitude", True, ["autocast: no method sums up inputs, so nothing ran in bfloat16"]),
        ("taylor", True, ["autocast: no method sums up inputs, so nothing ran in bfloat16"]),
        ("wanda", False, ["autocast: bfloat16 is not faster here, so nothing ran in bfloat16"]),
        ("wanda", True, []),
    ],
)
def test_an_autocast_that_changes_nothing_is_noted(
    method: str, faster: bool, said: list[str], saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda device: faster)
    monkeypatch.setattr(kernels, "multiplies", lambda x_TI: False)  # which this machine may not be able to
    report = llmprune.prune(tiny.load(saved("llama")), method=method, calibration=IDS, autocast=True)
    assert [note for note in report.notes if "autocast" in note] == said


@pytest.mark.parametrize(("dtype", "rounded"), [("bfloat16", True), ("float32", False), ("auto", False)])
def test_a_run_that_rounds_what_it_keeps_says_so(dtype: str, rounded: bool, saved: Saved, tmp_path: Path) -> None:
    report = llmprune.prune(saved("llama"), tmp_path / "out", method="magnitude", dtype=dtype)
    assert any("rounded" in note for note in report.notes) == rounded


def test_the_batch_size_does_not_change_what_the_statistics_sum(saved: Saved) -> None:
    models = [tiny.load(saved("llama")) for _ in range(2)]
    for model, size in zip(models, (1, 3), strict=True):
        llmprune.prune(model, method="sparsegpt", pattern="2:4", calibration=IDS, batch_size=size)
    same = [(a == 0) == (b == 0) for a, b in zip(*(model.parameters() for model in models), strict=True)]
    assert sum(int(part.sum()) for part in same) / sum(part.numel() for part in same) > 0.99


def test_stored_tensors_that_the_model_has_no_use_for_are_reported(saved: Saved, tmp_path: Path) -> None:
    source = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    report = llmprune.prune(source, tmp_path / "out", method="magnitude")
    assert any("no part of the model" in note and "model.layers." in note for note in report.notes)
