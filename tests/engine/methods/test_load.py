"""Methods from what a run has written down."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from vitrail.engine.data import DataConfig
from vitrail.engine.methods.load import method_config, read_config
from vitrail.engine.train.demo import shrink

RECIPES = sorted(path.stem for path in Path(__file__).parents[3].glob("recipes/*_*.py") if "__" not in path.stem)


def written(name, *, demo=False):
    """A recipe's configuration, and what its run would write."""
    config = importlib.import_module(f"vitrail.recipes.{name}").recipe()
    config = shrink(config) if demo else config
    return config, json.loads(json.dumps(config.as_dict()))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_read_back(name):
    for demo in (False, True):
        config, plain = written(name, demo=demo)
        method = method_config(plain["method"])
        assert type(method) is type(config.method)
        assert type(method.encoder) is type(config.method.encoder)
        assert method == config.method
        assert read_config(DataConfig, plain["data"], "data") == config.data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "RunConfig"}, r"method is of the class 'RunConfig'; expected one of .*MAEConfig"),
        ({"flying": 3}, r"method has fields that BYOLConfig lacks: flying; it knows .*crop_scale"),
        ({"hidden": 40.5}, r"method.hidden is 40.5; expected int"),
        ({"freeze_patch_embed": 1}, r"method.freeze_patch_embed is 1; expected bool"),
        ({"momentum": True}, r"method.momentum is True; expected float"),
        ({"crop_scale": [0.1]}, r"method.crop_scale is \[0.1\]; expected"),
        ({"crop_scale": [0.1, "x"]}, r"method.crop_scale\[1\] is 'x'; expected float"),
        ({"encoder": "vit"}, r"method.encoder is 'vit'; expected a BackboneConfig, which is a dictionary"),
        (
            {"encoder": {"name": "MAEConfig"}},
            r"method.encoder is of the class 'MAEConfig'; expected one of .*ViTConfig",
        ),
        ({"encoder": {}}, r"method.encoder is of the class 'BackboneConfig'; expected one of .*ViTConfig"),
        ({"encoder": {"name": "ViTConfig", "stem": "x"}}, r"method.encoder.stem is 'x'; expected .*'patch', 'conv'"),
        (
            {"encoder": {"name": "ViTConfig", "image_size": [1]}},
            r"image_size is \[1\]; expected int; or method.encoder.image_size is \[1\]; expected tuple",
        ),
    ],
)
def test_what_no_class_of_this_version_knows_is_refused(change, message):
    _, plain = written("byol_vitb")
    with pytest.raises(ValueError, match=message):
        method_config(plain["method"] | change)


def test_types_that_no_method_has_yet():
    @dataclass
    class Odd:
        name: str
        path: Path | None
        widths: tuple[int, ...]

    plain = {"name": "x", "path": "a/b", "widths": [1, 2, 3]}
    assert read_config(Odd, plain, "odd") == Odd("x", Path("a/b"), (1, 2, 3))
    assert read_config(Odd, plain | {"path": None}, "odd").path is None
