"""The plug-in that serving engines load in each of their processes: it installs fxpatch there.

An engine starts its workers itself, with `spawn`, `fork`, Ray or by an executor of its own, so a `fxpatch.install()` in
the script that starts the engine reaches none of them. The engines have entry points for this:

    vllm.general_plugins            vLLM 0.33.0, `vllm/plugins/__init__.py`: `load_general_plugins()`, in every process;
                                    what a plug-in raises ends that process
    sglang.srt.plugins              SGLang 0.5.23, `sglang/srt/plugins/__init__.py`: `load_plugins()`, in every process;
                                    what a plug-in raises is logged
    sglang.multimodal_gen.plugins   SGLang 0.5.23, `sglang/multimodal_gen/runtime/platforms/plugins.py`: the same for
                                    diffusion; a name that two packages have ends the process

All of them call the function without arguments, once per process or more often. A process that forks hands what is
installed to its children. Others (Ray, torchrun, `multiprocessing`) need no plug-in: `autoload` is torch's own.

`autoload` waits for Dynamo; this one acts at once, and says aloud why it leaves a device alone, since somebody has put
an engine there. Both give way to an explicit `install()`, earlier or later; `FXPATCH_AUTOLOAD=0` turns both off.
"""

from __future__ import annotations

import logging

from fxpatch.autoload import install_unasked, turned_off


def install_in_worker() -> None:
    """The entry point. Without a PrivateUse1 device (on a CUDA machine) it waits for a vendor's package that may never
    come, and does nothing. Never raises: an engine's worker does not die of us."""
    if not turned_off():
        install_unasked(refusals=logging.WARNING)
