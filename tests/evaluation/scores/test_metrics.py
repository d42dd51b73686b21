"""Metrics and requests: what each convention has and needs, without torch or numpy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.features.extractors import EXTRAS
from ditmoe_cli.evaluation.fid_score import SCORES
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS
from ditmoe_cli.evaluation.scores.metrics import METRICS, Request, offered_by, parse_scores


def test_every_metric_is_computed_and_takes_activations_that_there_are() -> None:
    assert METRICS.keys() == SCORES.keys()
    for convention in CONVENTIONS.values():
        kinds = [kind for metric in METRICS.values() for kind in metric.activations(convention)]
        assert set(kinds) <= set(EXTRAS)


@pytest.mark.parametrize(
    ("convention", "scores"),
    [
        ("adm", ("sfid", "is", "pr", "fid-inf")),
        ("torch-fidelity", ("is", "pr", "kid", "fid-inf")),
        ("pytorch-fid", ("fid-inf",)),
        ("clean-fid", ("kid", "fid-inf")),
    ],
)
def test_all_are_those_that_the_program_has(convention: str, scores: tuple[str, ...]) -> None:
    assert parse_scores("all", convention) == offered_by(CONVENTIONS[convention]) == scores
    assert parse_scores(None, convention) == ()


def test_names_are_kept_in_order_once_and_others_are_refused() -> None:
    assert parse_scores("pr, is,pr", "adm") == ("pr", "is")
    with pytest.raises(UsageError, match="ssim: unknown; choose from sfid, is, pr, kid, fid-inf or all"):
        parse_scores("is,ssim", "adm")
    with pytest.raises(UsageError, match=r"kid: adm has no such score; give .* torch-fidelity or clean-fid"):
        parse_scores("kid", "adm")
    with pytest.raises(UsageError, match="unknown convention"):
        parse_scores(None, "ours")


def test_a_request_names_the_settings_that_need_images() -> None:
    request = Request(("fid-inf", "sfid", "kid", "is", "pr"), "torch-fidelity", resamples=5)
    assert request.activations == ("spatial", "logits")
    assert request.needs_subject_features == (
        *(f"⟨metrics⟩ {n}" for n in ("fid-inf", "kid", "is", "pr")),
        "⟨bootstrap⟩",
    )
    assert request.needs_reference_features == ("⟨metrics⟩ kid", "⟨metrics⟩ pr")
    counts = {setting.removeprefix("⟨metrics⟩ "): count for setting, count in request.fewest if count}
    assert counts == {"kid": 1000, "pr": 4, "is": 10}
    assert dict(Request(("kid",), "clean-fid").fewest) == {"⟨metrics⟩ kid": 2}
    assert Request(("sfid",)).needs_subject_features == ()


def test_requests_need_neither_torch_nor_numpy() -> None:
    program = (
        "import sys\n"
        "import ditmoe_cli.evaluation.scores.metrics\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
