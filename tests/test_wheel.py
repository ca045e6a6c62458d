"""The package without its checkout: what the wheel holds, and that a project made by it runs on it alone."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest
from warm import warm

from recsys2stage.data.simulate import simulate

ROOT = Path(__file__).parent.parent
PURELIB = Path(sysconfig.get_path("purelib"))

pytestmark = pytest.mark.skipif(
    find_spec("hatchling") is None or find_spec("pip") is None,
    reason="building the wheel without an index needs hatchling and pip in this environment: pip install -e .[dev]",
)


def run(*words: object, cwd: Path) -> str:
    """A command outside the checkout; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with this wheel; torch and the others come from the running one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    offline = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=folder.parent)
    # not a site folder of the new environment: the .pth file of the checkout's own installation is not read there
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent).strip())
    (site / "borrowed.pth").write_text(f"{PURELIB}\n")
    return python


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("user") / "venv", wheel)


def test_the_wheel_holds_the_package_and_all_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recsys2stage").rglob("*.py")}
    configs = {f"recsys2stage/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recsys2stage/serving/page").iterdir()}
    assert names == code | configs | page | {"recsys2stage/py.typed"}
    assert {"serve", "tensorboard", "dev"} <= set(re.findall(r"^Provides-Extra: (\w+)", metadata, re.MULTILINE))


def test_a_wheel_can_be_built_of_the_source_distribution(tmp_path: Path, wheel: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=source)
    with zipfile.ZipFile(tmp_path / "dist" / wheel.name) as again, zipfile.ZipFile(wheel) as first:
        assert {name: again.read(name) for name in again.namelist() if "/RECORD" not in name} == {
            name: first.read(name) for name in first.namelist() if "/RECORD" not in name
        }


def test_an_editable_installation_reads_the_checkout(tmp_path: Path) -> None:
    build = "import sys, hatchling.build; print(hatchling.build.build_editable(sys.argv[1]))"
    name = run(sys.executable, "-c", build, tmp_path, cwd=ROOT).strip()
    python = environment(tmp_path / "venv", tmp_path / name)
    code = "from recsys2stage.cli import configs; print(configs.__file__, configs.shipped_configs())"
    said = run(python, "-c", code, cwd=tmp_path).split()
    assert said == [str(ROOT / "recsys2stage/cli/configs.py"), str(ROOT / "configs")]


def check_it_is_the_wheel(python: Path, cwd: Path) -> None:
    code = "import recsys2stage; from recsys2stage.cli.configs import shipped_configs\n"
    code += "print(recsys2stage.__file__, shipped_configs(), sep='\\n')"
    for path in run(python, "-c", code, cwd=cwd).splitlines():
        assert Path(path).is_relative_to(python.parents[1])
        assert not Path(path).is_relative_to(ROOT)


def shrink(project: Path, name: str) -> None:
    """One epoch a stage: what is tested is that every stage finds what it needs."""
    for stage in ("retriever", "ranker"):
        path = project / f"configs/{name}/{stage}.yaml"
        path.write_text(re.sub(r"max_epochs: \d+", "max_epochs: 1", path.read_text()))


def test_the_demo_runs_in_a_project_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    check_it_is_the_wheel(installed, tmp_path)
    recsys = installed.with_name("recsys")
    assert run(recsys, "--version", cwd=tmp_path) == run(installed, "-m", "recsys2stage", "--version", cwd=tmp_path)
    run(recsys, "init", "demo-project", "--template", "demo", cwd=tmp_path)
    project = tmp_path / "demo-project"
    shrink(project, "demo")
    simulate(project / "data/raw/demo", users=60, items=50, events=800)  # a smaller log than that of make
    with warm(installed, tmp_path) as program:
        run("make", "pipeline", f"RECSYS={program}", cwd=project)
    report = json.loads((project / "runs/demo/report.json").read_text())
    assert report["users"] == 60
    assert {"retriever", "ranker", "popularity"} <= report["models"].keys()
    lists = pl.read_parquet(project / "runs/demo/recommendations.parquet")
    assert lists["user_id"].n_unique() == 60
    assert str(ROOT) not in (project / "runs/demo/bundle/manifest.json").read_text()


@pytest.mark.slow  # each stage by the program of the environment, as users start it
def test_a_table_of_one_s_own_runs_in_a_project_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    check_it_is_the_wheel(installed, tmp_path)
    rows = ["Client No;Article;bought at"]
    for user in range(60):
        for number in range(12):
            rows.append(f"K-{user:03d};A{(user * 3 + number) % 40:03d};2024-{number + 1:02d}-{user % 28 + 1:02d} 10:00")
    (tmp_path / "own.csv").write_text("\n".join(rows) + "\n")
    shown = run(
        installed.with_name("recsys"), "init", "own", "--template", "table", "--events", "own.csv", cwd=tmp_path
    )
    assert "QUESTION" not in shown
    project = tmp_path / "own"
    shrink(project, "own")
    run("make", "pipeline", cwd=project)
    lists = pl.read_parquet(project / "runs/own/recommendations.parquet")
    assert lists["user_id"].n_unique() == 60
    assert lists["item_id"].str.starts_with("A").all()
    assert lists["user_id"].str.starts_with("K-").all()
