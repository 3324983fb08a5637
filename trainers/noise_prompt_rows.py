"""The rows that a network of golden noise is trained on: noise drawn again from its seed, the change, the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hfnoise.latents.pair_diagnosis import PairDiagnosis, diagnose_pairs
from hfnoise.latents.text_mask import text_mask
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
        # A whole column at once: one by one its rows take seconds, of a hundred thousand.
        unknown = sorted(set(pairs["prompt"][:]) - set(states))
        if unknown:
            raise ValueError(f"no text states of {unknown[:3]}: encode all prompts of the pairs.")
        self.pairs, self.states = pairs.with_format("torch"), states
        self.margins: Tensor | None = None
        if {"score_noise", "score_golden"} <= set(pairs.column_names):
            golden, noise = (torch.as_tensor(pairs[name][:]) for name in ("score_golden", "score_noise"))
            self.margins = golden - noise

    @classmethod
    def from_pairs(cls, pairs: Any, pipe: Any, batch_size: int = 64, **call: Any) -> NoisePairRows:
        """Return rows with the text states of a pipeline, those that it gives its denoiser.

        Args:
            pairs (`datasets.Dataset`): see the class.
            pipe (`DiffusionPipeline`): whose `encode_prompt` is used.
            batch_size (`int`, defaults to `64`): prompts that are encoded together.
            **call: of the pipeline's call, as in [`prompt_states`].

        Raises:
            ValueError: if the pipeline encodes no prompts.
        """
        return cls(pairs, prompt_states(pipe, list(dict.fromkeys(pairs["prompt"][:])), batch_size, **call))

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
        for index, prompt in enumerate(self.pairs["prompt"][:]):
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
        **call: of the pipeline's call, as in [`prompt_states`].

    Raises:
        ValueError: if there are no prompts.

    Example:
        >>> from hfnoise.trainers.noise_prompt_rows import PromptRows
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> PromptRows(new_digits_pipeline(width=8), ["the digit seven"], (4, 8, 8))[0]["prompt_embeds"].shape
        torch.Size([8, 64])
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], shape: Sequence[int], **call: Any) -> None:
        if not prompts or isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, with at least one.")
        self.prompts, self.shape = list(prompts), tuple(shape)
        distinct = list(dict.fromkeys(self.prompts))
        self.states = prompt_states(pipe, distinct, **call)
        self.numbers = {prompt: number for number, prompt in enumerate(distinct)}

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt = self.prompts[index]
        number = torch.tensor(self.numbers[prompt])
        return {LATENTS: torch.zeros(self.shape), PROMPT_INDEX: number, **self.states[prompt]}


@torch.no_grad()
def prompt_states(
    pipe: Any, prompts: Sequence[str], batch_size: int = 64, **call: Any
) -> dict[str, dict[str, Tensor]]:
    """Return the text states of prompts as a pipeline gives them to its denoiser, with the mask where there is one.

    What a pipeline's call tells `encode_prompt` by default, it is told here too: Sana's instruction to rewrite a
    prompt, the length of Qwen-Image's. Where states are as long as the longest prompt of their batch, all are padded
    to the longest, behind the mask.

    Args:
        pipe (`DiffusionPipeline`): whose `encode_prompt` is used.
        prompts (sequence of `str`): each once.
        batch_size (`int`, defaults to `64`): prompts that are encoded together.
        **call: of the pipeline's call, in place of its defaults; `encode_prompt` is given those that it takes, such as
            `clip_skip` and `max_sequence_length`.

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
    of_call = inspect.signature(type(pipe).__call__).parameters
    options = {name: one.default for name, one in of_call.items() if one.default is not one.empty} | call
    options |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "device": pipe._execution_device}
    found: dict[str, dict[str, Tensor]] = {}
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        outputs = pipe.encode_prompt(
            **{name: value for name, value in {**options, "prompt": part}.items() if name in known}
        )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        states, masks = outputs[0], text_mask(outputs)
        for row, prompt in enumerate(part):
            found[prompt] = {STATES: states[row].float().cpu()}
            if masks is not None:
                found[prompt][MASK] = masks[row].long().cpu()
    return _of_one_length(found)


def _of_one_length(found: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    longest = max((len(row[STATES]) for row in found.values()), default=0)
    if all(len(row[STATES]) == longest for row in found.values()) and len({MASK in row for row in found.values()}) < 2:
        return found
    padded = {}
    for prompt, row in found.items():
        states, missing = row[STATES], longest - len(row[STATES])
        # Some pipelines leave out a mask that hides nothing.
        mask = row.get(MASK, torch.ones(len(states), dtype=torch.long))
        padded[prompt] = {STATES: F.pad(states, (0, 0, 0, missing)), MASK: F.pad(mask, (0, missing))}
    return padded


def margins_of(dataset: Any) -> Tensor:
    """Return the margins of all rows of a dataset.

    Args:
        dataset: [`NoisePairRows`], a part of such rows, or any dataset with a number of rows.

    Raises:
        ValueError: if it is a stream.
    """
    if isinstance(getattr(dataset, "margins", None), Tensor):
        return dataset.margins
    if isinstance(dataset, Subset):
        return margins_of(dataset.dataset)[list(dataset.indices)]
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "min_margin and margin_temperature weigh pairs at a mean of 1, and the mean of a stream is not known. "
            "Give a dataset with a number of rows (NoisePairRows reads them as they are needed), or filter the stream."
        )
    if MARGIN in (getattr(dataset, "column_names", None) or ()):
        return torch.as_tensor(dataset[MARGIN][:])
    return torch.stack([torch.as_tensor(dataset[index][MARGIN]) for index in range(len(dataset))])
