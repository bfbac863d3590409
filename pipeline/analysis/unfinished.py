"""Files of a calibration that has not ended, so that the same command goes on where it was interrupted.

Each rank keeps one per link of its own, in the folder of the results: `unfinished-<link>-<digest>-<num_done>`. They are
written after the same micro-batch on all ranks, and older ones removed once all are there: whenever a rank ends, some
moment is left of which all links have a file. Whoever starts with the same digest goes on from there, on as many ranks
as it likes. What cannot be used is named and left alone; the calibration then starts anew.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from compressors.klt.calibration_file import file_name
from pipeline.analysis.gathering import Gathered
from pipeline.comm.control import Control
from pipeline.records.files import disk_problem, write_whole

__all__ = ["FORMAT", "UnfinishedFiles", "tensors_digest"]

FORMAT = "thinwire unfinished calibration 1"
SAVE_EVERY_S = 180.0
MIN_INTERVALS = 20  # of the time that a save takes, between two

logger = logging.getLogger(__name__)


class UnfinishedFiles:
    """Those of one calibration on this rank. Every rank calls `load`, `save_if_due` and `remove` at the same time.

    Args:
        folder: of the results.
        digest: of all that what is gathered depends on, the same on every rank.
    """

    def __init__(self, folder: Path, digest: str, gathered: Gathered, control: Control) -> None:
        self._folder, self._digest = folder, digest
        self._gathered, self._control = gathered, control
        self._paths: set[Path] = set()  # of this calibration
        self._due_s = time.monotonic() + SAVE_EVERY_S
        self._has_warned = False

    def load(self) -> bool:
        """Go on from the newest moment of which all links have whole files; returns whether there was one."""
        found = [self._look(link.name) for link in self._gathered.links]
        of_ranks = self._control.gather([[sorted(moments), num_others] for moments, num_others in found])
        of_links = [(set(moments), num_others) for of_rank in of_ranks for moments, num_others in of_rank]
        for num_done in sorted(set.intersection(*(moments for moments, _ in of_links)), reverse=True):
            contents = self._read(num_done)
            if all(self._control.gather(contents is not None)):
                assert contents is not None
                self._gathered.restore(num_done, contents)
                total = len(self._gathered.division.order)
                self._tell(f"going on with an interrupted calibration: {num_done} of {total} micro-batches are done")
                return True
        if any(moments or num_others for moments, num_others in of_links):
            self._tell("starting anew: the files of unfinished calibrations do not serve this one")
        return False

    def save_if_due(self) -> None:
        """Put away what was gathered, if it is some time since that was done, or it is complete.

        A disk that takes none of it is no reason to end; the files from before stay.
        """
        is_due = time.monotonic() >= self._due_s or bool(self._paths and self._gathered.is_finished)
        if not self._control.gather(is_due)[0]:
            return
        start_s = time.monotonic()
        self._control.report("saving what was gathered")
        written: set[Path] = set()
        try:
            for link in self._gathered.links:
                path = self._path(link.name, self._gathered.num_done)
                write_whole(path, self._content(link.index, link.name))
                written.add(path)
            problem = ""
        except OSError as e:
            problem = disk_problem(e)
        if problem and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "what was gathered so far cannot be saved in %s: %s; calibration goes on, but what was done since the "
                "last save, if any, would be lost in an interruption",
                self._folder,
                problem,
            )
        is_whole = not any(self._control.gather(problem))
        _unlink(self._paths - written if is_whole else written)
        self._paths = written if is_whole else self._paths - written
        now_s = time.monotonic()
        self._due_s = now_s + max(SAVE_EVERY_S, MIN_INTERVALS * (now_s - start_s))

    def remove(self) -> None:
        """The calibration is complete, on all ranks."""
        self._control.barrier()
        _unlink(self._paths)
        self._paths = set()

    def _path(self, link_name: str, num_done: int) -> Path:
        name = f"unfinished-{Path(file_name(link_name)).stem}-{self._digest[:16]}-{num_done}.safetensors"
        return self._folder / name

    def _tell(self, line: str) -> None:
        if self._control.world.rank == 0:
            print(line)

    def _look(self, link_name: str) -> tuple[set[int], int]:
        """After how many micro-batches the files of a link were written that may serve, and how many others there are.

        The others are named; what a kill cut off is removed.
        """
        stem = f"unfinished-{Path(file_name(link_name)).stem}-"
        own = stem + self._digest[:16]
        _unlink(self._folder.glob(f".{own}-*.partial"))
        moments, num_others = set(), 0
        for path in sorted(self._folder.glob(f"{stem}*.safetensors")):
            number = re.fullmatch(rf"{own}-([1-9][0-9]{{0,8}})\.safetensors", path.name)
            if number is not None and int(number[1]) <= len(self._gathered.division.order) and path.is_file():
                moments.add(int(number[1]))
                self._paths.add(path)
            else:
                num_others += 1
                logger.warning("%s is of another calibration and not used; delete it if that one is given up", path)
        return moments, num_others

    def _read(self, num_done: int) -> dict[int, dict[str, torch.Tensor]] | None:
        """What this rank's files of a moment hold, by link index; None, and a warning, where one is damaged."""
        contents = {}
        for link in self._gathered.links:
            path = self._path(link.name, num_done)
            try:
                contents[link.index] = _read(
                    path, self._facts(link.name, num_done), self._gathered.blank(link.index, num_done)
                )
            except ValueError as e:
                logger.warning("%s is not used: %s", path, e)
                return None
        return contents

    def _facts(self, link_name: str, num_done: int) -> dict[str, str]:
        return {"format": FORMAT, "link": link_name, "calibration": self._digest, "num_done": str(num_done)}

    def _content(self, link_index: int, link_name: str) -> bytes:
        tensors = {name: x.contiguous() for name, x in self._gathered.tensors(link_index).items()}
        facts = self._facts(link_name, self._gathered.num_done)
        return save(tensors, {**facts, "sha256": tensors_digest(tensors)})


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, facts: Mapping[str, str], blank: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors. Raises ValueError unless it has these facts and tensors like `blank`, as they were written."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            for key, value in facts.items():
                if told.get(key) != value:
                    raise ValueError(f"its {key} is {told.get(key)!r}, expected {value!r}")
            if set(file.keys()) != blank.keys():
                raise ValueError(f"it has tensors {sorted(file.keys())}")
            mapped = {name: file.get_tensor(name) for name in blank}  # reads nothing yet
            for name, x in mapped.items():
                if (x.dtype, x.shape) != (blank[name].dtype, blank[name].shape):
                    raise ValueError(f"its {name} is {x.dtype} {tuple(x.shape)}")
            tensors = {name: x.clone() for name, x in mapped.items()}
    except (OSError, SafetensorError, RuntimeError) as e:
        raise ValueError(f"it cannot be read ({e})") from e
    if told.get("sha256") != tensors_digest(tensors):
        raise ValueError("it is damaged")
    return tensors


def _unlink(paths: Iterable[Path]) -> None:
    """Of files that do no harm where they cannot be removed."""
    for path in list(paths):
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            logger.warning("%s cannot be removed: %s", path, disk_problem(e))
