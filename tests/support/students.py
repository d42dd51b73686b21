"""Students of every kind, and pairs that cannot be: what the tests of all commands that train share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import contents, here
from torch import Tensor

from ditmoe_cli.model.dit import DiTMoE

PROFILING = "profile-experts --images 10 --steps 2 --bins 2"
STUDENTS = {
    "slice": "prune --keep 2 --router slice --no-refit",
    "ghost": "prune --keep 2 --no-refit",
    "mass": "prune --keep 2 --router mass --no-refit",
    "constants": "prune --keep 2 --constants --residual-rank 2 --refit-tokens 64",
    "narrow": "prune --neurons 0.5 --multiple 4 --allocate global --refit-tokens 64",
    "merge": "merge --groups 2 --no-refit",
}
"""Commands that make a student of a profiled original in a pipe."""

LAYOUTS = {
    "timm rf": ({"attention": "timm", "sampler": "rf"}, "1"),
    "flash ddpm": ({"attention": "flash", "sampler": "ddpm", "in_channels": 4}, "1.5"),
    "flash rf": ({"attention": "flash", "sampler": "rf"}, "1.5"),
    "timm ddpm": ({"attention": "timm", "sampler": "ddpm", "in_channels": 4}, "1"),
}
"""Shapes of originals, and the guidance that each is profiled with."""

UNLIKE: list[tuple[dict[str, Any], str]] = [
    ({"hidden": 64}, "width is 64"),
    ({"depth": 3, "widths": ((16,) * 3,) * 3}, "number of blocks is 3"),
    ({"heads": 4}, "number of attention heads is 4"),
    ({"attention": "flash"}, "kind of attention is flash"),
    ({"top_k": 1}, "number of experts a token is 1"),
    ({"num_classes": 4}, "number of classes is 4"),
    ({"null_class": False}, "number of label rows is 3"),
    ({"sampler": "ddpm"}, "family is ddpm"),
    ({"input_size": 8}, "size of inputs is 8"),
    ({"patch": 4}, "patch size is 4"),
    ({"in_channels": 3}, "number of channels is 3"),
    ({"learn_sigma": False}, "number of output channels is 1"),
]
"""Shapes that cannot correspond to `healing.SMALL`, and what is said of each."""

LONG_ENOUGH = ("--minutes", 1)
OUT_OF_RANGE: list[tuple[tuple[object, ...], str]] = [
    (("--minutes", 0), "--minutes 0: give a time above 0"),
    (("--minutes", -1), "--minutes -1"),
    (("--minutes", "nan"), "--minutes nan"),
    (("--minutes", "inf"), "--minutes inf"),
    ((*LONG_ENOUGH, "--train", "routers"), "--train routers: choose from all, router"),
    ((*LONG_ENOUGH, "--train", ""), "--train"),
    ((*LONG_ENOUGH, "--train", "all,x"), "--train x"),
    ((*LONG_ENOUGH, "--train", "lora:0"), "--train lora:0: give a rank of 1 or more"),
    ((*LONG_ENOUGH, "--train", "lora:99"), "--train lora:99: the width of"),
    ((*LONG_ENOUGH, "--codes", "learn"), "--codes learn has no effect"),
    ((*LONG_ENOUGH, "--codes", "moving"), "--codes moving"),
    ((*LONG_ENOUGH, "--rate", 0), "--rate 0"),
    ((*LONG_ENOUGH, "--rate", 1), "--rate 1"),
    ((*LONG_ENOUGH, "--rate", "nan"), "--rate nan"),
    ((*LONG_ENOUGH, "--batch", 0), "--batch 0"),
    ((*LONG_ENOUGH, "--batch", 10**30), "give 1 to 1,048,576 states"),
    ((*LONG_ENOUGH, "--seed", 2**64), "64 bits"),
    ((*LONG_ENOUGH, "--device", "abacus"), "abacus"),
    ((*LONG_ENOUGH, "--dtype", "fp8"), "fp8"),
    ((*LONG_ENOUGH, "-o", "x.pt"), "x.pt"),
]
"""Settings of any training that are refused, and what is said of each."""


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let memory run out where a model is asked about more than that many states at once."""
    patches = DiTMoE.patches

    def limited(self: DiTMoE, x: Tensor) -> Tensor:
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return patches(self, x)

    monkeypatch.setattr(DiTMoE, "patches", limited)


def refused(folder: Path, code: int, *words: object, stdin: str | None = None) -> str:
    """The one error of a command that changes nothing in its folder and leaves no work folder."""
    before = sorted(folder.iterdir()), contents(folder)
    message = here(*words, cwd=folder, stdin=stdin).error(code)
    assert (sorted(folder.iterdir()), contents(folder)) == before
    return message
