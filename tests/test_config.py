from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, PositiveFloat, PositiveInt

from vqt2i.config import Config, apply_overrides, build_config, load_config, parse_yaml, save_config, to_yaml
from vqt2i.errors import ConfigError
from vqt2i.training.clip import CLIPRunConfig
from vqt2i.training.vqgan import VQGANRunConfig


class Square(Config):
    kind: Literal["square"] = "square"
    side_px: PositiveInt = 4
    tilt: float = 0.0


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius_px: PositiveInt = 3


class Painting(Config):
    n_layers: PositiveInt = 2
    learning_rate: PositiveFloat = 0.1
    shape: Square | Circle = Field(Square(side_px=9, tilt=0.5), discriminator="kind")
    names: tuple[str, ...] = ("a",)


class Gallery(Config):
    painting: Painting = Painting(n_layers=5)
    folder: Path | None = None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known_one(tmp_path: Path) -> None:
    path = write(tmp_path, "painting: {n_layer: 3}")
    with pytest.raises(ConfigError, match=r"config\.yaml: painting\.n_layer: unknown key, did you mean 'n_layers'\?"):
        load_config(Gallery, path)


def test_an_unknown_key_of_a_variant_is_looked_for_among_the_keys_of_all_variants() -> None:
    with pytest.raises(ConfigError, match=r"painting\.shape\.radius: unknown key, did you mean 'radius_px'"):
        load_config(Gallery, None, ["painting.shape.kind=circle", "painting.shape.radius=1"])


def test_an_unknown_key_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known keys: folder, painting"):
        load_config(Gallery, None, ["zzz=1"])


def test_every_wrong_key_gets_a_line() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Gallery, None, ["painting.n_layers=0", "painting.nmaes=[b]"])
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "painting.n_layers: Input should be greater than 0 (found 0)" in lines[0]
    assert "did you mean 'names'?" in lines[1]


def test_a_duplicate_key_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "painting:\n  n_layers: 3\n  n_layers: 4\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: line 3: key 'n_layers' is given twice"):
        load_config(Gallery, path)


def test_overrides_go_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "painting: {n_layers: 3, learning_rate: 2}")
    config = load_config(Gallery, path, ["painting.n_layers=7", "folder=a/b"])
    expected = Gallery(painting=Painting(n_layers=7, learning_rate=2.0), folder=Path("a/b"))
    assert config == expected


def test_overrides_leave_their_argument_as_it_was() -> None:
    values = {"a": {"b": 1}}
    changed = apply_overrides(values, ["a.b=2", "a.c=null", "d.e=[1, 2]"])
    assert changed == {"a": {"b": 2, "c": None}, "d": {"e": [1, 2]}}
    assert values == {"a": {"b": 1}}


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(Gallery, write(tmp_path, "# nothing\n")) == Gallery()


@pytest.mark.parametrize("overrides", [[], ["painting.shape.kind=circle"], ["painting.names=[红, '1e5', 'yes']"]])
def test_saved_and_loaded_is_equal(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(Gallery, None, overrides)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Gallery, tmp_path / "saved.yaml") == config
    assert to_yaml(load_config(Gallery, tmp_path / "saved.yaml")) == to_yaml(config)


def test_a_part_of_a_group_keeps_the_owners_defaults_for_the_rest() -> None:
    assert load_config(Gallery, None, ["painting.learning_rate=3"]).painting.n_layers == 5
    config = load_config(CLIPRunConfig, None, ["trainer.max_steps=500", "trainer.validate_every_steps=250"])
    assert config.trainer.batch_size == CLIPRunConfig().trainer.batch_size == 256


def test_a_group_of_another_kind_starts_afresh() -> None:
    config = load_config(Gallery, None, ["painting.shape={kind: circle}"])
    assert config.painting.shape == Circle()
    assert load_config(Gallery, None, ["painting.shape.kind=square"]).painting.shape == Square(side_px=9, tilt=0.5)
    assert load_config(Gallery, None, ["painting.shape.side_px=2"]).painting.shape == Square(side_px=2, tilt=0.5)


def test_an_absent_group_can_be_given_and_a_present_one_taken_away() -> None:
    config = load_config(VQGANRunConfig, None, ["training.loss.adversarial={}"])
    assert config.training.loss.adversarial is not None
    assert config.training.optimizer == VQGANRunConfig().training.optimizer
    assert load_config(VQGANRunConfig, None, ["training.loss.adversarial=null"]) == VQGANRunConfig()


def test_scientific_notation_without_a_point_is_a_number() -> None:
    assert load_config(Gallery, None, ["painting.learning_rate=1e-4"]).painting.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1, 2", "line 1"),
        ("\t- b", "line 1"),
        ("- a\n- b", "expected 'key: value' lines, found a list"),
        ("just words", "found a str"),
        ("? [a, b]\n: 1", "line 1"),
        ("1: 2", "Keys should be strings"),
        ("folder: 2024-99-99", "month"),
        ("folder: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("folder: \x07", "not valid YAML"),
        ("painting: 3", "painting"),
        ("painting: {shape: {kind: star}}", "painting.shape"),
        ("painting: {learning_rate: .nan}", "learning_rate"),
        ("painting: {names: [[a]]}", "painting.names.0"),
    ],
)
def test_whatever_is_wrong_is_a_config_error_that_names_it(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml") as error:
        load_config(Gallery, write(tmp_path, text))
    assert told in str(error.value)


def test_a_missing_file_a_folder_and_binary_data_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, told in (("none.yaml", "no such file"), ("", "cannot be read"), ("binary.yaml", "UTF-8")):
        with pytest.raises(ConfigError, match=told):
            load_config(Gallery, tmp_path / name)


@pytest.mark.parametrize("override", ["n_layers", "=3", " =3", "painting.n_layers.deep=1", "folder=[", "folder=[a]"])
def test_an_override_that_is_none_is_a_config_error(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(Gallery, None, ["painting.n_layers=2", override])


def test_a_missing_required_value_is_named() -> None:
    class Needs(Config):
        inner: Square
        other: int

    with pytest.raises(ConfigError, match="f: other: missing"):
        build_config(Needs, {"inner": {}}, "f")


def test_configurations_cannot_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Square().side_px = 3


def test_parsing_names_its_source() -> None:
    with pytest.raises(ConfigError, match=r"^here: "):
        parse_yaml("a: b: c", "here")
