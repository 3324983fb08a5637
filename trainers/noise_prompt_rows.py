"""The rows that a network of golden noise is trained on: noise drawn again from its seed, the change, the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hfnoise.latents.pair_diagnosis import PairDiagnosis, diagnose_pairs
from hfnoise.trainers.diffusion_rows import LATENTS

STATES, MASK, DELTA, MARGIN = "prompt_embeds", "attention_mask", "delta", "margin"
PROMPT_INDEX = "prompt_index"
# Of a dataset of pairs, as collect_noise_pairs writes it.
_COLUMNS = ("prompt", "seed", DELTA)
# Pairs of a prompt that are looked at, at least: enough for the mean of the others to be one.
_DIAGNOSED = 16


class NoisePairRows(Dataset):
    """Rows of pairs: the noise comes from its seed, the states of a prompt are kept once for all its rows.

    Args:
        pairs (`datasets.Dataset`): columns `prompt`, `seed`, `delta`, and where they are known `score_noise` and
            `score_golden`, as [`~hfnoise.collect_noise_pairs`] writes them.
        states (`dict[str, dict[str, Tensor]]`): by prompt, `prompt_embeds` of shape `(tokens, width)` and maybe
            `attention_mask`; see [`NoisePairRows.from_pairs`].

    Raises:
        ValueError: if a column is missing, there are no pairs, or a prompt has no states.

    Example:
        >>> import datasets, torch
        >>> from hfnoise.trainers.noise_prompt_rows import NoisePairRows
        >>> delta = torch.zeros(1, 4, 8, 8).tolist()
        >>> pairs = datasets.Dataset.from_dict({"prompt": ["a"], "seed": [7], "delta": delta})
        >>> rows = NoisePairRows(pairs, {"a": {"prompt_embeds": torch.zeros(5, 6)}})
        >>> torch.equal(rows[0]["latents"], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7)))
        True
    """

    def __init__(self, pairs: Any, states: dict[str, dict[str, Tensor]]) -> None:
        missing = [name for name in _COLUMNS if name not in pairs.column_names]
        if missing or not len(pairs):
            raise ValueError(
                f"pairs have the columns {_COLUMNS}; {missing or 'all rows'} missing in {pairs.column_names}. "
                "hfnoise.collect_noise_pairs makes them."
            )
        unknown = sorted(set(pairs["prompt"]) - set(states))
        if unknown:
            raise ValueError(f"no text states of {unknown[:3]}: encode all prompts of the pairs.")
        self.pairs, self.states = pairs.with_format("torch"), states
        self.margins: Tensor | None = None
        if {"score_noise", "score_golden"} <= set(pairs.column_names):
            self.margins = torch.as_tensor(pairs["score_golden"]) - torch.as_tensor(pairs["score_noise"])

    @classmethod
    def from_pairs(cls, pairs: Any, pipe: Any, batch_size: int = 64) -> NoisePairRows:
        """Return rows with the text states of a pipeline, those that it gives its denoiser.

        Args:
            pairs (`datasets.Dataset`): see the class.
            pipe (`DiffusionPipeline`): whose `encode_prompt` is used.
            batch_size (`int`, defaults to `64`): prompts that are encoded together.

        Raises:
            ValueError: if the pipeline encodes no prompts.
        """
        return cls(pairs, prompt_states(pipe, list(dict.fromkeys(pairs["prompt"])), batch_size))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        # Reading row by row takes longer than a step of a small network.
        read = self.pairs[list(indices)]
        rows = []
        for index, prompt, seed, delta in zip(indices, read["prompt"], read["seed"], read[DELTA], strict=True):
            noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(int(seed)))
            row = {LATENTS: noise, DELTA: delta.float(), **self.states[prompt]}
            rows.append(row if self.margins is None else {**row, MARGIN: self.margins[index]})
        return rows

    def split(self, share: float = 0.1) -> tuple[NoisePairRows, NoisePairRows]:
        """Return rows to train on and rows to evaluate on, drawn at random but the same at every call.

        Not every so manieth pair: prompts come in turn, and all pairs of some would be left out.

        Args:
            share (`float`, defaults to `0.1`): of the pairs to evaluate on, in (0, 1).

        Raises:
            ValueError: if a part would be empty.
        """
        count = round(len(self) * share)
        if not 0 < count < len(self):
            raise ValueError(f"a share of {share} of {len(self)} pairs leaves a part empty.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).tolist()
        parts = sorted(order[count:]), sorted(order[:count])
        return tuple(NoisePairRows(self.pairs.select(part), self.states) for part in parts)  # type: ignore[return-value]

    def diagnose(self, limit: int = 512) -> PairDiagnosis:
        """Return what the pairs hold, of at most `limit` of them: some of each prompt, of prompts drawn at random."""
        members: dict[str, list[int]] = {}
        for index, prompt in enumerate(self.pairs["prompt"]):
            members.setdefault(prompt, []).append(index)
        most = max(_DIAGNOSED, -(-limit // len(members)))
        groups = [rows[:most] for rows in members.values()]
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = [index for number in order for index in groups[number]][:limit]
        rows = self.__getitems__(chosen)
        prompts = self.pairs[chosen]["prompt"]
        return diagnose_pairs(
            torch.stack([row[LATENTS] for row in rows]), torch.stack([row[DELTA] for row in rows]), prompts
        )


class PromptRows(Dataset):
    """Rows of prompts for `loss="reward"`: the noise is drawn anew at every step, so they only say its shape.

    A row has `prompt_index`, the number of its prompt among the distinct ones in their order.

    Args:
        pipe (`DiffusionPipeline`): whose `encode_prompt` is used.
        prompts (sequence of `str`): as often as they are to come.
        shape (`tuple` of three `int`): of the latents of a sample.

    Raises:
        ValueError: if there are no prompts.

    Example:
        >>> from hfnoise.trainers.noise_prompt_rows import PromptRows
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> PromptRows(new_digits_pipeline(width=8), ["the digit seven"], (4, 8, 8))[0]["prompt_embeds"].shape
        torch.Size([8, 64])
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], shape: Sequence[int]) -> None:
        if not prompts or isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, with at least one.")
        self.prompts, self.shape = list(prompts), tuple(shape)
        distinct = list(dict.fromkeys(self.prompts))
        self.states = prompt_states(pipe, distinct)
        self.numbers = {prompt: number for number, prompt in enumerate(distinct)}

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt = self.prompts[index]
        number = torch.tensor(self.numbers[prompt])
        return {LATENTS: torch.zeros(self.shape), PROMPT_INDEX: number, **self.states[prompt]}


@torch.no_grad()
def prompt_states(pipe: Any, prompts: Sequence[str], batch_size: int = 64) -> dict[str, dict[str, Tensor]]:
    """Return the text states of prompts as a pipeline gives them to its denoiser, with the mask where there is one.

    Args:
        pipe (`DiffusionPipeline`): whose `encode_prompt` is used.
        prompts (sequence of `str`): each once.
        batch_size (`int`, defaults to `64`): prompts that are encoded together.

    Raises:
        ValueError: if the pipeline encodes no prompts.

    Example:
        >>> from hfnoise.trainers.noise_prompt_rows import prompt_states
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> prompt_states(new_digits_pipeline(width=8), ["the digit seven"])["the digit seven"]["prompt_embeds"].shape
        torch.Size([8, 64])
    """
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"{type(pipe).__name__} encodes no prompts. Make the states yourself: NoisePairRows(pairs, states)."
        )
    known = inspect.signature(pipe.encode_prompt).parameters
    found: dict[str, dict[str, Tensor]] = {}
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        options = {"prompt": part, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        options |= {"device": pipe._execution_device, "prompt_2": None, "prompt_3": None}
        outputs = pipe.encode_prompt(**{name: value for name, value in options.items() if name in known})
        states = outputs[0] if isinstance(outputs, tuple) else outputs
        masks = _mask(outputs, states)
        for row, prompt in enumerate(part):
            found[prompt] = {STATES: states[row].float().cpu()}
            if masks is not None:
                found[prompt][MASK] = masks[row].cpu()
    return found


def _mask(outputs: Any, states: Tensor) -> Tensor | None:
    """Return the mask among the outputs of `encode_prompt`: the first of whole numbers, a number a token."""
    for one in outputs if isinstance(outputs, tuple) else ():
        if isinstance(one, Tensor) and one.shape == states.shape[:2] and not one.is_complex():
            return one
    return None
