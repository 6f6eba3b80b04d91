"""The surroundings of a run are afterwards what they were."""

from __future__ import annotations

import torch

from clipdefense.training.runtime import deterministic


def test_deterministic_algorithms_that_only_warn_do_so_again_afterwards() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
