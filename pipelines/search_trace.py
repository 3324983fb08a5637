"""What a search of the noise did: every candidate, its scores, and how to draw it again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfnoise.latents import candidate_noise, mixed_noise, noise_neighbour
from hfnoise.strict_json import parse_json

METHODS = ("random", "zero_order", "paths")


@dataclass(frozen=True)
class SearchTrace:
    """The candidates of a search: the attribute `trace` of a member, after a call.

    Candidate 0 is the noise of the plain run. Tables have a row a sample, with a column a candidate.

    Args:
        method (`str`): `"random"`, `"zero_order"` or `"paths"`: how a candidate follows from its parent.
        shape (`tuple[int, ...]`): of the noise of one sample.
        seeds (`tuple[int, ...]`): one a sample; with the number of a candidate they give its random numbers.
        parents (table of `int`): the candidate that a candidate was made of; -1 if of none.
        sizes (`tuple[float, ...]`): of each candidate its distance to the parent: the cosine of zero-order search, the
            share eta of fresh noise of paths; 0 where there is no parent.
        scores (`dict[str, table of float]`): by verifier.
        values (table of `float`): what decided: the score, or with several verifiers the mean rank.
        judge (table of `float`, *optional*): scores of a judge that decided nothing.
        chosen (`tuple[int, ...]`): the candidate that each sample starts from.
        budget, evaluations (`int`): of the network, per sample, allowed and spent. The run that then draws the chosen
            noise is not among them.
        num_inference_steps (`int`, *optional*): of previews, if these were compared.

    Raises:
        ValueError: for another method.

    Example:
        >>> from hfnoise.pipelines.search_trace import SearchTrace
        >>> trace = SearchTrace(
        ...     "random", (4, 8, 8), (7,), ((-1, -1),), (0.0, 0.0), {"clip": ((0.1, 0.3),)}, ((0.1, 0.3),), None, (1,),
        ...     budget=8, evaluations=8,
        ... )
        >>> SearchTrace.from_json(trace.to_json()) == trace
        True
        >>> trace.noise(0, 1).shape
        torch.Size([4, 8, 8])
    """

    method: str
    shape: tuple[int, ...]
    seeds: tuple[int, ...]
    parents: tuple[tuple[int, ...], ...]
    sizes: tuple[float, ...]
    scores: dict[str, tuple[tuple[float, ...], ...]]
    values: tuple[tuple[float, ...], ...]
    judge: tuple[tuple[float, ...], ...] | None
    chosen: tuple[int, ...]
    budget: int
    evaluations: int
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}.")

    @property
    def candidates(self) -> int:
        """How many there were of each sample, the plain run's among them."""
        return len(self.sizes)

    def noise(self, sample: int, index: int, base: Tensor | None = None) -> Tensor:
        """Return the noise of a candidate again, of unit variance, in float32.

        Args:
            sample (`int`): of the batch.
            index (`int`): of the candidate.
            base (`torch.Tensor` of `shape`, *optional*): the noise of the plain run, needed for candidate 0 and what
                was made of it.

        Raises:
            IndexError: if there is no such sample or candidate.
            ValueError: if `base` is needed and missing, or of another shape.
        """
        if not (0 <= sample < len(self.seeds) and 0 <= index < self.candidates):
            raise IndexError(
                f"there are {len(self.seeds)} samples with {self.candidates} candidates each, and no candidate "
                f"{index} of sample {sample}."
            )
        if index == 0:
            if base is None or tuple(base.shape) != self.shape:
                found = "none" if base is None else f"one of shape {tuple(base.shape)}"
                raise ValueError(
                    f"candidate 0 is the noise of the plain run, which a trace does not hold: give it as base, of "
                    f"shape {self.shape}; got {found}."
                )
            return base.float()
        fresh = candidate_noise(self.seeds[sample], index, self.shape)
        parent = self.parents[sample][index]
        if parent < 0:
            return fresh if base is None else fresh.to(base.device)
        near = self.noise(sample, parent, base)
        return next_noise(self.method, near[None], fresh[None].to(near.device), self.sizes[index])[0]

    def to_json(self) -> str:
        """Return it as a text of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SearchTrace:
        """Return the trace that `to_json` wrote.

        Raises:
            ValueError: if it is none.
        """
        try:
            return cls(**{name: _tuples(value) for name, value in parse_json(text).items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no search trace of hfnoise: {error}.") from error


def next_noise(method: str, parents: Tensor, fresh: Tensor, size: float) -> Tensor:
    """Return candidates that are made of others.

    Args:
        method (`str`): of [`SearchTrace`].
        parents, fresh (`torch.Tensor` of shape `(batch, ...)`): fresh noise is standard normal.
        size (`float`): the cosine to the parent, for paths the share eta of fresh noise.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines.search_trace import next_noise
        >>> next_noise("paths", torch.ones(1, 2), torch.zeros(1, 2), 0.6)
        tensor([[0.8000, 0.8000]])
    """
    return noise_neighbour(parents, fresh, size) if method == "zero_order" else mixed_noise(parents, size, fresh)


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(part) for part in value)
    return {name: _tuples(part) for name, part in value.items()} if isinstance(value, dict) else value
