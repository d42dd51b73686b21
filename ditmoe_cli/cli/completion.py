"""Shell completion: what bash, zsh and fish read, and what they ask for with each press of the key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ditmoe_cli.errors import BadInputError, UsageError

SHELLS = ("bash", "zsh", "fish")
DETECTED = "auto"
VARIABLE = "_DITMOE_COMPLETE"  # typer's name for it; the shell sets it where it asks for words


def script(shell: str) -> str:
    """Return the text that makes a shell complete. Raises `UsageError` for an unknown shell."""
    from typer._completion_shared import get_completion_script

    return str(get_completion_script(prog_name="ditmoe", complete_var=VARIABLE, shell=_shell(shell)))


def installed(shell: str) -> str:
    """Make a shell complete from its next start on, and return what was written where.

    Raises `UsageError` for an unknown shell, `BadInputError` where its files cannot be written.
    """
    from typer._completion_shared import install

    try:
        name, path = install(shell=_shell(shell), prog_name="ditmoe", complete_var=VARIABLE)
    except (OSError, RuntimeError) as error:  # the latter where nobody knows the home folder
        raise BadInputError(f"completion cannot be installed ({error}); use --show-completion instead") from None
    return f"{name} completes ditmoe from its next start on ({path})"


def _shell(name: str) -> str:
    """Return the name of a shell, for ``auto`` that of the one around this process. Raises `UsageError`."""
    if name == DETECTED:
        from typer._completion_shared import _get_shell_name

        name = _get_shell_name() or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise UsageError(f"completion for {name or 'no known shell'}: name one of {', '.join(SHELLS)}")
    return name


def answer(program: Any, request: str) -> str:
    """Return the words that a shell asks for, such as with the request ``complete_bash``; nothing where it fails.

    A shell would show a message in the middle of the line that its user types.
    """
    from typer._click.shell_completion import get_completion_class
    from typer._completion_classes import completion_init

    completion_init()
    make = get_completion_class(request.partition("_")[2])
    if make is None:
        return ""
    try:
        return str(make(program, {}, "ditmoe", VARIABLE).complete())
    except Exception:
        return ""
