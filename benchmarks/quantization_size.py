"""Files of a model at 1 to 8 bits: hfnoise, bitsandbytes, transformers' BitNet and torchao, side by side.

`python -m hfnoise.benchmarks.quantization_size` saves a Llama with one wide layer (hidden size 2048, MLP 5632) by
each, and writes quantization_size.json and .md: bytes of the file, bits per weight of the linear layers, scales
included, and bits per weight of the whole model, whose embeddings stay float32. Libraries that are not installed are
left out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from hfnoise.benchmarks.reporting import circumstances, judge, markdown, print_table, write_json
from hfnoise.folders import output_folder
from hfnoise.quantization.hf_config import QuestConfig

BITS = (1, 1.58, 2, 3, 4, 8)
# 1 bit at K >= 2048: the bound.
LIMIT = 1.02


def build(folder: Path) -> None:
    """Save the float model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=2048, intermediate_size=5632, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def quest(bits: float) -> Callable[[Path, Path], None]:
    """Return what packs a checkpoint at `bits` while it is loaded, and saves it."""

    def save(source: Path, target: Path) -> None:
        config = QuestConfig(bits=bits, store_master_weights=False)
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(target)

    return save


def bfloat16(source: Path, target: Path) -> None:
    """Save the checkpoint in bfloat16."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)


def nf4(source: Path, target: Path) -> None:
    """Save it in NF4 with double quantisation."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(target)


def bitnet(source: Path, target: Path) -> None:
    """Save it with BitNet's ternary weights, four in a byte, as transformers packs them."""
    from transformers.integrations.bitnet import pack_weights

    model = AutoModelForCausalLM.from_pretrained(source)
    state = dict(model.state_dict())
    for name in [name for name in state if "_proj.weight" in name]:
        scale = 1 / state[name].abs().mean()
        state[name + "_scale"] = 1 / scale.reshape(1)
        state[name] = pack_weights((state[name] * scale).round().clamp(-1, 1))
    model.save_pretrained(target, state_dict=state)


def torchao(source: Path, target: Path) -> None:
    """Save it with torchao's 1-bit weights."""
    from torchao.quantization import IntxWeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int1")))  # noqa: B009  (not in its stubs)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(target)


def sizes(folder: Path) -> tuple[int, int]:
    """Return the bytes of the files of weights, and those of the linear layers in them."""
    total = linear = 0
    for file in folder.glob("*.safetensors"):
        total += file.stat().st_size
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no dictionary)
                if "_proj" in name:
                    tensor = tensors.get_tensor(name)
                    linear += tensor.numel() * tensor.element_size()
    return total, linear


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; return 1 if the bound of the issue is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark_results"), help="folder of the results")
    given = parser.parse_args(arguments)
    given.output_dir = output_folder(given.output_dir)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ways: dict[str, Callable[[Path, Path], None]] = {f"hfnoise, {bits} bits": quest(bits) for bits in BITS}
    ways |= {"bfloat16": bfloat16, "bitsandbytes NF4": nf4, "BitNet (transformers)": bitnet, "torchao 1 bit": torchao}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "float32")
        weights = sizes(folder / "float32")
        counts = tuple(size / 4 for size in weights)  # four bytes each
        for way, save in {"float32": None, **ways}.items():
            target = folder / "float32" if save is None else folder / "other"
            if save is not None:
                try:
                    save(folder / "float32", target)
                except ImportError as error:
                    print(f"{way}: left out ({error})")
                    continue
            total, linear = sizes(target)
            bits = {"linear_bits": 8 * linear / counts[1], "model_bits": 8 * total / counts[0]}
            found[way] = {"file_bytes": total, **bits}
            if save is not None:
                for file in target.iterdir():
                    file.unlink()
    header = ["saved by", "file, MB", "bits per weight of linear layers", "of the whole model"]
    rows = [
        [way, f"{one['file_bytes'] / 1e6:.1f}", f"{one['linear_bits']:.3f}", f"{one['model_bits']:.3f}"]
        for way, one in found.items()
    ]
    print_table("files of a Llama with one layer, hidden size 2048", header, rows)
    bits = found["hfnoise, 1 bits"]["linear_bits"]
    check = (f"bits per weight at 1 bit {bits:.3f} <= {LIMIT}", bits <= LIMIT)
    judge([check])
    content = {"results": found, "acceptance": [list(check)]}
    write_json(given.output_dir / "quantization_size.json", {**circumstances([0]), **content})
    (given.output_dir / "quantization_size.md").write_text(markdown(header, rows), encoding="utf-8")
    return int(not check[1])


if __name__ == "__main__":
    raise SystemExit(main())
