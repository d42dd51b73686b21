"""Signals that end the program: what is half-done is undone first, and the exit code is 128 and the signal's number.

A signal becomes an exception wherever the program stands: `KeyboardInterrupt` for SIGINT, `SystemExit` for SIGTERM and
SIGHUP. While that is under way further ones are ignored, so that nothing keeps ``finally`` clauses from deleting what
was half-written. One that Python swallows, in ``__del__`` and in callbacks of weak references, is sent again. While
libraries are imported a signal ends the process at once: their C++ aborts it where an exception meets it.

Imports next to nothing: it is in place before the program's imports begin.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_MARK = "_ends_the_program"
_SECONDS_UNTIL_SENT_AGAIN = 0.01

_ended_by: int | None = None
_is_sent_again = False  # one is on its way
_imports = 0  # of libraries, under way


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
            _end(_ended_by)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Have a signal end the process at once while the context lasts, which has nothing of its own to undo."""
    global _imports
    _imports += 1
    try:
        yield
    finally:
        _imports -= 1


def _end(number: int) -> NoReturn:
    """Say what ended the program, undo what is left to undo, and leave."""
    ignore_signals()
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    with suppress(OSError, ValueError):  # the terminal is gone
        print(f"ditmoe: error: {what}", file=sys.stderr)
    leave(128 + number)


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
    if _is_sent_again or _is_under_way(sys.exc_info()[1]):
        return
    if _imports:
        _end(number)
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
        global _is_sent_again
        number = getattr(found.exc_value, _MARK, None)
        if number is None:
            self.other(found)
            return
        _is_sent_again = True
        _thread.start_new_thread(_send_again, (number,))


def _send_again(number: int) -> None:
    """Send a signal to this process once Python has left where it swallows exceptions."""
    global _is_sent_again
    time.sleep(_SECONDS_UNTIL_SENT_AGAIN)
    _is_sent_again = False
    os.kill(os.getpid(), number)
