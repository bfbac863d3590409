"""What links carried: counts that add up; ratios are taken once, at the end.

Payload bytes are a codec's bytes (what the original benchmark calls bytes), header bytes the frames' headers; a token
counts each time that it crosses, window overlap included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pipeline.records.run_record import LinkTotals, RunLink

__all__ = ["LinkTraffic", "link_record", "link_totals"]


@dataclass
class LinkTraffic:
    """What one link carried. All counts are exact and add up; `control_bytes` are those of frames without a payload."""

    num_frames: int = 0
    num_tokens: int = 0
    payload_bytes: int = 0
    header_bytes: int = 0
    padding_bytes: int = 0
    control_bytes: int = 0

    def add(
        self, *, num_tokens: int, payload_bytes: int, header_bytes: int, padding_bytes: int = 0, num_frames: int = 1
    ) -> None:
        """Count one frame, or several."""
        self.num_frames += num_frames
        self.num_tokens += num_tokens
        self.payload_bytes += payload_bytes
        self.header_bytes += header_bytes
        self.padding_bytes += padding_bytes

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def link_record(traffic: LinkTraffic, hidden_size: int) -> RunLink:
    """One link's part of a record, of a link that tokens have crossed."""
    return RunLink(
        bytes=traffic.payload_bytes,
        tokens=traffic.num_tokens,
        tx=traffic.num_frames,
        bytes_per_token=traffic.payload_bytes / traffic.num_tokens,
        bits_per_value=8 * traffic.payload_bytes / (traffic.num_tokens * hidden_size),
        header_bytes=traffic.header_bytes,
        padding_bytes=traffic.padding_bytes,
    )


def link_totals(links: Iterable[LinkTraffic], *, hidden_size: int, num_scored: int) -> LinkTotals:
    """Sums over links."""
    total = LinkTraffic()
    for traffic in links:
        for name, count in traffic.as_dict().items():
            setattr(total, name, getattr(total, name) + count)
    tokens, payload_bytes = total.num_tokens, total.payload_bytes
    return LinkTotals(
        total_bytes=payload_bytes,
        total_tokens=tokens,
        total_tx=total.num_frames,
        bytes_per_token=payload_bytes / tokens if tokens else None,
        bits_per_value=8 * payload_bytes / (tokens * hidden_size) if tokens else None,
        payload_bytes_per_scored_token=payload_bytes / num_scored if num_scored else None,
        header_bytes=total.header_bytes,
        padding_bytes=total.padding_bytes,
    )
