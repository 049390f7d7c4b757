"""`llmprune push`."""

from pathlib import Path
from typing import Any

import click

from llmprune.commands.shared import given, json_option, show


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Create the repository private.")
@click.option("--base-model", metavar="ID", help="The base model on the Hub, where MODEL was a folder; or none.")
@click.option("--license", metavar="ID", help="Its licence, where its model card names none.")
@click.option("--allow-gated", is_flag=True, help="Publish openly though the base model is gated.")
@click.option("--overwrite", is_flag=True, help="Replace a repository that holds something else.")
@json_option
def push(out: Path, repo: str, as_json: bool, **options: Any) -> None:
    """Publish the output OUT on the Hugging Face Hub as REPO, with a model card.

    The token is that of `hf auth login` or HF_TOKEN. An upload that broke off goes on where it was.
    """
    from llmprune.publishing import push as run

    show(run(out, repo, **given(options)), as_json)
