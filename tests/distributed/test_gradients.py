"""A gradient pass over ranks sees the hidden states and gradients of the unsplit model."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.comm.control import Control
from pipeline.comm.world import World
from pipeline.config.reading import load_config, parse_override
from pipeline.data.windows import make_microbatches, make_windows
from pipeline.models.loading import TORCH_DTYPES
from pipeline.models.stage import Objective
from pipeline.runtime.deployment import deploy
from pipeline.runtime.gradients import GradientPass, Observers
from tests.helpers.launch import call_on_ranks
from tests.helpers.tiny_models import tiny_model, write_text

NUM_TOKENS = 150
OBJECTIVES = ("nll", "target_logit")

# The default plan of six layers on four nodes; link 0 leads from the embedding to layer 0.
LINK_BEHIND_LAYER = {1: 1, 3: 2, 4: 3}


def overrides(tmp_path, model_type, *more):
    text = write_text(tmp_path / "text", NUM_TOKENS)
    return [
        *(f"model.name={tiny_model(model_type)}", "dataset.name=text", f"dataset.path={text}"),
        *("dataset.max_length=64", "dataset.stride=40", "runtime.threads=1", "batch_size=2", *more),
    ]


def passes_on_rank(rank, arguments, out):
    """What one rank sees, to a file of its own for each objective: `link/micro-batch/...` tensors and its sum."""
    config = load_config(None, [parse_override(text) for text in arguments])
    control = Control(World.from_environment(), timeout_s=20, load_timeout_s=60, interface=None)
    control.form()
    deployment = deploy(config, control)
    windows = make_windows(deployment.text.ids.numel(), config.dataset.max_length, config.dataset.stride)
    for objective in OBJECTIVES:
        seen, finished = {}, []

        def take(link_index, microbatch_index, hidden, gradient, seen=seen):
            seen[f"{link_index}/{microbatch_index}/hidden"] = hidden.clone()
            seen[f"{link_index}/{microbatch_index}/gradient"] = gradient.clone()

        gradients = GradientPass(
            deployment,
            make_microbatches(windows, config.batch_size),
            dtype=TORCH_DTYPES[config.model.dtype],
            objective=Objective(objective),
            seen=Observers(on_gradient=take, on_finished=finished.append),
        )
        seen["value"] = torch.tensor(gradients.run(), dtype=torch.float64)
        seen["ids"] = deployment.text.ids
        seen["finished"] = torch.tensor(finished)
        save_file(seen, f"{out}/{objective}-{rank}.safetensors")
    control.close()


def whole_model(model_type, ids, objective, boundaries):
    """The same by one Hugging Face model, window by window."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(model_type), dtype=torch.float32)
    results, total = [], 0.0
    for microbatch in make_microbatches(make_windows(len(ids), 64, 40), 2):
        states = {}

        def keep(index, states=states):
            def hook(module, inputs, output):
                output = output[0] if isinstance(output, tuple) else output
                output.retain_grad()
                states[index] = output

            return hook

        hooks = [model.base_model.layers[i].register_forward_hook(keep(i)) for i in boundaries]
        rows = torch.stack([ids[w.start : w.end] for w in microbatch.windows])
        logits = model(input_ids=rows).logits
        for row, window in enumerate(microbatch.windows):
            n = window.num_scored
            scored, target = logits[row, -n - 1 : -1], rows[row, -n:]
            if objective == "nll":
                value = nn.functional.cross_entropy(scored, target, reduction="sum")
            else:
                value = scored.gather(1, target[:, None]).sum()
            value.backward(retain_graph=True)
            total += value.item()
        results.append({i: (state.detach(), state.grad) for i, state in states.items()})
        for handle in hooks:
            handle.remove()
    return results, total


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_gradients_equal_the_unsplit_models(tmp_path, model_type, num_ranks):
    """One pass after the other on what is loaded once."""
    arguments = overrides(tmp_path, model_type, "partition.num_nodes=4")
    for rank in call_on_ranks(
        num_ranks, passes_on_rank, arguments, str(tmp_path), distributed=num_ranks > 1, timeout_s=100
    ):
        rank.check()
    for objective in OBJECTIVES:
        files = [load_file(tmp_path / f"{objective}-{rank}.safetensors") for rank in range(num_ranks)]
        check_gradients(files, model_type, objective)


def check_gradients(files, model_type, objective):
    seen = {key: tensor for file in files for key, tensor in file.items() if "/" in key}
    expected, total = whole_model(model_type, files[0]["ids"], objective, boundaries=LINK_BEHIND_LAYER)
    assert len(seen) == 2 * (1 + len(LINK_BEHIND_LAYER)) * len(expected)
    for m, states in enumerate(expected):
        for layer, link in LINK_BEHIND_LAYER.items():
            hidden, gradient = states[layer]
            torch.testing.assert_close(seen[f"{link}/{m}/hidden"], hidden, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(seen[f"{link}/{m}/gradient"], gradient, atol=1e-4, rtol=1e-3)
    assert all(file["value"].item() == pytest.approx(total, rel=1e-5) for file in files)
    assert files[0]["finished"].tolist() == list(range(len(expected)))
