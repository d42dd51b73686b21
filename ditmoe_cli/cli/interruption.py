"""Signals that end the program: what is half-done is undone first, and the exit code is 128 and the signal's number.

A signal becomes an exception wherever the program stands: `KeyboardInterrupt` for SIGINT, `SystemExit` for SIGTERM and
SIGHUP. While that is under way further ones are ignored, so that nothing keeps ``finally`` clauses from deleting what
was half-written. One that Python swallows, in ``__del__`` and in callbacks of weak references, is sent again.

Imports next to nothing: it is in place before the program's imports begin.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_MARK = "_ends_the_program"
_SECONDS_UNTIL_SENT_AGAIN = 0.01

_ended_by: int | None = None


def ended_by_signal() -> bool:
    """Return whether a signal has ended the program: then errors on the way out are its own doing."""
    return _ended_by is not None


class EndedBySignals:
    """The program: a ``with`` block that a signal ends, in one line on stderr and the exit code 128 + its number.

    A signal that was ignored when the program was started, as by ``nohup``, stays ignored.
    """

    def __enter__(self) -> None:
        for number in _ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, _raise):
                signal.signal(number, _raise)
        if not isinstance(sys.unraisablehook, _SentAgain):
            sys.unraisablehook = _SentAgain(sys.unraisablehook)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and _ended_by is not None:
            ignore_signals()
            what = "interrupted" if _ended_by == signal.SIGINT else f"ended by {signal.Signals(_ended_by).name}"
            with suppress(OSError, ValueError):  # the terminal is gone
                print(f"ditmoe: error: {what}", file=sys.stderr)
            leave(128 + _ended_by)


def ignore_signals() -> None:
    """Ignore the signals that end the program: it ends anyway."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def leave(code: int) -> NoReturn:
    """End the process at once, without taking the interpreter apart: all files are closed, and locks end with it.

    Taking torch apart lasts for seconds in which nothing shows. A thread of a process group that frees a tensor
    meanwhile now and then aborts the process ("terminate called without an active exception"), though all of its work
    is done. And where an interrupt passed through `exec`, as it does while a dataclass is made, Python ends with the
    signal instead of the exit code. Handlers that libraries have registered for the end (`atexit`) are called before.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _raise(number: int, _: FrameType | None) -> None:
    """Raise the exception of a signal, unless that of an earlier one is under way."""
    global _ended_by
    if _is_under_way(sys.exc_info()[1]):
        return
    _ended_by = number
    error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
    setattr(error, _MARK, number)
    raise error


def _is_under_way(handled: BaseException | None) -> bool:
    """Return whether the exception that is being handled is a signal's, or came up while one was handled."""
    seen: set[int] = set()
    while handled is not None and id(handled) not in seen:
        if hasattr(handled, _MARK):
            return True
        seen.add(id(handled))
        handled = handled.__context__
    return False


class _SentAgain:
    """The hook for exceptions that cannot be raised; those of signals are sent again when Python is out of there."""

    def __init__(self, other: Callable[[Any], object]) -> None:
        self.other = other

    def __call__(self, found: Any) -> None:
        number = getattr(found.exc_value, _MARK, None)
        if number is None:
            self.other(found)
            return
        sending = threading.Timer(_SECONDS_UNTIL_SENT_AGAIN, os.kill, (os.getpid(), number))
        sending.daemon = True
        sending.start()
