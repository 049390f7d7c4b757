"""The command line: a command for each file in `llmprune/commands/`.

Every option is a field of `llmprune.Recipe` or a parameter of the Python function of the same name. Errors are one
line on stderr and exit status 2; with `--json`, stdout holds one JSON object and nothing else.
"""

import os
import signal
import sys
from typing import NoReturn

import click

from llmprune.commands.bench import bench
from llmprune.commands.compress import compress, decompress
from llmprune.commands.evaluate import evaluate
from llmprune.commands.generate import generate
from llmprune.commands.inspect import inspect
from llmprune.commands.plan import plan
from llmprune.commands.prune import prune
from llmprune.commands.push import push
from llmprune.commands.recipes import recipes
from llmprune.commands.report import report
from llmprune.commands.sensitivity import sensitivity
from llmprune.commands.sweep import sweep
from llmprune.errors import Interrupted, LlmpruneError, redact


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llmprune", message="%(version)s")
def cli() -> None:
    """Prune Hugging Face causal language models, and prove how good they still are.

    MODEL is a folder, a Hub id such as org/name, or the word demo: a small trained model that comes with llmprune
    and needs no network.
    """


_COMMANDS = (
    prune,
    plan,
    recipes,
    inspect,
    evaluate,
    sensitivity,
    sweep,
    report,
    push,
    compress,
    decompress,
    generate,
    bench,
)
for command in _COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line; errors become one line and status 2."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except (LlmpruneError, click.ClickException) as error:
        _fail(error.format_message() if isinstance(error, click.ClickException) else str(error))
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ or error  # click turns what Ctrl-C raises into an Abort
        kept = cause.args[0] if isinstance(cause, Interrupted) else "nothing was written"
        click.echo(f"llmprune: interrupted, {kept}", err=True)
        sys.exit(143 if signal.SIGTERM in cause.args else 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a name too long: the system's own words, without a traceback
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")


def _fail(message: str) -> NoReturn:
    click.echo(f"llmprune: {redact(' '.join(message.split()))}", err=True)
    sys.exit(2)


def _stop(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that nothing half-written is left."""
    raise KeyboardInterrupt(signal.SIGTERM)
