"""Records as a run of four nodes would write them, made without a run."""

import numpy as np

from pipeline.partition.plan import default_plan
from pipeline.records.files import write_json
from pipeline.records.perplexity import perplexity
from pipeline.records.store import write_record

PLAN = default_plan(8, 4)
HIDDEN_SIZE = 64
TOKENS_PER_WINDOW, NUM_WINDOWS = 50, 8


def losses(change=0.0, spread=0.0, seed=0):
    """Losses of all windows; those of equal `change` and `spread` are equal."""
    base = np.random.default_rng(7).gamma(4.0, 0.8, NUM_WINDOWS * TOKENS_PER_WINDOW)
    return (base + change + spread * np.random.default_rng(seed).standard_normal(len(base))).astype(np.float32)


def write_point(folder, compressor="none", *, loss=None, nbytes=256, num_tokens=400, codec=None, **changes):
    """Write record and per-token file; returns the record's path. `nbytes` are payload bytes per token and
    link.
    """
    loss = losses() if loss is None else loss
    total_nll = float(np.sum(loss, dtype=np.float64))
    processed = 2 * len(loss)
    links = {
        link.name: {
            "bytes": nbytes * processed,
            "tokens": processed,
            "tx": NUM_WINDOWS,
            "bytes_per_token": float(nbytes),
            "bits_per_value": 8 * nbytes / HIDDEN_SIZE,
            "header_bytes": 60 * NUM_WINDOWS,
            "padding_bytes": 0,
        }
        for link in PLAN.links
    }
    times = {"device": "cpu", "compute_s": 0.8, "compress_s": 0.02, "decompress_s": 0.01, "wait_s": 0.3}
    record = {
        "run_id": "run",
        "digest": "0123456789abcdef" * 4,
        "args": {
            "model_name": "some/model",
            "dtype": "fp32",
            "load_in_8bit": False,
            "load_in_4bit": False,
            "config": {"compressor": compressor, "compressor_per_link": {}},
        },
        "results": {
            "avg_ppl": perplexity(total_nll, len(loss)),
            "total_nll": total_nll,
            "total_loss_tokens": len(loss),
            "total_processed_tokens": processed,
            "num_windows": NUM_WINDOWS,
            "num_microbatches": NUM_WINDOWS,
        },
        "traffic_totals": {
            "total_bytes": 4 * nbytes * processed,
            "bytes_per_token": float(nbytes),
            "bits_per_value": 8 * nbytes / HIDDEN_SIZE,
        },
        "traffic_per_link": links,
        "time_run_s": 2.0,
        "timed_tokens": processed,
        "tokens_per_s": processed / 2.0,
        "causal": True,
        "notes": [],
        "codecs": {name: {"name": codec or compressor} for name in links},
        "plan": [{"stage": s.stage_index, "node": s.node, "layers": [s.start, s.end]} for s in PLAN.stages],
        "stages": {str(s.stage_index): dict(times) for s in PLAN.stages},
        "one_token": {
            "stages": {
                str(s.stage_index): {"compute_s": 2e-3, "compress_s": 1e-4, "decompress_s": 1e-4} for s in PLAN.stages
            },
            "links": {name: {"payload_bytes": nbytes, "header_bytes": 60} for name in links},
        },
        "reconstruction": {name: {"relative_squared_error": 0.015} for name in links},
        "ranks": [{"rank": rank, "host": "box", "threads": 1} for rank in range(4)],
        "schedule": {"in_flight": 6, "receives_ahead": 2},
        "backend": "gloo",
        "model": {"model_type": "llama", "hidden_size": HIDDEN_SIZE, "checkpoint_fingerprint": "ab" * 32},
        "dataset": {
            "description": "a text",
            "num_tokens": num_tokens,
            "text_sha256": "cd" * 32,
            "ids_sha256": "ef" * 32,
        },
        "protocol": {
            "name": "token perplexity, sliding window",
            "max_length": 100,
            "stride": 50,
            "bos": "text",
        },
        "versions": {"python": "3.11", "torch": "2.13"},
    }
    per_token = {
        "loss": loss,
        "top1": np.argsort(np.argsort(loss)).astype(np.int32),
        "window": np.repeat(np.arange(NUM_WINDOWS, dtype=np.int32), len(loss) // NUM_WINDOWS),
    }
    return write_record(folder, record | changes, per_token)


def write_generation(folder, run_id, **changes):
    """Write the record of a run that generated; returns its path."""
    spread = {"median": 0.02, "p95": 0.04}
    record = {
        "kind": "thinwire generation",
        "schema_version": 1,
        "run_id": run_id,
        "digest": "d" * 64,
        "args": {
            "model_name": "a/model",
            "config": {"compressor": "nf4", "compressor_per_link": {}, "compressor_decode": "int8"},
        },
        "results": {
            "num_requests": 3,
            "num_failed": 1,
            "num_taken_over": 0,
            "prompt_tokens": 28,
            "generated_tokens": 12,
            "tokens_per_s": 67.4,
            "ttft_s": spread,
            "tpot_s": spread,
        },
        "traffic_per_link": {
            link.name: {"payload_bytes": 2368, "header_bytes": 144, "control_bytes": 12, "frames": 8, "tokens": 37}
            for link in PLAN.links
        },
        "codecs": {link.name: {"name": "nf4"} for link in PLAN.links},
        "ranks": [{"rank": rank, "cache_bytes": 2**20} for rank in range(PLAN.num_nodes)],
        "schedule": {"max_slots": 8, "passes": 4},
        "notes": ["something of note"],
        **changes,
    }
    path = folder / f"{run_id}.json"
    write_json(path, record)
    return path
