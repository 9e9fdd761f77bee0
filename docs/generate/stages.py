"""The picture of a compilation: the stages of `torch.compile`, and at each the patches that touch it.

A patch stands at the stages whose modules its record names, as targets or as modules it waits for. Four records name no
module of torch's: what they touch is the device's, and they stand where it is used.
"""

from __future__ import annotations

from fxpatch.patching import Patch
from generate.patches import all_patches
from generate.svg import AMBER, BLUE, GREEN, Box, Picture

# stage -> (what happens there, the modules of torch that are it); a patch is at the first stage that fits
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Eager": ("operators, modules", ("torch._C", "torch.nn.attention")),
    "Operators": ("schemas and fake kernels", ("torch._library", "torch.library")),
    "Dynamo": ("bytecode to graph", ("torch._dynamo",)),
    "FX": ("graph to source", ("torch.fx",)),
    "AOTAutograd": ("forward and backward", ("torch._prims", "torch._functorch")),
    "Inductor": ("kernels, and their cache", ("torch._inductor",)),
}
WITHOUT_MODULES = {
    "portable-pickles": "Eager",
    "isinstance-in-compiled-code": "Dynamo",
    "device-module": "Dynamo",
    "fake-kernels": "Operators",
}
WIDTH, COLUMN, CHIP = 1000, 152, 34


def stage_of(patch: Patch[object]) -> str:
    """The stage that a patch touches; a KeyError for a record that fits none, which then needs a place here."""
    named = [*patch.waits_for, *(target.module for target in patch.targets)]
    for stage, (_, prefixes) in STAGES.items():
        if any(name == prefix or name.startswith(prefix + ".") for name in named for prefix in prefixes):
            return stage
    return WITHOUT_MODULES[patch.name]


def draw() -> str:
    """The picture as SVG."""
    at: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for patch in all_patches():
        at[stage_of(patch)].append(patch.name)
    tallest = max(len(names) for names in at.values())
    picture = Picture(WIDTH, 110 + tallest * (CHIP + 8) + 10, "The stages of torch.compile, and the patches at each")
    for number, (stage, (what, _)) in enumerate(STAGES.items()):
        box = Box(20 + number * (COLUMN + 10), 20, COLUMN, 60)
        picture.box(box, stage, (what,), colours=BLUE)
        if number:
            picture.across(box.x - 9, 50, box.x - 1)
        for row, name in enumerate(at[stage]):
            chip = Box(box.x, 100 + row * (CHIP + 8), COLUMN, CHIP)
            colours = GREEN if name == "fake-kernels" else AMBER
            picture.box(chip, name, colours=colours, size=11 if len(name) < 23 else 9)
    return str(picture)
