"""The ``ditmoe`` program: its commands, loaded when they are called, and the exit code of every outcome."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

from ditmoe_cli.api.notes import told_to

# plain help and one-line usage errors: rich would wrap long paths, and costs start-up time
os.environ.setdefault("TYPER_USE_RICH", "0")

import typer

from ditmoe_cli.cli.announced_imports import announced_imports
from ditmoe_cli.cli.completion import DETECTED, VARIABLE, answer, installed, script
from ditmoe_cli.cli.groups import spliced
from ditmoe_cli.cli.help_texts import Program, SectionedCommand
from ditmoe_cli.cli.interruption import INTERRUPTED, EndedBySignals, ended_by_signal, ignore_signals, leave
from ditmoe_cli.cli.machine import Threads, versions
from ditmoe_cli.cli.progress_display import shown
from ditmoe_cli.cli.terminal import clipped, note, print_anything, printable, with_options
from ditmoe_cli.errors import DitmoeError, is_out_of_memory
from ditmoe_cli.progress import watched_by
from ditmoe_cli.threads import prepare_threads, usable_cores

# each is a module of `ditmoe_cli.cli.commands`
COMMANDS = {
    "inspect": "Print what a checkpoint is.",
    "convert": "Write a checkpoint of any layout as safetensors.",
    "export": "Write a checkpoint in the layout of another program.",
    "profile-experts": "Sample a model and count how it routes.",
    "prune": "Keep the most salient experts of each block.",
    "merge": "Merge experts, or store them as differences.",
    "quantize": "Store weights in fewer bits.",
    "compress": "Compress to a size: fewer neurons and fewer bits from one budget.",
    "heal": "Train a compressed checkpoint to predict as its original does.",
    "distill": "Train a checkpoint to be sampled in few steps, guidance in its weights.",
    "plan": "Show, check or compare compression plans.",
    "apply": "Carry out a compression plan.",
    "run": "Carry out a recipe: the commands that made a checkpoint.",
    "schedule": "Choose what each block computes in each step.",
    "sample": "Sample images.",
    "fid": "Score images against a reference.",
    "report": "Report what a profile shows, and test the paper's claims.",
    "compare": "Measure how far one checkpoint strays from another.",
    "bench": "Measure memory and time of a checkpoint.",
}

# first words of a command that have options of their own: `report sensitivity` is the module `report_sensitivity`
KINDS = {"report": ("sensitivity",)}

_COMPLETION = ("--install-completion", "--show-completion")


class RootProgram(Program):
    """The program, where an option of completion that stands last means the shell that runs it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return the words after the program's own options."""
        return super().parse_args(ctx, [*args, DETECTED] if args and args[-1] in _COMPLETION else args)


app = typer.Typer(
    name="ditmoe",
    cls=RootProgram,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_OUT_OF_MEMORY = "out of memory; try a smaller --batch"
_ASKING = {"-h", "--help", "--version"}

# typer carries its own click; its public BadParameter leads to the base of everything click raises
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


def _printing(text_of: Callable[[Any], str]) -> Callable[[Any], None]:
    """Return the callback of an option that prints a text and ends the program."""

    def callback(given: Any) -> None:
        if given:
            print(text_of(given))
            raise typer.Exit

    return callback


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_printing(lambda _: versions()),
            is_eager=True,
            help="Print the versions of ditmoe, torch and the GPU's driver.",
        ),
    ] = False,
    install: Annotated[
        str | None,
        typer.Option(
            "--install-completion",
            metavar="[SHELL]",
            callback=_printing(installed),
            is_eager=True,
            help="Make bash, zsh or fish complete commands, options and their values.",
        ),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(
            "--show-completion",
            metavar="[SHELL]",
            callback=_printing(script),
            is_eager=True,
            help="Print what --install-completion would write.",
        ),
    ] = None,
) -> None:
    """Compress and analyse pretrained DiT-MoE checkpoints.

    \b
    ditmoe profile-experts CKPT | ditmoe prune --keep 0.5 |
        ditmoe quantize --bits 4 | ditmoe fid
    """


class LazyCommand(SectionedCommand):
    """A command whose module is imported when it is called. ``ditmoe --help`` needs only its one line of help."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the command itself, which typer then invokes."""
        assert self.name is not None
        if args and args[0] in KINDS.get(self.name, ()):
            kind, *rest = args
            return load_command(f"{self.name}-{kind}").make_context(f"{info_name} {kind}", rest, parent, **extra)
        return load_command(self.name).make_context(info_name, args, parent, **extra)


@cache
def load_command(name: str) -> Any:
    """Return the command that `run` in the module of its name is, such as ``profile-experts`` in `profile_experts`.

    Built once in a process, as a recipe asks for the same few again and again.
    `MACHINE` of the module is a group of options that takes the place of `Threads`, such as `Models`.
    """
    module = import_module(f"ditmoe_cli.cli.commands.{name.replace('-', '_')}")
    program = typer.Typer(add_completion=False, rich_markup_mode=None)
    program.command(name, cls=SectionedCommand)(spliced(module.run, getattr(module, "MACHINE", Threads)))
    command = typer.main.get_command(program)
    assert isinstance(command, SectionedCommand)
    command.examples = module.EXAMPLES
    return command


def load_program() -> Any:
    """Return the program with all its commands, none of which is imported yet."""
    program = typer.main.get_group(app)
    for name, summary in COMMANDS.items():
        program.add_command(LazyCommand(name, short_help=summary))
    return program


def main() -> NoReturn:
    """Run the program and end the process with the exit code of its outcome."""
    with EndedBySignals():
        prepare_threads(os.environ, usable_cores())
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed by the shell (>&-): its number must not go to a file that we open
                setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
        print_anything(sys.stdout, sys.stderr)
        if request := os.environ.get(VARIABLE):
            print(answer(load_program(), request))
            code = 0
        else:
            code = run(sys.argv[1:])
        ignore_signals()
    leave(code)


def run(arguments: list[str]) -> int:
    """Run the program on arguments and return its exit code; errors become one line on stderr."""
    if not (_has_working_folder() or _ASKING & set(arguments)):  # torch's libraries end the process without one
        return _fail("the working directory is not there any more; change into one that is", 3)
    try:
        with told_to(note), watched_by(shown), announced_imports():
            code = _invoke(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _silence_stdout()
        return 141
    except OSError as error:
        if ended_by_signal():
            raise
        _silence_stdout()
        return _fail(_os_error(error), 1)


def _invoke(arguments: list[str]) -> int:
    """Run the chosen command, not through typer's own main: that ends a closed pipe in exit code 1."""
    program = load_program()
    try:
        with program.make_context("ditmoe", arguments) as context:
            program.invoke(context)
        return 0
    except BaseException as error:
        if ended_by_signal():
            raise
        return _outcome(error)


def _outcome(error: BaseException) -> int:
    """Print the line of an exception that ended a command, and return its exit code; system errors are raised."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, DitmoeError):
        return _fail(with_options(error.message), error.exit_code)
    if isinstance(error, _ClickException):
        return _usage(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    if isinstance(error, MemoryError):
        return _fail(_OUT_OF_MEMORY, 1)
    if isinstance(error, OSError) or not isinstance(error, Exception) or os.environ.get("DITMOE_TRACEBACK"):
        raise error
    return _fail(_unexpected(error), 1)


def _has_working_folder() -> bool:
    try:
        return bool(Path.cwd())
    except OSError:
        return False


def _silence_stdout() -> None:
    """Point stdout to the null device if it cannot be written, so that the interpreter's last flush does not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    print(f"ditmoe: error: {printable(' '.join(clipped(message).split()))}", file=sys.stderr)
    return code


def _usage(error: BaseException) -> int:
    """Print a usage error in one line; a bare ``ditmoe`` prints its help."""
    message = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return 2
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return _fail(message + hint, 2)


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}no space left on the device"
    return f"{where}{error.strerror or error}"


def _unexpected(error: Exception) -> str:
    if is_out_of_memory(error):
        on_gpu = "cuda" in str(error).lower()
        return "the GPU is out of memory; try a smaller --batch, or --device cpu" if on_gpu else _OUT_OF_MEMORY
    return f"internal error: {type(error).__name__}: {error} (set DITMOE_TRACEBACK=1 for the traceback, and report it)"
