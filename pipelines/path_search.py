"""Search along several paths, whose noise is renewed less and less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hfnoise.guidance.number_check import check_number
from hfnoise.pipelines.noise_search import NO_PARENT, NoiseSearch, Round
from hfnoise.pipelines.redenoise import check_count
from hfnoise.pipelines.verifiers import Verifier


class PathSearch(NoiseSearch):
    """Starts from the best of several noises, each of which was renewed in part, round by round.

    After the search over paths of arXiv 2501.09732, section 3.2: `paths` noises; in each round every path branches
    into `branches`, by fresh noise put on it at unit variance, sqrt(1 - eta^2) x + eta z; the best `paths` of all go
    on. The share eta falls from `renoising` in the first round evenly towards 0 behind the last one.

    Departure from the paper, which renews the noise of half-denoised images at falling noise levels: here it is that
    of the start, since what a search in this slot finds is a start, which any later call, sampler or `latents=` can
    take; and paths are compared by images (with `preview_steps` of few steps) and not by estimates of them in
    mid-run. A path goes on beside its branches, so that nothing that was found is lost.

    Args:
        verifier, budget, judge, batch_size, preview_steps, prompts: see [`RandomSearch`].
        paths (`int`, defaults to `2`): how many go on, at least 1.
        branches (`int`, defaults to `2`): of a path in a round, at least 1.
        renoising (`float`, defaults to `0.7`): eta of the first round, in (0, 1]: half of the power.

    Attributes:
        trace, images, report: see [`RandomSearch`].

    Raises:
        TypeError, ValueError: if an option is out of its range.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines import PathSearch, guide
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> search = PathSearch(lambda images, prompts: images.mean((1, 2, 3)), 80, renoising=0.8)
        >>> with guide(new_digits_pipeline(width=8), initial_noise=search) as pipe:
        ...     image = pipe("the digit seven", num_inference_steps=4).images[0]
        >>> search.trace.sizes
        (0.0, 0.0, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.4)
    """

    method = "paths"

    def __init__(
        self,
        verifier: Verifier | Mapping[str, Verifier],
        budget: int,
        *,
        paths: int = 2,
        branches: int = 2,
        renoising: float = 0.7,
        judge: Verifier | None = None,
        batch_size: int = 1,
        preview_steps: int | None = None,
        prompts: str | Sequence[str] | None = None,
    ) -> None:
        self.paths, self.branches, self.renoising = paths, branches, renoising
        super().__init__(
            verifier, budget, judge=judge, batch_size=batch_size, preview_steps=preview_steps, prompts=prompts
        )

    def _check(self) -> None:
        super()._check()
        check_count("paths", self.paths, 1)
        check_count("branches", self.branches, 1)
        check_number("renoising", self.renoising)
        if not 0.0 < self.renoising <= 1.0:
            raise ValueError(f"renoising must be in (0, 1], got {self.renoising}.")

    def _round(self, values: Tensor, left: int) -> Round:
        missing = self.paths - values.shape[1]
        if missing > 0:
            return Round([[NO_PARENT] * missing] * len(values))
        size = self.paths * self.branches
        done, to_come = (values.shape[1] - self.paths) // size, -(-left // size)
        eta = self.renoising * to_come / (done + to_come)
        ordered = values.argsort(dim=1, descending=True, stable=True)[:, : self.paths].tolist()
        # Path by path in turn: a round that the budget cuts off has branches of the best ones.
        return Round([paths * self.branches for paths in ordered], eta)

    def __repr__(self) -> str:
        return (
            f"PathSearch({', '.join(self._verifiers)}, budget={self.budget}, paths={self.paths}, "
            f"branches={self.branches}, renoising={self.renoising})"
        )
