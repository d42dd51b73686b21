"""``python -m ditmoe_cli``, which ``torchrun -m`` starts, and ``ditmoe``: signals are heeded before imports begin."""

from __future__ import annotations

from typing import NoReturn

from ditmoe_cli.cli.interruption import EndedBySignals


def main() -> NoReturn:
    """Run the program and end the process with the exit code of its outcome."""
    with EndedBySignals():
        from ditmoe_cli.cli.app import main as run

        run()


if __name__ == "__main__":
    main()
