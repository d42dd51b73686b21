"""The defaults that histories keep are those of the planners."""

from __future__ import annotations

from ditmoe_cli.compression.counts import parse_keep
from ditmoe_cli.compression.left_out import defaults_of
from ditmoe_cli.compression.merge.merging import Merging
from ditmoe_cli.compression.precision.budget import Budget
from ditmoe_cli.compression.precision.candidates import Candidates
from ditmoe_cli.compression.precision.mixed import MixedPrecision
from ditmoe_cli.compression.prune.pruning import Pruning


def test_defaults_of_prune_are_those_of_its_planner() -> None:
    plain = Pruning(parse_keep("2"))
    kept = defaults_of("prune", plain.options())
    assert kept == {"allocate": "uniform", "neurons": plain.neurons} and not plain.shared_budget
    assert "refit" in defaults_of("prune", {"keep": "2"}) and "neurons" not in defaults_of("prune", {"neurons": 0.5})


def test_defaults_of_formats_are_those_of_candidates() -> None:
    plain = MixedPrecision(Budget(bits=3), Candidates())
    kept = defaults_of("quantize", plain.options())
    assert kept["allow"].split(",") == list(plain.candidates.allowed)
    assert dict(text.split("=") for text in kept["floor"]) == {
        group: f"{bits:g}" for group, bits in plain.candidates.floors.items()
    }
    assert kept["group_size"] == plain.candidates.group_size


def test_forms_without_choices_have_none() -> None:
    assert defaults_of("quantize", {"uniform": True, "format": "nf4"}) == {"rounding": "nearest"}
    assert defaults_of("quantize", {"uniform": True, "format": "nf4", "rounding": "gptq"}) == {}
    assert defaults_of("merge", {"delta": "svd", "delta_ratio": 0.25}) == {}
    assert defaults_of("merge", Merging(parse_keep("2")).options()) == {}
    assert defaults_of("apply", {}) == {}
