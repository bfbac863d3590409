"""Records as a run of four nodes would write them, made without a run."""

import numpy as np

from pipeline.config.schema import RunConfig
from pipeline.partition.plan import default_plan
from pipeline.records.base import now
from pipeline.records.failed_point import FailedPoint
from pipeline.records.generation_record import GenerationRecord
from pipeline.records.perplexity import perplexity
from pipeline.records.run_record import RunRecord
from pipeline.records.store import write_failure, write_generation, write_record, write_tasks
from pipeline.records.tasks_record import TasksRecord
from pipeline.records.traffic import LinkTraffic, link_record, link_totals

PLAN = default_plan(8, 4)
HIDDEN_SIZE = 64
TOKENS_PER_WINDOW, NUM_WINDOWS = 50, 8


def losses(change=0.0, spread=0.0, seed=0):
    """Losses of all windows; those of equal `change` and `spread` are equal."""
    base = np.random.default_rng(7).gamma(4.0, 0.8, NUM_WINDOWS * TOKENS_PER_WINDOW)
    return (base + change + spread * np.random.default_rng(seed).standard_normal(len(base))).astype(np.float32)


def make_record(compressor="none", *, loss=None, nbytes=256, num_tokens=400, codec=None, plan=PLAN, **changes):
    """A record; `nbytes` are payload bytes per token and link. Mappings in `changes` change the keys given and leave
    the others, empty ones and all else stand for the whole.
    """
    loss = losses() if loss is None else loss
    total_nll = float(np.sum(loss, dtype=np.float64))
    processed = 2 * len(loss)
    names = [link.name for link in plan.links]
    link = {"bytes": nbytes * processed, "tokens": processed, "tx": NUM_WINDOWS}
    link |= {"header_bytes": 60 * NUM_WINDOWS, "padding_bytes": 0}
    times = {"device": "cpu", "compute_s": 0.8, "compress_s": 0.02, "decompress_s": 0.01, "wait_s": 0.3}
    times |= dict.fromkeys(("importance_s", "measure_s", "head_s"), 0.0)
    one_token = {"compute_s": 2e-3, "compress_s": 1e-4, "decompress_s": 1e-4}
    record = {
        "run_id": "run",
        "digest": "0123456789abcdef" * 4,
        "finished_at": now(),
        "per_token_file": "run.safetensors",
        "finite": True,
        "args": _args(compressor),
        "results": {
            "avg_ppl": perplexity(total_nll, len(loss)),
            "total_nll": total_nll,
            "total_loss_tokens": len(loss),
            "total_processed_tokens": processed,
            "num_windows": NUM_WINDOWS,
            "num_microbatches": NUM_WINDOWS,
        },
        "traffic_other": {"result_bytes": 0, "end_bytes": 96, "setup_bytes": 12 * num_tokens},
        "traffic_per_link": dict.fromkeys(names, link),
        "time_run_s": 2.0,
        "timed_tokens": processed,
        "tokens_per_s": processed / 2.0,
        "causal": True,
        "notes": [],
        "codecs": {name: {"name": codec or compressor} for name in names},
        "codecs_decode": None,
        "importance": {},
        **_stages(plan, times),
        "resumed": {
            "num_sessions": 1,
            "environments": None,
            "resent_microbatches": 0,
            "resent_payload_bytes_at_most": 0,
        },
        "one_token": {
            "cached_tokens": 16,
            "stages": {str(s.stage_index): one_token for s in plan.stages},
            "links": dict.fromkeys(names, {"payload_bytes": nbytes, "header_bytes": 60}),
        },
        "reconstruction": dict.fromkeys(names, {"relative_squared_error": 0.015}),
        "ranks": [_rank(rank) | {"warm_up_s": 0.1} for rank in range(4)],
        "schedule": {"in_flight": 6, "receives_ahead": 2},
        "backend": "gloo",
        "emulation": None,
        "model": _MODEL,
        "dataset": {
            "description": "a text",
            "num_tokens": num_tokens,
            "text_sha256": "cd" * 32,
            "ids_sha256": "ef" * 32,
        },
        "protocol": {
            "name": "token perplexity, sliding window",
            "mode": "window",
            "decode_chunk": None,
            "max_length": 100,
            "stride": 50,
            "bos": "text",
        },
        "versions": {"python": "3.11", "torch": "2.13"},
        "environment": None,
    }
    record |= {key: _merged(record.get(key), change) for key, change in changes.items()}
    record |= _traffic(record)
    ppl = record["results"]["avg_ppl"]
    return RunRecord.from_plain(record | {"finite": ppl is not None and bool(np.isfinite(ppl))})


def write_point(folder, compressor="none", *, loss=None, **changes):
    """Write a record (`make_record`) and its per-token file; returns the record's path."""
    loss = losses() if loss is None else loss
    per_token = {
        "loss": loss,
        "top1": np.argsort(np.argsort(loss)).astype(np.int32),
        "window": np.repeat(np.arange(NUM_WINDOWS, dtype=np.int32), len(loss) // NUM_WINDOWS),
    }
    return write_record(folder, make_record(compressor, loss=loss, **changes), per_token)


def write_failed_point(folder, label, error):
    """Write the file of a failed point; returns its path."""
    failure = FailedPoint(failure_id="1", label=label, error=error, args={}, finished_at=now())
    return write_failure(folder, failure)


def write_generation_point(folder, run_id, **changes):
    """Write the record of a run that generated; returns its path."""
    spread = {"median": 0.02, "p95": 0.04}
    names = [link.name for link in PLAN.links]
    times = {"device": "cpu", "compute_s": 0.1, "compress_s": 0.01, "decompress_s": 0.01, "wait_s": 0.3}
    times |= {"importance_s": 0.0, "measure_s": 0.0, "head_s": 0.02}
    link = {"payload_bytes": 2368, "header_bytes": 144, "control_bytes": 12, "frames": 8, "tokens": 37}
    request = {"line": 1, "finish_reason": "length", "num_prompt_tokens": 14, "num_tokens": 6, "queued_s": 0.0}
    answered = request | {"ttft_s": 0.02, "tpot_s": spread, "bytes_per_link": dict.fromkeys(names, 999.5)}
    answered |= {"num_passes": 5, "num_drafts_accepted": 0, "error": None}
    record = {
        "run_id": run_id,
        "digest": "d" * 64,
        "args": _merged(_args("nf4"), {"model_name": "a/model", "config": {"compressor_decode": "int8"}}),
        "results": {
            "num_requests": 3,
            "num_failed": 1,
            "num_taken_over": 0,
            "prompt_tokens": 42,
            "generated_tokens": 12,
            "tokens_per_s": 67.4,
            "ttft_s": spread,
            "tpot_s": spread,
        },
        "traffic_per_link": dict.fromkeys(names, link | {"bytes_per_token": 64.0, "header_bytes_per_token": 144 / 37}),
        "requests": [
            answered,
            answered | {"line": 2},
            answered | {"line": 3, "finish_reason": "error", "num_tokens": 0, "error": "a codec raised"},
        ],
        "time_run_s": 0.2,
        "codecs": dict.fromkeys(names, {"name": "nf4"}),
        "codecs_decode": dict.fromkeys(names, {"name": "int8"}),
        **_stages(PLAN, times),
        "ranks": [_rank(rank) | {"cache_bytes": 2**20} for rank in range(PLAN.num_nodes)],
        "schedule": _SCHEDULE,
        "drafts": None,
        "interruptions": {"count": 2, "pause_s": 9.5, "tokens_prefilled_again": 77, "started_again": False},
        "backend": "gloo",
        "emulation": None,
        "model": _MODEL,
        "notes": ["something of note"],
        "versions": {"python": "3.11", "torch": "2.13"},
        "environment": {"threads": "1"},
    }
    return write_generation(folder, GenerationRecord.from_plain(record | changes))


def make_tasks_record(run_id, compressor="none", *, samples=(1.0, 0.0, 1.0, 1.0), bits=32, **changes):
    """The record of a run of one task with a metric of these samples."""
    names = [link.name for link in PLAN.links]
    times = {"device": "cpu", "compute_s": 0.1, "compress_s": 0.01, "decompress_s": 0.01, "wait_s": 0.3}
    times |= {"importance_s": 0.0, "measure_s": 0.0, "head_s": 0.02}
    payload_bytes = bits * HIDDEN_SIZE * 40 // 8
    link = {"payload_bytes": payload_bytes, "header_bytes": 400, "control_bytes": 12, "frames": 8, "tokens": 40}
    link |= {"bytes_per_token": payload_bytes / 40, "header_bytes_per_token": 10.0, "bits_per_value": float(bits)}
    metric = {"name": "acc", "filter": "none", "value": sum(samples) / len(samples), "stderr": 0.25}
    metric |= {"higher_is_better": True, "samples": list(samples)}
    record = {
        "run_id": run_id,
        "digest": "d" * 64,
        "finished_at": now(),
        "args": _args(compressor),
        "harness": {
            "version": "0.4.13",
            "tasks": ["a_task"],
            "limit": 4.0,
            "num_fewshot": None,
            "apply_chat_template": False,
            "max_length": 2047,
            "results_file": "lm_eval/a.json",
        },
        "tasks": [
            {
                "name": "a_task",
                "version": "1",
                "num_fewshot": 0,
                "num_samples": len(samples),
                "docs_sha256": "ab" * 32,
                "metrics": [metric],
            }
        ],
        "totals": {"num_requests": 16, "prompt_tokens": 160, "scored_tokens": 32, "generated_tokens": 0},
        "traffic_per_link": dict.fromkeys(names, link),
        "time_run_s": 0.2,
        "codecs": dict.fromkeys(names, {"name": compressor}),
        "codecs_decode": dict.fromkeys(names, {"name": compressor}),
        **_stages(PLAN, times),
        "ranks": [_rank(rank) | {"cache_bytes": 2**20} for rank in range(PLAN.num_nodes)],
        "schedule": _SCHEDULE,
        "interruptions": {"count": 0, "pause_s": 0.0, "tokens_prefilled_again": 0, "started_again": False},
        "backend": "gloo",
        "emulation": None,
        "model": _MODEL,
        "notes": [],
        "versions": {"python": "3.11", "torch": "2.13"},
        "environment": {"threads": "1"},
    }
    return TasksRecord.from_plain(record | {key: _merged(record[key], change) for key, change in changes.items()})


def write_tasks_point(folder, run_id, compressor="none", **changes):
    """Write `make_tasks_record`; returns its path."""
    return write_tasks(folder, make_tasks_record(run_id, compressor, **changes))


def make_drafts(**changes):
    """The part `drafts` of a record: two drafters, ten rows that brought fifteen tokens."""
    depths = [{"judged": 8, "right": 5}, {"judged": 4, "right": 2}]
    ngram = {"name": "ngram", "spec": "ngram(longest=4)", "draft_s": 2e-6, "by_depth": depths}
    shortcut = {"name": "shortcut", "spec": "shortcut(calibration=c)", "draft_s": 0.004}
    shortcut |= {"by_depth": [{"judged": 2, "right": 1}]}
    return {
        "drafters": [ngram, shortcut],
        "passes": 10,
        "void": 1,
        "tokens": 15,
        "tokens_per_pass": 1.5,
        "rows_by_tokens": [2, 4, 4],
        "rows_by_in_flight": [4, 6],
        "undrafted": {"none": 1, "cost": 1},
        "limits": {"depth": 8, "passes": 2, "adapts": True},
        "costs": {"num_tokens": [1, 8], "lap_s": [0.04, 0.06], "busy_s": [0.01, 0.015]},
        "away_s": 0.16,
        **changes,
    }


_SCHEDULE = {"max_slots": 8, "slot_length": 2048, "prefill_chunk": 256, "passes": 4}
_SCHEDULE |= {"in_flight": 6, "receives_ahead": 2}
_MODEL = {"model_type": "llama", "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 8}
_MODEL |= {"checkpoint_fingerprint": "ab" * 32, "blocks": None}


def _args(compressor):
    config = RunConfig()
    args = config.original_args() | {"model_name": "some/model", "compressor": compressor}
    return args | {"config": config.as_dict() | {"compressor": compressor}}


def _traffic(record):
    """Links and totals, of the counts that the record's links have."""
    traffic = {
        name: LinkTraffic(
            num_frames=link["tx"],
            num_tokens=link["tokens"],
            payload_bytes=link["bytes"],
            header_bytes=link["header_bytes"],
            padding_bytes=link["padding_bytes"],
        )
        for name, link in record["traffic_per_link"].items()
    }
    hidden_size, num_scored = record["model"]["hidden_size"], record["results"]["total_loss_tokens"]
    return {
        "traffic_totals": link_totals(traffic.values(), hidden_size=hidden_size, num_scored=num_scored).model_dump(),
        "traffic_per_link": {name: link_record(link, hidden_size).model_dump() for name, link in traffic.items()},
    }


def _stages(plan, times):
    return {
        "plan": [{"stage": s.stage_index, "node": s.node, "layers": [s.start, s.end]} for s in plan.stages],
        "stages": {str(s.stage_index): times for s in plan.stages},
    }


def _rank(rank):
    unknown = dict.fromkeys(("gpu", "pss_bytes", "peak_cuda_bytes", "cuda_in_use_bytes"))
    return {"rank": rank, "host": "box", "threads": 1, "peak_rss_bytes": 2**28, **unknown}


def _merged(value, changes):
    if not (isinstance(value, dict) and isinstance(changes, dict) and changes):
        return changes
    return value | {key: _merged(value.get(key), change) for key, change in changes.items()}
