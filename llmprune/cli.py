"""The command line: a command for each file in `llmprune/commands/`.

Every option is a field of `llmprune.Recipe` or a parameter of the Python function of the same name. Errors are one
line on stderr and exit status 2; with `--json`, stdout holds one JSON object and nothing else.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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
from llmprune.errors import Interrupted, LlmpruneError, RankError, redact
from llmprune.team.launch import launch

_SHARED = ("prune", "eval", "sweep")  # among the processes of a launcher


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llmprune", message="%(version)s")
def cli() -> None:
    """Prune Hugging Face causal language models, and prove how good they still are.

    MODEL is a folder, a Hub id such as org/name, or the word demo: a small trained model that comes with llmprune
    and needs no network.
    """
    command = click.get_current_context().invoked_subcommand
    if launch().size > 1 and command not in _SHARED:
        raise RankError(f"{command} is the work of one process: start it without torchrun")


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
        with _rank_taken():
            cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except RankError as error:
        _say(str(error))
        os._exit(2)  # torch would wait for the rank that is lost
    except (LlmpruneError, click.ClickException) as error:
        _fail(_usage(error) if isinstance(error, click.ClickException) else str(error))
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ or error  # click turns what Ctrl-C raises into an Abort
        kept = cause.args[0] if isinstance(cause, Interrupted) else "nothing was written"
        _say(f"interrupted, {kept}")
        sys.exit(143 if signal.SIGTERM in cause.args else 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a name too long: the system's own words, without a traceback
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")
    finally:
        gc.freeze()  # or Python would search all of torch for garbage before it ends, which takes a second


@contextmanager
def _rank_taken() -> Iterator[None]:
    """Among the processes of a launcher join the others; the first prints results, and what is logged says by whom."""
    rank, size, _ = launch()
    if size == 1:
        yield
        return
    from llmprune.team.joining import joined

    logging.basicConfig(format=f"rank {rank}: %(message)s")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout), joined():
        yield


def _say(message: str) -> None:
    rank, size, _ = launch()
    of_rank = f"rank {rank}: " if size > 1 else ""
    click.echo(f"llmprune: {of_rank}{redact(' '.join(message.split()))}", err=True)


def _usage(error: click.ClickException) -> str:
    """Return what is wrong with a command line, and where its words are explained unless the value of one is wrong."""
    message = error.format_message()
    wrong_value = isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter)
    if not isinstance(error, click.UsageError) or error.ctx is None or wrong_value:
        return message
    return f"{message.rstrip('.')}: see `{error.ctx.command_path} --help`"


def _fail(message: str) -> NoReturn:
    _say(message)
    sys.exit(2)


def _stop(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that nothing half-written is left."""
    raise KeyboardInterrupt(signal.SIGTERM)
