"""Noise that diffusion models are trained on and start from.

Everything here is arithmetic on torch tensors; the trainers and pipelines that use it are in `hfnoise.trainers` and
`hfnoise.pipelines`.
"""

from hfnoise.latents.loss_weighting import (
    DebiasWeighting,
    LossWeighting,
    MinSNRWeighting,
    P2Weighting,
    UniformWeighting,
)

__all__ = ["DebiasWeighting", "LossWeighting", "MinSNRWeighting", "P2Weighting", "UniformWeighting"]
