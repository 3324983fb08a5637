"""What a command line says of the pipeline and the images that a denoiser is trained with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hfnoise.latents_options import IMAGE_DATA_OPTIONS, MODULE_OPTIONS
from hfnoise.option_types import check_option_types
from hfnoise.options import Option, option_default, option_help

POSTERIORS = ("sample", "mean")
WORLDS = ("brightness",)
_AT_LEAST_ONE = ("resolution", "encode_batch_size")


def _field(options: tuple[Option, ...], name: str) -> Any:
    return field(default=option_default(options, name), metadata={"help": option_help(options, name)})


@dataclass
class ImageScriptArguments:
    """The pipeline and the images with captions: `hfnoise one-more-step --help` describes the options.

    Args:
        model_name_or_path, model_revision, variant (`str`, *optional*): of the pipeline.
        dataset_name, dataset_config (`str`, *optional*): of the images.
        dataset_train_split (`str`, defaults to `"train"`), dataset_test_split (`str`, defaults to `"test"`): splits.
        validation_size (`float`, defaults to `0.05`): share in [0, 1) of the training split, or number of its rows,
            that is evaluated on where there is no other split.
        image_column (`str`, defaults to `"image"`), caption_column (`str`, defaults to `"text"`): columns.
        resolution (`int`, *optional*): pixels of a side, at least 1.
        posterior (`str`, defaults to `"sample"`): or `"mean"`.
        encode_batch_size (`int`, defaults to `8`): at least 1.
        latents_dir (`str`, *optional*): where latents are kept.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> from hfnoise.trainers.image_arguments import ImageScriptArguments
        >>> ImageScriptArguments("digits", dataset_name="hfnoise:digits").image_column
        'image'
    """

    model_name_or_path: str | None = _field(IMAGE_DATA_OPTIONS, "model_name_or_path")
    model_revision: str | None = _field(IMAGE_DATA_OPTIONS, "model_revision")
    variant: str | None = _field(IMAGE_DATA_OPTIONS, "variant")
    dataset_name: str | None = _field(IMAGE_DATA_OPTIONS, "dataset_name")
    dataset_config: str | None = _field(IMAGE_DATA_OPTIONS, "dataset_config")
    dataset_train_split: str = _field(IMAGE_DATA_OPTIONS, "dataset_train_split")
    dataset_test_split: str = _field(IMAGE_DATA_OPTIONS, "dataset_test_split")
    validation_size: float = _field(IMAGE_DATA_OPTIONS, "validation_size")
    image_column: str = _field(IMAGE_DATA_OPTIONS, "image_column")
    caption_column: str = _field(IMAGE_DATA_OPTIONS, "caption_column")
    resolution: int | None = _field(IMAGE_DATA_OPTIONS, "resolution")
    posterior: str = _field(IMAGE_DATA_OPTIONS, "posterior")
    encode_batch_size: int = _field(IMAGE_DATA_OPTIONS, "encode_batch_size")
    latents_dir: str | None = _field(IMAGE_DATA_OPTIONS, "latents_dir")

    def __post_init__(self) -> None:
        check_option_types(self, ImageScriptArguments)
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give a whole number of at least 1.")
        if self.validation_size < 0 or (self.validation_size >= 1 and self.validation_size % 1):
            raise ValueError(f"validation_size is {self.validation_size}; give a share below 1, or a number of rows.")
        if self.posterior not in POSTERIORS:
            raise ValueError(f"posterior is {self.posterior!r}; choose {' or '.join(POSTERIORS)}.")


@dataclass
class OneMoreStepScriptArguments(ImageScriptArguments):
    """[`ImageScriptArguments`] and the module of One More Step that is made, or that is gone on with.

    Args:
        world (`str`, *optional*): `"brightness"`, in the place of a pipeline and images.
        module_name_or_path, module_variant (`str`, *optional*): of a module.
        block_out_channels (`list[int]`, *optional*), layers_per_block (`int`, *optional*),
            transformer_layers_per_block (`list[int]`, *optional*), attention_head_dim (`list[int]`, *optional*),
            norm_num_groups (`int`, *optional*): sizes of a new one, as of UNet2DConditionModel.

    Raises:
        ValueError: for a value out of range, and for options that exclude each other.

    Example:
        >>> from hfnoise.trainers.image_arguments import OneMoreStepScriptArguments
        >>> OneMoreStepScriptArguments(world="brightness", block_out_channels=[8, 16]).sizes
        {'block_out_channels': [8, 16]}
    """

    world: str | None = _field(MODULE_OPTIONS, "world")
    module_name_or_path: str | None = _field(MODULE_OPTIONS, "module_name_or_path")
    module_variant: str | None = _field(MODULE_OPTIONS, "module_variant")
    block_out_channels: list[int] | None = _field(MODULE_OPTIONS, "block_out_channels")
    layers_per_block: int | None = _field(MODULE_OPTIONS, "layers_per_block")
    transformer_layers_per_block: list[int] | None = _field(MODULE_OPTIONS, "transformer_layers_per_block")
    attention_head_dim: list[int] | None = _field(MODULE_OPTIONS, "attention_head_dim")
    norm_num_groups: int | None = _field(MODULE_OPTIONS, "norm_num_groups")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option_types(self, OneMoreStepScriptArguments)
        if self.world not in (None, *WORLDS):
            raise ValueError(f"world is {self.world!r}; there is {', '.join(WORLDS)}. Others: --dataset_name.")
        if self.world and (self.model_name_or_path or self.dataset_name):
            raise ValueError(
                f"world is {self.world!r}, which has its own pipeline and images: leave --model_name_or_path and "
                "--dataset_name out, or --world."
            )
        if self.module_name_or_path and self.sizes:
            raise ValueError(
                f"module_name_or_path is {self.module_name_or_path!r}, whose sizes are its own: leave "
                f"{', '.join(f'--{name}' for name in self.sizes)} out."
            )
        if self.module_variant and not self.module_name_or_path:
            raise ValueError("module_variant is of --module_name_or_path, which is not given.")
        for name, value in self.sizes.items():
            numbers = value if isinstance(value, list) else [value]
            if not numbers or any(one < 1 for one in numbers):
                raise ValueError(f"{name} is {value!r}; give whole numbers of at least 1.")
        levels = len(self.block_out_channels or ())
        for name in ("transformer_layers_per_block", "attention_head_dim"):
            given = getattr(self, name)
            if given and len(given) > 1 and levels and len(given) != levels:
                raise ValueError(f"{name} has {len(given)} entries for {levels} levels of block_out_channels.")

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of a module that are given."""
        names = (
            "block_out_channels", "layers_per_block", "transformer_layers_per_block", "attention_head_dim",
            "norm_num_groups",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
