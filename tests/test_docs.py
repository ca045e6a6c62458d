"""What the documentation shows runs: Python blocks are executed, commands and configs are parsed by the real parsers.

A block that cannot be checked stands below a comment that says why: <!-- not run: reason -->.
"""

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import yaml
from pipeline_fixtures import Run, recsys
from test_configs import said

from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: .{10,} -->\s*$")
VERBS = {"ranges": "tune", "source": "prepare-data", "signals": "mine-negatives", "miner": "mine-negatives"}
VERBS |= dict.fromkeys(("model", "data", "trainer"), "fit")
OTHER_COMMANDS = set(
    [
        "cd",
        "curl",
        "echo",
        "export",
        "pip",
        "pipx",
        "ls",
        "source",
        "kill",
        "tensorboard",
        "mlflow",
        "wandb",
        "ln",
        "docker",
    ]
)


class Block(NamedTuple):
    """A fenced block of a page, and the line of its first line."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if not NOT_RUN.search(text[: found.start()]):
            yield Block(page, text[: found.start(2)].count("\n") + 1, found[1], found[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
ELSEWHERE = {"onnx.md": "tests/serving/test_onnx.py"}  # pages that are run beside what they need
PYTHON = {
    page: [block for block in BLOCKS if block.page == page and block.language == "python"]
    for page in PAGES
    if page.name not in ELSEWHERE
}
YAML = [block for block in BLOCKS if block.language == "yaml"]


def commands_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands of shell blocks, and of code within sentences that begins with recsys or make."""
    for block in blocks_of(page):
        if block.language in ("bash", "sh", "shell", "console"):
            for line in re.sub(r"\\\n", " ", block.text).splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
                    words.pop(0)
                if words:
                    yield block.name, words
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for number, line in enumerate(re.findall(r"`((?:recsys|make) [^`]+)`", prose)):
        yield f"{page.name}, code {number} in the text", shlex.split(line.removesuffix(" …"))


COMMANDS = [(place, words) for page in PAGES for place, words in commands_of(page)]


def of_program(name: str) -> list[Any]:
    """The commands of a program, without its name, as test parameters."""
    of = [(place, words[1:]) for place, words in COMMANDS if Path(words[0]).name == name]
    return [pytest.param(words, id=f"{place} {' '.join(words)[:40]}") for place, words in of]


STAGES = ("retriever", "ranker")


@pytest.fixture(scope="module")
def workspace(raw: Path, informed: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the examples expect it: a small world, a small bundle, and fits of a few steps."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for path in (folder / f"configs/{name}/{stage}.yaml" for name in ("demo", "small") for stage in STAGES):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["trainer"] |= {"max_epochs": 2, "limit_train_batches": 2, "accelerator": "cpu"}
        if path.stem == "retriever":
            config["model"]["init_args"]["dim"] = 16
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copytree(folder / "configs/ml-1m", folder / "configs/mine")  # as the README says to begin
    shutil.copytree(raw, folder / "data/raw/demo")
    for dataset in ("ml-1m", "demo"):
        (folder / "runs" / dataset).mkdir(parents=True)
        (folder / "runs" / dataset / "bundle").symlink_to(informed.bundle)
        (folder / "data" / dataset).symlink_to(informed.data)
    return folder


def test_the_documentation_has_what_is_checked_here() -> None:
    assert {page.name for page, blocks in PYTHON.items() if blocks} >= {"README.md", "second_stage.md"}
    assert {block.page.name for block in YAML} >= {"README.md", "second_stage.md"}
    assert len(of_program("recsys")) > 15
    assert len(of_program("make")) > 5


@pytest.mark.parametrize("page", list(filter(PYTHON.get, PYTHON)), ids=lambda page: page.name)
def test_python_blocks_run(
    page: Path,
    workspace: Path,
    informed: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the order of the page, with the names of the blocks before."""
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(workspace)
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in PYTHON[page]:
        exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)
    if page.name == "README.md":
        shown = next(block.text for block in BLOCKS if block.page == page and block.language == "text")
        assert form_of(capsys.readouterr().out) == form_of(shown), "but for the numbers, which differ by processor"
    if page.name == "getting_started.md":
        found = names["recommender"].recommend(["50", "110", "32"], times=[978300760] * 3, request_time=978302268)
        assert found[0].keys() == {"item_id", "title", "score", "rank", "retriever_score"}
        assert (workspace / "runs/mine/bundle").is_dir()
    if page.name == "evaluation.md":
        dataset = Dataset(informed.data)
        one = Ragged(np.array([3]), np.array([0, 1]))
        (best,) = names["Newest"]().fit(dataset).best(one, one, 10)
        times = dataset.last_times[best]
        assert (np.diff(times) <= 0).all()
        assert times[0] == max(dataset.last_times[item] for item in range(1, dataset.num_items + 1) if item != 3)
    if page.name == "second_stage.md":
        dataset = Dataset(informed.data)
        signal = names["HourOfDay"]()
        signal.fit(dataset, np.zeros((dataset.num_items + 1, 4), np.float32))
        assert np.isfinite(signal.tables["lift"]).all()
        assert not signal.tables["lift"][0].any(), "as the text below the block says"


def form_of(printed: str) -> list[str]:
    """The words of printed lines without numbers and rules of tables, and without the hints of the command line."""
    lines = [line for line in printed.strip().splitlines() if not line.startswith("next: ")]
    return [" ".join(re.findall(r"[a-zA-Z_@]+|[:(),┆]", line)) for line in lines]


def test_the_readme_is_short_and_shows_the_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert "docs/page.png" in "".join(lines[:10])


@pytest.mark.parametrize("words", of_program("recsys"))
def test_commands_are_parsed_by_the_verb(
    words: list[str], workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    of_classes = [word for word in words if not word.startswith("$")]
    ends = [] if words[0].startswith("-") or words[0] in ("init", "list") else ["--print_config"]
    with pytest.raises(SystemExit) as end:
        recsys(*of_classes, *(ends or ["--help"]))
    assert end.value.code in (0, None), f"{end.value.code} {capsys.readouterr().err}"


def test_a_wrong_option_would_be_found(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        test_commands_are_parsed_by_the_verb(["evaluate", "--bundel", "runs/ml-1m"], workspace, monkeypatch, capsys)
    with pytest.raises(AssertionError):
        test_make_has_the_target_and_the_variables(["pipelin"])
    with pytest.raises(AssertionError):
        test_make_has_the_target_and_the_variables(["pipeline", "DATASETS=demo"])


RULES = "\n".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "Makefile", ROOT / "configs/pipeline.mk") if path.is_file()
)
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", RULES, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) \?=", RULES, re.MULTILINE))


@pytest.mark.parametrize("words", of_program("make"))
def test_make_has_the_target_and_the_variables(words: list[str]) -> None:
    for word in words:
        name, equals, value = word.partition("=")
        assert name in (VARIABLES if equals else TARGETS), word
        if name == "DATASET":
            assert (ROOT / "configs" / value).is_dir() or value in ("mine", "shop", "NAME"), word
        if name == "WITH":
            assert [one for one in value.split() if not (ROOT / f"configs/with/{one}.yaml").is_file()] == []


def test_other_commands_are_known_ones() -> None:
    """A misspelt program, or a script that is gone, is no command of ours and would not be checked above."""
    for place, words in COMMANDS:
        program = Path(words[0]).name
        if program in ("python", "python3"):
            assert words[1] == "-m" or (ROOT / words[1]).is_file(), place
        else:
            assert program in ("recsys", "make") or program in OTHER_COMMANDS, (place, words)


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.name)
def test_configs_are_understood(
    block: Block, workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    config = yaml.safe_load(block.text)
    verb = next((VERBS[key] for key in config if key in VERBS), None)
    assert verb is not None, f"{block.name}: of which verb? it has {list(config)}"
    (tmp_path / "block.yaml").write_text(block.text, encoding="utf-8")
    base = ("--config", "configs/ml-1m-plain/retriever.yaml") if verb == "fit" and "data" not in config else ()
    with pytest.raises(SystemExit) as end:
        recsys(verb, *base, "--config", tmp_path / "block.yaml", "--print_config")
    shown = capsys.readouterr()
    assert end.value.code == 0, shown.err
    said(config, yaml.safe_load(shown.out))


def test_the_prepare_config_of_the_readme_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of the columns that it names; and the split that the configs beside it expect."""
    text = next(block.text for block in YAML if block.page.name == "README.md" and "source:" in block.text)
    ours, theirs = (yaml.safe_load(one) for one in (text, (ROOT / "configs/ml-1m/prepare.yaml").read_text()))
    assert ours["split"] == theirs["split"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "events").mkdir()
    rows = [
        (f"c{user}", f"p{(user + step) % 15}", f"2024-05-{1 + step:02}T08:00:00Z", 1 + step % 5, "buy")
        for user in range(12)
        for step in range(9)
    ]
    columns = ["customer", "sku", "created_at", "stars", "event_type"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(tmp_path / "events/1.parquet")
    products = [f"p{item},Product {item},brand{item % 3},a|b,{item}.5" for item in range(15)]
    (tmp_path / "products.csv").write_text("\n".join(["sku,name,brand,tags,price", *products, ""]))
    customers = [f"c{user},NL,{20 + user}" for user in range(12)]
    (tmp_path / "customers.csv").write_text("\n".join(["customer,country,age", *customers, ""]))
    np.save(tmp_path / "embeddings.npy", np.ones((15, 3), np.float32))
    (tmp_path / "embedding_ids.txt").write_text("".join(f"p{item}\n" for item in range(15)))
    (tmp_path / "prepare.yaml").write_text(text.replace("/data/", f"{tmp_path}/"))
    with contextlib.redirect_stdout(io.StringIO()):
        recsys("prepare-data", "--config", tmp_path / "prepare.yaml")
    data = Dataset(tmp_path / "data/shop")
    assert data.manifest["counts"]["val_events"] == 5 * 12
    assert pl.read_parquet(tmp_path / "data/shop/items.parquet")["title"][0] == "Product 0"
    assert data.action_names == ["buy"]
