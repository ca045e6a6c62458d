"""Optimizers, learning-rate schedule and base LightningModule of both stages."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recsys2stage import __version__
from recsys2stage.artifacts import check_format
from recsys2stage.checkpoints import OPTIONS, SPLIT, VERSIONS, add_metadata, load_checkpoint, trained_until
from recsys2stage.options import Until, check_integer, check_number, is_number
from recsys2stage.processes import average_sparse, num_processes
from recsys2stage.trust import arguments, trusting


class RecsysAdamW(torch.optim.AdamW):
    """AdamW as in nanoRecSys: β₂ = 0.98 and no weight decay.

    Args:
        params: parameters or parameter groups.
        lr: learning rate after warm-up.
        betas: decay rates of the first and second moment.
        weight_decay: decoupled weight decay.
    """

    rowwise: ClassVar[bool] = False  # whether item tables are to have sparse gradients and are updated by rows

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        check_number("lr", lr, low=0, high=1e3, example=1e-3)
        check_number("weight_decay", weight_decay, low=0, high=1e3, example=0.01)
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not (pair and all(is_number(beta) and 0 <= beta < 1 for beta in betas)):
            raise ValueError(
                f"betas is {betas!r}, expected two numbers from 0 to below 1; set betas to [0.9, 0.98], for example"
            )
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        # a fused step can unscale float16 gradients itself, and Lightning then refuses to clip them; with this flag off
        # they are unscaled before the step, as for any other optimizer; bf16 needs no scaling
        self._step_supports_amp_scaling = False


class RowwiseOptimizer(RecsysAdamW, ABC):
    """Updates only those rows of item tables that have a gradient; AdamW updates all other parameters.

    A step then costs the same however many items there are. Item tables are the parameters of groups with
    `rowwise: true`, and all parameters with a sparse gradient. Subclasses define `update_rows`.

    What differs from an optimizer of the whole table: rows without a gradient stay as they are. Their moments do not
    decay, momentum does not move them on, and weight decay does not shrink them.

    Args:
        params: parameters or parameter groups.
        lr: learning rate after warm-up.
        betas: decay rates of the first and second moment.
        weight_decay: decoupled weight decay; of a row, at each of its updates.
        table_lr: learning rate of the item tables after warm-up.
    """

    rowwise = True

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float, table_lr: float
    ) -> None:
        super().__init__(params, lr, betas, weight_decay)
        for group in self.param_groups:
            group["rowwise"] = group.get("rowwise") and type(self).__name__  # names the state in a checkpoint
            if group["rowwise"]:
                group["lr"] = table_lr

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters.

        Args:
            closure: computes the gradients and returns the loss; None: they are there.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hidden: list[tuple[Tensor, Tensor]] = []  # gradients that AdamW must not see
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad
                if gradient is None or not (group["rowwise"] or gradient.is_sparse):
                    continue
                hidden.append((weight, gradient))
                weight.grad = None
                if gradient.is_sparse:
                    gradient = gradient.coalesce()
                    rows, values = gradient.indices()[0], gradient.values()
                else:  # of every row
                    rows, values = torch.arange(len(weight), device=weight.device), gradient
                old = weight.index_select(0, rows).mul_(1 - group["lr"] * group["weight_decay"])
                change = self.update_rows(weight, rows, values.to(weight.dtype), group)
                weight.index_copy_(0, rows, old.sub_(change))
        super().step()
        for weight, gradient in hidden:
            weight.grad = gradient
        return loss

    @abstractmethod
    def update_rows(self, weight: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Updates the state of some rows of a table and returns what to subtract from them, (R, D).

        Args:
            weight: (N, D), the table, for its state. A state must have a tensor "step".
            rows: (R,) distinct row numbers.
            gradient: (R, D) their gradients.
            group: options of the table's parameter group.
        """


class SparseAdamW(RowwiseOptimizer):
    """AdamW that changes only the item rows a batch looks up ("lazy"), with moments and step count per row.

        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²,   row ← (1 − lr·λ)·row − lr · m̂ / (√v̂ + ε)

    The bias correction of m̂ and v̂ takes the number of updates of the row, not of steps: the first update of a rare item
    is as long as that of a popular one. It equals RecsysAdamW if each step looks up every item. The moments take twice
    the memory of the table, as in AdamW.

    Args:
        params: parameters or parameter groups.
        lr: learning rate after warm-up.
        betas: decay rates of the first and second moment.
        weight_decay: decoupled weight decay λ; of a row, at each of its updates.
        table_lr: learning rate of the item tables after warm-up; None: `lr`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        table_lr: float | None = None,
    ) -> None:
        check_number("table_lr", table_lr, low=0, high=1e3, other="null for lr", example=1e-3)
        super().__init__(params, lr, betas, weight_decay, lr if table_lr is None else table_lr)

    def update_rows(self, weight: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(len(weight), device=weight.device)  # updates of each row
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        beta1, beta2 = group["betas"]
        step = state["step"].index_select(0, rows).add_(1)
        first = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        for name, value in (("step", step), ("exp_avg", first), ("exp_avg_sq", second)):
            state[name].index_copy_(0, rows, value)
        # in float64, as 1 − β₂ᵗ loses digits
        correction1, correction2 = (
            (1 - beta ** step.double()).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)) for beta in (beta1, beta2)
        )
        return first.mul_(group["lr"]).div_(correction1).div_(second.div_(correction2).sqrt_().add_(group["eps"]))


class RowwiseAdagrad(RowwiseOptimizer):
    """Adagrad with one accumulator per item row; AdamW for all parameters but the item tables.

        G ← G + mean(g²) over the row,   row ← (1 − lr·λ)·row − lr · g / (√G + ε)

    The accumulators take 4 bytes per item; the moments of AdamW take twice the memory of the table. The step of an item
    shrinks with the number of its updates. Adagrad is by Duchi et al. (2011), the variant by rows that of FBGEMM.

    Args:
        params: parameters or parameter groups.
        lr: learning rate after warm-up of all parameters but item tables.
        betas: decay rates of the first and second moment of all parameters but item tables.
        weight_decay: decoupled weight decay λ; of a row, at each of its updates.
        table_lr: learning rate of the item tables after warm-up; None: 0.05.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        table_lr: float | None = None,
    ) -> None:
        check_number("table_lr", table_lr, low=0, high=1e3, other="null for 0.05", example=0.05)
        super().__init__(params, lr, betas, weight_decay, 0.05 if table_lr is None else table_lr)

    def update_rows(self, weight: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["sum"] = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        state["step"] += 1
        mean = gradient.flatten(1).square().mean(1) if gradient.dim() > 1 else gradient.square()
        total = state["sum"].index_select(0, rows).add_(mean)
        state["sum"].index_copy_(0, rows, total)
        scale = group["lr"] / total.sqrt().add_(group["eps"])
        return gradient * scale.view(-1, *[1] * (weight.dim() - 1))


def rowwise_name(make: Callable[[Any], Optimizer]) -> str | None:
    """Name of the class of an optimizer that updates item tables by rows; None for other optimizers.

    Args:
        make: parameters -> optimizer, as configs give it; called with a parameter of its own.
    """
    optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    return type(optimizer).__name__ if getattr(optimizer, "rowwise", False) else None


def sparse_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters with a sparse gradient."""
    return [weight for weight in parameters if weight.grad is not None and weight.grad.is_sparse]


class RecsysModule(LightningModule):
    """Base module of both stages: training progress, checkpoint metadata, loading without untrusted code."""

    planned_steps = float("inf")  # optimizer steps of the whole run
    planned_epochs: int | None = None  # of its schedules, where a refit ends before them; None: max_epochs

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        add_metadata(checkpoint, self._split_hash, __version__, self._until)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another format, or one trained on another split."""
        make = f"recsys fit, with the model {type(self).__name__}"
        check_format(Path("the checkpoint"), checkpoint.get("format"), checkpoint.get(VERSIONS), make)
        self._check_optimizer(checkpoint)
        own, other = self._split_hash, checkpoint.get(SPLIT)
        if own is not None and own != other:
            raise ValueError(
                f"the checkpoint was trained on data with split hash {str(other)[:12]}…, but this data has "
                f"{own[:12]}…: its test events may have been trained on; fit again: {make}"
            )
        if self._fits and self._until != (until := trained_until(checkpoint, "the checkpoint")):
            raise ValueError(
                f"the checkpoint was trained on events until {until!r}, but this fit trains until {self._until!r}; "
                "resume with the same refit and until, or start a new fit without --ckpt_path"
            )

    def _check_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume with an optimizer that cannot take the state of the checkpoint's."""
        states, make = checkpoint.get("optimizer_states"), getattr(self, "optimizer", None)
        if not self._fits or not states or make is None:
            return
        stored = {group.get("rowwise") for state in states for group in state["param_groups"]} - {None, False}
        own, dense = rowwise_name(make), "an optimizer of whole tables"
        if stored != ({own} - {None}):
            raise ValueError(
                f"the checkpoint has the state of {''.join(stored) or dense}, but this fit has {own or dense}; resume "
                "with the same optimizer, or start a new fit from the weights with --model.init_args.start"
            )

    @property
    def _split_hash(self) -> str | None:
        """Split hash of the data module; None if it has none."""
        return getattr(getattr(self._trainer, "datamodule", None), "split_hash", None)

    @property
    def _until(self) -> Until:
        """Where the training events of the data module end."""
        return getattr(getattr(self._trainer, "datamodule", None), "until", "val")

    @property
    def _fits(self) -> bool:
        """Whether a fit is running."""
        return self._trainer is not None and self._trainer.state.fn == "fit"

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # one more argument, trust
        cls, checkpoint_path: str | Path, *args: Any, trust: Sequence[str] = (), **options: Any
    ) -> Any:
        """As in Lightning, but only with classes of this package and of modules in `trust`."""
        make, taken = f"recsys fit, with the model {cls.__name__}", signature(cls).parameters
        stored = load_checkpoint(checkpoint_path, make)[OPTIONS]
        with trusting(trust):
            arguments(cls, {name: value for name, value in stored.items() if name in taken}, checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **options})

    def on_train_start(self) -> None:
        loop = self.trainer.fit_loop
        epochs, loop.max_epochs = loop.max_epochs, self.planned_epochs or loop.max_epochs
        self.planned_steps = float(self.trainer.estimated_stepping_batches)
        loop.max_epochs = epochs

    def leave_out_of_ddp(self, rows: int, weights: Iterable[Tensor] = ()) -> None:
        """Keeps DistributedDataParallel from reducing some gradients, and from copying tables of the data at each step.

        Args:
            rows: V + 1; buffers with as many rows are tables of the data, which are equal in all processes.
            weights: parameters whose gradients it does not reduce.
        """
        left = {id(weight) for weight in weights}
        self._ddp_params_and_buffers_to_ignore = [
            *(name for name, buffer in self.named_buffers() if buffer.dim() and len(buffer) == rows),
            *(name for name, weight in self.named_parameters() if id(weight) in left),
        ]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Averages sparse gradients over processes, as DistributedDataParallel does with others; merges equal rows."""
        for weight in sparse_gradients(self.parameters()):
            assert weight.grad is not None
            weight.grad = average_sparse(weight.grad)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does, and takes each row of a sparse gradient once: torch's own norm needs merged rows."""
        if not gradient_clip_val or not sparse_gradients(self.parameters()):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = []
        for weight in self.parameters():
            if weight.grad is not None and weight.grad.is_sparse:
                weight.grad = weight.grad.coalesce()
                gradients.append(weight.grad._values())
            elif weight.grad is not None:
                gradients.append(weight.grad)
        if gradient_clip_algorithm == "value":
            torch._foreach_clamp_max_(gradients, float(gradient_clip_val))
            torch._foreach_clamp_min_(gradients, -float(gradient_clip_val))
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
            torch._foreach_mul_(gradients, (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))  # as in clip_grad_norm_

    def log_mean(self, name: str, value: Any, rows: int) -> None:
        """Logs the mean of a value over all rows of an epoch.

        Args:
            name: of the value.
            value: of this batch.
            rows: of this batch in this process.
        """
        # Lightning averages numbers of rows over processes and rounds them down: so many more that nothing is lost
        weight = rows * num_processes()
        self.log(name, value, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)

    @property
    def progress(self) -> float:
        """Share of the planned steps done, from 0 to 1."""
        return min(1.0, self.global_step / self.planned_steps) if self._trainer else 0.0

    def require_planned_steps(self, what: str) -> None:
        """Raises a ValueError for a run of unknown length: `what` is a schedule over the progress of the run."""
        if self.planned_steps == float("inf"):
            raise ValueError(
                f"{what} is scheduled over the whole run, but this run has no planned end; set trainer.max_epochs or "
                "trainer.max_steps"
            )


def check_schedule(warmup: int, final: float) -> None:
    """Raises a ValueError for an invalid schedule of the learning rate; arguments as in `with_schedule`."""
    check_integer("warmup_steps", warmup, 0, example=100)
    check_number("final_lr", final, low=0, high=1, example=0.1, what="a share of the learning rate,")


def with_schedule(
    optimizer: Optimizer, warmup: int, final: float = 1.0, progress: Callable[[], float] = lambda: 0.0
) -> OptimizerLRSchedulerConfig:
    """Return value of Lightning's configure_optimizers, with linear warm-up and cosine decay.

    Args:
        optimizer: with the peak learning rate.
        warmup: warm-up steps.
        final: final share of the learning rate (Loshchilov & Hutter 2017, without restarts); 1: no decay.
        progress: returns the share of the run that is done, from 0 to 1.
    """
    check_schedule(warmup, final)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(warmup, 1)) * (final + (1 - final) * (1 + math.cos(math.pi * progress())) / 2)

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
