import pytest

from pipeline.comm.emulation import Conditions
from pipeline.config.reading import find_config, load_config
from pipeline.config.schema import ConfigError
from pipeline.runtime.plan_report import plan_run, plan_text


@pytest.mark.parametrize(("device", "logits"), [("cpu", "0.06 GiB"), ("cuda:0", "0.25 GiB")])
def test_the_plan_of_the_demo(device, logits):
    config = load_config(find_config("demo.yaml"), [("runtime.device", device)])
    text = plan_text(plan_run(config))
    rank_0, rank_1 = text[text.index("rank  ") :].splitlines()[1:3]
    assert rank_0.startswith("0  ") and logits in rank_0
    assert rank_1.startswith("1  ") and "0.00 GiB" in rank_1
    # 7 and 8 layers with keys and values of 3 heads of 64 dimensions, in float32
    assert "to generate: 8 slots of 2048 tokens, 0.70 GiB of cache on all ranks" in text  # 30 layers
    assert rank_0.endswith("  10752 bytes a slot and token") and rank_1.endswith("  12288 bytes a slot and token")


def test_the_plan_says_that_sliding_layers_keep_whole_sequences():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    words = "the cache of layers with a sliding window has room for whole sequences too"
    for window, is_said in ((8, True), (None, False)):
        architecture = {"model_type": "mistral", "sliding_window": window, "vocab_size": 64, "head_dim": 8} | sizes
        overrides = [("model.name", "some/model"), ("model.architecture", architecture), ("partition.num_nodes", 1)]
        assert (words in plan_text(plan_run(load_config(find_config("demo.yaml"), overrides)))) is is_said


def test_the_network_of_a_config_is_that_of_its_own_links():
    def network(**own):
        links = [("links.delay", "20ms"), ("links_per_link", own)] if own else []
        return plan_run(load_config(find_config("demo.yaml"), links)).network

    assert network() is None
    far = Conditions(delay_s=0.02)
    thin = Conditions(bits_per_s=1e6, delay_s=0.02)
    assert network(**{"layer:10:node1->node2": {"rate": "1mbit"}}) == (far, thin, far, far)
    with pytest.raises(ConfigError, match="links_per_link has 'layer:9:node1->node2'; this plan's links are: layer:2"):
        network(**{"layer:9:node1->node2": {"rate": "1mbit"}})


def test_emulated_links_have_room_for_all_passes_and_names_of_the_plan():
    def buffers(*overrides):
        text = plan_text(plan_run(load_config(find_config("demo.yaml"), overrides)))
        return float(text[text.index("rank  ") :].splitlines()[2].split()[3])

    # Two frames being sent; two received by default, six where a network is emulated: as many as passes
    large = ("batch_size", 64)
    assert buffers(("links.delay", "20ms"), large) == pytest.approx(2 * buffers(large), rel=0.1)
