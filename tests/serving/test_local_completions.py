"""The endpoint under lm-evaluation-harness' client of such endpoints, against the harness' own model."""

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.helpers.serving import chat_model, serving
from tests.helpers.tiny_tasks import write_tasks

TASKS = ["tiny_choice", "tiny_answer"]
SLOT_LENGTH = 96


def samples_of(model, tasks_dir, **options):
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=TASKS, task_manager=manager, bootstrap_iters=0, **options)
    return {name: sorted(results["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS}


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("local") / "tasks", ("The canal was built",))


@pytest.fixture(scope="module")
def expected(tasks_dir):
    model = HFLM(pretrained=str(chat_model()), device="cpu", dtype="float64", max_length=SLOT_LENGTH)
    return samples_of(model, tasks_dir)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), "generation.max_slots=3", "generation.ignore_eos=false") as server:
        yield server


@pytest.mark.parametrize("how", [{}, {"num_concurrent": 3}, {"batch_size": 4}])
def test_local_completions_are_the_harness_own_models(server, tasks_dir, expected, how):
    model_args = {
        "model": server.model,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(chat_model()),
        "max_length": SLOT_LENGTH,
        "add_bos_token": True,
        "max_retries": 1,
        **how,
    }
    found = samples_of("local-completions", tasks_dir, model_args=model_args)
    for sample, own in zip(found["tiny_choice"], expected["tiny_choice"], strict=True):
        for (choice,), (own_choice,) in zip(sample["resps"], own["resps"], strict=True):
            assert float(choice[0]) == pytest.approx(float(own_choice[0]), abs=1e-4)
            assert choice[1] == own_choice[1]
    told = [[sample["resps"] for sample in samples["tiny_answer"]] for samples in (found, expected)]
    assert told[0] == told[1]
