"""A fit that is killed and taken up from last.ckpt ends with the very weights of one that was left alone."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from recsys2stage.cli.main import main
from recsys2stage.retrieval.retriever import Retriever

STEPS, EPOCHS = 8, 4  # 120 windows in batches of 16

# a process that imports torch once, and forks a copy for each fit that is killed
KILLED = """
import os, signal, sys
from recsys2stage.cli.main import main
from recsys2stage.cli.training import train
from recsys2stage.retrieval.retriever import Retriever

def fit(step, argv):
    def kill(model, outputs, batch, batch_idx):
        if model.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Retriever.on_train_batch_end = kill
    sys.argv = argv
    main()

for step, argv in {fits!r}:
    process = os.fork()
    if not process:
        fit(step, argv)
        sys.exit()
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
"""


class Kill(NamedTuple):
    step: int  # the last step that is taken
    saved: int  # the step of last.ckpt then
    options: tuple[str, ...] = ()


KILLS = {
    "in the third epoch": Kill(step=2 * STEPS + 3, saved=2 * STEPS),
    "in mid-epoch, saved in mid-epoch": Kill(STEPS + 7, STEPS + 4, ("--last.every_n_train_steps=4",)),
}


def argv(cycle: Path, output: Path, *options: str) -> list[str]:
    """`recsys fit` of a small model with much dropout."""
    config = output.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f"""
seed_everything: 7
output: {output}
trainer:
  max_epochs: {EPOCHS}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: {STEPS}
model:
  class_path: Retriever
  init_args:
    dim: 16
    warmup_steps: 20
    encoder: {{class_path: Transformer, init_args: {{layers: 1, dropout: 0.3}}}}
data: {{class_path: Histories, init_args: {{path: {cycle}, max_length: 12, batch_size: 16}}}}
""")
    return ["recsys", "fit", "--config", str(config), *options]


def fit(cycle: Path, output: Path, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv(cycle, output, *options))
        main()


def last(output: Path) -> dict[str, Any]:
    return torch.load(output / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def unbroken(cycle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "retriever"
    fit(cycle, output)
    return output


@pytest.fixture(scope="module")
def killed(cycle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is left of fits that got SIGKILL."""
    folder = tmp_path_factory.mktemp("killed")
    left = {name: folder / f"run{number}" for number, name in enumerate(KILLS)}
    fits = [(kill.step, argv(cycle, left[name], *kill.options)) for name, kill in KILLS.items()]
    words = [sys.executable, "-c", KILLED.format(fits=fits)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return left


def tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(part, f"{path}.{key}")


@pytest.mark.parametrize("name", list(KILLS))
def test_killed_and_resumed_equals_unbroken(name: str, cycle: Path, killed: dict[str, Path], unbroken: Path) -> None:
    output, kill = killed[name], KILLS[name]
    before = last(output)
    assert before["global_step"] == kill.saved
    if kill.saved % STEPS:
        place = {"epoch": kill.saved // STEPS, "next": kill.saved % STEPS, "batches": STEPS}
        assert before["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [place]
    assert not (output / "manifest.json").exists(), "only a fit that came to its end is signed"

    fit(cycle, output, "--ckpt_path", str(output / "last.ckpt"), *kill.options)
    ours, theirs = last(output), last(unbroken)
    assert ours["global_step"] == theirs["global_step"] == STEPS * EPOCHS
    assert ours["epoch"] == theirs["epoch"] == EPOCHS - 1
    for part in ("state_dict", "optimizer_states"):
        resumed, alone = dict(tensors(ours[part])), dict(tensors(theirs[part]))
        assert resumed.keys() == alone.keys()
        different = [key for key in alone if not torch.equal(resumed[key], alone[key])]
        assert not different, part
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]

    best, best_alone = (torch.load(folder / "best.ckpt", weights_only=True) for folder in (output, unbroken))
    assert best["global_step"] == best_alone["global_step"]
    for key, weight in best_alone["state_dict"].items():
        assert torch.equal(best["state_dict"][key], weight), key
    signed, signed_alone = (json.loads((folder / "manifest.json").read_text()) for folder in (output, unbroken))
    for fact in ("best", "epochs", "steps", "parameters", "monitor"):
        assert signed[fact] == signed_alone[fact], fact
    # and the weights did move after the kill
    assert not torch.equal(
        before["state_dict"]["towers.items.table.weight"], ours["state_dict"]["towers.items.table.weight"]
    )


class Broken(Exception):
    """Ends a fit as a kill does: nothing is written any more."""


def broken_after(batches: int) -> Callable[..., None]:
    """A hook that breaks a fit off after so many batches."""

    def hook(model: Retriever, outputs: Any, batch: Any, batch_idx: int) -> None:
        if model.trainer.fit_loop.epoch_loop.total_batch_idx + 1 == batches:
            raise Broken

    return hook


@pytest.mark.parametrize(
    ("options", "batches", "saved"),
    [
        # 3 + 3 + 2 batches make the steps of an epoch; between batches of one step nothing is saved
        (("--trainer.accumulate_grad_batches=3", "--last.every_n_train_steps=1"), STEPS + 5, 4),
        (("--trainer.accumulate_grad_batches=3", "--last.every_n_train_steps=2"), 7, 2),
        # epochs that end before their plan does
        (("--trainer.limit_train_batches=3",), 4, 3),
        (("--trainer.limit_train_batches=5", "--last.every_n_train_steps=2"), 9, 8),
        # an end in steps, resumed from the end of an epoch
        ((f"--trainer.max_steps={STEPS + 5}",), STEPS + 1, STEPS),
    ],
)
def test_broken_off_and_resumed_equals_unbroken(
    cycle: Path, tmp_path: Path, options: tuple[str, ...], batches: int, saved: int
) -> None:
    options = (*options, "--trainer.max_epochs=2")
    fit(cycle, tmp_path / "whole", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Retriever, "on_train_batch_end", broken_after(batches))
        with pytest.raises(Broken):
            fit(cycle, tmp_path / "broken", *options)
    assert last(tmp_path / "broken")["global_step"] == saved
    fit(cycle, tmp_path / "broken", *options, f"--ckpt_path={tmp_path / 'broken/last.ckpt'}")
    ours, theirs = last(tmp_path / "broken"), last(tmp_path / "whole")
    assert ours["global_step"] == theirs["global_step"]
    for name, weight in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], weight), name
    signed, alone = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("broken", "whole"))
    assert {fact: signed[fact] for fact in ("best", "epochs", "steps")} == {
        fact: alone[fact] for fact in ("best", "epochs", "steps")
    }


def test_another_seed_ends_elsewhere(cycle: Path, unbroken: Path, tmp_path: Path) -> None:
    """So the equality above says something about order of batches and dropout."""
    fit(cycle, tmp_path / "again")
    fit(cycle, tmp_path / "other", "--seed_everything=8")
    want = last(unbroken)["state_dict"]["towers.items.table.weight"]
    assert torch.equal(last(tmp_path / "again")["state_dict"]["towers.items.table.weight"], want)
    assert not torch.equal(last(tmp_path / "other")["state_dict"]["towers.items.table.weight"], want)
