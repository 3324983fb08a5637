"""Search among the neighbours of the best noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hfnoise.guidance.number_check import check_number
from hfnoise.pipelines.noise_search import NoiseSearch, Round, best_candidates
from hfnoise.pipelines.redenoise import check_count
from hfnoise.pipelines.verifiers import Verifier


class ZeroOrderSearch(NoiseSearch):
    """Starts from noise that is found from neighbour to neighbour.

    The zero-order search of arXiv 2501.09732, section 3.2: in each round the best noise so far has `neighbours` at the
    angle of `cosine`, of its length ([`~hfnoise.latents.noise_neighbour`]). It stays near to the noise of the plain
    run, and so keeps more of what the seed stands for than [`RandomSearch`], which wins more at the same cost.

    Departure from the code in circulation (tt-scale-flux): the best noise stays when no neighbour is better.

    Args:
        verifier, budget, judge, batch_size, preview_steps, prompts: see [`RandomSearch`].
        neighbours (`int`, defaults to `4`): of a round, at least 1.
        cosine (`float`, defaults to `0.95`): of a neighbour and the noise that it is near to, in [-1, 1), as in that
            code.

    Attributes:
        trace, images, report: see [`RandomSearch`].

    Raises:
        TypeError, ValueError: if an option is out of its range.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines import ZeroOrderSearch, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> search = ZeroOrderSearch(lambda images, prompts: images.mean((1, 2, 3)), 40, neighbours=2)
        >>> with guide(new_digits_pipeline(width=8), initial_noise=search) as pipe:
        ...     image = pipe("the digit seven", num_inference_steps=4).images[0]
        >>> search.trace.sizes
        (0.0, 0.95, 0.95, 0.95, 0.95)
    """

    method = "zero_order"

    def __init__(
        self,
        verifier: Verifier | Mapping[str, Verifier],
        budget: int,
        *,
        neighbours: int = 4,
        cosine: float = 0.95,
        judge: Verifier | None = None,
        batch_size: int = 1,
        preview_steps: int | None = None,
        prompts: str | Sequence[str] | None = None,
    ) -> None:
        self.neighbours, self.cosine = neighbours, cosine
        super().__init__(
            verifier, budget, judge=judge, batch_size=batch_size, preview_steps=preview_steps, prompts=prompts
        )

    def _check(self) -> None:
        super()._check()
        check_count("neighbours", self.neighbours, 1)
        check_number("cosine", self.cosine)
        if not -1.0 <= self.cosine < 1.0:
            raise ValueError(f"cosine must be in [-1, 1), where 1 would be the noise itself; got {self.cosine}.")

    def _round(self, values: Tensor, left: int) -> Round:
        return Round([[best] * self.neighbours for best in best_candidates(values)], self.cosine)

    def __repr__(self) -> str:
        return (
            f"ZeroOrderSearch({', '.join(self._verifiers)}, budget={self.budget}, neighbours={self.neighbours}, "
            f"cosine={self.cosine})"
        )
