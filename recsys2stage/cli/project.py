"""The command init: a project folder with configs, in which `make pipeline` works without a checkout."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from recsys2stage.cli.configs import OVERLAYS, STARTER, datasets, shipped_configs
from recsys2stage.cli.table_config import TableConfig

TABLE, DEMO, RULES = "table", "demo", "pipeline.mk"
GITIGNORE = "/data/\n/runs/\n/lightning_logs/\n__pycache__/\n"
MAKEFILE = """# make pipeline; make help lists everything. The rules are in configs/pipeline.mk.
DATASET ?= {name}
# the command that made this project, else the one on PATH
RECSYS := $(shell if [ -x {program} ]; then echo "{command}"; else echo recsys; fi)

include configs/pipeline.mk
"""
README = """# {name}

A project of recsys2stage: recommendations in two stages, a retriever and a ranker.

    make pipeline                          # prepare, train and evaluate both stages, recommend for every user
    make pipeline WITH=sasrec              # with an overlay of configs/with/; recsys list overlays
    recsys evaluate --bundle runs/{name}/bundle --output runs/{name}
    recsys recommend --bundle runs/{name}/bundle --output lists.csv

`configs/{name}/` says how the data are read (prepare.yaml) and how both stages are trained. After a change,
`make pipeline` redoes what depends on it. If it is interrupted, the same command continues it.
Results: `runs/{name}/report.md`.
"""


def init(
    folder: Path,
    template: str | None = None,
    events: Path | None = None,
    items: Path | None = None,
    users: Path | None = None,
    name: str | None = None,
) -> None:
    """Write a project folder: configs, overlays, a Makefile, a README.

    recsys init shop --events orders.csv reads the first rows of a table, fills in the columns it recognizes, and marks
    the others as questions in shop/configs/shop/prepare.yaml.

    Args:
        folder: the new project; recsys init FOLDER. It must not exist or be empty.
        template: table: events of your own; demo: a simulated log; or a dataset (recsys list configs). None: table if
            events are given, else demo.
        events: your events: CSV, TSV or Parquet, a folder or glob of such files, or a zip with one of them.
        items: a table of item features and titles, likewise.
        users: a table of user features, likewise.
        name: name of the dataset and its folders configs/NAME, data/NAME and runs/NAME. None: for the template table
            the project's name, else the template's.

    Raises:
        ValueError: the folder is not empty, the template is unknown, or the events are no table. Nothing is written.
    """
    template = template or (TABLE if events else DEMO)
    template = TABLE if template == STARTER else template  # its configs
    shipped = shipped_configs()
    templates = [TABLE, *(other for other in datasets(shipped) if other != STARTER)]
    if template not in templates:
        near = get_close_matches(template, templates, 1)
        raise ValueError(
            f"template is {template!r}, expected one of {', '.join(templates)}"
            + (f"; did you mean {near[0]}?" if near else "; recsys list configs says what each is")
        )
    tables = {"events": events, "items": items, "users": users}
    if template != TABLE and (given := [option for option, path in tables.items() if path is not None]):
        raise ValueError(
            f"--{given[0]} is {tables[given[0]]} with the template {template}, expected only with the template table; "
            f"leave it out and give raw data to make: make pipeline RAW=PATH"
        )
    if events is None and (given := [option for option in ("items", "users") if tables[option] is not None]):
        raise ValueError(f"--{given[0]} is {tables[given[0]]} without events, expected both; add --events FILE")
    check_new(folder)
    name = name or (slug(folder.resolve().name) if template == TABLE else template)
    if name != slug(name) or name in (OVERLAYS, STARTER):
        raise ValueError(
            f"name is {name!r}, expected letters, digits, '-', '_' and '.', and neither {OVERLAYS} nor {STARTER}; "
            f"give --name {slug(name) if slug(name) not in (OVERLAYS, STARTER) else 'mine'}"
        )
    table = TableConfig(events, items, users) if template == TABLE else None
    with new_folder(folder) as temporary:
        write_project(temporary, shipped, template, name, table)
    print(f"{folder}: a project with the dataset {name} (template {template}): configs/{name}, Makefile, README.md")
    if table is not None:
        if table.table is not None:
            print(f"Recognized in {table.table.path}:")
        print("\n".join(table.summary()))
        if table.questions:
            print(
                f"Open questions: {', '.join(table.questions)}. Answer them in {folder}/configs/{name}/prepare.yaml, "
                "where they are marked QUESTION."
            )
    start = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
    answers = "write the answers, then " if table is not None and table.questions else ""
    print(f"Next: {answers}{start}make pipeline")


def check_new(folder: Path) -> None:
    """Raises a ValueError unless the folder does not exist or is empty."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected the name of a new folder; name another")
    if folder.is_dir() and (held := sorted(path.name for path in folder.iterdir())):
        some = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise ValueError(f"{folder} is not empty (it holds {some}), expected a new or empty folder; name another")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder within the new one; on success what it holds is moved up, else nothing is left.

    `artifacts.atomic_write` would replace an empty folder, which may be the working directory of a shell.
    """
    made = not folder.exists()
    temporary = folder / ".partial"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(temporary)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def slug(name: str) -> str:
    """A name that needs no quotes in paths and make."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "mine"


def write_project(folder: Path, shipped: Path, template: str, name: str, table: TableConfig | None) -> None:
    """Writes all files of a project."""
    configs = folder / "configs"
    shutil.copytree(shipped / OVERLAYS, configs / OVERLAYS, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(shipped / RULES, configs)
    (configs / name).mkdir()
    source = STARTER if table is not None else template
    for path in sorted((shipped / source).glob("*.yaml")):
        text = rename(path.read_text(encoding="utf-8"), source, name)
        if table is not None and path.stem == "prepare":
            text = table.prepare(name)
        elif table is not None and path.stem == "mine":
            text = table.mine(text)
        (configs / name / path.name).write_text(text, encoding="utf-8")
    files = {"Makefile": MAKEFILE.format(name=name, **program()), "README.md": README.format(name=name)}
    for file, text in {**files, ".gitignore": GITIGNORE}.items():
        (folder / file).write_text(text, encoding="utf-8")


def rename(text: str, old: str, new: str) -> str:
    """The text of a config with the folders of another dataset."""
    return re.sub(rf"\b(configs|data|runs)/{re.escape(old)}(?![\w.-])", rf"\1/{new}", text)


def program() -> dict[str, Any]:
    """For the Makefile: the program to look for, quoted for the shell, and the command that runs it."""
    python = Path(sys.executable)
    script = python.with_name("recsys")
    found = script if script.is_file() else python
    quoted = shlex.quote(str(found)).replace("#", "\\#")
    return {"program": quoted, "command": quoted if found is script else f"{quoted} -m recsys2stage"}
