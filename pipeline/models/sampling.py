"""From logits to the next token: what a config and a checkpoint ask for, as plain numbers, and the choice itself.

`read_generation_defaults` reads the checkpoint once, `sampling_options` adds what a config or one request sets, and a
`Sampler` stands where the head is. Which tokens remain, and how likely each is, transformers' own logits processors
say, in transformers' order. When an answer ends is not this module's matter.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.config.reading import generation_with
from pipeline.config.schema import ConfigError, GenerationConfig
from pipeline.models.checkpoint import ModelError

__all__ = [
    "UNCUT",
    "GenerationDefaults",
    "Sampled",
    "Sampler",
    "SamplingOptions",
    "read_generation_defaults",
    "sampling_options",
    "uniform",
]

FILE = "generation_config.json"
# What transformers takes where neither its caller nor the checkpoint says anything.
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
UNCUT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # values of these that leave every token
# Fields of generation_config.json that change tokens in transformers and not here, and the values that change none.
IGNORED: dict[str, Any] = {
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers", "force_words_ids"), None),
    **dict.fromkeys(("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "top_h"), None),
    **dict.fromkeys(("penalty_alpha", "sequence_bias", "stop_strings", "suppress_tokens", "watermarking_config"), None),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length", "min_new_tokens", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("guidance_scale", "num_beams", "typical_p"), 1),
}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen; every field a number.

    `temperature` 0 is greedy, `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 change nothing. `num_top` is
    how many of the likeliest tokens are told beside the one chosen.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_top: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def as_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SamplingOptions:
        """What `as_json` gave. Raises ValueError for other keys and for values that are out of range."""
        names = [f.name for f in dataclasses.fields(cls)]
        if sorted(values) != sorted(names):
            raise ValueError(f"sampling options have the keys {', '.join(names)}, got {', '.join(values)}")
        numbers = dict(values)
        num_top = numbers.pop("num_top")
        if type(num_top) is not int or num_top < 0:
            raise ValueError(f"num_top must be an integer of at least 0, got {num_top!r}")
        checked = generation_with(GenerationConfig(), numbers)
        none = [name for name in numbers if getattr(checked, name) is None]
        if none:
            raise ValueError(f"{none[0]} must be a number, got None")
        return cls(**{name: getattr(checked, name) for name in numbers}, num_top=num_top)


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint says of generation, and transformers' defaults where it says nothing.

    `eos_ids` are the tokens that end an answer, the tokenizer's own not among them. `notes` are sentences that a reader
    of the answers must know.
    """

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    eos_ids: tuple[int, ...]
    notes: tuple[str, ...]


def read_generation_defaults(model_dir: Path, model_config: Any) -> GenerationDefaults:
    """Of generation_config.json, or of transformers' `model_config` where there is no such file, as transformers does.

    Raises ModelError for a file that is damaged or has a value that cannot be: transformers passes over it in silence.
    """
    path = model_dir / FILE
    cure = "correct it, or copy it again from where the model comes from"
    if path.is_file():
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not an object")
            found = transformers.GenerationConfig.from_dict(content)
        except Exception as e:  # of many types: whatever operators in transformers say to a value
            raise ModelError(f"{path} is damaged ({type(e).__name__}: {e}); {cure}") from e
    else:
        path = model_dir / "config.json"
        found = transformers.GenerationConfig.from_model_config(model_config)
    stated = {name: getattr(found, name) for name in DEFAULTS}
    values = {name: DEFAULTS[name] if value is None else value for name, value in stated.items()}
    do_sample = values.pop("do_sample")
    if not isinstance(do_sample, bool):
        raise ModelError(f"{path}: do_sample must be true or false, got {do_sample!r}; {cure}")
    try:
        checked = generation_with(GenerationConfig(), values)
    except ConfigError as e:
        raise ModelError(f"{path}: {e}; {cure}") from e
    eos = found.eos_token_id
    eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token_id) is int and token_id >= 0 for token_id in eos_ids):
        raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, got {eos!r}; {cure}")
    ignored = {name: getattr(found, name, None) for name in IGNORED}
    return GenerationDefaults(
        do_sample=do_sample,
        **{name: getattr(checked, name) for name in values},
        eos_ids=tuple(sorted(set(eos_ids))),
        notes=tuple(
            f"{path.name} has {name} {value!r}, which has no effect here"
            for name, value in ignored.items()
            if value not in (None, IGNORED[name], [])
        ),
    )


def sampling_options(generation: GenerationConfig, defaults: GenerationDefaults) -> SamplingOptions:
    """What a config, or a request's own keys over it (`generation_with`), and a checkpoint come to.

    Greedy where `temperature` is 0, or is not given and the checkpoint does not sample. Raises ConfigError where
    something was given that would then have no effect.
    """
    temperature, told = generation.temperature, {"seed": generation.seed, "num_top": generation.logprobs or 0}
    if temperature is None:
        temperature = defaults.temperature if defaults.do_sample else 0.0
    given = {name: getattr(generation, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    values = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
    if temperature > 0:
        return SamplingOptions(temperature=temperature, **values, **told)
    lost = [name for name, uncut in UNCUT.items() if given[name] not in (None, uncut)]
    if lost and generation.temperature is None:
        raise ConfigError(
            f"{lost[0]} is {given[lost[0]]}, but no temperature is given and the checkpoint's own answers are greedy; "
            "give a temperature above 0, or 0 if greedy answers are meant"
        )
    return SamplingOptions(repetition_penalty=values["repetition_penalty"], **told)


@dataclass(frozen=True)
class Sampled:
    """A token, its log-probability, and the `num_top` likeliest tokens with theirs, the likeliest first.

    Log-probabilities (nats) are of the model's own distribution, before penalty, temperature and cuts.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens as `options` say; without state, so that one serves any sequence and position.

    Works on the CPU, wherever the logits are, in float32, or float64 where they are.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        # In the order of transformers' `_get_logits_processor`. Those behind top-k see only what it has left: they go
        # by scores alone, and top-p would sort the whole vocabulary.
        self._penalties, self._warpers, self._last_warpers = (LogitsProcessorList() for _ in range(3))
        if options.repetition_penalty != 1:
            self._penalties.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
        if options.greedy:
            return
        if options.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k > 0:
            self._warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self._last_warpers.append(TopPLogitsWarper(options.top_p))
        if options.min_p > 0:
            self._last_warpers.append(MinPLogitsWarper(options.min_p))

    @property
    def reads_ids(self) -> bool:
        """Whether a choice depends on what the sequence holds."""
        return bool(self._penalties)

    def __call__(self, logits: torch.Tensor, ids: torch.Tensor, position: int) -> Sampled:
        """The token at `position` (prompt included, from 0), from the head's logits [V] at the position before it.

        `ids`, int64 [n], are the sequence so far, prompt and answer; any will do unless `reads_ids`. The first of
        equals is the likeliest. A draw takes one number from `uniform`: same logits, options and position, same token,
        whatever was drawn before. Raises ValueError for logits that are no numbers, and where dividing by the
        temperature leaves none.
        """
        logits, log_total = _with_log_total(logits, position)
        if self.options.greedy:
            scores = self._penalties(ids[None], logits[None])[0] if self._penalties else logits
            token_id = int(scores.numpy().argmax())
        else:
            kept, probabilities = self.distribution(logits, ids)
            cumulated = probabilities.numpy().cumsum()
            total = cumulated[-1] if len(cumulated) else math.nan
            if not math.isfinite(total):
                raise ValueError(
                    f"a temperature of {self.options.temperature} leaves no finite scores for position {position}; "
                    "raise it, or take 0 for greedy answers"
                )
            drawn = min(uniform(self.options.seed, position) * total, np.nextafter(total, 0))
            token_id = int(kept[np.searchsorted(cumulated, drawn, side="right")])
        return Sampled(token_id, logits[token_id].item() - log_total, self._top(logits, log_total))

    def tell(self, logits: torch.Tensor, token_id: int, position: int) -> Sampled:
        """Of the token that is at `position`, from the head's logits [V] at the position before it.

        Raises ValueError for logits that are no numbers, and for a token that they rule out.
        """
        logits, log_total = _with_log_total(logits, position)
        logprob = logits[token_id].item() - log_total
        if logprob == -math.inf:
            raise ValueError(f"the logits for position {position} rule out its token {token_id}")
        return Sampled(token_id, logprob, self._top(logits, log_total))

    def _top(self, logits: torch.Tensor, log_total: float) -> tuple[tuple[int, float], ...]:
        if self.options.num_top == 0:
            return ()
        num_top = min(self.options.num_top, len(logits))
        last = torch.topk(logits, num_top).values[-1]  # of equals, topk names any
        likely = torch.nonzero((logits >= last) & (logits > -math.inf)).flatten()
        by_value = sorted(zip((-logits[likely]).tolist(), likely.tolist(), strict=True))[:num_top]
        return tuple((token_id, -negative - log_total) for negative, token_id in by_value)

    def distribution(self, logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a draw draws from: ids, int64 [k], ascending, and their probabilities, float64 [k]; others have none."""
        scores = self._warpers(ids[None], self._penalties(ids[None], _on_cpu(logits)[None]))
        if self.options.top_k > 0:
            kept = torch.from_numpy(np.flatnonzero(scores[0].numpy() > -math.inf))
            scores = scores[:, kept]
        else:
            kept = torch.arange(scores.shape[-1])
        return kept, torch.softmax(self._last_warpers(ids[None], scores)[0].double(), -1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same on every machine: Philox4x64 with the key (seed, position)."""
    generator = np.random.Philox(key=np.array([seed, position], dtype=np.uint64))
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def _with_log_total(logits: torch.Tensor, position: int) -> tuple[torch.Tensor, float]:
    """Logits [V] on the CPU, and the logarithm of the sum of their exponentials."""
    logits = _on_cpu(logits)
    log_total = torch.logsumexp(logits, -1).item()
    if not math.isfinite(log_total):
        raise ValueError(f"the logits for position {position} hold NaN or infinity, or nothing above -infinity")
    return logits, log_total


def _on_cpu(logits: torch.Tensor) -> torch.Tensor:
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    return logits.detach().to("cpu", dtype)
