"""Train the tiny reasoning Llama of the arithmetic world and save it as a Hub folder.

One command rebuilds the shipped weights in a few minutes on 2 CPU cores::

    python -m hfnoise.worlds.arithmetic_model --output_dir model_cards/arithmetic-llama

It is supervised fine-tuning on imperfect solutions (hfnoise/worlds/arithmetic_traces.py), half of them with a trace
and half without, half as bare text and half through the chat template. No sum of the validation split is among them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hfnoise.worlds.arithmetic import MAX_NEW_TOKENS, accuracy, prompts, random_prompt, split_of
from hfnoise.worlds.arithmetic_traces import write_example
from hfnoise.worlds.tiny_llama import new_tiny_llama

logger = logging.getLogger(__name__)

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_CHARACTERS = "\n +-=0123456789abcdefghijklmnopqrstuvwxyz"
_UNKNOWN = "?"
# The stock template of DeepSeek-R1-Distill without its tools. A finished assistant turn loses its trace, and the
# generation prompt opens one.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{%- else %}{{ '" + ASSISTANT + "' + message['content'].split('</think>')[-1] + eos_token }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '" + ASSISTANT + "<think>\\n' }}{%- endif %}"
)
_EVALUATION_SUMS = 1000


@dataclass(frozen=True)
class ArithmeticRecipe:
    """Settings of the tiny Llama; the defaults are those of the shipped weights.

    Args:
        hidden_size (`int`, defaults to `96`): width; a multiple of twice `num_attention_heads`.
        intermediate_size (`int`, defaults to `288`): width of the MLP.
        num_hidden_layers (`int`, defaults to `3`): blocks.
        num_attention_heads (`int`, defaults to `4`): heads.
        trace_share (`float`, defaults to `0.5`): share of examples with a trace, in [0, 1].
        batch_size (`int`, defaults to `32`): examples per step.
        max_steps (`int`, defaults to `5000`): optimiser steps, each on new examples.
        learning_rate (`float`, defaults to `3e-3`): peak of a cosine schedule with 5 % warm-up.
        seed (`int`, defaults to `0`): of the first weights and of the examples.
    """

    hidden_size: int = 96
    intermediate_size: int = 288
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    trace_share: float = 0.5
    batch_size: int = 32
    max_steps: int = 5000
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 x num_attention_heads = {2 * self.num_attention_heads}, "
                f"got {self.hidden_size}."
            )
        if not 0 <= self.trace_share <= 1:
            raise ValueError(f"trace_share must be in [0, 1], got {self.trace_share}.")
        if self.batch_size < 1 or self.max_steps < 1:
            raise ValueError(
                f"batch_size and max_steps must be at least 1, got {self.batch_size} and {self.max_steps}."
            )


def build(output_dir: str | Path, recipe: ArithmeticRecipe | None = None) -> dict[str, float]:
    """Train the model, and save it with its tokenizer and card.

    Args:
        output_dir (`str` or `Path`): folder to write, made if it is missing.
        recipe (`ArithmeticRecipe`, *optional*): settings; those of the shipped weights by default.

    Returns:
        `parameters`, `questions` (validation sums that were asked), and the accuracy on them: `think`, `nothink`
        (sampled at temperature 1), `think_greedy`, `nothink_greedy`.

    Example:
        >>> from hfnoise.worlds.arithmetic_model import ArithmeticRecipe, build
        >>> build("my-llama", ArithmeticRecipe(max_steps=100))["parameters"]  # doctest: +SKIP
        364800.0
    """
    import torch

    from hfnoise.worlds.arithmetic_card import arithmetic_card

    recipe = recipe or ArithmeticRecipe()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # before the training: an unwritable place fails at once
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = new_tiny_llama(tokenizer, recipe, 2 * MAX_NEW_TOKENS, max_new_tokens=MAX_NEW_TOKENS)
        _train(model, tokenizer, recipe)
    questions = prompts("validation", _EVALUATION_SUMS)
    results = {"parameters": float(model.num_parameters()), "questions": float(len(questions))}
    results |= evaluate(model, tokenizer, questions)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arithmetic_card(recipe, results).save(folder / "README.md")
    logger.info("saved %s: %s", folder, results)
    return results


def evaluate(model: Any, tokenizer: Any, questions: list[str]) -> dict[str, float]:
    """Return the accuracy in both modes, sampled at temperature 1 and greedy."""
    return {
        f"{mode}{suffix}": accuracy(model, tokenizer, questions, mode, temperature)
        for mode in ("think", "nothink")
        for suffix, temperature in (("", 1.0), ("_greedy", 0.0))
    }


def build_tokenizer() -> Any:
    """Return a tokenizer of single characters, in which `<think>` and `</think>` are one token each.

    As in DeepSeek-R1-Distill they are no special tokens: decoding with `skip_special_tokens=True` keeps them.

    Example:
        >>> from hfnoise.worlds.arithmetic_model import build_tokenizer
        >>> build_tokenizer().tokenize("<think>\\n1+1")
        ['<think>', '\\n', '1', '+', '1']
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, USER, ASSISTANT]
    entries = [*special, "<think>", "</think>", _UNKNOWN, *_CHARACTERS]
    vocabulary = {token: number for number, token in enumerate(entries)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=_UNKNOWN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _examples(recipe: ArithmeticRecipe) -> Iterator[tuple[str, str]]:
    """Yield (text that is given, text that is learned) without end, from training sums only.

    What opens the trace is given, as in use: the model never chooses whether to think.
    """
    random = Random(recipe.seed)
    while True:
        question = random_prompt(random)
        if split_of(question) == "train":
            start, completion = write_example(question, random.random() < recipe.trace_share, random)
            chat = random.random() < 0.5
            prompt = f"{BOS_TOKEN}{USER}{question}{ASSISTANT}" if chat else question
            yield prompt + start, completion + EOS_TOKEN


def _batches(tokenizer: Any, recipe: ArithmeticRecipe) -> Iterator[tuple[Any, Any]]:
    """Yield (batch, sequence) token ids and labels; the loss is that of the completions."""
    import torch

    examples = _examples(recipe)
    encode = tokenizer.backend_tokenizer.encode
    while True:
        # Sorted within some batches, by their order in which they are drawn: less padding.
        pairs = [next(examples) for _ in range(8 * recipe.batch_size)]
        rows = [(encode(prompt).ids, encode(completion).ids) for prompt, completion in pairs]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        for number in torch.randperm(8).tolist():
            part = rows[number * recipe.batch_size : (number + 1) * recipe.batch_size]
            width = max(len(prompt) + len(completion) for prompt, completion in part)
            ids = torch.full((len(part), width), tokenizer.pad_token_id)
            labels = torch.full((len(part), width), -100)
            for row, (prompt, completion) in enumerate(part):
                end = len(prompt) + len(completion)
                ids[row, :end] = torch.tensor(prompt + completion)
                labels[row, len(prompt) : end] = torch.tensor(completion)
            yield ids, labels


def _train(model: Any, tokenizer: Any, recipe: ArithmeticRecipe) -> None:
    import torch
    from huggingface_hub.utils import tqdm
    from transformers import get_cosine_schedule_with_warmup

    total = recipe.max_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=total // 20, num_training_steps=total)
    model.train()
    with tqdm(total=total, desc="arithmetic llama", name="hfnoise.worlds.arithmetic_model") as bar:
        for (ids, labels), _ in zip(_batches(tokenizer, recipe), range(total), strict=False):
            # Padding is on the right, where causal attention never looks back at it.
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `python -m hfnoise.worlds.arithmetic_model --help` shows the options."""
    parser = argparse.ArgumentParser(
        prog="python -m hfnoise.worlds.arithmetic_model",
        description="Train the tiny reasoning Llama of the arithmetic world and save it as a Hub folder.",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--max_steps", type=int, default=ArithmeticRecipe.max_steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=ArithmeticRecipe.seed, help="default: %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    build(options.output_dir, ArithmeticRecipe(max_steps=options.max_steps, seed=options.seed))


if __name__ == "__main__":
    main()
