"""One point of a table or chart: a record, and what it is compared with.

Made by `results`. Nothing is formatted here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.records.labels import chain_names, network_text, slowdown_text
from pipeline.records.run_record import RunRecord
from pipeline.report.prediction import PipelineCosts, predicted_run_s
from pipeline.report.quality import Quality

__all__ = ["PHASES", "LinkFigures", "MeasuredPoint", "is_uncompressed"]

PHASES = ("compute", "importance", "encode", "decode", "wait")


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """What one link carried: payload bytes per token, and all bytes sent (headers and padding too) in how many frames.
    `error` is the relative squared error of the reconstruction, None where it was not measured.
    """

    bytes_per_token: float
    sent_bytes: int
    num_frames: int
    error: float | None


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """One record, its quality against the setting's baseline, and what a prediction needs.

    `codecs` and `emulated` say what was on the links, and what was emulated: nothing where it is empty.
    `quality` is None where there is no baseline or a per-token file cannot be used; `quality_note` says why, and
    `unread` tells the second case. `ppl_change` (0.01: 1%) is against the baseline, NaN or infinity where losses are
    not finite, None without a baseline and where `unread`. `elsewhere` says what this point ran on where the baseline
    ran on something else, which may change losses.
    `costs` is None where there is no link, or no time was taken (all was finished before a resumed run
    began).

    The properties are what has to be worked out of the record to be shown.
    """

    record: RunRecord
    codecs: str
    emulated: str
    quality: Quality | None
    quality_note: str
    unread: bool
    elsewhere: str
    costs: PipelineCosts | None
    ppl_change: float | None

    @property
    def label(self) -> str:
        return f"{self.codecs} {self.emulated}".rstrip()

    @property
    def network(self) -> str:
        """Rates and delays that were emulated, link by link where they differ."""
        return network_text(self.record.emulation, chain_names(self.record))

    @property
    def slowdown(self) -> str:
        return slowdown_text(self.record.emulation)

    @property
    def predicted_tokens_per_s(self) -> float | None:
        """Of the whole run on the network that was emulated, beside `RunRecord.tokens_per_s`; None without one."""
        seconds = predicted_run_s(self.record)
        return (self.record.timed_tokens or 0) / seconds if seconds else None

    @property
    def predicted_over_measured(self) -> float | None:
        predicted, measured = self.predicted_tokens_per_s, self.record.tokens_per_s
        return None if predicted is None or not measured else predicted / measured

    @property
    def ppl(self) -> float | None:
        return self.record.results.avg_ppl

    @property
    def bytes_per_token(self) -> float | None:
        return self.record.traffic_totals.bytes_per_token

    @property
    def bits_per_value(self) -> float | None:
        return self.record.traffic_totals.bits_per_value

    @property
    def uncompressed(self) -> bool:
        return is_uncompressed(self.record)

    @property
    def causal(self) -> bool:
        return self.record.causal

    @property
    def encode_us_per_token(self) -> float | None:
        """Importance included; None where nothing crossed a link while time was taken."""
        return self._us_per_crossing("encode", "importance")

    @property
    def decode_us_per_token(self) -> float | None:
        return self._us_per_crossing("decode")

    @property
    def worst_error(self) -> float | None:
        """The largest of the links' relative squared errors."""
        return max((link.error for link in self.links.values() if link.error is not None), default=None)

    @property
    def links(self) -> dict[str, LinkFigures]:
        errors = self.record.reconstruction or {}
        return {
            name: LinkFigures(
                bytes_per_token=link.bytes_per_token,
                sent_bytes=link.bytes + link.header_bytes + link.padding_bytes,
                num_frames=link.tx,
                error=errors[name].relative_squared_error if name in errors else None,
            )
            for name, link in self.record.traffic_per_link.items()
        }

    @property
    def stage_seconds(self) -> dict[int, dict[str, float]]:
        """Seconds by stage and phase (`PHASES`)."""
        return {
            int(index): {
                "compute": seconds.compute_s,
                "importance": seconds.importance_s,
                "encode": seconds.compress_s,
                "decode": seconds.decompress_s,
                "wait": seconds.wait_s,
            }
            for index, seconds in self.record.stages.items()
        }

    def _us_per_crossing(self, *phases: str) -> float | None:
        """Microseconds of all stages, per token and link that it crossed."""
        crossings = (self.record.timed_tokens or 0) * len(self.record.traffic_per_link)
        seconds = sum(times[phase] for times in self.stage_seconds.values() for phase in phases)
        return 1e6 * seconds / crossings if crossings else None


def is_uncompressed(record: RunRecord) -> bool:
    """Whether no link compresses, or there is none."""
    return all(codec.name == "none" for codec in record.codecs.values())
