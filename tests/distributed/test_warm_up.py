"""Codecs are first met by one rank of a machine: the others find the kernels that it compiled."""

from tests.helpers.launch import run_ranks
from tests.helpers.tiny_models import tiny_arguments


def test_one_rank_compiles_before_the_others(tmp_path):
    arguments = tiny_arguments(
        tmp_path, "--set", "partition.num_nodes=3", "--compressor", "tests.helpers.noting_codec:Noting"
    )
    for finished in run_ranks([arguments] * 3, env={"NOTES": str(tmp_path / "notes")}):
        finished.check()
    notes = (tmp_path / "notes").read_text().splitlines()
    for method in ("compress", "decompress"):
        order = [note for note in notes if note.endswith(f" {method}")]
        assert order[:2] == [f"0 begins {method}", f"0 ends {method}"]
        assert {note[0] for note in order[2:]} == {"1", "2"}
