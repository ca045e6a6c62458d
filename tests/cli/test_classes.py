"""Classes that a config or the command line names."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from recsys2stage.cli.classes import class_names, families, find_class, options
from recsys2stage.data.prepare import prepare
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.retrieval.retriever import Retriever

SOURCE = {"class_path": "recsys2stage.data.sources.MovieLens", "init_args": {"archive": "ml-1m"}}


@pytest.mark.parametrize(
    ("function", "required"),
    [
        (Retriever, {"num_items": 5, "max_length": 4}),
        (Ranker, {"num_items": 5, "vector_dim": 4, "features": []}),
        (prepare, {"source": SOURCE, "output": "x"}),
    ],
)
def test_a_class_named_without_options_has_its_own_defaults(
    function: Callable[..., Any], required: dict[str, Any]
) -> None:
    """And not those of the class that is used where none is named, though both have an option of that name."""
    parser, compared = ArgumentParser(exit_on_error=False), 0
    add = parser.add_class_arguments if inspect.isclass(function) else parser.add_function_arguments
    add(function, as_group=False, fail_untyped=False)
    for option, action in options(parser).items():
        bases = families(getattr(action, "_typehint", str), direct=True)
        for name in class_names(bases):
            kind, _ = find_class(name, bases)
            assert kind is not None
            own = {n: p.default for n, p in inspect.signature(kind).parameters.items()}
            path = f"{kind.__module__}.{kind.__name__}"
            try:
                parsed = parser.parse_object({**required, option: {"class_path": path}})[option]
            except Exception:  # the class has options without a default
                continue
            for key, value in dict(parsed.get("init_args", {})).items():
                if isinstance(value, int | float | str) and isinstance(own.get(key), int | float | str):
                    assert value == own[key], f"{option} {name}: {key}"
                    compared += 1
    assert compared
