"""The method ``replay``: the formats of least measured error of the guided prediction, all weights sharing one budget.

Amplifications are first measured with one width everywhere. The mix solved with them has errors of other sizes, and so
other amplifications (`compression.replay.amplification`): a trial measures these, and the program is solved again. Of
both mixes the one of less tried error is taken.
"""

from __future__ import annotations

from dataclasses import replace

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.precision.mix import SolvedMix, least_bytes, solve_mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.compression.precision.sensitivity import measured_sensitivities
from ditmoe_cli.compression.precision.trial import try_formats


def choose(request: MixRequest, calibrated: Calibrated) -> SolvedMix:
    """Return the mix of least error.

    Raises `InfeasibleError` before any measurement where the narrowest formats do not fit.
    """
    least = least_bytes(request)
    rounded = {name: tuple(fmt for fmt in formats if fmt) for name, formats in request.formats.items()}
    sensitivities = measured_sensitivities(calibrated, rounded)
    first = solve_mix(request, sensitivities.errors, least)
    first_trial = try_formats(calibrated, first.formats, amplifies=True)
    second = solve_mix(request, sensitivities.at(first_trial.amplification).errors, least)
    second_trial = try_formats(calibrated, second.formats)
    failures = tuple(dict.fromkeys((*first.failures, *second.failures)))
    if second_trial.error <= first_trial.error:
        return replace(second, tried_error=second_trial.error, failures=failures)
    return replace(first, tried_error=first_trial.error, failures=failures)
