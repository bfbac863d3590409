"""From the harness' results to our record, with the harness' own JSON beside it as the harness writes it."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.generation.record import interruption_notes, recorded_link, recorded_ranks, recorded_schedule
from pipeline.models.sampling import UNCUT
from pipeline.records.base import finite_or_none, now
from pipeline.records.environment import software_versions
from pipeline.records.files import RecordError, disk_problem, write_whole
from pipeline.records.identity import digest_of, make_run_id
from pipeline.records.labels import model_label
from pipeline.records.run_record import Args
from pipeline.records.store import write_tasks
from pipeline.records.tasks_record import (
    HarnessRun,
    TaskMetric,
    TaskScores,
    TasksLink,
    TasksRecord,
    TasksTotals,
)
from pipeline.runtime.placement import balanced_layers
from pipeline.runtime.record_parts import codec_configs, emulation, planned_stages, recorded_model, stage_seconds
from pipeline.serving.harness import Worked
from pipeline.serving.harness_options import HarnessOptions

__all__ = ["FOLDER", "task_scores", "write_results"]

FOLDER = "lm_eval"  # of the harness' own files, in exp_dir


def write_results(worked: Worked, options: HarnessOptions) -> Path:
    """Write the harness' results, its samples if they are asked for, and our record; returns the latter's path.

    Raises RecordError when the disk does not take it.
    """
    ring, config = worked.ring, worked.ring.config
    digest = digest_of(
        {
            **config.numerics(balanced_layers(config, ring.deployment.plan)),
            "generation": [getattr(config.generation, key) for key in (*UNCUT, "repetition_penalty", "seed")],
            "max_length": ring.slot_length,
            "checkpoint": ring.deployment.model.weights_digest,
            "harness": [metadata.version("lm_eval"), *map(str, options.tasks), str(options.limit)],
            "num_fewshot": options.num_fewshot,
            "apply_chat_template": options.apply_chat_template,
        }
    )
    codec_names = sorted({codec.name for codec in ring.codecs.facts}) or ["unsplit"]
    run_id = make_run_id("tasks", model_label(config.model.name), "+".join(codec_names), digest[:8])
    folder = Path(config.exp_dir)
    results = {key: value for key, value in worked.result.items() if key != "samples"}
    own = folder / FOLDER / f"{run_id}.json"
    _write(own, _harness_json(results, indent=2))
    if options.log_samples:
        for name, samples in worked.result["samples"].items():
            lines = "".join(f"{_harness_json(sample)}\n" for sample in samples)
            _write(own.with_name(f"{run_id}-samples_{name}.jsonl"), lines)
    return write_tasks(folder, _record(worked, options, run_id, digest, f"{FOLDER}/{own.name}"))


def _record(worked: Worked, options: HarnessOptions, run_id: str, digest: str, results_file: str) -> TasksRecord:
    ring, reports, asking = worked.ring, worked.reports, worked.asking
    config, deployment, plan = ring.config, ring.deployment, ring.deployment.plan
    sent = {name: traffic for report in reports for name, traffic in report["sent"].items()}
    return TasksRecord(
        run_id=run_id,
        digest=digest,
        finished_at=now(),
        args=Args.from_plain(config.original_args() | {"config": config.as_dict()}),
        harness=HarnessRun(
            version=metadata.version("lm_eval"),
            tasks=options.tasks,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            apply_chat_template=options.apply_chat_template,
            max_length=ring.slot_length - 1,
            results_file=results_file,
        ),
        tasks=task_scores(worked.result),
        totals=TasksTotals(
            num_requests=asking.num_requests,
            prompt_tokens=asking.num_prompt_tokens,
            scored_tokens=asking.num_scored_tokens,
            generated_tokens=asking.num_generated_tokens,
        ),
        traffic_per_link={
            link.name: _link(sent[link.name], deployment.model.config.hidden_size) for link in plan.links
        },
        time_run_s=max(report["run_s"] for report in reports) + worked.earlier_s,
        codecs=codec_configs(plan, ring.codecs),
        codecs_decode=codec_configs(plan, ring.decode_codecs),
        plan=planned_stages(plan),
        stages=stage_seconds(reports),
        ranks=recorded_ranks(reports),
        schedule=recorded_schedule(ring),
        interruptions=worked.interruptions,
        backend=deployment.backend,
        emulation=emulation(config, plan, ring.emulated_links),
        model=recorded_model(config, deployment),
        notes=(*deployment.model.notes, *ring.notes, *interruption_notes(worked.interruptions)),
        versions=software_versions() | {"lm_eval": metadata.version("lm_eval")},
        environment=dict(deployment.environment),
    )


def task_scores(results: Mapping[str, Any]) -> tuple[TaskScores, ...]:
    """Of the harness' results with samples, by task; groups, which are means over tasks, are left to its own file."""
    return tuple(_scores(name, results) for name in results["samples"])


def _scores(name: str, results: Mapping[str, Any]) -> TaskScores:
    scores, samples = results["results"][name], results["samples"][name]
    filters = dict.fromkeys(sample["filter"] for sample in samples)
    by_filter = {key: [sample for sample in samples if sample["filter"] == key] for key in filters}
    first = next(iter(by_filter.values()))
    # The harness' `prompt_hash` is of the first choice's context alone.
    hashes = "".join(s["doc_hash"] + s["target_hash"] + _harness_json(s["arguments"], sort_keys=True) for s in first)
    metrics = []
    for key, value in scores.items():
        metric, _, filter_key = key.rpartition(",")
        if filter_key in by_filter and not metric.endswith("_stderr") and _is_number(value):
            told = results["higher_is_better"].get(name, {}).get(metric)
            stderr = scores.get(f"{metric}_stderr,{filter_key}")
            metrics.append(
                TaskMetric(
                    name=metric,
                    filter=filter_key,
                    value=finite_or_none(float(value)),
                    stderr=finite_or_none(float(stderr)) if _is_number(stderr) else None,
                    higher_is_better=told if isinstance(told, bool) else None,
                    samples=_averaged([sample.get(metric) for sample in by_filter[filter_key]], float(value)),
                )
            )
    return TaskScores(
        name=name,
        version=str(results["versions"].get(name)),
        num_fewshot=int(results["n-shot"].get(name) or 0),
        num_samples=len(first),
        docs_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        metrics=tuple(metrics),
    )


def _averaged(values: Sequence[Any], score: float) -> tuple[float, ...] | None:
    """As numbers, if it is these whose mean the score is."""
    if not values or not all(map(_is_number, values)):
        return None
    numbers = tuple(float(value) for value in values)
    if not all(map(math.isfinite, numbers)):
        return None
    return numbers if math.isclose(statistics.fmean(numbers), score, rel_tol=1e-6, abs_tol=1e-9) else None


def _is_number(value: Any) -> bool:
    is_numpys = hasattr(value, "dtype") and getattr(value, "shape", None) == ()
    return is_numpys or isinstance(value, (bool, int, float))


def _link(sent: Mapping[str, int], hidden_size: int) -> TasksLink:
    num_values = sent["num_tokens"] * hidden_size
    bits = 8 * sent["payload_bytes"] / num_values if num_values else None
    return TasksLink(**recorded_link(sent).model_dump(), bits_per_value=bits)


def _harness_json(value: Any, **options: Any) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **options)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as e:
        raise RecordError(f"the harness' results {path} cannot be written: {disk_problem(e)}") from e
