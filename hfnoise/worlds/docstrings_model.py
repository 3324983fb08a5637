"""Train the tiny Llama of the docstrings world and save it as a Hub folder.

One command rebuilds the shipped weights from the standard library that is installed here, in a few minutes on
2 CPU cores::

    python -m hfnoise.worlds.docstrings_model --output_dir model_cards/docstrings-llama

Only documents of the training split are read for the tokenizer and for the weights; the validation split is used
once, at the end, for the loss that the model card reports.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfnoise.worlds.docstrings import Document, corpus

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

EOS = "<|endoftext|>"
PAD = "<|pad|>"


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of the tiny Llama; the defaults are those of the shipped weights.

    Args:
        vocab_size: entries of the byte-level BPE, special tokens included (default 1024, at least 258).
        hidden_size: width of the residual stream (default 128).
        intermediate_size: width of the MLP (default 384 = 3 x 128, so that a Hadamard group of 128 fits every linear).
        num_hidden_layers: number of blocks (default 3).
        num_attention_heads: heads; must divide `hidden_size` (default 4).
        sequence_length: tokens per training sequence and `max_position_embeddings` (default 96).
        batch_size: sequences per step (default 32).
        epochs: passes over the training split (default 10).
        max_steps: stop after so many steps, for tests (default None: all epochs).
        learning_rate: peak of the cosine schedule (default 4e-3).
        seed: seed of the initial weights and of the order of the data (default 0).
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    sequence_length: int = 96
    batch_size: int = 32
    epochs: int = 10
    max_steps: int | None = None
    learning_rate: float = 4e-3
    seed: int = 0


def train_tokenizer(documents: Iterable[Document], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=96,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer, documents):
    import torch
    ids = []
    for enc in tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]:
        ids.append(tokenizer.eos_token_id); ids += enc
    return torch.tensor(ids + [tokenizer.eos_token_id])


def batches(stream, length, batch_size, generator):
    import torch
    offset = int(torch.randint(length, (), generator=generator))
    rows = (len(stream) - offset) // length
    table = stream[offset: offset + rows * length].view(rows, length)
    for index in torch.randperm(rows, generator=generator).split(batch_size):
        yield table[index]


def evaluate(model, stream, length):
    import torch
    total = n = 0
    model.eval()
    with torch.no_grad():
        rows = [stream[i:i + length] for i in range(0, len(stream) - 1, length - 1)]
        full = torch.stack([r for r in rows if len(r) == length])
        for b in full.split(64):
            total += float(model(input_ids=b, labels=b).loss) * b.shape[0] * (length - 1); n += b.shape[0] * (length - 1)
    return total, n


def build(output_dir, recipe=TrainingRecipe(), documents=None):
    import torch
    from tqdm.auto import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM, GenerationConfig
    torch.manual_seed(recipe.seed)
    tr, va = corpus("train"), corpus("validation")
    tok = train_tokenizer(tr, recipe.vocab_size)
    cfg = LlamaConfig(vocab_size=len(tok), hidden_size=recipe.hidden_size, intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers, num_attention_heads=recipe.num_attention_heads, num_key_value_heads=recipe.num_attention_heads,
        max_position_embeddings=recipe.sequence_length, tie_word_embeddings=True, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    model = LlamaForCausalLM(cfg)
    print(sum(p.numel() for p in model.parameters()))
    stream = token_stream(tok, tr)
    print(len(stream), sum(len(d.text.encode()) for d in tr)/len(stream))
    g = torch.Generator().manual_seed(recipe.seed)
    total = recipe.max_steps or recipe.epochs * math.ceil(len(stream) // recipe.sequence_length / recipe.batch_size)
    opt = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    sch = torch.optim.lr_scheduler.OneCycleLR(opt, recipe.learning_rate, total_steps=total+1, pct_start=0.05)
    step = 0
    vs = token_stream(tok, va); vb = sum(len(d.text.encode()) for d in va)
    bar = tqdm(total=total, mininterval=10)
    while step < total:
        for b in batches(stream, recipe.sequence_length, recipe.batch_size, g):
            if step >= total: break
            model.train()
            loss = model(input_ids=b, labels=b).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step(); sch.step(); opt.zero_grad(); step += 1; bar.update()
        t, n = evaluate(model, vs, recipe.sequence_length); print(step, float(loss), "val", t/n, "bpb", t/math.log(2)/vb, flush=True)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=48, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    model.save_pretrained(output_dir); tok.save_pretrained(output_dir)
if __name__ == "__main__":
    import torch, sys, time
    torch.set_num_threads(2)
    t=time.time()
    build(sys.argv[1], TrainingRecipe(epochs=int(sys.argv[2]), learning_rate=float(sys.argv[3]), intermediate_size=384)); print(time.time()-t)
