"""What every refusal of a layer is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fxpatch.errors import FxPatchError, LayerError


def assert_refused(call: Callable[[], object], message: str) -> None:
    """A LayerError that says this, which is a ValueError and one of ours."""
    with pytest.raises(LayerError) as error:
        call()
    assert message in str(error.value)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, FxPatchError)
