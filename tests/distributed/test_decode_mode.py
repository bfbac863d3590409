"""A text scored through the cache, frame by frame as generation sends it, has the windowed perplexity."""

import json
import os
import signal
import time

import pytest

from pipeline.records.store import read_per_token, read_record
from tests.distributed.test_calibrate import main_on_rank
from tests.helpers.launch import call_on_ranks, run_alone, run_ranks, start_ranks
from tests.helpers.patience import allowed_s
from tests.helpers.tiny_models import MODEL_TYPES, tiny_arguments, tiny_model, write_text

DECODE = ("--set", "evaluation.mode=decode")


def outcome(exp_dir):
    (path,) = exp_dir.glob("*.json")
    return read_record(path), read_per_token(path)["loss"].tobytes()


def score(exp_dir, *more, num_ranks=1, num_tokens=200, **options):
    words = tiny_arguments(exp_dir, *more, num_tokens=num_tokens, **options)
    (run_alone(*words) if num_ranks == 1 else run_ranks([words] * num_ranks)[0]).check()
    return outcome(exp_dir)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    text = write_text(folder / "text", 64 * 13 + 20)
    settings = (f"model.name={tiny_model()}", "dataset.name=text", f"dataset.path={text}", "dataset.max_length=64")
    words = [word for setting in (*settings, "runtime.threads=1") for word in ("--set", setting)]
    call_on_ranks(1, main_on_rank, ["--out", str(folder / "files"), *words], distributed=False)[0].check()
    return folder / "files"


CODECS = ("none", "int4", "nf4", "hadamard(int4)")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_is_the_windowed_perplexity_in_fp64(model_type, tmp_path):
    """Same losses, and payload bytes: every token crosses every link once."""
    sweep = tmp_path / "codecs.yaml"
    sweep.write_text(json.dumps({"name": "codecs", "points": [{"compressor": codec} for codec in CODECS]}))

    def score_all(name, *more):
        words = ("--dtype", "fp64", "--sweep", str(sweep), *more)
        run_alone(*tiny_arguments(tmp_path / name, *words, num_tokens=200, model_type=model_type)).check()
        found = {}
        for path in (tmp_path / name).glob("*.json"):
            record = read_record(path)
            found[record.args.config.compressor] = record, read_per_token(path)["loss"].tobytes()
        assert found.keys() == set(CODECS)
        return found

    windows = score_all("windows")
    for name, chunk, batch in (("one", 1, 1), ("seven", 7, 3)):
        more = ("--set", f"evaluation.decode_chunk={chunk}", "--batch_size", str(batch))
        for codec, (decoded, decoded_loss) in score_all(name, *DECODE, *more).items():
            record, loss = windows[codec]
            assert decoded_loss == loss, (name, codec)
            for link, traffic in record.traffic_per_link.items():
                other = decoded.traffic_per_link[link]
                assert (other.bytes, other.tokens) == (traffic.bytes, traffic.tokens)
                assert other.tx > traffic.tx and other.header_bytes > traffic.header_bytes
            assert (decoded.protocol.mode, record.protocol.mode) == ("decode", "window")


@pytest.mark.parametrize("wrap", ["true", "false"])
def test_four_ranks_with_klt(wrap, calibration, tmp_path):
    """Its token ids come with the frames, and count."""
    codec = f"klt(calibration={calibration}, step=0.5)" if wrap == "true" else "nf4"
    shared = ("--dtype", "fp64", "--compressor", codec, "--set", f"partition.wrap={wrap}")
    record, loss = score(tmp_path / "windows", *shared, "--set", "measure_error=true", num_ranks=4)
    assert len(record.reconstruction) == len(record.traffic_per_link)
    decoded, decoded_loss = score(tmp_path / "decode", *shared, *DECODE, num_ranks=4)
    assert decoded_loss == loss
    for link, traffic in decoded.traffic_per_link.items():
        assert traffic.bytes >= record.traffic_per_link[link].bytes + 2 * traffic.tokens


def test_klt_generates_alike_alone_and_beside_others(calibration, tmp_path):
    """Three prompts at once on four ranks, and each alone in one process."""
    prompts = ["The canal", "Once upon a time there was", "a"]
    settings = ("model.dtype=fp64", "generation.max_new_tokens=12", "generation.ignore_eos=true", "runtime.threads=1")
    settings += ("generation.max_length=128", "generation.prefill_chunk=8")
    codec = f"klt(calibration={calibration}, step=0.5)"
    words = ["--model_name", str(tiny_model()), "--compressor", codec]
    words += [word for setting in settings for word in ("--set", setting)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    run_ranks([[*words, "--exp_dir", str(tmp_path / "all"), "--generate", str(file)]] * 4)[0].check()
    together = read_answers(tmp_path / "all")
    for number, prompt in enumerate(prompts, 1):
        run_alone(*words, "--exp_dir", str(tmp_path / str(number)), "--generate", prompt).check()
        assert read_answers(tmp_path / str(number))[1] == together[number]


def read_answers(folder):
    (path,) = folder.glob("answers-*.jsonl")
    return {line["line"]: line["token_ids"] for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize("wrap, nbytes", [("true", 36), ("false", 38)])
def test_a_token_costs_what_it_costs_in_an_answer(wrap, nbytes, tmp_path):
    """64 values in 4 bits with a scale; without wrap, ids of 2 bytes come along to the head."""
    shared = ("--compressor", "nf4", "--set", f"partition.wrap={wrap}")
    record, _ = score(tmp_path / "decode", *shared, *DECODE, num_ranks=4)
    words = ["--model_name", str(tiny_model()), "--exp_dir", str(tmp_path / "answers"), *shared]
    words += ["--generate", "The canal", "--set", "generation.max_new_tokens=4", "--set", "runtime.threads=1"]
    run_ranks([words] * 4)[0].check()
    (path,) = (tmp_path / "answers").glob("*-generation-*.json")
    answered = json.loads(path.read_text())["traffic_per_link"]
    for link, traffic in record.traffic_per_link.items():
        assert traffic.bytes == nbytes * traffic.tokens
        assert answered[link]["bytes_per_token"] == nbytes


def test_interrupted_and_resumed(tmp_path):
    slow = "tests.helpers.bad_codecs:SlowToSend(seconds=0.02)"
    words = tiny_arguments(tmp_path / "out", *DECODE, "--compressor", slow, num_tokens=400)
    with start_ranks([words] * 4) as ranks:
        while not any(p.read_bytes().count(b'{"finished"') >= 2 for p in (tmp_path / "out").glob("*.journal")):
            assert ranks.rank_pids(), ranks.rank_stderr(0)
            time.sleep(0.01)
        for pid in ranks.rank_pids().values():
            os.kill(pid, signal.SIGTERM)
        ranks.wait(allowed_s(30))
    run_ranks([[*words, "--resume"]] * 4)[0].check()
    resumed, loss = outcome(tmp_path / "out")
    whole, whole_loss = score(tmp_path / "whole", *DECODE, "--compressor", slow, num_ranks=4, num_tokens=400)
    assert loss == whole_loss and resumed.resumed.num_sessions == 2
    assert resumed.traffic_per_link == whole.traffic_per_link


def test_codecs_that_need_importance_are_refused(tmp_path):
    codec = "token_mixed(metric=norm, fraction=0.25, high=int8, low=int4)"
    finished = run_alone(*tiny_arguments(tmp_path, *DECODE, "--compressor", codec, num_tokens=200))
    assert finished.returncode != 0 and "which evaluation.mode=decode does not compute" in finished.stderr
