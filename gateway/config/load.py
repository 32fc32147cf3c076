"""Read a configuration file and return it, or every problem that it has.

Strategy: parse with places, validate with pydantic, translate each of its errors into a sentence about this file (its
own texts speak of Python), check names on the raw data even when the schema failed, and what remains semantic on the
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from gateway.config.base import Model, _key
from gateway.config.check import findings
from gateway.config.discovery import MAX_ENDPOINTS, file_time
from gateway.config.kinds import GATEWAY, kind_of, refuse_other
from gateway.config.mesh_parts import add_parts
from gateway.config.names import check_names
from gateway.config.schema import Config, Endpoint, Listener, Route, Target, Upstream, check_targets
from gateway.config.source import Document, Resolved, hide_login
from gateway.config.values import fault
from gateway.errors import ConfigError, Problem

Loc = tuple[str | int, ...]

_ALIKE = 0.75  # above it a likeness is a slip of the finger
_CALLED = (("http2", "h2", "h2c", "http/2", "http/2.0"), ("http1", "http/1.1", "http", "http1.1", "h1"))
_ELSEWHERE = "docs/configuration.md says what may stand here"
_SHAPES = {
    "dict_type": ("a mapping", "write `key: value` lines below it, or {key: value}"),
    "model_type": ("a mapping", "write `key: value` lines below it, or {key: value}"),
    "model_attributes_type": ("a mapping", "write `key: value` lines below it, or {key: value}"),
    "tuple_type": ("a list", "write [item, item], or a line `- item` for each"),
    "list_type": ("a list", "write [item, item], or a line `- item` for each"),
    "string_type": ("text", 'quote it if it looks like a number: "5"'),
}


def load(path: str | Path) -> Config:
    """Return the configuration in the file at `path`.

    Raises ConfigError with every problem, sorted by place, when there is an error among them. Reads the files that the
    configuration names (secrets, key files) and imports its Python policies; binds and fetches nothing.
    """
    document = Document(path)
    document.read()
    if document.data is None:
        raise ConfigError(document.problems or [Problem(document.name, 1, 1, "empty: there is no configuration in it")])
    refuse_other(document, "gateway")
    context: dict[str, Any] = {"base": document.base, "models": {}, "documents": []}
    config: Config | None = None
    try:
        config = Config.model_validate(document.data, context=context)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            _translate(document, details, context["models"])
    others: list[Document] = context["documents"]
    problems = [*document.problems, *(problem for other in others for problem in other.problems)]
    for other in others:
        document.files |= {f"file:{other.path}": other._content, **other.files}
    if config is None:
        document.problems.clear()
        check_names(document)
        raise ConfigError(_sorted([*problems, *document.problems]))
    document.problems.clear()
    config._document = document
    problems += add_parts(config)
    problems += _endpoint_files(config) + findings(config)
    if any(problem.severity == "error" for problem in problems):
        raise ConfigError(_sorted(problems))
    config._digest = document.digest()
    return config


def endpoints_of(document: Document, *, empty: bool = False) -> tuple[Endpoint, ...]:
    """Return the endpoints in a file that was read: a list as `targets` is; an `empty` one only where that is meant.

    Raises ConfigError.
    """
    if document.problems:
        raise ConfigError(_sorted(document.problems))
    context: dict[str, Any] = {"base": document.base, "models": {}, "documents": []}
    try:
        endpoints: tuple[Endpoint, ...] = (_MAYBE_NONE if empty else _ENDPOINTS).validate_python(document.data, context=context)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            _translate(document, details, context["models"])
        raise ConfigError(_sorted(document.problems)) from None
    return endpoints


def _distinct(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    check_targets(endpoints)
    if len(endpoints) > MAX_ENDPOINTS:
        raise fault(f"more than {MAX_ENDPOINTS} endpoints", "an upstream of this size is several", at=(MAX_ENDPOINTS,))
    return endpoints


_ENDPOINTS: TypeAdapter[tuple[Endpoint, ...]] = TypeAdapter(
    Annotated[tuple[Target, ...], Field(min_length=1), AfterValidator(_distinct)]
)


_MAYBE_NONE: TypeAdapter[tuple[Endpoint, ...]] = TypeAdapter(Annotated[tuple[Target, ...], AfterValidator(_distinct)])


def _endpoint_files(config: Config) -> list[Problem]:
    """Read the files that upstreams watch, for the first time; return what is wrong with them.

    They are no part of the digest: they change without the configuration changing.
    """
    problems: list[Problem] = []
    for settings in config.upstreams.values():
        if settings.discovery.file is not None:
            document = Document(settings.discovery.file)
            if settings.service is not None and not settings.discovery.file.exists():
                continue  # the mesh has said nothing of it yet; the file comes with its word
            try:
                seen = file_time(settings.discovery.file)
                document.read()
                settings.discovery._endpoints = endpoints_of(document, empty=settings.service is not None)
                settings.discovery._seen = seen
            except OSError as error:
                problems.append(Problem(document.name, 0, 0, f"cannot be read: {error.strerror}", "a file of endpoints"))
            except ConfigError as error:
                problems += error.problems
    return problems


def _sorted(problems: Sequence[Problem]) -> list[Problem]:
    unique = dict.fromkeys(problems)
    return sorted(unique, key=lambda problem: (problem.file, problem.line, problem.column))


def _raw(document: Document, path: Loc) -> tuple[Any, Loc]:
    """Return the value in the file along `path`, skipping names that shorthands made, and the path without them."""
    value: Any = document.data
    real: list[str | int] = []
    for key in path:
        if isinstance(value, dict) and isinstance(key, str) and key in value:  # noqa: SIM114 - mypy needs both
            value = value[key]
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            continue
        real.append(key)
    return value, tuple(real)


def _spell(path: Loc) -> str:
    """Return a path as a person writes it: routes[0].match."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def _translate(document: Document, error: ErrorDetails, models: dict[int, type[Model]]) -> None:
    """Turn one pydantic error into a problem of the document."""
    kind, loc, context = error["type"], tuple(error["loc"]), error.get("ctx", {})
    if kind == "extra_forbidden":
        _unknown(document, loc, models)
        return
    if kind == "missing":
        _missing(document, loc, models)
        return
    loc += tuple(context.get("at", ()))
    at_key = bool(loc) and loc[-1] == "[key]"
    value, path = _raw(document, loc[:-1] if at_key else loc)
    if at_key:
        value = path[-1] if path else ""
    if document.spot(path).broken or (kind == "too_short" and value):
        return  # an undefined reference, or a list of which pydantic counts the good items only
    message, hint = _sentence(kind, error["msg"], context, value)
    shown = path if path else ("the file",)
    got = f", got {_short(value)}" if kind == "crossway" or kind in _SHAPES or kind == "literal_error" else ""
    if isinstance(value, (dict, list)) and kind == "crossway":
        got = ""
    if _is_secret(path, models, document):
        got = "" if isinstance(value, str) else got
    detail = str(context.get("detail", ""))
    if detail and not document.spot(path).resolved:
        got = f"{got} ({detail})"
    document.report(path, f"{_spell(shown)}: {message}{got}", hint, key=at_key)


def _sentence(kind: str, text: str, context: dict[str, Any], value: Any) -> tuple[str, str]:
    """Return (message, hint) for an error that is neither an unknown nor a missing key."""
    if kind == "crossway":
        return str(context["message"]), str(context["hint"]) or _ELSEWHERE
    if kind in _SHAPES:
        return f"expected {_SHAPES[kind][0]}", _SHAPES[kind][1]
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in str(context["expected"]).replace(" or ", ", ").split(", ")]
        near = _same(value, choices) or _near(value, choices)
        listed = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
        return f"expected {listed}", near or f"write {listed}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty", "list at least one"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = context.get("ge", context.get("le"))
        word = "least" if kind == "greater_than_equal" else "most"
        return f"must be at {word} {bound}", f"write a number that is at {word} {bound}"
    return text[:1].lower() + text[1:], _ELSEWHERE


def _same(name: Any, choices: Sequence[str]) -> str:
    """Return a hint for a protocol that other programs call otherwise."""
    group = next((each for each in _CALLED if str(name).lower() in each), ())
    return next((f"did you mean '{choice}'?" for choice in choices if choice in group), "")


def _near(name: Any, choices: Sequence[str], likeness: float = 0.6) -> str:
    if isinstance(name, Resolved) or not isinstance(name, str) or not any(map(str.isalpha, name)):
        return ""  # numbers are not misspelt
    close = get_close_matches(name.lower(), [choice.lower() for choice in choices], 1, likeness)
    if close and SequenceMatcher(None, name.lower(), close[0]).ratio() < _ALIKE:
        # An abbreviation is more like its own word than like another one of the same length: certs is certificates, not tickets.
        close = [choice.lower() for choice in choices if choice.lower().startswith(name.lower()[:4])][:1] or close
    return next((f"did you mean '{choice}'?" for choice in choices if close and choice.lower() == close[0]), "")


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = hide_login(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}...'"


def _class_at(document: Document, path: Loc, models: dict[int, type[Model]]) -> type[Model] | None:
    value, _ = _raw(document, path)
    return models.get(id(value)) if isinstance(value, dict) else None


def _is_secret(path: Loc, models: dict[int, type[Model]], document: Document) -> bool:
    """Tell whether the schema calls the value at `path` a secret."""
    model = _class_at(document, path[:-1], models) if path else None
    field = model.model_fields.get(str(path[-1])) if model is not None else None
    return field is not None and "SecretStr" in str(field.annotation)


def _unknown(document: Document, loc: Loc, models: dict[int, type[Model]]) -> None:
    model = _class_at(document, loc[:-1], models)
    known = [_key(model, name) for name in model.model_fields] if model is not None else []
    _, parent = _raw(document, loc[:-1])
    where = _spell(parent) or "the top level"
    name = str(loc[-1])
    elsewhere, listed = _elsewhere(name, document), f"known here: {', '.join(known)}"
    hint = _near(name, known, 0.85) or _below(name, model) or (f"{elsewhere}; {listed}" if elsewhere else _near(name, known) or listed)
    document.report((*parent, name), f"unknown key {name!r} in {where}", hint, key=True)


def _below(name: str, model: type[Model] | None) -> str:
    """Return a hint for a key that stands one level too high."""
    if model is None:
        return ""
    for key, field in model.model_fields.items():
        if any(name in (_key(inner, known) for known in inner.model_fields) for inner in _models_in(field.annotation)):
            return f"it belongs below `{_key(model, key)}`: {_key(model, key)}: {_shape(field.annotation, f'{{{name}: ...}}')}"
    return ""


def _shape(annotation: Any, text: str) -> str:
    """Return how a mapping is written where an annotation stands: alone, in a list, or under a name."""
    kinds = {get_origin(each) for each in (annotation, *get_args(annotation))}
    return f"{{NAME: {text}}}" if dict in kinds else f"[{text}]" if tuple in kinds else text


def _elsewhere(name: str, document: Document) -> str:
    """Return a hint for a key of another part of the file, or of the other kind of file."""
    if kind_of(document.data) == "mesh":
        return "it is a key of a gateway's file" if name in GATEWAY else ""
    places = [place for place, part in (("an upstream", Upstream), ("a route", Route), ("a listener", Listener)) if name in (_key(part, known) for known in part.model_fields)]
    places += ["the top level"] if name in (_key(Config, known) for known in Config.model_fields) else []
    return f"it is a key of {' and of '.join(places)}" if places else ""


def _models_in(annotation: Any) -> Iterator[type[Model]]:
    if isinstance(annotation, type) and issubclass(annotation, Model):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _missing(document: Document, loc: Loc, models: dict[int, type[Model]]) -> None:
    model = _class_at(document, loc[:-1], models)
    name = str(loc[-1])
    _, parent = _raw(document, loc[:-1])
    about = ""
    if model is not None:
        about = next(
            (field.description or "" for key, field in model.model_fields.items() if _key(model, key) == name), ""
        )
    where = _spell(parent) or "the file"
    document.report(parent, f"missing key {name!r} in {where}", f"add `{name}:` {about}".rstrip())
