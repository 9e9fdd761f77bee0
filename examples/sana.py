"""A whole SANA picture on a device PyTorch does not know: text encoder, transformer in graphs, solver, decoder.

    python examples/sana.py                              on a simulated `npu` accelerator: no hardware needed
    python examples/sana.py --device simulated-musa
    python examples/sana.py --device npu                 on real hardware (cuda, npu, musa), or on the cpu
    options: --out FOLDER, --steps N, --height PIXELS, --layers N, --compiler NAME, --attention boolean|eager,
             --algorithm dpmsolver++|sde-dpmsolver++, --native

The pipeline is diffusers' own SanaPipeline, its text encoder transformers' own Gemma 2: small configs, random weights,
a tokenizer made here. It runs on the CPU, then on the device with the same weights, prompt and noise (drawn on the
CPU). There the transformer goes through a `PiecewiseRunner`, prepared once: graphs between the cross attentions, for 2
and for 8 rows. Guidance doubles the batch, so three pictures are 6 rows, padded to 8, and one picture is 2. Gemma 2's
norms and MLPs are replaced by the vendor's operators where the device has them, unless `--native`; a simulated device
has those that `sana_parts` declares, and their calls are counted. The solver gets a step that loses no generator.

`--attention boolean` is torch's `scaled_dot_product_attention` with transformers' boolean masks; that they are boolean
on the device is checked, since an NPU refuses a float mask that is not of the query's dtype ("Expected attn_mask dtype
to be bool or to match query dtype"). That operator has no soft cap, so the encoder's config has none either.
`--attention eager` is Gemma 2 with its soft cap of 50, and float masks that it adds itself.

Each stage is compared with the CPU's, and its errors are those of everything before it, too. All is fp32, where another
order of summation moves a value by a few 1e-7 of the largest, and guidance makes that 4.5 times as much. Allowed are

    stages    1e-4 of the largest value that the stage has on the CPU (latents, of about 4: 4e-4)
    pictures  1 of 255 levels, where a value lies between two, and that in no more than 1 of 100 values

and measured are about 3e-7 and a few values. The exit status is 1 if something is above, if a call of the transformer
was not replayed, if a mask was not boolean, or if a simulated device's operators were not called.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sana_parts import (
    MASKS_SEEN,
    SIMULATED,
    Call,
    SanaPipeline,
    ThroughRunner,
    Watch,
    build_pipeline,
    prepare_device,
)

import fxpatch
from fxpatch.layers.adoption import Adoption, optimize
from fxpatch.layers.scheduler import explicit_step

CONSOLE = Console()
PICTURES = (3, 1)  # of one prompt, in one call: 6 rows, padded to 8, and 2
SIZES = [2, 8]
DYNAMIC = dict.fromkeys(("hidden_states", "encoder_hidden_states", "encoder_attention_mask", "timestep"), 0)
STAGES_TOLERANCE = 1e-4  # of the largest value
LEVELS_TOLERANCE, LEVELS_SHARE = 1, 0.01


@dataclass
class Run:
    """What one device made: the calls of its stages and the pictures `[height, width, 3]`, for each of `PICTURES`."""

    calls: list[list[Call]] = field(default_factory=list)
    pictures: list[list[numpy.ndarray]] = field(default_factory=list)


def draw(pipeline: SanaPipeline, watch: Watch, options: argparse.Namespace) -> Run:
    """Runs the pipeline once for each of `PICTURES`, always with the same noise."""
    run = Run()
    for pictures in PICTURES:
        watch.calls = []
        drawn = pipeline(
            "a painting of a small red panda in the snow",
            num_images_per_prompt=pictures,
            num_inference_steps=options.steps,
            height=options.height,
            width=options.height,
            generator=torch.Generator("cpu").manual_seed(7),
            max_sequence_length=16,
            complex_human_instruction=["a photo of the forest and"],
            clean_caption=False,
            use_resolution_binning=False,
        ).images
        run.calls.append(watch.calls)
        run.pictures.append([numpy.asarray(picture.convert("RGB")) for picture in drawn])
    return run


def compare(pictures: int, ours: Run, cpu: Run, table: Table) -> bool:
    """Adds a line for each call of each stage, and one for the pictures. Returns whether all are right."""
    i = PICTURES.index(pictures)
    if [call.stage for call in ours.calls[i]] != [call.stage for call in cpu.calls[i]]:
        table.add_row(f"[red]WRONG[/red]: {[call.stage for call in ours.calls[i]]}", end_section=True)
        return False
    right, nth = True, Counter[str]()
    for got, want in zip(ours.calls[i], cpu.calls[i], strict=True):
        nth[want.stage] += 1
        largest = float(want.output.abs().max())
        alike = got.output.shape == want.output.shape and got.output.dtype == want.output.dtype
        far = float((got.output - want.output).abs().max()) if alike else float("nan")
        good = far <= STAGES_TOLERANCE * largest  # never, with a NaN on either side
        right = right and good
        times = [f"{call.seconds * 1000:.1f}" for call in (want, got)]
        table.add_row(f"{want.stage} {nth[want.stage]}", *times, f"{far:.1e}", f"{largest:.2f}", verdict(good))

    far_levels = numpy.abs(numpy.stack(ours.pictures[i]).astype(int) - numpy.stack(cpu.pictures[i]).astype(int))
    share = float((far_levels > 0).mean())
    good = bool(far_levels.max() <= LEVELS_TOLERANCE and share <= LEVELS_SHARE)
    name, far_words = f"pictures: {pictures}, 8 bit", f"{far_levels.max()} in {share:.2%}"
    table.add_row(name, "", "", far_words, "255", verdict(good), end_section=True)
    return right and good


def verdict(good: bool) -> str:
    return "[green]equal[/green]" if good else "[red]WRONG[/red]"


def write(folder: Path, name: str, run: Run) -> Path:
    """All pictures in a row, as a PNG."""
    path = folder / f"sana_{name}.png"
    Image.fromarray(numpy.concatenate([picture for call in run.pictures for picture in call], axis=1)).save(path)
    return path


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["simulated-npu", "simulated-musa", "cpu", "cuda", "npu", "musa"]
    parser.add_argument("--device", default="simulated-npu", choices=choices)
    parser.add_argument(
        "--out", type=Path, default=Path("sana"), help="folder for the PNGs: the device's, and the reference"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--height", type=int, default=64, help="of the pictures, in pixels, and their width")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--compiler", default="aot_eager")
    parser.add_argument("--attention", default="boolean", choices=["boolean", "eager"])
    parser.add_argument("--native", action="store_true", help="no platform operators in place of the models' own")
    parser.add_argument("--algorithm", default="dpmsolver++", choices=["dpmsolver++", "sde-dpmsolver++"])
    options = parser.parse_args(arguments)
    if options.height < 32 or options.height % 32:
        parser.error(f"--height is {options.height}, and has to be a multiple of 32")
    if options.steps < 1 or options.layers < 1:
        parser.error("--steps and --layers have to be at least 1")
    return options


def on_cpu(options: argparse.Namespace, watch: Watch) -> Run:
    """The reference: diffusers' and transformers' own code, and nothing else."""
    pipeline = build_pipeline(options.layers, options.attention, options.algorithm)
    watch.pipeline(pipeline)
    pipeline.transformer.forward = watch.over("transformer", pipeline.transformer.forward)
    return draw(pipeline, watch, options)


def on_device(
    options: argparse.Namespace, watch: Watch, told: Callable[[str], object]
) -> tuple[Run, fxpatch.PiecewiseRunner, list[Adoption]]:
    """The same with platform operators, an explicit step, and the transformer through a runner."""
    pipeline = build_pipeline(options.layers, options.attention, options.algorithm).to(watch.device)
    parts = () if options.native else (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
    adopted = [optimize(part, watch.device).report for part in parts]
    explicit_step(pipeline.scheduler)  # one that takes `**kwargs` is given no generator, and nobody is told
    runner = fxpatch.PiecewiseRunner(
        pipeline.transformer,
        dynamic=DYNAMIC,
        split=["scaled_dot_product_attention"],
        sizes=SIZES,
        compiler=options.compiler,
        graphs="recorder" if watch.device.type == "cpu" else "device",
        clone_outputs=True,  # a solver may keep what it is given until the next step
        progress=lambda step: told(f"captured {step.done} of {step.of}"),
    )
    watch.pipeline(pipeline)
    pipeline.transformer = ThroughRunner(pipeline.transformer, runner, watch)
    MASKS_SEEN.clear()
    return draw(pipeline, watch, options), runner, adopted


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    torch.set_num_threads(1)  # tensors as small as these are slower on several threads
    options.out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    kernels: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        device = prepare_device(options.device, stack, kernels)
        if device.type != "cpu":
            stack.enter_context(fxpatch.install(device.type))
        bar = stack.enter_context(Progress(*columns, console=CONSOLE))
        task = bar.add_task("CPU", total=2 * len(PICTURES) * (3 + 2 * options.steps))

        def told(what: str) -> None:
            bar.update(task, description=f"{options.device}: {what}")

        def watch(on: torch.device) -> Watch:
            name = options.device if on is device else "CPU"
            return Watch(on, lambda stage: bar.update(task, advance=1, description=f"{name}: {stage}"))

        cpu = on_cpu(options, watch(torch.device("cpu")))
        ours, runner, adopted = on_device(options, watch(device), told)

    table = Table(title=f"SanaPipeline on {options.device}, beside the CPU: each call of each stage")
    for column in ("stage", "CPU ms", "ms", "max |error|", "max |CPU|", ""):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    right = [compare(pictures, ours, cpu, table) for pictures in PICTURES]
    CONSOLE.print(table)
    for part, report in zip(("text encoder", "transformer", "decoder"), adopted, strict=False):
        CONSOLE.print(f"{part}: {report}", highlight=False, soft_wrap=True)
    CONSOLE.print(str(runner.report), highlight=False, soft_wrap=True)

    replayed, calls = runner.counts["captured"], len(PICTURES) * options.steps
    right.append(replayed == calls)
    masks = sorted(str(dtype) for where, dtype in MASKS_SEEN if where == device.type)
    right.append(options.attention == "eager" or masks == ["torch.bool"])
    if options.device.startswith(SIMULATED) and adopted:  # it has the operators, and the prompts are encoded
        right.append(sum(kernels.values()) >= 2 * len(PICTURES) * len(adopted[0].replaced) > 0)
    files = [write(options.out, name, run) for name, run in (("reference", cpu), (options.device, ours))]
    told_kernels = ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))
    CONSOLE.print(
        f"{'OK' if all(right) else 'WRONG'}: {sum(PICTURES)} pictures; {replayed} of {calls} transformer calls replayed"
        f"; kernels: {told_kernels or 'not counted'}; masks: {', '.join(masks) or 'not looked at'}; "
        f"{' '.join(map(str, files))}",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
