"""`hfnoise pack` and `hfnoise unpack`: a checkpoint folder from floats to packed weights, and back to floats."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from hfnoise.cards import base_of
from hfnoise.command_options import UsageParser
from hfnoise.errors import UsageError
from hfnoise.folders import new_folder, output_folder
from hfnoise.quantization.hf_card import quantization_card
from hfnoise.quantization.hf_config import QuestConfig
from hfnoise.quantization.hf_export import dequantize, export_packed, quantized_layers
from hfnoise.quantization.report import quantization_report
from hfnoise.strict_json import parse_json

_NO_SEED = [("seed", "none: nothing was drawn at random")]
# Written anew; everything else in a folder (tokenizer, chat template, licence, ...) is carried along.
_WRITTEN = ("config.json", "generation_config.json", "README.md")
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".msgpack",
    ".h5",
)
# Of random token ids, on which a dense export is compared where there is no data.
_ROWS, _LENGTH = 4, 32


def pack_main(arguments: Sequence[str] | None = None) -> int:
    """Run `hfnoise pack FOLDER OUT`: write a checkpoint with packed weights, which computes the same as the folder's
    master weights, or, from a float checkpoint, what rounding without training gives.

    Args:
        arguments (`Sequence[str]`, *optional*): those of the process by default.

    Raises:
        UsageError: for a folder that cannot be packed, or a place that cannot be written; nothing is written then.

    Example:
        >>> from hfnoise.quantization.hf_pack import pack_main
        >>> pack_main(["no-such-folder", "out", "--bits", "4"])
        Traceback (most recent call last):
        ...
        hfnoise.errors.UsageError: 'no-such-folder' holds no config.json; give a checkpoint folder of transformers.
    """
    parser = UsageParser(
        prog="hfnoise pack",
        description="Write a checkpoint folder with its linear layers packed at 1 to 8 bits a weight. A folder of "
        "master weights (what QATTrainer saves in mid-run) keeps its bits and computes the same; a float one is "
        "rounded without training, which below 4 bits costs much: train it (hfnoise qat) first.",
        epilog="Tokenizer and other files come along; README.md is new. Load the result after `import hfnoise`.",
    )
    _add_folders(parser)
    parser.add_argument("--bits", type=float, help="sets --weight_bits and --activation_bits both")
    parser.add_argument(
        "--weight_bits", type=float, help="1, 1.58 (ternary), 2 to 8; a float folder needs this or --bits"
    )
    parser.add_argument("--activation_bits", type=float, help="of the inputs of linear layers; default: not quantised")
    parser.add_argument("--hadamard_group", type=int, help="default 128; 0: no rotation")
    parser.add_argument("--grid", choices=("exact", "upstream"), help="default exact; upstream: the official code's")
    parser.add_argument(
        "--modules_to_not_convert", nargs="+", metavar="NAME", help="linear layers to leave as they are"
    )
    given = parser.parse_args(arguments)
    folder, out, settings = _folders(given)
    stored = _stored_quantization(settings)
    options = {name: value for name in _OPTIONS if (value := getattr(given, name)) is not None}
    with _usage_errors():
        if stored is None:
            if not {"bits", "weight_bits"} & set(options):
                raise ValueError(
                    f"{str(folder)!r} holds float weights: say how many bits, --bits 4 or --weight_bits 4."
                )
            model = _load(folder, settings, quantization_config=_config(options))
        elif options:
            raise ValueError(
                f"{str(folder)!r} is quantised already, at {stored['weight_bits']} bits; leave "
                f"{', '.join(f'--{name}' for name in options)} out."
            )
        elif not stored.get("store_master_weights", True):
            raise ValueError(f"{str(folder)!r} is packed already.")
        else:
            model = export_packed(_load(folder, settings))
    report = quantization_report(model)
    with new_folder(out) as made:
        model.save_pretrained(made)
        _carry_along(folder, made)
        quantization = next(iter(quantized_layers(model).values()))[1]
        card = quantization_card(
            model, quantization, report, "packed", out.name, str(given.out), base_of(str(folder)), _NO_SEED
        )
        card.save(made / "README.md")
    print(report)
    print(f"{_size(folder):,} bytes of weights -> {_size(out):,} in {out}")
    return 0


def unpack_main(arguments: Sequence[str] | None = None) -> int:
    """Run `hfnoise unpack FOLDER OUT`: write float weights under stock names, for stock transformers.

    Args:
        arguments (`Sequence[str]`, *optional*): those of the process by default.

    Raises:
        UsageError: for a folder that is not quantised, or whose activations are without `--weight_only`; nothing is
            written then.

    Example:
        >>> from hfnoise.quantization.hf_pack import unpack_main
        >>> unpack_main(["no-such-folder", "out"])
        Traceback (most recent call last):
        ...
        hfnoise.errors.UsageError: 'no-such-folder' holds no config.json; give a checkpoint folder of transformers.
    """
    parser = UsageParser(
        prog="hfnoise unpack",
        description="Write a quantised checkpoint folder (packed or master weights) as floats on the grid, which "
        "stock transformers loads. Where only weights are quantised it computes the same; quantised activations are "
        "lost, so that needs --weight_only.",
        epilog="Tokenizer and other files come along; README.md is written anew and states the difference.",
    )
    _add_folders(parser)
    parser.add_argument(
        "--weight_only", action="store_true", help="accept that activations are not quantised any more"
    )
    given = parser.parse_args(arguments)
    folder, out, settings = _folders(given)
    if _stored_quantization(settings) is None:
        raise UsageError(f"{str(folder)!r} is not quantised by hfnoise: there is nothing to unpack.")
    with _usage_errors():
        model = _load(folder, settings).eval()
        report = quantization_report(model)
        quantization = next(iter(quantized_layers(model).values()))[1]
        ids, before = _probe(model) if quantization.activation_bits is not None else (None, None)
        dequantize(model, weight_only=given.weight_only)
    difference = None
    if ids is not None and before is not None:
        difference = {"relative": float((_logits(model, ids) - before).norm() / before.norm())}
        print(
            f"activations are not quantised any more: logits of random tokens differ by {difference['relative']:.1%}"
        )
    with new_folder(out) as made:
        model.save_pretrained(made)
        _carry_along(folder, made)
        card = quantization_card(
            model, quantization, report, "dense", out.name, str(given.out), base_of(str(folder)), _NO_SEED,
            difference=difference,
        )  # fmt: skip
        card.save(made / "README.md")
    print(f"{_size(folder):,} bytes of weights -> {_size(out):,} in {out}")
    return 0


_OPTIONS = ("bits", "weight_bits", "activation_bits", "hadamard_group", "grid", "modules_to_not_convert")


def _add_folders(parser: UsageParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint folder of transformers, with config.json")
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not exist, or be empty")


def _folders(given: argparse.Namespace) -> tuple[Path, Path, dict[str, Any]]:
    folder, out = Path(given.folder), output_folder(given.out)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{given.folder!r} holds no config.json; give a checkpoint folder of transformers.")
    if (folder / "adapter_config.json").exists():  # transformers would load it, and save the adapter alone
        raise UsageError(
            f"{given.folder!r} holds an adapter (adapter_config.json) beside the model. Merge it first "
            "(merge_and_unload of PEFT), or take it out of the folder to keep it beside the result."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{given.out!r} is there already and not empty; name a new folder.")
    try:
        settings = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{str(folder / 'config.json')!r} is no JSON: {error}.") from None
    return folder, out, settings


def _stored_quantization(settings: dict[str, Any]) -> dict[str, Any] | None:
    stored = settings.get("quantization_config")
    if stored is None:
        return None
    if stored.get("quant_method") != "quest":
        raise UsageError(
            f"the checkpoint is quantised by {stored.get('quant_method')!r}; pack and unpack read float weights and "
            "those of hfnoise ('quest')."
        )
    return dict(stored)


def _config(options: dict[str, Any]) -> QuestConfig:
    whole: dict[str, Any] = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in options.items()
    }
    whole["hadamard_group"] = whole.get("hadamard_group", 128) or None
    return QuestConfig(store_master_weights=False, **whole)


def _load(folder: Path, settings: dict[str, Any], **more: Any) -> Any:
    import transformers

    (name,) = (settings.get("architectures") or [None])[:1]
    kind = getattr(transformers, name or "", None)
    if kind is None:
        raise ValueError(f"config.json names the architecture {name!r}, which transformers does not have.")
    return kind.from_pretrained(folder, **more)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


def _probe(model: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return random token ids and the logits of them; none for a model that is no language model."""
    size = getattr(model.config, "vocab_size", None)
    if size is None or model.main_input_name != "input_ids":
        return None, None
    ids = torch.randint(size, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)
    return ids, _logits(model, ids)


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error).replace("weight_only=True", "--weight_only")) from error


def _carry_along(folder: Path, made: Path) -> None:
    """Copy the files of a checkpoint that are neither weights nor written anew, nor of a training run."""
    for path in sorted(folder.iterdir()):
        weights = path.name.endswith(_WEIGHTS) or path.name in ("trainer_state.json", "training_args.bin")
        if path.is_file() and not weights and path.name not in _WRITTEN and not (made / path.name).exists():
            shutil.copy2(path, made / path.name)
    templates = folder / CHAT_TEMPLATE_DIR
    if templates.is_dir() and not (made / CHAT_TEMPLATE_DIR).exists():
        shutil.copytree(templates, made / CHAT_TEMPLATE_DIR)


def _size(folder: Path) -> int:
    return sum(
        path.stat().st_size
        for path in folder.iterdir()
        if path.name.endswith(_WEIGHTS) and path.name != "training_args.bin"
    )
