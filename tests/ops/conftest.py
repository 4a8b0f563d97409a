"""What the tests of the ops share."""

import pytest
import torch

from peft_fused.ops.cases import OPS


@pytest.fixture
def kept_for_backward():
    """case -> what autograd keeps of its call: names of the case's tensors, and shapes of others, in order."""

    def kept(case):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            case.call(OPS[case.op].fn)
        known = {t.data_ptr(): name for name, t in case.tensors.items() if t is not None}
        return sorted(known.get(t.data_ptr(), str(tuple(t.shape))) for t in tensors)

    return kept
