"""[`OneMoreStepTrainer`]: the module of One More Step, and the terminal prior that goes with it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import EvalPrediction

from hfnoise.latents import ResidualStatistics
from hfnoise.latents.cosine_basis import cosine_amplitudes
from hfnoise.latents.hf_time_free_unet import module_residuals, set_module_residuals
from hfnoise.trainers.diffusion import DiffusionTrainer, NoisedBatch
from hfnoise.trainers.diffusion_model import TrackedConfig
from hfnoise.trainers.diffusion_noise import TrainingNoise
from hfnoise.trainers.diffusion_rows import LATENTS, STATES, DenoiserInputs
from hfnoise.trainers.one_more_step_arguments import OneMoreStepTrainingArguments
from hfnoise.trainers.one_more_step_card import OneMoreStepCardMixin

# What rows for SDXL have besides (pooled states, sizes): it is for the base model, and no module has been given it.
_BESIDE = "added_cond_kwargs"
# Of a stock UNet that would be asked for more than noise and prompt.
_OTHER_INPUTS = ("class_embed_type", "addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type")


class OneMoreStepTrainer(OneMoreStepCardMixin, DiffusionTrainer):
    """Trains the module of One More Step (arXiv 2311.15744), and fits the terminal prior that goes with it.

    The loss is E |psi(eps, prompt) + x0|^2 for noise eps that is independent of the image x0: the module is to say
    v = -x0 at a signal-to-noise ratio of 0. The best it can do is minus the mean of the images of the prompt, so the
    loss falls to their variance within a prompt, hardly below where it starts, and looks flat. What to look at is
    `eval_low_frequency_r2`, the share of the variance of the channel means that the module explains: 1 - Var(mean of
    x0 - x0_hat) / Var(mean of x0), 0 for a module that says the same of all prompts; NaN where the latents of the
    evaluation set do not differ in brightness.

    After training the mean and covariance of the channel means of x0 - x0_hat, and of as many of its lowest waves as
    `residual_frequencies` says, are measured ([`~hfnoise.latents.ResidualStatistics`]; ours, beyond the paper) and go
    into the config of the module, with which it is saved and pushed; [`OneMoreStep`] then draws from them.
    Checkpoints, which are written before that, carry none. Noise, prompt dropout, the average of the weights and
    resuming are those of [`DiffusionTrainer`].

    ```python
    trainer = OneMoreStepTrainer(module, args=args, train_dataset=rows, empty_prompt=encode_prompts(pipe, [""]))
    trainer.train()
    trainer.save_model("oms_module")
    pipe = OneMoreStepPipeline.from_pipe(pipe, initial_noise=OneMoreStep.from_pretrained("oms_module"))
    ```

    Departure from the paper: the recipe is ours, since none was published; see [`OneMoreStepTrainingArguments`].

    Args:
        model ([`TimeFreeUNet2DConditionModel`] or `UNet2DConditionModel`, *optional*): the module, the latter with its
            timestep fixed to 0; or `model_init`.
        args ([`OneMoreStepTrainingArguments`]): arguments.
        train_dataset, eval_dataset (`datasets.Dataset` or any dataset of rows): `latents` and `encoder_hidden_states`,
            as [`~hfnoise.trainers.diffusion_latents.precompute_latents`] makes them; the pooled states and sizes of
            SDXL are left aside.
        empty_prompt (`dict[str, Tensor]`, *optional*): as in [`DiffusionTrainer`]; needed unless `prompt_dropout` is
            0.
        **kwargs: of the Trainer.

    Raises:
        TypeError: for a model or arguments of another kind, or a scheduler.
        ValueError: for rows that the model does not take, and for adapters, which cannot carry the terminal prior.

    Example:
        >>> from hfnoise import DiffusionTrainer, OneMoreStepTrainer
        >>> issubclass(OneMoreStepTrainer, DiffusionTrainer)
        True
    """

    _takes_timestep = False

    def __init__(self, model: Any = None, args: OneMoreStepTrainingArguments | None = None, **kwargs: Any) -> None:
        training = args if args is not None else OneMoreStepTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(training, OneMoreStepTrainingArguments):
            raise TypeError(f"args is a {type(training).__name__}; give OneMoreStepTrainingArguments.")
        if kwargs.get("scheduler") is not None or kwargs.get("loss_weighting") is not None:
            raise TypeError(
                "scheduler and loss_weighting are about noise levels, and One More Step has none: one module serves "
                "every scheduler. Leave them out."
            )
        if kwargs.get("peft_config") is not None or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "an adapter has no config to carry the terminal prior in. The module is small: train all of it, "
                "without peft_config; fuse an adapter that it has with model.fuse_lora() and model.unload_lora()."
            )
        if kwargs.get("empty_prompt"):
            empty = kwargs["empty_prompt"]
            kwargs["empty_prompt"] = {name: one for name, one in empty.items() if name.partition(".")[0] != _BESIDE}
        super().__init__(model, training, **kwargs)
        self.compute_metrics = _explained

    def denoiser_inputs(self) -> DenoiserInputs:
        """Return what sampling has to give: the prompt."""
        inputs = DenoiserInputs.of(self._denoiser(), timed=False)
        return dataclasses.replace(inputs, names=frozenset({STATES, _BESIDE}), required=frozenset({STATES}))

    def set_schedule(self, scheduler: Any, loss_weighting: Any) -> None:
        """Check the module; there is no schedule."""
        module = self._denoiser()
        timed = "timestep" in inspect.signature(type(module).forward).parameters
        if timed and not isinstance(module, UNet2DConditionModel):
            raise TypeError(
                f"{type(module).__name__} takes a timestep, and One More Step has none. Give a "
                "TimeFreeUNet2DConditionModel, or a UNet2DConditionModel, whose timestep is fixed to 0."
            )
        asked = [name for name in _OTHER_INPUTS if timed and module.config.get(name) is not None]
        if asked:
            raise ValueError(
                f"the module has {', '.join(asked)}, and sampling gives it noise and the prompt only. Make it without."
            )
        channels = [module.config.get(name) for name in ("in_channels", "out_channels")]
        if channels[0] != channels[1]:
            raise ValueError(f"the module makes {channels[1]} channels of {channels[0]}: both must be the latents'.")
        self._stock = timed
        measured = self._measured_rows()
        if self.args.residual_samples and hasattr(measured, "__len__") and len(measured) < 2:
            raise ValueError(
                "the terminal prior is fitted on the evaluation set where there is one, which has less than 2 rows. "
                "Give more, or residual_samples=0."
            )
        if self.args.residual_frequencies > 1 and hasattr(measured, "__len__"):
            self._check_size(torch.as_tensor(measured[0][LATENTS]).shape)

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on with the run that it is resumed by."""
        names = ("seed", "prompt_dropout", "ema_decay")
        return {"trainer": type(self).__name__, **{name: getattr(self.args, name) for name in names}}

    def noised_batch(self, latents: Tensor, draws: TrainingNoise) -> NoisedBatch:
        """Return noise to be shown, and minus the latents to be answered."""
        self._check_size(latents.shape)  # of a stream it has not been seen yet
        timestep = torch.zeros(len(latents), dtype=torch.long, device=latents.device) if self._stock else None
        return NoisedBatch(draws.noise, timestep, -latents)

    def denoise(self, model: Any, sample: Tensor, timestep: Tensor | None, conditions: dict[str, Tensor]) -> Tensor:
        """Return what the module puts out for noise and the prompt."""
        return super().denoise(model, sample, timestep, {STATES: conditions[STATES]})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`DiffusionTrainer`] does, then fit the terminal prior with `fit_residuals`."""
        # Those of the weights that training begins with; with `model_init` there are none yet.
        if self.model is not None:
            self._set_residuals(None)
        output = super().train(*args, **kwargs)
        if self.args.residual_samples:
            self.fit_residuals()
        return output

    def call_model_init(self, trial: Any = None) -> Any:
        """Return a new module of `model_init`, prepared."""
        module = super().call_model_init(trial)
        _set_residuals_of(module, None)
        return module

    def fit_residuals(self, dataset: Any = None) -> ResidualStatistics:
        """Measure what the module leaves over, at fixed noise, and put it into its config.

        Args:
            dataset (*optional*): rows to measure on, all of them; by default `residual_samples` of the evaluation set,
                spread over it, or of the training set, where a module that knows its rows by heart leaves too little.

        Returns:
            [`~hfnoise.latents.ResidualStatistics`] of the averaged weights, where they are kept.

        Raises:
            ValueError: with less than two rows.
        """
        # Else `predict` would cast the weights for good where `bf16_full_eval` is set, and they are yet to be saved.
        before, self.is_in_train = self.is_in_train, True
        try:
            output = self.predict(self._measured_rows() if dataset is None else dataset)
        finally:
            self.is_in_train = before
        statistics = ResidualStatistics.fit_amplitudes(_joined(output.predictions))
        self._set_residuals(statistics)
        return statistics

    def prediction_step(  # type: ignore[override]
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of a batch, the amplitudes of x0 - x0_hat and the channel means of x0.

        Returns:
            A scalar, `(batch, channels, residual_frequencies^2)`, of which the first are the means, and `(batch,
            channels)`.
        """
        conditions = dict(self._prepare_inputs(inputs))
        draws = self._draw_for_evaluation(conditions)
        latents = conditions.pop(LATENTS).float()
        batch = self.noised_batch(latents, draws)
        with torch.no_grad(), self.compute_loss_context_manager():
            residual = self.denoise(model, batch.sample, batch.timestep, conditions).float() - batch.target
            amplitudes = cosine_amplitudes(residual, self.args.residual_frequencies, torch.float32)
            return residual.square().mean(), amplitudes, latents.flatten(2).mean(2)

    def _check_size(self, shape: torch.Size) -> None:
        frequencies = self.args.residual_frequencies
        if frequencies > 1 and (len(shape) < 3 or min(shape[-2:]) < frequencies):
            raise ValueError(
                f"residual_frequencies is {frequencies}, and latents of the shape {tuple(shape)} have fewer pixels "
                "along a side. Give less."
            )

    def _set_residuals(self, statistics: ResidualStatistics | None) -> None:
        _set_residuals_of(self._denoiser(), statistics)

    def _measured_rows(self) -> Any:
        found = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        datasets = list(found.values()) if isinstance(found, dict) else [found]
        count = self.args.residual_samples
        if any(isinstance(one, IterableDataset) or not hasattr(one, "__len__") for one in datasets):
            return _FirstRows(datasets, count)
        joined: Any = ConcatDataset(datasets) if len(datasets) > 1 else datasets[0]
        # Not the first ones: rows may be in the order of their prompts.
        return joined if len(joined) <= count else Subset(joined, [row * len(joined) // count for row in range(count)])


class _FirstRows(IterableDataset):
    """The first rows of streams."""

    def __init__(self, streams: list[Any], count: int) -> None:
        self.streams, self.count = streams, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(itertools.chain(*self.streams), self.count)


def _set_residuals_of(module: Any, statistics: ResidualStatistics | None) -> None:
    if statistics is None and module_residuals(module) is None:
        return
    set_module_residuals(module, statistics)
    module._internal_dict = TrackedConfig(module.config)  # diffusers made a plain one of it


def _explained(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of the variance of the channel means that the module explains, over all channels."""
    residual, brightness = (
        float(means.double().var(0, correction=0).sum())
        for means in (_joined(prediction.predictions)[..., 0], _joined(prediction.label_ids))
    )
    return {"low_frequency_r2": 1.0 - residual / brightness if brightness > 0 else float("nan")}


def _joined(means: Any) -> Tensor:
    """Return the rows of all batches; with `eval_do_concat_batches=False` they come apart."""
    return torch.cat([torch.from_numpy(part) for part in (means if isinstance(means, list) else [means])])
