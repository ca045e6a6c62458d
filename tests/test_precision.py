"""Mixed precision: shipped configs train in bf16 with clipped gradients, and only where a GPU computes in it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from pipeline_fixtures import Run
from worlds import featured_world

from recsys2stage.cli import training
from recsys2stage.estimator import DEFAULTS
from recsys2stage.optim import RecsysAdamW

ROOT = Path(__file__).parent.parent
BASE = "configs/ml-1m-plain/retriever.yaml"
RETRIEVERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*/retriever.yaml"))
RANKERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*/ranker.yaml"))
OVERLAYS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs/with").glob("*.yaml"))
# one for each encoder, each family of losses, each tower and each kind of input; the others take a minute more
QUICK = {
    *("configs/ml-1m/retriever.yaml", "configs/likes-ml-1m/retriever.yaml", "configs/demo/ranker.yaml"),
    *(f"configs/with/{name}.yaml" for name in ("bert4rec", "esasrec", "fuxi", "mamba4rec", "sasrec", "taac")),
    *(
        f"configs/with/{name}.yaml"
        for name in ("full-softmax", "gbce", "norm-penalty", "skrec-regressor", "sparse-items")
    ),
}
SHORT = (  # two training steps and a validation step
    *("--trainer.gradient_clip_val=1", "--trainer.max_epochs=1"),
    *("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
)
SMALL = ("--model.init_args.dim=16", "--data.init_args.max_length=8", "--data.init_args.batch_size=8")


def some_slow(*paths: str) -> list[Any]:
    return [pytest.param(path, marks=[] if path in QUICK else pytest.mark.slow) for path in paths]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return featured_world(tmp_path_factory.mktemp("featured"))


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Trainer]:
    """`recsys fit` in bf16-mixed, for two steps; gives the trainer."""
    monkeypatch.chdir(ROOT)
    trainers: list[Trainer] = []
    original = training.LightningCLI.instantiate_trainer

    def instantiate(self: training.LightningCLI, **options: Any) -> Trainer:
        trainers.append(original(self, **options))
        return trainers[-1]

    monkeypatch.setattr(training.LightningCLI, "instantiate_trainer", instantiate)

    def run(*options: str, precision: str | None = "bf16-mixed", accelerator: str = "cpu") -> Trainer:
        given = [] if precision is None else [f"--trainer.precision={precision}"]
        given += [f"--trainer.accelerator={accelerator}", f"--output={tmp_path / 'fit'}"]
        training.train("fit", [*options, *SHORT, *given])  # the last word wins
        return trainers[-1]

    return run


def trained_in_bf16(trainer: Trainer, measured: str) -> None:
    assert trainer.precision == "bf16-mixed"
    assert trainer.global_step == 2
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))
    assert 0 <= float(trainer.callback_metrics[measured]) <= 1


@pytest.mark.parametrize("config", some_slow(*RETRIEVERS))
def test_every_retriever_trains_in_bf16_with_clipped_gradients(
    config: str, fit: Callable[..., Trainer], world: Path
) -> None:
    trainer = fit(f"--config={config}", *SMALL, f"--data.init_args.path={world}")
    trained_in_bf16(trainer, "val/ndcg@10")


@pytest.mark.parametrize("overlay", some_slow(*OVERLAYS))
def test_every_overlay_trains_in_bf16_with_clipped_gradients(
    overlay: str, fit: Callable[..., Trainer], world: Path
) -> None:
    trainer = fit(f"--config={BASE}", f"--config={overlay}", *SMALL, f"--data.init_args.path={world}")
    trained_in_bf16(trainer, "val/ndcg@10")


@pytest.mark.parametrize("config", some_slow(*RANKERS))
def test_every_ranker_trains_in_bf16_with_clipped_gradients(
    config: str, fit: Callable[..., Trainer], informed: Run
) -> None:
    trainer = fit(f"--config={config}", "--data.init_args.batch_size=8", f"--data.init_args.path={informed.candidates}")
    trained_in_bf16(trainer, "val/ndcg@10")


@pytest.mark.parametrize("stage", ["retriever", "ranker"])
def test_the_defaults_of_the_estimator_train_in_bf16(
    stage: str, fit: Callable[..., Trainer], world: Path, informed: Run
) -> None:
    path = {"retriever": world, "ranker": informed.candidates}[stage]
    options = ("--data.init_args.batch_size=8", f"--data.init_args.path={path}")
    trained_in_bf16(fit(*DEFAULTS[stage], *options), "val/ndcg@10")


@pytest.mark.parametrize("scorer", ["DIN", "DCN", "MoL"])
def test_other_scorers_train_in_bf16(scorer: str, fit: Callable[..., Trainer], informed: Run) -> None:
    path = ("--data.init_args.batch_size=8", f"--data.init_args.path={informed.candidates}")
    trained_in_bf16(fit(*DEFAULTS["ranker"], f"--model.init_args.scorer={scorer}", *path), "val/ndcg@10")


def test_float16_gradients_are_unscaled_once_and_then_clipped() -> None:
    """With a GradScaler, as 16-mixed has it on a GPU, a fused step finds gradients of norm 1."""

    class Line(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))
            self.found: list[torch.Tensor] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return (self.weight * batch).sum()

        def on_train_batch_end(self, *_: object) -> None:
            assert self.weight.grad is not None
            self.found.append(self.weight.grad.clone())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return RecsysAdamW(self.parameters(), lr=0.1)

    model, scaler = Line(), torch.amp.GradScaler("cpu", init_scale=4096.0)
    Trainer(
        plugins=MixedPrecision("16-mixed", "cpu", scaler),
        gradient_clip_val=1.0,
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, torch.tensor([[3.0, 0.0, -4.0]] * 2))
    for gradient in model.found:  # Lightning's clipping adds 1e-6 to the norm
        torch.testing.assert_close(gradient, torch.tensor([0.6, 0.0, -0.8]), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([0.8, 1.0, 1.2]), rtol=1e-5, atol=0)  # two of lr


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: bool = False, bf16: bool = False, mps: bool = False) -> None:
    """A machine with other accelerators, as torch and Lightning describe it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)  # bf16 is emulated before Ampere
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: cuda))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: mps))


@pytest.mark.parametrize(
    ("accelerator", "cuda", "bf16", "expected"),
    [
        ("auto", True, True, True),
        ("gpu", True, True, True),
        ("cuda", True, True, True),
        ("cpu", True, True, False),
        ("auto", True, False, False),
        ("auto", False, False, False),
        ("cpu", False, False, False),
    ],
)
def test_bf16_is_chosen_for_a_gpu_that_computes_in_it(
    accelerator: str, cuda: bool, bf16: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cuda, bf16)
    assert training.computes_in_bf16(accelerator) == expected


def test_a_fit_on_the_cpu_of_a_machine_with_a_gpu_is_in_float32(
    fit: Callable[..., Trainer], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cuda=True, bf16=True)
    trainer = fit(f"--config={BASE}", *SMALL, f"--data.init_args.path={world}", precision=None)
    assert trainer.precision == "32-true"


def test_apples_gpus_are_not_used(
    fit: Callable[..., Trainer], world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They have no float64, in which metrics are summed and times compared."""
    pretend(monkeypatch, mps=True)
    options = (f"--config={BASE}", *SMALL, f"--data.init_args.path={world}")
    trainer = fit(*options, precision=None, accelerator="auto")
    assert trainer.precision == "32-true"
    assert isinstance(trainer.accelerator, CPUAccelerator)
    assert "MPS has no float64" in caplog.text
    with pytest.raises(ValueError, match=r"use --trainer\.accelerator cpu"):
        fit(*options, precision=None, accelerator="mps")
