"""`llmprune generate`."""

from typing import Any

import click

from llmprune.commands.shared import given, imports, json_option, of_model, print_json


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(1), help="[default: 64, or what the context leaves]")
@click.option("--dense", is_flag=True, help="Keep all layers dense.")
@click.option("--device", help="auto, cpu, cuda, cuda:1, ...  [default: auto]")
@of_model
@json_option
def generate(model: str, prompt: str, dense: bool, as_json: bool, **options: Any) -> None:
    """Continue PROMPT with MODEL, its layers sparse where that is no slower."""
    with imports():
        from llmprune.sparse.running import generate as run

    def echo(text: str) -> None:
        click.echo(text, nl=False)

    generated = run(model, prompt, sparse=not dense, on_text=None if as_json else echo, **given(options))
    if as_json:
        print_json(generated.to_json())
        return
    if generated.context is not None:
        click.echo(f"\n[stopped: the model's context of {generated.context} tokens is full]", err=True, nl=False)
    rate = generated.new_tokens / generated.seconds
    click.echo(
        f"\n[{generated.new_tokens} tokens, {rate:.1f} a second, {generated.sparse_layers} sparse layers]", err=True
    )
