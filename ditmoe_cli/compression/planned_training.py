"""What a plan's stage of training asks for. Torch-free."""

from __future__ import annotations

from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.compression.plan import CompressionPlan


def planned_training(plan: CompressionPlan) -> Healing | Distilling:
    """Return the request of a plan that trains: to heal, or to distil with the guidance of its calibration."""
    stage = plan.retraining
    assert stage is not None
    if stage.student_steps is None:
        return Healing(plan.source, stage.minutes, stage.steps, seed=stage.seed)
    return Distilling(
        plan.source,
        stage.minutes,
        stage.steps,
        seed=stage.seed,
        steps=stage.student_steps,
        cfg=float((plan.calibration or {}).get("cfg", 1.0)),
    )
