"""A guider of ours in a ModularPipeline is saved with it as `hfnoise` + class, and comes back by load_components()."""

import json

import pytest

from hfnoise.pipelines import AdaptiveGuidance, LinearGuidance, ProjectedGuidance

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("guider_class", [AdaptiveGuidance, LinearGuidance, ProjectedGuidance])
def test_saved_with_the_pipeline(tmp_path, monkeypatch, guider_class):
    from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep

    monkeypatch.chdir(tmp_path)
    pipe = WanDenoiseStep().init_pipeline()
    pipe.update_components(guider=guider_class(guidance_scale=3.0))
    pipe.save_pretrained("modular", overwrite_modular_index=True)
    library, name, spec = json.loads((tmp_path / "modular" / "modular_model_index.json").read_text())["guider"]
    assert [library, name] == spec["type_hint"] == ["hfnoise", guider_class.__name__]
    loaded = WanDenoiseStep().init_pipeline("modular")
    loaded.load_components()
    assert type(loaded.guider) is guider_class and loaded.guider.guidance_scale == 3.0
    # Taken for itself again, after another one and back.
    loaded.update_components(guider=AdaptiveGuidance(threshold=0.9))
    loaded.save_pretrained("modular", overwrite_modular_index=True)
    again = WanDenoiseStep().init_pipeline("modular")
    again.load_components()
    assert again.guider.threshold == 0.9


def test_loaded_by_a_component_spec(tmp_path):
    """The way that diffusers documents."""
    from diffusers import ComponentSpec
    from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep

    AdaptiveGuidance(threshold=0.9).save_pretrained(tmp_path / "guider")
    spec = ComponentSpec(
        name="guider", type_hint=AdaptiveGuidance, pretrained_model_name_or_path=str(tmp_path), subfolder="guider"
    )
    pipe = WanDenoiseStep().init_pipeline()
    pipe.update_components(guider=spec.load())
    entry = pipe.config["guider"]
    assert tuple(entry[:2]) == ("hfnoise", "AdaptiveGuidance") and entry[2]["subfolder"] == "guider"
