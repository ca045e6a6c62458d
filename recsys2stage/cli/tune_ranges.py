"""Ranges of `recsys tune`: what may be tried of an option, how it is sampled, and the overlay of a trial."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recsys2stage.artifacts import atomic_write
from recsys2stage.cli.messages import shown
from recsys2stage.options import is_number
from recsys2stage.trust import CLASS

if TYPE_CHECKING:  # an extra, and slow to import
    import optuna

    Distribution = (
        optuna.distributions.CategoricalDistribution
        | optuna.distributions.FloatDistribution
        | optuna.distributions.IntDistribution
    )

EXAMPLE = "write {low: 0.001, high: 0.01, log: true}, {low: 32, high: 128, step: 32} or {choices: [a, b]}"


@dataclass
class Range:
    """Values of an option: numbers from low to high, or choices.

    Args:
        low: smallest value. Integers are sampled if low, high and step are integers; write 1.0 for numbers.
        high: largest value, itself possible.
        step: distance between two values; null: 1 for integers, any distance for numbers.
        log: sample the logarithm, as for learning rates.
        choices: values instead of low and high: numbers, text, booleans, null, lists, or classes with init_args.
    """

    low: Any = None  # not int | float, which would be read as the equal type float | int, and 8 as 8.0
    high: Any = None
    step: Any = None
    log: bool = False
    choices: list[Any] | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("low", "high", "step") if getattr(self, name) is not None}
        if self.choices is not None:
            if given or self.log:
                raise ValueError(f"a range has choices and {_listed(given or {'log': True})}, expected one; {EXAMPLE}")
            texts = [json.dumps(choice, sort_keys=True, default=str) for choice in self.choices]
            if len(set(texts)) < max(len(texts), 2):
                raise ValueError(f"choices is {shown(self.choices)}, expected two or more different values; {EXAMPLE}")
            return
        if not {"low", "high"} <= given.keys():
            raise ValueError(f"a range has {_listed(given)}, expected low and high, or choices; {EXAMPLE}")
        for name, value in given.items():
            if not is_number(value):
                raise ValueError(f"{name} of a range is {shown(value)}, expected a number; {EXAMPLE}")
        self._check_numbers(given["low"], given["high"], given.get("step"))

    def _check_numbers(self, low: float | int, high: float | int, step: float | int | None) -> None:
        if low >= high:
            raise ValueError(f"a range is from {low} to {high}, expected low below high; {EXAMPLE}")
        if self.log and step is not None:
            raise ValueError(f"a range has step {step} and log: true, expected one of them; {EXAMPLE}")
        if self.log and low <= 0:
            raise ValueError(f"a range with log: true has low {low}, expected a number above 0; {EXAMPLE}")
        if step is None:
            return
        steps = (high - low) / step if step > 0 else 0
        if steps < 1 or abs(steps - round(steps)) > 1e-6:
            raise ValueError(
                f"a range from {low} to {high} has step {step}, expected a part of {round(high - low, 9)} that divides "
                f"it; {EXAMPLE}"
            )

    def distribution(self) -> "Distribution":
        """Optuna's distribution. Choices that are no plain values are sampled by their text, see `value`."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices is not None:
            return CategoricalDistribution(tuple(self.labels()))
        low, high, step = self.low, self.high, self.step
        if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
            return IntDistribution(low, high, log=self.log, step=step or 1)
        return FloatDistribution(float(low), float(high), log=self.log, step=step)

    def labels(self) -> dict[Any, Any]:
        """What Optuna stores for each choice -> the choice."""
        plain = (bool, int, float, str, type(None))
        return {one if isinstance(one, plain) else json.dumps(one): one for one in self.choices or ()}

    def value(self, sampled: Any) -> Any:
        """The value of the option for what was sampled."""
        if self.choices is not None:
            return self.labels()[sampled]
        return float(f"{sampled:.4g}") if isinstance(sampled, float) and self.step is None else _rounded(sampled)

    def ends(self) -> list[Any]:
        """Values to try before the study: the choices, or low and high."""
        return list(self.choices) if self.choices is not None else [self.low, self.high]


def _rounded(value: Any) -> Any:
    """A multiple of a step without the noise of binary fractions: 0.3 for 0.30000000000000004."""
    return round(value, 9) if isinstance(value, float) else value


def _listed(given: Mapping[str, Any]) -> str:
    return " and ".join(f"{name} {value}" for name, value in given.items()) or "neither low nor choices"


def overlay(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings for dotted options, as in a YAML file of `recsys fit`.

    Args:
        options: dotted option -> value. A class and options of it may be given side by side.
    """
    nested: dict[str, Any] = {}
    for name, value in sorted(options.items(), key=lambda option: option[0].count(".")):  # a class before its options
        *groups, last = name.split(".")
        part = nested
        for group in groups:
            inner = part.setdefault(group, {})
            if not isinstance(inner, dict):  # a class by its name
                inner = {CLASS: inner}
            part[group] = part = dict(inner)
        part[last] = value
    return nested


def write_overlay(path: Path, options: Mapping[str, Any], comment: str) -> None:
    """Writes options as a YAML file, which `recsys fit` takes after the base config.

    Args:
        path: the file.
        options: dotted option -> value.
        comment: its first lines.
    """
    text = yaml.safe_dump(overlay(options), sort_keys=False, default_flow_style=False)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"# {line}\n" for line in comment.splitlines()) + text, encoding="utf-8")
