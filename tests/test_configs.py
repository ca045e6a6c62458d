"""Every shipped config says what the signatures understand; the files are found, not listed."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_fixtures import recsys

from recsys2stage.retrieval import encoders
from recsys2stage.retrieval.losses import InfoNCE

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
VERBS = {
    "simulate": "simulate",
    "prepare": "prepare-data",
    "retriever": "fit",
    "index": "export-index",
    "mine": "mine-negatives",
    "ranker": "fit",
    "bundle": "export-bundle",
    "recommend": "recommend",
    "evaluate": "evaluate",
    "tune": "tune",
    "tune-retriever": "tune",
}
DATASETS = {"demo", "ml-20m", "ml-20m-plain", "ml-1m", "ml-1m-plain", "likes-ml-1m", "ml-latest-small", "amazon-beauty"}
DATASETS |= {"ml-1m-sessions", "ml-1m-time", "ml-1m-hash", "retail"}

shipped = sorted(path.relative_to(ROOT).as_posix() for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "with")
overlays = sorted(path.relative_to(ROOT).as_posix() for path in (CONFIGS / "with").glob("*.yaml"))
retrievers = [path for path in shipped if path.endswith("/retriever.yaml")]


def parsed(verb: str, configs: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the verb makes of configs, without running."""
    words = [word for config in configs for word in ("--config", config)]
    with pytest.raises(SystemExit) as end:
        recsys(verb, *words, "--print_config")
    shown = capsys.readouterr()
    assert end.value.code == 0, shown.err
    return yaml.safe_load(shown.out)


def said(config: Any, understood: Any, path: str = "") -> None:
    """Everything that a config says is among what was understood."""
    if isinstance(config, str) and isinstance(understood, dict):  # a class without options
        config = {"class_path": config}
    if isinstance(config, list) and isinstance(understood, list):
        assert len(config) == len(understood), path
        for place, (one, other) in enumerate(zip(config, understood, strict=True)):
            said(one, other, f"{path}[{place}]")
        return
    if not isinstance(config, dict):
        assert understood == config, path
        return
    for key, value in config.items():
        if key == "class_path":
            assert understood[key].rpartition(".")[2] == value.rpartition(".")[2], path
        elif isinstance(understood, dict):
            said(value, understood[key], f"{path}.{key}")
        else:
            pytest.fail(f"{path}: {understood!r}, the config says {config!r}")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_dataset_has_its_configs() -> None:
    assert {path.split("/")[1] for path in shipped} >= DATASETS
    for name in DATASETS:
        assert {f"configs/{name}/{stage}.yaml" for stage in ("prepare", "retriever", "ranker")} <= set(shipped)


@pytest.mark.parametrize("path", shipped)
def test_every_config_is_understood(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    assert config
    said(config, parsed(VERBS[Path(path).stem], [path], capsys))


# every overlay and every base at least once; all pairs would take minutes of parsing
PAIRS = [(retrievers[number % len(retrievers)], overlay) for number, overlay in enumerate(overlays)]


@pytest.mark.parametrize(("base", "overlay"), PAIRS)
def test_an_overlay_changes_what_it_says_and_nothing_else(
    base: str, overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a class is swapped, like-named options that nobody set are the new class's own, not the old one's."""
    understood = parsed("fit", [base, overlay], capsys)
    words = [yaml.safe_load(Path(path).read_text(encoding="utf-8")) for path in (base, overlay)]
    said(words[1], understood)
    encoder, set_by_somebody = understood["model"]["init_args"]["encoder"], set()
    for word in words:
        part = word.get("model", {}).get("init_args", {}).get("encoder", {})
        set_by_somebody |= set(part.get("init_args", {})) if isinstance(part, dict) else set()
    kind = getattr(encoders, encoder["class_path"].rpartition(".")[2])
    for name, option in inspect.signature(kind).parameters.items():
        if name in encoder["init_args"] and name not in set_by_somebody:
            got = encoder["init_args"][name]
            got = got["class_path"].rpartition(".")[2] if isinstance(got, dict) else got
            assert got == getattr(option.default, "__name__", option.default), name


def test_overlays_stack(capsys: pytest.CaptureFixture[str]) -> None:
    """The last word wins, in whichever encoder it finds."""
    words = [f"configs/with/{name}.yaml" for name in ("hstu", "request-time", "last-event")]
    config = parsed("fit", ["configs/ml-1m-plain/retriever.yaml", *words], capsys)
    assert config["model"]["init_args"]["encoder"]["class_path"].endswith(".HSTU")
    assert config["model"]["init_args"]["encoder"]["init_args"]["time"]["class_path"].endswith(".RequestGap")
    assert config["data"]["init_args"]["request_time"] == "last_event"


ABOUT_LOSSES = [path for path in overlays if "    loss:" in (ROOT / path).read_text(encoding="utf-8")]


@pytest.mark.parametrize("overlay", ABOUT_LOSSES)
@pytest.mark.parametrize("before", ["hard-negatives", "sampled-softmax", "gbce"])
def test_an_overlay_keeps_its_word_whatever_lies_below(
    before: str, overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where classes are the same, or options have the same names, those of the overlay below would live on."""
    alone = parsed("fit", ["configs/ml-1m-plain/retriever.yaml", overlay], capsys)
    stacked = parsed("fit", ["configs/ml-1m-plain/retriever.yaml", f"configs/with/{before}.yaml", overlay], capsys)
    assert stacked["model"]["init_args"]["loss"] == alone["model"]["init_args"]["loss"]


@pytest.mark.parametrize("path", shipped)
def test_a_config_points_into_the_folders_of_its_dataset(path: str) -> None:
    """A copied file whose paths were forgotten would overwrite another dataset's work."""
    name, stage = Path(path).parent.name, Path(path).stem
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    outputs = {"prepare": f"data/{name}", "retriever": f"runs/{name}/retriever", "ranker": f"runs/{name}/ranker"}
    if stage in outputs:
        assert config["output"] == outputs[stage]
    options = config.get("data", {}).get("init_args", {}) if isinstance(config.get("data"), dict) else {}
    if stage == "retriever":
        assert options["path"] == f"data/{name}"
        assert options["prepare"] == f"configs/{name}/prepare.yaml"
    if stage == "ranker":
        assert options["path"] == f"runs/{name}/candidates"
    others = DATASETS - {name}
    text = " ".join(line.split("#")[0] for line in Path(path).read_text(encoding="utf-8").splitlines())
    assert not [other for other in others if re.search(rf"(/|data/){other}(/|\s|,|$)", text)]


def test_a_config_that_says_too_much_would_be_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "ranker.yaml"
    wrong.write_text(Path("configs/demo/ranker.yaml").read_text().replace("id_dropout", "id_dorpout"))
    with pytest.raises(SystemExit) as end:
        recsys("fit", "--config", wrong, "--print_config")
    assert end.value.code == 2
    assert "id_dorpout" in capsys.readouterr().err


def test_ml_20m_is_the_choice_of_ml_1m_at_scale(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (parsed("fit", [f"configs/{name}/retriever.yaml"], capsys) for name in ("ml-1m", "ml-20m"))
    encoders = [config["model"]["init_args"]["encoder"] for config in (small, large)]
    assert encoders[0]["class_path"] == encoders[1]["class_path"]
    assert encoders[0]["init_args"]["time"] == encoders[1]["init_args"]["time"]
    for name in ("request_time", "max_length"):
        assert small["data"]["init_args"][name] == large["data"]["init_args"][name]
    for name in ("loss", "items", "similarity", "final_lr"):
        assert small["model"]["init_args"][name] == large["model"]["init_args"][name]


def test_ml_20m_plain_is_seed_000(capsys: pytest.CaptureFixture[str]) -> None:
    model = parsed("fit", ["configs/ml-20m-plain/retriever.yaml"], capsys)["model"]["init_args"]
    encoder = model["encoder"]["init_args"]
    assert model["dim"] == 256
    assert [encoder[name] for name in ("layers", "heads", "dropout")] == [4, 8, 0.1]
    assert encoder["feed_forward"] is None  # SwiGLU of four times the width
    assert model["optimizer"]["init_args"].get("weight_decay", 0) == 0
    loss = model["loss"] or {"init_args": vars(InfoNCE())}
    assert loss["init_args"]["temperature"] == 0.05
