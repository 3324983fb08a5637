"""What `hfnoise golden-noise` runs: pairs of noise and golden noise, a network trained on them, and what it is worth.

Pairs are collected, and images drawn, by what belongs to pipelines: it is reached by the public names of hfnoise.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hfnoise
from hfnoise.errors import UsageError
from hfnoise.folders import check_writable
from hfnoise.trainers.launch import last_metrics, run_command, save, share

if TYPE_CHECKING:
    from hfnoise.trainers.golden_noise_arguments import GoldenNoiseScriptArguments

logger = logging.getLogger(__name__)

_NEEDED = {"model_name_or_path": "a Hub id, a folder, or digits"}
# A map of B for a quarter of the side of SDXL's latents; of tiny latents no fewer than they have.
_MAP_SHARE, _LEAST_MAP = 4, 8
_WIDEST = 256
# What only the collection of pairs reads, and says how pairs are made.
_OF_PAIRS = ("pairs_dir", "noises_per_prompt", "redenoise_steps", "redenoise_strength", "validation_size")
# Not defaults of the dataclass: what was given where it says nothing is refused.
_VALIDATION_SIZE, _EVAL_IMAGES = 0.1, 64
# Parts of a pipeline that have nothing to do with training; through a safety checker there is no gradient.
_NOT_NEEDED = ("safety_checker", "image_encoder", "feature_extractor")


def train_golden_noise(arguments: Sequence[str]) -> int:
    """Collect pairs, train a network on them and measure it, from a command line; return the exit code.

    Args:
        arguments (`Sequence[str]`): name of the method, then its options: those of
            [`~hfnoise.NoisePromptTrainingArguments`] and
            [`~hfnoise.trainers.golden_noise_arguments.GoldenNoiseScriptArguments`].

    Raises:
        UsageError: for options, prompts, a pipeline or a network that cannot be used; before anything is trained.
    """
    return run_command(arguments, _types, _train, _NEEDED)


def _types(name: str) -> tuple[type, ...]:
    from hfnoise.trainers.golden_noise_arguments import GoldenNoiseScriptArguments
    from hfnoise.trainers.noise_prompt_arguments import NoisePromptTrainingArguments

    return GoldenNoiseScriptArguments, NoisePromptTrainingArguments


def _train(name: str, script: GoldenNoiseScriptArguments, training: Any) -> None:
    try:
        run = _Run(script, training)
        trainer = run.trainer()
        checkpoint = trainer.checkpoint_to_resume(training.resume_from_checkpoint)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = last_metrics(trainer)
    comparison = run.compared(trainer)
    save(trainer, training, script)
    if trainer.is_world_process_zero():
        _print_outcome(script, training, metrics, comparison)
    share(trainer, training, script)
    trainer.end()


class _Run:
    """The pipeline, the prompts and the verifier of a run, all checked."""

    def __init__(self, script: GoldenNoiseScriptArguments, training: Any) -> None:
        from hfnoise.trainers.prompt_lists import load_prompts

        self.script, self.training = script, training
        check_writable(training.output_dir)
        judged = training.loss == "reward" or training.min_margin is not None or training.margin_temperature
        if judged and script.verifier is None:
            raise ValueError(
                "the loss 'reward', min_margin and margin_temperature are of what a verifier says: give --verifier, "
                "an embedded world or a model of images and text such as CLIP."
            )
        unused = [name for name in _OF_PAIRS if getattr(script, name) is not None]
        if unused and training.loss == "reward":
            raise ValueError(f"{', '.join(unused)}: of pairs, and loss='reward' collects none. Leave it out.")
        self.prompts = load_prompts(script)
        self.pipe = load_golden_pipeline(script, training.device)
        self.verifier = self._verifier("verifier")
        # Of what the pairs were chosen by, another one that was not.
        self.judge = self._verifier("judge")
        self.images = script.eval_images or _EVAL_IMAGES

    def _verifier(self, kind: str) -> Any:
        if self.script.verifier is None:
            return None
        return hfnoise.named_verifier(
            self.script.verifier, kind=kind, processor=self.script.verifier_processor, device=self.training.device
        )

    def trainer(self) -> Any:
        from transformers import set_seed

        from hfnoise.trainers.diffusion_rows import LATENTS
        from hfnoise.trainers.encoded_images import name_pipeline
        from hfnoise.trainers.noise_prompt import NoisePromptTrainer
        from hfnoise.trainers.noise_prompt_rows import STATES

        train, evaluation, reward = self._rows()
        row = train[0]
        set_seed(self.training.seed)
        net = new_net(self.script, tuple(row[LATENTS].shape), tuple(row[STATES].shape))
        trainer = NoisePromptTrainer(net, self.training, train_dataset=train, eval_dataset=evaluation, reward=reward)
        name_pipeline(trainer, self.script)  # for the card
        return trainer

    def _rows(self) -> tuple[Any, Any, Any]:
        from hfnoise.trainers.noise_prompt_rows import NoisePairRows, PromptRows

        script = self.script
        if self.training.loss == "reward":
            # Refined by nothing: the noise of a call.
            noise = hfnoise.SeedVariation(0.0).latents(self.pipe, self.prompts[0], **script.call)
            prompts = PromptRows(self.pipe, self.prompts, noise.shape[1:], **script.call)
            return prompts, None, hfnoise.few_step_reward(self.pipe, self.verifier, self.prompts, **script.call)
        pairs = hfnoise.collect_noise_pairs(
            self.pipe, self.prompts, output_dir=pairs_folder(script, self.training), verifier=self.verifier,
            refiner=hfnoise.ReDenoise(script.redenoise_steps, strength=script.redenoise_strength),
            noises_per_prompt=script.noises_per_prompt or 1, seed=self.training.seed,
            batch_size=script.pair_batch_size, **script.call,
        )  # fmt: skip
        rows = NoisePairRows.from_pairs(pairs, self.pipe, **script.call)
        if self.training.process_index == 0:
            print(rows.diagnose())
        share = _VALIDATION_SIZE if script.validation_size is None else script.validation_size
        train, evaluation = rows.split(share) if share else (rows, None)
        return train, evaluation, None

    def compared(self, trainer: Any) -> Any:
        """Return the comparison of images with the network and without, logged; `None` without a verifier."""
        if self.verifier is None:
            return None
        # What is saved is measured: with ema_decay it is not what was trained last.
        trainer.save_model(self.training.output_dir)
        trainer.accelerator.wait_for_everyone()
        net = hfnoise.load_noise_net(self.training.output_dir).to(self.training.device)
        comparison = hfnoise.compare_starts(
            self.pipe, net, self.prompts, self.judge, images=self.images, seed=self.training.seed,
            batch_size=self.script.pair_batch_size, summary=self._summary(), **self.script.call,
        )  # fmt: skip
        figures = {"win_rate": comparison.win_rate, "images": comparison.images}
        figures |= {"score_plain": comparison.score_plain, "score_refined": comparison.score_refined}
        for kind in ("plain", "refined"):
            figures |= {f"{name}_{kind}": value for name, value in getattr(comparison, kind).items()}
        trainer.log({f"eval_{name}": value for name, value in figures.items()})
        return comparison

    def _summary(self) -> Any:
        from hfnoise.worlds.digits_prompt_scores import score_prompted_images
        from hfnoise.worlds.pipeline_names import EMBEDDED

        checkpoint = EMBEDDED.get(str(self.script.verifier).removeprefix("hfnoise:"))
        # A Fréchet distance needs a covariance.
        if checkpoint is None or self.images < 2:
            return None
        return lambda images, prompts: score_prompted_images(images, prompts, checkpoint)


def load_golden_pipeline(script: GoldenNoiseScriptArguments, device: Any) -> Any:
    """Return the pipeline that the script arguments name, on a device, without what checks images.

    Args:
        script ([`~hfnoise.trainers.golden_noise_arguments.GoldenNoiseScriptArguments`]): of the command line.
        device (`torch.device`): where it runs.

    Raises:
        ValueError: if it is no pipeline of diffusers.
        OSError: if there is none of that name.
    """
    import diffusers
    import torch

    from hfnoise.latents.hf_checkpoints import read_json
    from hfnoise.worlds.pipeline_names import resolve_pipeline

    name = resolve_pipeline(str(script.model_name_or_path))
    index = read_json(name, "model_index.json", revision=script.model_revision)
    if index is None:
        raise ValueError(f"{name!r} holds no model_index.json: it is no pipeline of diffusers.")
    parts: dict[str, Any] = {part: None for part in _NOT_NEEDED if part in index}
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    dtype = getattr(torch, script.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    with warnings.catch_warnings():
        # diffusers 0.42 calls the Hub's library with what it no longer knows.
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            name, dtype=dtype, revision=script.model_revision, variant=script.variant, **parts
        )
    # The bar of a run of a batch, within that of the collection.
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def new_net(script: GoldenNoiseScriptArguments, shape: tuple[int, ...], states: tuple[int, ...]) -> Any:
    """Return the network to train: a new one for these latents and text states, or the one that is gone on with.

    Args:
        script ([`~hfnoise.trainers.golden_noise_arguments.GoldenNoiseScriptArguments`]): of the command line.
        shape (`tuple` of three `int`): of the latents of a sample.
        states (`tuple` of two `int`): tokens and width of the text states.

    Raises:
        TypeError, ValueError: for options that the network does not know, or that do not go together.

    Example:
        >>> from hfnoise.trainers.golden_noise_arguments import GoldenNoiseScriptArguments
        >>> from hfnoise.trainers.launch_golden_noise import new_net
        >>> script = GoldenNoiseScriptArguments("digits", dataset_name="hfnoise:digits", net_options={"num_layers": 1})
        >>> new_net(script, (4, 8, 8), (8, 64)).config.encoder_hid_dim
        64
    """
    channels, side = shape[0], min(shape[1:])
    tokens, width = states
    if script.npnet:
        return hfnoise.load_noise_net(script.npnet)
    known: dict[str, Any] = {"in_channels": channels, "encoder_hid_dim": width}
    if script.net_class == "NPNet":
        known |= {"sample_size": side, "num_tokens": tokens}
    else:
        heads = 8
        known |= {"map_size": max(side // _MAP_SHARE, min(side, _LEAST_MAP)), "pooling_heads": heads}
        known["pooled_dim"] = max(min(width, _WIDEST) // heads, 1) * heads
    options: Any = script.net_options or {}
    return getattr(hfnoise, script.net_class)(**known | options)


def pairs_folder(script: GoldenNoiseScriptArguments, training: Any) -> Path:
    """Return where the pairs of a run are: beside its output folder, which may be uploaded.

    Example:
        >>> from types import SimpleNamespace
        >>> from hfnoise.trainers.golden_noise_arguments import GoldenNoiseScriptArguments
        >>> from hfnoise.trainers.launch_golden_noise import pairs_folder
        >>> script = GoldenNoiseScriptArguments("digits", dataset_name="hfnoise:digits")
        >>> pairs_folder(script, SimpleNamespace(output_dir="golden")).name
        'golden-pairs'
    """
    if script.pairs_dir is not None:
        return Path(script.pairs_dir).expanduser()
    folder = Path(training.output_dir)
    return folder.with_name(f"{folder.name}-pairs")


def _print_outcome(
    script: GoldenNoiseScriptArguments, training: Any, metrics: dict[str, float], comparison: Any
) -> None:
    explained = metrics.get("eval_delta_r2")
    if explained is not None:
        print(f"R2 of the change: {explained:.3f} (share of its energy, of held-out pairs, that the network explains)")
    if comparison is not None:
        print(comparison)
    folder = training.output_dir
    print(f"the network and its card are in {folder}")
    print(f'use it: hfnoise generate --model_name_or_path {script.model_name_or_path} --npnet {folder} --prompt "..."')
