"""Run as a script, alone or under ``accelerate launch``: trains in float64 and writes gradients and weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from clipdefense_tecoa.tecoa import TeCoA

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_tiny_model


class Spare(torch.nn.Module):
    """A tower with a layer that it does not use, as many have."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower, self.pooler = tower, torch.nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tower(x)


def main(out: Path, accumulate: int) -> None:
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(20, 3, 32, 32, generator=generator, dtype=torch.float64), torch.arange(20) % 10
    torch.manual_seed(0)
    model = make_tiny_model(dtype=torch.float64)
    model.tower = Spare(model.tower)
    seen: dict[str, torch.Tensor] = {}

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not seen:
            for name, weight in model.named_parameters():
                if weight.grad is not None:
                    seen[f"gradient.{name}"] = weight.grad.clone()

    register_optimizer_step_pre_hook(note)
    options = {"batch_size": 10, "epochs": 2, "lr": 1e-3, "accumulate": accumulate, "measure_every": 1}
    defense = TeCoA(model, **options, checkpoint=str(out), show_progress=False)
    defense.fit(x, y)
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes == 1 or torch.distributed.get_rank() == 0:
        seen |= {f"weight.{name}": weight.detach() for name, weight in model.named_parameters()}
        assert defense.history is not None
        names = ("ce", "loss", "gradient_norm", "clean_accuracy", "robust_accuracy")
        rows = [[record[name] for name in names] for record in defense.history.steps]
        history = torch.tensor(rows, dtype=torch.float64)
        save_file(seen | {"history": history, "processes": torch.tensor(processes)}, out / "seen.safetensors")
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
