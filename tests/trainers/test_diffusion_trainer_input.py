"""What DiffusionTrainer refuses, before it trains, with what is allowed instead."""

import copy

import datasets
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments

from hfnoise import DiffusionTrainer, DiffusionTrainingArguments
from hfnoise.latents import MinSNRWeighting, P2Weighting
from hfnoise.trainers.diffusion_rows import DiffusionCollator
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from tests.trainers.diffusion_world import TOKENS, WIDTH, arguments, make_rows, new_scheduler, new_trainer, new_unet


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snr_gamma": 0}, "snr_gamma.* is 0.0; give a number above 0"),
        ({"snr_gamma": "five"}, "snr_gamma must be a finite number or None, got 'five'"),
        ({"snr_gamma": 5, "loss_weighting": "debias"}, "says something else. Give one of the two"),
        ({"loss_weighting": "snr"}, "choose uniform, min_snr, p2, debias, kohya"),
        ({"loss_weighting": "p2", "loss_weighting_kwargs": {"k": 0}}, "k of P2 is 0"),
        ({"loss_weighting": "p2", "loss_weighting_kwargs": "k=1"}, "is no JSON"),
        ({"loss_weighting": "p2", "loss_weighting_kwargs": "[1]"}, "give settings by name"),
        ({"noise_offset": -0.1}, "noise_offset is -0.1; give a number of at least 0"),
        ({"input_perturbation": float("nan")}, "input_perturbation must be a finite number, got nan"),
        ({"prompt_dropout": 1.5}, "prompt_dropout is 1.5; it is a share"),
        ({"ema_decay": 1}, r"ema_decay is 1.0; give a number in \(0, 1\)"),
        ({"timestep_sampling": "cosine"}, "choose uniform, logit_normal"),
        ({"logit_mean": 1.0}, "read by timestep_sampling='logit_normal' only"),
        ({"timestep_sampling": "logit_normal", "logit_std": 0}, "logit_std is 0.0; give a number above 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_strings_of_a_command_line_are_numbers(tmp_path):
    found = arguments(tmp_path, snr_gamma="5", noise_offset="0.1", ema_decay="0.99")
    assert (found.snr_gamma, found.noise_offset, found.ema_decay) == (5.0, 0.1, 0.99)
    assert found.weighting() == MinSNRWeighting(5.0) and found.ddp_find_unused_parameters is False


def test_a_command_line_is_parsed(tmp_path):
    line = ["--output_dir", str(tmp_path), "--loss_weighting", "p2", "--loss_weighting_kwargs", '{"k": 2.0}']
    (found,) = HfArgumentParser(DiffusionTrainingArguments).parse_args_into_dataclasses(
        [*line, "--ema_decay", "0.99", "--use_cpu"]
    )
    assert found.weighting() == P2Weighting(2.0) and found.ema_decay == 0.99 and found.snr_gamma is None


@pytest.mark.slow
def test_models(tmp_path):
    frozen, half = new_unet().requires_grad_(False), new_unet().to(torch.bfloat16)
    adapted = new_unet()
    lora = LoraConfig(r=2, target_modules=["to_q"])
    adapted.add_adapter(lora)
    two, thawed = copy.deepcopy(adapted), copy.deepcopy(adapted).requires_grad_(True)
    with pytest.warns(UserWarning, match="multiple adapters"):
        two.add_adapter(lora, adapter_name="other")
    for name, one in two.named_parameters():
        one.requires_grad_("lora_" in name)
    with_bias = LoraConfig(r=2, target_modules=["to_q"], bias="all")
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    for error, message, model, peft in (
        (TypeError, "is a StableDiffusionPipeline; give its denoiser: pipe.unet", new_digits_pipeline(width=8), None),
        (TypeError, "model is 'name'; give a denoiser of diffusers", "name", None),
        (TypeError, "give a denoiser of diffusers", torch.nn.Linear(2, 2), None),
        (TypeError, "AutoencoderKL.forward has no .* timestep: it is no denoiser", vae, None),
        (ValueError, r"no parameter of the model is trainable; call model.requires_grad_\(True\)", frozen, None),
        (ValueError, "is to be trained in torch.bfloat16.*set bf16=True", half, None),
        (ValueError, "has an adapter already", adapted, lora),
        (ValueError, r"several adapters to train: \['default', 'other'\]", two, None),
        (ValueError, "conv_in.weight is trainable beside the adapter.* would be lost", thawed, None),
        (ValueError, "conv_in.bias is trainable beside the adapter", new_unet(), with_bias),
    ):
        with pytest.raises(error, match=message):
            new_trainer(tmp_path, model, trainer_options={"peft_config": peft})


@pytest.mark.slow
def test_settings_that_contradict_the_rest(tmp_path):
    for error, message, settings in (
        (ValueError, "prompt_dropout is 0.1 and empty_prompt is missing", {"prompt_dropout": 0.1}),
        (ValueError, "'logit_normal' is for flow matching, and DDPMScheduler is not", {
            "timestep_sampling": "logit_normal",
        }),
        (ValueError, "given to the trainer and in args", {
            "snr_gamma": 5.0, "trainer_options": {"loss_weighting": MinSNRWeighting()},
        }),
        (ValueError, "infinite at SNR 0.0. Use prediction_type='v_prediction'", {
            "loss_weighting": "debias", "scheduler": new_scheduler(rescale_betas_zero_snr=True),
        }),
        (ValueError, "compute_metrics is not used", {"trainer_options": {"compute_metrics": print}}),
        (ValueError, "neftune_noise_alpha is 5.0; it is noise on token", {"neftune_noise_alpha": 5.0}),
        (ValueError, "label_smoothing_factor is 0.1; a denoiser has no labels", {"label_smoothing_factor": 0.1}),
        (ValueError, "activation_checkpointing_kwargs is {'use_reentrant': False}", {
            "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
        }),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            new_trainer(tmp_path, **settings)
    sharded = arguments(tmp_path)
    sharded.fsdp = "full_shard"
    with pytest.raises(ValueError, match="FSDP hold a model in pieces.*distributed data parallel"):
        DiffusionTrainer(new_unet(), sharded, scheduler=new_scheduler(), train_dataset=make_rows())
    for message, options in (
        ("loss_weighting is 'min_snr'; give a LossWeighting", {"loss_weighting": "min_snr"}),
        (r"empty_prompt is a Tensor; give columns by name: encode_prompts", {"empty_prompt": torch.zeros(1, 3, 8)}),
    ):
        with pytest.raises(TypeError, match=message):
            new_trainer(tmp_path, prompt_dropout=float("empty_prompt" in options), trainer_options=options)
    with pytest.raises(TypeError, match="scheduler is missing"):
        DiffusionTrainer(new_unet(), arguments(tmp_path), train_dataset=make_rows())
    with pytest.raises(TypeError, match="args is a TrainingArguments; give DiffusionTrainingArguments"):
        DiffusionTrainer(new_unet(), TrainingArguments(str(tmp_path), use_cpu=True), scheduler=DDPMScheduler())


@pytest.mark.slow
def test_zero_terminal_snr_trains_with_min_snr(tmp_path):
    trainer = new_trainer(
        tmp_path, scheduler=new_scheduler("v_prediction", rescale_betas_zero_snr=True), snr_gamma=5.0, max_steps=1
    )
    assert trainer.schedule.signal[-1] == 0 and trainer._weights[-1] == 0
    trainer.train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: make_rows().remove_columns("latents"), "train_dataset has no column latents, which UNet2DCondition"),
        (lambda: make_rows().remove_columns("encoder_hidden_states"), "no column encoder_hidden_states"),
        (lambda: make_rows(text=["a"] * 16), r"has columns \['text'\].*remove_columns\(\['text'\]\)"),
        (
            lambda: make_rows(encoder_hidden_states=torch.zeros(16, 3, 16).numpy()),
            r"states of train_dataset have the shape \(3, 16\), and UNet2DConditionModel takes \(tokens, 8",
        ),
        (
            lambda: make_rows(encoder_hidden_states=torch.zeros(16, 1, 3, 8).numpy()),
            r"of train_dataset have the shape \(1, 3, 8\).* one row each",
        ),
        (lambda: make_rows(latents=torch.zeros(16, 3, 8, 8).numpy()), r"shape \(3, 8, 8\).* takes 4 channels first"),
    ],
    ids=["latents", "prompts", "captions", "width", "states", "channels"],
)
def test_datasets(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        new_trainer(tmp_path, rows=rows())
    with pytest.raises(ValueError, match=message.replace("train_dataset", r"eval_dataset\['one'\]")):
        new_trainer(tmp_path, eval_rows={"one": rows()})


def test_rows_of_different_sizes_or_not_finite(tmp_path):
    small, large = torch.zeros(4, 8, 8), torch.zeros(4, 8, 16)
    with pytest.raises(
        ValueError, match=r"latents of different shapes: \[\(4, 8, 8\), \(4, 8, 16\)\]. Bring the images"
    ):
        DiffusionCollator()([{"latents": small}, {"latents": large}])
    latents = torch.zeros(16, 4, 8, 8)
    latents[2, 1, 3, 3] = torch.inf
    trainer = new_trainer(tmp_path, rows=make_rows(latents=latents.numpy()))
    with pytest.raises(ValueError, match="latents of a row is NaN or infinite.*encode in float32"):
        trainer.train()


@pytest.mark.slow
def test_lists_and_half_precision_are_read(tmp_path):
    rows = datasets.Dataset.from_list([{name: one.tolist() for name, one in row.items()} for row in make_rows()])
    half = [{name: one.half() for name, one in row.items()} for row in make_rows()]
    for found in (rows, half):
        trainer = new_trainer(tmp_path, rows=found, max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1


@pytest.mark.slow
def test_an_empty_prompt_of_another_length(tmp_path):
    empty = {"encoder_hidden_states": torch.zeros(1, TOKENS + 1, WIDTH)}
    trainer = new_trainer(tmp_path, prompt_dropout=0.5, trainer_options={"empty_prompt": empty})
    with pytest.raises(ValueError, match=r"has the shape \(4, 8\), a row \(3, 8\); encode both"):
        trainer.train()


@pytest.mark.slow
def test_a_stream_of_rows(tmp_path):
    trainer = new_trainer(tmp_path, rows=make_rows().to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    for rows, message in (
        (make_rows(text=["a"] * 16), r"column text holds str, .*remove_columns\(\['text'\]\)"),
        (make_rows(width=[1] * 16), r"a batch has columns \['width'\], which are no arguments"),
    ):
        with pytest.raises(ValueError, match=message):
            new_trainer(tmp_path, rows=rows.to_iterable_dataset()).train()


@pytest.mark.slow
def test_a_model_init(tmp_path):
    trainer = DiffusionTrainer(
        args=arguments(tmp_path, max_steps=1, activation_checkpointing=True), scheduler=new_scheduler(),
        train_dataset=make_rows(), model_init=lambda: new_unet(),
    )  # fmt: skip
    trainer.train()
    assert trainer.model.is_gradient_checkpointing and isinstance(trainer._training, DiffusionTrainingArguments)


def test_datasets_without_rows_or_of_several_splits(tmp_path):
    splits = datasets.DatasetDict(train=make_rows())
    for message, options in (
        ("train_dataset has no rows", {"rows": make_rows().select([])}),
        (r"eval_dataset\['one'\] has no rows", {"eval_rows": {"one": make_rows().select([])}}),
        (r"train_dataset is a dictionary of \['train'\].*such as dataset\['train'\]", {"rows": splits}),
    ):
        with pytest.raises(ValueError, match=message):
            new_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match="rows of one batch have different columns"):
        DiffusionCollator()([{"latents": torch.zeros(4), "class_labels": 1}, {"latents": torch.zeros(4)}])
    with pytest.raises(ValueError, match="a batch has no column encoder_hidden_states"):
        new_trainer(tmp_path).evaluate(make_rows().remove_columns("encoder_hidden_states"))
