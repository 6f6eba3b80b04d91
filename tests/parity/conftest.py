"""The recorded numbers, and the small CLIPs with which they were made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clipdefense import ZeroShotClassifier

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """What the released code computed, by name; nobody may write into them."""
    with np.load(HERE / "parity.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


@pytest.fixture(scope="session")
def recorded_model(golden: dict[str, Tensor]) -> Callable[[str], ZeroShotClassifier]:
    """``recorded_model("original")`` or ``("student")``: a fresh classifier with those weights, in eval mode."""

    def load(name: str) -> ZeroShotClassifier:
        clip = open_clip.model.CLIP(
            embed_dim=32,
            vision_cfg={"layers": 2, "width": 64, "patch_size": 32, "image_size": 224},
            text_cfg={"context_length": 77, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
            quick_gelu=True,
        )
        state = load_file(HERE / f"tiny_clip_{name}.safetensors")
        missing, unexpected = clip.load_state_dict(state, strict=False)
        assert not unexpected and not [key for key in missing if key.startswith("visual.")]
        scale = float(golden["logit_scale_log"].double().exp())
        mean, std = golden["mean"].tolist(), golden["std"].tolist()
        return ZeroShotClassifier(clip.visual, golden["text"], logit_scale=scale, mean=mean, std=std).eval()

    return load
