"""Publish a pruned model on the Hugging Face Hub, or refuse in one line before anything is uploaded.

A repository that exists is taken if nothing but .gitattributes is in it, or a model pruned from the same one by the
same method to the same pattern; any other is left alone unless `overwrite` is given. Files of a former output that the
new one does not have are deleted in the same upload, and stay in the repository's history. What is uploaded does not
tell where files lay on this machine.
"""

import json
from pathlib import Path
from typing import Any

from llmprune import card, hub
from llmprune.checkpoint.sink import REPORT
from llmprune.errors import CheckpointError, HubError, RecipeError
from llmprune.inspection import inspect
from llmprune.locate import DEMO
from llmprune.page.run import PAGE
from llmprune.privacy import page_without_paths, private_names, without_paths
from llmprune.runs import json_text, read_run
from llmprune.uploading import Client, Published


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    allow_gated: bool = False,
    overwrite: bool = False,
) -> Published:
    """Publish an output of `llmprune.prune` with a model card that is written from its `llmprune.json`.

    Args:
        folder: the output folder.
        repo: `organisation/name`, or a name in the user's own namespace.
        private: create the repository private.
        base_model: the base model's id on the Hub where the run was given a local folder; `none` if it is on no Hub.
        license: the licence where the base model's card names none.
        allow_gated: publish openly although the base model is gated.
        overwrite: replace a repository that holds something else, such as another pruned model.

    Raises:
        CheckpointError: the folder is no complete output, does not keep its promises, or its card is not filled in.
        RecipeError: the repository's name is malformed, or the base model or its licence is not known.
        HubError: there is no Hub or no valid token, the repository cannot be used, the base model is not open, or the
            connection was lost.
    """
    folder = Path(folder)
    run = _complete_run(folder)
    base = _base_id(run, base_model)
    client = Client()
    client.sign_in()
    repo = client.full_name(repo)
    base_info = client.look_up(base) if base else None
    if base:
        _require_open(base_info, base, private, allow_gated)
    inherited = _inherited(folder, run, base_info, license)
    names = private_names(run, base)
    _require_free(client, repo, without_paths(run, names), base, private, overwrite)
    _require_promises_kept(folder)
    card.write_card(folder, without_paths(run, names), repo, base, inherited)
    recipe = run["recipe"]
    return client.upload(
        folder, repo, private, f"llmprune: {recipe['method']} {recipe['pattern']}", _told(folder, names)
    )


def _told(folder: Path, names: dict[str, str]) -> dict[str, bytes]:
    """Return the files that are not uploaded as they stand, with what is uploaded: names in place of local paths."""
    told = {REPORT: json_text(without_paths(read_run(folder), names))}
    if (page := folder / PAGE).is_file():
        told[PAGE] = page_without_paths(page.read_text("utf-8"), names)
    return {name: text.encode() for name, text in told.items()}


def _complete_run(folder: Path) -> dict[str, Any]:
    if folder.name.endswith(".partial") or any(folder.glob("*.partial")):
        raise CheckpointError(f"{folder} is the unfinished output of a run that is going on or was killed: prune again")
    run = read_run(folder)
    # The card of the base model may have become BASE_README.md.
    missing = [name for name in run.get("companions", []) if name != card.CARD and not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)} of the base model: copy them there, or prune again")
    return run


def _require_promises_kept(folder: Path) -> None:
    inspection = inspect(folder)
    if not inspection.verified:
        cause = inspection.faults[0] if inspection.faults else "llmprune.json promises nothing"
        raise CheckpointError(f"{folder} is not what its llmprune.json says ({cause}): prune the model again")


def _base_id(run: dict[str, Any], given: str | None) -> str | None:
    """Return the base model's id on the Hub, None where it is on no Hub."""
    if given is not None:
        return None if given == card.NOBODY else given
    model = str(run["model"])
    if model == DEMO:
        return None
    if model.count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists():
        return model
    raise RecipeError(f"the base model was a folder ({model}): give its Hub id as --base-model ID, or 'none'")


def _require_free(
    client: Client, repo: str, run: dict[str, Any], base: str | None, private: bool, overwrite: bool
) -> None:
    """Refuse a repository that holds something else, or that is open where a private one is wanted.

    Args:
        run: what `llmprune.json` holds, without local paths.
    """
    info = client.look_up(repo)
    if info is None:
        return
    names = {sibling.rfilename for sibling in info.siblings or []}
    if not (overwrite or names <= {".gitattributes"}):
        if REPORT not in names:
            raise HubError(f"the repository '{repo}' holds something else: choose another name, or pass --overwrite")
        if (other := _told_of(client.read(repo, REPORT), base)) != _title(run):
            raise HubError(
                f"the repository '{repo}' holds another pruned model ({other}): choose another name, or pass --overwrite"
            )
    if private and not info.private:
        raise HubError(f"the repository '{repo}' exists and is public: make it private on the Hub first")


def _told_of(report: bytes, base: str | None) -> str:
    """Return which pruned model the `llmprune.json` of a repository tells of."""
    try:
        run = json.loads(report)
        return _title(without_paths(run, private_names(run, base)))
    except (ValueError, KeyError, TypeError):
        return f"its {REPORT} cannot be read"


def _title(run: dict[str, Any]) -> str:
    return f"{run['recipe']['method']} {run['recipe']['pattern']} of {run['model']}"


def _require_open(info: Any, base: str, private: bool, allow_gated: bool) -> None:
    """Refuse to show to everybody what is made from weights that are not."""
    if info is None:
        raise RecipeError(
            f"{hub.endpoint()} shows no base model '{base}': give its id there as --base-model ID, or 'none'"
        )
    if (info.gated or info.private) and not (private or allow_gated):
        kind = "gated" if info.gated else "private"
        raise HubError(
            f"the base model '{base}' is {kind}: pass --private, or --allow-gated if its licence lets you publish "
            "weights made from it"
        )


def _inherited(folder: Path, run: dict[str, Any], info: Any, license: str | None) -> dict[str, Any]:
    """Return metadata with a licence: the one given, else that of the base's card here, else of the one on the Hub."""
    on_hub = info.card_data.to_dict() if info is not None and info.card_data is not None else {}
    metadata: dict[str, Any] = on_hub | card.base_metadata(folder, run) | ({"license": license} if license else {})
    if not metadata.get("license"):
        raise RecipeError("the licence of the base model is not known: give it as --license, such as apache-2.0")
    return metadata
