"""The registry of methods: listed without torch, all of it callable."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from ditmoe_cli.compression.methods import DEFAULT_METHODS, MERGES, METHODS, MIXES, SALIENCIES, SEARCHES
from ditmoe_cli.routing.profile import empty_tables


def test_every_method_says_what_it_does_and_where_it_is_from() -> None:
    assert all(method.summary and method.source for methods in METHODS.values() for method in methods.values())
    assert all(method.source.startswith("arXiv ") for method in MERGES.values())
    assert not SALIENCIES.keys() & SEARCHES.keys(), "they share an option"


def test_every_command_has_a_default_among_its_methods() -> None:
    assert DEFAULT_METHODS.keys() == METHODS.keys()
    assert all(DEFAULT_METHODS[command] in methods for command, methods in METHODS.items())


@pytest.mark.parametrize("name", [*SEARCHES, *MERGES, *MIXES])
def test_functions_that_are_imported_late_are_there(name: str) -> None:
    method = {**SEARCHES, **MERGES, **MIXES}[name]
    functions = [value for field, value in vars(method).items() if field in ("choose", "group", "merge")]
    assert functions and all(inspect.isfunction(function.load()) for function in functions)


def test_a_saliency_that_needs_no_profile_scores_without_one() -> None:
    free = [saliency for saliency in SALIENCIES.values() if not saliency.needs_profile]
    assert free and all(saliency.score(empty_tables((3, 2)), 0) for saliency in free)


def test_listing_methods_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from ditmoe_cli.compression.merge import inputs; "
        "from ditmoe_cli.compression.methods import METHODS; "
        "print(*METHODS, *{'torch', 'numpy', 'scipy', 'sklearn'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == ["prune", "merge", "quantize"], done.stderr
