"""The choice of a number format for each weight, as a binary program under a budget of bytes. Torch- and numpy-free.

With x_go = 1 where group g takes option o, of b_go bytes and error e_go:

    minimise Σ_go e_go x_go   subject to   Σ_o x_go = 1 for each g,   Σ_go b_go x_go <= B,   x_go in {0, 1}.

`lagrange.py` gives a good choice and a bound. PuLP (https://coin-or.github.io/pulp/) then closes the gap, with HiGHS
where highspy is installed and its own CBC otherwise; no solver sees more than the options that the bound leaves open.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from ditmoe_cli.compression.precision.knapsack import exact
from ditmoe_cli.compression.precision.lagrange import (
    Group,
    bytes_of,
    check,
    dual,
    error_of,
    improve,
    reduced_costs,
    relax,
    undominated,
    usable,
)
from ditmoe_cli.errors import InfeasibleError, UsageError

Solver = Literal["auto", "highs", "cbc", "lagrange"]
_PROGRAMS: dict[str, tuple[str, ...]] = {
    "auto": ("highs", "cbc"),
    "highs": ("highs",),
    "cbc": ("cbc",),
    "lagrange": (),
}

# The gap up to which the Lagrangian's choice stands in for a program that gave no proof.
FALLBACK_GAP = 5e-2
# A relative gap that rounding alone may cause.
_ROUNDING = 1e-12
# Solvers compare with absolute tolerances of about 1e-6, so costs are scaled until the largest is near this.
_COST_SCALE = 1024.0
# How far a solver's proof may be off, in those costs.
_TOLERANCE = 1e-4
_MISSING = "not installed"


@dataclass(frozen=True)
class Solution:
    """One option for each group, and how far from the optimum the choice may be.

    Attributes:
        choice: an option index per group.
        error: sum of the groups' errors.
        bytes: sum of the groups' bytes.
        bound: no choice that fits the budget has less error; the Lagrangian's bound, or the solver's where that is
            tighter.
        gap: (error - bound) / error, 0 where error is 0.
        solver: ``highs`` or ``cbc`` where that solver proved its choice or had the better one, ``exact`` where none did
            and all sums were listed (`knapsack`), else ``lagrange``.
        failures: solvers that gave no proof, each with its reason, as ``cbc: PermissionError: ...``. HiGHS that is not
            installed is no failure.
    """

    choice: tuple[int, ...]
    error: float
    bytes: int
    bound: float
    gap: float
    solver: str
    failures: tuple[str, ...] = ()


def solver_named(solver: str, failures: Sequence[str]) -> str:
    """Return a solver's name for plans, with the solvers that failed before it and the kinds of their failures.

    Only kinds are named, since messages hold the paths of a machine, and plans of equal work should be equal.
    """
    kinds = ", ".join(": ".join(failure.split(": ")[:2]) for failure in failures)
    return f"{solver} (no proof by {kinds})" if failures else solver


def solve(
    groups: Sequence[Group], budget: int, gap: float = 1e-4, time_limit: float = 5.0, solver: Solver = "auto"
) -> Solution:
    """Return the choice of least error that fits `budget` bytes, to within the relative `gap`.

    1. The Lagrangian gives a choice of error U, a bound L, and λ. A choice with option o in group g has an error of at
       least L + r_go (`reduced_costs`), so options with r_go > U - L cannot lower U and are dropped. Where only the
       choice itself remains, or U - L is mere rounding, it is the optimum, and no program is run.
    2. The options left make a binary program. Costs are taken above the least of each group and scaled by a power of
       two, bytes are taken above the least and divided by their common divisor, and the gap allowed is absolute,
       `gap` L / 2. So neither the errors' unit nor the settled groups make a difference to a solver. The other half of
       the gap is for its tolerances.
    3. The result is the solver's choice after `improve`, or the Lagrangian's: the one of less error, then of fewer
       bytes, then the lexicographically first.

    ``auto`` runs HiGHS if it is installed, and CBC if HiGHS is missing, fails or ends without a proof. `time_limit` is
    in seconds: HiGHS then gets half, and CBC the remaining time. Without a proof the best choice is returned if its gap
    is at most `FALLBACK_GAP` (or `gap`, if larger); else ``auto`` lists all sums of bytes and errors, if they are not
    too many (`knapsack.exact`). ``lagrange`` runs no program and always returns its choice. One thread and fixed seeds
    make equal input give equal choices, unless the time limit ends a program. Dominated options (`undominated`) are
    never taken.

    Raises `InfeasibleError` where the least bytes exceed the budget or no choice is good enough, `BadInputError` for
    errors or bytes that are negative or not finite, `UsageError` for an unknown solver, a gap or a time limit out of
    range.
    """
    if solver not in _PROGRAMS:
        raise UsageError(f"solver {solver}: unknown; there are {', '.join(_PROGRAMS)}")
    if not (0 <= gap < math.inf and 0 < time_limit < math.inf):
        raise UsageError(f"gap {gap}, time limit {time_limit} s: the gap must be finite and >= 0, the limit > 0")
    check(groups, budget)
    budget = usable(groups, budget)
    start, multiplier = relax(groups, budget)
    bound = dual(groups, budget, multiplier)
    incumbent = improve(groups, budget, start)
    upper = error_of(groups, incumbent)
    fallback = _solution(groups, incumbent, bound, "lagrange")
    core = _core(groups, incumbent, multiplier, upper - bound)
    if all(len(options) == 1 for options in core):
        return _solution(groups, incumbent, upper, "lagrange")
    if solver == "lagrange" or fallback.gap <= _ROUNDING:
        return fallback
    statuses: list[str] = []
    failures: list[str] = []
    names, started = _PROGRAMS[solver], time.monotonic()
    for n, name in enumerate(names):
        remaining = time_limit - (time.monotonic() - started)
        seconds = max(time_limit / len(names), remaining / (len(names) - n))
        outcome = _run(name, groups, core, budget, gap * bound / 2, seconds)
        statuses.append(f"{name}: {outcome.status}")
        if not outcome.proved and (name, outcome.status) != ("highs", _MISSING):
            failures.append(statuses[-1])
        if outcome.choice is None:
            continue
        improved = improve(groups, budget, outcome.choice)
        choice = min((improved, incumbent), key=lambda each: (error_of(groups, each), bytes_of(groups, each), each))
        if outcome.proved:
            proved = max(bound, error_of(groups, outcome.choice) - outcome.slack)
            return replace(_solution(groups, choice, proved, name), failures=tuple(failures))
        if choice != incumbent:
            incumbent, fallback = choice, _solution(groups, choice, bound, name)
    if fallback.gap <= max(gap, FALLBACK_GAP):
        return replace(fallback, failures=tuple(failures))
    best = exact(groups, core, budget, multiplier, upper - bound) if solver == "auto" else None
    if best is not None:
        choice = min((best, incumbent), key=lambda each: error_of(groups, each))
        listed = _solution(groups, choice, error_of(groups, choice) * (1 - _ROUNDING), "exact")
        return replace(listed, failures=tuple(failures))
    raise InfeasibleError(
        f"the formats could not be chosen ({'; '.join(statuses)}): the best choice found may be {fallback.gap:.2g} of "
        f"its error from the optimum, more than {max(gap, FALLBACK_GAP):.2g}; give more time or another solver"
    )


def _core(groups: Sequence[Group], incumbent: Sequence[int], multiplier: float, open_gap: float) -> list[list[int]]:
    """Return the options of each group that may be in a choice no worse than the incumbent, its own among them."""
    core: list[list[int]] = []
    for group, own in zip(groups, incumbent, strict=True):
        costs = reduced_costs(group, multiplier)
        # slightly more than the gap: the bound is lowered by its rounding, but may equal the error
        core.append([o for o in undominated(group) if o == own or costs[o] <= open_gap * (1 + 1e-9)])
    return core


def _solution(groups: Sequence[Group], choice: tuple[int, ...], bound: float, solver: str) -> Solution:
    """Return the solution with its sums and its gap; a bound above the error is cut to it."""
    error = error_of(groups, choice)
    bound = min(bound, error)
    return Solution(choice, error, bytes_of(groups, choice), bound, (error - bound) / error if error else 0.0, solver)


@dataclass(frozen=True)
class _Outcome:
    """The outcome of a program.

    Attributes:
        choice: an option index per group; None if the program gave none.
        status: how the program ended.
        proved: whether no choice is better by more than `slack`.
        slack: absolute, in the errors' unit.
    """

    choice: tuple[int, ...] | None
    status: str
    proved: bool = False
    slack: float = 0.0


def _run(
    name: str, groups: Sequence[Group], core: Sequence[Sequence[int]], budget: int, allowed: float, time_limit: float
) -> _Outcome:
    """Run the program over the options in `core`; `allowed` is the absolute gap, in the errors' unit."""
    open_groups = [g for g, options in enumerate(core) if len(options) > 1]
    cells = [(g, o) for g in open_groups for o in core[g]]
    least = {g: min(groups[g].options[o].bytes for o in core[g]) for g in range(len(groups))}
    lowest = {g: min(groups[g].options[o].error for o in core[g]) for g in open_groups}
    more = {(g, o): groups[g].options[o].bytes - least[g] for g, o in cells}
    unit = math.gcd(*more.values()) or 1
    room = (budget - sum(least.values())) // unit
    costs = {(g, o): groups[g].options[o].error - lowest[g] for g, o in cells}
    # a power of two, so that scaling rounds nothing
    power = math.frexp(_COST_SCALE)[1] - math.frexp(max(costs.values()))[1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            taken, status, proved = _solved(
                name,
                {cell: math.ldexp(cost, power) for cell, cost in costs.items()},
                {cell: extra // unit for cell, extra in more.items()},
                room,
                math.ldexp(allowed, power),
                time_limit,
            )
    except ModuleNotFoundError:
        return _Outcome(None, _MISSING)
    except Exception as error:  # whatever fails in a solver, the Lagrangian's choice remains
        return _Outcome(None, f"{type(error).__name__}: {error}".splitlines()[0])
    choice = [options[0] for options in core]
    for g, o in taken:
        choice[g] = o
    if sorted(g for g, _ in taken) != open_groups:
        return _Outcome(None, status)
    if bytes_of(groups, choice) > budget:
        return _Outcome(None, f"{status}, but over the budget")
    return _Outcome(tuple(choice), status, proved, allowed + math.ldexp(_TOLERANCE, -power))


def _solved(
    name: str,
    costs: Mapping[tuple[int, int], float],
    sizes: Mapping[tuple[int, int], int],
    room: int,
    allowed: float,
    time_limit: float,
) -> tuple[list[tuple[int, int]], str, bool]:
    """Return the cells (group, option) taken, how the program ended, and whether they are optimal within `allowed`."""
    import pulp  # type: ignore[import-untyped, unused-ignore]

    program = pulp.LpProblem("formats", pulp.LpMinimize)
    taken = {(g, o): program.add_variable(f"x_{g}_{o}", 0, 1, pulp.LpBinary) for g, o in costs}
    program.setObjective(pulp.LpAffineExpression({taken[cell]: cost for cell, cost in costs.items()}))
    rows: dict[int, list[Any]] = {}
    for (g, _), variable in taken.items():
        rows.setdefault(g, []).append(variable)
    for g, row in rows.items():
        program += pulp.LpAffineExpression(dict.fromkeys(row, 1)) == 1, f"one_{g}"
    program += pulp.LpAffineExpression({taken[cell]: size for cell, size in sizes.items()}) <= room, "budget"
    if name == "highs":
        with _stdout_as_stderr():
            program.solve(_program(pulp, name, allowed, time_limit))
    else:
        _run_cbc(program, _program(pulp, name, allowed, time_limit))
    status = str(pulp.LpSolution[program.sol_status])
    cells = [cell for cell, variable in taken.items() if (variable.varValue or 0) > 0.5]
    return cells, status, program.sol_status == pulp.LpSolutionOptimal


@contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """Send what a library prints to stdout to stderr for a while: stdout holds a command's result alone.

    HiGHS prints a banner from C++ when it is made, before it can be silenced. The C library's buffer is emptied too.
    """
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _: None
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _program(pulp: Any, name: str, allowed: float, time_limit: float) -> Any:
    """Return PuLP's solver of that name: silent, on one thread, with fixed seeds."""
    if name == "highs":
        # its threads cannot be set here: highspy keeps one pool per process, and fails if asked for another size
        options = {"parallel": "off", "random_seed": 0}
        program = pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=allowed, timeLimit=time_limit, **options)
    else:
        seeds = ["randomSeed 1", "randomCbcSeed 1"]
        limits = {"gapRel": 0.0, "gapAbs": allowed, "timeLimit": time_limit}
        program = pulp.PULP_CBC_CMD(msg=False, threads=1, options=seeds, **limits)
    if not program.available():
        raise _unavailable(name, program)
    return program


def _unavailable(name: str, program: Any) -> Exception:
    """Return the error of a solver that cannot run: `ModuleNotFoundError` where it is not installed."""
    if name == "highs" and find_spec("highspy") is not None:
        try:
            import_module("highspy")
        except Exception as error:  # a library that does not load, whatever it raises
            return error
    if name == "cbc" and Path(program.path).exists():
        return PermissionError(f"{program.path} is not executable")
    return ModuleNotFoundError(name)


def _run_cbc(program: Any, solver: Any) -> None:
    """Run CBC on a program and assign the values that it finds to the program's variables.

    PuLP would split the command at blanks, and so at those of a temporary folder. Here CBC works inside a folder of its
    own, and its files have names without one. Raises `OSError` where it does not run or ends without an answer.
    """
    with TemporaryDirectory(prefix="ditmoe-") as folder:
        model, answer = Path(folder, "model.mps"), Path(folder, "answer.sol")
        variables, names, rows, _ = program.writeMPS(str(model), rename=1)
        options = " ".join(f"-{option}" for option in [*solver.options, *solver.getOptions()]).split()
        words = [model.name, "-sec", str(solver.timeLimit), *options]
        words += ["-solve", "-printingOptions", "all", "-solution", answer.name]
        command = [str(Path(solver.path).absolute()), *words]
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode or not answer.exists():
            told = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            raise OSError(f"cbc ended with code {done.returncode}: {told[-1][:160] if told else 'it said nothing'}")
        status, values, _, _, _, ended = solver.readsol_MPS(str(answer), program, variables, names, rows)
        program.assignVarsVals(values)
        program.assignStatus(status, ended)
