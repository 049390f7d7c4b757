"""Publishing: the real client against a Hub on the loopback, and one line for every way in which it can fail."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hub_server
import llmprune
import tiny
from hub_server import FakeHub, Repo
from llmprune import privacy, runs
from llmprune.checkpoint.compressed import compress
from llmprune.errors import CheckpointError, HubError, LlmpruneError, RecipeError
from llmprune.locate import demo_folder
from llmprune.page import write_page

ROOT = Path(__file__).parent.parent
BASE = "org/base"
BASE_CARD = b"---\nlicense: llama3.2\nlanguage: [en, de]\n---\nBuilt with care.\n"
EVALUATION = {
    "data": "wikitext2", "length": 512, "windows": 9, "tokens": 4608, "dtype": "float32", "convention": "tail dropped",
    "perplexity": 12.34567, "bits_per_byte": 0.9, "kl_divergence": 0.125, "top1_agreement": 0.875,
    "dense_perplexity": 11.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run whose base model lay in a folder, with a card that names its licence."""
    folder = tmp_path_factory.mktemp("models")
    dense = tiny.save(tiny.model("llama"), folder / "dense")
    (dense / "README.md").write_bytes(BASE_CARD)
    llmprune.prune(dense, folder / "out", method="magnitude", pattern="2:4", exclude="*.0.mlp.*", seed=3)
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that the client in this process uses, with a base model, and no waiting between retries."""
    with hub_server.serve() as served:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        served.repos[BASE] = Repo(files={"README.md": BASE_CARD})
        huggingface_hub.close_session()
        yield served
        huggingface_hub.close_session()


def publish(out: Path, repo: str = "tester/pruned", **options: Any) -> Any:
    return llmprune.push(out, repo, **{"base_model": BASE} | options)


def refused(out: Path, kind: type[LlmpruneError], *parts: str, repo: str = "tester/pruned", **options: Any) -> str:
    """Return the message of a refused push, after checking that it is one line without a token."""
    with pytest.raises(kind) as error:
        publish(out, repo, **options)
    message = str(error.value)
    assert "\n" not in message and "hf_" not in message.replace("hf auth", "")
    for part in parts:
        assert part in message
    return message


def metadata_of(card: bytes | Path) -> Any:
    """Return the metadata of a model card as the Hub's client reads them."""
    text = card.read_text("utf-8") if isinstance(card, Path) else card.decode()
    return ModelCard(text).data


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_files_arrive_as_they_are(hub: FakeHub, out: Path) -> None:
    runs.update_run(out, model=BASE)
    published = publish(out)
    repo = hub.repos["tester/pruned"]
    assert repo.files == files_of(out) | {".gitattributes": b""}
    assert repo.commits == ["llmprune: magnitude 2:4"] and not repo.private
    assert (published.url, published.commit) == (f"{hub.address}/tester/pruned", repo.commit)
    assert json.loads(json.dumps(published.to_json()))["private"] is False


def test_a_name_alone_goes_to_the_users_namespace(hub: FakeHub, out: Path) -> None:
    assert publish(out, "pruned").repo == "tester/pruned"


def test_a_private_repository(hub: FakeHub, out: Path) -> None:
    assert publish(out, private=True).private and hub.repos["tester/pruned"].private


def test_a_report_pushes_its_own_output(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    report = llmprune.prune(out, tmp_path / "again", method="magnitude", pattern="2:4")
    report.out = tmp_path / "again"
    assert report.push("tester/pruned", base_model=BASE).repo == "tester/pruned"
    report.out = None
    with pytest.raises(RecipeError, match="pruned in place has no output folder"):
        report.push("tester/pruned")


def test_the_card_has_the_metadata_of_the_run(hub: FakeHub, out: Path) -> None:
    runs.add_evaluations(out, [EVALUATION])
    publish(out)
    data = metadata_of(hub.repos["tester/pruned"].files["README.md"])
    assert (data.license, data.language, data.base_model) == ("llama3.2", ["en", "de"], BASE)
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"llmprune", "magnitude", "2:4"} <= set(data.tags or [])
    results = {result.metric_type: result for result in data.eval_results or []}
    assert {name: result.metric_value for name, result in results.items()} == {
        "perplexity": 12.34567, "kl_divergence": 0.125, "top1_agreement": 0.875
    }  # fmt: skip
    assert results["perplexity"].dataset_type == "Salesforce/wikitext"
    assert results["perplexity"].dataset_args == {"convention": "tail dropped"}


def test_the_card_tells_what_was_done_and_what_it_cost(hub: FakeHub, out: Path) -> None:
    runs.add_evaluations(out, [EVALUATION])
    run = runs.read_run(out)
    publish(out)
    text = (out / "README.md").read_text("utf-8")
    assert f"{run['sparsity']['sites']:.2%} of the weights" in text
    assert f"{run['sparsity']['all_parameters']:.2%} of all parameters" in text
    assert "llmprune prune org/base pruned --method magnitude --pattern 2:4 --seed 3 --exclude '*.0.mlp.*'\n" in text
    assert "| wikitext2 | 512 | float32 | 12.3457 (dense 11.5000) | 0.1250 | 87.50% |" in text
    assert 'from_pretrained("tester/pruned", dtype="auto")' in text


def test_the_card_tells_size_and_speed_where_they_were_measured(hub: FakeHub, out: Path) -> None:
    publish(out)
    text = (out / "README.md").read_text("utf-8")
    assert "## Size and speed" not in text and "llmprune.sparsify(model)" in text
    rate = {"median": 12.5, "p20": 12.0, "p80": 13.0}
    runs.update_run(out, size={"dense_bytes": 4_000_000, "compressed_bytes": 2_250_000})
    runs.add_speed(out, {
        "dense": {"decode": rate}, "sparse": {"decode": rate | {"median": 25.0}}, "batch": 1, "decode_speedup": 2.0,
        "hardware": {"machine": "x86_64", "threads": 4, "gpu": None},
    })  # fmt: skip
    publish(out)
    text = (out / "README.md").read_text("utf-8")
    assert "2.2 MB instead of 4.0 MB" in text and "x86_64, 4 threads" in text
    assert "25.0 tokens/s with sparse layers where these are faster, 12.5 with dense ones" in text
    speed = runs.read_run(out)["speed"] | {
        "device": "cuda:0",
        "hardware": {"machine": "x", "threads": 4, "gpu": "A GPU"},
    }
    runs.update_run(out, speed=speed)
    publish(out)
    assert "measured side by side on A GPU by" in (out / "README.md").read_text("utf-8")


def test_the_card_of_a_compressed_output_tells_its_size_and_how_to_keep_it_sparse(
    hub: FakeHub, out: Path, tmp_path: Path
) -> None:
    sizes = compress(out, tmp_path / "small")
    publish(tmp_path / "small")
    text = (tmp_path / "small" / "README.md").read_text("utf-8")
    dense, stored = (
        sum(value.nbytes for path in folder.glob("*.safetensors") for value in load_file(path).values())
        for folder in (out, tmp_path / "small")
    )
    assert dense - stored == sizes.tensor_bytes[0] - sizes.tensor_bytes[1] > 0
    assert f"stores the weights in {stored / 1e6:,.1f} MB instead of {dense / 1e6:,.1f} MB" in text
    block = text.split("To keep those layers sparse", 1)[1].split("```python\n", 1)[1].split("```")[0]
    here = block.replace("tester/pruned", str(tmp_path / "small"))
    scope = {"AutoModelForCausalLM": AutoModelForCausalLM, "llmprune": llmprune}
    exec(here, scope)
    assert isinstance(scope["model"], LlamaForCausalLM)


def test_the_card_of_a_dense_output_tells_how_to_run_it_sparse(hub: FakeHub, out: Path) -> None:
    publish(out)
    text = (out / "README.md").read_text("utf-8")
    assert "pip install llmprune" in text and "on a CPU or a GPU" in text
    assert "```python\nimport llmprune\n\nllmprune.sparsify(model)\n```" in text


def test_what_a_newer_llmprune_has_added_is_no_obstacle(hub: FakeHub, out: Path) -> None:
    recipe = runs.read_run(out)["recipe"]
    tuned = {"block": "0", "before": 2.0, "after": 1.0, "epochs": 1, "rate": 0.1, "vectors": [], "kept": True, "new": 3}
    runs.update_run(out, allocation={"kind": "owl", "curve": [0.1]}, tuning=[tuned], recipe=recipe | {
        "allocation": "owl", "sparsities": {"*.0.*": "0.4"}, "tune": None,
    })  # fmt: skip
    publish(out)
    text = (out / "README.md").read_text("utf-8")
    assert "--allocation owl" in text and "In 1 blocks, what survived was tuned" in text


def test_the_command_of_a_shared_pass_asks_for_that_pass(out: Path) -> None:
    run = runs.read_run(out)
    assert "--pattern 2:4, " in runs.command_of(run | {"one_pass": ["50%", "2:4"]})
    assert "--pattern 2:4, " in runs.command_of(run | {"one_pass": ["2:4"]})
    assert "--pattern 2:4 " in runs.command_of(run)


def test_the_base_card_is_kept_beside_the_new_one(hub: FakeHub, out: Path) -> None:
    publish(out)
    publish(out)
    files = hub.repos["tester/pruned"].files
    assert files["BASE_README.md"] == BASE_CARD and b"Written by llmprune" in files["README.md"]
    assert b"license: llama3.2" in files["README.md"]


def test_a_card_that_the_user_has_edited_is_uploaded_as_it_stands(hub: FakeHub, out: Path) -> None:
    publish(out)
    edited = "---\nlicense: llama3.2\n---\nMy own words.\n"
    (out / "README.md").write_text(edited, "utf-8")
    publish(out)
    assert hub.repos["tester/pruned"].files["README.md"].decode() == edited


@pytest.mark.parametrize(
    ("card", "gap"),
    [
        ("---\nlicense: mit\n---\n[More Information Needed]\n", "[More Information Needed]"),
        ("---\nlicense: mit\n---\nTODO: say more\n", "TODO"),
        ("---\nlicense: mit\n---\nFIXME\n", "FIXME"),
        ("---\nlicense: mit\n---\nContact: XXX\n", "XXX"),
        ("---\nlicense: mit\n---\nBy <your name here>.\n", "<your name here>"),
        ("---\nlicense: mit\n---\n[Citation needed]\n", "[Citation needed]"),
        ("---\nlanguage: en\n---\nwords\n", "license"),
        ("words\n", "license"),
    ],
)
def test_a_card_with_a_gap_is_refused(hub: FakeHub, out: Path, card: str, gap: str) -> None:
    publish(out)
    (out / "README.md").write_text(card, "utf-8")
    refused(out, CheckpointError, f"README.md holds an unfilled field ('{gap}')")


def test_a_full_card_has_no_gap(hub: FakeHub, out: Path) -> None:
    publish(out)
    words = "[What is needed](https://x.y), all needed, <yourself@x.y>, todo lists, XXXL\n"
    (out / "README.md").write_text(f"---\nlicense: mit\n---\n{words}", "utf-8")
    assert publish(out).repo == "tester/pruned"


@pytest.mark.parametrize(
    ("card", "cause"),
    [
        (b"---\nlicense: mit\ntags: [a\nlanguage: en\n---\nwords\n", "README.md, line 4: no valid YAML"),
        (b"\n---\nlicense: mit: x\n---\n", "README.md, line 3: no valid YAML"),
        (b"---\nlicense: mit\ndate: 2024-13-45\n---\n", "README.md, line 2: no valid YAML"),
        (b"---\nlicense: mit\nname: a\x07\n---\n", "README.md, line 3: no valid YAML"),
        (b"---\n- mit\n---\n", "README.md, line 2: its header maps no names"),
        (b"---\nlicense: \xff\n---\n", "README.md is not UTF-8 text"),
    ],
)
def test_a_card_whose_header_cannot_be_read(
    hub: FakeHub, out: Path, tmp_path: Path, card: bytes, cause: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the user's card it is refused; of the base model's it is as good as none, and the card stays."""
    published, fresh = out, Path(shutil.copytree(out, tmp_path / "fresh"))
    publish(published)
    (published / "README.md").write_bytes(card)
    refused(published, CheckpointError, cause, "then push again")
    (fresh / "README.md").write_bytes(card)
    hub.repos[BASE].files.clear()
    refused(fresh, RecipeError, "the licence of the base model is not known")
    publish(fresh, "tester/fresh", license="mit")
    assert metadata_of(fresh / "README.md").license == "mit" and (fresh / "BASE_README.md").read_bytes() == card
    assert "Repo card metadata" not in capfd.readouterr().err


def test_a_card_without_a_header_is_refused_in_our_words_alone(
    hub: FakeHub, out: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    publish(out)
    (out / "README.md").write_text("words\n", "utf-8")
    refused(out, CheckpointError, "unfilled field ('license')")
    assert "Repo card metadata" not in caplog.text


def test_a_card_edited_where_the_base_had_none_is_kept(hub: FakeHub, out: Path) -> None:
    (out / "README.md").unlink()
    publish(out)
    edited = "---\nlicense: mit\n---\nMy own words.\n"
    (out / "README.md").write_text(edited, "utf-8")
    publish(out)
    assert (out / "README.md").read_text("utf-8") == edited and not (out / "BASE_README.md").exists()


def test_pruning_a_published_model_again_keeps_all_cards(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    publish(out)
    llmprune.prune(out, tmp_path / "again", method="magnitude", pattern="2:4", exclude="*.0.mlp.*")
    publish(tmp_path / "again", "tester/again", base_model="tester/pruned")
    kept = (tmp_path / "again" / "BASE_README.md").read_text("utf-8")
    assert kept.index("# pruned") < kept.index("Built with care.")
    assert metadata_of(tmp_path / "again" / "README.md").license == "llama3.2"


def test_nothing_published_tells_where_a_file_lay(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "my secret & home"
    dense = tiny.save(tiny.model("llama"), home / "dense")
    (home / "tokens.jsonl").write_text(json.dumps({"input_ids": [3] * 40}) + "\n", "utf-8")
    llmprune.prune(dense, home / "out", method="wanda", pattern="2:4", calibration=str(home / "tokens.jsonl"))
    runs.add_evaluations(home / "out", [
        EVALUATION | {"model": str(home / "out"), "data": str(home / "text.txt"), "dense": str(dense)}
    ])  # fmt: skip
    runs.update_run(home / "out", notes=["/srv/secret/disk was slow", "a/b is no path, nor is https://a.b/secret"])
    write_page(home / "out")
    before = files_of(home / "out")
    publish(home / "out", license="mit")
    files = hub.repos["tester/pruned"].files
    told = {name: files[name].decode() for name in ("README.md", "llmprune.json", "report.html")}
    for text in told.values():
        assert "secret" not in text.replace("https://a.b/secret", "") and str(tmp_path) not in text
        assert (
            "tokens.jsonl" in text and "text.txt" in text and "disk was slow" in text and "https://a.b/secret" in text
        )
    assert "--calibration tokens.jsonl" in told["README.md"] and "| text.txt | 512 |" in told["README.md"]
    run = json.loads(told["llmprune.json"])
    assert (run["model"], run["recipe"]["calibration"]) == ("dense", "tokens.jsonl")
    evaluation = run["evaluations"][0]
    assert [evaluation[name] for name in ("model", "data", "dense")] == ["out", "text.txt", "dense"]
    after = files_of(home / "out")
    assert after["report.html"] == before["report.html"]
    assert json.loads(after["llmprune.json"]) == json.loads(before["llmprune.json"]) | {"card": True}


def test_names_and_hub_ids_are_told_as_they_are(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    data = ["wikitext2", "org/data", "org/data:config:test", "texts/a.txt", "texts/a.jsonl.gz", "a/b/c", "./d", "~/e"]
    found = [EVALUATION | {"model": "out", "data": name, "dense": BASE} for name in data]
    run = runs.read_run(out) | {"model": BASE, "evaluations": found}
    names = privacy.private_names(run, BASE)
    assert names == {"texts/a.txt": "a.txt", "texts/a.jsonl.gz": "a.jsonl.gz", "a/b/c": "c", "./d": "d", "~/e": "e"}
    assert privacy.without_paths(["in ./d", "end./d", "texts/a.txt"], names) == ["in d", "end./d", "a.txt"]
    assert privacy.private_names(run | {"model": "models/llama"}, BASE)["models/llama"] == "llama"
    assert "models/llama" not in privacy.private_names(run | {"model": "models/llama"}, "models/llama")


def test_the_licence_is_taken_from_the_hub_or_given(hub: FakeHub, out: Path) -> None:
    (out / "README.md").unlink()
    publish(out, "tester/first")
    assert metadata_of(out / "README.md").license == "llama3.2"
    hub.repos[BASE].files.clear()
    (out / "README.md").unlink()
    refused(out, RecipeError, "the licence of the base model is not known", "--license")
    publish(out, license="mit")
    assert metadata_of(out / "README.md").license == "mit"


def test_the_base_model_must_be_known(hub: FakeHub, out: Path) -> None:
    refused(out, RecipeError, "the base model was a folder", "--base-model", base_model=None)
    refused(out, RecipeError, "shows no base model 'org/nothing'", base_model="org/nothing")
    publish(out, base_model="none")
    assert metadata_of(out / "README.md").base_model is None


def test_a_gated_base_is_not_opened_by_accident(hub: FakeHub, out: Path) -> None:
    hub.repos[BASE].gated = True
    refused(out, HubError, "'org/base' is gated", "--private", "--allow-gated")
    assert publish(out, private=True).private
    assert not publish(out, "tester/open", allow_gated=True).private


def test_an_earlier_push_of_the_same_kind_is_replaced(hub: FakeHub, out: Path) -> None:
    publish(out)
    hub.repos["tester/pruned"].files |= {"old.safetensors": b"", ".gitattributes": b"x"}
    publish(out)
    assert hub.repos["tester/pruned"].files.keys() == files_of(out).keys() | {".gitattributes"}
    assert hub.repos["tester/pruned"].files[".gitattributes"] == b"x"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": {"method": "wanda", "pattern": "2:4"}}, "(wanda 2:4 of dense)"),
        ({"recipe": {"method": "magnitude", "pattern": "50%"}}, "(magnitude 50% of dense)"),
        ({"model": "/home/me/other"}, "(magnitude 2:4 of other)"),
        ({"recipe": None}, "(its llmprune.json cannot be read)"),
    ],
)
def test_another_pruned_model_is_not_replaced_by_accident(
    hub: FakeHub, out: Path, change: dict[str, Any], told: str
) -> None:
    publish(out)
    files = hub.repos["tester/pruned"].files
    there = files["llmprune.json"] = json.dumps(json.loads(files["llmprune.json"]) | change).encode()
    message = refused(out, HubError, "'tester/pruned' holds another pruned model", told, "--overwrite")
    assert "/home" not in message and files["llmprune.json"] == there
    publish(out, overwrite=True)
    assert hub.repos["tester/pruned"].files["llmprune.json"] != there


def test_an_output_that_lacks_files_of_its_base_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    llmprune.prune("demo", tmp_path / "out", method="magnitude", pattern="2:4")
    assert {"tokenizer.json", "config.json", "README.md"} <= set(runs.read_run(tmp_path / "out")["companions"])
    whole = shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).unlink()
    refused(tmp_path / "out", CheckpointError, "lacks tokenizer.json, tokenizer_config.json", "copy them")
    assert hub.requests("repos/create") == []
    (whole / "README.md").unlink()  # ours takes its place
    assert publish(whole).repo == "tester/pruned"


def test_an_existing_repository_with_something_else_is_left_alone(hub: FakeHub, out: Path) -> None:
    hub.repos["tester/pruned"] = Repo(files={"thesis.tex": b"precious"})
    refused(out, HubError, "'tester/pruned' holds something else", "--overwrite")
    assert hub.repos["tester/pruned"].files == {"thesis.tex": b"precious"}
    publish(out, overwrite=True)
    assert "thesis.tex" not in hub.repos["tester/pruned"].files


def test_a_public_repository_is_not_taken_for_a_private_one(hub: FakeHub, out: Path) -> None:
    hub.repos["tester/pruned"] = Repo()
    refused(out, HubError, "exists and is public", private=True)


def test_a_second_push_sends_no_weights(hub: FakeHub, out: Path) -> None:
    publish(out)
    sent = len(hub.requests("PUT /lfs/"))
    publish(out)
    assert sent > 1 and len(hub.requests("PUT /lfs/")) == sent


def test_an_upload_that_broke_off_goes_on_where_it_was(hub: FakeHub, out: Path) -> None:
    shards = len(list(out.glob("*.safetensors")))
    hub.fail("commit/main", None, times=100)
    refused(out, HubError, "no connection to", "goes on where it was")
    assert hub.repos["tester/pruned"].commits == [] and len(hub.objects) == shards
    hub.faults.clear()
    hub.log.clear()
    publish(out)
    assert hub.requests("PUT /lfs/") == [] and len(hub.repos["tester/pruned"].commits) == 1


def test_a_short_failure_is_survived(hub: FakeHub, out: Path) -> None:
    hub.fail("PUT /lfs/", 503, times=2)
    hub.fail("PUT /lfs/", None)
    assert publish(out).repo == "tester/pruned"


@pytest.mark.parametrize(
    ("what", "status", "parts"),
    [
        ("whoami", 401, ["cannot log in", "does not know the token", "hf auth login"]),
        ("repos/create", 401, ["cannot publish 'tester/pruned'", "does not know the token"]),
        ("repos/create", 403, ["may not do that"]),
        ("commit/main", 409, ["changed by somebody else", "run the same command again"]),
        ("preupload", 500, ["is busy or broken (HTTP 500)", "goes on where it was"]),
        ("lfs/objects", 503, ["is busy or broken (HTTP 503)"]),
        ("whoami", 429, ["is busy or broken (HTTP 429)"]),
        ("repos/create", 400, ["refuses"]),
        ("preupload", 404, ["refuses"]),
        ("GET /api/models/tester", None, ["cannot look up 'tester/pruned'", "no connection to"]),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(
    hub: FakeHub, out: Path, what: str, status: int | None, parts: list[str]
) -> None:
    hub.fail(what, status, times=100)
    refused(out, HubError, *parts)


def test_a_token_that_may_only_read(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub_server.READER_TOKEN)
    refused(out, HubError, "may not do that", repo="reader/pruned")


def test_somebody_elses_namespace(hub: FakeHub, out: Path) -> None:
    refused(out, HubError, "may not do that", repo="somebody/pruned")


def test_an_unknown_token(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unknownunknown")
    refused(out, HubError, "does not know the token")


def test_no_token(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(out, HubError, "without a token: run `hf auth login`, or set HF_TOKEN")


def test_no_hub(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(out, HubError, "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("repo", ["a/b/c", "", "tester/--", "tester/a b"])
def test_a_malformed_name(hub: FakeHub, out: Path, repo: str) -> None:
    refused(out, RecipeError, "cannot name a repository", repo=repo)


def test_weights_that_break_their_promise_are_refused(hub: FakeHub, out: Path) -> None:
    shard = next(iter(sorted(out.glob("*.safetensors"))))
    save_file({name: torch.ones_like(value) for name, value in load_file(shard).items()}, shard, {"format": "pt"})
    refused(out, CheckpointError, "is not what its llmprune.json says")
    assert hub.requests("repos/create") == []


def test_what_is_no_finished_output_is_refused(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", CheckpointError, "is not an output of llmprune: there is no such folder")
    (out / "llmprune.partial").touch()
    refused(out, CheckpointError, "is the unfinished output of a run")
    (out / "llmprune.partial").unlink()
    next(out.glob("*.safetensors")).unlink()
    refused(out, CheckpointError, "is missing")
    (out / "llmprune.json").write_text("{}", "utf-8")
    refused(out, CheckpointError, "llmprune.json is damaged")
    (out / "llmprune.json").unlink()
    refused(out, CheckpointError, "it has no llmprune.json")
    assert hub.log == [] or hub.requests("repos/create") == []


def test_an_evaluation_takes_the_place_of_an_earlier_one(out: Path) -> None:
    other = EVALUATION | {"data": "ptb"}
    runs.add_evaluations(out, [EVALUATION, other])
    runs.add_evaluations(out, [EVALUATION | {"perplexity": 1.0}])
    found = [(entry["data"], entry["perplexity"]) for entry in runs.read_run(out)["evaluations"]]
    assert found == [("ptb", 12.34567), ("wikitext2", 1.0)]
    assert llmprune.inspect(out).verified


def script(name: str, *arguments: object, **variables: str) -> str:
    """Run one of the scripts as a user does, and return what it printed."""
    environment = {**os.environ, **variables}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "eval"))
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PULL = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
pulled, kept = (AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval() for name in sys.argv[1:])
ids = torch.arange(40)[None]
with torch.no_grad():
    assert torch.equal(pulled(input_ids=ids).logits, kept(input_ids=ids).logits)
print("equal")
"""


def test_the_demo_is_pruned_evaluated_reported_published_and_pulled_back_by_the_scripts(tmp_path: Path) -> None:
    out, text = tmp_path / "pruned", tmp_path / "text.jsonl"
    lines = (demo_folder() / "wikitext2-evaluation.jsonl").read_text("utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[:200]), "utf-8")
    with hub_server.serve() as hub:
        there = {
            "HF_ENDPOINT": hub.address, "HF_TOKEN": hub_server.TOKEN, "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        assert "42 matrices" in script("prune_model", "demo", out, "--pattern", "2:4", "--method", "magnitude")
        assert "perplexity" in script("evaluate", "demo", out, "--data", text, "--save")
        write_page(out)
        assert "published" in script("push_to_hub", out, "tester/pruned", "--private", **there)
        assert hub.repos["tester/pruned"].private
        assert b"<svg" in hub.repos["tester/pruned"].files["report.html"]
        (tmp_path / "pull.py").write_text(PULL, "utf-8")
        assert "equal" in script(str(tmp_path / "pull"), "tester/pruned", out, **there)
    data = metadata_of(out / "README.md")
    assert data.license == "cc-by-sa-4.0"
    found = [result.metric_type for result in data.eval_results or []]
    assert found == ["perplexity", "kl_divergence", "top1_agreement"]
