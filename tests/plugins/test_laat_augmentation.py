"""LAAT's augmentation: windows and flips of the image, ranges, and a fit that repeats to the last bit."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

import clipdefense as cd
from clipdefense.errors import UsageError
from clipdefense_laat.augmentation import Augmented, cifar_fs, mini_imagenet
from clipdefense_laat.laat import LAAT

SMALL: dict[str, Any] = {"trunk_options": {"width": 4}}


def test_windows_and_flips_of_the_image() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    padded = F.pad(image, (4, 4, 4, 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    every = torch.cat([windows, windows.flip(3)])
    crop_and_flip = cifar_fs().transforms[:2]
    found = set()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(40):
            made = image
            for transform in crop_and_flip:
                made = transform(made)
            same = (every == made).flatten(1).all(dim=1).nonzero()[:, 0]
            assert len(same) == 1
            found.add(int(same))
        assert len(found) > 25 and min(found) < 81 <= max(found)
        assert cifar_fs().transforms[2].degrees == [-15.0, 15.0]
        for name, transform, before, after in (("cifar", cifar_fs(), 32, 32), ("mini", mini_imagenet(), 84, 80)):
            for _ in range(20):
                made = transform(torch.rand(3, before, before))
                assert made.shape == (3, after, after) and made.min() >= 0 and made.max() <= 1, name


def test_a_fit_repeats_and_does_augment() -> None:
    x, y = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 4
    threat = cd.ThreatModel("linf", eps=8 / 255, steps=1)
    settings: dict[str, Any] = {"batch_size": 8, "epochs": 2, "milestones": (1,), "show_progress": False}
    found = []
    for data in (Augmented(TensorDataset(x, y), cifar_fs()),) * 2 + (TensorDataset(x, y),):
        model = cd.load_model("laat:conv4-512", list("abcd"), embeddings=bank, **SMALL)
        LAAT(model, variant="released", threat=threat, **settings).fit(data)
        found.append(model.tower.projection.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def bank(names: Any) -> Tensor:
    return torch.randn(len(names), 8, generator=torch.Generator().manual_seed(3)) + 1


def test_it_is_the_dataset_with_other_pixels() -> None:
    class Named(TensorDataset):
        ids, classes = torch.tensor([7, 9]), ("a", "b")

    data = Augmented(Named(torch.rand(2, 3, 84, 84), torch.tensor([1, 0])), mini_imagenet())
    assert len(data) == 2 and data.ids.tolist() == [7, 9] and data.classes == ("a", "b")
    image, label = data[1]
    assert image.shape == (3, 80, 80) and int(label) == 0
    assert not hasattr(Augmented(TensorDataset(torch.rand(2, 3, 4, 4)), cifar_fs()), "ids")
    again = pickle.loads(pickle.dumps(Augmented(TensorDataset(torch.rand(2, 3, 4, 4)), cifar_fs())))
    assert len(again) == 2
    with pytest.raises(UsageError, match=r"dataset is a generator; one with len\(\) and \[i\]"):
        Augmented((x for x in ()), cifar_fs())
    with pytest.raises(UsageError, match="transform is 'flip'; a function of an image"):
        Augmented(data, "flip")  # type: ignore[arg-type]
