"""A small set of the benchmark's cases under pytest-benchmark: `pytest bench`."""

import pytest
import torch

from skiparse.bench.op import baselines, cases
from skiparse.testing import check_sample, make_problem

SMALL = cases.select("57x288x512-1h.k4.*") + cases.select("57x288x512-1h.dense.*")


@pytest.fixture(scope="module", params=SMALL, ids=lambda case: case.name)
def case_and_problem(request):
    case = request.param
    sizes = {"B": case.B, "N": case.N, "T": case.T, "H": case.heads, "D": case.D}
    return case, make_problem(case.pattern, **sizes, dtype=torch.float32)


def test_sdpa(benchmark, case_and_problem):
    case, problem = case_and_problem
    check_sample(problem, "sdpa", backward=case.backward)
    benchmark.group = "backward" if case.backward else "forward"
    benchmark.extra_info["ceiling"] = case.ceiling
    benchmark(baselines.skiparse_backend(case, problem, "sdpa").work)
