"""What links carried: counts that add up; ratios are taken once, at the end. Plain Python.

Payload bytes are a codec's bytes (what the original benchmark calls bytes), header bytes the frames' headers; a token
counts each time that it crosses, window overlap included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LinkTraffic", "per_link_record", "traffic_totals"]


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


def per_link_record(traffic: LinkTraffic, hidden_size: int) -> dict[str, Any]:
    """One link's entry of a record: the original benchmark's keys (bytes are payload bytes), then ours."""
    values = traffic.num_tokens * hidden_size
    return {
        "bytes": traffic.payload_bytes,
        "tokens": traffic.num_tokens,
        "tx": traffic.num_frames,
        "bytes_per_token": traffic.payload_bytes / traffic.num_tokens if traffic.num_tokens else None,
        "bits_per_value": 8 * traffic.payload_bytes / values if values else None,
        "header_bytes": traffic.header_bytes,
        "padding_bytes": traffic.padding_bytes,
    }


def traffic_totals(links: Mapping[str, LinkTraffic], *, hidden_size: int, num_scored: int) -> dict[str, Any]:
    """Sums over links. `bytes_per_token` is per link crossing, `payload_bytes_per_scored_token` is not."""
    total = LinkTraffic()
    for traffic in links.values():
        for name, count in traffic.as_dict().items():
            setattr(total, name, getattr(total, name) + count)
    per_link = per_link_record(total, hidden_size)
    return {
        "total_bytes": total.payload_bytes,
        "total_tokens": total.num_tokens,
        "total_tx": total.num_frames,
        "bytes_per_token": per_link["bytes_per_token"],
        "bits_per_value": per_link["bits_per_value"],
        "payload_bytes_per_scored_token": total.payload_bytes / num_scored if num_scored else None,
        "header_bytes": total.header_bytes,
        "padding_bytes": total.padding_bytes,
    }
