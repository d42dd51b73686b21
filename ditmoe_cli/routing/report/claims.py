"""The DiT-MoE paper's three claims on specialisation, judged on a profile by explicit rules.

The paper (https://arxiv.org/abs/2407.11633) rests them on heat maps of one model, without a statistic; the rules here
are ours. Each uses intervals alone, never a point estimate, and gives a verdict:

    holds            the interval lies on the claim's side of every bound below
    partly           a part of the claim is sure, and another is refuted, or weaker than a half
    does not hold    the claim is refuted
    cannot be told   an interval contains a bound: more images are needed

Information is I(x; expert) / H(expert), the share of the router's entropy that x explains.

1. *Experts prefer positions and steps, not classes.* Experts prefer x if its interval lies above `NEGLIGIBLE`, and do
   not if it lies below. Class does not matter if its interval lies below `NEGLIGIBLE`, or below `MINOR` times the lower
   end of the weakest preferred variable; it matters if its interval lies above both.
2. *Specialisation by position fades with depth.* The ratio is the mean information with position in the last third of
   the blocks over that in the first third. Below `HALF` the claim holds, below `BARELY` it holds partly, above it does
   not. It does not hold either where the first third has no such information to lose.
3. *Specialisation is more concentrated at early steps, and uniform later.* The same for the concentration of load,
   1 - H(expert) / ln E, in the second half of the steps over the first. The claim holds only if the second half is
   uniform too, its concentration below `UNIFORM`. Where the ratio alone leaves the claim open and the second half is
   surely not uniform, it does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

VARIABLES = ("position", "step", "class", "branch")
NEGLIGIBLE = 0.01
MINOR = 0.1
HALF = 0.5
BARELY = 0.9
UNIFORM = 0.05

Verdict = Literal["holds", "partly", "does not hold", "cannot be told"]


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.value)} [{_short(self.low)}, {_short(self.high)}]"

    def to_json(self) -> dict[str, float]:
        """Return value, low and high."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Trend:
    """A quantity early and late, in depth or in steps, and late / early."""

    early: Estimate
    late: Estimate
    ratio: Estimate

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return early, late and ratio."""
        return {"early": self.early.to_json(), "late": self.late.to_json(), "ratio": self.ratio.to_json()}


@dataclass(frozen=True)
class Evidence:
    """Numbers that the verdicts rest on, averaged over blocks.

    Attributes:
        information: by variable; class is missing with one class.
        depth: information with position in early and late blocks; None with one block or image.
        steps: concentration of load at early and late steps; None with one step bin or image.
        concentration: concentration of load in each step bin.
    """

    information: Mapping[str, Estimate]
    depth: Trend | None
    steps: Trend | None
    concentration: tuple[Estimate, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the evidence as JSON, null for a trend that is None."""
        return {
            "information": {name: estimate.to_json() for name, estimate in self.information.items()},
            "depth": self.depth.to_json() if self.depth else None,
            "steps": self.steps.to_json() if self.steps else None,
            "concentration": [estimate.to_json() for estimate in self.concentration],
        }


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, the verdict on it, and the reason in a sentence with the numbers."""

    name: str
    statement: str
    verdict: Verdict
    sentence: str

    def to_json(self) -> dict[str, str]:
        """Return the claim as JSON."""
        return {"name": self.name, "claim": self.statement, "verdict": self.verdict, "sentence": self.sentence}


def _short(value: float) -> str:
    """Return a number with three digits."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def judge(evidence: Evidence) -> tuple[Claim, Claim, Claim]:
    """Return the verdicts on the three claims."""
    return (_preferences(evidence.information), _depth(evidence.depth), _steps(evidence.steps, evidence.concentration))


def _above(estimate: Estimate | None, bound: float) -> bool | None:
    """Return whether a quantity lies above a bound; None where its interval contains the bound, or is None."""
    if estimate is None or estimate.low <= bound <= estimate.high:
        return None
    return estimate.low > bound


def _class_matters(information: Mapping[str, Estimate], preferred: list[str]) -> bool | None:
    """Return whether class matters beside the preferred variables; None where it is open."""
    floor = min((information[name].low for name in preferred), default=0.0)
    return _above(information.get("class"), max(NEGLIGIBLE, MINOR * floor))


def _preferences(information: Mapping[str, Estimate]) -> Claim:
    """Judge the first claim."""
    prefers = {name: _above(information.get(name), NEGLIGIBLE) for name in ("position", "step")}
    preferred = [name for name, sure in prefers.items() if sure]
    prefers["class"] = _class_matters(information, preferred)
    as_claimed = [prefers["position"], prefers["step"], None if prefers["class"] is None else not prefers["class"]]
    words = {True: "depend on", False: "do not depend on", None: "may or may not depend on"}
    parts = [f"{words[sure]} {name} ({_explains(information.get(name))})" for name, sure in prefers.items()]
    sentence = f"Expert choices {parts[0]}, {parts[1]} and {parts[2]}."
    return Claim(
        "preferences",
        "Experts prefer positions and denoising steps, not classes",
        _all_of(as_claimed),
        sentence,
    )


def _explains(estimate: Estimate | None) -> str:
    """Return in words how much of the router's entropy a variable explains."""
    if estimate is None:
        return "the profile cannot tell"
    return f"explains {100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _all_of(parts: list[bool | None]) -> Verdict:
    """Return the verdict on three parts: position, step, indifference to class. No preference refutes the claim."""
    if all(parts):
        return "holds"
    if parts[0] is False and parts[1] is False:
        return "does not hold"
    if False in parts and True in parts[:2]:
        return "partly"
    return "cannot be told"


def _depth(trend: Trend | None) -> Claim:
    """Judge the second claim."""
    statement = "Specialisation by position fades with depth"
    if trend is None:
        return Claim("depth", statement, "cannot be told", "It takes two blocks and two images to see a change.")
    if trend.early.high < NEGLIGIBLE:
        why = f"The first third of the blocks has no specialisation by position that could fade ({trend.early})."
        return Claim("depth", statement, "does not hold", why)
    what = "Information between expert and position"
    sentence = _change(what, trend, "the first third of the blocks", "the last third")
    return Claim("depth", statement, _fading(trend), sentence)


def _steps(trend: Trend | None, bins: tuple[Estimate, ...]) -> Claim:
    """Judge the third claim."""
    statement = "Specialisation is concentrated at early denoising steps and uniform later"
    if trend is None:
        return Claim("steps", statement, "cannot be told", "It takes two step bins and two images to see a change.")
    if trend.early.high < NEGLIGIBLE:
        why = f"The load is uniform in the first half of the steps already (concentration {trend.early})."
        return Claim("steps", statement, "does not hold", why)
    verdict = _fading(trend)
    if verdict == "holds" and trend.late.high > UNIFORM:
        verdict = "partly"
    if verdict == "cannot be told" and trend.late.low > UNIFORM:
        verdict = "does not hold"  # uniform it surely is not, whatever the ratio
    sentence = _change("Concentration of load", trend, "the first half of the steps", "the second half")
    return Claim("steps", statement, verdict, f"{sentence}{_course(bins)}")


def _course(bins: tuple[Estimate, ...]) -> str:
    """Return in words where the load is most and least concentrated, and whether it gathers again in the last bin."""
    if len(bins) < 3:
        return ""
    most, least = max(bins, key=lambda b: b.value), min(bins, key=lambda b: b.value)
    text = f" It is highest in bin {bins.index(most)} ({most}) and lowest in bin {bins.index(least)} ({least})"
    return f"{text}; in the last bin it is back at {bins[-1]}." if bins[-1].low > least.high else f"{text}."


def _fading(trend: Trend) -> Verdict:
    """Return the verdict on a quantity that should fall by half or more."""
    if trend.early.low <= NEGLIGIBLE:
        return "cannot be told"
    if trend.ratio.high <= HALF:
        return "holds"
    if trend.ratio.high <= BARELY:
        return "partly"
    return "does not hold" if trend.ratio.low >= BARELY else "cannot be told"


def _change(what: str, trend: Trend, early: str, late: str) -> str:
    """Return in words how a quantity changes."""
    ratio = trend.ratio
    way = "falls" if ratio.high < 1 else "rises" if ratio.low > 1 else "goes"
    return (
        f"{what} {way} from {trend.early} in {early} to {trend.late} in {late}: "
        f"{_short(ratio.value)} times as much [{_short(ratio.low)}, {_short(ratio.high)}]."
    )
