"""Channel indices in codec options: a list in the config, or a link's entry in a calibration file.

A calibration file is JSON, `{"channels": {"<link name>": [index, ...], ...}}`, each list ordered by
importance. It is read on every rank when the codec is made, and never sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressors.base import LinkInfo
from compressors.options import option_error
from compressors.user_files import InputError, read_text, user_path

__all__ = ["channels_from_file", "check_channels"]


def check_channels(codec: str, option: str, got: Any, link: LinkInfo | None) -> list[int]:
    """`got` if it is a list of different channel indices, all below the link's hidden size."""
    width = link.hidden_size if link else 2**31
    valid = isinstance(got, Sequence) and not isinstance(got, str) and len(got) > 0
    if not valid or not all(type(c) is int and 0 <= c < width for c in got) or len(set(got)) < len(got):
        raise option_error(codec, option, got, f"a list of different channel indices below {width}")
    return list(got)


def channels_from_file(codec: str, path: str, link: LinkInfo | None) -> list[int]:
    """The list for `link` in the calibration file at `path`."""
    if link is None:
        raise option_error(codec, "calibration", path, "a calibration file needs a link (LinkInfo) to look up")
    try:
        file = Path(user_path(path))
        by_link = json.loads(read_text(file, str(file)))["channels"]
        channels = by_link[link.name]
    except InputError as e:
        raise option_error(codec, "calibration", path, f"a readable file ({e})") from e
    except (ValueError, TypeError, KeyError) as e:
        form = '{"channels": {"' + link.name + '": [index, ...]}}'
        raise option_error(codec, "calibration", path, f"JSON of the form {form} (failed with {e!r})") from e
    return check_channels(codec, "calibration", channels, link)
