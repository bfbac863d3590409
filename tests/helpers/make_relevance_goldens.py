"""Golden relevances from the AttnLRP authors' own package, lxt, for tests/unit/test_relevance.py.

lxt 2.1 does not import under the transformers 5 that the project runs on, so this script has an environment of its own:

    python -m venv lxt-env
    lxt-env/bin/pip install lxt==2.1 transformers==4.52.4
    lxt-env/bin/python tests/helpers/make_relevance_goldens.py tests/unit/goldens

It writes relevance_<model type>.json per model type: the config, token ids and relevances of a random model whose
weights both environments make from the same frozen number stream. The test imports `fill_weights` from here. lxt has
no map of GPT-NeoX; the one below gives it the patches that lxt gives GPT-2.
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import __version__ as transformers_version

__all__ = ["fill_weights"]

SEED = 20240205
BATCH_SIZE, NUM_TOKENS = 2, 12
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OWN_SIZES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {},
}


def fill_weights(model: PreTrainedModel, seed: int = SEED) -> None:
    """Overwrite all parameters, the decoder's by name and then the head's, with numbers that depend on the seed alone.

    Norm weights spread around 1, all others around 0. NumPy guarantees RandomState's stream across versions.
    """
    stream = np.random.RandomState(seed)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in (*sorted(model.base_model.named_parameters()), ("head", head.weight)):
            numbers = torch.from_numpy(stream.standard_normal(tuple(parameter.shape)))
            is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * numbers if is_norm_weight else 0.2 * numbers)


def main(folder: Path) -> None:
    """Write one file per model type into `folder`."""
    for model_type in OWN_SIZES:
        path = folder / f"relevance_{model_type}.json"
        path.write_text(json.dumps(_golden(model_type)) + "\n", encoding="ascii")
        print(f"wrote {path}")


def _patch(model_type: str) -> None:
    """Put lxt's rules into transformers' classes, for good."""
    from lxt.efficient import monkey_patch
    from lxt.efficient.patches import layer_norm_forward, non_linear_forward, patch_attention, patch_method
    from transformers.activations import GELUActivation

    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    patch_map = None
    if model_type == "gpt_neox":
        patch_map = {
            modeling: patch_attention,
            nn.LayerNorm: partial(patch_method, layer_norm_forward),
            GELUActivation: partial(patch_method, non_linear_forward, keep_original=True),
        }
    monkey_patch(modeling, patch_map)


def _golden(model_type: str) -> dict:
    _patch(model_type)
    fields = {"model_type": model_type, **SIZES, **OWN_SIZES[model_type]}
    config = AutoConfig.for_model(**fields)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32).eval()
    model.requires_grad_(False)
    fill_weights(model)
    decoder = model.base_model
    ids = torch.from_numpy(np.random.RandomState(SEED + 1).randint(0, SIZES["vocab_size"], (BATCH_SIZE, NUM_TOKENS)))

    layer_outputs: list[torch.Tensor] = []
    head_outputs: list[torch.Tensor] = []
    for layer in decoder.layers:
        heads_out = layer.attention.dense if model_type == "gpt_neox" else layer.self_attn.o_proj
        heads_out.register_forward_pre_hook(lambda _, args: head_outputs.append(args[0]))
        layer.register_forward_hook(lambda _, args, output: layer_outputs.append(output[0]))
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    target_logits = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    for tensor in (*layer_outputs, *head_outputs):
        tensor.retain_grad()
    target_logits.sum().backward()

    hidden = [tensor * tensor.grad for tensor in (embeddings, *layer_outputs)]
    heads = [
        (tensor * tensor.grad).unflatten(-1, (SIZES["num_attention_heads"], -1)).sum((0, 1, 3))
        for tensor in head_outputs
    ]
    return {
        "made_with": {"lxt": "2.1", "transformers": transformers_version, "torch": torch.__version__},
        "seed": SEED,
        "config": fields,
        "ids": ids.tolist(),
        "target_logits": target_logits.tolist(),
        "hidden": torch.stack(hidden).sum(-1).tolist(),
        "heads": torch.stack(heads).tolist(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
