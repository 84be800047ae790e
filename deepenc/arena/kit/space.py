"""Search spaces over a plugin's parameters, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from deepenc.errors import near
from deepenc.plugins import Plugin, explain

P = TypeVar("P", bound=Plugin)
Scalar = bool | int | float | str | None


class Trial(Protocol):
    """What an axis needs of Optuna's trials."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """An integer, both ends included."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A real number."""


class Axis(BaseModel):
    """Values that one parameter may take: a list of choices, or a range.

    Attributes:
        field: The parameter; that of a nested plugin with dots, as in ``stages.1.lr``.
        choices: Values to choose from; empty where it is a range.
        low: Lower end of a range, included. Where both ends are written as integers, only integers are tried.
        high: Upper end, included.
        log: Whether the range is searched on a logarithmic scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str
    choices: tuple[Scalar, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        low, high = self.low, self.high
        if self.choices and low is None and high is None and not self.log:
            return self
        if self.choices or low is None or high is None:
            raise ValueError(
                f"{self.field}: expected a list of choices, or a range {{low: ..., high: ...}}, log: true "
                "where its logarithm is searched"
            )
        if not low <= high or (self.log and low <= 0):
            raise ValueError(
                f"{self.field}: expected low <= high{', above 0' if self.log else ''}, got {low} to {high}"
            )
        return self

    def ends(self) -> tuple[Scalar, ...]:
        """Values which, if the plugin takes them, it takes any."""
        return self.choices or (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether a value is one of those searched."""
        if self.low is None or self.high is None:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high

    def suggest(self, trial: Trial) -> Any:
        """A value, from one of Optuna's trials."""
        low, high = self.low, self.high
        if low is None or high is None:
            return trial.suggest_categorical(self.field, list(self.choices))
        if isinstance(low, int) and isinstance(high, int):
            return trial.suggest_int(self.field, low, high, log=self.log)
        return float(trial.suggest_float(self.field, low, high, log=self.log))


def _axes(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return [
        {"field": field} | (dict(values) if isinstance(values, Mapping) else {"choices": values})
        for field, values in value.items()
    ]


Space = Annotated[tuple[Axis, ...], BeforeValidator(_axes)]
"""Axes; also written as a mapping: ``{lr: {low: 0.001, high: 0.1, log: true}, layers: [all, head]}``."""


def value_of(whole: Any, path: str) -> Any:
    """The value of a parameter, or of a nested plugin's.

    Raises:
        ValueError: There is none.
    """
    for step in path.split("."):
        parts = _parts(whole)
        if step not in parts:
            hint = f": {near(step, parts)}" if parts else ""
            raise ValueError(f"{path!r} names no parameter: {type(whole).__name__} has no {step!r}{hint}")
        whole = parts[step]
    return whole


def _parts(whole: Any) -> dict[str, Any]:
    if isinstance(whole, tuple):
        return {str(index): part for index, part in enumerate(whole)}
    if isinstance(whole, BaseModel):
        return {field: getattr(whole, field) for field in type(whole).model_fields}
    return {}


def varied(plugin: P, values: Mapping[str, Any]) -> P:
    """A plugin with other values of some parameters.

    Args:
        plugin: The plugin.
        values: Parameter, as in `Axis.field`, to its value.

    Raises:
        ValueError: A parameter does not exist, or does not take its value.
    """
    for path, value in values.items():
        value_of(plugin, path)
        try:
            plugin = _with(plugin, path.split("."), value)
        except ValidationError as error:
            raise ValueError(f"{path!r} does not take {value!r}: {explain(error, [])}") from error
    return plugin


def _with(whole: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    step, *rest = path
    if isinstance(whole, tuple):
        at = int(step)
        return (*whole[:at], _with(whole[at], rest, value), *whole[at + 1 :])
    fields = _parts(whole)
    return type(whole)(**fields | {step: _with(fields[step], rest, value)})
