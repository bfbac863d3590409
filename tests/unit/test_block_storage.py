"""Blocks beside a checkpoint that was converted from GGUF: they are its values bit for bit, or the file is refused."""

import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from pipeline.models import gguf_conversion
from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.blocks.storage import BLOCKS_FILE, block_types, random_matrix, read_matrix, write_blocks
from pipeline.models.checkpoint import ModelError, StoredTensor, read_checkpoint
from pipeline.models.gguf import convert_gguf_once
from pipeline.models.loading import WeightFormat, load_stage
from pipeline.models.matrix_types import stored_types
from pipeline.models.model_config import load_model_config
from pipeline.models.sizes import stage_weights
from pipeline.models.source import resolve_model
from pipeline.models.weight_files import checkpoint_fingerprint
from pipeline.partition.plan import default_plan
from tests.helpers.gguf_files import (
    NUM_HEADS,
    NUM_KV_HEADS,
    DRAWN_TYPES,
    draw_blocks,
    finish,
    gguf_tensors,
    split_rope,
    tiny_config,
    write_gguf,
    write_keys,
    write_sizes,
    write_vocabulary,
)
from tests.helpers.launch import call_on_ranks
from tests.helpers.marks import slow_but, slowly

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "Q4_K", "Q5_K", "Q6_K")
K_SIZES = {"hidden_size": 256, "intermediate_size": 512}  # rows of whole blocks of 256
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def make_model(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**fields))


def resolve(name, **options):
    return resolve_model(str(name), **{"cache_dir": None, "stage_to": None, **options}, show_progress=False)


def convert(folder, model, types=None):
    """The file, and the directory to which it was converted."""
    path = folder / "tiny.gguf"
    write_gguf(path, model, types=types)
    return path, resolve(path, cache_dir=str(folder / "cache"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Of a Q4_1 file with an embedding in Q8_0: do not write into it."""
    return convert(tmp_path_factory.mktemp("converted"), make_model(), {"token_embd.weight": "Q8_0"})[1]


@pytest.fixture
def own(converted, tmp_path):
    """A copy."""
    return Path(shutil.copytree(converted, tmp_path / "own"))


def in_file(path):
    """Bytes and type of a GGUF file's tensors in blocks, by the file's names."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    return {name: (np.array(t.data).view(np.uint8), t.tensor_type.name) for name, t in tensors.items()}


def kept_blocks(folder):
    """Blocks and type by the checkpoint's names."""
    types = block_types(folder)
    return {name: (blocks, types[name]) for name, blocks in load_file(folder / BLOCKS_FILE).items()}


def check_kept(path, folder, model, left=()):
    """All matrices but those `left` are kept as the file's bytes in the checkpoint's order, and are its values."""
    stored, theirs, kept = load_file(folder / "model.safetensors"), in_file(path), kept_blocks(folder)
    for name, (own_name, values) in gguf_tensors(model).items():
        if values.ndim == 1 or own_name in left:
            continue
        blocks, type_name = theirs[name]
        if "q_proj" in own_name:
            blocks = split_rope(blocks, NUM_HEADS)
        elif "k_proj" in own_name:
            blocks = split_rope(blocks, NUM_KV_HEADS)
        found, found_type = kept.pop(own_name)
        assert found_type == type_name
        np.testing.assert_array_equal(found, blocks)
        np.testing.assert_array_equal(gguf.dequantize(found, GGMLQuantizationType[type_name]), stored[own_name])
    assert not kept


class TestConversion:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("type_name", slow_but(["Q4_1", "Q6_K"], TYPES))
    def test_blocks_are_the_files_and_the_checkpoints_values(self, tmp_path, type_name, tied, capsys):
        model = make_model(tie_word_embeddings=tied, **(K_SIZES if type_name in DRAWN_TYPES else {}))
        path, folder = convert(tmp_path, model, {"": type_name})
        check_kept(path, folder, model)
        assert "held as float32" not in capsys.readouterr().err
        checkpoint = read_checkpoint(folder, load_model_config(folder, {}), block_types(folder))
        assert checkpoint.is_tied is tied
        assert checkpoint.embedding.block_type == checkpoint.head.block_type == type_name
        stored = load_file(folder / "model.safetensors")
        tensors = [checkpoint.embedding, *checkpoint.layers[1].values()]
        for tensor in (tensor for tensor in tensors if len(tensor.shape) == 2):
            rows = read_matrix(folder, tensor, type_name).rows(torch.arange(tensor.shape[0]))
            np.testing.assert_array_equal(rows.numpy(), stored[tensor.name])

    def test_every_matrix_has_its_own_type(self, tmp_path, capsys):
        """As in Q4_K_M files, whose layers differ. What is in F16 or F32 is no blocks, and nothing is said of it."""
        types = {
            "": "Q4_K",
            "token_embd.weight": "Q6_K",
            "output.weight": "F16",
            "blk.0.attn_q.weight": "F32",
            "blk.0.attn_v.weight": "Q6_K",
            "blk.1.attn_q.weight": "Q8_0",
            "blk.1.attn_k.weight": "BF16",
            "blk.1.ffn_down.weight": "Q5_0",
        }
        model = make_model(**K_SIZES)
        path, folder = convert(tmp_path, model, types)
        check_kept(path, folder, model, left=(HEAD, "model.layers.0.self_attn.q_proj.weight"))
        assert "held as float32" not in capsys.readouterr().err
        checkpoint = read_checkpoint(folder, load_model_config(folder, {}), block_types(folder))
        assert (checkpoint.embedding.block_type, checkpoint.head.block_type) == ("Q6_K", None)
        first, second = ({name: t.block_type for name, t in layer.items()} for layer in checkpoint.layers)
        assert first["self_attn.q_proj.weight"] is None and first["self_attn.v_proj.weight"] == "Q6_K"
        assert second["self_attn.q_proj.weight"] == "Q8_0" and second["mlp.down_proj.weight"] == "Q5_0"
        assert first["mlp.down_proj.weight"] == "Q4_K" and first["input_layernorm.weight"] is None

    @pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K"])
    def test_a_type_that_is_not_known_stays_float32_and_is_said(self, tmp_path, type_name, capsys):
        model = make_model(**K_SIZES)
        types = dict.fromkeys(("blk.0.ffn_up.weight", "blk.1.attn_k.weight"), type_name)
        path, folder = convert(tmp_path, model, {"": "Q8_0", **types})
        check_kept(path, folder, model, left=(UP, "model.layers.1.self_attn.k_proj.weight"))
        said = [line for line in capsys.readouterr().err.splitlines() if "held as float32" in line]
        words = f"2 matrices with blocks of type {type_name}, which are not multiplied with ({UP} is the first)"
        assert said == [f"held as float32: {words}"]

    @pytest.mark.parametrize("type_name", ["F16", "F32", "Q2_K"])
    def test_a_file_without_blocks_that_are_known_leaves_none(self, tmp_path, type_name):
        _, folder = convert(tmp_path, make_model(**K_SIZES), {"": type_name})
        assert not (folder / BLOCKS_FILE).exists() and block_types(folder) == {}
        checkpoint = read_checkpoint(folder, load_model_config(folder, {}), block_types(folder))
        assert all(tensor.block_type is None for tensor in checkpoint.layers[0].values())

    @pytest.mark.parametrize(
        ("model_type", "keys"),
        [
            ("qwen2", {"attention.layer_norm_rms_epsilon": 1e-6}),
            slowly("qwen3", {"attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 16}),
            slowly("starcoder2", {"attention.layer_norm_epsilon": 1e-5}),
        ],
    )
    def test_other_architectures(self, tmp_path, model_type, keys):
        """Their rows are in the checkpoint's order; biases are no matrices."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        shared = {name: getattr(tiny_config(), name) for name in (*sizes, "num_key_value_heads", "tie_word_embeddings")}
        config = AutoConfig.for_model(
            model_type, **shared, head_dim=16, max_position_embeddings=128, sliding_window=None
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        path = tmp_path / "other.gguf"
        writer = gguf.GGUFWriter(path, model_type)
        write_sizes(writer, config)
        write_keys(writer, model_type, {"rope.freq_base": 10000.0, **keys})
        write_vocabulary(writer)
        (known,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type]
        names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
        expected = {}
        for name, tensor in model.state_dict().items():
            their_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if tensor.dim() == 1:
                writer.add_tensor(their_name, tensor.numpy())
                continue
            expected[name] = gguf.quantize(tensor.numpy(), GGMLQuantizationType.Q5_0)
            writer.add_tensor(their_name, expected[name], raw_dtype=GGMLQuantizationType.Q5_0)
        finish(writer)
        folder = resolve(path, cache_dir=str(tmp_path / "cache"))
        kept = load_file(folder / BLOCKS_FILE)
        assert kept.keys() == expected.keys() and set(block_types(folder).values()) == {"Q5_0"}
        for name, blocks in kept.items():
            np.testing.assert_array_equal(blocks, expected[name])

    def test_an_older_conversion_is_not_taken(self, converted, tmp_path):
        path, folder = convert(tmp_path, make_model(), {"token_embd.weight": "Q8_0"})
        version = f"-v{gguf_conversion.CONVERSION_VERSION}-"
        older = folder.with_name(folder.name.replace(version, "-v3-"))
        assert version in folder.name and older != folder
        folder.rename(older)
        (older / BLOCKS_FILE).unlink()
        assert resolve(path, cache_dir=str(tmp_path / "cache")) == folder
        assert block_types(folder) == block_types(converted)
        assert older.is_dir()

    def test_the_fingerprint_is_as_without_blocks(self, own, tmp_path, monkeypatch):
        """Calibrations are bound to it. Writing the blocks changes no other file."""
        before = checkpoint_fingerprint(own)
        (own / BLOCKS_FILE).unlink()
        assert checkpoint_fingerprint(own) == before
        monkeypatch.setattr(gguf_conversion, "write_blocks", lambda out, tensors: [])
        _, without = convert(tmp_path, make_model(), {"token_embd.weight": "Q8_0"})
        assert not (without / BLOCKS_FILE).exists() and checkpoint_fingerprint(without) == before

    @pytest.mark.slow
    def test_processes_that_convert_at_once(self, tmp_path):
        write_gguf(tmp_path / "tiny.gguf", make_model())
        for finished in call_on_ranks(2, convert_and_read, str(tmp_path / "tiny.gguf"), str(tmp_path / "cache")):
            finished.check()
        (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
        assert len(block_types(folder)) == 16


def convert_and_read(rank: int, path: str, cache_dir: str) -> None:
    folder = convert_gguf_once(Path(path), cache_dir)
    assert set(block_types(folder).values()) == {"Q4_1"}


class TestWriting:
    """`write_blocks` beside a checkpoint of one matrix, of `tensors` that a GGUF file would have."""

    def write(self, folder, values, blocks, type_name="Q4_1"):
        (folder / "config.json").write_text("{}")
        save_file({"w": np.ascontiguousarray(values)}, folder / "model.safetensors")
        tensor = SimpleNamespace(name="theirs", data=blocks, tensor_type=GGMLQuantizationType[type_name])
        return write_blocks(folder, {"w": tensor})

    def blocks(self, num_rows=20, seed=0):
        values = np.random.default_rng(seed).standard_normal((num_rows, 64)).astype(np.float32)
        return gguf.quantize(values, GGMLQuantizationType.Q4_1)

    def values_of(self, blocks):
        return gguf.dequantize(blocks, GGMLQuantizationType.Q4_1)

    def test_rows_in_any_order(self, tmp_path):
        blocks = self.blocks()
        order = np.random.default_rng(1).permutation(20)
        assert self.write(tmp_path, self.values_of(blocks)[order], blocks) == []
        np.testing.assert_array_equal(kept_blocks(tmp_path)["w"][0], blocks[order])

    def test_more_rows_than_are_compared_at_once(self, tmp_path):
        blocks = self.blocks(9000)
        blocks[[0, 8999]] = blocks[[8999, 0]]
        values = self.values_of(blocks)
        assert self.write(tmp_path, values, blocks) == []
        np.testing.assert_array_equal(kept_blocks(tmp_path)["w"][0], blocks)
        values[[17, 8500]] = values[[8500, 17]]
        assert self.write(tmp_path, values, blocks) == []
        blocks[[17, 8500]] = blocks[[8500, 17]]
        np.testing.assert_array_equal(kept_blocks(tmp_path)["w"][0], blocks)

    def test_rows_of_one_value_and_unlike_blocks(self, tmp_path):
        """A row of zeros has many spellings; each row gets one."""
        blocks = self.blocks()
        blocks[[3, 4, 15]] = 0
        blocks[4, 4:20] = 0x55  # codes, whose scale is 0
        values = self.values_of(blocks)[::-1]
        assert self.write(tmp_path, values, blocks) == []
        kept = kept_blocks(tmp_path)["w"][0]
        np.testing.assert_array_equal(self.values_of(kept), values)
        assert sorted(map(bytes, kept)) == sorted(map(bytes, blocks))

    @pytest.mark.parametrize("case", ["another value", "a row twice", "a row more", "a row less"])
    def test_other_rows(self, tmp_path, case):
        blocks = self.blocks()
        values = self.values_of(blocks)[::-1].copy()
        if case == "another value":
            values[7, 5] = np.nextafter(values[7, 5], np.inf, dtype=np.float32)
        elif case == "a row twice":
            values[7] = values[8]
        else:
            values = np.concatenate([values, values[:1]]) if case == "a row more" else values[1:]
        assert self.write(tmp_path, values, blocks) == [
            "1 matrices with other rows than the GGUF file has (w is the first)"
        ]
        assert not (tmp_path / BLOCKS_FILE).exists()

    def test_values_that_are_not_finite(self, tmp_path):
        """Kernels widen an fp16's infinity to a large number."""
        blocks = self.blocks()
        blocks[5, :2] = np.array([np.inf], np.float16).view(np.uint8)
        with np.errstate(invalid="ignore"):
            values = self.values_of(blocks)
        assert self.write(tmp_path, values, blocks) == ["1 matrices with values that are not finite (w is the first)"]
        assert not (tmp_path / BLOCKS_FILE).exists()

    def test_a_matrix_that_the_file_lacks(self, tmp_path):
        self.write(tmp_path, self.values_of(self.blocks()), self.blocks())
        (tmp_path / BLOCKS_FILE).unlink()
        assert write_blocks(tmp_path, {}) == [] and not (tmp_path / BLOCKS_FILE).exists()


class TestRefusal:
    """Each a ValueError that names the file."""

    def rewrite(self, folder, change=lambda blocks: blocks, **metadata):
        """Change what is stored; metadata of value None is left out."""
        path = folder / BLOCKS_FILE
        with safe_open(path, framework="numpy") as file:
            old = file.metadata()
        kept = {key: value for key, value in {**old, **metadata}.items() if value is not None}
        save_file(change(load_file(path)), path, metadata=kept)

    def refuse(self, folder, words):
        with pytest.raises(ValueError) as info:
            read_checkpoint(folder, load_model_config(folder, {}), block_types(folder))
        assert str(folder / BLOCKS_FILE) in str(info.value) and words in str(info.value)

    def test_is_in_nobodys_way_where_no_blocks_are_asked_for(self, own):
        (own / BLOCKS_FILE).write_bytes(b"damaged")
        config = load_model_config(own, {})
        (plan,) = default_plan(config.num_hidden_layers, 1).stages
        load_stage(own, config, plan, WeightFormat(dtype=torch.float32), device=torch.device("cpu"))
        read_checkpoint(own, config)

    def test_beside_another_checkpoint(self, own, tmp_path):
        make_model(initializer_range=0.5).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", own)
        self.refuse(own, "was made for another checkpoint")

    def test_beside_another_config(self, own):
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        self.refuse(own, "was made for another checkpoint")

    def test_of_no_checkpoint(self, own):
        self.rewrite(own, checkpoint=None)
        self.refuse(own, "was made for another checkpoint")

    def test_of_a_type_that_is_not_known(self, own):
        self.rewrite(own, **{UP: "Q9_9"})
        self.refuse(own, "damaged: types ['Q9_9']")

    def test_with_a_type_missing(self, own):
        self.rewrite(own, **{UP: None})
        self.refuse(own, UP)

    def test_with_a_matrix_missing(self, own):
        self.rewrite(own, lambda blocks: {name: value for name, value in blocks.items() if name != UP})
        self.refuse(own, UP)

    @pytest.mark.parametrize(
        "damage",
        [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:7],
         lambda data: data + b"\0", lambda data: b"\xff" * 8 + data[8:], lambda data: data[:20] + b"\xff" + data[21:]],
    )  # fmt: skip
    def test_damaged_or_truncated(self, own, damage):
        path = own / BLOCKS_FILE
        path.write_bytes(damage(path.read_bytes()))
        self.refuse(own, "its header cannot be read")

    @pytest.mark.parametrize(
        "change",
        [
            lambda blocks: blocks[:-1],
            lambda blocks: blocks[:, :-20],
            lambda blocks: np.concatenate([blocks, blocks]),
            lambda blocks: blocks.reshape(-1),
            lambda blocks: blocks.astype(np.float32),
            lambda blocks: blocks.view(np.int8),
        ],
        ids=["rows", "columns", "twice", "one dimension", "floats", "signed"],
    )
    def test_of_another_size(self, own, change):
        self.rewrite(own, lambda blocks: blocks | {UP: np.ascontiguousarray(change(blocks[UP]))})
        with pytest.raises(ValueError) as info:
            tensor = read_checkpoint(own, load_model_config(own, {}), block_types(own)).layers[0]["mlp.up_proj.weight"]
            read_matrix(own, tensor, "Q4_1")
        assert str(own / BLOCKS_FILE) in str(info.value) and UP in str(info.value)

    def test_with_a_byte_changed(self, own):
        def flip(blocks):
            blocks[UP][5, 7] ^= 1
            return blocks

        self.rewrite(own, flip)
        tensor = read_checkpoint(own, load_model_config(own, {}), block_types(own)).layers[0]["mlp.up_proj.weight"]
        with pytest.raises(ValueError, match=f"the blocks of {UP} are damaged") as info:
            read_matrix(own, tensor, "Q4_1")
        assert str(own / BLOCKS_FILE) in str(info.value)

    @pytest.mark.parametrize(
        ("name", "type_name", "words"),
        [
            ("model.layers.0.input_layernorm.weight", "Q8_0", "which a LlamaRMSNorm cannot be held as"),
            (UP, "Q4_K", "no whole blocks of Q4_K"),
        ],
    )
    def test_of_what_cannot_be_held_as_it(self, own, name, type_name, words):
        blocks = {name: np.zeros((1, LAYOUTS[type_name].nbytes), np.uint8)}
        self.rewrite(own, lambda old: old | blocks, **{name: type_name})
        config = load_model_config(own, {})
        config.matrix_types = stored_types(read_checkpoint(own, config, block_types(own)))
        (plan,) = default_plan(config.num_hidden_layers, 1).stages
        for use in (
            lambda: load_stage(own, config, plan, WeightFormat(dtype=torch.float32), device=torch.device("cpu")),
            lambda: stage_weights(config, plan, WeightFormat(dtype=torch.float32)),
        ):
            with pytest.raises(ModelError, match=words):
                use()

    def test_gone_since_the_headers_were_read(self, own):
        tensor = read_checkpoint(own, load_model_config(own, {}), block_types(own)).embedding
        (own / BLOCKS_FILE).unlink()
        with pytest.raises(ValueError) as info:
            read_matrix(own, tensor, "Q8_0")
        assert str(own / BLOCKS_FILE) in str(info.value) and EMBEDDING in str(info.value)


class TestCopies:
    def test_staging_takes_it_along(self, own, tmp_path):
        staged = resolve(own, stage_to=str(tmp_path / "fast"))
        assert (staged / BLOCKS_FILE).read_bytes() == (own / BLOCKS_FILE).read_bytes()
        assert block_types(staged) == block_types(own) != {}
        (own / BLOCKS_FILE).unlink()
        assert resolve(own, stage_to=str(tmp_path / "fast")) == staged
        assert not (staged / BLOCKS_FILE).exists() and block_types(staged) == {}

    def test_a_hub_model_may_have_it(self, own, tmp_path, monkeypatch):
        """In the hub's cache files are links to blobs; blocks are asked for with the other safetensors."""
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "hub" / "models--owner--tiny"
        snapshot = repository / "snapshots" / commit
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "blobs").mkdir()
        snapshot.mkdir(parents=True)
        for number, path in enumerate(own.iterdir()):
            shutil.copy(path, repository / "blobs" / str(number))
            (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        found = resolve("owner/tiny", cache_dir=str(tmp_path / "hub"))
        assert found == snapshot and block_types(found) == block_types(own) != {}
        checkpoint = read_checkpoint(found, load_model_config(found, {}), block_types(found))
        assert checkpoint.embedding.block_type == "Q8_0"
        rows = read_matrix(found, checkpoint.embedding, "Q8_0").rows(torch.arange(5))
        assert torch.equal(rows, checkpoint.embedding[:5])
        asked = {}

        def download(name, **options):
            asked.update(options)
            return str(own)

        monkeypatch.setattr("pipeline.models.source.snapshot_download", download)
        resolve("owner/tiny")
        patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(huggingface_hub.utils.filter_repo_objects([BLOCKS_FILE], **patterns)) == [BLOCKS_FILE]


class TestReading:
    def stored(self, folder, values, dtype=torch.float32):
        save_tensors({"w": values.to(dtype)}, folder / "model.safetensors")
        return StoredTensor(folder / "model.safetensors", "w")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("type_name", ["Q8_0", "Q4_1", "BF16"])
    def test_made_at_load_as_gguf_quantises(self, tmp_path, type_name, dtype, monkeypatch):
        monkeypatch.setattr("pipeline.models.checkpoint.MAX_MAPPED_NBYTES", 5000)  # a few rows at a time
        values = torch.randn(33, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
        matrix = read_matrix(tmp_path, self.stored(tmp_path, values, dtype), type_name)
        expected = gguf.quantize(values.float().numpy(), GGMLQuantizationType[type_name])
        np.testing.assert_array_equal(matrix.data.numpy(), expected)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e6])
    @pytest.mark.parametrize("type_name", ["Q8_0", "Q4_1", "BF16"])
    def test_weights_that_no_block_has(self, tmp_path, type_name, value):
        """Of a NaN ggml's blocks would make a number; BF16 has them all."""
        values = torch.randn(33, 96)
        values[20, 50] = value
        stored = self.stored(tmp_path, values)
        if type_name == "BF16":
            got = read_matrix(tmp_path, stored, type_name).rows(torch.arange(33))
            torch.testing.assert_close(got, values, rtol=2**-8, atol=0, equal_nan=True)
            return
        with pytest.raises(ValueError, match=rf"model\.safetensors: w has weights that are not finite .*{type_name}"):
            read_matrix(tmp_path, stored, type_name)

    def test_kept_blocks_of_another_type_are_not_taken(self, own):
        """int8 of a Q4_1 file is made of its values, as of any others."""
        tensor = read_checkpoint(own, load_model_config(own, {}), block_types(own)).layers[0]["mlp.up_proj.weight"]
        assert tensor.block_type == "Q4_1"
        expected = gguf.quantize(load_file(own / "model.safetensors")[UP], GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(read_matrix(own, tensor, "Q8_0").data.numpy(), expected)

    def test_threads_that_read_at_once(self, own):
        checkpoint = read_checkpoint(own, load_model_config(own, {}), block_types(own))
        tensors = list(checkpoint.layers[0].values()) + list(checkpoint.layers[1].values())
        tensors = [tensor for tensor in tensors if tensor.block_type]
        found = {}

        def read(tensor):
            found[tensor.name] = read_matrix(own, tensor, tensor.block_type).data.numpy()

        threads = [threading.Thread(target=read, args=(tensor,)) for tensor in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = load_file(own / BLOCKS_FILE)
        for name, blocks in found.items():
            np.testing.assert_array_equal(blocks, kept[name])
        assert len(found) == len(tensors) == 14

    @pytest.mark.parametrize("type_name", sorted(LAYOUTS))
    def test_random_blocks_are_finite_and_of_their_seed(self, type_name):
        one, other, third = (
            random_matrix((7, 512), type_name, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        weights = one.rows(torch.arange(7))
        assert one.shape == (7, 512) and weights.isfinite().all() and weights.std() > 0
        assert torch.equal(one.data, other.data) and not torch.equal(one.data, third.data)


@pytest.mark.parametrize("type_name", sorted(DRAWN_TYPES))
def test_drawn_blocks_are_weights_of_a_usual_size(type_name):
    weights = gguf.dequantize(draw_blocks((64, 512), type_name, seed=0), GGMLQuantizationType[type_name])
    assert 1e-3 < weights.std() < 0.2 and abs(weights).max() < 0.3


def test_configs_of_converted_models_have_no_types(converted):
    """They are chosen anew in every run, from what lies beside the checkpoint."""
    assert not hasattr(AutoConfig.from_pretrained(converted), "matrix_types")
