"""The command line: its help is frozen, its JSON is alone on stdout, and every error is one line and status 2.

`UPDATE_GOLDEN=1 python -m pytest tests/test_cli.py` writes the help texts anew.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from llmprune import cli, methods, pruning
from llmprune.commands.shared import METHODS

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "help.txt"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "eval"))}
INDEX = "model.safetensors.index.json"
SITE = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Result:
    status: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards."""
    return tiny.save(tiny.model("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of it for a test to damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run_main(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["llmprune", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Result(status, *capfd.readouterr())

    return run_main


def run_process(*arguments: str | Path) -> Result:
    command = [sys.executable, "-m", "llmprune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    return Result(done.returncode, done.stdout, done.stderr)


def token_ids(folder: Path, rows: list[list[int]] | None = None) -> Path:
    path = folder / "ids.jsonl"
    rows = tiny.ids().tolist() if rows is None else rows
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), "utf-8")
    return path


def text_file(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text, "utf-8")
    return path


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"?": 0, "a": 5, "few": 6, "words": 7}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | changes), "utf-8")


def shard_of(folder: Path, name: str) -> Path:
    return folder / str(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"][name])


def edit_tensor(folder: Path, name: str, edit: Callable[[torch.Tensor], object]) -> None:
    path = shard_of(folder, name)
    tensors = load_file(path)
    edit(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def assert_refused(result: Result, out: Path, *parts: str) -> None:
    """Status 2, one line on stderr that holds `parts`, nothing on stdout, nothing on disk."""
    assert result.status == 2, result
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("llmprune: "), result.stderr
    assert all(part in result.stderr for part in parts), result.stderr
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()


def help_texts(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for command in ([], *([name] for name in cli.cli.commands)):
        result = CliRunner().invoke(cli.cli, [*command, "--help"], prog_name="llmprune")
        texts.append(f"$ {' '.join(['llmprune', *command, '--help'])}\n{result.stdout}")
    return "\n".join(texts)


def test_the_help_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = help_texts(monkeypatch)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(found, "utf-8")
    # Word by word, as releases of click differ in where they break lines.
    assert found.split() == GOLDEN.read_text("utf-8").split()


def make_bin_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").touch()


def truncate(folder: Path) -> None:
    path = shard_of(folder, SITE)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def lose_a_shard(folder: Path) -> None:
    shard_of(folder, SITE).unlink()


def point_outside(folder: Path) -> None:
    shutil.copy(shard_of(folder, SITE), folder.parent / "outside.safetensors")
    edit_json(folder / INDEX, weight_map={SITE: "../outside.safetensors"})


def make_it(**config: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **config)


def spoil(folder: Path) -> None:
    edit_tensor(folder, SITE, lambda weight: weight[0, 0].fill_(float("nan")))


def quantize_one(folder: Path) -> None:
    tiny.rewrite(folder, **{SITE: torch.zeros(tiny.tensors(folder)[SITE].shape, dtype=torch.int8)})


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "encoder-decoder": (
        make_it(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        ["is a 't5' model, not a causal language model"],
    ),
    "masked": (
        make_it(model_type="bert", architectures=["BertForMaskedLM"]),
        ["is a BertForMaskedLM, not a causal language model"],
    ),
    "remote code": (
        make_it(model_type="strange", auto_map={"AutoModelForCausalLM": "modeling.Strange"}),
        ["runs code of its own", "--trust-remote-code"],
    ),
    "unknown kind": (make_it(model_type="strange"), ["of type 'strange'", "does not know"]),
    "compressed": (make_it(quantization_config={"quant_method": "llmprune"}), ["compressed by llmprune", "decompress"]),
    "quantized": (make_it(quantization_config={"quant_method": "gptq"}), ["is already quantized"]),
    "quantized in part": (quantize_one, [f"{SITE} is stored as torch.int8: dequantize the checkpoint first"]),
    "no blocks": (make_it(num_hidden_layers=0), ["nothing is left to prune: the model's blocks hold no matrix"]),
    "pickled": (make_bin_only, ["has only pickled weights (pytorch_model.bin)", "save_pretrained"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
    "bad config": (lambda folder: (folder / "config.json").write_text("{"), ["config.json is not valid JSON"]),
    "missing shard": (lose_a_shard, [INDEX, "which is missing"]),
    "outside": (point_outside, ["'../outside.safetensors', which lies outside"]),
    "truncated": (truncate, ["is truncated"]),
    "not finite": (spoil, [f"{SITE} holds NaN or infinity"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_pruned_is_one_line(run: Run, model: Path, tmp_path: Path, damage: str) -> None:
    break_it, parts = DAMAGES[damage]
    break_it(model)
    assert_refused(run("prune", model, tmp_path / "out", "--method", "magnitude"), tmp_path / "out", *parts)


OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "pattern that does not fit": (
        ["--pattern", "64:128"],
        ["model.layers.0.self_attn.q_proj.weight has 64 inputs, not divisible by 128", "--exclude"],
    ),
    "sparsity of 0": (["--pattern", "0"], ["pattern '0'", "between 0 and 1"]),
    "sparsity of 1": (["--pattern", "100%"], ["pattern '100%'", "between 0 and 1"]),
    "sparsity of 50": (["--pattern", "50"], ["did you mean '50%'"]),
    "inverted pattern": (["--pattern", "4:2"], ["keeps N of every M"]),
    "unknown method": (["--method", "wand"], ["unknown method 'wand': did you mean 'wanda'"]),
    "unknown option": (["--metod", "wanda"], ["--metod", "--method"]),
    "unknown method option": (["--method-option", "dampp=1"], ["no option 'dampp': did you mean 'damp'"]),
    "sparsity of a glob without one": (["--sparsity", "*.mlp.*"], ["must read NAME=VALUE"]),
    "sparsity of a glob twice": (["--sparsity", "*=40%", "--sparsity", "*=60%"], ["--sparsity '*'", "given twice"]),
    "method option twice": (["--method-option", "damp=1", "--method-option", "damp=2"], ["'damp'", "given twice"]),
    "unknown allocation": (["--allocation", "fishr"], ["unknown allocation 'fishr': did you mean 'fisher'"]),
    "allocation of N:M": (["--allocation", "error", "--pattern", "2:4"], ["2:4 is the same everywhere"]),
    "method option without a value": (["--method-option", "damp"], ["must read NAME=VALUE"]),
    "unknown device": (["--device", "gpu"], ["device 'gpu' is not available here"]),
    "unknown dtype": (["--dtype", "float8"], ["unknown dtype 'float8'"]),
    "samples of 0": (["--samples", "0"], ["samples must be a whole number of at least 1"]),
    "dense target that is a word": (
        ["--dense-target", "half"],
        ["--dense-target", "'half' is neither a number nor 'auto'"],
    ),
    "dense target over 1": (["--dense-target", "1.5", "--true-sequential"], ["from 0 to 1, or 'auto', not 1.5"]),
    "no number": (["--samples", "many"], ["--samples", "many"]),
    "length over the context": (["--length", "49"], ["context of 48 tokens", "--length 48"]),
    "missing file": (["--calibration", "./none.jsonl"], ["none.jsonl"]),
    "unknown data": (["--calibration", "wikitxt2"], ["unknown data 'wikitxt2'", "wikitext2"]),
    "data without a network": (["--calibration", "org/nowhere"], ["org/nowhere", "--calibration FILE"]),
    "nothing left": (["--exclude", "*"], ["nothing is left to prune"]),
    "glob without a match": (["--include", "lm_haed*"], ["matches no prunable tensor"]),
    "missing recipe": (["--recipe", "none.yaml"], ["recipe none.yaml"]),
}


@pytest.mark.parametrize("wrong", OPTIONS)
def test_a_wrong_option_is_one_line(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    if wrong == "data without a network":
        pytest.importorskip("datasets")  # which otherwise is what is missing
    monkeypatch.chdir(tmp_path)
    options, parts = OPTIONS[wrong]
    given = [] if "--calibration" in options else ["--calibration", token_ids(tmp_path)]
    assert_refused(run("prune", llama, "out", *given, *options), tmp_path / "out", *parts)


@pytest.mark.parametrize(
    "command", [["prune", "./none", "out"], ["eval", "./none", "--data", "demo"], ["inspect", "./none"]]
)
def test_a_missing_folder_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*command), tmp_path / "out", "no such folder")


def test_a_model_of_the_hub_without_a_network_is_one_line(run: Run, tmp_path: Path) -> None:
    for command in (["prune", "org/nowhere", tmp_path / "out"], ["inspect", "org/nowhere"]):
        assert_refused(run(*command), tmp_path / "out", "'org/nowhere'", "HF_HUB_OFFLINE is set", "pass a local folder")


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_text_without_a_tokenizer_is_one_line(run: Run, llama: Path, tmp_path: Path, command: str) -> None:
    target = [tmp_path / "out", "--calibration"] if command == "prune" else ["--data"]
    refused = run(command, llama, *target, text_file(tmp_path, "a few words"))
    assert_refused(refused, tmp_path / "out", "has no tokenizer that loads", "input_ids")


@pytest.mark.parametrize(
    ("command", "part"), [("prune", "calibration is shorter than one window"), ("eval", "less than one window of 40")]
)
def test_text_shorter_than_one_window_is_one_line(
    run: Run, model: Path, tmp_path: Path, command: str, part: str
) -> None:
    word_tokenizer().save_pretrained(model)
    target = [tmp_path / "out", "--calibration"] if command == "prune" else ["--data"]
    refused = run(command, model, *target, text_file(tmp_path, "a few words"), "--length", "40")
    assert_refused(refused, tmp_path / "out", part, "3 tokens", "use --length 3")


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_a_token_id_outside_of_the_vocabulary_is_one_line(run: Run, llama: Path, tmp_path: Path, command: str) -> None:
    data = token_ids(tmp_path, [[3, 4, 5], [3, tiny.VOCABULARY, 5]])
    target = [tmp_path / "out", "--calibration"] if command == "prune" else ["--data"]
    refused = run(command, llama, *target, data)
    assert_refused(refused, tmp_path / "out", f"row 2 holds the token id {tiny.VOCABULARY}", "vocabulary")


def test_a_row_longer_than_the_context_is_one_line(run: Run, llama: Path, tmp_path: Path) -> None:
    data = token_ids(tmp_path, [[3] * (tiny.CONTEXT + 1)])
    refused = run("prune", llama, tmp_path / "out", "--calibration", data)
    assert_refused(refused, tmp_path / "out", "row 1 has 49 tokens", "48 positions")


def test_an_output_that_exists_is_one_line_and_stays(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    for options in ([], ["--overwrite"]):
        result = run("prune", llama, tmp_path / "out", "--method", "magnitude", *options)
        assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "precious").exists()


def test_an_output_inside_the_source_is_one_line(run: Run, model: Path) -> None:
    assert_refused(run("prune", model, model / "out", "--method", "magnitude"), model / "out", "inside each other")


def test_too_little_disk_is_one_line(run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.checkpoint.place.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    refused = run("prune", llama, tmp_path / "out", "--method", "magnitude")
    assert_refused(refused, tmp_path / "out", "too little disk")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--length", "0"], "length must be a whole number of at least 2, not 0"),
        (["--batch-size", "0"], "batch_size must be a whole number of at least 1, not 0"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--device", "gpu"], "device 'gpu' is not available here"),
        (["--data", "./none.txt"], "none.txt"),
        (["--dta", "demo"], "--data"),
    ],
)
def test_a_wrong_option_of_eval_is_one_line(
    run: Run, llama: Path, tmp_path: Path, options: list[str], part: str
) -> None:
    assert_refused(run("eval", llama, "--data", token_ids(tmp_path), *options), tmp_path / "out", part)


@pytest.mark.parametrize("arguments", [["prune"], ["prune", "demo"], ["prun", "demo", "out"], ["inspect"], ["eval"]])
def test_a_wrong_command_is_one_line(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    result = run(*arguments)
    assert_refused(result, tmp_path / "out")
    command = "" if arguments[0] == "prun" else f" {arguments[0]}"
    assert result.stderr.strip().endswith(f"{command} --help`") and ": see `" in result.stderr


def test_no_command_at_all_shows_the_help(run: Run) -> None:
    result = run()
    assert result.status == 2 and "Commands:" in result.stderr and result.stdout == ""


def test_an_interrupted_run_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "prune", interrupted)
    result = run("prune", "demo", tmp_path / "out")
    assert (result.status, result.stdout) == (130, "")
    assert result.stderr.strip() == "llmprune: interrupted, nothing was written"  # click ends the line of the ^C


def test_an_output_called_demo_is_one_line(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["prune", llama, "demo", "--method", "magnitude"], ["compress", llama, "demo"]):
        assert_refused(run(*arguments), tmp_path / "demo", "would be mistaken for the shipped model")


def test_several_patterns_are_a_table_or_json(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("prune", llama, tmp_path / "out", "--method", "magnitude", "--pattern", "50%, 2:4")
    lines = result.stdout.splitlines()
    assert result.status == 0 and "2 results without calibration" in lines[0] and len(lines) <= 25
    assert lines[2].endswith(str(tmp_path / "out" / "50%")) and lines[3].endswith(str(tmp_path / "out" / "2of4"))
    (tmp_path / "recipe.yaml").write_text("method: magnitude\npattern: [50%, 2:4]\n", "utf-8")
    result = run("prune", llama, tmp_path / "again", "--recipe", tmp_path / "recipe.yaml", "--json")
    assert result.status == 0 and result.stdout.count("\n") == 1
    names = [Path(found["out"]).name for found in json.loads(result.stdout)["results"]]
    assert names == ["50%", "2of4"]
    for name in names:
        assert json.loads((tmp_path / "again" / name / "llmprune.json").read_text())["sparsity"]["sites"] == 0.5


def test_the_summary_of_a_run_fits_on_a_screen(run: Run, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("qwen3-moe", num_experts=16), tmp_path / "moe")
    result = run("prune", folder, tmp_path / "out", "--pattern", "2:4", "--calibration", token_ids(tmp_path))
    report = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert sum(len(site["notes"]) for site in report["sites"]) > 25  # starved experts
    assert result.status == 0 and len(result.stdout.splitlines()) <= 25


def test_the_json_of_prune_is_alone_on_stdout(run: Run, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("prune", llama, out, "--pattern", "2:4", "--calibration", token_ids(tmp_path), "--json")
    assert result.status == 0 and result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert report["out"] == str(out) and report["sparsity"]["sites"] == 0.5
    written = json.loads((out / "llmprune.json").read_text("utf-8"))
    assert report | {"companions": written["companions"]} == written | {"out": str(out)}


def test_the_json_of_eval_is_alone_on_stdout(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("eval", llama, "--data", token_ids(tmp_path), "--json")
    assert result.status == 0 and result.stdout.count("\n") == 1
    assert json.loads(result.stdout)["windows"] == 6


def test_the_json_of_inspect_is_alone_on_stdout(run: Run, llama: Path) -> None:
    result = run("inspect", llama, "--json")
    assert result.status == 0 and result.stdout.count("\n") == 1
    assert json.loads(result.stdout)["verified"] is None


def test_without_json_there_is_text(run: Run, llama: Path, tmp_path: Path) -> None:
    pruned = run("prune", llama, tmp_path / "out", "--method", "magnitude")
    assert pruned.status == 0 and f"written to    {tmp_path / 'out'}" in pruned.stdout
    inspected = run("inspect", tmp_path / "out")
    assert inspected.status == 0 and "verified: all promises of llmprune.json kept" in inspected.stdout
    evaluated = run("eval", tmp_path / "out", "--data", token_ids(tmp_path))
    assert evaluated.status == 0 and "perplexity" in evaluated.stdout


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_inspect_exits_with_1_when_the_checkpoint_lies(
    run: Run, llama: Path, tmp_path: Path, as_json: list[str]
) -> None:
    out = tmp_path / "out"
    assert run("prune", llama, out, "--method", "magnitude").status == 0
    edit_tensor(out, SITE, lambda weight: weight.fill_(1.0))
    result = run("inspect", out, *as_json)
    assert result.status == 1 and result.stderr == ""
    assert SITE in result.stdout and ("BROKEN" in result.stdout or json.loads(result.stdout)["verified"] is False)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line hands to `prune`, in place of a run."""
    seen: dict[str, Any] = {}

    def record(model: str, out: Path, **options: Any) -> Any:
        seen.update(options, model=model, out=out)
        return SimpleNamespace(to_json=dict)

    monkeypatch.setattr(pruning, "prune", record)
    return seen


def test_only_what_was_given_is_handed_on(run: Run, recorded: dict[str, Any]) -> None:
    run("prune", "demo", "out")
    output = {"overwrite": False, "resume": False, "compressed": False}
    assert recorded == {"model": "demo", "out": Path("out"), **output}


@pytest.mark.parametrize(("given", "read"), [("auto", "auto"), ("0.25", 0.25)])
def test_a_dense_target_is_a_number_or_auto(run: Run, recorded: dict[str, Any], given: str, read: Any) -> None:
    run("prune", "demo", "out", "--dense-target", given)
    assert recorded["dense_target"] == read


def test_every_option_is_handed_on(run: Run, recorded: dict[str, Any]) -> None:
    run(
        *("prune", "demo", "out", "--method", "sparsegpt", "--pattern", "2:4", "--comparison-group", "row"),
        *("--method-option", "damp=0.1", "--method-option", "block_size=64", "--calibration", "c4", "--samples", "3"),
        *(
            "--length",
            "9",
            "--seed",
            "5",
            "--true-sequential",
            "--deterministic",
            "--include",
            "a",
            "--include",
            "b",
            "--exclude",
            "c",
        ),
        *(
            "--overwrite",
            "--resume",
            "--compressed",
            "--device",
            "cpu",
            "--dtype",
            "float16",
            "--batch-size",
            "2",
            "--revision",
            "main",
        ),
        *("--trust-remote-code", "--json"),
    )
    assert recorded == {
        "model": "demo",
        "out": Path("out"),
        "method": "sparsegpt",
        "pattern": "2:4",
        "comparison_group": "row",
        "method_options": {"damp": "0.1", "block_size": "64"},
        "calibration": "c4",
        "samples": 3,
        "length": 9,
        "seed": 5,
        "true_sequential": True,
        "deterministic": True,
        "include": ("a", "b"),
        "exclude": ("c",),
        "overwrite": True,
        "resume": True,
        "compressed": True,
        "device": "cpu",
        "dtype": "float16",
        "batch_size": 2,
        "revision": "main",
        "trust_remote_code": True,
    }


def test_stated_sparsities_are_handed_on_by_glob(run: Run, recorded: dict[str, Any]) -> None:
    run("prune", "demo", "out", "--sparsity", "*.mlp.*=40%", "--sparsity", "a=0.3", "--allocation", "owl")
    assert recorded["sparsities"] == {"*.mlp.*": "40%", "a": "0.3"}
    assert recorded["allocation"] == "owl"


def test_the_command_line_wins_over_the_recipe(run: Run, recorded: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: wanda\npattern: 2:4\nsamples: 8\ntrue_sequential: true\nexclude: ['a']\n", "utf-8")
    run("prune", "demo", "out", "--recipe", recipe, "--samples", "4", "--exclude", "b")
    assert (recorded["method"], recorded["pattern"], recorded["true_sequential"]) == ("wanda", "2:4", True)
    assert (recorded["samples"], recorded["exclude"]) == (4, ("b",))


def test_hyper_parameters_of_a_recipe_and_of_the_command_line_go_together(
    run: Run, recorded: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method_options: {damp: 0.1, block_size: 64}\n", "utf-8")
    run("prune", "demo", "out", "--recipe", recipe, "--method-option", "damp=0.2")
    assert recorded["method_options"] == {"damp": "0.2", "block_size": 64}
    recipe.write_text("method_options: damp\n", "utf-8")
    refused = run("prune", llama, tmp_path / "out", "--recipe", recipe, "--method-option", "damp=0.2")
    assert_refused(refused, tmp_path / "out", "method_options must map names to values, not 'damp'")


def test_an_unknown_option_in_a_recipe_is_one_line(run: Run, llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("metod: wanda\n", "utf-8")
    refused = run("prune", llama, tmp_path / "out", "--recipe", recipe)
    assert_refused(refused, tmp_path / "out", "unknown option 'metod': did you mean 'method'")


def test_the_module_runs_as_a_program(llama: Path, tmp_path: Path) -> None:
    result = run_process("prune", llama, tmp_path / "out", "--method", "magnitude", "--json")
    assert (result.status, result.stderr) == (0, "")
    assert json.loads(result.stdout)["sparsity"]["sites"] == 0.5


def test_a_program_that_fails_prints_one_line(tmp_path: Path) -> None:
    assert_refused(run_process("prune", tmp_path / "none", tmp_path / "out"), tmp_path / "out", "no such folder")


@pytest.mark.parametrize("statement", ["import llmprune", "import llmprune.cli, llmprune_eval"])
def test_importing_llmprune_is_cheap(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'triton', 'datasets', 'numpy', 'safetensors', 'huggingface_hub'}"
    code = f"{statement}; import sys; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_the_help_names_every_method() -> None:
    assert METHODS.split(", ") == methods.names()
