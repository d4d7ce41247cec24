"""Which adapters a stage uses."""

import pytest

from loadtest.adapters import CatalogError, choose_model, order_adapters, parse_catalog
from loadtest.run import plan_stages

LISTED = {
    "data": [
        {"id": "m", "parent": None},
        {"id": "m/random-1", "parent": "m"},
        {"id": "m/viggo", "parent": "m"},
        {"id": "m/boolq", "parent": "m"},
        {"id": "other"},
        {"id": "other/x", "parent": "other"},
    ]
}
OFFERED = ("m/random-1", "m/viggo", "m/boolq")


def test_adapters_are_the_entries_with_a_parent() -> None:
    catalog = parse_catalog(LISTED)
    assert catalog.bases == ("m", "other")
    assert catalog.adapters == {"m": OFFERED, "other": ("other/x",)}


def test_real_tasks_come_before_random_weights() -> None:
    assert order_adapters(OFFERED) == ["m/boolq", "m/viggo", "m/random-1"]


def test_patterns_match_whole_names_or_tasks() -> None:
    assert order_adapters(OFFERED, ["v*"]) == ["m/viggo"]
    assert order_adapters(OFFERED, ["m/b*", "random*"]) == ["m/boolq", "m/random-1"]


def test_file_fixes_names_and_order() -> None:
    assert order_adapters(OFFERED, listed=["viggo", "m/random-1"]) == ["m/viggo", "m/random-1"]
    with pytest.raises(CatalogError, match="'covid'"):
        order_adapters(OFFERED, listed=["covid"])


def test_only_model_need_not_be_named() -> None:
    only = parse_catalog({"data": [{"id": "m"}, {"id": "m/a", "parent": "m"}]})
    assert choose_model(only, None) == "m"
    with pytest.raises(CatalogError, match="m, other"):
        choose_model(parse_catalog(LISTED), None)
    assert choose_model(parse_catalog({"data": []}), "gpt-4o") == "gpt-4o"


@pytest.mark.parametrize("body", [None, [], {"data": {}}, {"object": "list"}, "text"])
def test_anything_but_a_list_of_models_is_refused(body: object) -> None:
    with pytest.raises(CatalogError):
        parse_catalog(body)


def test_stages_are_every_choice_with_every_user_count() -> None:
    stages = plan_stages("m", "base,1,all", "1,5", order_adapters(OFFERED))
    assert [(s.mode, s.users, len(s.models)) for s in stages] == [
        ("base", 1, 1),
        ("base", 5, 1),
        ("1 adapter", 1, 1),
        ("1 adapter", 5, 1),
        ("3 adapters", 1, 3),
        ("3 adapters", 5, 3),
    ]
    assert stages[0].models == ("m",)
    assert stages[2].models == ("m/boolq",)


@pytest.mark.parametrize(
    ("stages", "users", "says"),
    [
        ("4", "1", "only 3"),
        ("some", "1", "'some'"),
        ("0", "1", "'0'"),
        ("-1", "1", "'-1'"),
        ("base", "0", "'0'"),
        ("base", "1.5", "'1.5'"),
        ("", "1", "--stages"),
        ("base", ",", "--users"),
        ("base,base", "1", "once"),
        ("3,all", "1", "once"),
    ],
)
def test_impossible_plans_are_refused_by_name(stages: str, users: str, says: str) -> None:
    with pytest.raises(CatalogError, match=says):
        plan_stages("m", stages, users, order_adapters(OFFERED))
