"""The commands that make use of zeros: `llmprune compress`, `decompress`, `generate`, `bench`."""

import json
from pathlib import Path
from typing import Any

import click

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
_revision = click.option("--revision", help="Branch, tag or commit of a Hub model.")
_trust = click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model folder.")
_out = click.argument("out", type=click.Path(path_type=Path))


@click.command()
@click.argument("model")
@_out
@_overwrite
@_revision
@_json
def compress(model: str, out: Path, overwrite: bool, revision: str | None, as_json: bool) -> None:
    """Store the pruned MODEL in OUT without its zeros, so that transformers loads it after `import llmprune`."""
    from llmprune.checkpoint.compressed import compress as run
    from llmprune.locate import locate

    sizes = run(locate(model, revision), out, overwrite)
    click.echo(json.dumps({"out": str(out), **sizes.to_json()}) if as_json else f"{sizes}\nwritten to {out}")


@click.command()
@click.argument("model")
@_out
@_overwrite
@_revision
def decompress(model: str, out: Path, overwrite: bool, revision: str | None) -> None:
    """Restore in OUT, byte for byte, the checkpoint that MODEL was compressed from."""
    from llmprune.checkpoint.compressed import decompress as run
    from llmprune.locate import locate

    run(locate(model, revision), out, overwrite)
    click.echo(f"written to {out}")


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--dense", is_flag=True, help="Keep all layers dense.")
@_revision
@_trust
@_json
def generate(model: str, prompt: str, dense: bool, as_json: bool, **options: Any) -> None:
    """Continue PROMPT with MODEL on the CPU, its layers sparse where that is no slower."""
    from llmprune.sparse.running import generate as run

    def show(text: str) -> None:
        click.echo(text, nl=False)

    if not as_json:
        show(prompt)
    generated = run(model, prompt, sparse=not dense, on_text=None if as_json else show, **options)
    if as_json:
        click.echo(json.dumps(generated.to_json(), ensure_ascii=False))
        return
    rate = generated.new_tokens / generated.seconds
    click.echo(
        f"\n[{generated.new_tokens} tokens, {rate:.1f} a second, {generated.sparse_layers} sparse layers]", err=True
    )


@click.command()
@click.argument("model")
@click.option("--prompt-tokens", type=int, default=512, show_default=True)
@click.option("--new-tokens", type=int, default=32, show_default=True)
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at a time.")
@click.option("--rounds", type=int, default=5, show_default=True)
@_revision
@_trust
@_json
def bench(model: str, as_json: bool, **options: Any) -> None:
    """Compare MODEL on the CPU dense and sparse: tokens a second, memory, and the kernel that runs for each shape."""
    from llmprune.sparse.bench import bench as run

    result = run(model, **options)
    click.echo(json.dumps(result.to_json()) if as_json else str(result))


COMMANDS = (compress, decompress, generate, bench)
