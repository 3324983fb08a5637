"""QuestConfig in diffusers: a UNet, master and packed, alone and in a pipeline with a text encoder of transformers."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import load_file, save_file

from hfnoise import QuestConfig, dequantize, export_packed, prepare_qat, quantization_report

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    unet().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    export_packed(prepare_qat(unet(), QuestConfig(bits=4))).save_pretrained(folder)
    return folder


_seeded = torch.Generator().manual_seed(1)
LATENTS, CONTEXT = (torch.randn(*shape, generator=_seeded) for shape in ((2, 4, 8, 8), (2, 5, 32)))


@torch.no_grad()
def output(model):
    return model(LATENTS.to(model.dtype), 7, CONTEXT.to(model.dtype)).sample


def kinds(model):
    return {type(module).__name__ for module in model.modules() if hasattr(module, "quantization")}


CASES = [(4, 4), (1, None), (1.58, 8), (8, 8)]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "bits", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])], ids=str
)
def test_round_trip(bits, dtype, folder, tmp_path):
    settings = dict(zip(("weight_bits", "activation_bits"), bits, strict=True))

    def load(path, config=None):
        return UNet2DConditionModel.from_pretrained(path, torch_dtype=dtype, quantization_config=config)

    master = load(folder, QuestConfig(**settings))
    assert kinds(master) == {"QuestLinear"}
    reference = output(master)
    master.save_pretrained(tmp_path / "master")
    packed = load(folder, QuestConfig(**settings, store_master_weights=False))
    assert kinds(packed) == {"QuestPackedLinear"}
    packed.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    again.save_pretrained(tmp_path / "again")
    export_packed(master).save_pretrained(tmp_path / "exported")
    loaded = [load(tmp_path / name) for name in ("master", "again", "exported")]
    for model in (packed, again, master, *loaded):
        assert model.dtype == dtype
        assert torch.equal(output(model), reference)
    scales = {key: value.dtype for key, value in again.state_dict().items() if key.endswith("_scale")}
    assert set(scales.values()) == {torch.float32}
    assert (tmp_path / "packed" / WEIGHTS).read_bytes() == (tmp_path / "exported" / WEIGHTS).read_bytes()

    dense = dequantize(again, weight_only=True)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    stock = load(tmp_path / "dense")
    assert kinds(stock) == set()
    assert torch.equal(output(stock), reference) == (bits[1] is None)


@pytest.mark.parametrize("store_master_weights", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pipeline(store_master_weights, tmp_path, tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8), text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer, unet=unet(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "float")  # fmt: skip

    def image(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            embeds = pipeline.text_encoder(torch.arange(1, 6)[None])[0]
        made = pipeline(
            prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds), num_inference_steps=2, height=8,
            width=8, generator=torch.Generator().manual_seed(0), output_type="np",
        )  # fmt: skip
        return torch.from_numpy(made.images)

    settings = {"bits": 4, "store_master_weights": store_master_weights}
    for config in (
        PipelineQuantizationConfig(
            quant_backend="quest", quant_kwargs=settings, components_to_quantize=["unet", "text_encoder"]
        ),
        PipelineQuantizationConfig(
            quant_mapping={"unet": QuestConfig(**settings), "text_encoder": QuestConfig(**settings)}
        ),
    ):
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
        kind = "QuestLinear" if store_master_weights else "QuestPackedLinear"
        assert [kinds(part) for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae)] == [
            {kind},
            {kind},
            set(),
        ]
        pipeline.save_pretrained(tmp_path / "quantized")
        assert torch.equal(image(StableDiffusionPipeline.from_pretrained(tmp_path / "quantized")), image(pipeline))


def test_report_lists_convolutions():
    skipped = quantization_report(prepare_qat(unet(), QuestConfig(bits=4))).skipped
    assert skipped["conv_in.weight"] == "a weight of Conv2d, which is no linear layer"
    assert not any(name.startswith(LAYER) for name in skipped)


def test_training_steps(tmp_path):
    model = prepare_qat(unet(), QuestConfig(bits=4)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    target, losses = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for step in range(4):
        if step == 2:
            model.enable_gradient_checkpointing()
        loss = (model(LATENTS, 7, CONTEXT).sample - target).square().mean()
        loss.backward()
        assert model.get_submodule(LAYER).weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    reference = output(model.eval())
    export_packed(model).save_pretrained(tmp_path)
    assert torch.equal(output(UNet2DConditionModel.from_pretrained(tmp_path)), reference)


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lora(packed, packed_folder, tmp_path):
    from peft import LoraConfig

    def base():
        if packed:
            return UNet2DConditionModel.from_pretrained(packed_folder)
        return prepare_qat(unet(), QuestConfig(bits=4)).requires_grad_(False)

    model = base()
    before = output(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert torch.equal(output(model), before) and trained
    if packed:
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert not any(name.endswith("to_q.base_layer.weight") for name in frozen)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(2):
        model(LATENTS, 7, CONTEXT).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = output(model)
    assert not torch.equal(after, before)
    model.save_lora_adapter(tmp_path)
    fresh = base()
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(output(fresh), after)
    if packed:
        with pytest.raises(ValueError, match="cannot be merged into packed weights"):
            fresh.fuse_lora()
    else:
        with pytest.warns(UserWarning, match="rounded"):
            fresh.fuse_lora()
    fresh.delete_adapters("default")


@pytest.mark.slow
def test_casts_and_offload(packed_folder):
    model = UNet2DConditionModel.from_pretrained(packed_folder)
    reference = output(model)
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(output(model), reference)
    later = UNet2DConditionModel.from_pretrained(packed_folder, device_map={"": "cpu"}).to(torch.bfloat16)
    at_once = UNet2DConditionModel.from_pretrained(packed_folder, torch_dtype=torch.bfloat16)
    assert later.get_submodule(LAYER).weight_scale.dtype == torch.float32
    assert torch.equal(output(later), output(at_once))


@pytest.mark.slow
def test_shards_threads_and_single_files(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "1")
    config = QuestConfig(bits=2, store_master_weights=False)
    reference = output(UNet2DConditionModel.from_pretrained(folder, quantization_config=config))
    unet().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "shards", quantization_config=config)
    assert torch.equal(output(model), reference)
    model.save_pretrained(tmp_path / "packed", max_shard_size="100KB")
    assert torch.equal(output(UNet2DConditionModel.from_pretrained(tmp_path / "packed")), reference)
    single = UNet2DConditionModel.from_single_file(
        str(folder / WEIGHTS), config=str(folder), quantization_config=config
    )
    assert torch.equal(output(single), reference)


# name -> what is changed in a checkpoint, what the error says.
def without(key):
    return lambda weights: weights.pop(f"{LAYER}.{key}")


BROKEN = {
    "no scale": (without("weight_scale"), f"lacks 1 packed weights or scales \\({LAYER}.weight_scale"),
    "no weight": (without("weight"), f"lacks 1 packed weights or scales \\({LAYER}.weight,"),
    "scales": (
        lambda weights: weights.update({f"{LAYER}.weight_scale": torch.ones(3)}),
        r"weight_scale has shape \(3,\) in the checkpoint, and \(32,\)",
    ),
    "codes": (
        lambda weights: weights.update({f"{LAYER}.weight": torch.zeros(1, 32, 3, dtype=torch.uint8)}),
        "expected shape",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(name, packed_folder, tmp_path):
    change, message = BROKEN[name]
    weights = load_file(packed_folder / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((packed_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_bad_input(folder, packed_folder, tmp_path):
    load, packed = UNet2DConditionModel.from_pretrained, QuestConfig(bits=4, store_master_weights=False)
    parts = {name: "cpu" for name, _ in unet().named_children()}
    with pytest.raises(ValueError, match="to the disk"):
        load(folder, quantization_config=packed, device_map={**parts, "down_blocks": "disk"})
    with pytest.raises(ValueError, match=r"then hfnoise.dequantize\(model\)"):
        load(folder, quantization_config=QuestConfig(weight_bits=4, dequantize=True))
    with pytest.raises(ValueError, match="'nothing_here', which matches no module of UNet2DConditionModel"):
        load(folder, quantization_config=QuestConfig(bits=4, modules_to_not_convert=["nothing_here"]))
    with pytest.raises(ValueError, match="weight_only=True"):
        load(packed_folder).dequantize()
    bad = unet()
    bad.get_submodule(LAYER).weight.data[0, 0] = float("nan")
    bad.save_pretrained(tmp_path)
    for config in (packed, QuestConfig(bits=4)):
        with pytest.raises(ValueError, match=rf"{LAYER}.weight.*NaN"):
            load(tmp_path, quantization_config=config)
    mixed = prepare_qat(unet(), QuestConfig(bits=4))
    layer = mixed.get_submodule(LAYER)
    layer.quantization = layer.quantization._replace(weight_bits=2)
    with pytest.raises(ValueError, match="2 settings"):
        export_packed(mixed)


@pytest.mark.slow
def test_not_registered_and_registered_late(run_python, packed_folder):
    printed = run_python(f"""
from diffusers import UNet2DConditionModel
try:
    UNet2DConditionModel.from_pretrained({str(packed_folder)!r})
except ValueError as error:
    print(error)
import hfnoise
print(UNet2DConditionModel.from_pretrained({str(packed_folder)!r}).config.quantization_config.weight_bits)
""")
    assert "Unknown quantization type, got quest" in printed
    assert printed.splitlines()[-1] == "4"
