"""What a run of prompts leaves: one JSON with totals and a line of figures per request."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.generation.answer import Answer, quantile
from pipeline.generation.ring import GenerationRing
from pipeline.records.store import make_run_id, model_label, software_versions, write_json
from pipeline.report.generation import KIND, SCHEMA_VERSION

__all__ = ["generation_record", "write_generation_record"]


def generation_record(
    ring: GenerationRing,
    lines: Sequence[Mapping[str, Any]],
    answers: Sequence[Answer],
    num_taken_over: int,
    reports: Sequence[Mapping[str, Any]],
    digest: str,
) -> dict[str, Any]:
    """Of this session: `lines` of the file of answers, and the `answers` of requests that could be tried.

    Bytes are what the senders counted.
    """
    config, deployment = ring.config, ring.deployment
    plan, model = deployment.plan, deployment.model_config
    gaps = [gap for answer in answers for gap in answer.token_gaps_s]
    ttft = [line["ttft_s"] for line in lines if line["ttft_s"] is not None]
    num_generated = sum(len(line["token_ids"]) for line in lines)
    run_s = max(report["run_s"] for report in reports)
    sent = {name: traffic for report in reports for name, traffic in report["sent"].items()}
    codec_names = sorted({codec.name for codec in ring.codecs.facts}) or ["unsplit"]
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "run_id": make_run_id("generation", model_label(config.model.name), "+".join(codec_names), digest[:8]),
        "digest": digest,
        "args": {**config.original_args(), "config": config.as_dict()},
        "results": {
            "num_requests": len(lines),
            "num_failed": sum(line["error"] is not None for line in lines),
            "num_taken_over": num_taken_over,
            "prompt_tokens": sum(line["num_prompt_tokens"] for line in lines),
            "generated_tokens": num_generated,
            "tokens_per_s": num_generated / run_s,
            "ttft_s": _spread(ttft),
            "tpot_s": _spread(gaps),
        },
        "traffic_per_link": {
            link.name: {
                "payload_bytes": sent[link.name]["payload_bytes"],
                "header_bytes": sent[link.name]["header_bytes"],
                "control_bytes": sent[link.name]["control_bytes"],
                "frames": sent[link.name]["num_frames"],
                "tokens": sent[link.name]["num_tokens"],
                "bytes_per_token": _ratio(sent[link.name]["payload_bytes"], sent[link.name]["num_tokens"]),
                "header_bytes_per_token": _ratio(sent[link.name]["header_bytes"], sent[link.name]["num_tokens"]),
            }
            for link in plan.links
        },
        "requests": [
            {key: line[key] for key in line if key not in ("prompt", "text", "token_ids", "logprobs")}
            | {"num_tokens": len(line["token_ids"])}
            for line in lines
        ],
        "time_run_s": run_s,
        "codecs": {link.name: codec.config for link, codec in zip(plan.links, ring.codecs.facts, strict=True)},
        "codecs_decode": {
            link.name: codec.config for link, codec in zip(plan.links, ring.decode_codecs.facts, strict=True)
        },
        "plan": [{"stage": s.stage_index, "node": s.node, "layers": [s.start, s.end]} for s in plan.stages],
        "stages": {index: stage for report in reports for index, stage in sorted(report["stages"].items())},
        "ranks": [
            {
                key: report[key]
                for key in (
                    *("rank", "host", "threads", "gpu", "peak_rss_bytes", "pss_bytes"),
                    *("peak_cuda_bytes", "cuda_in_use_bytes", "cache_bytes"),
                )
            }
            for report in reports
        ],
        "schedule": {
            "max_slots": config.generation.max_slots,
            "slot_length": ring.slot_length,
            "prefill_chunk": ring.prefill_chunk,
            "passes": ring.passes,
            "in_flight": ring.credits,
            "receives_ahead": config.runtime.receives_ahead,
        },
        "backend": deployment.backend,
        "model": {
            "model_type": model.model_type,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": plan.num_layers,
            "checkpoint_fingerprint": deployment.checkpoint_digest,
        },
        "notes": [*deployment.notes, *ring.notes],
        "versions": software_versions(),
        "environment": dict(deployment.environment),
    }


def write_generation_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Returns the path. Raises RecordError."""
    path = folder / f"{record['run_id']}.json"
    write_json(path, dict(record))
    return path


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "p95": quantile(values, 0.95)} if values else None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
