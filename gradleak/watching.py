"""Watching a training loop: the gradients of its newest step, as a client would send them."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.bundle import BUFFER, PARAM, Bundle
from gradleak.errors import UsageError
from gradleak.models.spec import ModelSpec


class Watch:
    """Hooks on a model that keep its newest step: weights before it, and gradients after it.

    What they keep are copies, so that neither the optimiser's step nor ``zero_grad`` changes them.
    Gradients accumulated over several backward passes are kept as their sum, as ``.grad`` holds
    them. Ends with :meth:`close`, or as a context manager.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        """Set the hooks; see :func:`watch`."""
        self._model = model
        self._spec = spec
        self._state: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._example: Tensor | None = None
        self._samples: int | None = None
        self._training = False
        self._hooks: list[Any] = [model.register_forward_pre_hook(self._before, with_kwargs=True)]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook = self._keeper(name)
                setter: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(setter(hook))

    def bundle(self) -> Bundle:
        """Return the newest step as a bundle: gradients, the weights they were taken at, no data.

        Batch size and mode are recorded as they were. Raises :class:`UsageError` before any
        ``backward()``.
        """
        if not self._gradients or self._example is None:
            raise UsageError("no step has been seen", "call this after loss.backward()")
        made = Bundle.from_gradients(
            self._model,
            self._gradients,
            example=self._example,
            spec=self._spec,
            batch_size=self._samples,
        )
        mode = "train" if self._training else "eval"
        return made.extended(self._state, metadata={"mode": mode})

    def close(self) -> None:
        """Take the hooks off; what was kept stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.close()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # an evaluation between the steps
            return
        inputs = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if inputs is None:
            return
        summing = any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        if not summing:
            self._gradients, self._samples = {}, 0
            parts = ((PARAM, model.named_parameters()), (BUFFER, model.named_buffers()))
            self._state = {
                prefix + name: tensor.detach().to("cpu", copy=True)
                for prefix, part in parts
                for name, tensor in part
            }
        self._example = torch.zeros_like(inputs[:1])
        # Sums of means over several passes are no mean over all: of those the size is left open.
        self._samples = len(inputs) if self._samples == 0 else None
        self._training = model.training

    def _keeper(self, name: str) -> Any:
        def keep(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._gradients[name] = parameter.grad.detach().to("cpu", copy=True)

        return keep


def watch(model: nn.Module, *, spec: ModelSpec | None = None) -> Watch:
    """Watch ``model`` train, and keep what a server would receive of its newest step::

        with gradleak.watch(model) as step:
            loss = cross_entropy(model(images), labels)
            loss.backward()
        step.bundle().save("step.safetensors")

    The loop is not changed: forward, backward and the optimiser's step may all stand inside, or the
    watch may stay for a whole training. ``spec`` adds what only the caller knows, such as mean and
    std of the pictures. Of the images only shape and number are kept.
    """
    return Watch(model, spec or ModelSpec())
