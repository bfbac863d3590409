"""bitsandbytes' 8-bit weights: quiet, and with a threshold of 0 without a token that looks at later ones."""

import pytest
import torch

from pipeline.models.loading import load_model_config, load_stage
from pipeline.partition.plan import default_plan
from tests.helpers.tiny_models import save_tiny_model

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


def hidden_states(checkpoint, threshold, last_token):
    (stage,) = default_plan(2, 1).stages
    part = load_stage(
        checkpoint,
        load_model_config(checkpoint, {}),
        stage,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        load_in_8bit=True,
        load_in_8bit_threshold=threshold,
    )
    with torch.inference_mode():
        return part.decoder(torch.tensor([[1, 2, 3, 4, last_token]]), use_cache=False).last_hidden_state[0, :4]


@pytest.mark.parametrize("threshold, mixes", [(6.0, True), (0.0, False)])
def test_only_a_threshold_lets_tokens_mix(checkpoint, threshold, mixes, caplog):
    early = [hidden_states(checkpoint, threshold, last) for last in (5, OUTLIER)]
    assert torch.equal(*early) is not mixes
    assert [r.getMessage() for r in caplog.records if r.name.startswith("bitsandbytes")] == []
