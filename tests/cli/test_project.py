"""A project of one's own: init, list, --version and completion."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pipeline_fixtures import recsys

from recsys2stage import __version__
from recsys2stage.artifacts import read_manifest
from recsys2stage.cli import completion
from recsys2stage.cli.callbacks import KeepLast
from recsys2stage.cli.commands import COMMANDS
from recsys2stage.cli.configs import datasets, overlays, resolve_path, shipped_configs
from recsys2stage.cli.listing import KINDS
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.retriever import Retriever

ROOT = Path(__file__).parents[2]
USERS, ITEMS = 12, 20


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with orders.csv (ISO times, text ids) and products.csv, of another separator."""
    orders = ["order_no,customerRef,sku,ordered_at,stars,qty"]
    for user in range(USERS):
        for number in range(8):
            at = f"2024-0{number + 1}-{user + 1:02d}T12:00:00"
            orders.append(f"{len(orders)},C-{user:02d},S{(user + 3 * number) % ITEMS:03d},{at},{number % 5 + 1},1")
    (tmp_path / "orders.csv").write_text("\n".join(orders) + "\n")
    products = ["sku;product_name;brand;price"]
    products += [f"S{item:03d};Thing, no. {item};{'ab'[item % 2]};{item / 2}" for item in range(ITEMS)]
    (tmp_path / "products.csv").write_text("\n".join(products) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path: Path) -> dict[str, object]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# init, for a table


def test_a_table_is_recognised_and_prepared(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recsys("init", "shop", "--events", "orders.csv", "--items", "products.csv")
    shown = capsys.readouterr().out
    assert "user    customerRef" in shown
    assert "time    ordered_at (iso)" in shown
    assert "id sku; title product_name; brand (categorical), price (numeric)" in shown
    assert "unused  order_no, qty" in shown
    assert shown.splitlines()[-1] == "Next: cd shop && make pipeline"
    monkeypatch.chdir(shop / "shop")
    recsys("prepare-data", "--config", "configs/shop/prepare.yaml")
    manifest = read_manifest("data/shop", "dataset", "")
    assert manifest["counts"]["events"] == 8 * USERS
    assert manifest["has"] == {"time": True, "rating": True, "action": False}
    assert manifest["protocol"]["val"] == 2  # of eight events
    assert [feature["name"] for feature in manifest["features"]["items"]] == ["brand", "price"]
    assert Dataset("data/shop").num_items == ITEMS


def test_signals_that_the_table_cannot_give_are_switched_off(shop: Path) -> None:
    def signals(name: str) -> list[str]:
        parts = read(shop / name / f"configs/{name}/mine.yaml")["signals"]
        assert isinstance(parts, list)
        return [part if isinstance(part, str) else part["class_path"] for part in parts]

    recsys("init", "all", "--events", "orders.csv", "--items", "products.csv")
    assert {*signals("all")} >= {"Transitions", "SLIT", "PopularityAsOf", "Session", "Ratings", "Content", "Affinity"}
    (shop / "bare.csv").write_text("user,item\na,x\na,y\nb,x\n")
    recsys("init", "bare", "--events", "bare.csv")
    assert signals("bare") == ["Transitions", "SLIT", "Neighbours"]
    source = read(shop / "bare/configs/bare/prepare.yaml")["source"]
    assert isinstance(source, dict)
    assert source["init_args"] == {
        **{"path": str(shop / "bare.csv"), "user": "user", "item": "item"},
        **{"time": None, "time_unit": "order"},
    }


def test_an_open_question_is_asked_by_prepare_data_until_it_is_answered(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shop / "log.csv").write_text("alpha,beta,gamma\n" + "".join(f"u{n % 4},i{n % 5},{n}\n" for n in range(20)))
    recsys("init", "log", "--events", "log.csv")
    shown = capsys.readouterr().out
    assert "Open questions: user, item" in shown
    assert shown.endswith("Next: write the answers, then cd log && make pipeline\n")
    monkeypatch.chdir(shop / "log")
    path = shop / "log/configs/log/prepare.yaml"
    assert "# QUESTION: which column holds the user ids? columns: alpha, beta, gamma" in path.read_text()
    of = ("prepare-data", "--config", path)
    with pytest.raises(SystemExit) as error:
        recsys(*of)
    assert str(error.value) == (
        f"recsys prepare-data: source.user is '???', an open question, expected a column of {shop}/log.csv (alpha, "
        "beta, gamma): which column holds the user ids? Write it into prepare.yaml, or give --source.user"
    )
    path.write_text(path.read_text().replace("user: ???", "user: alpha"))
    with pytest.raises(SystemExit, match=r"source.item is '\?\?\?', an open question"):
        recsys(*of)
    assert not Path("data/log").exists()
    recsys(*of, "--source.item", "beta")
    assert read_manifest("data/log", "dataset", "")["counts"]["users"] == 4


def test_items_without_a_recognised_title_get_a_line_that_takes_it(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "log.csv").write_text("user,item,time\n" + "".join(f"u{n % 4},i{n % 30},{n}\n" for n in range(60)))
    (shop / "things.csv").write_text("item,words\n" + "".join(f"i{n},thing number {n}\n" for n in range(30)))
    recsys("init", "log", "--events", "log.csv", "--items", "things.csv")
    monkeypatch.chdir(shop / "log")
    path = Path("configs/log/prepare.yaml")
    assert path.read_text().count("# title: COLUMN") == 1
    path.write_text(path.read_text().replace("# title: COLUMN", "title: words"))
    recsys("prepare-data", "--config", path)
    assert "thing number 7" in pl.read_parquet("data/log/items.parquet")["title"]


def test_german_files_leave_questions_that_say_what_to_write(
    shop: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    dates = [f"{day:02}.{month:02}.2024" for day in range(1, 29) for month in (1, 2)]
    (shop / "german.csv").write_text(
        "kunde,artikel_nr,bestellt_am\n" + "".join(f"k{n % 4},a{n % 30},{dates[n % 56]}\n" for n in range(90))
    )
    (shop / "produkte.csv").write_text(
        "artikel_nr,bezeichnung\n" + "".join(f"a{n},Ding Nummer {n}\n" for n in range(30))
    )
    recsys("init", "laden", "--events", "german.csv", "--items", "produkte.csv")
    assert "Open questions: user, time." in capsys.readouterr().out
    path = shop / "laden/configs/laden/prepare.yaml"
    text = path.read_text()
    assert "# QUESTION: bestellt_am looks like dates ('01.01.2024'), which are not ISO" in text
    assert "# bezeichnung is not used as a feature: nearly every row has its own text; if it is the name" in text
    assert "write title: bezeichnung\n" in text
    assert "item: artikel_nr  # the item table has it too" in text
    assert "id: artikel_nr\n" in text
    answered = text.replace("user: ???", "user: kunde").replace("time: ???", "time: bestellt_am")
    path.write_text(answered.replace("# title: COLUMN", "title: bezeichnung"))
    words = ("prepare-data", "--config", path, "--output", shop / "data")
    for choice in ("error", "quarantine"):
        with pytest.raises(SystemExit, match=r"'bestellt_am': none of the 90 values is an ISO time .*01\.01\.2024"):
            recsys(*words, "--on_bad_rows", choice)
    assert not (shop / "data").exists()
    order = ("--source.time", "null", "--source.time_unit", "order")
    recsys(*words, *order)
    assert caplog.messages[-1] == (
        "30 of 90 events (33 %) repeat a (user, item) pair (the first of each is kept: repeats=first); to keep them "
        "and recommend seen items again: --repeats keep"
    )
    recsys(*words, *order, "--repeats", "keep", "--output", shop / "all")
    assert caplog.messages[-1].endswith("repeat a (user, item) pair (all are kept: repeats=keep)")


def test_without_events_everything_is_a_question(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recsys("init", "later", "--template", "table")
    monkeypatch.chdir(shop / "later")
    with pytest.raises(SystemExit, match=r"source.path is '\?\?\?', an open question, expected a file, folder"):
        recsys("prepare-data", "--config", "configs/later/prepare.yaml")
    with pytest.raises(SystemExit, match=r"source.user is '\?\?\?', an open question, expected a column of .*sku"):
        recsys("prepare-data", "--config", "configs/later/prepare.yaml", "--source.path", shop / "orders.csv")


def test_odd_names_are_quoted(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = shop / "it's: #1"
    odd.mkdir()
    (odd / "log.csv").write_text("user: id|no #|item id\n" + "".join(f"u{n % 3}|{n}|i{n % 4}\n" for n in range(12)))
    recsys("init", odd / "my shop", "--events", odd / "log.csv")
    monkeypatch.chdir(odd / "my shop")
    recsys("prepare-data", "--config", "configs/my-shop/prepare.yaml")
    assert read_manifest("data/my-shop", "dataset", "")["counts"]["items"] == 4


# init, for the other templates


@pytest.mark.parametrize("template", [name for name in datasets(shipped_configs()) if name != "small"])
def test_a_template_is_a_dataset_of_its_own_name(template: str, tmp_path: Path) -> None:
    recsys("init", tmp_path / "one", "--template", template)
    for path in sorted((shipped_configs() / template).glob("*.yaml")):
        assert (tmp_path / "one/configs" / template / path.name).read_bytes() == path.read_bytes()
    recsys("init", tmp_path / "two", "--template", template, "--name", "mine")
    for path in (tmp_path / "two/configs/mine").iterdir():
        text, before = path.read_text(), (shipped_configs() / template / path.name).read_text()
        assert not re.search(rf"(configs|data|runs)/{template}\b", text)
        assert text == re.sub(rf"(configs|data|runs)/{template}\b", r"\1/mine", before)
    assert {path.stem for path in (tmp_path / "two/configs/with").iterdir()} == set(overlays(shipped_configs()))


def test_make_runs_every_stage_in_a_project(tmp_path: Path) -> None:
    """With the command that made it, or the one on PATH where that is gone."""
    recsys("init", tmp_path / "demo-project")
    makefile = tmp_path / "demo-project/Makefile"
    program = Path(sys.executable).with_name("recsys")
    command = str(program) if program.is_file() else f"{sys.executable} -m recsys2stage"
    assert command in makefile.read_text()
    makefile.write_text(makefile.read_text().replace(str(Path(sys.executable).parent), "/nowhere"))
    stub = tmp_path / "bin/recsys"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/bash\necho "$1" >> calls.txt; while [ "$1" != --output ]; do shift; done\n'
        'case $2 in *.parquet) touch "$2";; runs/demo) touch "$2/report.json" "$2/report.md";; '
        '*) mkdir -p "$2"; touch "$2"/{manifest.json,ratings.csv,best.ckpt};; esac\n'
    )
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["make", "pipeline"], cwd=makefile.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = (makefile.parent / "calls.txt").read_text().split()
    assert calls == [
        *("simulate", "prepare-data", "fit", "export-index", "mine-negatives", "fit", "export-bundle"),
        *("evaluate", "recommend"),
    ]


def test_an_empty_folder_is_filled_and_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell may stand in it."""
    folder = tmp_path / "demo"
    folder.mkdir()
    before = folder.stat().st_ino
    monkeypatch.chdir(folder)
    recsys("init", ".")
    assert folder.stat().st_ino == before
    assert sorted(path.name for path in folder.iterdir()) == [".gitignore", "Makefile", "README.md", "configs"]
    assert len((folder / "README.md").read_text().splitlines()) <= 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["full"], r"full is not empty \(it holds kept.txt\), expected a new or empty folder; name another"),
        (["orders.csv"], "orders.csv is a file, expected the name of a new folder; name another"),
        (["new", "--template", "ml-1n"], "template is 'ml-1n', expected one of table, .*; did you mean ml-1m"),
        (["new", "--template", "zzz"], "template is 'zzz', expected one of .*; recsys list configs says what each is"),
        (["new", "--template", "demo", "--events", "orders.csv"], "--events is orders.csv with the template demo"),
        (["new", "--template", "table", "--items", "products.csv"], "--items is products.csv without events"),
        (["new", "--name", "a b"], "name is 'a b', expected letters, .*; give --name a-b"),
        (["new", "--name", "with"], "name is 'with', expected letters, .*; give --name mine"),
        (["new", "--events", "none.csv"], "none.csv does not exist, expected a CSV, TSV or Parquet file"),
        (["new", "--events", "notes.doc"], "notes.doc has the type '.doc', expected a CSV"),
        (["new", "--events", "orders.csv", "--items", "none.csv"], "none.csv does not exist, expected a CSV"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(shop: Path, words: list[str], message: str) -> None:
    (shop / "full").mkdir()
    (shop / "full/kept.txt").write_text("kept")
    (shop / "notes.doc").write_text("notes")
    before = sorted(path.relative_to(shop) for path in shop.rglob("*"))
    with pytest.raises(SystemExit, match=message) as error:
        recsys("init", *words)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(path.relative_to(shop) for path in shop.rglob("*")) == before


# configs without a checkout


def test_a_name_of_configs_is_found_in_the_project_first_and_else_among_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("demo", "configs") == shipped_configs() / "demo"
    assert resolve_path("hstu", "configs/with", ".yaml") == shipped_configs() / "with/hstu.yaml"
    (tmp_path / "configs/demo").mkdir(parents=True)
    assert resolve_path("demo", "configs") == Path("configs/demo")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist, nor does configs/nowhere; give a path"):
        resolve_path("nowhere", "configs")
    with pytest.raises(FileNotFoundError, match=r"smal does not exist, .*; did you mean small\? .*recsys list configs"):
        resolve_path("smal", "configs")
    with pytest.raises(FileNotFoundError, match=r"hstuu does .*; did you mean hstu\? .*recsys list overlays"):
        resolve_path("hstuu", "configs/with", ".yaml")


# list


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("configs", {"demo", "small", "ml-1m"}),
        ("overlays", {"hstu", "no-time"}),
        ("encoders", {"Transformer", "HSTU", "Mamba4Rec"}),
        ("losses", {"InfoNCE", "GBCE", "Listwise", "LambdaRank"}),
        ("signals", {"SLIT", "Session", "OtherRetriever"}),
        ("baselines", {"Popularity", "TransitionGraph", "EASE"}),
        ("scorers", {"MLP", "DIN", "DCN", "MoL"}),
        ("sources", {"Table", "MovieLens"}),
    ],
)
def test_list_says_a_line_of_each(
    kind: str, some: set[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recsys("list", kind)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert all(len(line) == 2 for line in lines)
    assert {name for name, _ in lines} >= some
    assert not {name for name, _ in lines} & {
        "Encoder",
        "Loss",
        "Sampled",
        "Signal",
        "Proposer",
        "Scorer",
        "Source",
        "Baseline",
    }


def test_list_without_a_kind_lists_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    recsys("list")
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(KINDS)
    assert tuple(KINDS) == completion.KINDS


def test_an_unknown_kind_gets_the_nearest_name() -> None:
    with pytest.raises(SystemExit, match=r"kind is .encoder., expected configs, .* or sources; did you mean encoders"):
        recsys("list", "encoder")


def test_list_knows_the_configs_of_a_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recsys("init", tmp_path / "one", "--name", "of-my-own")
    monkeypatch.chdir(tmp_path / "one")
    capsys.readouterr()
    recsys("list", "configs")
    assert "  of-my-own " in capsys.readouterr().out


# --version and completion


def test_the_version_and_a_completion_need_no_torch() -> None:
    code = (
        "import sys; from recsys2stage.__main__ import main\n"
        "for option in ('--version', '--completion=bash'):\n    sys.argv = ['recsys', option]; main()\n"
        "sys.exit(bool({'torch', 'polars', 'jsonargparse'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"recsys2stage {__version__}\n# completion of recsys")


def test_the_version_is_said_by_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    recsys("--version")
    assert capsys.readouterr().out == f"recsys2stage {__version__}\n"


def test_completion_knows_every_command_and_its_options() -> None:
    table = completion.options()
    assert table.keys() == COMMANDS.keys() | {"fit", "validate", "test"}
    for verb, command in COMMANDS.items():
        assert set(table[verb]) - {"config", "print_config", "help"} == set(inspect.signature(command).parameters)
    assert table["evaluate"]["split"] == ("val", "test")
    assert table["prepare-data"]["tie_break"] == ("file_order", "item_id", "hash")
    assert table["mine-negatives"]["strict"] == ("true", "false")


def test_completion_names_options_that_a_fit_has() -> None:
    owners: dict[str, tuple[type, ...]] = {
        "trainer": (Trainer,),
        "checkpoint": (ModelCheckpoint,),
        "early_stopping": (EarlyStopping,),
        "last": (KeepLast,),
        "data.init_args": (Histories, Candidates),
        "model.init_args": (Retriever, Ranker),
    }
    for option in completion.TRAINING:
        group, _, name = option.rpartition(".")
        if group:
            assert any(name in inspect.signature(owner).parameters for owner in owners[group]), option


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["recsys", "pre"], ["prepare-data"]),
        (["recsys", "list", "s"], ["signals", "scorers", "sources"]),
        (["recsys", "evaluate", "--split", ""], ["val", "test"]),
        (["recsys", "init", "--template", "ta"], ["table"]),
        (["recsys", "fit", "--trainer.max"], ["--trainer.max_epochs"]),
        (["recsys", "fit", "--config", "a"], ["a.yaml"]),
    ],
)
def test_bash_completes(typed: list[str], offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    code = completion.bash_script() + (
        f"\nCOMP_WORDS=({' '.join(json.dumps(word) for word in typed)}); COMP_CWORD={len(typed) - 1}; _recsys\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.answer(["--completion", shell])
    shown = capsys.readouterr().out
    assert "export-bundle" in shown
    assert "tie_break" in shown


def test_an_unknown_shell_is_refused() -> None:
    with pytest.raises(SystemExit, match="--completion is 'tcsh', expected bash, zsh or fish; for bash put into"):
        completion.answer(["--completion", "tcsh"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("init shop --events a.csv", "init --folder shop --events a.csv"),
        ("init --events a.csv shop", "init --events a.csv --folder shop"),
        ("init --events=a.csv shop", "init --events=a.csv --folder shop"),
        ("list losses", "list --kind losses"),
        ("list", "list"),
        ("list --help", "list --help"),
        ("evaluate shop", "evaluate shop"),
    ],
)
def test_a_folder_and_a_kind_are_given_without_a_name(words: str, named: str) -> None:
    argv = ["recsys", *words.split()]
    completion.name_positional(argv)
    assert argv[1:] == named.split()
