"""What ranks hold their weights as: agreed on by all, told in every kind of record, loaded anew where it changes."""

import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.comm.control import AgreementError, Control
from pipeline.comm.world import World
from pipeline.config.reading import load_config, parse_override
from pipeline.models.blocks.storage import BLOCKS_FILE
from pipeline.models.checkpoint import ModelError
from pipeline.models.gguf import convert_gguf_once
from pipeline.models.matrix_types import types_label
from pipeline.records.store import read_generation, read_record
from pipeline.runtime.deployment import LoadedStages, deploy
from tests.helpers.gguf_files import tiny_config, write_gguf
from tests.helpers.launch import call_on_ranks, run_alone
from tests.helpers.tiny_models import tiny_arguments, tiny_model, write_text


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The directory that a GGUF file of Q4_1 and, for its embedding, Q8_0 is converted to."""
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(max_position_embeddings=128))
    write_gguf(folder / "a.gguf", model, types={"token_embd.weight": "Q8_0"})
    return convert_gguf_once(folder / "a.gguf", str(folder / "cache"))


def settings(model, text, *more):
    words = [f"model.name={model}", "dataset.name=text", f"dataset.path={text}", "dataset.max_length=32"]
    words += ["dataset.stride=32", "runtime.threads=1", *more]
    return load_config(None, [parse_override(word) for word in words])


def control_of_rank():
    control = Control(World.from_environment(), timeout_s=20, load_timeout_s=60, interface=None)
    control.form()
    return control


def other_blocks_on_rank(rank, folders, text):
    """Rank 1's directory lacks the blocks that rank 0's has."""
    control = control_of_rank()
    with pytest.raises(AgreementError, match="started with another checkpoint: blocks is .*'Q4_1, Q8_0'"):
        deploy(settings(folders[rank], text, "partition.num_nodes=2"), control)
    control.close()


def a_gpu_on_rank(rank, folder, text):
    """Rank 1 computes on a GPU, so that none holds blocks."""
    seen = []

    def stop(plan, model_config):
        seen.append(types_label(model_config))
        raise InterruptedError

    control = control_of_rank()
    config = settings(folder, text, "partition.num_nodes=2")
    with pytest.raises(InterruptedError):
        deploy(config, control, stop)
    if rank == 1:
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    with pytest.raises(InterruptedError):
        deploy(config, control, stop)
    assert seen == ["Q4_1, Q8_0", None]
    with pytest.raises(ModelError, match="model.weights is int8, which is for CPUs, and a node computes on a GPU"):
        deploy(settings(folder, text, "partition.num_nodes=2", "model.weights=int8"), control)
    control.close()


def weights_in_turn(rank, model, text):
    """One process is deployed again and again: its weights are loaded anew where they are held differently."""
    control, loaded = control_of_rank(), LoadedStages()
    stages, types = [], []
    for weights in ("fp32", "int8", "int8", "auto"):
        config = settings(model, text, "partition.num_nodes=1", f"model.weights={weights}")
        deployment = deploy(config, control, loaded=loaded)
        stages += deployment.stages.values()
        types.append(deployment.model.block_types)
    assert types == [None, "Q8_0", "Q8_0", None]
    assert stages[1] is stages[2] and stages[0] is not stages[1] and stages[2] is not stages[3]


def on_ranks(num_ranks, function, *arguments):
    ended = call_on_ranks(num_ranks, function, *arguments, timeout_s=100)
    assert [one.returncode for one in ended] == [0] * num_ranks, "\n".join(one.stderr for one in ended)


def test_ranks_agree_on_blocks(converted, tmp_path):
    without = shutil.copytree(converted, tmp_path / "without")
    (without / BLOCKS_FILE).unlink()
    on_ranks(2, other_blocks_on_rank, [converted, without], write_text(tmp_path / "text", 80))


def test_one_gpu_is_enough_for_no_rank_to_hold_blocks(converted, tmp_path):
    on_ranks(2, a_gpu_on_rank, converted, write_text(tmp_path / "text", 80))


def test_weights_that_are_held_differently_are_loaded_anew(tmp_path):
    on_ranks(1, weights_in_turn, tiny_model("llama"), write_text(tmp_path / "text", 80))


@pytest.mark.parametrize(
    ("weights", "types", "made_at_load"),
    [("auto", ("Q4_1", "Q8_0"), False), ("int8", ("Q8_0",), True), ("fp32", None, None)],
)
def test_records_say_what_weights_were_held_as(weights, types, made_at_load, converted, tmp_path):
    own = ("--set", f"model.weights={weights}", "--model_name", str(converted), "--set", "partition.num_nodes=2")
    run_alone(*tiny_arguments(tmp_path / "run", *own, num_tokens=80)).check()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abc"}\n')
    words = ("--generate", str(tmp_path / "prompts.jsonl"), "--set", "generation.max_new_tokens=2")
    run_alone(*tiny_arguments(tmp_path / "generated", *own, *words, num_tokens=80)).check()
    (run,) = map(read_record, (tmp_path / "run").glob("*.json"))
    (generated,) = map(read_generation, (tmp_path / "generated").glob("*.json"))
    for record in (run, generated):
        blocks = record.model.blocks
        assert (blocks and blocks.types, blocks and blocks.made_at_load) == (types, made_at_load)
