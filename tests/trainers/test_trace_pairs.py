"""make_trace_pairs: what it picks, what it leaves out and counts, on the model of the arithmetic world."""

import pytest
from datasets import Dataset, load_dataset, load_from_disk

import hfnoise
from hfnoise.__main__ import main
from hfnoise.preference.hf_trace_sampling import Completion
from hfnoise.preference.traces import TRACE_START, split_trace
from hfnoise.trainers.trace_pairs import make_trace_pairs, trace_report
from hfnoise.trainers.trace_pairs_saving import save_trace_pairs
from hfnoise.worlds.arithmetic import model_path, prompts, reward

COLUMNS = ["prompt", "chosen", "rejected", "chosen_nothink", "rejected_nothink"]
SUMS = prompts("validation", 24)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path())


@pytest.fixture(scope="module")
def world_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path())


def make(model, given=SUMS, reward_fn=reward, **settings):
    return make_trace_pairs(model, given, reward_fn, **{"max_new_tokens": 128, "batch_size": 128, **settings})


@pytest.fixture(scope="module")
def pairs(model):
    return make(model)


def test_it_is_public():
    assert hfnoise.make_trace_pairs is make_trace_pairs


def test_rows_hold_the_best_and_the_worst(pairs):
    assert pairs.column_names == COLUMNS + [f"{name}_reward" for name in COLUMNS[1:]]
    assert 4 < len(pairs) < len(SUMS)
    for row in pairs:
        assert row["prompt"] in SUMS
        for suffix in ("", "_nothink"):
            for side, value in (("chosen", 1.0), ("rejected", 0.0)):
                text = row[f"{side}{suffix}"]
                assert reward(row["prompt"], text) == row[f"{side}{suffix}_reward"] == value
                assert text.startswith(TRACE_START) == (not suffix)
                assert (split_trace(text)[0] is None) == bool(suffix)


def test_every_sample_is_counted(pairs):
    report = trace_report(pairs)
    assert (report["prompts"], report["pairs"], report["samples"]) == (len(SUMS), len(pairs), 5)
    assert report["sampling"] == {
        "max_new_tokens": 128, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "batch_size": 128,
    }  # fmt: skip
    for mode in ("think", "nothink"):
        assert report[mode]["completions"] == 5 * len(SUMS)
        assert 0 < report[mode]["mean_reward"] < 1
        assert 0 < report[mode]["no_difference"] <= len(SUMS) - len(pairs)
    assert report["think"]["no_difference"] + report["nothink"]["no_difference"] >= len(SUMS) - len(pairs)


@pytest.mark.slow
def test_the_seed_decides_and_the_batch_size_does_not(model, pairs):
    assert make(model, batch_size=7).to_list() == pairs.to_list()
    assert make(model, SUMS[::-1]).to_list() == pairs.to_list()[::-1]
    assert make(model, seed=1).to_list() != pairs.to_list()


def test_reward_sees_what_the_dataset_holds_and_extremes_are_taken(model):
    """With an arbitrary reward, chosen and rejected are the extremes of what the reward was asked about."""
    seen = {}

    def value(answer):
        return sum(map(ord, answer))

    def arbitrary(prompt, answer):
        seen.setdefault((prompt, answer.startswith(TRACE_START)), []).append(answer)
        return value(answer)

    for row in make(model, SUMS[:4], arbitrary, samples=6):
        for with_trace, suffix in ((True, ""), (False, "_nothink")):
            answers = seen[row["prompt"], with_trace]
            assert row[f"chosen{suffix}"] == max(answers, key=value)
            assert row[f"rejected{suffix}"] == min(answers, key=value)
            assert row[f"chosen{suffix}_reward"] > row[f"rejected{suffix}_reward"]


def test_cut_answers_are_counted_and_never_taken(model, pairs):
    short = make(model, max_new_tokens=32)
    counts = trace_report(short)["think"]
    assert 0 < counts["cut"] < counts["completions"]
    assert trace_report(pairs)["think"]["cut"] <= 1 and trace_report(short)["nothink"]["cut"] == 0
    assert all(len(row[side]) < 50 for row in short for side in ("chosen", "rejected"))
    with pytest.raises(ValueError, match=r"none of 24 prompts gives a pair in both modes.*'cut': 120.*max_new_tokens"):
        make(model, max_new_tokens=3)


def test_malformed_answers_are_counted_and_never_taken(model, monkeypatch):
    from hfnoise.trainers import trace_pairs

    texts = {
        "think": ["1\n</think>\n\n2", "1\n</think>\n\n3", "2", "</think></think>3", "1\n</think>\n\n"],
        "nothink": ["2", "3", "</think>\n\n2", "<think>\n2", ""],
    }

    def sample(model, tokenizer, prefixes, *rest, **kwargs):
        mode = "nothink" if "</think>" in prefixes[0] else "think"
        return [[Completion(text, True) for text in texts[mode]] for _ in prefixes]

    monkeypatch.setattr(trace_pairs, "sample_completions", sample)
    pairs = make(model, ["1+1="])
    assert [pairs[0][name] for name in COLUMNS[1:]] == [
        "<think>\n1\n</think>\n\n2", "<think>\n1\n</think>\n\n3", "2", "3",
    ]  # fmt: skip
    for mode in ("think", "nothink"):
        assert trace_report(pairs)[mode] == {
            "completions": 5, "cut": 0, "malformed": 3, "mean_reward": 0.5, "no_difference": 0,
        }  # fmt: skip


def test_conversations_go_through_the_chat_template(model, world_tokenizer):
    conversations = [[{"role": "user", "content": prompt}] for prompt in SUMS]
    pairs = make(model, conversations)
    rendered = [
        world_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    assert all(text.endswith(TRACE_START) for text in rendered)
    # The same as text: the trace that the prompt opens is not opened twice.
    as_text = make(model, rendered, lambda prompt, answer: reward(prompt.split("｜>")[2].split("<")[0], answer))
    assert [row["prompt"][0]["content"] for row in pairs] == [
        text.split("｜>")[2].split("<")[0] for text in as_text["prompt"]
    ]
    for row, text_row in zip(pairs, as_text, strict=True):
        for name in COLUMNS[1:]:
            assert row[name] == [{"role": "assistant", "content": text_row[name]}]


def test_selections_keep_the_report(pairs, tmp_path):
    pairs.shuffle(seed=0).select(range(2)).save_to_disk(tmp_path / "pairs")
    assert trace_report(load_from_disk(tmp_path / "pairs")) == trace_report(pairs)
    with pytest.raises(ValueError, match="holds no report of make_trace_pairs"):
        trace_report(Dataset.from_dict({"prompt": ["1+1="]}))


def test_saved_folder_loads_and_its_card_says_how_it_was_made(pairs, tmp_path, monkeypatch):
    folder = save_trace_pairs({"train": pairs, "test": pairs.select(range(2))}, tmp_path / "sums", license="mit")
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].to_list() == pairs.to_list() and len(loaded["test"]) == 2
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "None" not in card and "/" + "tmp" not in card.split("## How it was made")[0]
    for part in ("license: mit", "# sums", "| temperature | 1.0 |", "| answers per prompt and mode | 5 |", "n<1K"):
        assert part in card
    assert f"| pairs made | {len(pairs)} |" in card and "| pairs here | 2 |" in card
    assert "`hfnoise:arithmetic`" in card and "2510.05095" in card


def test_saving_refuses_what_it_cannot_describe(tmp_path):
    with pytest.raises(ValueError, match="holds no report"):
        save_trace_pairs(Dataset.from_dict({"prompt": ["1+1="]}), tmp_path / "other")
    with pytest.raises(ValueError, match="no split"):
        save_trace_pairs({}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": []}, "prompts is empty"),
        ({"given": "1+1="}, "prompts must be a list of texts, .* got str"),
        ({"given": 3}, "prompts must be .* got int"),
        ({"given": ["1+1=", 3]}, "of one kind; prompt 1 is 3"),
        ({"given": ["1+1=", [{"role": "user", "content": "1+1="}]]}, "of one kind; prompt 1 is"),
        ({"given": [[{"content": "1+1="}]]}, "prompt 0 is"),
        ({"given": ["1+1=", ""]}, "prompt 1 is empty"),
        ({"given": [[]]}, "prompt 0 is empty"),
        ({"given": [[{"role": "assistant", "content": "2"}]]}, "prompt 0 ends with an answer of the assistant"),
        ({"samples": 1}, "samples must be an integer of at least 2"),
        ({"samples": 2.0}, "samples must be an integer of at least 2"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"top_p": 2.0}, r"top_p must be in \(0, 1\]"),
        ({"max_new_tokens": 1000}, "256 positions of the model"),
        ({"reward_fn": lambda prompt, answer: None}, "must return a finite number, got None for prompt 0"),
        ({"reward_fn": lambda prompt, answer: float("nan")}, "must return a finite number, got nan"),
        ({"reward_fn": lambda prompt, answer: 1.0}, "none of 24 prompts gives a pair"),
    ],
)
def test_bad_input(model, changes, message):
    with pytest.raises(ValueError, match=message):
        make(model, **changes)


def test_bad_tokenizers(model, world_tokenizer):
    from copy import deepcopy

    for name in ("pad_token", "eos_token"):
        tokenizer = deepcopy(world_tokenizer)
        setattr(tokenizer, name, None)
        with pytest.raises(ValueError, match=f"the tokenizer has no {name}"):
            make(model, tokenizer=tokenizer)
    tokenizer = deepcopy(world_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        make(model, [[{"role": "user", "content": "1+1="}]], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="built in memory"):
        make(type(model)(type(model.config)(vocab_size=10, hidden_size=32, num_hidden_layers=1)))


def test_command_line(capsys, tmp_path):
    Dataset.from_dict({"question": SUMS}).to_parquet(tmp_path / "sums.parquet")
    arguments = [
        "make-trace-pairs", "--model_name_or_path", "hfnoise:arithmetic", "--dataset_name",
        str(tmp_path / "sums.parquet"), "--prompt_column", "question", "--reward", "hfnoise.worlds.arithmetic:reward",
        "--output_dir", str(tmp_path / "pairs"), "--max_new_tokens", "128", "--batch_size", "128", "--max_prompts",
        "20", "--use_cpu",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "pairs from 20 prompts" in capsys.readouterr().out
    loaded = load_dataset(str(tmp_path / "pairs"), cache_dir=str(tmp_path / "cache"))["train"]
    assert set(loaded["prompt"]) <= set(SUMS[:20]) and set(COLUMNS) <= set(loaded.column_names)
    assert main(["make-trace-pairs", "--dataset_name", "hfnoise:arithmetic", *arguments[1:3], "--use_cpu"]) == 2
    for change, message in (
        (["--prompt_column", "prompt"], "has no column 'prompt'"),
        (["--dataset_split", "test"], "has no split 'test'"),
        (["--reward", "nowhere:reward"], "cannot be imported"),
        (["--reward", "length"], "'arithmetic' or 'module:function', got 'length'"),
        (["--samples", "1"], "samples must be an integer of at least 2"),
        (["--max_prompts", "0"], "max_prompts must be at least 1"),
    ):
        assert main([*arguments, *change]) == 2
        assert message in capsys.readouterr().err
