"""What an engine's page of metrics says of its load."""

import pytest

from proxy.balancer import gauges
from proxy.balancer.gauges import Gauges, Seen

PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 400.0
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.7e+09
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="1",num_gpu_blocks="1000"} 1.0
"""


def gauged(**figures: float) -> Gauges:
    return Gauges(**{"running": 0, "waiting": 0, "kv_usage": 0, "queries": 0, "hits": 0, "capacity": 0, **figures})


def test_the_figures_of_all_ranks_are_read():
    assert gauges.read(PAGE) == Gauges(5, 7, 0.5, 1000, 400, 32000)


@pytest.mark.parametrize("page", ["", "<html>", "process_cpu_seconds_total 3.0\n", "vllm:num_requests_waiting 3"])
def test_a_page_of_something_else_says_nothing(page):
    assert gauges.read(page) is None


@pytest.mark.parametrize("value", ["NaN?", "-5", ""])
def test_a_figure_that_is_none_counts_as_zero(value):
    page = f"vllm:num_requests_running {value}x\nvllm:num_requests_running 0.0\n"
    assert gauges.read(page) == gauged()


def test_requests_that_are_not_ours_are_those_of_others():
    told = gauges.judge(gauged(running=10, waiting=3), 5, Seen(), Seen(), 0.0)
    assert (told.foreign, told.waiting) == (8, 3)
    assert gauges.judge(gauged(running=2), 5, Seen(), Seen(), 0.0).foreign == 0


def test_guesses_that_come_true_are_trusted_and_others_less_and_less():
    wrong = right = 0.0
    for look in range(1, 30):
        before, now = look - 1.0, float(look)
        wrong = gauges.judge(
            gauged(), 0, Seen(now, 0, now, 0.8 * now), Seen(before, 0, before, 0.8 * before), wrong
        ).distrust
        right = gauges.judge(
            gauged(), 0, Seen(now, 0.8 * now, now, 0.8 * now), Seen(before, 0.8 * before, before, 0.8 * before), right
        ).distrust
    assert wrong > 0.99
    assert right == 0.0


def test_where_nothing_was_expected_nothing_is_judged():
    assert gauges.judge(gauged(), 0, Seen(100, 0, 100, 1), Seen(), 0.3).distrust == pytest.approx(0.3)
