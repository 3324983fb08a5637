"""The text format of traces, and sampling with random numbers that belong to the sample."""

import pytest
import torch

from hfnoise.preference.hf_trace_sampling import SamplingSettings, sample_completions
from hfnoise.preference.traces import EMPTY_TRACE, TRACE_START, split_trace, without_trace_start


@pytest.fixture(scope="module")
def tiny(tiny_model_path, tokenizer):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_model_path), tokenizer


@pytest.mark.parametrize("ending", ["", "<think>", TRACE_START, EMPTY_TRACE, "<think>\n\n</think>"])
def test_without_trace_start(ending):
    assert without_trace_start(f"a<think>\nb</think>c{ending}") == "a<think>\nb</think>c"


@pytest.mark.parametrize(
    ("text", "trace", "answer"),
    [
        ("<think>\na\n</think>\n\nb", "a", "b"),
        ("a\n</think>\n\nb", "a", "b"),
        (f"{EMPTY_TRACE}b", "", "b"),
        ("b\n", None, "b"),
        ("<think>\na", None, "<think>\na"),
        ("a</think>b</think>c", "a</think>b", "c"),
    ],
)
def test_split_trace(text, trace, answer):
    assert split_trace(text) == (trace, answer)


def sampled(tiny, prefixes, samples=3, **settings):
    return sample_completions(*tiny, prefixes, samples, SamplingSettings(**{"max_new_tokens": 8, **settings}))


def test_a_sample_hangs_on_its_seed_and_prompt_alone(tiny):
    prefixes = ["the quick brown fox", "old trees", "seven green birds sing in old trees"]
    alone = [sampled(tiny, [prefix], batch_size=1)[0] for prefix in prefixes]
    assert sampled(tiny, prefixes, batch_size=2) == alone
    assert sampled(tiny, prefixes[::-1], batch_size=64) == alone[::-1]
    assert sampled(tiny, prefixes, samples=2) == [completions[:2] for completions in alone]
    assert len({c.text for completions in alone for c in completions}) > 6
    assert sampled(tiny, prefixes, seed=1) != alone


def test_a_prompt_given_twice_is_sampled_twice(tiny):
    first, second = sampled(tiny, ["old trees", "old trees"])
    assert first != second and first == sampled(tiny, ["old trees"])[0]


def test_samples_follow_the_distribution_of_the_model(tiny):
    """Frequencies of the first token against softmax(logits / temperature), within 4 standard errors."""
    model, tokenizer = tiny
    count, prefix = 2000, "old trees"
    with torch.no_grad():
        logits = model(**tokenizer(prefix, return_tensors="pt")).logits[0, -1]
    expected = (logits / 2.0).softmax(-1)
    texts = sampled(tiny, [prefix], count, temperature=2.0, max_new_tokens=1, batch_size=500)[0]
    ids = [1 if completion.finished else tokenizer(completion.text)["input_ids"][0] for completion in texts]
    frequencies = torch.bincount(torch.tensor(ids), minlength=len(expected)) / count
    assert ((frequencies - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_greedy_and_top_k_of_one_take_the_likeliest_token(tiny):
    model, tokenizer = tiny
    prompt = tokenizer("the quick brown", return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    for settings in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        [[completion]] = sampled(tiny, ["the quick brown"], samples=1, **settings)
        assert text.split("<eos>")[0].split() == completion.text.split()


def test_the_model_is_left_as_it_was(tiny):
    model, _ = tiny
    before = model.generation_config.to_dict()
    model.train()
    sampled(tiny, ["old trees"])
    assert model.training and model.generation_config.to_dict() == before
    model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"batch_size": True}, "batch_size must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"max_new_tokens": 63}, "to at most 62"),
    ],
)
def test_bad_settings(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        sampled(tiny, ["old trees"], **settings)
