"""bitsandbytes' 8-bit weights: quiet, and with a threshold of 0 without a token that looks at others."""

import pytest
import torch

from pipeline.config.schema import ModelConfig
from pipeline.models.loading import WeightFormat, load_stage
from pipeline.models.model_config import load_model_config
from pipeline.models.stage import Stage
from pipeline.partition.passes import Row
from pipeline.partition.plan import default_plan
from tests.helpers.tiny_models import VOCAB_SIZE, save_tiny_model

OUTLIER = 7  # the token whose embedding is one channel, and after the norm sqrt(64) = 8 there


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "llama", num_layers=2)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][OUTLIER] = 100.0 * torch.eye(64)[3]
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("keys", "expected", "mixes"),
    [
        ({"dtype": "fp16"}, WeightFormat(dtype=torch.float16), False),
        ({"load_in_8bit": True}, WeightFormat(dtype=torch.float32, linear_bits=8, outlier_threshold=6.0), True),
        (
            {"load_in_8bit": True, "load_in_8bit_threshold": 0.0},
            WeightFormat(dtype=torch.float32, linear_bits=8, outlier_threshold=0.0),
            False,
        ),
        ({"dtype": "bf16", "load_in_4bit": True}, WeightFormat(dtype=torch.bfloat16, linear_bits=4), False),
    ],
)
def test_the_format_that_a_config_asks_for(keys, expected, mixes):
    weights = WeightFormat.from_config(ModelConfig(**keys))
    assert weights == expected and weights.mixes_tokens is mixes


def load(checkpoint, threshold):
    (stage,) = default_plan(2, 1).stages
    return stage, load_stage(
        checkpoint,
        load_model_config(checkpoint, {}),
        stage,
        WeightFormat(dtype=torch.bfloat16, linear_bits=8, outlier_threshold=threshold),
        device=torch.device("cpu"),
    )


def hidden_states(checkpoint, threshold, last_token):
    _, part = load(checkpoint, threshold)
    with torch.inference_mode():
        return part.decoder(torch.tensor([[1, 2, 3, 4, last_token]]), use_cache=False).last_hidden_state[0, :4]


@pytest.mark.parametrize("threshold, mixes", [(6.0, True), (0.0, False)])
def test_only_a_threshold_lets_tokens_mix(checkpoint, threshold, mixes, caplog):
    early = [hidden_states(checkpoint, threshold, last) for last in (5, OUTLIER)]
    assert torch.equal(*early) is not mixes
    assert [r.getMessage() for r in caplog.records if r.name.startswith("bitsandbytes")] == []


@pytest.mark.parametrize("threshold, mixes", [(6.0, True), (0.0, False)])
def test_only_a_threshold_lets_sequences_mix_that_share_a_pass(checkpoint, threshold, mixes):
    """So generation decodes them one by one there, whatever it does elsewhere."""
    plan, part = load(checkpoint, threshold)
    stage = Stage(plan, part, torch.device("cpu"), VOCAB_SIZE)
    stage.open_slots(2, 8)
    rows = (Row(0, 0), Row(1, 0))
    with torch.inference_mode():
        both = [stage.forward(torch.tensor([[5], [other]]), rows=rows)[0] for other in (6, OUTLIER)]
        alone = stage.forward(torch.tensor([[5]]), rows=rows[:1])[0]
    assert torch.equal(*both) is not mixes
    assert torch.equal(both[0], alone)
