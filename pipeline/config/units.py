"""Rates, times and sizes as people write them: `10mbit`, `20ms`, `8GiB`. Case does not count, nor do spaces around.
Addresses: `127.0.0.1:8000`.

Rates are in tc's notation, whose prefixes are powers of ten. Where a number without a unit could mean several things
(a time, a size), it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.config.schema import MAX_NUMBER, ConfigError

__all__ = ["parse_address", "parse_duration", "parse_rate", "parse_size"]

_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

# Short, so that no number is read that takes long; ASCII, as \d is not.
_NUMBER = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,16})?) ?([A-Za-z]*)")


def parse_rate(text: str) -> float:
    """Bits per second of `10mbit`, or of a plain number of them. Raises ConfigError for other text, and below 1."""
    rate = _parse(text, _RATES, "a rate", "10mbit; a number alone is bit/s", alone=1.0)
    if rate < 1:
        raise ConfigError(f"a rate must be at least 1 bit/s, got {text!r}")
    return rate


def parse_duration(text: str) -> float:
    """Seconds of `20ms`; 0 needs no unit. Raises ConfigError for other text."""
    return _parse(text, _TIMES, "a time", "20ms")


def parse_size(text: str) -> int:
    """Bytes of `8GiB`, fractions of a byte left out; 0 needs no unit. Raises ConfigError for other text."""
    return int(_parse(text, _SIZES, "a size", "8GiB"))


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8000`, `localhost:8000` or `[::1]:8000`. Raises ConfigError for other text."""
    host, separator, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 2**16
    if not separator or not host or not is_port or not host.isascii() or not host.isprintable() or " " in host:
        raise ConfigError(f"{text!r} is no address: write HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000")
    return host, int(port)


def _parse(text: str, units: Mapping[str, float], what: str, example: str, *, alone: float | None = None) -> float:
    """`alone` is the unit of a number without one; None: there must be one, but for zero."""
    match = _NUMBER.fullmatch(text.strip())
    if match is not None:
        number, unit = float(match[1]), match[2].lower()
        factor = {name.lower(): size for name, size in units.items()}.get(unit)
        if not unit:
            factor = 1.0 if number == 0 else alone
        if factor is not None:
            if number * factor > MAX_NUMBER:
                raise ConfigError(f"{text!r} is too large for {what}")
            return number * factor
    raise ConfigError(f"{text!r} is not {what}: write a number and one of {', '.join(units)}, such as {example}")
