"""The model card of a pruned model: README.md with the Hub's metadata, written from `llmprune.json` alone.

The base model's own card, which a run copies along, is kept as BASE_README.md: it may hold the notices that the
licence asks to pass on.
"""

import re
from pathlib import Path
from typing import Any

from llmprune.cardheader import read_metadata
from llmprune.checkpoint.compressed import size_in_bytes
from llmprune.checkpoint.format import holds_compressed
from llmprune.errors import CheckpointError
from llmprune.runs import command_of, replace_text, update_run

CARD, BASE_CARD = "README.md", "BASE_README.md"
NOBODY = "none"  # what a user gives as the base model where that is on no Hub
GENERATED = "<!-- Written by llmprune push. Delete this line and edit the card: it is then uploaded as it stands. -->"
_WRITTEN = "card"  # the field of llmprune.json that tells llmprune's README.md from the base model's
_UNFILLED = re.compile(r"\[[^\]\n]*\b(?i:needed)\](?!\()|\b(?:TODO|TBD|FIXME|XXX)\b|<(?i:your)\b[^<>\n]*>")
_INHERITED = ("license", "license_name", "license_link", "language")
# Of the relations that the Hub knows (adapter, merge, quantized, finetune) the one for changed weights.
_RELATION = "finetune"
_DATA_SETS = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4", "ptb": "ptb-text-only/ptb_text_only"}


def base_metadata(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of the base model's card that lies in an output folder; none where there is no card."""
    path = folder / (BASE_CARD if run.get(_WRITTEN) else CARD)
    try:
        return read_metadata(path) if path.is_file() else {}
    except CheckpointError:  # not the user's to mend: as good as none, so that the licence is asked for
        return {}


def write_card(folder: Path, run: dict[str, Any], repo: str, base: str | None, inherited: dict[str, Any]) -> None:
    """Write README.md anew, unless it is one that the user has edited.

    Args:
        run: what `llmprune.json` holds, as far as it may be told; that file takes note of the card.
        repo: where the model will be published, as `organisation/name`.
        base: the base model's id on the Hub, None where it is on no Hub.
        inherited: metadata of the base model's card; its licence and languages are carried over.

    Raises:
        CheckpointError: the card has unfilled fields, or its header is malformed.
    """
    path = folder / CARD
    if not run.get(_WRITTEN):
        _set_aside(folder)
    if not run.get(_WRITTEN) or not path.is_file() or GENERATED.encode() in path.read_bytes():
        replace_text(path, card_text(folder, run, repo, base, inherited))
        update_run(folder, **{_WRITTEN: True})
    metadata = read_metadata(path)
    found = _UNFILLED.search(path.read_text("utf-8"))
    if gap := found[0] if found else "" if metadata.get("license") else "license":
        raise CheckpointError(f"{path} holds an unfilled field ('{gap}'): fill it in, then push again")


def _set_aside(folder: Path) -> None:
    """Keep the base model's card, and before it those that it kept itself."""
    cards = [folder / name for name in (CARD, BASE_CARD) if (folder / name).is_file()]
    if (folder / CARD).is_file():
        text = b"\n\n".join(path.read_bytes() for path in cards)
        (folder / CARD).unlink()
        (folder / BASE_CARD).write_bytes(text)


def card_text(folder: Path, run: dict[str, Any], repo: str, base: str | None, inherited: dict[str, Any]) -> str:
    """Return the card: metadata for the Hub, then text for people; see `write_card` for the arguments."""
    name = repo.rpartition("/")[2]
    sections = [
        f"---\n{_metadata(run, name, base, inherited)}\n---",
        GENERATED,
        f"# {name}\n\n{_summary(run, base)}",
        f"## How it was made\n\n{_making(run, repo, base)}",
        f"## What it cost\n\n{_cost(run)}",
        *([f"## Size and speed\n\n{measured}"] if (measured := _size_and_speed(folder, run)) else []),
        f"## How to load it\n\n{_loading(folder, repo)}",
        f"## Limits\n\n{_limits(folder, run, inherited)}",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(run: dict[str, Any], name: str, base: str | None, inherited: dict[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    recipe = run["recipe"]
    results = [EvalResult(**fields) for evaluation in run.get("evaluations", []) for fields in _results(evaluation)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=_RELATION if base else None,
        tags=["llmprune", "pruning", "sparsity", recipe["method"], str(recipe["pattern"])],
        model_name=name,
        eval_results=results or None,
        **{key: inherited[key] for key in _INHERITED if inherited.get(key) is not None},
    )
    return data.to_yaml().strip()


def _results(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the Hub's `model-index` for one measurement."""
    data = evaluation["data"]
    place = {
        "task_type": "text-generation",
        "dataset_type": _DATA_SETS.get(data, data),
        "dataset_name": f"{data} ({evaluation['length']} tokens a window)",
        "dataset_args": {"convention": evaluation["convention"]},
    }
    names = {"perplexity": "Perplexity", "kl_divergence": "KL divergence to the dense model, nats a token"}
    names["top1_agreement"] = "Top-1 agreement with the dense model"
    return [
        place | {"metric_type": key, "metric_name": name, "metric_value": evaluation[key]}
        for key, name in names.items()
        if evaluation.get(key) is not None
    ]


def _summary(run: dict[str, Any], base: str | None) -> str:
    recipe, sparsity = run["recipe"], run["sparsity"]
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(run['model']).name}`"
    return (
        f"This is {origin}, pruned after training by {recipe['method']} to {recipe['pattern']}. "
        f"{sparsity['sites']:.2%} of the weights in the {len(run['sites'])} pruned matrices are zero, "
        f"which is {sparsity['all_parameters']:.2%} of all parameters. {_training(run)}"
    )


def _training(run: dict[str, Any]) -> str:
    tuned = sum(bool(block.get("kept")) for block in run.get("tuning") or [])
    if not tuned:
        return "Nothing was trained again."
    return f"In {tuned} blocks, what survived was tuned towards the outputs of the dense block on the calibration data."


def _making(run: dict[str, Any], repo: str, base: str | None) -> str:
    recipe, calibration, versions = run["recipe"], run["calibration"], run["versions"]
    rows = {"Method": recipe["method"], "Pattern": _pattern(recipe)}
    rows |= {name: str(value) for name, value in recipe["method_options"].items()}
    if calibration:
        rows["Calibration data"] = calibration["note"]
        rows["Calibration tokens, SHA-256"] = f"`{calibration['fingerprint']}`"
    else:
        rows["Calibration data"] = "none is needed"
    rows["Software"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    command = command_of(run, base or Path(run["model"]).name, repo.rpartition("/")[2])
    return f"{_table(rows)}\n\n```bash\n{command}\n```"


def _pattern(recipe: dict[str, Any]) -> str:
    kept, colon, group = str(recipe["pattern"]).partition(":")
    return f"{kept} of every {group} weights kept" if colon else f"{recipe['pattern']} of the weights removed"


def _cost(run: dict[str, Any]) -> str:
    evaluations = run.get("evaluations", [])
    if not evaluations:
        return "It was not evaluated before it was published."
    header = "| data | window | dtype | perplexity | KL divergence | top-1 agreement |\n|---|---|---|---|---|---|"
    lines = [f"| {' | '.join(_cells(evaluation))} |" for evaluation in evaluations]
    notes = sorted({f"{evaluation['data']}: {evaluation['convention']}." for evaluation in evaluations})
    return "\n".join([header, *lines, "", "KL divergence (nats a token) and agreement are to the dense model.", *notes])


def _cells(evaluation: dict[str, Any]) -> list[str]:
    kl, agreement, dense = (evaluation.get(key) for key in ("kl_divergence", "top1_agreement", "dense_perplexity"))
    perplexity = f"{evaluation['perplexity']:.4f}" + (f" (dense {dense:.4f})" if dense else "")
    finer = ["" if kl is None else f"{kl:.4f}", "" if agreement is None else f"{agreement:.2%}"]
    return [evaluation["data"], str(evaluation["length"]), evaluation["dtype"], perplexity, *finer]


def _size_and_speed(folder: Path, run: dict[str, Any]) -> str:
    """Return what was measured of either, with the machine that it was measured on."""
    lines, size = [], run.get("size")
    if holds_compressed(folder):  # it says so itself, whoever compressed it
        size = dict(zip(("dense_bytes", "compressed_bytes"), size_in_bytes(folder), strict=True))
    if size:
        both = f"{size['compressed_bytes'] / 1e6:,.1f} MB instead of {size['dense_bytes'] / 1e6:,.1f} MB"
        lines.append(f"- `llmprune compress` stores the weights in {both}.")
    if (speed := run.get("speed")) and speed["sparse"]:  # else no layer was sparse there
        dense, sparse = speed["dense"]["decode"]["median"], speed["sparse"]["decode"]["median"]
        hardware = speed["hardware"]
        on_gpu = speed.get("device", "cpu") != "cpu"
        machine = hardware["gpu"] if on_gpu else f"{hardware['machine']}, {hardware['threads']} threads"
        lines.append(
            f"- Decoding with {speed['batch']} at a time: {sparse:.1f} tokens/s with sparse layers where these are "
            f"faster, {dense:.1f} with dense ones, measured side by side on {machine} by `llmprune bench`."
        )
    return "\n".join(lines)


def _loading(folder: Path, repo: str) -> str:
    how, first = "It loads as any model of its architecture; the zeros are stored as ordinary weights.", ""
    sparse = (
        "To run those layers sparse that are measured to be faster so, on a CPU or a GPU, with "
        "[llmprune](https://pypi.org/project/llmprune) installed (`pip install llmprune`):\n\n"
        "```python\nimport llmprune\n\nllmprune.sparsify(model)\n```"
    )
    if holds_compressed(folder):
        how = (
            "It is stored without its zeros. With [llmprune](https://pypi.org/project/llmprune) installed "
            "(`pip install llmprune`) and imported it loads as any model of its architecture; "
            f"`llmprune decompress {repo} OUT` makes it one that needs no llmprune."
        )
        first = "import llmprune  # teaches transformers the format\n"
        sparse = (
            "That makes it dense in memory. To keep those layers sparse that are measured to be faster so, on a CPU or a "
            "GPU:\n\n```python\nmodel = AutoModelForCausalLM.from_pretrained(\n"
            f'    "{repo}", dtype="auto", quantization_config=llmprune.SparseConfig("sparse")\n)\n```'
        )
    return (
        f"{how}\n\n```python\n{first}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n```\n\n{sparse}\n\n'
        f"`llmprune inspect {repo}` counts the zeros of every tensor and checks them against `llmprune.json`."
    )


def _limits(folder: Path, run: dict[str, Any], inherited: dict[str, Any]) -> str:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    zeros = (
        "Loaded as it stands, it is dense in memory and no faster, unless `SparseConfig` keeps it sparse."
        if holds_compressed(folder)
        else "Stored as ordinary weights, zeros make a model neither smaller nor faster: that needs software that makes "
        "use of them."
    )
    lines = [
        f"- The files of the weights take {size / 1e6:,.1f} MB. {zeros}",
        "- Perplexity says little about a particular task: measure yours before you rely on this model.",
        "- It has the biases and the limits of its base model, and pruning can make them worse.",
    ]
    if inherited.get("license") is not None:
        lines.append(f"- The licence of the base model ({inherited['license']}) holds for this one too.")
    if (folder / BASE_CARD).is_file():
        lines.append(f"- The card of the base model, with its notices, is [{BASE_CARD}]({BASE_CARD}).")
    return "\n".join(lines + [f"- {note}." for note in run["notes"]])


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
