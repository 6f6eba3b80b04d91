"""The text side: class names -> unit embeddings, once a class list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdefense.errors import UsageError

TEMPLATES = ("a photo of a {}.",)


class TextEncoder:
    """A frozen text tower with prompt templates: a class encoder for :class:`clipdefense.ZeroShotClassifier`.

    It is no module, so the classifier that uses it neither trains, moves nor saves the text tower; a copy of the
    classifier shares it.

    Attributes:
        templates: prompts with ``{}`` for the class name.
        passes: forward passes of the text tower so far.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        templates: Sequence[str] = TEMPLATES,
        *,
        batch_size: int = 256,
    ) -> None:
        """
        Args:
            model: an open_clip model (its image tower may be gone); frozen and put into eval mode here.
            tokenizer: texts -> (N, context length) token numbers.
            templates: the prompts.
            batch_size: prompts a pass.

        Raises:
            UsageError: no template, or one without its ``{}``.
        """
        self.templates = check_templates(templates)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.passes = 0
        self._cache: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def __call__(self, names: Sequence[str]) -> Tensor:
        """(C, D) unit embeddings: each prompt's normalised, their mean over the templates normalised again."""
        key = (tuple(names), self.templates)
        if key not in self._cache:
            self._cache[key] = self._encode(key[0])
        return self._cache[key].clone()

    @torch.no_grad()
    def _encode(self, names: tuple[str, ...]) -> Tensor:
        prompts = [template.replace("{}", name) for name in names for template in self.templates]
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            tokens = self.tokenizer(prompts[start : start + self.batch_size])
            self._check_vocabulary(tokens)
            embeddings: Tensor = self.model.encode_text(tokens.to(self._device))  # type: ignore[operator]
            parts.append(F.normalize(embeddings.float(), dim=1))
            self.passes += 1
        per_class = torch.cat(parts).unflatten(0, (len(names), len(self.templates)))
        return F.normalize(per_class.mean(dim=1), dim=1)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _check_vocabulary(self, tokens: Tensor) -> None:
        size = getattr(self.model, "vocab_size", 0)
        if size and int(tokens.max()) >= size:
            raise UsageError(
                f"the text tower knows {size} tokens, but its tokenizer gave number {int(tokens.max())}: vocab_size in "
                "the model's configuration does not belong to this tokenizer; correct it, or pass class_encoder=."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoder:
        return self


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple, each with a ``{}`` that the class name replaces."""
    if isinstance(templates, str):
        raise UsageError(f"templates is the string {templates!r}; a list is expected, such as ['a photo of a {{}}.'].")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise UsageError(f"templates contains {template!r}; text with {{}} for the class name is expected.")
    if not templates:
        raise UsageError("templates is empty; at least one, such as 'a photo of a {}.', is expected.")
    return tuple(templates)
