"""Describe the mistakes in a configuration, one sentence for each.

Converts pydantic's errors to lines with the key, the invalid value and what to do.
"""

import inspect
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic

from utils.core.functions import form, nearest, short_names
from utils.core.plugins import PACKAGE


def to_int(value: Any) -> Any:
    """Convert a whole float to int: `1e6` steps is a float in YAML."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def to_float(value: Any) -> Any:
    """Convert text to float if possible: `1e-3` is text in YAML 1.1, which requires `1.0e-3`."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


# Names of keys in other frameworks that do not resemble ours.
_SYNONYMS = {
    "learning_rate": "lr",
    "min_lr": "lr_min_ratio",
    "warmup": "lr_warmup_steps",
    "warmup_steps": "lr_warmup_steps",
    "batch_size": "global_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
    "gradient_clipping": "grad_clip_norm",
    "clip_grad": "grad_clip_norm",
    "steps": "max_steps",
    "name": "run_name",
    "output_dir": "checkpoint_path",
    "save_interval": "checkpoint_interval",
    "wandb_project": "project_name",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "dropout": "weight_decay",
}

_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def did_you_mean(path: str, siblings: Iterable[str], everywhere: Iterable[str]) -> str:
    """Return advice for the unknown key `path`, as `a.b.c`.

    siblings: valid full keys of the same level. everywhere: all valid full keys. The same name at
    another level is preferred (`arch.hidden_size` for `hidden_size`), then the most similar key of
    this level, then of any level.
    """
    word = path.rpartition(".")[2]
    siblings, everywhere = list(siblings), list(everywhere)
    by_last = {key.rpartition(".")[2]: key for key in [*everywhere, *siblings]}
    found = by_last.get(word) or by_last.get(_SYNONYMS.get(word, ""))
    for keys in (siblings, everywhere):
        if found is None:
            last = {key.rpartition(".")[2]: key for key in keys}
            best = nearest(word, list(last))
            found = last[best] if best else None
    if found is not None and found != path:
        return f"did you mean '{found}'?"
    if len(siblings) <= 12:
        return "valid here: " + (", ".join(siblings) or "nothing")
    return "--help lists every key"


def expected(annotation: Any) -> str:
    """Describe the values of a type, for messages: `a whole number or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expected(arguments[0])
    if origin in (Union, types.UnionType):
        ordered = sorted(arguments, key=lambda a: a is type(None))
        return " or ".join(expected(a) for a in ordered)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is list:
        return "a list of " + expected(arguments[0]).replace("one of ", "")
    if origin is dict:
        return "pairs {name: " + expected(arguments[1]) + "}"
    plain = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        Any: "a value",
    }
    if annotation in plain:
        return plain[annotation]
    if getattr(annotation, "BARE", False):
        names = ", ".join(short_names(annotation.PREFIX))
        return (f"one of {names} or " if names else "") + form(annotation.KIND)
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return "pairs {" + ", ".join(annotation.model_fields) + "}"
    return getattr(annotation, "__name__", str(annotation))


def branches(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, without Annotated and unions."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return branches(arguments[0])
    if origin in (Union, types.UnionType):
        return [branch for a in arguments for branch in branches(a)]
    return [annotation]


def _locate(model: type[pydantic.BaseModel], loc: tuple) -> tuple[tuple, Any, type | None]:
    """Return the keys in an error's location, the type there, and the model that declares it.

    The rest of the location is the branch of a union, which is meaningless to a user.
    """
    annotation: Any = model
    owner: type | None = model
    for depth, part in enumerate(loc):
        step = None
        for branch in branches(annotation):
            origin = get_origin(branch)
            if isinstance(branch, type) and issubclass(branch, pydantic.BaseModel):
                owner = branch
                field = branch.model_fields.get(part) if isinstance(part, str) else None
                step = (field.annotation if field else None,)
            elif (origin is list and isinstance(part, int)) or (origin is dict):
                step = (get_args(branch)[-1],)
        if step is None:
            return loc[:depth], annotation, owner
        annotation = step[0]
    return loc, annotation, owner


def _path(prefix: str, loc: tuple) -> str:
    text = prefix
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _wrong_type(path: str, annotation: Any, value: Any) -> str:
    sentence = f"{path}: expected {expected(annotation)}, got {show(value)}"
    kinds = branches(annotation)
    elements = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
    if isinstance(value, str) and elements:
        choices = [c for e in elements if get_origin(e) is Literal for c in get_args(e)]
        if choices and value not in choices:
            meant = nearest(value, choices)
            return f"{sentence}; did you mean {path}=[{meant}]?" if meant else sentence
        return f"{sentence}; write {path}=[{value}]"
    for kind in kinds:
        if get_origin(kind) is Literal:
            choices = [str(choice) for choice in get_args(kind)]
            meant = "cuda" if value == "gpu" and "cuda" in choices else None
            best = meant or nearest(str(value), choices)
            if best is not None and best != value:
                return f"{sentence}; did you mean '{best}'?"
    return sentence


def show(value: Any) -> str:
    """Return a value as a user would write it in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def problems_of(
    error: pydantic.ValidationError,
    model: type[pydantic.BaseModel],
    prefix: str = "",
    everywhere: Iterable[str] = (),
) -> list[str]:
    """Return a line for each mistake that `error` reports in a value of `model`.

    prefix: full key of that value. everywhere: all valid full keys, for unknown ones.
    """
    everywhere = list(everywhere)
    lines: dict[tuple, str] = {}  # by location: a union reports each of its branches
    for item in error.errors(include_url=False):
        loc, annotation, owner = _locate(model, item["loc"])
        if loc not in lines:
            lines[loc] = _line(item, _path(prefix, loc), annotation, owner, everywhere)
    return list(lines.values())


def _line(item: Any, path: str, annotation: Any, owner: type | None, everywhere: list[str]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        above = path.rpartition(".")[0]
        fields = getattr(owner, "model_fields", {})
        siblings = [f"{above}.{name}" if above else name for name in fields]
        advice = did_you_mean(path, siblings, everywhere)
        own = [f"{above}.{name}" for name in _own_options(owner)]
        if owner and own and advice.startswith("--help"):
            advice = f"{owner.__name__} adds {', '.join(own)}; {advice}"
        return f"unknown key '{path}': {advice}"
    if kind == "missing":
        hint = f"give {expected(annotation)}, {path}=..."
        if path == "arch":
            hint = "choose a preset, e.g. arch=athena_trm_small"
        return f"{path} is missing: {hint}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{path} must be {words} {item['ctx'][bound]}, got {show(value)}"
    if kind in ("value_error", "assertion_error"):
        message = item["msg"].split(", ", 1)[-1]
        above, _, name = path.rpartition(".")
        where = above if message.startswith(name) else path  # do not name the key twice
        return f"{where}: {message}" if where else message
    if kind == "finite_number":
        return f"{path} must be a finite number, got {show(value)}"
    return _wrong_type(path, annotation, value)


def _own_options(owner: type | None) -> list[str]:
    """Return the options that classes of plug-ins declare, of a model that may be one of them."""
    classes = [cls for cls in getattr(owner, "__mro__", ()) if cls.__module__.startswith(PACKAGE)]
    names = [name for cls in reversed(classes) for name in cls.__annotations__]
    return [name for name in names if name in getattr(owner, "model_fields", {})]


def coerced(model: type[pydantic.BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with numbers converted to the types of their fields: `1e3` steps, `"1e-3"`.

    Strict checks accept no other conversion, here and in the training config.
    """
    result = dict(data)
    for name, value in data.items():
        field = model.model_fields.get(name)
        kinds = branches(field.annotation) if field else []
        if float in kinds and str not in kinds:
            result[name] = to_float(value)
        elif int in kinds:
            result[name] = to_int(value)
    return result


def clashes_within(
    model: type[pydantic.BaseModel], data: Mapping[str, Any], faulty: set[str]
) -> list[str]:
    """Return the errors of all model validators on `data`, except those that name a faulty field.

    pydantic runs them only if every field is valid, and stops at the first error.
    """
    values = {k: v for k, v in data.items() if k in model.model_fields and k not in faulty}
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    if not required <= values.keys():
        return []
    instance = model.model_construct(**values)
    lines = []
    for decorator in model.__pydantic_decorators__.model_validators.values():
        if decorator.info.mode != "after" or len(inspect.signature(decorator.func).parameters) > 1:
            continue
        try:
            decorator.func(instance)
        except ValueError as error:
            lines.append(str(error))
    return [line for line in lines if not any(re.search(rf"\b{k}\b", line) for k in faulty)]
