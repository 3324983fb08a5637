"""`hfnoise generate`: images or videos of a list of prompts, guided, with a report of what that cost and saved."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hfnoise
from hfnoise.command_options import UsageParser, ask_for, option_names, read_yaml, refuse_unknown, take_option
from hfnoise.errors import UsageError
from hfnoise.folders import output_folder
from hfnoise.guidance_options import ALL_GENERATE_OPTIONS, GUIDER_OPTIONS
from hfnoise.latents_options import START_OPTIONS
from hfnoise.pipelines.generate_config import AUTO, SAVED_GUIDER, GenerateConfig
from hfnoise.strict_json import parse_json

if TYPE_CHECKING:
    from hfnoise.pipelines.generate_noise import CountedStart
    from hfnoise.pipelines.guidance_report import GuidanceReport

logger = logging.getLogger(__name__)

_NEEDED = {"model_name_or_path": "a Hub id, a folder, or digits"}


def _number_or_auto(text: str) -> float | str:
    return text if text == AUTO else float(text)


# How an option is read, and what its help calls it; the others are texts.
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "INT"),
    "float": (float, "FLOAT"),
    f"float or '{AUTO}'": (_number_or_auto, "FLOAT|auto"),
}


def main(arguments: Sequence[str]) -> int:
    """Run `hfnoise generate` from a command line and return the exit code.

    Args:
        arguments (`Sequence[str]`): options of [`GenerateConfig`], and `--config FILE`, a YAML file of them.

    Raises:
        UsageError: for what cannot be run; whatever can be found before a model is loaded is.
    """
    if "-h" in arguments or "--help" in arguments:
        _parser("hfnoise generate").print_help()
        return 0
    return _run(parse_generate("hfnoise generate", arguments))


def main_of_guider(arguments: Sequence[str]) -> int:
    """Run `hfnoise adaptive-guidance` or `projected-guidance`: `generate` with that guider.

    Args:
        arguments (`Sequence[str]`): name of the method, then options of [`GenerateConfig`].

    Raises:
        UsageError: as [`main`]; if `--guider` names another guider.
    """
    method, *options = arguments
    guider = method.removesuffix("-guidance")
    config = parse_generate(f"hfnoise {method}", options, guider)
    if guider not in config.guiders:
        raise UsageError(f"the guider is {config.guider!r}: use `hfnoise generate`, or --guider {guider}.")
    return _run(config)


def parse_generate(prog: str, arguments: Sequence[str], guider: str | None = None) -> GenerateConfig:
    """Return the configuration that a command line and its YAML file give; the command line wins.

    Args:
        prog (`str`): how the command is called in messages.
        arguments (`Sequence[str]`): options.
        guider (`str`, *optional*): if none is given.

    Raises:
        UsageError: for an unknown or missing option, or a value that [`GenerateConfig`] refuses.

    Example:
        >>> from hfnoise.pipelines.generate import parse_generate
        >>> parse_generate("generate", ["--model", "digits", "--prompt", "seven", "--prompt", "two"]).prompts()
        ['seven', 'two']
    """
    parser = _parser(prog)
    file, rest = take_option(arguments, "--config")
    settings = {} if file is None else read_yaml(file)
    known = [option.name for option in ALL_GENERATE_OPTIONS]
    typed = [name.replace("-", "_") for name in option_names(rest)]
    refuse_unknown(prog, [name for name in typed if not any(option.startswith(name) for option in known)], known)
    refuse_unknown(prog, [name for name in settings if name not in known], known, " in the --config file")
    ask_for(_NEEDED, [*settings, *typed])
    given = vars(parser.parse_args(rest))
    # Two names of one thing: the one on the command line is meant.
    for name, other in (("prompt", "prompts_file"), ("prompts_file", "prompt")):
        if name in given and other not in given:
            settings.pop(other, None)
    try:
        return GenerateConfig(**({} if guider is None else {"guider": guider}) | settings | given)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{error} (see {prog} --help)") from error


def _parser(prog: str) -> UsageParser:
    parser = UsageParser(
        prog=prog, description=__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=110),
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins over it")
    of_guider = {option.name: name for name, options in GUIDER_OPTIONS.items() for option in options}
    groups: dict[str, Any] = {}
    for option in ALL_GENERATE_OPTIONS:
        owner = f"of the guider {of_guider[option.name]}" if option.name in of_guider else ""
        if option.name == "space":
            owner = "of the guider adaptive or projected"
        if option in START_OPTIONS:
            owner = "where sampling starts"
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner) if owner else parser
        several = option.type == "list of str"
        more: dict[str, Any] = {"nargs": "+", "action": "extend"} if several else {}
        kind, name = _KINDS.get(option.type, (str, "TEXT"))
        more |= {"action": "store_true"} if option.type == "bool" else {"type": kind, "metavar": name}
        default = "" if option.default is None else f" Default: {option.default}."
        groups[owner].add_argument(f"--{option.name}", help=option.help + default, **more)
    return parser


def _run(config: GenerateConfig) -> int:
    folder = output_folder(config.output_dir)
    from hfnoise.pipelines.generate_noise import make_initial_noise
    from hfnoise.pipelines.pipeline_loading import (
        check_call,
        find_device,
        find_dtype,
        find_pipeline_class,
        load_pipeline,
        load_saved_guider,
    )
    from hfnoise.worlds.pipeline_names import resolve_pipeline as resolve

    try:
        guider = config.make_guider()
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    find_device(config.device)
    name = resolve(config.model_name_or_path)
    pipeline_class = find_pipeline_class(name, config.revision)
    if config.guider == SAVED_GUIDER:
        guider = load_saved_guider(name, config)
    check_call(pipeline_class, config, guider)
    start = make_initial_noise(pipeline_class, name, config, find_dtype(config))
    show_bars = _obey_progress_switch()
    pipe = load_pipeline(pipeline_class, name, config)
    pipe.set_progress_bar_config(disable=not show_bars)
    samples, report = draw(pipe, config, guider, folder, start)
    _write(folder, config, samples, guider, report, start)
    return 0


def _obey_progress_switch() -> bool:
    """Return whether to show progress bars; diffusers does not look at the switch of the Hub's library."""
    import diffusers.utils.logging
    from huggingface_hub.utils import are_progress_bars_disabled

    if are_progress_bars_disabled():
        diffusers.utils.logging.disable_progress_bar()
    return bool(diffusers.utils.logging.is_progress_bar_enabled())


def draw(
    pipe: Any, config: GenerateConfig, guider: Any, folder: Path | None = None, start: Any = None
) -> tuple[list[dict[str, Any]], GuidanceReport | None]:
    """Return what a pipeline draws, a dictionary for each sample, and the report of the guider over all batches.

    Args:
        pipe: a pipeline of diffusers.
        config ([`GenerateConfig`]): what to draw.
        guider: of hfnoise, or `None`.
        folder (`Path`, *optional*): each batch is saved there when it is drawn, so that a run which is cut off leaves
            what it has; what an earlier run left there is removed first.
        start ([`InitialNoise`], *optional*): what the pipeline starts from.

    Returns:
        `tuple`: samples with `prompt`, `seed`, `output` (an image, or a list of the images of a video), `stop_step`
        and `evaluations`; the report. Without guider these are `None`.

    Raises:
        UsageError: if the pipeline refuses what it is asked, or puts out neither images nor videos.
    """
    import torch

    from hfnoise.pipelines.guidance_report import GuidanceReport
    from hfnoise.pipelines.guided import guide
    from hfnoise.pipelines.picture_files import save_sample

    prompts = [prompt for prompt in config.prompts() for _ in range(config.num_images_per_prompt)]
    samples: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": config.seed + number} for number, prompt in enumerate(prompts)
    ]
    options = _call_options(pipe, config, guider)
    reports = []
    with nullcontext() if guider is None and start is None else guide(pipe, guider, initial_noise=start):
        for start in range(0, len(samples), config.batch_size):
            batch = samples[start : start + config.batch_size]
            # Noise is drawn on the CPU, so that it is the same on every device.
            generators = [torch.Generator().manual_seed(sample["seed"]) for sample in batch]
            if config.negative_prompt is not None:
                options["negative_prompt"] = [config.negative_prompt] * len(batch)
            try:
                output = pipe(
                    prompt=[sample["prompt"] for sample in batch], generator=generators, output_type="pil", **options
                )
            except (ValueError, TypeError) as error:
                raise UsageError(f"{type(pipe).__name__} says: {error}") from error
            found = getattr(output, "images", None)
            found = getattr(output, "frames", None) if found is None else found
            if found is None or len(found) != len(batch):
                raise UsageError(f"{type(pipe).__name__} did not put out an image or a video for each prompt.")
            if folder is not None and start == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _remove_earlier(folder)
            for number, (sample, drawn) in enumerate(zip(batch, found, strict=True), start):
                sample["output"] = drawn
                if folder is not None:
                    sample["file"] = save_sample(drawn, folder, f"{number:04d}-seed{sample['seed']}")
            # No unconditional prediction was asked for: a distilled model without negative prompt, which is logged.
            if getattr(guider, "_trace", None):
                reports.append(guider.report)
    report = GuidanceReport.join(reports) if reports else None
    stops = [None] * len(samples) if report is None else report.stop_steps
    evaluations = [None] * len(samples) if report is None else report.sample_evaluations
    for sample, stop, count in zip(samples, stops, evaluations, strict=True):
        sample["stop_step"], sample["evaluations"] = stop, count
    return samples, report


def _call_options(pipe: Any, config: GenerateConfig, guider: Any) -> dict[str, Any]:
    from hfnoise.pipelines.pipeline_layouts import PipelineLayout, layout_of

    names = ("num_inference_steps", "height", "width", "num_frames")
    options = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    # With a guider it is the guider's.
    if guider is None and config.guidance_scale is not None:
        # Its own argument counts from 0 in some.
        layout = layout_of(type(pipe)) or PipelineLayout("refused")
        options[layout.scale_name] = config.guidance_scale - layout.scale_offset
    return options


def _write(
    folder: Path,
    config: GenerateConfig,
    samples: list[dict[str, Any]],
    guider: Any,
    report: GuidanceReport | None,
    start: CountedStart | None,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from hfnoise.pipelines.guider_base import guider_entry
    from hfnoise.pipelines.picture_files import save_grid

    table = Table("image", "seed", "stop step", "evaluations", title=Path(config.model_name_or_path).name)
    for sample in samples:
        stop, count = sample["stop_step"], sample["evaluations"]
        # Without a guider nobody counts.
        stop, count = ("-" if value is None else str(value) for value in (stop, count))
        table.add_row(sample["file"], str(sample["seed"]), stop, count)
    columns = config.num_images_per_prompt if config.num_images_per_prompt > 1 else None
    save_grid([sample.pop("output") for sample in samples], folder / "grid.png", columns)
    record = {
        "command": config.command, "versions": _versions(), "guider": None if guider is None else guider_entry(guider),
        "initial_noise": None if start is None else repr(start.noise),
        "start_evaluations": None if start is None else start.evaluations,
        "summary": None if report is None else str(report), "samples": samples,
    }  # fmt: skip
    (folder / "generation.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    console = Console()
    console.print(table)
    written = "images, grid.png and generation.json"
    if report is not None:
        report.save(folder / "guidance_report.json")
        report.plot(folder / "guidance_report.png", config.threshold if "adaptive" in config.guiders else None)
        written = "images, grid.png, guidance_report.png and .json, and generation.json"
        console.print(str(report), highlight=False, soft_wrap=True)
    if start is not None:
        console.print(str(start), highlight=False, soft_wrap=True)
    console.print(f"{written} (with the command) are in {folder}", highlight=False, soft_wrap=True)


def _remove_earlier(folder: Path) -> None:
    """Remove what an earlier run wrote here, by its record: it would be taken for a part of this one."""
    record = folder / "generation.json"
    try:
        names = [sample["file"] for sample in parse_json(record.read_text(encoding="utf-8"))["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        return  # there is none, or it is not of ours
    names = [name for name in names if isinstance(name, str) and re.fullmatch(r"\d{4,}-seed\d+(\.\w+)?", name)]
    for name in (*names, "grid.png", "guidance_report.json", "guidance_report.png"):
        path = folder / name
        frames = list(path.glob("frame-*.png")) if path.is_dir() else [path]
        for file in frames:
            file.unlink(missing_ok=True)
    record.unlink()


def _versions() -> dict[str, str]:
    import diffusers
    import torch

    return {"hfnoise": hfnoise.__version__, "diffusers": diffusers.__version__, "torch": str(torch.__version__)}
