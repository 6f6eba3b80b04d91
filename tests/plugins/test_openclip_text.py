"""The text encoder by itself: templates, batches, and a vocabulary that does not belong to the tokenizer."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipdefense.errors import UsageError
from clipdefense_openclip.text import TextEncoder

NAMES = ["cat", "dog", "aquarium fish"]
TEMPLATES = ["a {}", "the {}", "{} and {}"]


def encoder(templates: Any = TEMPLATES, vocabulary: int = 49408, **options: Any) -> TextEncoder:
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
        text_cfg={"context_length": 16, "vocab_size": vocabulary, "width": 32, "heads": 1, "layers": 1},
    )
    del model.visual
    return TextEncoder(model, open_clip.SimpleTokenizer(context_length=16), templates, **options)


def test_embeddings_are_unit_means_of_unit_prompts_whatever_the_batch() -> None:
    whole, small = encoder(), encoder(batch_size=2)
    rows = []
    for name in NAMES:
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        units = F.normalize(whole.model.encode_text(whole.tokenizer(prompts)), dim=1)  # type: ignore[operator]
        rows.append(F.normalize(units.mean(dim=0), dim=0))
    assert torch.allclose(whole(NAMES), torch.stack(rows), atol=1e-6)
    assert torch.allclose(small(NAMES), whole(NAMES), atol=1e-6)
    assert (whole.passes, small.passes) == (1, 5)  # nine prompts
    assert not whole(NAMES).requires_grad


def test_the_cache_knows_names_and_templates() -> None:
    text = encoder()
    first = text(NAMES)
    text(tuple(NAMES)), text(NAMES)
    assert text.passes == 1
    assert torch.allclose(text(NAMES[::-1]), first.flip(0), atol=1e-6) and text.passes == 2
    text.templates = ("{}",)
    assert not torch.allclose(text(NAMES), first, atol=1e-3) and text.passes == 3


@pytest.mark.parametrize("bad", ["a photo of a {}.", [], ["a photo"], ["a {name}"], ["a {"], ["{0} {1}"], [3]])
def test_bad_templates_are_errors(bad: Any) -> None:
    with pytest.raises(UsageError, match="templates"):
        encoder(bad)


def test_braces_in_a_name_are_text() -> None:
    assert torch.isfinite(encoder()(["a {brace}", "b {}"])).all()


def test_a_vocabulary_smaller_than_the_tokenizers_is_an_error() -> None:
    with pytest.raises(UsageError, match="knows 100 tokens"):
        encoder(vocabulary=100)(NAMES)
