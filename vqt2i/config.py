"""Typed configuration: frozen pydantic models, plain YAML, dotted overrides."""

import difflib
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vqt2i.errors import ConfigError
from vqt2i.files import write_atomic


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, values cannot change after construction."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ConfigT = TypeVar("ConfigT", bound=Config)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys: PyYAML lets the last one win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key must be a single value, found {key}")
            if key in seen:
                raise ConfigError(f"line {line}: key '{key}' is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text.

    Raises:
        ConfigError: a syntax error or a duplicate key; `name` says where.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}:{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    except ValueError as error:  # a date such as 2024-99-99
        raise ConfigError(f"{name}: holds a value that is none: {error}") from None


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping (an empty file is an empty mapping)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return `values` with `a.b=value` overrides applied; values are parsed as YAML.

    Raises:
        ConfigError: an override without '=', or one that goes through something that is no mapping.
    """
    result = _copy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override}: expected KEY=VALUE, for example trainer.max_steps=100")
        *parents, last = key.strip().split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override}: '{parent}' is a single value here, not a group")
            node = child
        node[last] = parse_yaml(text, f"--set {override}")
    return result


def _default_values(cls: type[Config]) -> dict[str, Any]:
    defaults = {name: field.get_default() for name, field in cls.model_fields.items()}
    return {name: value.model_dump(mode="json") for name, value in defaults.items() if isinstance(value, Config)}


def _merge(defaults: Any, values: Any) -> Any:
    if not isinstance(defaults, dict) or not isinstance(values, dict):
        return values
    if "kind" in values and values["kind"] != defaults.get("kind"):
        return values
    return defaults | {key: _merge(defaults.get(key), value) for key, value in values.items()}


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def build_config(cls: type[ConfigT], values: dict[str, Any], name: str) -> ConfigT:
    """Validate `values` into `cls`; `name` (a file, say) starts the error message.

    Raises:
        ConfigError: one line for each key that does not fit, with the nearest known key.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{name}: {_explain(cls, values, item)}" for item in error.errors())) from None


def load_config(cls: type[ConfigT], path: Path | None, overrides: list[str] = ()) -> ConfigT:
    """Load `cls` from a YAML file (or its defaults, for None) with `a.b=value` overrides.

    What a group leaves out keeps the default that `cls` gives it, not that of the group's own class: a stage may want
    another batch size than the general one. A group of another `kind` than the default starts afresh.
    """
    values = read_yaml_mapping(path) if path else {}
    values = _merge(_default_values(cls), apply_overrides(values, list(overrides)))
    return build_config(cls, values, str(path or "configuration"))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: Path) -> None:
    """Write `to_yaml(config)` atomically."""
    write_atomic(path, to_yaml(config))


def _explain(cls: type[Config], values: dict[str, Any], item: dict[str, Any]) -> str:
    location, node = [], values
    for part in item["loc"]:
        if isinstance(node, dict) and part in node:
            location.append(part)
            node = node[part]
        elif isinstance(part, int) and isinstance(node, list):
            location.append(part)
            node = node[part]
        # else: the tag of a chosen union variant, which pydantic adds and the user never wrote
    dotted = ".".join(str(part) for part in location) or "(top level)"
    if item["type"] == "extra_forbidden":
        known = _known_keys(cls, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"{dotted}: unknown key, {hint}"
    if item["type"] == "missing":
        return f"{'.'.join(str(part) for part in item['loc'])}: missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}" + ("" if isinstance(item["input"], dict) else f" (found {item['input']!r})")


def _config_classes(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if get_origin(annotation) is not None or isinstance(annotation, Union):
        return [cls for argument in get_args(annotation) for cls in _config_classes(argument)]
    return []


def _known_keys(cls: type[Config], path: tuple) -> list[str]:
    classes = [cls]
    for part in path:
        fields = [owner.model_fields[part] for owner in classes if part in owner.model_fields]
        found = [c for field in fields for c in _config_classes(field.annotation)]
        # a union's tag names no field but the variant
        tagged = [c for c in classes if "kind" in c.model_fields and c.model_fields["kind"].default == part]
        classes = found or tagged or classes
    return [key for owner in classes for key in owner.model_fields]
