"""Conventions as data: they fit the functions that they parametrise, and need neither torch nor numpy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, PREPROCESSINGS, convention_named
from ditmoe_cli.evaluation.scores.inception_score import inception_score


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_are_found_by_name_and_fit_the_scores(name):
    convention = convention_named(name)
    assert convention.name == name
    assert convention.preprocessing in PREPROCESSINGS
    if convention.inception is not None:
        parts = convention.inception
        assert inception_score(np.eye(12), parts=parts.parts, chunk=parts.chunk, seed=parts.seed).mean > 1


def test_adm_divides_in_a_row_and_torch_fidelity_shuffles():
    adm, fidelity = CONVENTIONS["adm"].inception, CONVENTIONS["torch-fidelity"].inception
    assert (adm.parts, adm.chunk, adm.seed, adm.bias) == (None, 5000, None, False)
    assert (fidelity.parts, fidelity.chunk, fidelity.seed, fidelity.bias) == (10, None, 2020, False)


def test_unknown_names_are_refused():
    with pytest.raises(
        UsageError, match="unknown convention 'ADM'; choose adm, torch-fidelity, pytorch-fid, clean-fid"
    ):
        convention_named("ADM")


def test_conventions_need_neither_torch_nor_numpy():
    program = (
        "import sys\n"
        "import ditmoe_cli.evaluation.scores.conventions\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
