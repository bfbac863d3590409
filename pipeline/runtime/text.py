"""The text of a deployment: read and tokenised once, cut into windows, checked against the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.comm.control import Control
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.text import ids_digest, load_text, tokenize
from pipeline.data.windows import Window, make_windows

__all__ = ["NO_TEXT", "TokenizedText", "check_bos", "check_max_length", "make_run_windows", "tokenize_once"]


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """The text's token ids, int64 on the CPU, the same on every rank, and where they come from."""

    ids: torch.Tensor
    bos_id: int | None
    description: str
    text_sha256: str
    ids_sha256: str

    def cut(self, first_k_tokens: int) -> TokenizedText:
        """The first k tokens (0: all) as a text of their own."""
        ids = self.ids[: first_k_tokens or None]
        if ids.numel() == self.ids.numel():
            return self
        return dataclasses.replace(self, ids=ids, ids_sha256=ids_digest(ids.numpy()))


NO_TEXT = TokenizedText(
    ids=torch.empty(0, dtype=torch.int64), bos_id=None, description="no text", text_sha256="", ids_sha256=""
)


def tokenize_once(config: RunConfig, control: Control, model_dir: Path, *, vocab_size: int) -> TokenizedText:
    """Rank 0 reads and tokenises, the others receive ids and facts."""
    dataset = config.dataset
    ids, facts = None, None
    if control.world.rank == 0:
        text = load_text(name=dataset.name, path=dataset.path, split=dataset.split)
        tokens, bos_id = tokenize(
            text,
            model_dir,
            trust_remote_code=config.model.trust_remote_code,
            first_k_tokens=dataset.first_k_tokens,
            vocab_size=vocab_size,
        )
        ids = torch.tensor(tokens, dtype=torch.int64)
        facts = {
            "bos_id": bos_id,
            "description": text.description,
            "text_sha256": text.sha256,
            "ids_sha256": ids_digest(ids.numpy()),
        }
    facts = control.gather(facts)[0]
    return TokenizedText(ids=control.broadcast_ids(ids), **facts)


def make_run_windows(config: RunConfig, ids: torch.Tensor, bos_id: int | None) -> list[Window]:
    """The windows over the text's ids, int64 [num_tokens]."""
    return make_windows(
        ids.numel(),
        config.dataset.max_length,
        config.dataset.stride,
        window_bos=config.dataset.bos == "window",
        text_has_bos=bos_id is not None and ids[0].item() == bos_id,
    )


def check_max_length(config: RunConfig, model_config: Any) -> None:
    """Raise ConfigError where the windows are longer than the model's positions."""
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and config.dataset.max_length > longest:
        raise ConfigError(
            f"dataset.max_length is {config.dataset.max_length}, the model has positions for {longest} tokens"
        )


def check_bos(config: RunConfig, bos_id: int | None) -> None:
    """Raise ConfigError where windows are to begin with a token that the model has not."""
    if config.dataset.bos == "window" and bos_id is None:
        raise ConfigError("dataset.bos is window, but the model's tokenizer has no BOS token")
