"""Many clients at once at the endpoint: is each answer that of its request alone, and does memory stay flat?

    python -m benchmarks.endpoint
    python -m benchmarks.endpoint --num_ranks 4 --num_clients 50 --seconds 20

A server of a tiny random model in float64, over loopback. First every kind of request is answered alone. Then so many
clients ask for so long, each one request after the other: completions and chats, greedy and sampled, whole and
streamed. Of what they get, 429 alone is no fault. Then malformed requests, each of which must get a 4xx, and a good
one. Prints counts, tokens a second and rank 0's resident memory between these; exit code 1 if anything was not as it
should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from compressors.console import run_command
from tests.helpers.malformed import COMPLETION, malformed
from tests.helpers.serving import Server, serving

WORDS = "the canal lock keeper opens a gate and water falls from one level to the next".split()
NUM_KINDS = 48
JSON = {"Content-Type": "application/json"}
MOMENTS = 10  # of the clients' time, after each of which memory is read


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask the endpoint from many clients at once.")
    parser.add_argument("--num_clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--num_malformed", type=int, default=10_000)
    parser.add_argument("--num_ranks", type=int, default=1, choices=(1, 4))
    parser.add_argument("--max_waiting", type=int, default=256, help="serving.max_waiting")
    arguments = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory(prefix="endpoint_") as name,
        serving(Path(name), f"serving.max_waiting={arguments.max_waiting}", num_ranks=arguments.num_ranks) as server,
    ):
        faults = asyncio.run(measure(server, arguments))
        server.signal()
        codes = [one.returncode for one in server.ranks.wait(3600)]  # since their start
        if set(codes) != {130}:
            faults.append(f"the ranks ended with {codes}, not 130")
    print("\n".join(faults) or "no faults")
    return 1 if faults else 0


async def measure(server: Server, arguments: argparse.Namespace) -> list[str]:
    """What was not as it should be."""
    kinds = [kind(number) for number in range(NUM_KINDS)]
    limits = httpx.Limits(max_connections=arguments.num_clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, headers=JSON) as client:
        alone = [(await answer(client, *one))[1] for one in kinds]
        show_memory(server, "at the beginning")
        faults = await ask_at_once(server, client, kinds, alone, arguments)
        show_memory(server, "after the clients")
        faults += await ask_wrongly(client, arguments.num_malformed)
        show_memory(server, "after what was malformed")
        faults += [] if (await answer(client, *kinds[0]))[1] == alone[0] else ["the last answer is another"]
    return faults


def kind(number: int) -> tuple[str, dict[str, Any]]:
    """Path and body of one kind of request, not streamed."""
    chance = random.Random(number)
    text = " ".join(chance.choices(WORDS, k=chance.randint(1, 6)))
    body: dict[str, Any] = {"model": "tiny-chat", "max_tokens": chance.randint(4, 24), "seed": number}
    body["temperature"] = chance.choice([0, 0.7, 1])
    if number % 3 == 0:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    return "/v1/completions", body | {"prompt": text}


async def answer(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], *, stream: bool = False
) -> tuple[int, str, int]:
    """Status, text and number of tokens."""
    is_chat = "messages" in body
    own = {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body
    told = await client.post(path, content=json.dumps(own))
    if told.status_code != 200:
        return told.status_code, told.text, 0
    if not stream:
        (choice,) = told.json()["choices"]
        text = choice["message"]["content"] if is_chat else choice["text"]
        return 200, text, told.json()["usage"]["completion_tokens"]
    *lines, done = [line.removeprefix("data: ") for line in told.text.split("\n\n") if line]
    *chunks, last = map(json.loads, lines)
    assert done == "[DONE]", done
    deltas = [chunk["choices"][0] for chunk in chunks]
    text = "".join(delta["delta"].get("content", "") if is_chat else delta["text"] for delta in deltas)
    return 200, text, last["usage"]["completion_tokens"]


async def ask_at_once(
    server: Server,
    client: httpx.AsyncClient,
    kinds: Sequence[tuple[str, dict[str, Any]]],
    alone: Sequence[str],
    arguments: argparse.Namespace,
) -> list[str]:
    """Clients that ask for a time; what they have counted, printed, and the faults."""
    counts, num_tokens, start_s = Counter[str](), 0, time.monotonic()

    async def ask(seed: int) -> None:
        nonlocal num_tokens
        chance = random.Random(seed)
        while time.monotonic() < start_s + arguments.seconds:
            number = chance.randrange(len(kinds))
            try:
                status, text, count = await answer(client, *kinds[number], stream=chance.random() < 0.5)
            except httpx.HTTPError as e:
                counts[type(e).__name__] += 1
                continue
            num_tokens += count
            equal = "equal" if text == alone[number] else "OTHER"
            counts[equal if status == 200 else str(status)] += 1
            if status == 429:
                await asyncio.sleep(1)

    async def watch() -> None:
        for _ in range(MOMENTS - 1):
            await asyncio.sleep(arguments.seconds / MOMENTS)
            show_memory(server, f"after {time.monotonic() - start_s:.0f} s and {counts['equal']} answers")

    await asyncio.gather(watch(), *(ask(seed) for seed in range(arguments.num_clients)))
    wall_s = time.monotonic() - start_s
    print(f"{arguments.num_clients} clients, {wall_s:.1f} s: {dict(counts)}, {num_tokens / wall_s:.1f} tokens/s")
    return [f"{number} x {what}" for what, number in counts.items() if what not in ("equal", "429")]


async def ask_wrongly(client: httpx.AsyncClient, num_requests: int) -> list[str]:
    known, chance, counts = list(malformed()), random.Random(0), Counter[int]()
    good = json.dumps(COMPLETION).encode()

    async def ask(number: int) -> None:
        path, body = known[number % len(known)]
        if number >= len(known):
            cut, noise = good[: chance.randrange(len(good))], chance.randbytes(chance.randrange(200))
            path, body = "completions", chance.choice([cut, noise, cut + noise, body[: len(body) // 2] + noise])
        counts[(await client.post(f"/v1/{path}", content=body)).status_code] += 1

    start_s = time.monotonic()
    for first in range(0, num_requests, 50):
        await asyncio.gather(*(ask(number) for number in range(first, min(first + 50, num_requests))))
    print(f"{num_requests} malformed requests in {time.monotonic() - start_s:.1f} s: {dict(counts)}")
    return [f"{number} malformed requests got {status}" for status, number in counts.items() if status // 100 != 4]


def show_memory(server: Server, when: str) -> None:
    process = psutil.Process(server.ranks.rank_pids()[0])
    print(f"{process.memory_info().rss / 2**20:.1f} MiB resident {when}", flush=True)


if __name__ == "__main__":
    run_command(main)
