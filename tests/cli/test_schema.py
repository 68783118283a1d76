"""Tests the tables of configuration keys: they list the keys of conf/ and the arguments of the classes."""

from collections.abc import Mapping
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from voxquilt.cli.main import conf_dir
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.cli.schema import HINTS, PREDICT, TOP, TRAIN
from voxquilt.cli.sections import Section, check_sections
from voxquilt.cli.suggestions import arguments_of
from voxquilt.errors import ConfigError
from voxquilt.models.weights.stored_settings import to_carry

SECTIONS = [("predict", PREDICT, name) for name in PREDICT] + [("train", TRAIN, name) for name in TRAIN]
# Arguments that the code of a run adds to those of the configuration.
GIVEN = {
    "preprocess",
    "nonfinite",
    "shard",
    "distribute",
    "resume",
    "stitch",
    "more_models",
    "combination",
    "configuration",
    "output_dir",
    "label_values",
}


def composed(script: str) -> dict[str, Any]:
    """The configuration of a script as in conf/, unresolved."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain = OmegaConf.to_container(compose(script), resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def node_of(plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    for key in name.split("."):
        plain = plain[key]
    return dict(plain)


@pytest.mark.parametrize(("script", "sections", "name"), SECTIONS)
def test_the_table_of_a_section_has_the_keys_of_its_file(
    script: str, sections: Mapping[str, Section], name: str
) -> None:
    """No key lacks a check, and no check has lost its key. For models, the keys common to all of them."""
    written = node_of(composed(script), name).keys() - {"_target_"}
    if name == "model":
        written = OmegaConf.load(conf_dir() / "model/_options.yaml").keys()
    assert sections[name].keys.keys() == set(map(str, written))


@pytest.mark.parametrize(("script", "sections", "name"), SECTIONS)
def test_keys_of_a_section_are_the_arguments_of_its_class(
    script: str, sections: Mapping[str, Section], name: str
) -> None:
    """Except those that a run adds."""
    target = node_of(composed(script), name).get("_target_")
    if target is None or name == "model":
        return
    arguments = set(arguments_of(target))
    assert sections[name].keys.keys() - {"augment", "output_dir", "task"} <= arguments
    assert arguments - sections[name].keys.keys() <= GIVEN


def test_every_top_level_key_is_known() -> None:
    """Of both scripts, and the groups that add no key of their own."""
    keys = {key for script in ("predict", "train") for key in composed(script)}
    assert keys | {"experiment", "task"} == TOP
    assert all(key.partition(".")[0] in TOP for key in HINTS)


@pytest.mark.parametrize(("sections", "name", "key"), [
    (sections, name, key)
    for sections in (PREDICT, TRAIN)
    for name, section in sections.items()
    for key in section.keys
    if not section.is_open
])  # fmt: skip
def test_a_misspelt_key_is_answered_with_the_right_one(sections: Mapping[str, Section], name: str, key: str) -> None:
    """One letter too many, for every key of every closed section."""
    plain = {section: {} for section in sections if "." not in section} | {"callbacks": {"writer": {}}}
    plain[name] = dict.fromkeys(sections[name].keys) | {f"{key}x": 1}
    with pytest.raises(ConfigError, match=rf"^there is no key {name}\.{key}x\. Did you mean {name}\.{key}\?$"):
        check_sections(plain, {name: sections[name]}, TOP)


def test_a_required_key_cannot_be_removed() -> None:
    """If no class has a default for it."""
    run = {key: None for key in PREDICT["run"].keys if key != "resume"}
    with pytest.raises(ConfigError, match=r"^run\.resume is needed; the command line took it out with ~run\.resume\.$"):
        check_sections({"run": run}, {"run": PREDICT["run"]}, TOP)


def test_a_user_defined_class_may_have_keys_of_its_own() -> None:
    """They are allowed; keys that it shares with ours are checked."""
    section = {"data": PREDICT["data"]}
    check_sections({"data": {"_target_": "mine.Data", "volumes": 3}}, section, TOP)
    with pytest.raises(ConfigError, match=r"data\.num_workers must be an integer of at least 0; it is -1"):
        check_sections({"data": {"_target_": "mine.Data", "num_workers": -1}}, section, TOP)


def test_a_checkpoint_carries_all_of_model_space_and_of_the_way_back() -> None:
    """Else predicting with it would see other voxels than training did; `device` only says where."""
    plain = composed("train")
    plain["preprocess"] = dict.fromkeys(plain["preprocess"], "chosen")
    plain["stitch"] |= {"order": 3, "per_slice": 2.0}
    carried = to_carry(plain, ["image"])
    assert carried["preprocess"].keys() - {"_target_"} == PREDICT["preprocess"].keys.keys() - {"device"}
    assert {"order", "per_slice", "overlap_mode"} <= carried["stitch"].keys()
