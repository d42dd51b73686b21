"""Requests to heal: names, options and digests of what is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from ditmoe_cli.api.training_requests import parse_groups
from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.compression.planner import request_digest
from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.compression.training.training_request import DEFAULT_BATCH

OTHERS: dict[str, dict[str, Any]] = {
    "heal-10min": {},
    "heal-2.5min": {"minutes": 2.5},
    "heal-2000steps": {"minutes": None, "iterations": 2000},
    "heal-10min-block": {"scope": "block"},
    "heal-10min-router+norms": {"train": ("router", "norms")},
    "heal-10min-lora8": {"train": ("lora:8",)},
    "heal-10min-codes": {"codes": "learn"},
    "heal-10min-batch64": {"batch": 64},
    "heal-10min-rate0.002": {"rate": 0.002},
    "heal-10min-seed3": {"seed": 3},
    "heal-7steps-model-down-codes-batch4-rate0.5-seed1": {
        "minutes": None,
        "iterations": 7,
        "scope": "model",
        "train": ("down",),
        "codes": "learn",
        "batch": 4,
        "rate": 0.5,
        "seed": 1,
    },
}

NAMES = {"iterations": "steps"}


@pytest.mark.parametrize("name", OTHERS)
def test_the_name_says_what_is_not_usual(name: str) -> None:
    assert Healing("f", **OTHERS[name]).label == name


def test_each_setting_changes_the_request_and_is_an_option_of_the_history() -> None:
    asked = [Healing("f", **fields) for fields in OTHERS.values()]
    digests = {request_digest(each, "source", {"cfg": 1.0}) for each in (*asked, Healing("g"))}
    assert len(digests) == len(asked) + 1
    for each, fields in zip(asked, OTHERS.values(), strict=True):
        train = {"train": ",".join(fields["train"])} if "train" in fields else {}
        given = {
            NAMES.get(name, name): value for name, value in fields.items() if name != "train" and value is not None
        }
        assert each.options() == {"original": "f", **given, **train}


def test_the_default_settings_are_told_of_by_nothing() -> None:
    assert Healing("f", batch=DEFAULT_BATCH, train=GROUPS).options() == {"original": "f"}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("all", GROUPS),
        ("router,all", GROUPS),
        ("down, router,down", ("router", "down")),
        ("lora:8", ("lora:8",)),
        ("router,x,y", ("router", "x", "y")),
        ("", ("",)),
    ],
)
def test_lists_of_groups(text: str, groups: tuple[str, ...]) -> None:
    assert parse_groups(text) == groups
