"""A runner's name is a label, whatever it has in it."""

from __future__ import annotations

import torch

from fxpatch import PiecewiseRunner
from fxpatch.piecewise import metrics


def test_a_name_that_cannot_be_encoded_does_not_spoil_the_page() -> None:
    runner = PiecewiseRunner(torch.nn.Linear(2, 2), dynamic={"input": 0}, sizes=[2], compiler="eager")
    runner.name = 'a"b\\c\nd\ud800'
    for page in (metrics.text(), metrics.openmetrics()):
        assert b'fxpatch_piecewise_prepared{runner="a\\"b\\\\c\\nd?"} 0\n' in page.encode("utf-8")
