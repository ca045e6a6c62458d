"""Sections of a model card that come from the manifest of a bundle or an index: model, limits, use."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recsys2stage import columns as c
from recsys2stage.artifacts import read_array, read_json
from recsys2stage.data.catalogue import read_catalogue
from recsys2stage.ranking.bundle import POPULARITY
from recsys2stage.ranking.signals.base import DESCRIPTION as SIGNALS
from recsys2stage.ranking.signals.base import FOLDER
from recsys2stage.trust import CLASS, OPTIONS, PACKAGE

MAX_NAME, MAX_NAMES = 80, 40  # characters of a name, names of a list
REQUEST_TIMES = {  # option request_time -> what the retriever reads
    "none": "not read",
    "last_event": "the time of the newest event is used instead",
    "target": "read; a request must come with its time, else the current time is taken",
}


def code(value: Any) -> str:
    """A value from data or configs as a code span: on one line, without characters that could end it."""
    text = "".join(one if one.isprintable() else " " for one in str(value)).replace("`", "'").strip()
    text = text.replace("|", "¦")  # a bar would end a table's cell even within code
    return f"`{text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + '…'}`" if text else "(empty)"


def escape(text: str) -> str:
    """A sentence that quotes names from configs, on one line and without markup."""
    text = "".join(one if one.isprintable() else " " for one in text)
    return re.sub(r"([\\`*\[])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")


def codes(values: Iterable[Any]) -> str:
    """Values as code spans, the first MAX_NAMES of them."""
    names = list(values)
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(code, names[:MAX_NAMES])) + more


def class_of(spec: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of a class as a file gives it: a name, or {"class_path", "init_args"}; "" for neither."""
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping):
        return "", {}
    name, options = spec.get(CLASS) or spec.get("class"), spec.get(OPTIONS) or spec.get("options")
    return (name if isinstance(name, str) else ""), (dict(options) if isinstance(options, Mapping) else {})


def name_class(spec: Any) -> str:
    """The name of a class as a code span."""
    return code(class_of(spec)[0].rpartition(".")[2] or "none")


def describe_class(spec: Any) -> str:
    """Name and options of a class; options that are None are left out."""
    name, options = class_of(spec)
    parts = [
        code(f"{key}={value}") if _is_plain(value) else f"{code(key)}: {_describe_nested(value)}"
        for key, value in options.items()
        if value is not None
    ]
    return code(name.rpartition(".")[2] or "none") + (f" ({', '.join(parts)})" if parts else "")


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | None) or (isinstance(value, list) and all(map(_is_plain, value)))


def _describe_nested(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_describe_nested, value))
    name, options = class_of(value)
    parts = options.get("parts")
    return code(name) + (f" of {_describe_nested(parts)}" if isinstance(parts, list) else "")


def class_names(value: Any) -> Iterator[str]:
    """All class names in plain options."""
    if isinstance(value, Mapping):
        if isinstance(name := value.get(CLASS) or value.get("class"), str):
            yield name
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from class_names(part)


def read_signals(folder: Path) -> list[Any]:
    """Classes and options of a bundle's signals."""
    path = folder / FOLDER / SIGNALS
    return read_json(path, list, "recsys export-bundle") if path.is_file() else []


def day(seconds: int) -> str:
    """The date of a time in seconds since 1970, in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def describe_model(folder: Path, manifest: dict[str, Any], index: dict[str, Any]) -> str:
    """Both stages as a list."""
    towers, signals = manifest["towers"], read_signals(folder)
    lines = [
        f"Retriever: encoder {describe_class(towers['encoder'])}; histories of at most {towers['max_length']:,} events",
        f"Items: {name_class(towers.get('items') or 'ItemTable')}, vectors of {manifest['vector_dim']:,} dimensions, "
        f"compared by {'dot product' if towers.get('similarity') == 'dot' else 'cosine'}",
        f"Index: {describe_class(index)}",
        f"Request time: {REQUEST_TIMES.get(manifest['request_time'], 'not known')} ({code(manifest['request_time'])})",
    ]
    if inputs := towers.get("inputs"):
        lines.insert(2, "Inputs in addition to the items: " + ", ".join(map(name_class, inputs)))
    if user := towers.get("user"):
        lines.insert(2, f"User features: {name_class(user)}")
    if manifest["next_action"] != "none":
        lines.append(f"Target action: {code(manifest['next_action'])}, one of {codes(manifest['actions'])}")
    if "reranker" not in manifest:
        return "\n".join(f"- {line}" for line in lines)
    reranker = manifest["reranker"]
    features: dict[str, int] = {}
    for signal in reranker["signals"]:
        family = signal["name"].partition(".")[0].replace("source", "candidate generators")
        features[family] = features.get(family, 0) + 1
    proposers = [class_of(signal) for signal in signals]
    named = [
        f"{options['candidates']:,} from {code(name.rpartition('.')[2])}"
        for name, options in proposers
        if isinstance(options.get("candidates"), int) and options["candidates"]
    ]
    lines += [
        f"Candidates for a request: {manifest['candidates']:,}, "
        + (f"from the index and up to {', '.join(named)}" if named else "from the index"),
        f"Ranker: scorer {describe_class(reranker['scorer'])}",
        *(f"Averaged with: scorer {describe_class(other['scorer'])}" for other in manifest.get("average") or []),
        "Signals of the ranker (number of features): "
        + (", ".join(f"{code(name)} ({count})" for name, count in features.items()) or "none"),
    ]
    if reranker.get("mask_ids"):
        lines.append("IDs masked in the ranker: always, which was better on the validation users")
    if reranker.get("without"):
        lines.append(f"Not read by the ranker: {codes(reranker['without'])}")
    if reranker["features"] and "features" not in (reranker.get("without") or ()):
        lines.append(f"Item features of the ranker: {codes(feature['name'] for feature in reranker['features'])}")
    return "\n".join(f"- {line}" for line in lines)


def list_limits(folder: Path, manifest: dict[str, Any], data: dict[str, Any] | None) -> str:
    """What the model cannot do, as a list.

    Args:
        data: the manifest of the dataset; None: it was not found.
    """
    untrained = int((read_array(folder / POPULARITY, np.int64)[1:] == 0).sum())
    items = class_of(manifest["towers"].get("items") or "ItemTable")[0].rpartition(".")[2]
    content = any(
        class_of(signal)[0].rpartition(".")[2] == "Content" and class_of(signal)[1].get("candidates")
        for signal in read_signals(folder)
    )
    cold = f"Cold items: {untrained:,} of {manifest['items']:,} items have no training event. "
    if items == "ItemTable":
        cold += "The retriever's vectors come from item ids alone, so it cannot find these"
        cold += "; only the signal `Content` proposes them by their features" if content else ""
    else:
        cold += f"Their vectors come from {code(items)}, which reads item features; the cohort 'never trained' of the "
        cold += "evaluation shows how well they are ranked"
    newest = manifest.get("newest_time")
    lines = [
        cold,
        "New items: an item that is not in this folder is never recommended. Prepare, train and export again to add it",
        "New users: without a known item in the history, the most popular items are recommended",
        {
            "target": "Request time: the evaluation passes the time of the target event as the request time, as a "
            "service that knows the current time would. Numbers without request time are not comparable",
            "last_event": "Request time: the model does not know how long ago the newest event was",
        }.get(manifest["request_time"], "Request time: the retriever reads none, so it does not see how time passes"),
    ]
    if isinstance(newest, int) and manifest["has_time"]:
        lines.append(
            f"Age: the newest training event is of {day(newest)}. Counts and popularity do not change after the export"
        )
    if "reranker" in manifest:
        lines.append(
            f"Candidates: the ranker sorts {manifest['candidates']:,} candidates and never sees other items. Their "
            "share of the targets in the evaluation is the upper bound of its recall"
        )
    ties = (data or {}).get("ties") or {}
    if manifest["has_time"] and isinstance(share := ties.get("events_share"), float) and share > 0.01 and data:
        lines.append(
            f"Times: {100 * share:.1f} % of the events have the same time as another one of their user. Their order is "
            f"{code(data['protocol']['tie_break'])}, and a model may learn that order. Times are taken as the source "
            "gives them, also where it estimates or rounds them"
        )
    if manifest.get("options", {}).get("with_histories"):
        lines.append("Personal data: this folder contains the users' ids and all their events")
    lines.append("Feedback: the data contain only events that happened, so items that were never shown look unwanted")
    return "\n".join(f"- {line}" for line in lines)


def describe_use(folder: Path, manifest: dict[str, Any], index: dict[str, Any]) -> str:
    """Commands and Python code that load the folder."""
    ids = read_catalogue(folder / c.ITEM_TABLE, manifest["items"])[c.ITEM_ID].head(50).to_list()
    history = [item for item in ids if len(str(item)) <= MAX_NAME][:2] or ids[:1]
    arguments = [f"[{', '.join(map(ascii, history))}]", "k=10"]
    if manifest["has_time"] and isinstance(newest := manifest.get("newest_time"), int):
        times = [max(newest - 60 * place, 0) for place in range(len(history))][::-1]
        arguments += [f"times={times}", f"request_time={newest + 60}"]
    named = {name for part in (manifest["towers"], manifest.get("reranker"), index) for name in class_names(part)}
    named |= set(class_names(manifest.get("average") or []))
    named |= set(class_names(read_signals(folder)))
    modules = sorted({name.rpartition(".")[0] for name in named if "." in name})
    modules = [name for name in modules if name.partition(".")[0] != PACKAGE]
    trust = ""
    if modules:
        trust = (
            f"\n\nThis model names classes of other modules: {codes(modules)}. If you trust their code, allow them by "
            "`--trust`, or `trust=` in Python."
        )
    packed = manifest.get("options", {}).get("with_histories")
    data = "" if packed else " --data DATA"
    return (
        "BUNDLE is the path of this folder, DATA that of the prepared dataset.\n\n"
        "```bash\n"
        f"recsys serve --bundle BUNDLE{data}\n"
        "recsys recommend --bundle BUNDLE --data DATA --output lists.csv\n"
        "recsys evaluate --bundle BUNDLE --data DATA\n"
        "```\n\n"
        "```python\n"
        "from recsys2stage import Recommender\n\n"
        'recommender = Recommender.load("BUNDLE")\n'
        f"recommender.recommend({', '.join(arguments)})\n"
        "```\n\n"
        "A history is a list of item ids, oldest first"
        + (", with the time of each event in seconds since 1970" if manifest["has_time"] else "")
        + f".{trust}"
    )
