"""Does backward stop at the lowest trained layer under an engine of any stage, too?"""

from tests.distributed.spawn import run_ranks


def test_an_engine_of_any_stage_computes_no_more_in_backward_than_autograd_alone():
    report = run_ranks("tests.distributed.depth_workers:flops_under_engines", 1)
    assert len(report) == 24
    for entry in report:
        assert entry["found"] == entry["expected"], entry


def test_two_ranks_choose_and_reselect_by_depth_as_one_does():
    alone = run_ranks("tests.distributed.depth_workers:choices_by_depth", 1)
    together = run_ranks("tests.distributed.depth_workers:choices_by_depth", 2)
    assert together == alone
    deepest = [entry["depth"]["lowest_layer"] for entry in alone]
    # Of three layers: all of them, fewer for their operations, the uppermost, and those above 1.2.
    assert deepest[0] <= deepest[1] <= deepest[2] == 2
    assert deepest[3] == 2
    for entry in alone:
        assert entry["changed"]
        assert entry["reselected"] == entry["digest"], "the same data and weights choose the same"
