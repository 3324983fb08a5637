"""Train the tiny Llama of the docstrings world and save it as a Hub folder.

One command rebuilds the shipped weights from the standard library of the Python that runs it, in a few minutes on 2
CPU cores::

    python -m hfnoise.worlds.docstrings_model --output_dir model_cards/docstrings-llama

Tokenizer and weights see the training documents only; the validation documents are read once, at the end, for the
loss in the model card.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfnoise.worlds.docstrings import MAX_TOKENS, corpus
from hfnoise.worlds.standard_library import Document
from hfnoise.worlds.tiny_llama import new_tiny_llama

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
# 256 bytes and the two special tokens: below that no byte-level vocabulary exists.
_LEAST_VOCABULARY = 258


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of the tiny Llama; the defaults are those of the shipped weights.

    Args:
        vocab_size (`int`, defaults to `1024`): tokens of the byte-level BPE, special ones included, at least 258.
        hidden_size (`int`, defaults to `128`): width; a multiple of twice `num_attention_heads`.
        intermediate_size (`int`, defaults to `384`): width of the MLP (3 x 128: Hadamard groups of 128 fit).
        num_hidden_layers (`int`, defaults to `3`): blocks.
        num_attention_heads (`int`, defaults to `4`): heads.
        sequence_length (`int`, defaults to `96`): tokens per sequence.
        batch_size (`int`, defaults to `32`): sequences per step.
        epochs (`int`, defaults to `6`): passes over the training documents.
        max_steps (`int`, *optional*): stop after so many steps, for tests.
        learning_rate (`float`, defaults to `4e-3`): peak of a cosine schedule with 5 % warm-up.
        seed (`int`, defaults to `0`): of the first weights and of the order of the data.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    sequence_length: int = MAX_TOKENS
    batch_size: int = 32
    epochs: int = 6
    max_steps: int | None = None
    learning_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < _LEAST_VOCABULARY:
            raise ValueError(
                f"vocab_size must be at least {_LEAST_VOCABULARY} (bytes and 2 tokens), got {self.vocab_size}."
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 x num_attention_heads = {2 * self.num_attention_heads}, "
                f"got {self.hidden_size}."
            )
        if self.epochs < 1 or (self.max_steps is not None and self.max_steps < 1):
            raise ValueError(f"epochs and max_steps must be at least 1, got {self.epochs} and {self.max_steps}.")


def build(
    output_dir: str | Path,
    recipe: TrainingRecipe | None = None,
    train_documents: Sequence[Document] | None = None,
    validation_documents: Sequence[Document] | None = None,
) -> dict[str, float]:
    """Train tokenizer and model, and save both with their card.

    Args:
        output_dir (`str` or `Path`): folder to write, made if it is missing.
        recipe (`TrainingRecipe`, *optional*): settings; those of the shipped weights by default.
        train_documents (`Sequence[Document]`, *optional*): `corpus("train")` by default.
        validation_documents (`Sequence[Document]`, *optional*): `corpus("validation")` by default.

    Returns:
        `parameters`, `train_tokens`, `validation_loss` (nats per token), `bits_per_byte` (of the validation text).

    Raises:
        ValueError: if the training documents hold fewer tokens than one batch needs.

    Example:
        >>> from hfnoise.worlds.docstrings_model import TrainingRecipe, build
        >>> build("my-llama", TrainingRecipe(epochs=1))["parameters"]  # doctest: +SKIP
        770944.0
    """
    import torch

    from hfnoise.worlds.docstrings_card import docstrings_card

    recipe = recipe or TrainingRecipe()
    train = corpus("train") if train_documents is None else train_documents
    validation = corpus("validation") if validation_documents is None else validation_documents
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # before the training: an unwritable place fails at once
    tokenizer = train_tokenizer([document.text for document in train], recipe.vocab_size)
    stream = _token_stream(tokenizer, train)
    if len(stream) < (recipe.batch_size + 1) * recipe.sequence_length:
        raise ValueError(
            f"the training documents hold {len(stream)} tokens, one batch needs "
            f"{(recipe.batch_size + 1) * recipe.sequence_length}. Give more documents or a smaller batch."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = new_tiny_llama(
            tokenizer, recipe, recipe.sequence_length, temperature=0.7, top_p=0.9, max_new_tokens=48
        )
        _train(model, stream, recipe)
    nats, count = _score(model, _token_stream(tokenizer, validation), recipe.sequence_length)
    size = sum(len(document.text.encode()) for document in validation)
    results = {
        "parameters": float(model.num_parameters()),
        "train_tokens": float(len(stream)),
        "validation_loss": nats / count,
        "bits_per_byte": nats / math.log(2) / size,
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    docstrings_card(recipe, results).save(folder / "README.md")
    logger.info("saved %s: %s", folder, results)
    return results


def train_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> Any:
    """Return a byte-level BPE tokenizer that adds no token by itself and gives every text back unchanged.

    Args:
        texts (`Sequence[str]`): what it is trained on.
        vocab_size (`int`, defaults to `1024`): tokens, at least 258.

    Returns:
        `PreTrainedTokenizerFast` with distinct padding and end-of-text tokens; the latter also starts a text.

    Example:
        >>> from hfnoise.worlds.docstrings_model import train_tokenizer
        >>> tokenizer = train_tokenizer(["Return a list."], vocab_size=258)
        >>> tokenizer.decode(tokenizer("naïve\\n  text")["input_ids"])
        'naïve\\n  text'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _token_stream(tokenizer: Any, documents: Sequence[Document]) -> Any:
    """Return the token ids (tokens,) of all documents, each after an end-of-text token, and one at the end."""
    import torch

    ids = [tokenizer.eos_token_id]
    # The backend encodes without the warning about texts longer than the model.
    for encoding in tokenizer.backend_tokenizer.encode_batch([document.text for document in documents]):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def _batches(stream: Any, recipe: TrainingRecipe) -> Iterator[Any]:
    """Yield (batch, sequence) token ids for all epochs; every epoch cuts the stream at another offset."""
    import torch

    length = recipe.sequence_length
    for _ in range(recipe.epochs):
        offset = int(torch.randint(length, ()))
        rows = stream[offset : offset + (len(stream) - offset) // length * length].view(-1, length)
        for indices in torch.randperm(len(rows)).split(recipe.batch_size):
            yield rows[indices]


def _train(model: Any, stream: Any, recipe: TrainingRecipe) -> None:
    import torch
    from huggingface_hub.utils import tqdm
    from transformers import get_cosine_schedule_with_warmup

    per_epoch = math.ceil((len(stream) // recipe.sequence_length) / recipe.batch_size)
    total = min(recipe.epochs * per_epoch, recipe.max_steps or recipe.epochs * per_epoch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=total // 20, num_training_steps=total)
    model.train()
    with tqdm(total=total, desc="docstrings llama", name="hfnoise.worlds.docstrings_model") as bar:
        for batch, _ in zip(_batches(stream, recipe), range(total), strict=False):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def _score(model: Any, stream: Any, length: int) -> tuple[float, int]:
    """Return the summed negative log-likelihood in nats and the number of tokens it covers.

    Sequences overlap by one token, so each token but the first of the stream is predicted exactly once.
    """
    import torch

    nats, count = 0.0, 0
    starts = range(0, len(stream) - length + 1, length - 1)
    with torch.no_grad():
        for batch in torch.stack([stream[start : start + length] for start in starts]).split(64):
            predicted = batch.shape[0] * (length - 1)
            nats += model(input_ids=batch, labels=batch).loss.item() * predicted
            count += predicted
    return nats, count


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `python -m hfnoise.worlds.docstrings_model --help` shows the options."""
    parser = argparse.ArgumentParser(
        prog="python -m hfnoise.worlds.docstrings_model",
        description="Train the tiny Llama of the docstrings world and save it as a Hub folder.",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=TrainingRecipe.epochs, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=TrainingRecipe.seed, help="default: %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    build(options.output_dir, TrainingRecipe(epochs=options.epochs, seed=options.seed))


if __name__ == "__main__":
    main()
