import pytest

from pipeline.config.schema import find_config, load_config
from pipeline.runtime.plan_report import plan_text


@pytest.mark.parametrize(("device", "logits"), [("cpu", "0.06 GiB"), ("cuda:0", "0.25 GiB")])
def test_the_plan_of_the_demo(device, logits):
    config = load_config(find_config("demo.yaml"), [("runtime.device", device)])
    rank_0, rank_1 = plan_text(config).splitlines()[-6:-4]
    assert rank_0.startswith("0  ") and logits in rank_0
    assert rank_1.startswith("1  ") and "0.00 GiB" in rank_1
