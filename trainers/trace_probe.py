"""Gradients per pair, sketched from the backward pass that trains: what the estimate of BVPO's share needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Inner products of gradients are kept on average (Johnson-Lindenstrauss), with an error of about 2 / sqrt(width) for
# one matrix, which the sum over matrices averages out.
_SKETCH_WIDTH = 64
# Matrices that are looked at, spread evenly over the depth of the model.
_MOST_MATRICES = 64


class GradientProbe:
    """Listens to the backward pass of a model and keeps a sketch of the gradient of every row of the batch.

    The gradient of a linear layer is the sum over tokens of (gradient of its output) x (its input); restricted to the
    tokens of one row it is that of the row's own loss, for rows do not see each other. Both factors are projected to a
    few random directions and multiplied, so no gradient of full size exists and no backward pass is added.

    Args:
        model (`torch.nn.Module`): unwrapped; only matrices that are trained count: all with full fine-tuning, the
            adapters with LoRA. The LM head is left out, since TRL's fused head does not call its module.

    Raises:
        ValueError: if no linear layer or embedding is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [
            module
            for module in model.modules()
            if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and module.weight.requires_grad
        ]
        if not trained:
            raise ValueError(
                "trace_alpha='auto' reads the gradients of linear layers and embeddings, and none is trained here. "
                "Train some (LoRA, full fine-tuning), or give trace_alpha a number."
            )
        step = max(1.0, len(trained) / _MOST_MATRICES)
        self._modules = [trained[int(place * step)] for place in range(min(len(trained), _MOST_MATRICES))]
        self._projections: dict[int, Tensor] = {}
        self._sketches: dict[int, Tensor] = {}

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Keep the sketches of the forward and backward passes inside."""
        self._sketches = {}
        handles = [module.register_forward_hook(partial(self._forward, n)) for n, module in enumerate(self._modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take_pairs(self) -> Tensor:
        """Return the sketched gradients by pair, shape `(pairs, features)`: rows are all chosen, then all rejected."""
        if not self._sketches:
            raise RuntimeError(
                "no gradient was seen: none of the trained layers was called on rows of tokens. Give trace_alpha "
                "a number."
            )
        # Learned position embeddings are looked up once for all rows: nothing can be told apart there.
        count = max(sketch.size(0) for sketch in self._sketches.values())
        kept = [self._sketches[key] for key in sorted(self._sketches) if self._sketches[key].size(0) == count]
        rows = torch.cat(kept, dim=1)
        self._sketches = {}
        chosen, rejected = rows.chunk(2)
        return chosen + rejected

    def _forward(self, number: int, module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        given = arguments[0]
        # Without a graph it is a reference pass, or the first pass of a checkpoint; without a row per answer (experts
        # see tokens of all rows) nothing can be told apart.
        if not output.requires_grad or output.dim() != 3:
            return
        with torch.no_grad():
            directions = self._directions(2 * number, _inputs(module), output.device)
            sketch = directions[given] if isinstance(module, nn.Embedding) else given.float() @ directions
        output.register_hook(partial(self._backward, number, sketch))

    def _backward(self, number: int, sketch: Tensor, gradient: Tensor) -> None:
        directions = self._directions(2 * number + 1, gradient.size(-1), gradient.device)
        product = torch.einsum("rti,rto->rio", sketch, gradient.float() @ directions).flatten(1)
        # A module that is called twice has the sum of both as its gradient.
        self._sketches[number] = self._sketches.get(number, 0) + product

    def _directions(self, seed: int, size: int, device: torch.device) -> Tensor:
        """Return random directions: the same in every step, process and resumed run; all of them if there are few."""
        if seed not in self._projections:
            if size <= _SKETCH_WIDTH:
                directions = torch.eye(size)
            else:
                generator = torch.Generator().manual_seed(seed)
                directions = torch.randn(size, _SKETCH_WIDTH, generator=generator) / _SKETCH_WIDTH**0.5
            self._projections[seed] = directions.to(device)
        return self._projections[seed]


def _inputs(module: Any) -> int:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    return int(module.in_features if isinstance(module, nn.Linear) else module.nx)
