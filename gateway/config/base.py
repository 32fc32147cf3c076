"""The base of every part of the schema: frozen, closed to unknown keys, and silent about values from outside.

Strategy: pydantic validates; a wrap validator notes which class read which mapping (so that "did you mean" knows the
keys) and which fields hold a value from `${...}` (so that a repr or dump shows none). `Shorthand` lets one field
accept a shorter spelling without a union, whose errors would name alternatives instead of the mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from gateway.config.source import REDACTED, Resolved


class Model(BaseModel):
    """A mapping of the configuration with a fixed set of keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_by_alias=True, validate_by_name=True
    )

    _outside: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _note(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if info.context is not None and isinstance(data, dict):
            info.context["models"][id(data)] = cls
        model = handler(data)
        if isinstance(data, dict):
            values = {**model.__dict__, **(model.model_extra or {})}
            model._outside = frozenset(
                name
                for name, value in values.items()
                if _resolved(data.get(_key(cls, name))) and not _holds_models(value)
            )
        return model

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        data = cast(dict[str, Any], handler(self))
        for name in self._outside:
            for key in (name, _key(type(self), name)):
                if key in data:
                    data[key] = REDACTED
        return data

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, (REDACTED if name in self._outside else value)


class Shorthand:
    """Annotation: turn a shorter spelling into the full one before validation, and say so in the JSON Schema."""

    def __init__(self, widen: Callable[[Any], Any], short: dict[str, Any] | None) -> None:
        self.widen = widen
        self.short = short

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.widen, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [self.short, handler(schema)]} if self.short is not None else handler(schema)


def listed(short: str) -> Shorthand:
    """Return the Shorthand by which a single text stands for a list of one."""
    return Shorthand(lambda raw: [raw] if isinstance(raw, str) else raw, {"type": "string", "x-is": short})


def setting(default: Any, description: str, **more: Any) -> Any:
    """Declare a field with a default, written as the file would write it."""
    return Field(default=default, validate_default=True, description=description, **more)


def part(model: type[Model], description: str) -> Any:
    """Declare a field that is a mapping of its own, all defaults when absent."""
    return Field(default_factory=model, description=description)


def needed(description: str, **more: Any) -> Any:
    """Declare a field that has no default."""
    return Field(description=description, **more)


def _key(cls: type[BaseModel], name: str) -> str:
    field = cls.model_fields.get(name)
    return field.alias if field is not None and field.alias else name


def _resolved(raw: Any) -> bool:
    if isinstance(raw, Resolved):
        return True
    if isinstance(raw, dict):
        return any(_resolved(value) for value in raw.values())
    return isinstance(raw, list) and any(_resolved(value) for value in raw)


def _holds_models(value: Any) -> bool:
    if isinstance(value, Model):
        return True
    if isinstance(value, dict):
        return any(_holds_models(item) for item in value.values())
    return isinstance(value, tuple) and any(_holds_models(item) for item in value)
