"""Plans that a work folder keeps, since choosing may take longer than carrying out."""

from __future__ import annotations

from ditmoe_cli.compression.plan import CompressionPlan, parse_plan
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.workfolder import WorkFolder

_NAME = "plan"


def kept_plan(work: WorkFolder) -> CompressionPlan | None:
    """Return the plan that an unfinished run has chosen; None where there is none."""
    piece = work.read(_NAME)
    if piece is None:
        return None
    try:
        plan = parse_plan(piece.document, str(piece.path))
    except BadInputError:
        return None
    work.notify(f"going on with the plan that is kept in {work.folder}")
    work.tell(_told)
    return plan


def keep_plan(work: WorkFolder, plan: CompressionPlan, tried: str = "") -> None:
    """Keep a plan that was chosen, in place of all pieces: those of choosing, and those of carrying out another.

    `tried` names the loop in which the plan was carried out already, which stays.
    """
    work.clear(but=tried)
    work.write(_NAME, {}, plan.to_json())
    work.tell(_told)


def _told() -> str:
    return "kept the plan; the same command goes on with carrying it out"
