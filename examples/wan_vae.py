"""Video latents decoded by diffusers' AutoencoderKLWan with channels_last_3d weights, on one process and on several.

    python examples/wan_vae.py --out frames                 on a simulated `musa` accelerator: no hardware needed
    python examples/wan_vae.py --out frames --device npu    on real hardware (cuda, npu, musa, xpu), or on the cpu
    torchrun --nproc-per-node 4 examples/wan_vae.py ...     on the ranks that torchrun starts
    options: --processes N, --frames N, --height N, --width N, --channels N, --kind 2.1|2.2

The model is diffusers' own, from a small config with random weights, and decodes one latent frame after the other with
its feature cache. Its causal convolutions are replaced by `fxpatch.layers`', on the same parameters: they match the
format of their input to the weights', once. On several processes each has a band of rows of the image, and gets from
its neighbours those that its kernels need. Without torchrun, the example starts its processes by itself.

Every decoding is compared with plain diffusers, contiguous, on the CPU; that of several processes also with that of
one, which it equals bit for bit on the CPU and on the simulated device (which computes there), unless a band has fewer
than 16 pixels or bands differ in height: then a sum may be added in another order. The exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from devices import prepare_device
from diffusers import AutoencoderKLWan
from PIL import Image
from processes import end
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from fxpatch.layers.causal_conv3d import CausalConv3d, replace_causal_convs
from fxpatch.layers.height_parallel import HeightParallel
from fxpatch.layers.height_parallel_convs import split_over_height

COLLECTIVES = {"cuda": "nccl", "npu": "hccl", "musa": "mccl", "xpu": "xccl"}  # gloo, if not listed
TOLERANCE = {"simulated": 1e-5, "cpu": 1e-5}  # of pixels between -1 and 1, fp32
ON_HARDWARE = 2e-2  # whose convolutions may compute in TF32


@dataclass
class Run:
    """One decoding: pixels `[1, 3, T, H, W]` on the CPU, between -1 and 1, and seconds."""

    name: str
    video: torch.Tensor
    seconds: float

    def far_from(self, other: Run) -> float:
        return float((self.video - other.video).abs().max())


def build(options: argparse.Namespace) -> AutoencoderKLWan:
    """The same model on every process: of Wan 2.1, or of Wan 2.2 with its residual blocks and patches."""
    torch.manual_seed(0)
    newer = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    return (
        AutoencoderKLWan(
            base_dim=options.channels, decoder_base_dim=options.channels, z_dim=4, dim_mult=[1, 2, 2],
            num_res_blocks=1, temperal_downsample=[True, False], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
            scale_factor_spatial=8 if options.kind == "2.2" else 4, **(newer if options.kind == "2.2" else {}),
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


def latents(options: argparse.Namespace) -> torch.Tensor:
    """`[1, 4, frames, height, width]`: waves that travel through the image, and a little noise."""
    size = [torch.linspace(0, 1, n) for n in (4, options.frames, options.height, options.width)]
    channel, t, y, x = torch.meshgrid(*size, indexing="ij")
    waves = torch.sin(6.3 * (x * (1 + channel) + y * (2 - channel) + t)) * 2
    return (waves + 0.1 * torch.randn(waves.shape, generator=torch.Generator().manual_seed(1)))[None]


def decode(name: str, model: AutoencoderKLWan, z: torch.Tensor, progress: Progress, task: TaskID) -> Run:
    """Decodes, with a step of the progress bar for each latent frame."""
    progress.update(task, description=name)
    hook = model.decoder.register_forward_hook(lambda *_: progress.advance(task))
    start = time.perf_counter()
    video = model.decode(z).sample.to("cpu", copy=True)
    seconds = time.perf_counter() - start
    hook.remove()
    return Run(name, video, seconds)


def write_frames(run: Run, folder: Path, prefix: str) -> int:
    """PNG files `<prefix>_000.png` and so on. Returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = ((run.video[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    for i, frame in enumerate(pixels):
        Image.fromarray(frame.numpy()).save(folder / f"{prefix}_{i:03}.png")
    return len(pixels)


@contextmanager
def ranks(device: torch.device, wanted: str) -> Iterator[int]:
    """This process among those of torchrun; alone without it. Gives the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 1
        return
    dist.init_process_group(COLLECTIVES.get(wanted, "gloo"), device_id=device if wanted in COLLECTIVES else None)
    try:
        yield world
        dist.barrier()
    finally:
        dist.destroy_process_group()


def start_processes(count: int, arguments: list[str]) -> int:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    return subprocess.run([*torchrun, __file__, *arguments], env=environment, check=False).returncode


def report(options: argparse.Namespace, runs: list[Run], same_bits: bool | None, must: bool, console: Console) -> bool:
    """Prints the table. Returns whether all is right."""
    tolerance = TOLERANCE.get(options.device, ON_HARDWARE)
    shape = list(runs[0].video.shape)
    table = Table(title=f"AutoencoderKLWan {options.kind}, latents to {shape}, {options.device}")
    for column in ("decoded by", "seconds", "max error", "bits of one", "verdict"):
        table.add_column(column, justify="left" if column == "decoded by" else "right")
    right = bool(torch.isfinite(runs[0].video).all()) and float(runs[0].video.std()) > 0.01
    for i, run in enumerate(runs):
        far = run.far_from(runs[0])
        good = far <= tolerance and (i < 2 or same_bits is True or not must)  # not: NaN is not within a tolerance
        right = right and good
        bits = "-" if i < 2 else "the same" if same_bits else "others"
        table.add_row(run.name, f"{run.seconds:.2f}", f"{far:.1e}", bits, "right" if good else "WRONG")
    console.print(table)
    return right


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="simulated", choices=["simulated", "cpu", "cuda", "npu", "musa", "xpu"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the frames")
    parser.add_argument("--processes", type=int, default=2, help="1 leaves out the split over processes")
    parser.add_argument("--frames", type=int, default=4, help="of the latents")
    parser.add_argument("--height", type=int, default=24, help="of the latents, in rows")
    parser.add_argument("--width", type=int, default=32, help="of the latents")
    parser.add_argument("--channels", type=int, default=16, help="of the last block, and of a half of the others")
    parser.add_argument("--kind", default="2.1", choices=["2.1", "2.2"])
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ and options.processes > 1:
        return start_processes(options.processes, sys.argv[1:] if arguments is None else arguments)

    device = prepare_device(options.device, int(os.environ.get("LOCAL_RANK", 0)))
    first = int(os.environ.get("RANK", 0)) == 0
    console = Console(quiet=not first)
    with ranks(device, options.device) as world, Progress(console=console, disable=not first) as progress:
        task = progress.add_task("", total=options.frames * (2 * first + (world > 1)))
        model, z, runs = build(options), latents(options), []
        if first:
            runs.append(decode("plain diffusers, CPU", model, z, progress, task))

        replace_causal_convs(model)
        for each in model.modules():
            if isinstance(each, CausalConv3d):  # not the whole model: its Conv2d has no channels_last_3d
                each.to(memory_format=torch.channels_last_3d)
        model, z = model.to(device), z.to(device)
        if first:
            runs.append(decode("1 process", model, z, progress, task))
        if world > 1:
            via = "cpu" if options.device == "simulated" else None
            undo = split_over_height(model.decoder, HeightParallel(uneven=True, via=via))
            runs.append(decode(f"{world} processes", model, z, progress, task))
            undo()
    if not first:
        return 0

    even = options.height % world == 0 and options.height // world * options.width >= 16
    same = torch.equal(runs[-1].video, runs[1].video) if world > 1 else None
    right = report(options, runs, same, even and options.device in TOLERANCE, console)
    count = write_frames(runs[-1], options.out, "frame")
    write_frames(runs[0], options.out, "plain")
    console.print(f"{'OK' if right else 'WRONG'}: {count} frames in {options.out}, plain diffusers' beside them")
    return 0 if right else 1


if __name__ == "__main__":
    end(main())
