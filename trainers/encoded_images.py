"""Latents and prompt states of images for a training run, kept for the next one."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from hfnoise.folders import new_folder
from hfnoise.latents.hf_checkpoints import read_json
from hfnoise.trainers.diffusion_latents import encode_prompts, precompute_latents
from hfnoise.trainers.image_datasets import load_images
from hfnoise.worlds.pipeline_names import resolve_pipeline

logger = logging.getLogger(__name__)

_ENCODERS = ("vae", "text_encoder", "text_encoder_2")
# Parts of a pipeline that have nothing to do with training.
_NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class EncodedImages:
    """What a trainer takes.

    Args:
        train (`datasets.Dataset`), evaluation (`datasets.Dataset`, *optional*): rows of latents and prompt states.
        empty_prompt (`dict[str, Tensor]`): the states of "", for prompt dropout.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    empty_prompt: dict[str, Tensor]


def load_training_pipeline(script: Any, device: Any, denoiser: bool = True) -> Any:
    """Return the pipeline that the script arguments name, in float32, its autoencoder and text encoders on a device.

    Args:
        script ([`~hfnoise.trainers.image_arguments.ImageScriptArguments`]): of the command line.
        device (`torch.device`): of what encodes.
        denoiser (`bool`, defaults to `True`): load its weights; `False` for a pipeline that only encodes, whose UNet
            takes no memory.

    Raises:
        ValueError: if there is no UNet in it.
        OSError: if there is no pipeline of that name.
    """
    import diffusers

    name = resolve_pipeline(script.model_name_or_path)
    index = read_json(name, "model_index.json", revision=script.model_revision)
    if index is None:
        raise ValueError(f"{name!r} holds no model_index.json: it is no pipeline of diffusers.")
    if "unet" not in index:
        raise ValueError(
            f"{name!r} is a {index.get('_class_name')}, which has no UNet. Models of flow matching (SD3, Flux, ...) "
            "start from noise alone in training too. For others make the rows yourself, in Python."
        )
    parts: dict[str, Any] = {part: None for part in _NOT_NEEDED if part in index}
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    if not denoiser:
        unet_class = getattr(diffusers, str(index["unet"][1]), diffusers.UNet2DConditionModel)
        config = unet_class.load_config(name, subfolder="unet", revision=script.model_revision)
        with torch.device("meta"):
            parts["unet"] = unet_class.from_config(config)
    options = {"revision": script.model_revision, "variant": script.variant}
    pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=torch.float32, **options, **parts)
    for part in _ENCODERS:
        module = getattr(pipe, part, None)
        if module is not None:
            module.to(device).eval().requires_grad_(False)
    return pipe


def name_pipeline(trainer: Any, script: Any) -> None:
    """Tell a Trainer which pipeline its model is for, for the card; nothing without `model_name_or_path`.

    Args:
        trainer ([`~hfnoise.DiffusionTrainer`]): or a subclass.
        script ([`~hfnoise.trainers.image_arguments.ImageScriptArguments`]): of the command line.
    """
    if script.model_name_or_path is not None:
        trainer.pipeline_name = resolve_pipeline(script.model_name_or_path)
        trainer.pipeline_revision = script.model_revision


def encode_images(script: Any, training: Any, pipe: Any) -> EncodedImages:
    """Return the rows of the images that the script arguments name.

    They are encoded by one process, and kept: another run with the same images, pipeline and settings reads them. Of
    the weights all numbers are compared, by a hash.

    Args:
        script ([`~hfnoise.trainers.image_arguments.ImageScriptArguments`]): of the command line.
        training (`transformers.TrainingArguments`): for `seed`, and who is the main process.
        pipe (`DiffusionPipeline`): see [`load_training_pipeline`].

    Raises:
        ValueError: for images or captions that cannot be encoded.
    """
    weights = _digest_of(pipe)
    place = script.latents_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hfnoise-latents"
    with training.main_process_first(desc="encoding images and prompts"):
        train, held_out = (
            None if images is None else _kept(images, script, pipe, weights, Path(place).expanduser())
            for images in load_images(script, training.seed)
        )
    return EncodedImages(train, held_out, encode_prompts(pipe, [""]))


def _kept(images: datasets.Dataset, script: Any, pipe: Any, weights: str, place: Path) -> datasets.Dataset:
    settings = {
        "images": images._fingerprint, "columns": [script.image_column, script.caption_column],
        "resolution": script.resolution, "posterior": script.posterior, "pipeline": script.model_name_or_path,
        "weights": weights,
    }  # fmt: skip
    folder = place / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    if not (folder / "state.json").is_file():
        logger.info("encoding %d images; they are kept in %s", len(images), folder)
        rows = precompute_latents(
            images, pipe, image_column=script.image_column, caption_column=script.caption_column,
            resolution=script.resolution, batch_size=script.encode_batch_size,
            seed=0 if script.posterior == "sample" else None,
        )  # fmt: skip
        with new_folder(folder) as made:
            rows.save_to_disk(made)
    return datasets.load_from_disk(str(folder)).with_format("torch")


def _digest_of(pipe: Any) -> str:
    """Return a hash of the weights and settings of what encodes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _ENCODERS:
        module = getattr(pipe, part, None)
        if module is None:
            continue
        config = module.config if isinstance(module.config, dict) else module.config.to_dict()
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
