"""Noise robustness on frozen features: every loss, many seeds, in minutes.

The features of a pair come from the shipped model of the docstrings world; only a small head is trained, so that a run
takes a fraction of a second. The head scores an answer, the margin is the difference of two scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hfnoise.preference import dr_dpo_value, estimate_flip_rate, pair_loss
from hfnoise.worlds import docstrings

# How long the head is trained: (epochs, learning rate). "trained" is where plain DPO on clean labels is near its best;
# "over-trained" goes on until it has learned most flips by heart, as fine-tuning for several epochs does.
REGIMES = {"trained": (8, 1e-3), "over-trained": (25, 3e-3)}
BATCH_SIZE = 64
WIDTH = 64
# Principal components kept of the 258 features.
COMPONENTS = 64
# Held-out pairs for the flip rate; their labels are as noisy as those of training.
RATE_PAIRS = 1000
# Clean pairs for the accuracy; the world has about 1400 of them, depending on the version of Python.
TEST_PAIRS = 1200


@dataclass(frozen=True)
class PairFeatures:
    """Features of chosen and rejected answers, shape `(pairs, features)`, with the clean label: chosen is better."""

    chosen: Tensor
    rejected: Tensor

    def select(self, index: Tensor) -> PairFeatures:
        return PairFeatures(self.chosen[index], self.rejected[index])

    def flipped(self, flips: Tensor) -> PairFeatures:
        """Return the pairs with the labels of some of them flipped; `flips` is boolean, shape `(pairs,)`."""
        swap = flips[:, None]
        return PairFeatures(
            torch.where(swap, self.rejected, self.chosen), torch.where(swap, self.chosen, self.rejected)
        )

    def __len__(self) -> int:
        return len(self.chosen)


@torch.no_grad()
def extract(split: str, size: int) -> PairFeatures:
    """Return features of pairs of the docstrings world: mean and minimum over the answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = docstrings.model_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    pairs = docstrings.preference_pairs(split, size=size, seed=0)
    sides: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    for start in tqdm(range(0, size, 100), desc=f"features of {split} pairs"):
        rows: Any = pairs[start : start + 100]
        for side, found in sides.items():
            found.append(_features(model, tokenizer, rows["prompt"], rows[side]))
    return PairFeatures(torch.cat(sides["chosen"]), torch.cat(sides["rejected"]))


def _features(model: Any, tokenizer: Any, prompts: list[str], answers: list[str]) -> Tensor:
    # The end of the text is part of the answer, as in training.
    texts = [a + b + tokenizer.eos_token for a, b in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    lengths = torch.tensor([len(tokenizer(prompt)["input_ids"]) for prompt in prompts])
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    position = torch.arange(batch["input_ids"].shape[1] - 1)
    answer = (position >= lengths[:, None] - 1) & batch["attention_mask"][:, 1:].bool()
    log_probs = output.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])
    states = torch.cat([output.hidden_states[-1][:, 1:], log_probs], dim=-1)
    mean = (states * answer[..., None]).sum(1) / answer.sum(1, keepdim=True)
    lowest = states.masked_fill(~answer[..., None], torch.inf).amin(1)
    return torch.cat([mean, lowest], dim=-1)


def normalised(train: PairFeatures, *others: PairFeatures) -> list[PairFeatures]:
    """Return the leading principal components of all features, at unit variance on the training features."""
    everything = torch.cat([train.chosen, train.rejected])
    mean, deviation = everything.mean(0), everything.std(0).clamp(min=1e-6)
    scaled = (everything - mean) / deviation
    _, lengths, directions = torch.linalg.svd(scaled, full_matrices=False)
    basis = directions[:COMPONENTS].T / lengths[:COMPONENTS] * len(scaled) ** 0.5
    return [
        PairFeatures((part.chosen - mean) / deviation @ basis, (part.rejected - mean) / deviation @ basis)
        for part in (train, *others)
    ]


def train_head(
    pairs: PairFeatures,
    loss: str,
    flip_rate: float | None,
    seed: int,
    regime: str,
    dr_pairs: int = 0,
    dr_beta: float = 1.0,
    **options: float,
) -> torch.nn.Module:
    """Return a head trained with the named loss; with Dr. DPO over `dr_pairs` pairs at a time, if not 0."""
    torch.manual_seed(seed)
    epochs, learning_rate = REGIMES[regime]
    head = torch.nn.Sequential(
        torch.nn.Linear(pairs.chosen.shape[1], WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1)
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)
    for _ in range(epochs):
        for index in torch.randperm(len(pairs)).split(BATCH_SIZE):
            margins = head(pairs.chosen[index]).squeeze(-1) - head(pairs.rejected[index]).squeeze(-1)
            optimizer.zero_grad(set_to_none=True)
            losses = pair_loss(loss, margins, flip_rate, **options)
            if dr_pairs:
                losses = torch.stack([dr_dpo_value(part, dr_beta) for part in losses.split(dr_pairs)])
            losses.mean().backward()
            optimizer.step()
    return head


@torch.no_grad()
def margins_of(head: torch.nn.Module, pairs: PairFeatures) -> Tensor:
    """Return the margins of the pairs, shape `(pairs,)`."""
    return (head(pairs.chosen) - head(pairs.rejected)).squeeze(-1)


@dataclass(frozen=True)
class Result:
    """Outcome of one run: accuracy on clean held-out pairs, the estimated rate, the precision of the suspects."""

    accuracy: float
    estimated_flip_rate: float | None = None
    refused: bool = False
    truth_inside: bool | None = None
    suspect_precision: float | None = None


def run(
    name: str, flip_rate: float, seed: int, train: PairFeatures, rate: PairFeatures, test: PairFeatures, regime: str
) -> Result:
    """Run one method at one flip rate.

    `name` is a pair loss, which is told the true rate if it reads one; or one of

    - "robust at 0.45", which always assumes that rate;
    - "sym at temperature 4", as RobustDPOTrainer has it;
    - "dr_sigmoid over 8 at 1.0", Dr. DPO over 8 pairs at a time with that `dr_beta`;
    - "forward_corrected (estimated)", told the rate estimated from held-out margins of `sym`;
    - "clean fraction", plain DPO on the clean pairs that the noisy ones are worth.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    flips = torch.rand(len(train), generator=generator) < flip_rate
    noisy = train.flipped(flips)
    if name == "clean fraction":
        # Information limit: at h = 0 a noisy pair is worth (1 - 2 flip_rate)^2 clean ones.
        worth = max(1, round(len(train) * (1 - 2 * flip_rate) ** 2))
        index = torch.randperm(len(train), generator=generator)[:worth]
        return Result(_accuracy(train_head(train.select(index), "sigmoid", None, seed, regime), test))
    if name == "forward_corrected (estimated)":
        held_out = rate.flipped(torch.rand(len(rate), generator=generator) < flip_rate)
        head = train_head(noisy, "sym", None, seed, regime)
        estimate = estimate_flip_rate(margins_of(head, held_out))
        if not estimate.refused:
            head = train_head(noisy, "forward_corrected", estimate.flip_rate, seed, regime)
        truth_inside = estimate.interval[0] <= flip_rate <= estimate.interval[1]
        return Result(_accuracy(head, test), estimate.flip_rate, estimate.refused, truth_inside)
    # exo_pair is infinite at a rate of 0; 1e-3 is what its paper recommends.
    told = {"exo_pair": max(flip_rate, 1e-3), "robust at 0.45": 0.45}.get(name, flip_rate)
    options: dict[str, Any] = {"sym_temperature": 4.0} if name == "sym at temperature 4" else {}
    if name.startswith("dr_sigmoid"):
        _, _, pairs, _, dr_beta = name.split()
        options = {"dr_pairs": int(pairs), "dr_beta": float(dr_beta)}
    head = train_head(noisy, name.split()[0].removeprefix("dr_"), told, seed, regime, **options)
    suspects = margins_of(head, noisy).argsort()[: int(flips.sum())]
    precision = flips[suspects].float().mean().item() if flips.any() else None
    return Result(_accuracy(head, test), suspect_precision=precision)


def _accuracy(head: torch.nn.Module, test: PairFeatures) -> float:
    return (margins_of(head, test) > 0).float().mean().item()
