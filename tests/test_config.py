"""Settings: text becomes typed values, wrong ones are named, and nothing is lost on the way through JSON."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cover.config import Config, DataConfig, flatten, from_dict, replace, to_dict
from cover.presets import PRESETS, preset_config


def setting(name, value, **others):
    return flatten(replace(Config(), **others, **{name: value}))[name]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("lr", "1", 1.0),
        ("steps", "2e5", 200_000),
        ("steps", "12", 12),
        ("crop", "96,96,96", (96, 96, 96)),
        ("crop", "(96, 96, 96)", (96, 96, 96)),
        ("crop", "[96,64]", (96, 64)),
        ("window", "5", 5),
        ("window", "3,5", (3, 5)),
        ("heads", "1", (1,)),
        ("percentiles", "1,99", (1.0, 99.0)),
        ("tensorboard", "true", True),
        ("tensorboard", "False", False),
        ("fit_to_reach", "none", None),
        ("cache", "None", None),
        ("cache", "/some/where", "/some/where"),
        ("cache", "3", "3"),
        ("volumes", "all", "all"),
        ("volumes", "1", 1),
        ("views", "none", "none"),
    ],
)
def test_text_becomes_a_typed_value(name, text, value):
    result = setting(name, text)
    assert result == value
    assert type(result) is type(value)


def test_values_of_other_sequence_and_number_types_are_taken():
    assert setting("crop", [32, 48]) == (32, 48)
    assert setting("lr", 1) == 1.0
    assert isinstance(setting("lr", 1), float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "fast"),
        ("lr", "nan"),
        ("lr", "inf"),
        ("lr", "-1"),
        ("lr", True),
        ("steps", "1.5"),
        ("steps", "0"),
        ("steps", None),
        ("tensorboard", "1"),
        ("crop", "96"),
        ("crop", "96,a"),
        ("crop", ""),
        ("crop", "8,0"),
        ("percentiles", "1,2,3"),
        ("percentiles", "99,1"),
        ("optimiser", "lion"),
        ("normalise", "minmax"),
        ("views", "c"),
        ("window", "4"),
        ("window", "3,3,3"),  # the crop is 2D
        ("heads", "4,4,4,4,4,4"),  # five levels
        ("heads", "4,0"),
        ("channels", "()"),
        ("volumes", "-1"),
        ("volumes", "some"),
        ("spacing", "1,1"),
        ("slice_axis", "3"),
        ("fit_to_reach", "1.5"),
        ("scale", "1"),
        ("val_fraction", "1"),
        ("keep", "0"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"config: `{name}` must .*, got"):
        setting(name, value)


def test_an_unknown_setting_is_refused_with_a_guess():
    with pytest.raises(ValueError, match=r"no setting 'lrr'; did you mean 'lr'\?"):
        replace(Config(), lrr=1)
    with pytest.raises(ValueError, match="no section 'modle'"):
        from_dict({"modle": {}})


def test_a_section_made_directly_is_checked_too():
    with pytest.raises(ValueError, match="`resize`"):
        DataConfig(crop=(8, 8, 8), resize=(16, 16))


def test_settings_that_need_each_other_may_come_in_any_order():
    assert setting("window", "3,3,5", crop="8,8,8") == (3, 3, 5)
    assert setting("crop", "8,8,8", window="3,3,5") == (8, 8, 8)


@given(
    lr=st.floats(1e-9, 10),
    crop=st.lists(st.integers(1, 512), min_size=2, max_size=3).map(tuple),
    heads=st.lists(st.integers(1, 8), min_size=1, max_size=5).map(tuple),
    fit=st.none() | st.floats(0.01, 0.99),
    volumes=st.sampled_from(["all", "channels"]) | st.integers(0, 9),
    cache=st.none() | st.text(min_size=1).filter(lambda s: s.strip().lower() not in ("none", "null")),
)
def test_json_and_the_command_line_lose_nothing(lr, crop, heads, fit, volumes, cache):
    wanted = dict(lr=lr, crop=crop, heads=heads, fit_to_reach=fit, volumes=volumes, cache=cache)
    config = replace(Config(), **wanted)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert replace(Config(), **{name: str(value) for name, value in wanted.items()}) == config
    assert replace(Config(), **flatten(config)) == config


def test_a_setting_that_an_older_run_lacks_takes_its_default():
    sections = to_dict(replace(Config(), lr=0.5))
    del sections["train"]["warmup"]
    assert from_dict(sections) == replace(Config(), lr=0.5)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    config = preset_config(name)
    assert len(config.data.crop) == {"2d": 2, "3d": 3}.get(name[-2:], 2)


def test_the_paper_presets_are_the_papers():
    for name in ("paper-2d", "paper-3d"):
        settings = flatten(preset_config(name))
        wanted = dict(window=7, heads=(4, 4, 4, 1, 1), optimiser="sgd", lr=1e-4, steps=200_000, nonrigid=0.0)
        assert {key: settings[key] for key in wanted} == wanted


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"no preset 'papr-2d' \(there are .*small-3d.*did you mean 'paper-2d'"):
        preset_config("papr-2d")


def test_the_documentation_names_every_setting_and_preset():
    text = (Path(__file__).parent.parent / "docs" / "pretraining.md").read_text(encoding="utf-8")
    missing = [name for name in (*flatten(Config()), *PRESETS) if f"`{name}`" not in text]
    assert not missing


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.lr = 1
