"""A zero-shot classifier as an ART estimator: ART's own class without its traps, meaning the same."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from art.attacks.attack import Attack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from clipdefense.attacks.context import frozen, gradients_kept, modes_kept, set_modes
from clipdefense.checks import check_images, check_labels
from clipdefense.classifier import ZeroShotClassifier
from clipdefense.errors import UsageError, check_known, unknown_name


class CLIPClassifier(PyTorchClassifier):
    """An ``art.estimators.classification.PyTorchClassifier`` on pixels in [0, 1]: what takes one takes this.

    Resizing and normalisation belong in the module: ART's AutoAttack, APGD and ACG put a plain PyTorchClassifier
    around :attr:`model` and would miss anything done here. (That one also leaves gradients on parameters that require
    them, switches the model to eval mode, and moves it to the current CUDA device if it is on another.)

    Beyond ART's class:

    * every method leaves train/eval modes, ``requires_grad`` and ``.grad`` as it found them (``fit``: the modes);
    * attacks compute no gradients of parameters;
    * integer labels do wherever one-hot ones do, and images may be float64;
    * in :meth:`predict`, defences see at most ``batch_size`` images at a time;
    * the model stays on its device, and the classifier follows when it is moved;
    * copies and pickles write no files, and a defence that holds the same model holds the copy's in a copy.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | None = None,
        input_shape: tuple[int, ...] | None = None,
        nb_classes: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        use_amp: bool = False,
        opt_level: str = "O1",
        loss_scale: float | str | None = "dynamic",
        channels_first: bool = True,
        clip_values: Any = (0.0, 1.0),
        preprocessing_defences: Any = None,
        postprocessing_defences: Any = None,
        preprocessing: Any = None,
        device_type: str | None = None,
    ) -> None:
        """
        Args:
            model: images (N, C, H, W) in [0, 1] -> logits (N, nb_classes).
            loss: None is ``nn.CrossEntropyLoss()``.
            input_shape: (C, H, W) of the images; None is a ZeroShotClassifier's own, (3, S, S).
            nb_classes: at least 2; None is a ZeroShotClassifier's own.
            optimizer: over parameters of the model, for :meth:`fit`.
            use_amp, opt_level, loss_scale, channels_first: hold ART's order; leave them as they are.
            clip_values: (min, max) that attacks keep to, within [0, 1].
            preprocessing_defences: an ART preprocessor, such as a :class:`clipdefense.InputDefense`, or a list.
            postprocessing_defences: an ART postprocessor, or a list.
            preprocessing: as in ART; None, because the model normalises.
            device_type: None leaves the model where it is; ``"cpu"`` or ``"gpu"`` moves it, as in ART.

        Raises:
            UsageError: an argument that cannot be used, or one that is missing and not to be had from the model.
        """
        input_shape, nb_classes = _describe(model, input_shape, nb_classes)
        if loss is not None and not isinstance(loss, nn.Module):
            raise UsageError(f"loss is a {type(loss).__name__}; a module is expected, such as nn.CrossEntropyLoss().")
        if use_amp:
            raise UsageError("use_amp is True, for which ART needs apex; put torch.autocast into the model's forward.")
        if not channels_first:
            raise UsageError("channels_first is False; images (N, C, H, W) are expected.")
        clip = np.asarray(clip_values, dtype=float)
        if clip.shape != (2,) or not 0 <= clip[0] < clip[1] <= 1:
            raise UsageError(f"clip_values is {clip_values!r}; (min, max) within the pixel range (0, 1) is expected.")
        _check_optimizer(optimizer, model)
        if device_type is not None and (device_type == "cpu") != (_device(model).type == "cpu"):
            model.to("cuda" if device_type != "cpu" and torch.cuda.is_available() else "cpu")
        super().__init__(
            model=model,
            loss=nn.CrossEntropyLoss() if loss is None else loss,
            input_shape=input_shape,
            nb_classes=nb_classes,
            optimizer=optimizer,
            opt_level=opt_level,
            loss_scale=loss_scale,
            clip_values=clip_values,
            preprocessing_defences=preprocessing_defences,
            postprocessing_defences=postprocessing_defences,
            preprocessing=preprocessing,
        )

    @property
    def _device(self) -> torch.device:
        return _device(self._model)

    @_device.setter
    def _device(self, device: torch.device) -> None:
        """ART assigns the current CUDA device; what counts is where the model lies."""

    @property
    def device_type(self) -> str:
        """``"cpu"`` or ``"gpu"``: where the model is now."""
        return "cpu" if self._device.type == "cpu" else "gpu"

    @property
    def _dtype(self) -> torch.dtype:
        """Of images on their way to the model: float64 for a float64 one, else float32."""
        weights = (weight.dtype for weight in self._model.parameters() if weight.is_floating_point())
        return torch.promote_types(next(weights, torch.float32), torch.float32)

    def predict(self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any) -> np.ndarray:
        """Logits, through preprocessing and postprocessing defences.

        Args:
            x: (N, C, H, W) floats in [0, 1].
            batch_size: images a forward, and images that defences see at a time.
            training_mode: run the model in train mode.

        Returns:
            (N, nb_classes), float32.

        Raises:
            UsageError: images of another dtype, rank, range or channel count, NaN or none at all; a bad batch size.
        """
        x = self._images(x)
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; a whole number of at least 1 is expected.")
        outputs = []
        with self._untouched(training_mode), torch.no_grad():
            for start in range(0, len(x), batch_size):
                logits = self._model(self._defended(x[start : start + batch_size]))[-1]
                outputs.append(logits.cpu().numpy().astype(ART_NUMPY_DTYPE))
        return self._apply_postprocessing(preds=np.concatenate(outputs), fit=False)

    def loss_gradient(self, x: Any, y: Any, training_mode: bool = False, **kwargs: Any) -> Any:
        """Gradient in x of the loss, reduced as the loss module reduces it.

        Args:
            x: (N, C, H, W) floats in [0, 1], array or tensor.
            y: (N,) integers, or (N, nb_classes) one-hot or soft; array or tensor.
            training_mode: run the model in train mode.

        Returns:
            (N, C, H, W), of x's kind and dtype.

        Raises:
            UsageError: images or labels that cannot be used.
        """
        images = self._images(x)
        labels = self._labels(images, y)
        with self._untouched(), torch.enable_grad():
            gradient = super().loss_gradient(images, labels, training_mode=training_mode, **kwargs)
        return gradient.to(x.dtype) if isinstance(x, Tensor) else gradient.astype(np.asarray(x).dtype, copy=False)

    def class_gradient(self, x: np.ndarray, label: Any = None, training_mode: bool = False, **kwargs: Any) -> Any:
        """Gradients in x of logits, (N, K, C, H, W): K = 1 for a label or (N,) of them, else K = nb_classes."""
        images = self._images(x)
        with self._untouched(), torch.enable_grad():
            return super().class_gradient(images, label, training_mode=training_mode, **kwargs)

    def compute_loss(self, x: Any, y: Any, reduction: str = "none", **kwargs: Any) -> Any:
        """The loss of each image, or their ``"mean"`` or ``"sum"``; x and y as in :meth:`loss_gradient`.

        Tensors give a tensor, with a gradient in the weights, and in x where there are no preprocessing defences.
        """
        images = self._images(x)
        labels = self._labels(images, y)
        with modes_kept(self._model) if isinstance(x, Tensor) else self._untouched():
            return super().compute_loss(images, labels, reduction=reduction, **kwargs)

    def get_activations(
        self, x: Any, layer: int | str | None = None, batch_size: int = 128, framework: bool = False
    ) -> Any:
        """What a layer returns for images (N, C, H, W), array or tensor; leaves no hook behind.

        Args:
            layer: any submodule's name, such as ``"tower.transformer"``, or an index into ``layer_names``.
            framework: return a tensor that is differentiable in x, from one forward, instead of an array.

        Raises:
            UsageError: an unknown layer, or one that the model uses without calling it.
        """
        images = self._images(x)
        parts = dict(self.model.named_modules())
        name = self._layer_names[layer] if isinstance(layer, (int, np.integer)) else str(layer)
        if name not in parts:
            raise unknown_name("layer", name, filter(None, parts))
        found: list[Any] = []
        hook = parts[name].register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            with self._untouched(), torch.set_grad_enabled(framework):
                size = len(images) if framework else batch_size
                for start in range(0, len(images), size):
                    self._model(self._defended(images[start : start + size], no_grad=not framework))
        finally:
            hook.remove()
        if not found:
            raise UsageError(f"layer {name!r} is not called in the model's forward; name a layer inside or around it.")
        return found[-1] if framework else np.concatenate([output.cpu().numpy() for output in found])

    def custom_loss_gradient(self, loss_fn: Any, x: Any, y: Any, layer_name: Any, training_mode: bool = False) -> Any:
        """Gradient in x of ``loss_fn(a(x) - a(y), p=2)``, with a = :meth:`get_activations`; arrays only, as in ART."""
        with self._untouched(), torch.enable_grad():
            return super().custom_loss_gradient(loss_fn, self._images(x), self._images(y), layer_name, training_mode)

    def fit(
        self, x: Any, y: Any, batch_size: int = 128, nb_epochs: int = 10, training_mode: bool = True, **kwargs: Any
    ) -> None:
        """ART's training loop on images (N, C, H, W) and labels as in :meth:`loss_gradient`.

        Two kinds of submodules stay in eval mode, so that a frozen tower keeps its batch statistics: those whose
        parameters are all frozen, and those that are in eval mode while the model itself is in train mode.
        """
        images = self._images(x)
        labels = self._labels(images, y)
        with self._fitting():
            super().fit(images, labels, batch_size, nb_epochs, training_mode, **kwargs)

    def fit_generator(self, generator: Any, nb_epochs: int = 20, verbose: bool = False, **kwargs: Any) -> None:
        """:meth:`fit` on an ART ``DataGenerator``."""
        with self._fitting():
            super().fit_generator(generator, nb_epochs=nb_epochs, verbose=verbose, **kwargs)

    def set_params(self, **kwargs: Any) -> None:
        """Change arguments of the constructor; a new ZeroShotClassifier brings its own shape and number of classes."""
        check_known("parameter", kwargs, self.estimator_params)
        params = self.get_params() | {"device_type": None}
        if isinstance(kwargs.get("model"), ZeroShotClassifier):
            params |= {"input_shape": None, "nb_classes": None}
        CLIPClassifier.__init__(self, **(params | kwargs))

    def clone_for_refitting(self) -> CLIPClassifier:
        """A copy to train further: pretrained weights kept, and an optimizer of the same settings without history."""
        clone = copy.deepcopy(self)
        if clone._optimizer is not None:
            clone._optimizer.state.clear()
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _make_model_wrapper(self, model: nn.Module) -> _Outputs:
        return _Outputs(model)

    def _predict_framework(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        with self._untouched():
            return super()._predict_framework(x, y)

    @contextmanager
    def _untouched(self, training_mode: bool = False) -> Iterator[None]:
        """Parameters get no gradients; modes, ``requires_grad`` and ``.grad`` are afterwards what they were."""
        with gradients_kept(self._model), frozen(self._model):
            set_modes(self._model, training_mode)
            yield

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        if self._optimizer is None:
            raise UsageError("optimizer is None; training needs one: CLIPClassifier(model, optimizer=...).")
        parts = list(self.model.modules())
        fixed = [part for part in parts if self.model.training and not part.training]
        for part in parts:
            weights = list(part.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                fixed += part.modules()
        with modes_kept(self._model):
            self._model.fixed = tuple(fixed)
            try:
                yield
            finally:
                self._model.fixed = ()

    def _images(self, x: Any) -> Any:
        """Checked images, array or tensor as given, in the dtype that the model takes."""
        if not isinstance(x, Tensor):
            x = np.require(x, requirements=["C", "W"])  # torch warns of arrays that it must not write to
            if x.dtype.kind not in "fiub":
                raise UsageError(f"x has dtype {x.dtype}; floating point in [0, 1] is expected.")
        images = torch.as_tensor(x)
        try:
            check_images(images, channels=self.input_shape[0])
        except UsageError:
            # ZOO, NewtonFool and others look outside of [0, 1] on their way, Square at NaN (it divides 0 by 0); images
            # that a user gave to an attack normalised, or in 0-255, lie further out
            inside = images.nan_to_num(0.5).clamp(0, 1)
            if not images.is_floating_point() or not _in_attack() or (images - inside).abs().nanmean() > 0.3:
                raise
            check_images(inside, channels=self.input_shape[0])
        images = images.to(self._dtype)
        return images if isinstance(x, Tensor) else images.numpy()

    def _labels(self, x: Any, y: Any) -> Any:
        """Checked labels (N, nb_classes), array or tensor as x is."""
        labels = torch.as_tensor(y)
        if labels.dim() == 1 or labels.shape[1:] == (1,):
            labels = labels.flatten()
            check_labels(labels, len(x), classes=self.nb_classes)
            labels = F.one_hot(labels.long(), self.nb_classes)
        if labels.shape != (len(x), self.nb_classes):
            raise UsageError(f"y has shape {tuple(labels.shape)}; {len(x)} integers or one-hot rows are expected.")
        labels = labels.to(self._dtype)
        return labels.to(x.device) if isinstance(x, Tensor) else labels.cpu().numpy()

    def _defended(self, x: Any, no_grad: bool = True) -> Tensor:
        """Images as the model gets them: through the preprocessing defences, on its device."""
        if self.all_framework_preprocessing:
            x = torch.as_tensor(x).to(self._device)
        elif isinstance(x, Tensor):
            raise UsageError("x is a tensor, but preprocessing_defences take arrays; PreprocessorPyTorch ones do not.")
        x, _ = self._apply_preprocessing(x, y=None, fit=False, no_grad=no_grad)
        return torch.as_tensor(x).to(self._device, self._dtype)


class _Outputs(nn.Module):
    """The model as ART calls it: a list of outputs, logits last. ART's own is a local class, which no pickle finds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.fixed: tuple[nn.Module, ...] = ()  # they stay in eval mode

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self._model(x)]

    def train(self, mode: bool = True) -> _Outputs:
        super().train(mode)
        for part in self.fixed:
            part.training = False
        return self

    @property
    def get_layers(self) -> list[str]:
        return [name for name, _ in self._model.named_children()]


def _in_attack() -> bool:
    """Whether an ART attack, whoever wrote it, is among the callers."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Attack):
        frame = frame.f_back
    return frame is not None


def _device(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    weights = {weight for group in getattr(optimizer, "param_groups", ()) for weight in group["params"]}
    if optimizer is not None and weights.isdisjoint(model.parameters()):
        raise UsageError("optimizer holds no parameter of model; make one over model.parameters().")


def _describe(model: Any, input_shape: Any, nb_classes: Any) -> tuple[tuple[int, ...], int]:
    """Input shape and number of classes, as given or as the model says."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; a torch module, images -> logits, is expected.")
    if isinstance(model, ZeroShotClassifier):
        if nb_classes not in (None, len(model.class_names)):
            raise UsageError(f"nb_classes is {nb_classes}, but model has {len(model.class_names)}; leave it out.")
        nb_classes = len(model.class_names)
        input_shape = input_shape or (model.mean.numel(), model.image_size, model.image_size)
    if input_shape is None or nb_classes is None:
        raise UsageError(f"model is a {type(model).__name__}, with which input_shape and nb_classes must be given.")
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in shape):
        raise UsageError(f"input_shape is {input_shape!r}; (C, H, W) is expected, such as (3, 224, 224).")
    if not isinstance(nb_classes, (int, np.integer)) or nb_classes < 2:
        raise UsageError(f"nb_classes is {nb_classes!r}; a whole number of at least 2 is expected.")
    return shape, int(nb_classes)
