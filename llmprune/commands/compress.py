"""`llmprune compress` and `llmprune decompress`."""

from pathlib import Path

import click

from llmprune.commands.shared import imports, json_option, print_json

_revision = click.option("--revision", help="Branch, tag or commit of a Hub model.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder.")
_out = click.argument("out", type=click.Path(path_type=Path))


@click.command()
@click.argument("model")
@_out
@_overwrite
@_revision
@json_option
def compress(model: str, out: Path, overwrite: bool, revision: str | None, as_json: bool) -> None:
    """Store the pruned MODEL in OUT without its zeros, so that transformers loads it after `import llmprune`."""
    with imports():
        from llmprune.checkpoint.compressed import compress as run
        from llmprune.locate import locate, require_own_name

    require_own_name(out)
    sizes = run(locate(model, revision), out, overwrite)
    if as_json:
        print_json({"out": str(out), **sizes.to_json()})
    else:
        click.echo(f"{sizes}\nwritten to {out}")


@click.command()
@click.argument("model")
@_out
@_overwrite
@_revision
def decompress(model: str, out: Path, overwrite: bool, revision: str | None) -> None:
    """Restore in OUT, byte for byte, the checkpoint that MODEL was compressed from."""
    with imports():
        from llmprune.checkpoint.compressed import decompress as run
        from llmprune.locate import locate, require_own_name

    require_own_name(out)
    run(locate(model, revision), out, overwrite)
    click.echo(f"written to {out}")
