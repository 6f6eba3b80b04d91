"""TeCoA, text-guided contrastive adversarial fine-tuning (Mao et al., ICLR 2023, arXiv 2212.07016).

The image tower learns to classify adversarial images against the text embeddings of the training classes:

    L = CE(z(x_adv), y),   z_c = s <f(x) / ||f(x)||, t_c>,   x_adv = argmax over the ball of the same CE

with ``f`` the image encoder, ``t_c`` the unit text embedding of class c's prompt and ``s`` the logit scale. Despite
the name there is no in-batch contrast: the loss runs over all class prompts, from image to text only, and there is no
clean term. Text embeddings and logit scale stay as they are. The paper's visual prompting is not part of this.

The released attack calls ``backward`` and leaves its gradients in the weights' ``.grad``; under the loss scaling of
its mixed precision they vanish against the update's. Here they never reach the weights, and the attack runs in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from clipdefense.threat import ThreatModel
from clipdefense.trainers import TrainerDefense
from clipdefense.training.config import TrainingConfig


def tecoa_loss(logits: Tensor, y: Tensor) -> Tensor:
    """``mean_i -log softmax(z(x_adv_i))_{y_i}`` over all class prompts; logits (N, C), labels (N,) -> scalar."""
    return F.cross_entropy(logits, y)


class TeCoA(TrainerDefense):
    """TeCoA as an ART trainer. Trains the whole image tower; prompts are ``This is a photo of a {}`` in the paper.

    Variants:
        ``"default"``: the paper's learning rate 1e-5, and a warm-up of at most a tenth of the run, since the
            published 1000 updates were meant for ten epochs of ImageNet.
        ``"released"``: the released command: learning rate 1e-7 (the script's default, which the command leaves
            alone), 1000 updates of warm-up however short the run.

    Later work uses other rates for TeCoA on Tiny-ImageNet: PMG-AFT 5e-5, TGA-ZSR 1e-4 (robust accuracy there rises
    from about 38 to above 50 % between 1e-5 and 1e-4). Both variants share the rest: SGD with momentum 0.9, no weight
    decay, batches of 256, 10 epochs, cosine to 0; PGD with 2 steps of 1/255 in the Linf ball of radius 1/255, from a
    uniform point.
    """

    name: ClassVar[str] = "tecoa"
    variants: ClassVar[tuple[str, ...]] = ("default", "released")

    def default_threat(self) -> ThreatModel:
        return ThreatModel("linf", eps=1 / 255, step_size=1 / 255, steps=2)

    def default_config(self) -> TrainingConfig:
        released = self.variant == "released"
        return TrainingConfig(
            optimizer="sgd",
            lr=1e-7 if released else 1e-5,
            momentum=0.9,
            weight_decay=0.0,
            batch_size=256,
            epochs=10,
            schedule="cosine",
            warmup_steps=1000,
            warmup_cap=1.0 if released else 0.1,
            train="tower",
        )

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"ce": tecoa_loss(self.logits(batch["x_adv"]), batch["y"])}
