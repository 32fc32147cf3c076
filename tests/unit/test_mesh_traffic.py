"""Who belongs to which part of a service, and what of a part's description is refused."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.mesh.traffic import REST, Dealer, Part, read

ROWS = [
    {"address": "1", "labels": {"version": "v1", "app-port": "80"}},
    {"address": "2", "labels": {"version": "v2", "tier": "gold"}},
    {"address": "3", "labels": {}},
    {"address": "4"},
]


def dealt(settings: dict[str, Any]) -> dict[str, list[str]]:
    traffic = read(settings)
    return {name: [each["address"] for each in some["endpoints"]] for name, some in Dealer().of("ledger", settings, traffic)}


def split(*labels: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"protocol": "http", "endpoints": ROWS, "split": [{"labels": each, "weight": 1} for each in labels], **more}


CANARY = {"labels": {"version": "v2"}, "when": {"headers": [["x", "present", ""]], "cookies": []}}


def test_an_instance_belongs_to_every_part_whose_labels_it_carries() -> None:
    assert dealt({"endpoints": ROWS}) == {"": ["1", "2", "3", "4"]}
    assert dealt(split({"version": "v1"}, {"version": "v2"})) == {"version=v1": ["1"], "version=v2": ["2"]}
    assert dealt(split({"version": "v2"}, {"tier": "gold", "version": "v2"})) == {"version=v2": ["2"], "tier=gold,version=v2": ["2"]}
    assert dealt(split({"version": "v3"})) == {"version=v3": []}


def test_without_a_split_the_rest_is_what_no_canary_names() -> None:
    assert dealt({"endpoints": ROWS, "canary": [CANARY]}) == {"version=v2": ["2"], REST: ["1", "3", "4"]}
    assert dealt(split({"version": "v2"}, canary=[CANARY])) == {"version=v2": ["2"]}


def test_parts_get_the_services_settings_without_what_divides_it() -> None:
    settings = split({"version": "v1"}, sticky="client", timeout="2s")
    ((_, some),) = Dealer().of("ledger", settings, read(settings))
    assert some == {"protocol": "http", "timeout": "2s", "endpoints": ROWS[:1]}


@pytest.mark.parametrize(
    "said",
    [
        {"split": [{"labels": {}, "weight": 1}]},
        {"split": [{"labels": {"a": "b"}, "weight": 0}]},
        {"split": [{"labels": {"a": "b"}, "weight": -1}]},
        {"split": [{"labels": {"a": "b"}, "weight": True}]},
        {"split": [{"labels": {"a": "b"}, "weight": 1, "region": "x"}]},
        {"split": [{"weight": 1}]},
        {"canary": [{"labels": {"a": "b"}, "when": {"headers": [], "cookies": []}}]},
        {"canary": [{"labels": {"a": "b"}, "when": {"headers": [["x", "matches", "y"]]}}]},
        {"canary": [{"labels": {"a": "b"}}]},
    ],
)
def test_what_is_not_understood_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        read(said)


def test_names_of_parts_are_bounded_and_differ() -> None:
    long = [Part((("a", "x" * 63), ("b", "y" * 62 + end))) for end in "12"]
    assert len({part.name for part in long}) == 2 and all(len(part.name) <= 96 for part in long)
    assert Part((("version", "v1"),)).version == "v1" and Part((("tier", "gold"),)).version == ""
