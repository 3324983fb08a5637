"""Best of several noises."""

from __future__ import annotations

from torch import Tensor

from hfnoise.pipelines.noise_search import NO_PARENT, NoiseSearch, Round


class RandomSearch(NoiseSearch):
    """Starts from the best of several independent noises.

    The random search (best of N) of "Inference-time scaling for diffusion models beyond scaling denoising steps"
    (arXiv 2501.09732, section 3.2): at equal cost the one to beat. If a verifier is always right and one image is
    right with probability p, the best of N is right with 1 - (1 - p)^N; an independent `judge` tells how far the
    verifier's own errors are searched for, which grows with N.

    Args:
        verifier (`Callable` or mapping of such by name): takes images `(batch, channels, height, width)` in [0, 1] and
            prompts, and returns a number for each, more being better. Of several the mean rank among the candidates
            decides.
        budget (`int`): evaluations of the network for each sample, a prediction with or without prompt being one: N
            images of S steps with guidance need 2 N S. At least one image. What is left over is less than an image.
        judge (`Callable`, *optional*): scores the candidates for the trace, and decides nothing.
        batch_size (`int`, defaults to `1`): candidates of a sample that run in one batch, as more images of its
            prompt.
        preview_steps (`int`, *optional*): compare images of so many steps, at their cost. The best preview need not
            make the best image.
        prompts (`str` or list of `str`, *optional*): what verifiers are told; the prompts of the call by default.

    Attributes:
        trace ([`~hfnoise.pipelines.SearchTrace`]): of the last call: all scores, choices and costs.
        images (`torch.Tensor`): of the last call, those that were chosen, or their previews, in [0, 1].
        report ([`~hfnoise.pipelines.StartReport`]): of the last call: cost, and how far the noise went.

    Raises:
        TypeError, ValueError: if an option is out of its range.

    Example:
        >>> import torch
        >>> from hfnoise.pipelines import RandomSearch
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pipe = new_digits_pipeline(width=8)
        >>> search = RandomSearch(lambda images, prompts: images.mean((1, 2, 3)), budget=24)
        >>> call = {"prompt": "the digit seven", "num_inference_steps": 4, "generator": torch.Generator()}
        >>> image = pipe(**call, latents=search.latents(pipe, **call)).images[0]
        >>> search.trace.candidates, search.trace.evaluations
        (3, 24)
    """

    method = "random"

    def _round(self, values: Tensor, left: int) -> Round:
        return Round([[NO_PARENT] * left] * len(values))

    def __repr__(self) -> str:
        return f"RandomSearch({', '.join(self._verifiers)}, budget={self.budget})"
