"""The text that codecs are calibrated on: the config's own, with a share of its tokens from texts of other kinds.

Rank 0 tokenises and mixes (`data.mixture`), the others receive ids and facts, as they do of the config's text.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from pipeline.analysis.calibration import held_out_microbatches, whole_windows
from pipeline.config.schema import RunConfig
from pipeline.data.mixture import apportion, load_kinds, mix
from pipeline.data.text import check_vocabulary, encode, ids_digest, load_tokenizer
from pipeline.data.windows import make_microbatches
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.text import TokenizedText, make_run_windows

__all__ = ["mixed_text"]


def mixed_text(config: RunConfig, deployment: Deployment, share: float) -> TokenizedText:
    """The deployment's text, with `share` (at least 0, below 1) of its tokens from other kinds; every rank calls it.

    There are `dataset.first_k_tokens` tokens (0: as many as the text allows), fewer where the text is too short to have
    its own share of them. Where the kinds have too little, the text fills up. Rank 0 prints the tokens by kind.
    """
    control, own = deployment.control, deployment.text
    control.agree("mixture", {"share": share})
    if share == 0:
        return own
    control.report("mixing texts")
    ids, facts = None, None
    if control.world.rank == 0:
        texts = load_kinds()
        kinds = _tokenize(config, deployment, texts)
        num_tokens = int(own.ids.numel() / (1 - share))
        if config.dataset.first_k_tokens:
            num_tokens = min(num_tokens, config.dataset.first_k_tokens)
        counts = apportion(int(share * num_tokens), [len(ids) for ids in kinds.values()])
        num_own = min(num_tokens - sum(counts), own.ids.numel())
        taken = [own.ids[:num_own].numpy(), *(ids[:n] for ids, n in zip(kinds.values(), counts, strict=True))]
        ids = torch.from_numpy(mix(taken, _held_out(config, num_own + sum(counts), own)))
        amounts = dict(zip([own.description, *kinds], map(len, taken), strict=True))
        digests = [own.text_sha256, *(hashlib.sha256(text.encode("utf-8")).hexdigest() for text in texts.values())]
        facts = {
            "description": f"{ids.numel()} tokens: " + ", ".join(f"{n} of {kind}" for kind, n in amounts.items()),
            "text_sha256": hashlib.sha256("\n".join(digests).encode("ascii")).hexdigest(),
            "ids_sha256": ids_digest(ids.numpy()),
        }
        print(f"calibrating on {facts['description']}")
    facts = control.gather(facts)[0]
    return TokenizedText(ids=control.broadcast_ids(ids), bos_id=own.bos_id, **facts)


def _tokenize(config: RunConfig, deployment: Deployment, texts: dict[str, str]) -> dict[str, np.ndarray]:
    """Ids by kind, int64, without the special tokens that a tokenizer adds to a text."""
    directory = deployment.model.directory
    tokenizer = load_tokenizer(directory, trust_remote_code=config.model.trust_remote_code)
    kinds = {}
    for kind, text in texts.items():
        failure = f"the tokenizer in {directory} fails on the mixture's {kind}"
        ids = encode(tokenizer, text, failure, add_special_tokens=False)
        check_vocabulary(tokenizer, ids, f"the mixture's {kind}", vocab_size=deployment.model.config.vocab_size)
        kinds[kind] = np.array(ids, dtype=np.int64)
    return kinds


def _held_out(config: RunConfig, num_tokens: int, own: TokenizedText) -> np.ndarray:
    """Which places of a text of `num_tokens` tokens the calibration will hold out, bool [num_tokens]."""
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    ids[:1] = own.ids[:1]
    microbatches = whole_windows(make_microbatches(make_run_windows(config, ids, own.bos_id), config.batch_size))
    is_held_out = np.zeros(num_tokens, dtype=bool)
    for m in held_out_microbatches(microbatches):
        for window in microbatches[m].windows:
            is_held_out[window.start : window.end] = True
    return is_held_out
