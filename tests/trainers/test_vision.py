"""Vision-language pairs pass through as in trl.DPOTrainer, with per-pair columns and our losses on top."""

import math

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PillowImage
from trl import DPOConfig, DPOTrainer

from hfnoise import NoiseDPOConfig, NoiseDPOTrainer, RobustDPOConfig, RobustDPOTrainer
from hfnoise.preference import pair_loss

WORDS = "red green blue dark light what colour is this user assistant".split()
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def build_processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "<image>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """Return the folder of a Llava with a vision tower and a Llama of two layers each, and its processor."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    folder, processor = tmp_path_factory.mktemp("tiny-llava"), build_processor()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, initializer_range=0.2)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder), processor


COLOURS = {"red": (230, 20, 10), "green": (20, 200, 30), "blue": (10, 30, 220)}


def make_vision_pairs(count=8, **columns):
    names = list(COLOURS)
    rows = {"prompt": [], "chosen": [], "rejected": [], "images": []}
    for number in range(count):
        right, wrong = names[number % 3], names[(number + 1 + number % 2) % 3]
        rows["prompt"].append([{"role": "user", "content": "what colour is this"}])
        rows["chosen"].append([{"role": "assistant", "content": f"this is {right}"}])
        rows["rejected"].append([{"role": "assistant", "content": f"dark {wrong}"}])
        rows["images"].append([PillowImage.new("RGB", (8, 8), COLOURS[right])])
    message = List({"role": Value("string"), "content": Value("string")})
    features = {"prompt": message, "chosen": message, "rejected": message, "images": List(Image())}
    pairs = Dataset.from_dict(rows, features=Features(features))
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    return pairs


@pytest.fixture
def make_vision_trainer(vision_model, cpu_arguments):
    def make(trainer_class, config_class, pairs=None, **settings):
        path, processor = vision_model
        return trainer_class(
            path,
            args=config_class(**cpu_arguments | {"max_length": None, "max_steps": 2} | settings),
            train_dataset=make_vision_pairs() if pairs is None else pairs,
            processing_class=processor,
        )

    return make


def test_neutral_settings_equal_trl_to_the_bit(make_vision_trainer, losses_of):
    stock = make_vision_trainer(DPOTrainer, DPOConfig)
    ours = make_vision_trainer(NoiseDPOTrainer, NoiseDPOConfig)
    for trainer in (stock, ours):
        trainer.train()
    assert losses_of(stock) == losses_of(ours) and len(set(losses_of(ours))) == 2
    weights = ours.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stock.model.state_dict().items())


@pytest.mark.slow
def test_a_robust_loss_trains_the_vision_tower(make_vision_trainer, losses_of):
    trainer = make_vision_trainer(RobustDPOTrainer, RobustDPOConfig, max_steps=6)
    assert trainer.args.loss_type == ["sym"]
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(0.5 * trainer.args.sym_temperature)  # at margins of 0
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("vision_tower" in name for name in moved) and any("language_model" in name for name in moved)
    suspects = trainer.export_suspects(flip_rate=0.2)
    assert {"images", "p_flip"} <= set(suspects.column_names) and "hfnoise_pair_index" not in suspects.column_names


def loss_of(trainer, pairs):
    trainer.model.eval()
    batch = trainer.data_collator([dict(row) for row in pairs])
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item()


def test_rates_reach_their_pairs_and_pixels_reach_the_model(make_vision_trainer):
    rates = [0.0, 0.1, 0.2, 0.3] * 2
    pairs = make_vision_pairs(rate=rates)
    trainer = make_vision_trainer(
        NoiseDPOTrainer, NoiseDPOConfig, pairs, loss_type="robust", flip_rate_column="rate", max_steps=4
    )
    trainer.train()
    margins = trainer.pair_margins(pairs)
    expected = pair_loss("robust", margins, torch.tensor(rates)).mean().item()
    assert loss_of(trainer, pairs) == pytest.approx(expected, rel=1e-4)

    def repainted(row):
        return {**row, "images": [PillowImage.new("RGB", (8, 8), (240, 240, 20))]}

    assert (trainer.pair_margins(pairs.map(repainted)) - margins).abs().max() > 1e-4


@pytest.mark.slow
def test_nan_names_the_pair(make_vision_trainer):
    pairs = make_vision_pairs()
    trainer = make_vision_trainer(NoiseDPOTrainer, NoiseDPOConfig, pairs, loss_type="sym", learning_rate=0.0)
    with torch.no_grad():
        for parameter in trainer.model.model.vision_tower.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(ValueError, match=r"rows \[\d.*\] of the dataset.*prompt 'user.*what colour"):
        trainer.train()


@pytest.mark.parametrize("drop", [False, True])
def test_identical_answers(make_vision_trainer, drop):
    pairs = make_vision_pairs()
    same = pairs.map(lambda row, number: {"rejected": row["chosen"]} if number == 2 else {}, with_indices=True)
    if drop:
        trainer = make_vision_trainer(RobustDPOTrainer, RobustDPOConfig, same, drop_invalid_pairs=True)
        assert list(trainer.train_dataset["hfnoise_pair_index"]) == [0, 1, 3, 4, 5, 6, 7]
        trainer.train()
        assert len(trainer.export_suspects(flip_rate=0.2)) == 7
    else:
        with pytest.raises(ValueError, match=r"1 of 8 pairs of train_dataset have identical answers \(rows 2\)"):
            make_vision_trainer(RobustDPOTrainer, RobustDPOConfig, same)


def test_a_prompt_that_hides_the_answers_is_refused(make_vision_trainer):
    # TRL trains on nothing then: both answers are cut off, and the margin is 0 for good.
    prompt_length = 1 + 4 + 4 + 1  # role, image, question, role of the answer
    trainer = make_vision_trainer(NoiseDPOTrainer, NoiseDPOConfig, loss_type="sym", max_length=prompt_length)
    with pytest.raises(ValueError, match="a prompt that fills max_length.*10 tokens"):
        trainer.train()
