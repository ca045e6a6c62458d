"""The model card: equal to manifest and report, outside the bundle's identity, and without markup from data."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from pipeline_fixtures import K, Run, recsys

from recsys2stage.artifacts import fingerprint
from recsys2stage.data.dataset import Dataset
from recsys2stage.estimator import TwoStageRecommender
from recsys2stage.evaluation import card
from recsys2stage.evaluation.card import Evaluation, complete_card, model_card, write_card
from recsys2stage.evaluation.card_model import code
from recsys2stage.recommender import Recommender

HOSTILE = "<script>alert(1)</script> [x](javascript:x) `**` | \n<!-- end of evaluation -->\n# head\u202e"


@pytest.fixture(scope="module")
def evaluated(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the bundle and its report."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained.bundle, folder / "bundle")
    write_card(folder / "bundle", Dataset(trained.data))  # whatever other tests have evaluated
    words = ("--data", trained.data, "--plots", "false", "--resamples", 200)
    recsys("evaluate", "--bundle", folder / "bundle", *words)
    return folder


@pytest.fixture
def bundle(informed: Run, tmp_path: Path) -> Path:
    """A copy of the bundle, with a card that is not evaluated."""
    folder = shutil.copytree(informed.bundle, tmp_path / "bundle")
    write_card(folder, Dataset(informed.data))
    return folder


@pytest.fixture(scope="module")
def report(evaluated: Path) -> dict[str, Any]:
    return json.loads((evaluated / "report.json").read_text(encoding="utf-8"))


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def evaluation_of(report: dict[str, Any], evaluated: str, users: int) -> Evaluation:
    return Evaluation(
        report | {"users": users, "protocol": report["protocol"] | {"evaluated": evaluated}}, "protocol: x"
    )


def rows_of(text: str, head: str) -> dict[str, list[str]]:
    """The table whose first head is `head`: first cell -> other cells."""
    lines = text[text.index(f"\n| {head} ") :].lstrip("\n").split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows[2:]}


def python_of(text: str, folder: Path) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return block.replace("BUNDLE", str(folder))


def test_before_an_evaluation_the_card_says_so_and_counts_what_the_data_hold(informed: Run, bundle: Path) -> None:
    text, dataset = text_of(bundle), Dataset(informed.data)
    assert "Not evaluated yet" in text
    times = np.asarray(dataset.times)
    span = [time.strftime("%Y-%m-%d", time.gmtime(int(seconds))) for seconds in (times.min(), times.max())]
    assert f"{span[0]} to {span[1]}" in text
    assert f"{dataset.num_users:,} users, {dataset.num_items:,} items, {len(dataset.items):,} events" in text
    assert f"{int((dataset.train_counts[1:] == 0).sum()):,} of {dataset.num_items:,} items have no training" in text
    for told in ("`Transformer`", "`DIN`", "`Transitions` (", "`LeaveOneOut`, `val=3`", f"{K:,} candidates"):
        assert told in text
    assert "time of the target event as the request time" in text
    assert str(fingerprint(bundle)) in text


def test_every_verb_that_exports_writes_a_card_without_a_checksum(informed: Run, trained: Run) -> None:
    for run in (informed, trained):
        for folder in (run.index, run.bundle):
            assert (folder / "README.md").is_file()
            assert "README.md" not in json.loads((folder / "manifest.json").read_text())["files"]
    first, both = text_of(trained.index), text_of(trained.bundle)
    assert "first stage only" in first
    assert "Ranker:" not in first
    assert "scorer `MLP`" in both


def test_the_evaluated_card_holds_the_numbers_of_the_report(evaluated: Path, report: dict[str, Any]) -> None:
    text = text_of(evaluated / "bundle")
    metrics = ["hr@10", "ndcg@10", "mrr", "recall@100"]
    table = rows_of(text, "model")
    assert list(table) == ["popularity", "markov", "transition graph", "retriever", "ranker", "ranker, ids masked"]
    for name, model in report["models"].items():
        want = [f"{model[m]['value']:.4f} [{model[m]['low']:.4f}, {model[m]['high']:.4f}]" for m in metrics]
        assert table[name.replace("_ids", ", ids").replace("_", " ")] == want
    found = rows_of(text, "ranker − retriever")["NDCG@10"]
    d = report["comparison"]["ndcg@10"]
    assert found[0] == f"{d['difference']:+.4f}"
    assert found[1] == f"[{d['low']:+.4f}, {d['high']:+.4f}]"
    assert found[3] == f"{d['p']:.4f}"
    shown = {name: groups for name, groups in report["cohorts"].items() if name != "gap_to_request"}
    for cohort, groups in (shown | {"time_since_the_event_before": report["by_gap"]}).items():
        cells = rows_of(text, cohort.replace("_", " "))
        assert {label: row[0] for label, row in cells.items()} == {k: f"{v['users']:,}" for k, v in groups.items()}
    assert f"{report['candidates']['recall']:.4f} of the targets" in text
    assert "Not evaluated yet" not in text
    line = (evaluated / "report.md").read_text(encoding="utf-8").split("\n\n")[1]
    assert line.removeprefix("p") in text


def test_an_evaluation_changes_neither_identity_nor_what_is_loaded(trained: Run, evaluated: Path) -> None:
    assert fingerprint(evaluated / "bundle") == fingerprint(trained.bundle)
    Recommender.load(evaluated / "bundle")


@pytest.mark.parametrize("change", ["removed", "edited", "foreign"])
def test_a_bundle_loads_without_a_card_and_with_a_changed_one(change: str, bundle: Path) -> None:
    if change == "removed":
        (bundle / "README.md").unlink()
    else:
        (bundle / "README.md").write_text("mine" if change == "foreign" else text_of(bundle) + "\nA note.\n")
    Recommender.load(bundle)


def test_only_the_card_of_the_folder_itself_has_no_checksum(bundle: Path) -> None:
    (bundle / "signals/README.md").write_text("hidden")
    with pytest.raises(ValueError, match="not listed"):
        Recommender.load(bundle)


@pytest.mark.parametrize("stage", ["index", "bundle"])
@pytest.mark.parametrize("run", ["trained", "informed"])
def test_its_python_code_recommends(run: str, stage: str, request: pytest.FixtureRequest) -> None:
    folder = getattr(request.getfixturevalue(run), stage)
    names: dict[str, Any] = {}
    exec(python_of(text_of(folder), folder).replace("recommender.recommend(", "found = recommender.recommend("), names)
    assert [row["rank"] for row in names["found"]] == list(range(1, 11))


def test_what_people_wrote_into_the_card_stays(bundle: Path, informed: Run, report: dict[str, Any]) -> None:
    (bundle / "README.md").write_text(
        text_of(bundle).replace("## Limits\n", "## Limits\n\nNot for minors.\n") + "Bye.\n"
    )
    before = text_of(bundle)
    complete_card(bundle, fingerprint(bundle), Dataset(informed.data), Evaluation(report, "protocol: x"))
    after = text_of(bundle)
    assert after != before
    cut = re.compile(r"<!-- evaluation: .*?<!-- end of evaluation -->", re.DOTALL)
    assert cut.sub("", after) == cut.sub("", before)


def test_a_card_of_other_origin_stays_and_one_of_another_model_or_none_is_written(
    bundle: Path, informed: Run, report: dict[str, Any]
) -> None:
    identity, dataset, measured = fingerprint(bundle), Dataset(informed.data), Evaluation(report, "protocol: x")
    (bundle / "README.md").write_text("# Ours\n")
    assert "not a card of this package" in complete_card(bundle, identity, dataset, measured)
    assert text_of(bundle) == "# Ours\n"
    for old in (None, text_of(informed.index)):
        (bundle / "README.md").unlink()
        if old is not None:
            (bundle / "README.md").write_text(old)
        assert complete_card(bundle, identity, dataset, measured) == str(bundle / "README.md")
        assert text_of(bundle) == model_card(bundle, dataset, measured)


def test_validation_targets_and_fewer_users_do_not_replace_the_test(
    bundle: Path, informed: Run, report: dict[str, Any]
) -> None:
    identity, dataset = fingerprint(bundle), Dataset(informed.data)

    def shown(evaluated: str, users: int) -> str:
        complete_card(bundle, identity, dataset, evaluation_of(report, evaluated, users))
        return re.findall(r"<!-- evaluation: (.*) users -->", text_of(bundle))[0]

    steps = [("val", 5), ("test", 3), ("val", 9), ("test", 2), ("test", 4)]
    want = ["val targets of 5", "test targets of 3", "test targets of 3", "test targets of 3", "test targets of 4"]
    assert [shown(*step) for step in steps] == want


def test_a_sampled_protocol_leaves_the_card(evaluated: Path, trained: Run, tmp_path: Path) -> None:
    before = text_of(evaluated / "bundle")
    of = ("--bundle", evaluated / "bundle", "--data", trained.data, "--output", tmp_path)
    recsys("evaluate", *of, "--protocol", "sampled-10", "--users", 20, "--resamples", 10)
    assert text_of(evaluated / "bundle") == before


def test_a_bundle_that_was_replaced_or_cannot_be_written_keeps_its_card(
    bundle: Path, informed: Run, report: dict[str, Any]
) -> None:
    before, dataset, measured = text_of(bundle), Dataset(informed.data), Evaluation(report, "protocol: x")
    assert "was replaced" in complete_card(bundle, "0" * 64, dataset, measured)
    with mock.patch.object(card, "atomic_write", side_effect=PermissionError("read only")):
        assert "read only" in complete_card(bundle, fingerprint(bundle), dataset, measured)
    assert text_of(bundle) == before


def test_data_that_were_not_found_are_added_by_the_evaluation(
    bundle: Path, informed: Run, report: dict[str, Any]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["parents"]["data"] |= {"path": str(bundle / "nowhere"), "relative": "nowhere"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    write_card(bundle)
    assert "were not found" in text_of(bundle)
    complete_card(bundle, fingerprint(bundle), Dataset(informed.data), Evaluation(report, "protocol: x"))
    assert "were not found" not in text_of(bundle)
    assert "Time span" in text_of(bundle)


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "no")])
def test_the_difference_is_read_by_its_interval(low: float, high: float, verdict: str, report: dict[str, Any]) -> None:
    difference = report["comparison"]["ndcg@10"] | {"low": low, "high": high}
    changed = report | {"comparison": report["comparison"] | {"ndcg@10": difference}}
    section = card.evaluation_section(Evaluation(changed, "protocol: x"))
    told = {"better": "is better", "worse": "is worse", "no": "no difference is shown"}
    assert [word for word in told if told[word] in section] == [verdict]


def test_names_from_data_are_never_markup(bundle: Path, informed: Run, report: dict[str, Any]) -> None:
    """Code spans and fenced code are taken out; what is left are the package's own words."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["parents"]["data"]["path"] = f"/x/{HOSTILE.replace('/', '')}"
    manifest |= {"actions": [HOSTILE], "next_action": "target", "created": HOSTILE, "split_hash": HOSTILE}
    manifest["reranker"]["features"] = [{"name": HOSTILE}]
    manifest["reranker"]["scorer"] = {"class_path": f"{HOSTILE}.{HOSTILE}", "init_args": {HOSTILE: HOSTILE}}
    manifest["towers"]["encoder"] = {"class_path": HOSTILE, "init_args": {HOSTILE: [{"class_path": HOSTILE}]}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    dataset = Dataset(informed.data)
    dataset.path = Path(HOSTILE)
    dataset.manifest["actions"] = [HOSTILE]
    dataset.manifest["inputs"] = [HOSTILE]
    dataset.manifest["features"]["items"] = [{"name": HOSTILE}]
    text = model_card(bundle, dataset, Evaluation(report, "protocol: x"))
    quoted = card.evaluation_section(Evaluation(report, f"protocol: {HOSTILE}"))
    assert r"&lt;script>alert(1)&lt;/script> \[x](javascript:x) \`\*\*\` |  &lt;!-- end of" in quoted
    assert text.count("`&lt;") + text.count("`<script>") > 5  # they are there, as code
    left = re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    left = re.sub(r"`[^`\n]+`", "", left)
    for word in ("script", "](", "# head", "**", "\u202e", "`", "alert"):
        assert word not in left
    comments = re.findall(r"^<!-- (\w+)", text, re.MULTILINE)
    assert comments == ["recsys2stage", "data", "end", "evaluation", "end"]


def test_a_name_as_code_stays_on_one_line_and_short() -> None:
    assert code("a`b|c\nd\u200be") == "`a'b¦c d e`"
    assert code("") == "(empty)"
    assert len(code("x" * 1000)) < 100


def test_classes_of_other_modules_are_named_with_the_way_to_allow_them(bundle: Path) -> None:
    assert "--trust" not in text_of(bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["reranker"]["scorer"] = {"class_path": "my_parts.Mine", "init_args": {}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    write_card(bundle)
    assert "`my_parts`. If you trust their code, allow them by `--trust`" in text_of(bundle)


def test_a_saved_model_brings_its_card_and_completes_it(trained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "fitted"
    shutil.copytree(trained.bundle, folder / "bundle")
    shutil.copytree(trained.data, folder / "data")
    write_card(folder / "bundle", Dataset(trained.data))
    made = {"kind": "model", "format": 1, "options": {}, "parents": {}, "pandas": False}
    (folder / "manifest.json").write_text(json.dumps(made))
    model = TwoStageRecommender.load(folder)
    model.save(tmp_path / "saved")
    assert text_of(tmp_path / "saved/bundle") == text_of(folder / "bundle")
    metrics = TwoStageRecommender.load(tmp_path / "saved").evaluate()
    value = metrics["models"]["ranker"]["ndcg@10"]["value"]
    assert f"{value:.4f} [" in rows_of(text_of(tmp_path / "saved/bundle"), "model")["ranker"][1]
