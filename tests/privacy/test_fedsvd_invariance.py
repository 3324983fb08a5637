"""The invariance theorem of docs/fedsvd.md: under SGD, FedSVD is FFA-LoRA with orthonormal A, to rounding."""

import math

import pytest
import torch

from hfnoise.privacy import aggregate_lora, initial_lora_A, refresh_lora
from hfnoise.privacy.lora_rotation import orthonormal_rows, orthonormality_error

ROUNDS, STEPS, RANK, INPUTS, HIDDEN, CLASSES = 20, 5, 3, 20, 12, 5
SIZES = [30, 50, 20]
SCALING, RATE, DECAY, MOMENTUM, CLIP, NOISE = 2.0, 0.4, 0.02, 0.5, 0.3, 0.5
LAYERS = {"first": (INPUTS, HIDDEN), "second": (HIDDEN, CLASSES)}
BOUND = 1e-10


def generator_of(*numbers):
    seed = 0
    for number in numbers:
        seed = 1009 * seed + number
    return torch.Generator().manual_seed(seed)


def draw(shape, *numbers):
    return torch.randn(shape, generator=generator_of(*numbers), dtype=torch.float64)


WEIGHTS = {name: draw((out, inp), 1, inp) / math.sqrt(inp) for name, (inp, out) in LAYERS.items()}


def start_rows(init_A):
    return {
        name: initial_lora_A(init_A, RANK, inp, generator=generator_of(2, inp), dtype=torch.float64)
        for name, (inp, _) in LAYERS.items()
    }


def loss(lora_B, lora_A, x, y):
    """The loss of one example: two layers with adapters and a tanh between them."""
    weights = {name: weight + SCALING * lora_B[name] @ lora_A[name] for name, weight in WEIGHTS.items()}
    logits = weights["second"] @ torch.tanh(weights["first"] @ x)
    return torch.logsumexp(logits, 0) - logits.gather(0, y[None])[0]


unit_gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0, 0))


def clipped_sum(grads, per_layer):
    """Return the sum of per-unit gradients, clipped over all layers or each layer for itself, in float64."""
    norms = {name: grad.flatten(1).norm(dim=1) for name, grad in grads.items()}
    total = torch.stack(list(norms.values())).norm(dim=0)
    bound = CLIP / math.sqrt(len(grads)) if per_layer else CLIP
    factors = {name: (bound / (norms[name] if per_layer else total)).clamp(max=1) for name in grads}
    assert 0 < sum(int((factor < 1).sum()) for factor in factors.values())  # clipping happens
    return {name: torch.einsum("n,nor->or", factors[name], grad) for name, grad in grads.items()}


def local_training(lora_A, lora_B, turns, client, round, optimizer, per_layer):
    """Return B after noisy steps; `turns` rotates the noise to where this method's rows point."""
    lora_B = {name: factor.clone() for name, factor in lora_B.items()}
    x, y = draw((SIZES[client], INPUTS), 3, client), draw((SIZES[client],), 4, client).abs().mul(3).long() % CLASSES
    first = {name: torch.zeros_like(factor) for name, factor in lora_B.items()}
    second = {name: torch.zeros_like(factor) for name, factor in lora_B.items()}
    for step in range(STEPS):
        rows = torch.rand(len(x), generator=generator_of(5, client, round, step)) < 0.5
        summed = clipped_sum(unit_gradients(lora_B, lora_A, x[rows], y[rows]), per_layer)
        for place, name in enumerate(lora_B):
            noise = draw(lora_B[name].shape, 6, client, round, step, place) @ turns[name]
            grad = (summed[name] + CLIP * NOISE * noise) / (len(x) / 2)
            if optimizer == "adam":
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.999 * second[name] + 0.001 * grad**2
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                lora_B[name] = lora_B[name] - 0.05 * mean / (square.sqrt() + 1e-8)
            else:
                first[name] = MOMENTUM * first[name] + grad + DECAY * lora_B[name]
                lora_B[name] = lora_B[name] - RATE * first[name]
    return lora_B


def federate(method, lora_A, *, optimizer="sgd", per_layer=False, refresh_every=None):
    """Yield A and the update of every weight after each round, what was folded included."""
    lora_A, lora_B = dict(lora_A), {name: torch.zeros(out, RANK).double() for name, (_, out) in LAYERS.items()}
    turns = {name: torch.eye(RANK).double() for name in LAYERS}
    for round in range(ROUNDS):
        clients = [local_training(lora_A, lora_B, turns, k, round, optimizer, per_layer) for k in range(len(SIZES))]
        result = aggregate_lora(method, lora_A, lora_B, None, clients, SIZES, SCALING)
        for name, layer in result.items():
            lora_A[name], lora_B[name] = layer.lora_A, layer.lora_B
            if method == "fedsvd":
                turns[name] = turns[name] @ layer.rotation
            if refresh_every and (round + 1) % refresh_every == 0:
                lora_A[name], lora_B[name], _ = refresh_lora(
                    lora_A[name], lora_B[name], RANK, generator=generator_of(7, round)
                )
        yield dict(lora_A), {name: lora_B[name] @ lora_A[name] for name in LAYERS}


def largest_difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in LAYERS)


def projectors(lora_A):
    rows = {name: orthonormal_rows(factor)[0] for name, factor in lora_A.items()}
    return {name: factor.mT @ factor for name, factor in rows.items()}


@pytest.mark.parametrize("per_layer", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fedsvd_is_ffa_with_orthonormal_rows(per_layer):
    start = start_rows("orthonormal")
    ffa = list(federate("ffa", start, per_layer=per_layer))
    fedsvd = list(federate("fedsvd", start, per_layer=per_layer))
    for (_, one), (_, other) in zip(ffa, fedsvd, strict=True):
        assert largest_difference(one, other) < BOUND
    # The factors themselves are not the same, and something was learned.
    assert largest_difference(ffa[-1][0], fedsvd[-1][0]) > 0.1
    assert max(float(update.abs().max()) for update in fedsvd[-1][1].values()) > 0.05


def test_the_row_space_never_changes():
    start = projectors(start_rows("kaiming"))
    for lora_A, update in federate("fedsvd", start_rows("kaiming")):
        assert largest_difference(projectors(lora_A), start) < BOUND
        assert max(orthonormality_error(rows) for rows in lora_A.values()) < BOUND
        for name in LAYERS:  # what it trains lies in that space
            assert (update[name] @ start[name] - update[name]).abs().max() < BOUND
    *_, (lora_A, _) = federate("fedsvd", start_rows("kaiming"), refresh_every=10)
    assert largest_difference(projectors(lora_A), start) > 0.1


@pytest.mark.slow
def test_what_the_theorem_does_not_say():
    """Adam depends on the basis, and Kaiming rows are other rows with other learning rates."""
    start = start_rows("orthonormal")
    *_, (_, adam_ffa) = federate("ffa", start, optimizer="adam")
    *_, (_, adam_fedsvd) = federate("fedsvd", start, optimizer="adam")
    assert largest_difference(adam_ffa, adam_fedsvd) > 1e-3
    *_, (_, kaiming_ffa) = federate("ffa", start_rows("kaiming"))
    same_space = {name: orthonormal_rows(rows)[0] for name, rows in start_rows("kaiming").items()}
    *_, (_, orthonormal_ffa) = federate("ffa", same_space)
    assert largest_difference(kaiming_ffa, orthonormal_ffa) > 1e-3
