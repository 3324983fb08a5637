"""What stock would write so that nothing reads it again is refused before anything is written, and named."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

import hfnoise
from hfnoise.pipelines.unsaved_layers import check_layers
from hfnoise.worlds.digits_pipeline import new_digits_pipeline
from hfnoise.worlds.tiny_pipelines import FAMILIES, STOCK_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in STOCK_WARNINGS]


def with_lora(pipe):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def with_layers(pipe, kind, **options):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for block in pipe.unet.modules():
        if type(getattr(block, "to_q", None)) is torch.nn.Linear:
            old = block.to_q
            made = getattr(bitsandbytes.nn, kind)(old.in_features, old.out_features, bias=False, **options)
            made.load_state_dict(old.state_dict())
            block.to_q = made.to("cpu")


def with_nf4(pipe):
    with_layers(pipe, "Linear4bit", quant_type="nf4", compute_dtype=torch.float32)


def with_int8(pipe):
    with_layers(pipe, "Linear8bitLt", has_fp16_weights=False)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (with_lora, "unet carries adapters of PEFT, such as a LoRA.* take them off with pipe.unload_lora_weights"),
        (with_nf4, "unet has layers of bitsandbytes .* by hand.* UNet2DConditionModel.from_pretrained.*Config"),
        (with_int8, "unet has layers of bitsandbytes that were put in by hand"),
    ],
)
def test_refused_before_anything_is_written(put, message, tmp_path):
    pipe = hfnoise.AutoGuidedPipeline.from_pipe(new_digits_pipeline(width=8))
    put(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        pipe.push_to_hub("nobody/nothing")
    assert not (tmp_path / "saved").exists()


def test_an_ip_adapter_is_refused():
    with pytest.raises(ValueError, match="unet carries an IP-Adapter.* Take it off with pipe.unload_ip_adapter"):
        check_layers(FAMILIES["sd-ip-adapter"].build().components)


def test_stock_loads_other_weights_without_an_error(tmp_path):
    """The reason: if stock comes to refuse, or to load them, the check can go."""
    pipe = new_digits_pipeline(width=8)
    weights = {name: weight.clone() for name, weight in pipe.unet.state_dict().items() if "to_q" in name}
    with_int8(pipe)
    pipe.unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).state_dict()
    assert all((loaded[name] - weight).abs().max() > 10 for name, weight in weights.items())


def test_what_was_quantised_by_a_configuration_is_saved():
    """diffusers loads it again. Putting the layers in takes a GPU there: here they are put in beside its quantiser."""
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    pipe = new_digits_pipeline(width=8)
    with_nf4(pipe)
    pipe.unet.hf_quantizer = DiffusersAutoQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    check_layers(pipe.components)


def test_adapters_that_are_gone_are_saved(tmp_path):
    pipe = hfnoise.AutoGuidedPipeline.from_pipe(new_digits_pipeline(width=8))
    with_lora(pipe)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    found = hfnoise.AutoGuidedPipeline.from_pretrained(tmp_path).unet.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in pipe.unet.state_dict().items())
