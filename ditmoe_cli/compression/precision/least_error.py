"""The method ``replay``: the formats of least measured error of the guided prediction, all weights sharing one budget.

Amplifications are measured with one width everywhere first. The mix that this gives has errors of other sizes, with
other amplifications (`compression.replay.amplification`); so it is tried, and solved again with the amplifications
that the trial measured. Of both mixes the one of less tried error is taken.
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

    Raises `InfeasibleError` where the narrowest formats do not fit, before anything is measured.
    """
    least = least_bytes(request)
    rounded = {name: tuple(fmt for fmt in formats if fmt) for name, formats in request.formats.items()}
    sensitivities = measured_sensitivities(calibrated, rounded)
    first = solve_mix(request, sensitivities.errors, least)
    first_trial = try_formats(calibrated, first.formats)
    second = solve_mix(request, sensitivities.at(first_trial.amplification).errors, least)
    second_trial = try_formats(calibrated, second.formats)
    if second_trial.error <= first_trial.error:
        return replace(second, tried_error=second_trial.error)
    return replace(first, tried_error=first_trial.error)
