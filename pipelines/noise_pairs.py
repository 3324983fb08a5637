"""Pairs of noise and golden noise, for networks to be trained on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from hfnoise.latents import numbered_seed
from hfnoise.pipelines.initial_noise import InitialNoise, check_initial_noise
from hfnoise.pipelines.noise_chain import InitialNoiseChain
from hfnoise.pipelines.noise_pairs_card import write_card
from hfnoise.pipelines.side_run import guided_side_pipeline, per_prompt
from hfnoise.pipelines.start_context import copied_generators
from hfnoise.pipelines.verifiers import Verifier, check_verifier, verified
from hfnoise.pipelines.weights_fingerprint import weights_fingerprint
from hfnoise.strict_json import parse_json

SETTINGS_FILE = "collection.json"
# What a call of the pipeline is given here, and not by the user.
_OWN = ("prompt", "latents", "generator", "num_images_per_prompt", "output_type", "return_dict")


def collect_noise_pairs(
    pipe: Any,
    prompts: Sequence[str],
    *,
    output_dir: str | PathLike[str],
    verifier: Verifier | None = None,
    refiner: InitialNoise | None = None,
    noises_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    pairs_per_file: int = 64,
    **call: Any,
) -> datasets.Dataset:
    """Return pairs of noise and golden noise, written as a dataset folder, with what a verifier says of both images.

    Golden noise (arXiv 2411.09502): the noise after a step with much guidance forward and one with little back, which
    is [`ReDenoise`]. A pair holds the seed of the noise and the change to golden noise; the noise is drawn again from
    its seed. With a verifier both images are drawn, and pairs carry `score_noise` and `score_golden`, by which
    [`NoisePromptTrainer`] leaves pairs out or weighs them; none is thrown away here.

    The folder grows by files of `pairs_per_file` pairs, each written whole. Called again after an interruption, or on
    another number of processes (`accelerate launch`: each takes every so manieth file), it goes on with what is
    missing, and no pair comes twice. What is asked for must be the same, and so must the pipeline's weights and
    scheduler, or it is refused.

    Departures from the official code: noise is drawn in the dtype of the pipeline as its plain run with that seed
    draws it; every prompt has `noises_per_prompt` noises; scores are kept in place of pairs being filtered by them.

    Args:
        pipe (`DiffusionPipeline`): whose `encode_prompt` and denoiser are used, with a branch without prompt. What it
            has in the slot `initial_noise` is left out.
        prompts (sequence of `str`): each once.
        output_dir (`str` or `os.PathLike`): a folder that `datasets.load_dataset` reads and that can be uploaded.
        verifier (`Callable`, *optional*): takes images `(batch, channels, height, width)` in [0, 1] and prompts, and
            returns a number for each, more being better.
        refiner ([`InitialNoise`], *optional*): what makes golden noise; [`ReDenoise`] by default.
        noises_per_prompt (`int`, defaults to `1`), seed (`int`, defaults to `0`): of the noise.
        batch_size (`int`, defaults to `8`): pairs that are made together.
        pairs_per_file (`int`, defaults to `64`): of the folder; what an interruption can lose.
        **call: of the pipeline's call: `num_inference_steps`, `guidance_scale`, `height`, ...; a negative prompt is
            that of all prompts.

    Returns:
        `datasets.Dataset` with `prompt`, `seed`, `delta` (float16, of the shape of the latents), and with a verifier
        `score_noise` and `score_golden`.

    Raises:
        TypeError, ValueError: for what is out of range, for a pipeline that the refiner cannot serve, and for a folder
            with pairs of other settings.

    Example:
        >>> from hfnoise.pipelines.noise_pairs import collect_noise_pairs
        >>> from hfnoise.worlds.digits_pipeline import new_digits_pipeline
        >>> pairs = collect_noise_pairs(
        ...     new_digits_pipeline(width=8), ["the digit seven"], output_dir="pairs", noises_per_prompt=2,
        ...     num_inference_steps=4,
        ... )
        >>> pairs.column_names, len(pairs)
        (['prompt', 'seed', 'delta'], 2)
    """
    from hfnoise.pipelines.redenoise import ReDenoise

    made = _checked_refiner(pipe, refiner if refiner is not None else ReDenoise())
    _check(prompts, verifier, call, seed, noises_per_prompt, batch_size, pairs_per_file)
    # Without accelerators it counts processes only if it is told that there are none.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    folder = Path(output_dir)
    settings = {
        "pipeline": type(pipe).__name__.removeprefix("Guided"), "weights": weights_fingerprint(pipe),
        "scheduler": type(pipe.scheduler).__name__, "scheduler_options": _scheduler_options(pipe.scheduler),
        "refiner": type(made).__name__ if isinstance(made, torch.nn.Module) else repr(made),
        "refiner_options": _described(made),
        "verifier": None if verifier is None else getattr(verifier, "__name__", type(verifier).__name__),
        "prompts": len(prompts), "prompts_hash": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "noises_per_prompt": noises_per_prompt, "seed": seed, "pairs_per_file": pairs_per_file,
        "call": {name: repr(value) for name, value in sorted(call.items())},
    }  # fmt: skip
    if state.is_main_process:
        _begin(folder, settings)
    state.wait_for_everyone()
    count = len(prompts) * noises_per_prompt
    files = [(start, min(start + pairs_per_file, count)) for start in range(0, count, pairs_per_file)]
    missing = [one for number, one in enumerate(files) if number % state.num_processes == state.process_index]
    missing = [one for one in missing if not _file(folder, one[0]).is_file()]
    with tqdm(total=sum(end - start for start, end in missing), desc="collecting pairs",
              disable=not state.is_main_process or _is_quiet(pipe)) as bar:  # fmt: skip
        for start, end in missing:
            rows: list[dict[str, Any]] = []
            for first in range(start, end, batch_size):
                indices = range(first, min(first + batch_size, end))
                rows += _pairs(pipe, made, verifier, [prompts[index % len(prompts)] for index in indices],
                               [numbered_seed(f"noise pairs/{seed}", index) for index in indices], call)  # fmt: skip
                bar.update(len(indices))
            _write(rows, _file(folder, start))
    state.wait_for_everyone()
    pairs = datasets.Dataset.from_parquet([str(_file(folder, start)) for start, _ in files])
    assert isinstance(pairs, datasets.Dataset)
    if state.is_main_process:
        write_card(folder, pairs, settings, pipe)
    return pairs


@torch.no_grad()
def _pairs(
    pipe: Any, refiner: InitialNoise, verifier: Verifier | None, prompts: list[str], seeds: list[int],
    call: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(one) for one in seeds]

    call = per_prompt(call, len(prompts))
    golden = refiner.latents(pipe, prompts, generator=generators(), **call)
    if golden.dim() != 4:
        raise ValueError(
            f"{type(pipe).__name__} has latents of shape {tuple(golden.shape[1:])}, and pairs are made of (channels, "
            "height, width)."
        )
    drawn_from = generators()
    noise = torch.stack([torch.randn(golden.shape[1:], generator=one) for one in drawn_from])
    delta = (golden.float().cpu() - noise).to(torch.float16)
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": one, "delta": part.numpy()}
        for prompt, one, part in zip(prompts, seeds, delta, strict=True)
    ]
    if verifier is None:
        return rows
    plain = guided_side_pipeline(pipe, None)
    for name, start in (("score_noise", noise.to(golden)), ("score_golden", golden)):
        # Behind the noise, as in the plain run: stochastic samplers would add the very noise again.
        drawn = plain(prompts, latents=start, generator=copied_generators(drawn_from), output_type="pt", **call)
        for row, score in zip(rows, verified(verifier, drawn.images, prompts).tolist(), strict=True):
            row[name] = score
    return rows


def _file(folder: Path, start: int) -> Path:
    return folder / "data" / f"train-{start:08d}.parquet"


def _write(rows: list[dict[str, Any]], file: Path) -> None:
    shape = rows[0]["delta"].shape
    kinds = {"prompt": datasets.Value("string"), "seed": datasets.Value("int64")}
    kinds |= {"delta": datasets.Array3D(shape, "float16")}
    kinds |= {name: datasets.Value("float32") for name in rows[0] if name.startswith("score_")}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    # Beside its place and then renamed: a file that is there is whole.
    unfinished = file.with_suffix(".unfinished")
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(str(unfinished))
    os.replace(unfinished, file)


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / SETTINGS_FILE
    unfinished = file.with_suffix(".unfinished")
    if file.is_file():
        before = _settings(file)
        other = [f"{name}: {before.get(name)!r:.80} there, {settings[name]!r:.80} here" for name in settings
                 if before.get(name) != settings[name]]  # fmt: skip
        if other:
            raise ValueError(
                f"{str(folder)!r} holds pairs of another collection ({'; '.join(other)}). Ask for the same, or give "
                "another output_dir."
            )
        return
    if folder.exists() and any(one.name not in (unfinished.name, "data") for one in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and holds no collection of pairs. Give another output_dir.")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, file)


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}), and without it nobody knows what its pairs are of. Give another "
            "output_dir."
        ) from None
    return found


def _is_quiet(pipe: Any) -> bool:
    return bool(getattr(pipe, "_progress_bar_config", {}).get("disable"))


def _checked_refiner(pipe: Any, refiner: Any) -> InitialNoise:
    made = check_initial_noise(pipe, refiner)
    if made is None or made.space != "unit":
        raise ValueError(f"the refiner must make unit noise, and {type(refiner).__name__} makes none.")
    if getattr(made, "is_off", False) or getattr(made, "scale", None) == 0.0:
        raise ValueError(f"the refiner {made!r:.100} changes nothing: there is nothing to learn from its pairs.")
    return made


def _described(refiner: InitialNoise) -> Any:
    """Return all options of a refiner, as JSON has them."""
    if isinstance(refiner, InitialNoiseChain):
        return [_described(member) for member in refiner.members]
    config = refiner.to_config()
    if config is None:
        return repr(refiner)
    weights = {"weights": weights_fingerprint(refiner)} if isinstance(refiner, torch.nn.Module) else {}
    # As it comes back from the file: tuples as lists.
    return json.loads(json.dumps({"class": type(refiner).__name__, **config, **weights}))


def _scheduler_options(scheduler: Any) -> dict[str, str]:
    # Without what diffusers notes for itself, in an order that changes from run to run.
    return {name: repr(value) for name, value in sorted(scheduler.config.items()) if not name.startswith("_")}


def _check(prompts: Any, verifier: Any, call: dict[str, Any], seed: Any, *counts: int) -> None:
    if isinstance(prompts, str) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompts must be a list of texts, with at least one; got {prompts!r:.100}.")
    if len(set(prompts)) < len(prompts):
        raise ValueError("prompts come more than once: give each once, with noises_per_prompt.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, got {seed!r}.")
    for name, count in zip(("noises_per_prompt", "batch_size", "pairs_per_file"), counts, strict=True):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
    given = sorted(set(call) & set(_OWN))
    if given:
        raise ValueError(f"{given} are given to the pipeline by the collection itself: leave them out.")
    if verifier is not None:
        check_verifier(verifier)
