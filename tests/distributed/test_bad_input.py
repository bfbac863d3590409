"""Bad input: each gets one clear message and a non-zero exit, before anything is lost."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import time

import pytest

from pipeline.records.store import read_record
from tests.helpers.launch import call_on_ranks, run_alone, run_ranks, start_ranks
from tests.helpers.patience import allowed_s
from tests.helpers.tiny_models import save_tiny_model, tiny_arguments, tiny_model

NUM_RANKS = 4
LAST_MESSAGE = re.compile(r"^(?:error|rank \d+ stops): (.*)", re.MULTILINE | re.DOTALL)


def sets(*overrides):
    return [word for override in overrides for word in ("--set", override)]


def message_of(ended, *, rank=None):
    """The one message of a process that failed; no traceback."""
    assert ended.returncode not in (0, None), ended.stdout
    assert "Traceback" not in ended.stderr, ended.stderr
    assert len(re.findall(r"^(?:error|rank \d+ stops): ", ended.stderr, re.MULTILINE)) == 1, ended.stderr
    message = LAST_MESSAGE.search(ended.stderr)
    if rank is not None:
        assert message[0].startswith(f"rank {rank} stops: ")
    return message[1].strip()


def messages_of(ended):
    return [message_of(one, rank=rank) for rank, one in enumerate(ended)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Things that are not what they should be."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "file").write_text("in the way")
    (folder / "blank.txt").write_text(" \n")
    (folder / "latin-1.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "broken.yaml").write_text("dataset: [1")
    (folder / "list.yaml").write_text("- dataset")
    (folder / "twice.yaml").write_text("dataset: {name: text}\ndataset: {stride: 32}\n")
    (folder / "empty.yaml").write_text("")
    save_tiny_model(folder / "small_vocabulary", "llama", vocab_size=200)
    for name in ("truncated", "no_tokenizer", "no_config", "no_weights", "too_few_layers", "no_json", "panics"):
        shutil.copytree(tiny_model(), folder / name)
    (folder / "no_json" / "tokenizer.json").write_text("{")
    tokenizer = folder / "panics" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["post_processor"]["special_tokens"] = {}  # the library's Rust code looks up <bos> there
    tokenizer.write_text(json.dumps(content))
    weights = folder / "truncated" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    (folder / "no_tokenizer" / "tokenizer_config.json").unlink()
    (folder / "no_config" / "config.json").unlink()
    (folder / "no_weights" / "model.safetensors").unlink()
    config = folder / "too_few_layers" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 8}))
    return folder


# Arguments behind those of a good run ({} is the folder of bad files), and what the message says.
IN_ONE_PROCESS = {
    "unknown key": (sets("dataset.strid=3"), r"unknown key dataset\.strid; did you mean dataset\.stride\?"),
    "wrong type": (sets("dataset.stride=abc"), r"dataset\.stride must be an integer, got 'abc'"),
    "out of range": (sets("batch_size=0"), r"batch_size must be at least 1, got 0"),
    "override without a value": (["--set", "stride"], r"--set 'stride': write it as KEY=VALUE"),
    "no such config": (
        ["--config", "nope.yaml"],
        r"config 'nope\.yaml' is neither a file nor in .*demo\.yaml",
    ),
    "broken YAML": (["--config", "{}/broken.yaml"], r"broken\.yaml cannot be read as YAML"),
    "a key given twice": (
        ["--config", "{}/twice.yaml"],
        r"twice\.yaml: line 2, column 1: key 'dataset' is given twice",
    ),
    "an empty config": (["--config", "{}/empty.yaml"], r"empty\.yaml is empty; it must hold keys"),
    "an octal number": (["--batch_size", "010"], r"--batch_size 010: 010 is one number to some readers"),
    "YAML without keys": (["--config", "{}/list.yaml"], r"list\.yaml holds a list, not a mapping"),
    "unknown value of a flag": (["--dtype", "int3"], r"argument --dtype: invalid choice: 'int3'"),
    "unknown flag": (["--batchsize", "3"], r"unrecognized arguments: --batchsize 3; did you mean --batch_size\?"),
    "stride beyond the window": (["--stride", "65"], r"dataset\.stride must be at most 64 .*got 65"),
    "unknown codec": (["--compressor", "int9"], r"unknown compressor 'int9', did you mean 'int8'"),
    "unknown option of a codec": (
        ["--compressor", "int4(bits=3)"],
        r"compressor 'int4' has no option 'bits' \(got 3\)",
    ),
    "missing plug-in": (["--compressor", "nomodule.x:Y"], r"cannot import module 'nomodule\.x'"),
    "unknown link": (
        sets("compressor_per_link={layer:99:node0->node1: int8}"),
        r"compressor_per_link has 'layer:99:node0->node1'; this plan's links are: embed:node0->node1, layer",
    ),
    "missing model": (
        ["--model_name", "./nope"],
        r"model\.name='\./nope': there is no such file or directory",
    ),
    "unreachable model": (["--model_name", "nobody/nothing"], r"model\.name='nobody/nothing': .*hub failed"),
    "missing package": (["--model_name", "package:nopkg/x.gguf"], r"no package 'nopkg' is installed"),
    "no model": (["--model_name", "{}/file"], r"file' is a file, but not a \.gguf file"),
    "model cut short": (
        ["--model_name", "{}/truncated"],
        r"model\.safetensors has \d+ bytes, its header announces \d+",
    ),
    "model without tokenizer": (["--model_name", "{}/no_tokenizer"], r"no tokenizer loads from "),
    "a damaged tokenizer": (["--model_name", "{}/no_json"], r"no_json/tokenizer\.json: it is damaged"),
    "a tokenizer that panics": (["--model_name", "{}/panics"], r"the tokenizer in .*panics fails on .*PanicException"),
    "a tokenizer of another model": (
        ["--model_name", "{}/small_vocabulary"],
        r"token 0 of .* is '<bos>' with id 256, but the model's vocab_size is 200.*belongs to another model",
    ),
    "model without config": (["--model_name", "{}/no_config"], r"no_config has no config\.json"),
    "model without weights": (["--model_name", "{}/no_weights"], r"no_weights holds no weights"),
    "model without some layers": (
        ["--model_name", "{}/too_few_layers"],
        r"too_few_layers stores nothing of layer 6; its config\.json has num_hidden_layers 8",
    ),
    "windows beyond the positions": (
        ["--max_length", "1024"],
        r"max_length is 1024, the model has positions for 512",
    ),
    "file in the way of results": (
        ["--exp_dir", "{}/file"],
        r"folder of the results, .*file, cannot be written to: File exists.*--exp_dir",
    ),
    "results on a read-only disk": (["--exp_dir", "/proc/x"], r"folder of the results, /proc/x, cannot be written to"),
    "empty dataset": (sets("dataset.path={}/blank.txt"), r"dataset\.path=.*blank\.txt is empty"),
    "missing dataset": (sets("dataset.path={}/nope.txt"), r"dataset\.path=.*nope\.txt cannot be read"),
    "dataset in another encoding": (sets("dataset.path={}/latin-1.txt"), r"latin-1\.txt is not UTF-8"),
    "nothing to score": (
        ["--first_k_tokens", "1"],
        r"dataset\.first_k_tokens is 1: at least 2 tokens are needed",
    ),
    "unknown device": (
        sets("runtime.device=fridge"),
        r"device 'fridge' is not one of auto, cpu, cuda, cuda:N",
    ),
    "gap between layers": (
        sets("partition.num_nodes=2", "partition.nodes=[{{layers: [[0, 3]]}}, {{layers: [[4, 6]]}}]"),
        r"partition\.nodes\[1\]: range \[4, 6\) should start at layer 3",
    ),
}


@pytest.mark.parametrize(("more", "pattern"), IN_ONE_PROCESS.values(), ids=IN_ONE_PROCESS.keys())
def test_in_one_process(more, pattern, files, tmp_path):
    more = [word.replace("{}", str(files)).replace("{{", "{").replace("}}", "}") for word in more]
    ended = run_alone(*tiny_arguments(tmp_path / "results", *more), timeout_s=60)
    if "argument" in pattern:  # argparse's own form
        assert ended.returncode == 2 and re.search(pattern, ended.stderr)
    else:
        assert re.search(pattern, message_of(ended), re.DOTALL)
    assert not (tmp_path / "results").exists() or list((tmp_path / "results").iterdir()) == []


# Arguments of single ranks behind those of all, and what every rank's message says.
ON_RANKS = {
    "another stride": (
        {2: ["--stride", "16"]},
        r"rank \d was started with another config: dataset\.stride is (16|32)",
    ),
    "another codec": (
        {1: ["--compressor", "int8"]},
        r"rank \d was started with another config: compressor is ",
    ),
    "another model": (
        {3: ["--model_name", "{}"]},
        r"rank \d was started with another checkpoint: fingerprint is ",
    ),
    "other slots": (
        {rank: ["--generate", "x", *sets(f"generation.max_slots={4 - (rank == 2)}")] for rank in range(4)},
        r"rank \d was started with another config: generation\.max_slots is [34]",
    ),
    "other drafts": (
        {rank: ["--generate", "x", *(["--draft", "ngram"] if rank == 1 else [])] for rank in range(4)},
        r"rank \d was started with another config: generation\.draft is ",
    ),
    "a missing model": (
        {1: ["--model_name", "./nope"]},
        r"rank 1, resolving the model: model\.name='\./nope'",
    ),
    "an unwritable folder": (
        {0: ["--exp_dir", "/proc/x"]},
        r"rank 0, starting: the folder of the results, /proc/x, cannot be written",
    ),
    "NCCL without GPUs": (
        dict.fromkeys(range(4), sets("runtime.backend=nccl")),
        r"backend is nccl, which needs one GPU",
    ),
    "an unknown interface": (
        dict.fromkeys(range(4), sets("runtime.interface=nope0")),
        r"interface 'nope0' \(runtime\.interface\) of \S+ is none of this machine's; there are .*lo 127\.0\.0\.1",
    ),
    "a schedule that blocks": (
        dict.fromkeys(range(4), sets("runtime.in_flight=40")),
        r"runtime\.in_flight is 40: with receives posted 2 ahead, the links of this plan hold 11 passes.*Lower runtime",
    ),
    "another number of nodes": (
        {1: sets("partition.num_nodes=2")},
        r"rank 1, .*partition\.num_nodes is 2, but torchrun",
    ),
}


@pytest.mark.parametrize(("more", "pattern"), ON_RANKS.values(), ids=ON_RANKS.keys())
def test_on_ranks(more, pattern, tmp_path):
    if "another checkpoint" in pattern:
        save_tiny_model(tmp_path / "model", "llama", seed=1)
        more = {rank: [word.replace("{}", str(tmp_path / "model")) for word in words] for rank, words in more.items()}
    ended = run_ranks([tiny_arguments(tmp_path, *more.get(rank, [])) for rank in range(NUM_RANKS)], timeout_s=60)
    for message in messages_of(ended):
        assert re.search(pattern, message, re.DOTALL)
    assert max(one.wall_s for one in ended) < allowed_s(20)  # none of them waits for a timeout
    assert list(tmp_path.glob("*.json")) == []


def test_wrong_number_of_ranks(tmp_path):
    ended = run_ranks([tiny_arguments(tmp_path)] * 2, timeout_s=60)
    for message in messages_of(ended):
        assert "partition.num_nodes is 4, but torchrun started 2 processes: use --nproc_per_node=4" in message


def test_half_an_environment(tmp_path):
    ended = run_alone(*tiny_arguments(tmp_path), env={"WORLD_SIZE": "4"})
    assert (
        message_of(ended)
        == "WORLD_SIZE is set but RANK, MASTER_ADDR, MASTER_PORT is not; start the ranks with torchrun"
    )


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        env = {
            "RANK": "0",
            "WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(other.getsockname()[1]),
        }
        ended = run_alone(*tiny_arguments(tmp_path), env=env, timeout_s=60)
    assert re.search(r"the rendezvous store 127\.0\.0\.1:\d+ cannot be opened: .*EADDRINUSE", message_of(ended))


def test_a_rank_that_never_comes(tmp_path):
    env = {"WORLD_SIZE": "4"}
    ended = run_ranks([tiny_arguments(tmp_path, *sets("runtime.load_timeout_s=3"))] * 3, env=env, timeout_s=60)
    for message in messages_of(ended):
        assert "rank 3 (not started) did not come within 3 s (runtime.load_timeout_s)" in message


def total_nll(folder):
    (path,) = folder.glob("*.json")
    return read_record(path).results.total_nll


def test_two_runs_of_one_config_at_once(tmp_path):
    """The second one is refused and leaves the first one's journal alone."""
    command = tiny_arguments(tmp_path, num_tokens=6000)
    with start_ranks([command] * NUM_RANKS) as first:
        wait_for_results(tmp_path)
        pids = first.rank_pids()
        for pid in pids.values():  # hold it where it is
            os.kill(pid, signal.SIGSTOP)
        for more in ([], ["--resume"]):
            ended = run_alone(*command, *more, timeout_s=60)
            assert "belongs to a run with the same config that is still going on" in message_of(ended)
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
        for one in first.wait(60):
            one.check()
    assert total_nll(tmp_path) > 0


def wait_for_results(folder, timeout_s=60):
    deadline = time.monotonic() + allowed_s(timeout_s)
    while not any(b'"finished"' in path.read_bytes() for path in folder.glob("*.journal")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_disk_that_fills_up(tmp_path):
    """A limit on the size of files stands in for a full disk. What was finished is kept."""
    ended = call_on_ranks(NUM_RANKS, run_on_little_disk, tiny_arguments(tmp_path / "little"), timeout_s=60)
    for message in messages_of(ended):
        assert re.search(r"rank 0, stage 4, micro-batch \d+: the journal .* cannot be written: File too large", message)
        assert "--resume" in message
    for one in run_ranks([tiny_arguments(tmp_path / "little", "--resume")] * NUM_RANKS):
        one.check()
    run_alone(*tiny_arguments(tmp_path / "large")).check()
    assert total_nll(tmp_path / "little") == total_nll(tmp_path / "large")


def run_on_little_disk(rank, command):
    import run_pipeline

    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    return run_pipeline.main(command)


def test_a_damaged_journal_is_not_taken_over(tmp_path):
    command = tiny_arguments(tmp_path)
    with start_ranks([command], distributed=False) as run:
        wait_for_results(tmp_path)
        os.kill(run.rank_pids()[0], signal.SIGKILL)
        run.wait(10)
    (path,) = tmp_path.glob("*.journal")
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1][:-1] + b"7}"
    path.write_bytes(b"\n".join(lines))
    ended = run_alone(*command, "--resume")
    assert re.search(r"\.journal, line 2, is damaged; delete the file to start over", message_of(ended))
    assert path.read_bytes() == b"\n".join(lines)
