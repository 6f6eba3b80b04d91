"""The one training loop. A defence says what is lost and what is attacked; the rest of a run is here."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from clipdefense.attacks.context import attack_mode, predict
from clipdefense.attacks.pgd import pgd
from clipdefense.errors import UsageError
from clipdefense.generators import generators_kept
from clipdefense.training import data, guard
from clipdefense.training.checkpoint import save_model
from clipdefense.training.config import TrainingConfig
from clipdefense.training.memory import recomputing
from clipdefense.training.parameters import all_used, training_only
from clipdefense.training.progress import TrainingProgress
from clipdefense.training.runtime import derive_seed, deterministic, on_device, seed_torch
from clipdefense.training.schedule import learning_rate, total_steps
from clipdefense.training.state import (
    BASE,
    MODEL_FILE,
    STATE_FILE,
    History,
    Position,
    load_state,
    make_folder,
    save_state,
)
from clipdefense.weights import parse_device, sha256_of_weights

if TYPE_CHECKING:
    from clipdefense.trainers import TrainerDefense

Record = dict[str, float]


class LossModule(nn.Module):
    """The model with the defence's losses as ``forward``: what is wrapped when there are several processes."""

    def __init__(self, defense: TrainerDefense) -> None:
        super().__init__()
        self.model = defense.model
        self._losses = defense.losses

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._losses(batch)


class Loop:
    """One run: ``Loop(defense, source, held_out, config).run()`` trains the defence's model in place."""

    def __init__(
        self, defense: TrainerDefense, source: data.Source, held_out: data.Source, config: TrainingConfig
    ) -> None:
        self.defense, self.source, self.held_out, self.config = defense, source, held_out, config
        self.model = defense.model
        if self.model.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"the model's weights are {self.model.dtype}, in which small updates are lost; train in float32 "
                "(model.float()), with bf16=True for speed."
            )
        self.total = total_steps(config, source.steps)
        self.weights = list(defense.trainable_parameters(config.train))
        self.folder = None if config.checkpoint is None else Path(config.checkpoint)
        if self.folder is not None and (self.folder / STATE_FILE).exists() and not config.resume:
            raise UsageError(
                f"checkpoint folder {self.folder} holds the state of a run; pass resume=True to continue it, or name "
                "another folder."
            )
        if self.folder is not None:
            make_folder(self.folder)
        self.accelerator = Accelerator(mixed_precision="no", device_placement=False)
        self.share = data.Share(self.accelerator.process_index, self.accelerator.num_processes)
        self.device = self._device()
        self.history, self.at = History(), Position()
        self.at_once = 0  # images of the largest piece so far

    def _device(self) -> torch.device:
        world = self.share.world
        if self.accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise UsageError(
                f"the launcher asks for {self.accelerator.distributed_type.value}; only one process, or several with "
                "replicated weights (DDP), are supported."
            )
        if isinstance(self.source, data.Indexed) and self.source.batch_size % world:
            raise UsageError(f"batch_size is {self.source.batch_size}, which {world} processes do not divide evenly.")
        if world == 1:
            return self.model.device if self.config.device is None else parse_device(self.config.device)
        if self.config.device is not None:
            raise UsageError(
                f"device is {self.config.device!r} with {world} processes; leave it to the launcher (its --cpu)."
            )
        return self.accelerator.device

    def run(self) -> None:
        """Train; modes, flags, device and generators are restored and no gradients are left, whatever happens."""
        self.defense.history = self.history
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())  # whatever the caller's grad mode
            stack.enter_context(generators_kept([self.device] if self.device.type == "cuda" else []))
            stack.enter_context(deterministic(self.config.deterministic))
            stack.enter_context(on_device(self.model, self.device))
            stack.enter_context(training_only(self.model, self.weights))
            stack.enter_context(recomputing(self.defense, self.config.low_memory))
            stack.callback(self.defense.end)
            self._prepare()
            title = self.defense.name or type(self.defense).__name__
            show = self.config.show_progress and self.accelerator.is_main_process
            epochs = self.config.epochs
            with TrainingProgress(title, self.total, self.at.step, epochs, show) as self.progress:
                while not self._over():
                    self._epoch()
            self._finish()

    def _prepare(self) -> None:
        config, model = self.config, self.model
        for batch in self.held_out.held_out(1):
            _require_labels(batch)  # the first of them: an epoch later would be too late
            break
        self.base_sha256 = sha256_of_weights(model)
        self.original = [value.clone() for value in self._changing()] if config.mix < 1 else []
        self.defense.begin()
        self.optimizer = _optimizer(self.weights, config)
        self.identity = self._identity()
        if config.resume and self.folder is not None and (self.folder / STATE_FILE).exists():
            self.at, self.history = load_state(self.folder, model, self.optimizer, self.identity)
            self.defense.history = self.history
            if not self.source.exact and self.at.step and not self._over():
                warnings.warn(
                    f"resuming at update {self.at.step}: this loader's order is its own, so the run will not equal an "
                    "unbroken one; arrays and map-style datasets do.",
                    stacklevel=5,
                )
        if self.share.world > 1 and not all_used(model, self.weights):
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.module = self.accelerator.prepare(LossModule(self.defense))
        self.good = guard.LastGood(model, self.weights)

    def _identity(self) -> dict[str, Any]:
        """What a resume has to agree in."""
        defense = self.defense
        return {
            "method": defense.name,
            "variant": defense.variant,
            "threat": asdict(defense.threat),
            "hyper_parameters": dict(defense.hyper_parameters()),
            **self.config.arithmetic(),
            "training images": self.source.size,
            "batches an epoch": self.source.steps,
            "class names": list(self.model.class_names),
            "pixel statistics": [self.model.mean.flatten().tolist(), self.model.std.flatten().tolist()],
            BASE: self.base_sha256,
        }

    def _done(self) -> bool:
        return self.config.max_steps is not None and self.at.step >= self.config.max_steps

    def _over(self) -> bool:
        return self.at.epoch >= self.config.epochs or self._done()

    def _epoch(self) -> None:
        """The rest of the current epoch."""
        epoch = self.at.epoch
        seed_torch(derive_seed(self.config.seed, "loader", epoch))  # the order of loaders that draw one
        for batch in self.source.batches(epoch, self.at.batch, self.share):
            self._step(batch)
            if self._done():
                break
            if self.config.checkpoint_every and self.at.step % self.config.checkpoint_every == 0:
                self._save()
        self._end_epoch()

    def _step(self, batch: data.Batch) -> None:
        at, config = self.at, self.config
        lr = learning_rate(config, at.step, at.epoch, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seed_torch(derive_seed(config.seed, "step", at.step, self.share.rank))
        batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
        pieces = min(config.accumulate, len(batch["x"]))
        images = -(-len(batch["x"]) // pieces)
        self.at_once = max(self.at_once, images)
        with guard.memory_advice(images, len(batch["x"]), pieces, self.device):
            values = self._gradient(batch, pieces, lr)
            self._update()
        at.step, at.batch = at.step + 1, at.batch + 1
        record = {"step": at.step, "epoch": at.epoch + 1, "lr": lr, **values}
        self.history.steps.append(record)
        self.progress.step(record)

    def _update(self) -> None:
        self.good.keep()
        try:
            self.optimizer.step()
        except BaseException:  # no memory for the optimiser's state, or an interrupt: no half of an update stays
            self.good.restore()
            raise

    def _gradient(self, batch: data.Batch, pieces: int, lr: float) -> Record:
        """The batch's gradient, clipped, in ``.grad``; the loss terms and what was measured.

        Raises:
            DivergedError: a term or the gradient is not finite.
        """
        for weight in self.weights:
            weight.grad = None
        total: dict[str, Tensor] = {}
        size, measure = len(batch["x"]), self._measures(batch)
        for number in range(pieces):
            piece = {name: values.tensor_split(pieces)[number] for name, values in batch.items()}
            share = len(piece["x"]) / size
            last = number == pieces - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                piece = self._attacked(piece, lr)
                with self._autocast():
                    terms = self.module(piece)
                self.accelerator.backward(share * sum(terms.values()))
            measured = self._accuracies(piece) if measure else {}
            for name, value in {**terms, **measured}.items():
                total[name] = total.get(name, 0.0) + share * value.detach()
        values = self._read(total, self._clipped())
        bad = guard.first_not_finite(values)
        if bad:
            self.good.restore()
            raise guard.DivergedError(self.at.step + 1, bad[0].replace("gradient_norm", "gradient"), bad[1], lr)
        return values | {"loss": sum(values[name] for name in terms)}

    def _clipped(self) -> Tensor:
        """The gradient's L2 norm, before it is clipped where there is a limit."""
        if self.config.max_grad_norm is not None:
            return nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        return nn.utils.get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])

    def _read(self, total: dict[str, Tensor], norm: Tensor) -> Record:
        """All values of a step in one synchronisation with the device, averaged over processes."""
        values = torch.stack([value.double() for value in (*total.values(), norm)])
        if self.share.world > 1:
            values = self.accelerator.reduce(values, "mean")
        return dict(zip([*total, "gradient_norm"], values.tolist()))

    def _attacked(self, piece: data.Batch, lr: float) -> data.Batch:
        seed = derive_seed(self.config.seed, "attack", self.at.epoch)
        try:
            return piece | self.defense.inner_attack(piece, seed=seed)
        except UsageError:
            with attack_mode(self.model):
                if guard.output_is_finite(self.model, piece["x"]):
                    raise
            self.good.restore()
            raise guard.DivergedError(self.at.step + 1, "inner attack", float("nan"), lr) from None

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bf16)

    def _measures(self, batch: data.Batch) -> bool:
        every = self.config.measure_every
        return bool(every) and self.at.step % every == 0 and "y" in batch

    def _accuracies(self, piece: data.Batch) -> dict[str, Tensor]:
        """Share of the piece that the model gets right, clean and under the inner attack, in eval mode."""
        inputs = {"clean_accuracy": piece["x"], "robust_accuracy": piece.get("x_adv")}
        return {
            name: (predict(self.model, x, batch_size=len(x)).argmax(dim=1) == piece["y"]).double().mean()
            for name, x in inputs.items()
            if x is not None
        }

    def _end_epoch(self) -> None:
        at, number = self.at, self.at.epoch + 1
        records = list(takewhile(lambda record: record["epoch"] == number, reversed(self.history.steps)))[::-1]
        names = dict.fromkeys(name for record in records for name in record if name not in ("step", "epoch", "lr"))
        means = {
            name: sum(values) / len(values) for name in names if (values := [r[name] for r in records if name in r])
        }
        record = {"epoch": number, "step": at.step, **means, **self._validate()}
        self.history.epochs.append(record)
        self.progress.epoch(record)
        at.epoch, at.batch = at.epoch + 1, 0
        self._save()

    def _validate(self) -> Record:
        """Clean and robust accuracy on the held-out images, under the inner attack's budget; {} without any."""
        correct, count = torch.zeros(2), 0
        piece = self.at_once or max(self.config.batch_size // self.config.accumulate, 1)
        seed = derive_seed(self.config.seed, "validation")
        for batch in self.held_out.held_out(piece):
            _require_labels(batch)
            x, y, ids = (batch[name].to(self.device) for name in ("x", "y", "ids"))
            x_adv = pgd(self.model, x, y, self.defense.threat, seed=seed, ids=ids, batch_size=piece)
            for row, images in enumerate((x, x_adv)):
                correct[row] += (predict(self.model, images, batch_size=piece).argmax(dim=1) == y).sum().cpu()
            count += len(x)
        names = ("validation_clean_accuracy", "validation_robust_accuracy")
        return dict(zip(names, (correct / count).tolist())) if count else {}

    def _save(self) -> None:
        if self.folder is None:
            return
        self._require_finite_weights()
        if self.accelerator.is_main_process:
            save_state(self.folder, self.model, self.optimizer, self.at, self.history, self.identity)
        self.accelerator.wait_for_everyone()

    def _require_finite_weights(self) -> None:
        if not all(bool(torch.isfinite(weight).all()) for weight in self.weights):
            self.good.restore()
            lr = self.optimizer.param_groups[0]["lr"]
            raise guard.DivergedError(self.at.step, "the updated weights", float("nan"), lr)

    def _changing(self) -> list[Tensor]:
        """What interpolation mixes: the parameters that train and the statistics that move with them."""
        statistics = [value for value in self.model.tower.buffers() if value.is_floating_point()]
        return [*(weight.detach() for weight in self.weights), *statistics]

    @torch.no_grad()
    def _finish(self) -> None:
        self._require_finite_weights()
        for value, before in zip(self._changing(), self.original):
            value.copy_(torch.lerp(before, value, self.config.mix))
        self.defense.provenance = {"training": self.config.as_dict(), "base_weights_sha256": self.base_sha256}
        if self.folder is not None and self.accelerator.is_main_process:
            save_model(self.model, self.folder / MODEL_FILE, **self.defense.record())
        self.accelerator.wait_for_everyone()


def _require_labels(batch: data.Batch) -> None:
    if "y" not in batch:
        raise UsageError(
            "validation images have no labels, which their accuracies need; pass validation_data with labels, or "
            "validation=0."
        )


def _optimizer(weights: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
