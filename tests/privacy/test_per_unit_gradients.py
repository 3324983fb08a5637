"""Per-unit gradients of adapters and layers of transformers, against the golden vectors and the loop over units."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hfnoise.privacy import UncoveredParametersError, UnitGradientRecorder, clip_per_unit, per_unit_gradients
from hfnoise.privacy.expanded_leaf import ExpandedLinear, RowsOfUnits, expanded_leaf
from tests.privacy.lora_models import (
    golden_llama,
    largest_error,
    load_vectors,
    lora_llama,
    mean_nll,
    tiny_llama,
    token_batch,
    train_only,
)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_golden_linear_layers(case):
    vectors = load_vectors("dp_persample")
    inputs, output_gradient, wanted = (vectors[f"lin{case}_{key}"] for key in ("z", "dy", "G"))
    rows = RowsOfUnits(torch.arange(len(inputs)), torch.ones(len(inputs)), len(inputs), True)
    weight = torch.randn(wanted.shape[1:])
    leaf = expanded_leaf(weight, len(inputs))
    ExpandedLinear.apply(inputs, weight, None, leaf, None, rows, "layer").backward(output_gradient)
    torch.testing.assert_close(leaf.grad, wanted, atol=1e-5, rtol=1e-5)
    norms = clip_per_unit([leaf.grad], 1.0).norms
    torch.testing.assert_close(norms, vectors[f"lin{case}_norm_ghost"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["leaf", "loop"])
def test_golden_llama(mode):
    model, batch, vectors = golden_llama()
    torch.testing.assert_close(mean_nll(model, batch), vectors["per_sample_loss"], atol=1e-6, rtol=1e-6)
    found = per_unit_gradients(model, batch, mean_nll, mode=mode)
    assert largest_error({f"G::{name}": value for name, value in found.items()}, {
        key: value for key, value in vectors.items() if key.startswith("G::")}) < 1e-5  # fmt: skip
    torch.testing.assert_close(clip_per_unit(found, 1.0).norms, vectors["norms"], atol=1e-5, rtol=1e-5)


ADAPTERS = {
    "B": {},
    "A and B": {"parts": ("lora_",)},
    "rsLoRA, ranks, bias": {
        "parts": ("lora_",), "use_rslora": True, "rank_pattern": {"v_proj": 2}, "lora_bias": True,
    },
    "DoRA": {"parts": ("lora_",), "use_dora": True},
    "DoRA, magnitudes frozen, dropout": {"parts": ("lora_A", "lora_B"), "use_dora": True, "lora_dropout": 1e-9},
    "head": {"parts": ("lora_B", "modules_to_save"), "modules_to_save": ["lm_head"]},
    "norms": {"parts": ("lora_B", "norm")},
    "all linear": {"parts": ("lora_",), "targets": ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")},
}  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # such an adapter cannot be merged; nobody does here
def test_adapters_equal_the_loop(adapter):
    settings = dict(ADAPTERS[adapter])
    model, batch = lora_llama(*settings.pop("parts", ()), **settings), token_batch()
    found, wanted = (per_unit_gradients(model, batch, mean_nll, mode=mode) for mode in ("leaf", "loop"))
    assert largest_error(found, wanted) < 1e-6
    assert all(gradient.flatten(1).norm(dim=1).min() > 1e-3 for gradient in wanted.values())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_of_transformers_changes_nothing(reentrant):
    model, batch = lora_llama("lora_"), token_batch()
    plain = per_unit_gradients(model, batch, mean_nll)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    for mode in ("leaf", "loop"):
        assert largest_error(per_unit_gradients(model, batch, mean_nll, mode=mode), plain) <= (mode == "loop") * 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_checkpointing_without_gradients_of_inputs_is_refused():
    model = lora_llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model._require_grads_hook.remove()  # what PEFT and transformers put on the embedding by themselves
    model.train()
    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(RuntimeError):
        per_unit_gradients(model, token_batch(), mean_nll)


def dpo_loss(model, batch):
    """A preference loss as TRL computes it: one forward over [chosen; rejected]."""
    rows = {
        key: torch.cat([batch[f"chosen_{key}"], batch[f"rejected_{key}"]]) for key in ("input_ids", "attention_mask")
    }
    nll = mean_nll(model, {**rows, "labels": rows["input_ids"]})
    chosen, rejected = nll.chunk(2)
    return -nn.functional.logsigmoid(rejected - chosen)


def test_preference_pairs():
    model, chosen, rejected = lora_llama("lora_"), token_batch(3), token_batch(3, seed=1)
    batch = {f"chosen_{key}": value for key, value in chosen.items()}
    batch |= {f"rejected_{key}": value for key, value in rejected.items()}
    unit = torch.arange(3).repeat(2)
    found = per_unit_gradients(model, batch, dpo_loss, unit=unit)
    assert largest_error(found, per_unit_gradients(model, batch, dpo_loss, unit=unit, mode="loop")) < 1e-6
    assert found[next(iter(found))].shape[0] == 3

    def in_two_forwards(model, batch):
        nll = [mean_nll(model, {key.removeprefix(part): value for key, value in batch.items() if key.startswith(part)})
               for part in ("chosen_", "rejected_")]  # fmt: skip
        return -nn.functional.logsigmoid(nll[1] - nll[0])

    everything = {**batch, "chosen_labels": batch["chosen_input_ids"], "rejected_labels": batch["rejected_input_ids"]}
    assert largest_error(per_unit_gradients(model, everything, in_two_forwards), found) < 1e-6


def test_users_with_several_rows():
    model, batch, unit = lora_llama(), token_batch(), torch.tensor([1, 0, 1, 1, 2])

    def per_user(model, batch):  # the sum: which unit is whose is the recorder's business
        return mean_nll(model, batch).sum()

    found = per_unit_gradients(model, batch, per_user, unit=unit)
    rows = per_unit_gradients(model, batch, mean_nll, mode="loop")
    wanted = {name: torch.stack([value[unit == user].sum(0) for user in range(3)]) for name, value in rows.items()}
    assert largest_error(found, wanted) < 1e-6
    assert largest_error(per_unit_gradients(model, batch, per_user, unit=unit, mode="loop"), wanted) < 1e-6


def test_bfloat16_autocast():
    model, batch = lora_llama("lora_", "norm"), token_batch()
    with torch.autocast("cpu", torch.bfloat16):  # around backward, too
        found, wanted = (per_unit_gradients(model, batch, mean_nll, mode=mode) for mode in ("leaf", "loop"))
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    ratio = clip_per_unit(found, 1.0).norms / clip_per_unit(wanted, 1.0).norms
    assert (ratio - 1).abs().max() < 2e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of how its compiler handles such functions
def test_compiled_without_breaks_or_recompilation():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = lora_llama("lora_", "norm"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mean_nll, backend=counter, fullgraph=True)
    with UnitGradientRecorder(model, 5) as recorder:
        for number in range(3):
            batch, weight, results = token_batch(seed=number), torch.ones(5), []
            weight[number] = 0
            for function in (compiled, mean_nll):
                with recorder.record(torch.arange(5), weight):
                    function(model, batch).sum().backward()
                results.append(recorder.collect())
                recorder.reset()
            assert largest_error(*results) < 1e-7 and not results[0][next(iter(results[0]))][number].any()
            assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_quantised_bases(bits, tmp_path):
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    base = prepare_model_for_kbit_training(base)  # with reentrant checkpointing
    model = train_only(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), "lora_").train()
    found, wanted = (per_unit_gradients(model, token_batch(), mean_nll, mode=mode) for mode in ("leaf", "loop"))
    assert largest_error(found, wanted) < 1e-6 and wanted[next(iter(wanted))].any()


NORMS = {
    "gemma": ("Gemma", {"head_dim": 8}, "norm"),
    "qwen3, with norms of queries and keys": ("Qwen3", {"head_dim": 8}, "norm"),
    "cohere, weights of two dimensions": ("Cohere", {"use_qk_norm": True}, "norm"),
    "llama": ("Llama", {}, "norm"),
}


@pytest.mark.parametrize("family", NORMS)
def test_norms_of_transformers(family):
    import transformers

    name, settings, part = NORMS[family]
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes, **settings)
    model = train_only(getattr(transformers, f"{name}ForCausalLM")(config), part)
    with UnitGradientRecorder(model, 5) as recorder:
        assert len(recorder.parameters) >= 3 or name == "Cohere"
    found, wanted = (per_unit_gradients(model, token_batch(), mean_nll, mode=mode) for mode in ("leaf", "loop"))
    assert largest_error(found, wanted) < 1e-6


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm((2, 3)), nn.LayerNorm(3), nn.LayerNorm(3, bias=False), nn.RMSNorm((2, 3))]
)
def test_norms_of_torch(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(nn.Linear(3, 3), norm)
    for rows in (torch.randn(4, 2, 3), torch.randn(4, 5, 2, 3)):
        batch = {"x": rows}
        found, wanted = (
            per_unit_gradients(model, batch, lambda m, b: m(b["x"]).square().flatten(1).sum(1), mode=mode)
            for mode in ("leaf", "loop")
        )
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the stock norm's
def test_norms_of_torch_in_16_bits(kind, autocast):
    norm, batch = kind(8), {"x": torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()}
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))

    def loss(model, batch):
        return model(batch["x"]).float().square().flatten(1).sum(1)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock = norm(batch["x"])
        with UnitGradientRecorder(norm, 4) as recorder, recorder.record(torch.arange(4), torch.ones(4)):
            recorded = norm(batch["x"])
        found, wanted = (per_unit_gradients(norm, batch, loss, mode=mode) for mode in ("leaf", "loop"))
    assert recorded.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(recorded, stock, atol=1e-3, rtol=2**-7)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 0.01 * gradient.norm(), name


REFUSED = {
    "LoRA of embeddings": (lambda: lora_llama("lora_", targets=("embed_tokens",)), "lora_embedding_B"),
    "IA3": (
        lambda: get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])), "ia3_l",
    ),
    "prompt tuning": (
        lambda: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "Embedding",
    ),
    "everything": (tiny_llama, "embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_uncovered_layers_are_refused_and_left_to_the_loop(kind):
    make, message = REFUSED[kind]
    model = make()
    with pytest.raises(UncoveredParametersError, match=f'(?s){message}.*grad_mode="loop"'):
        per_unit_gradients(model, token_batch(), mean_nll)
    if kind != "prompt tuning":  # its logits have the prompt's positions too
        found = per_unit_gradients(model, token_batch(2), mean_nll, mode="loop")
        assert all(gradient.shape[0] == 2 for gradient in found.values())


def test_convolution_of_vision_inputs_is_refused():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
                       patch_size=4)  # fmt: skip
    model = ViTForImageClassification(config)
    with pytest.raises(UncoveredParametersError, match="Conv2d"):
        UnitGradientRecorder(model, 2)
    train_only(model, "layernorm", "classifier", "attention")

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["pixels"]).logits, batch["label"], reduction="none")

    batch = {"pixels": torch.randn(3, 3, 8, 8), "label": torch.tensor([0, 1, 0])}
    found, wanted = (per_unit_gradients(model, batch, loss, mode=mode) for mode in ("leaf", "loop"))
    assert largest_error(found, wanted) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "hooks"}, "'leaf', 'loop'"),
        ({"batch": torch.ones(2, 3)}, "dict of tensors, got Tensor"),
        ({"batch": {"x": torch.ones(2, 3), "y": torch.ones(3)}}, "'x': 2, 'y': 3"),
        ({"batch": {"x": torch.ones(0, 3)}}, "at least 1"),
        ({"unit": torch.tensor([0, -1])}, "from 0 on"),
        ({"unit": torch.arange(3)}, "2 rows, but unit names 3 rows of 3 units"),
        ({"unit": torch.tensor([0, 2]), "mode": "loop", "loss_fn": lambda m, b: m(b["x"]).sum()}, "unit 1 has no row"),
        ({"loss_fn": lambda m, b: m(b["x"])}, r"shape \(2,\), or their sum; got \(2, 1\)"),
    ],
)
def test_bad_input(change, message):
    arguments = {"batch": {"x": torch.ones(2, 3)}, "loss_fn": lambda m, b: m(b["x"]).sum(1), **change}
    with pytest.raises(ValueError, match=message):
        per_unit_gradients(nn.Linear(3, 1), **arguments)
