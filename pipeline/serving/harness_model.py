"""lm-evaluation-harness' side of the ring: its three kinds of requests, tokenised and cut as its own `hf` model does.

Imports lm_eval, so it is imported only where that is asked for. Rules are those of `lm_eval.models.huggingface.HFLM`
for causal models (0.4.12, 0.4.13). Departures:

* A window of log-likelihoods has one token less than a slot, since the scored token behind it takes a place, too.
* Options of generation that do not exist here are refused; HFLM hands them on to transformers.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from pipeline.config.schema import ConfigError
from pipeline.generation.answer import Answer
from pipeline.generation.requests import Request, RequestMaker
from pipeline.serving.asking import Asking

__all__ = ["ThinwireLM"]

logger = logging.getLogger(__name__)

_CUTS = ("top_k", "top_p", "min_p")  # without effect on greedy answers, here as there
_MAX_SHOWN = 60  # characters of a request in an error

TokenPair = tuple[tuple[str, str] | None, list[int], list[int]]


class ThinwireLM(TemplateLM):
    """A deployed model, for the harness. Its methods are called on a thread of their own, and wait for the ring.

    `about` goes into the harness' results, behind the name of the model.
    """

    backend = "causal"

    def __init__(self, asking: Asking, maker: RequestMaker, about: dict[str, Any]) -> None:
        super().__init__()
        self.tokenizer = maker.tokenizer
        self._asking, self._maker, self._about = asking, maker, about
        if self.prefix_token_id is None:
            raise ConfigError("the tokenizer has neither a BOS nor an EOS token, one of which the harness needs")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation that can be in front of a scored one."""
        return self._maker.slot_length - 1

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """For the harness' results."""
        return {**self._about, "max_length": self.max_length}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def applied(history: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return applied(chat_history)
        except jinja2.exceptions.TemplateError:
            logger.warning("the chat template fails on these messages; it is tried without the system's")
            return applied([message for message in chat_history if message["role"] != "system"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special: dict[str, bool] = {}
        if add_special_tokens is not None:
            special = {"add_special_tokens": add_special_tokens}
        elif has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **special)

    def _loglikelihood_tokens(
        self, requests: list[TokenPair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of a continuation's log-probabilities (nats), and whether all its tokens are the likeliest."""
        # Neighbours share contexts, which a slot then has; long ones come first, as in HFLM.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]), requests[i][1], requests[i][2]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def scored() -> Iterator[tuple[str, Request]]:
            for index in order:
                text, context, continuation = requests[index]
                name = f"loglikelihood request {index}{_shown(text)}"
                yield name, self._scored(name, context, continuation)

        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm, dynamic_ncols=True) as bar:

            def take(place: int, answer: Answer) -> None:
                index, told = order[place], answer.prompt_logprobs
                found[index] = sum(t.logprob for t in told), all(t.top[0][0] == t.token_id for t in told)
                text = requests[index][0]
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, found[index])
                bar.update()

            self._asking.ask(scored(), take)
        return found

    def _scored(self, name: str, context: list[int], continuation: list[int]) -> Request:
        if not context or not continuation:
            raise ValueError(f"{name} has no tokens in its {'continuation' if context else 'context'}")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"{name} has a continuation of {len(continuation)} tokens, but at most {self.max_length} fit; raise "
                "generation.max_length as far as the model goes"
            )
        ids = (context + continuation)[-(self.max_length + 1) :]
        if len(ids) < len(context) + len(continuation):
            logger.warning("%s is cut: of %d tokens of context the last %d are left", name, len(context),
                           len(ids) - len(continuation))
        return self._maker.make_scored(ids, len(ids) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, behind one prefix token, each in windows that do not overlap in what they score."""
        windows: list[TokenPair] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text up to the first stop string, without special tokens."""
        found = [""] * len(requests)
        made = [self._generation(index, request) for index, request in enumerate(requests)]
        order = sorted(range(len(made)), key=lambda i: (-len(made[i][1].prompt_ids), made[i][1].prompt_ids))
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm, dynamic_ncols=True) as bar:

            def take(place: int, answer: Answer) -> None:
                index = order[place]
                text = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                found[index] = postprocess_generated_text(text, stop=made[index][2], think_end_token=None)
                self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
                bar.update()

            self._asking.ask((made[index][:2] for index in order), take)
        return found

    def _generation(self, index: int, request: Instance) -> tuple[str, Request, Sequence[str]]:
        """Name, request and stop strings."""
        context, gen_kwargs = request.args
        name = f"generate_until request {index} ({context[-_MAX_SHOWN:]!r})"
        options = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode(self.eot_token_id))
        if "" in until:
            raise ValueError(f"{name} has an empty string among its stop strings (until)")
        do_sample, temperature = options.pop("do_sample"), float(options.pop("temperature", 0.0))
        if do_sample and temperature == 0:
            raise ValueError(f"{name} has do_sample with a temperature of 0; give it one above 0, or no do_sample")
        num_wanted = options.pop("max_gen_toks")
        given = {key: options.pop(key) for key in ("repetition_penalty", *_CUTS) if key in options}
        if options:
            key = next(iter(options))
            raise ValueError(f"{name} has the option {key}={options[key]!r}, which does not exist here")
        if not do_sample:
            given = {key: value for key, value in given.items() if key not in _CUTS}
        room = self.max_length - num_wanted
        if room <= 0:
            raise ValueError(
                f"{name} asks for {num_wanted} tokens, but a sequence has at most {self.max_length}; ask for "
                "fewer (max_gen_toks), or raise generation.max_length as far as the model goes"
            )
        special = {"add_special_tokens": False} if has_bos_prefix(context, self.tokenizer.bos_token) else {}
        ids = self.tokenizer(context, **special)["input_ids"]
        if len(ids) > room:
            logger.warning("%s is cut: of %d tokens of its prompt the last %d are left", name, len(ids), room)
        made = self._maker.make(
            {
                "prompt": ids[-room:],
                "max_new_tokens": num_wanted,
                "temperature": temperature,
                "stop": until,
                "ignore_eos": False,
                "logprobs": None,
                "deadline_s": None,
                **given,
                **({"seed": self._maker.generation.seed + index} if do_sample else {}),
            },
            line=index + 1,
        )
        return name, self._ending_at_special(made, until), until

    def _ending_at_special(self, request: Request, until: Sequence[str]) -> Request:
        """With special tokens that are stop strings as ends: HFLM looks for those in text that has them."""
        added = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ends = {index for content, index in added.items() if any(text in content for text in until)}
        return dataclasses.replace(request, eos_ids=tuple(sorted({*request.eos_ids, *ends})))


def _shown(text: tuple[str, str] | None) -> str:
    if text is None:
        return ""
    context, continuation = text
    return f" ({context[-_MAX_SHOWN:]!r} -> {continuation[:_MAX_SHOWN]!r})"
