"""What vLLM and SGLang do with plug-ins, as far as a plug-in can tell: for processes that have neither.

Written after the published loaders, which `test_engine_plugins.py` runs instead where `FXPATCH_ENGINES_PYTHON` names a
Python that has them. What is kept of each: the entry points' group, the variable that lists allowed names, that a
second call does nothing, and what becomes of a plug-in that raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.metadata import entry_points

log = logging.getLogger("published_loaders")


class Loader:
    """One engine's loader.

    Args:
        group: of entry points.
        variable: environment variable with the allowed names, parted by commas.
        survives: whether what a plug-in raises is logged; otherwise it ends the process.
    """

    def __init__(self, group: str, variable: str, *, survives: bool) -> None:
        self.group, self.variable, self.survives = group, variable, survives
        self._loaded = False

    def load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        allowed = os.environ.get(self.variable)
        names = {name.strip() for name in allowed.split(",")} if allowed else None
        plugins: dict[str, Callable[[], object]] = {}
        for found in entry_points(group=self.group):
            if names is not None and found.name not in names:
                continue
            try:
                plugins[found.name] = found.load()
            except Exception:
                log.exception("%s does not load", found.name)
        for name, call in plugins.items():
            try:
                call()
            except Exception:
                if not self.survives:
                    raise
                log.exception("%s fails", name)

    def again(self) -> None:
        """As another process that was forked before it had loaded any."""
        self._loaded = False
        self.load()


def published(engine: str) -> Loader:
    """vLLM 0.33.0, `vllm/plugins/__init__.py`; SGLang 0.5.23, `sglang/srt/plugins/__init__.py`, and for diffusion
    `sglang/multimodal_gen/runtime/platforms/plugins.py`."""
    if engine == "vllm":
        return Loader("vllm.general_plugins", "VLLM_PLUGINS", survives=False)
    group = "sglang.srt.plugins" if engine == "sglang" else "sglang.multimodal_gen.plugins"
    return Loader(group, "SGLANG_PLUGINS", survives=True)


class _Vllm:
    def __init__(self) -> None:
        import vllm.plugins

        self._module = vllm.plugins

    def load(self) -> None:
        self._module.load_general_plugins()

    def again(self) -> None:
        self._module.plugins_loaded = False
        self.load()


class _Sglang:
    def __init__(self) -> None:
        import sglang.srt.plugins

        self._module = sglang.srt.plugins

    def load(self) -> None:
        self._module.load_plugins()

    def again(self) -> None:
        self._module._plugins_loaded = False
        self.load()


class _Diffusion:
    def __init__(self) -> None:
        from sglang.multimodal_gen.runtime.platforms import plugins

        self._module = plugins

    def load(self) -> None:
        self._module.load_plugins()

    def again(self) -> None:
        self._module._reset_lifecycle_for_tests()
        self.load()


def real(engine: str) -> _Vllm | _Sglang | _Diffusion:
    """The engine's own."""
    return {"vllm": _Vllm, "sglang": _Sglang, "diffusion": _Diffusion}[engine]()
