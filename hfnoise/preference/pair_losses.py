"""The pair losses: each is one function of the beta-scaled margin, with one citation.

Notation: h is the margin beta * (s(chosen) - s(rejected)) with s = log pi_theta - log pi_ref, flip_rate is the
probability that a label is flipped. All return the loss per pair, shape `(batch,)`, in the dtype of the margins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hfnoise.preference.pair_context import PairContext

Margins = Float[Tensor, " batch"]


def sigmoid(margins: Margins, context: PairContext) -> Margins:
    """Return the DPO loss -log sigma(h) (arXiv 2305.18290, eq. 7); label noise shrinks the fitted margin."""
    return -F.logsigmoid(margins)


def cdpo(margins: Margins, context: PairContext) -> Margins:
    """Return conservative DPO (Mitchell 2023, eq. 3): cross-entropy to the label smoothed by the flip rate.

    It stops pushing at the margin logit(1 - flip_rate) and does not undo the shrinkage, so it is a baseline.
    """
    flip_rate = context.required_flip_rate(margins)
    return -(1 - flip_rate) * F.logsigmoid(margins) - flip_rate * F.logsigmoid(-margins)


def robust(margins: Margins, context: PairContext) -> Margins:
    """Return rDPO (arXiv 2403.00409, eq. 11): its mean over label flips is the DPO loss of the clean label.

    Unbounded below: as h grows the loss falls as -flip_rate * h / (1 - 2 flip_rate). Two departures, both off by
    default: `robust_margin_limit` makes the loss constant above a margin, and `robust_rescale` multiplies it by
    (1 - 2 flip_rate), so that optimisers that are not adaptive keep their step size near a flip rate of one half.
    """
    flip_rate = context.required_flip_rate(margins)
    if context.robust_margin_limit is not None:
        margins = margins.clamp(max=context.robust_margin_limit)
    unscaled = -(1 - flip_rate) * F.logsigmoid(margins) + flip_rate * F.logsigmoid(-margins)
    return unscaled if context.robust_rescale else unscaled / (1 - 2 * flip_rate)


def forward_corrected(margins: Margins, context: PairContext) -> Margins:
    """Return -log[(1 - flip_rate) sigma(h) + flip_rate sigma(-h)], the likelihood of the noisy label.

    The forward correction of arXiv 1609.03683 on the Bradley-Terry model; equal to FA-DPO (arXiv 2512.00709) with a
    constant rate. Bounded, and redescending: a pair that the model firmly contradicts loses its weight. With a flip
    rate of 0 it equals `sigmoid` to the bit, since logaddexp(x, -inf) is x.
    """
    flip_rate = torch.as_tensor(context.required_flip_rate(margins), dtype=margins.dtype, device=margins.device)
    kept = torch.log1p(-flip_rate) + F.logsigmoid(margins)
    flipped = torch.log(flip_rate) + F.logsigmoid(-margins)
    return -torch.logaddexp(kept, flipped)


def sym(margins: Margins, context: PairContext) -> Margins:
    """Return t (1 - sigma(h / t)), t = 1 in SymPO (arXiv 2505.24709): a pair and its flip sum to t.

    Hence uniform flips at any rate below one half leave the minimiser where it was, and no rate is needed. The weight
    -dL/dh is at most 1/4. Departures: `sym_temperature` t, a unit for the margin, ours: the loss is nearly linear in
    margins below it, which leaves less to gain from learning single flips by heart; and sigma(-h) in the place of
    1 - 1 / (1 + exp(-h)), which overflows.
    """
    temperature = context.sym_temperature
    return temperature * torch.sigmoid(-margins / temperature)


def ropo(margins: Margins, context: PairContext) -> Margins:
    """Return ROPO (arXiv 2404.04102): DPO plus `ropo_alpha` times its symmetric part, scaled to weight 1."""
    alpha = context.ropo_alpha
    scale = 4 * alpha / (1 + alpha) ** 2
    return -scale * F.logsigmoid(margins) + scale * alpha * torch.sigmoid(-margins)


def holder(margins: Margins, context: PairContext) -> Margins:
    """Return Hölder-DPO (arXiv 2505.17859): -(1 + gamma) p^gamma + gamma p^(1 + gamma) with p = sigma(h).

    Redescending; needs no flip rate. Departure: powers as exp(gamma log sigma(h)), finite for every margin.
    """
    gamma = context.holder_gamma
    log_probability = F.logsigmoid(margins)
    return -(1 + gamma) * torch.exp(gamma * log_probability) + gamma * torch.exp((1 + gamma) * log_probability)


def hinge(margins: Margins, context: PairContext) -> Margins:
    """Return max(0, 1 - h) (SLiC, arXiv 2305.10425), as TRL's `hinge`."""
    return torch.relu(1 - margins)


def exo_pair(margins: Margins, context: PairContext) -> Margins:
    """Return the reverse KL to the smoothed label (EXO, arXiv 2402.00856, eq. 16), as TRL's `exo_pair`.

    Its weight p (1 - p) (logit(1 - flip_rate) - h) vanishes at both ends, and turns negative above the margin
    logit(1 - flip_rate): like `cdpo` it pulls to a finite margin, and in our benchmark it is no better with flips.
    A flip rate of 0 makes it infinite; its paper recommends 1e-3.
    """
    flip_rate = torch.as_tensor(context.required_flip_rate(margins), dtype=margins.dtype, device=margins.device)
    if isinstance(context.flip_rate, float) and context.flip_rate == 0.0:  # a tensor would have to leave the device
        raise ValueError("'exo_pair' is infinite at a flip rate of 0; its paper recommends flip_rate=1e-3.")
    kept = torch.sigmoid(margins) * (F.logsigmoid(margins) - torch.log1p(-flip_rate))
    flipped = torch.sigmoid(-margins) * (F.logsigmoid(-margins) - torch.log(flip_rate))
    return kept + flipped
