"""Copies and pickles of a CLIPClassifier are plain and whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import art.config
import numpy as np
import pytest
import torch
from torch import Tensor

from clipdefense import CLIPClassifier, ZeroShotClassifier

from .helpers import Darken, arts_own

# --- copies


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the home folder and of ART's data folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(art.config, "ART_DATA_PATH", str(tmp_path))
    return tmp_path


def through_pickle(classifier: CLIPClassifier) -> CLIPClassifier:
    return pickle.loads(pickle.dumps(classifier))


COPIES = [copy.deepcopy, through_pickle, CLIPClassifier.clone_for_refitting]


@pytest.mark.parametrize("copied_by", COPIES)
def test_copies_are_plain_and_whole(
    copied_by: Callable[[CLIPClassifier], CLIPClassifier], tiny_model: ZeroShotClassifier, images: Tensor, empty: Path
) -> None:
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=0.003)
    classifier = CLIPClassifier(tiny_model, optimizer=optimizer, preprocessing_defences=[Darken(tiny_model)])
    classifier.get_activations(images, "tower", framework=True)
    found = copied_by(classifier)
    assert type(found) is CLIPClassifier
    assert np.array_equal(found.predict(images.numpy()), classifier.predict(images.numpy()))
    assert found.device == classifier.device
    # one model: the defence and the optimizer hold the copy's, and nothing is shared with the original
    assert found.model is not tiny_model
    assert found.preprocessing_operations[0] is found.preprocessing_defences[0]
    assert found.preprocessing_defences[0].model is found.model
    weights = {id(weight) for weight in found.model.parameters()}
    assert {id(weight) for weight in found.optimizer.param_groups[0]["params"]} == weights
    assert weights.isdisjoint(map(id, tiny_model.parameters()))
    assert list(empty.iterdir()) == []


def test_arts_own_copies_do_write_files(tiny_model: ZeroShotClassifier, empty: Path) -> None:
    copy.deepcopy(arts_own(tiny_model))
    assert [path.suffix for path in empty.iterdir()] == [".model"]


def test_a_pickle_holds_the_weights_once(tiny_model: ZeroShotClassifier) -> None:
    defence = Darken(tiny_model)
    size = sum(tensor.nbytes for tensor in (*tiny_model.parameters(), *tiny_model.buffers()))
    assert size < len(pickle.dumps(CLIPClassifier(tiny_model, preprocessing_defences=defence))) < 1.2 * size


def test_a_clone_trains_on_from_the_pretrained_weights(
    tiny_model: ZeroShotClassifier, images: Tensor, labels: Tensor
) -> None:
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=0.003, weight_decay=0.125, betas=(0.5, 0.75))
    classifier = CLIPClassifier(tiny_model, optimizer=optimizer)
    classifier.fit(images.numpy(), labels.numpy(), nb_epochs=1)
    clone = classifier.clone_for_refitting()
    (group,) = clone.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.003, 0.125, (0.5, 0.75))
    assert len(optimizer.state) > 0 and len(clone.optimizer.state) == 0
    expected = classifier.predict(images.numpy())
    assert np.array_equal(clone.predict(images.numpy()), expected)
    clone.fit(images.numpy(), labels.numpy(), nb_epochs=1)
    assert not np.array_equal(clone.predict(images.numpy()), expected)
    assert np.array_equal(classifier.predict(images.numpy()), expected)
    assert CLIPClassifier(tiny_model).clone_for_refitting().optimizer is None
