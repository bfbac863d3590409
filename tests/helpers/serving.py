"""Servers of tiny models, started as a user would start them, for tests that ask them over HTTP."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from tests.helpers.launch import Ranks, start_ranks
from tests.helpers.patience import allowed_s
from tests.helpers.tiny_models import tiny_model

__all__ = ["Server", "chat_model", "serving"]

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    ranks: Ranks
    exp_dir: Path

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def metric(self, name: str, key: str | None = None) -> float:
        """The sum over labels, of a name with or without them."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        text = httpx.get(f"{self.url}/metrics", headers=headers).raise_for_status().text
        found = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.split()[-1]) for line in found)

    def signal(self, number: int = signal.SIGINT, rank: int = 0) -> None:
        os.kill(self.ranks.rank_pids()[rank], number)

    def wait_for(self, name: str, value: float, *, or_more: bool = False, wait_s: float = 20) -> None:
        end_s = time.monotonic() + allowed_s(wait_s)
        while (found := self.metric(name)) < value or (found > value and not or_more):
            assert time.monotonic() < end_s, f"{name} is {found}, not {value}"
            time.sleep(0.02)


@functools.cache
def chat_model() -> Path:
    """A tiny model whose tokenizer has a chat template, in the folder of the session's tiny models."""
    plain = tiny_model()
    folder = Path(tempfile.mkdtemp(dir=plain.parent)) / "tiny-chat"
    shutil.copytree(plain, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextlib.contextmanager
def serving(
    exp_dir: Path,
    *settings: str,
    model: Path | None = None,
    num_ranks: int = 1,
    words: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server of `model`, by default `chat_model`, in float64; what is left of it is killed at the end."""
    model = model or chat_model()
    lengths = ("generation.max_length=96", "generation.max_new_tokens=8")
    base = ("model.dtype=fp64", "runtime.threads=1", "generation.ignore_eos=true", *lengths)
    options = [word for setting in (*base, *settings) for word in ("--set", setting)]
    arguments = ["--model_name", str(model), "--exp_dir", str(exp_dir), "--serve", "127.0.0.1:0"]
    with start_ranks([[*arguments, *options, *words]] * num_ranks, env=env, distributed=num_ranks > 1) as ranks:
        end_s = time.monotonic() + allowed_s(60)
        while not (found := re.search(r"answers at (http://\S+)/v1", ranks.rank_stdout(0))):
            assert ranks.returncode(0) is None and time.monotonic() < end_s, ranks.rank_stderr(0)
            time.sleep(0.02)
        url = found[1]
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.02)
        yield Server(url, model.name, ranks, exp_dir)
