"""Does backward stop at the lowest trained layer under an engine of any stage, too?"""

from tests.distributed.spawn import run_ranks


def test_an_engine_of_any_stage_computes_no_more_in_backward_than_autograd_alone():
    report = run_ranks("tests.distributed.depth_workers:flops_under_engines", 1)
    assert len(report) == 24
    for entry in report:
        assert entry["found"] == entry["expected"], entry
