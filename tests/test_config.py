"""Configurations survive JSON, and a bad one gives a message that names its fault."""

import pytest

from gear.config import UserError, config_hash, differences, from_dict, to_dict
from gear.experiments.recipes import RECIPES
from gear.training.settings import Config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    assert from_dict(Config, to_dict(RECIPES[name])) == RECIPES[name]


def test_missing_field_takes_its_default_and_unknown_one_is_an_error():
    values = to_dict(RECIPES["tiny"])
    del values["objective"]["tau"]
    assert from_dict(Config, values).objective.tau == 0.1
    values["objective"]["tua"] = 0.2
    with pytest.raises(UserError, match=r"objective\.tua.*Did you mean 'tau'"):
        from_dict(Config, values)


def test_differences_name_nested_fields():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


def test_hash_depends_on_content_not_order():
    assert (
        config_hash({"a": 1, "b": 2})
        == config_hash({"b": 2, "a": 1})
        != config_hash({"a": 1, "b": 3})
    )
