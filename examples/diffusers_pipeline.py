"""A diffusers pipeline whose transformer is captured: two lines of a program that exists already.

    python examples/diffusers_pipeline.py                    on a simulated `musa` accelerator: no hardware needed
    python examples/diffusers_pipeline.py --device npu       on real hardware (cuda, npu, musa, xpu), or on the cpu
    options: --layers N, --steps N, --compiler eager|aot_eager|inductor

The lines are marked (1) and (2). The pipeline is diffusers' own DiTPipeline, small and with random weights; its solver
(PNDM) keeps what the transformer returned over several steps. It draws three pictures with guidance, which are 6 rows
of the transformer and take the graphs of 8, and one without, which takes those of 2. They are compared with those of
the unchanged pipeline on the CPU, from the same noise: one of 255 levels may differ, where a value lies between two, in
no more than 1 of 100 values. The exit status is 1 if more do, or if a step was not replayed. (On the cpu there are no
graphs: there it runs compiled pieces.)
"""

from __future__ import annotations

import argparse
import sys

import numpy
import torch
import transformers

told_before = transformers.logging.get_verbosity()
transformers.logging.set_verbosity_error()  # it tells at this import which image processors want torchvision
from devices import prepare_device  # noqa: E402
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, PNDMScheduler  # noqa: E402

transformers.logging.set_verbosity(told_before)

import fxpatch  # noqa: E402
from fxpatch.engines.whole_module import run_in_pieces  # noqa: E402

PICTURES = (([3, 5, 7], 4.0), ([3], 1.0))  # classes, guidance
LEVELS, SHARE = 1, 0.01


def build_pipeline(layers: int) -> DiTPipeline:
    """The same weights at every call."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=layers, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # blocks of a new DiT add nothing: their gates are zero
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), PNDMScheduler(skip_prk_steps=True))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiTPipeline, steps: int) -> list[numpy.ndarray]:
    """Pictures `[n, height, width, 3]` in levels of 0 to 255, from noise that is drawn on the CPU."""
    found = []
    for classes, guidance in PICTURES:
        noise = torch.Generator("cpu").manual_seed(7)
        images = pipeline(
            class_labels=classes, guidance_scale=guidance, num_inference_steps=steps, generator=noise, output_type="np"
        ).images
        found.append(numpy.rint(numpy.asarray(images) * 255).astype(int))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="simulated", choices=["simulated", "cpu", "cuda", "npu", "musa", "xpu"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compiler", default="aot_eager")
    options = parser.parse_args(arguments)

    want = draw(build_pipeline(options.layers), options.steps)
    device = prepare_device(options.device)
    pipeline = build_pipeline(options.layers).to(device)

    fxpatch.install(device.type)  # (1)
    captured = run_in_pieces(  # (2)
        pipeline.transformer,
        dynamic={"hidden_states": 0, "timestep": 0, "class_labels": 0},
        sizes=[2, 8],
        compiler=options.compiler,
    )

    got = draw(pipeline, options.steps)

    assert captured.runner is not None
    print(captured.runner.report)
    steps, replayed = sum(captured.runner.counts.values()), captured.runner.counts["captured"]
    far = [abs(ours - theirs) for ours, theirs in zip(got, want, strict=True)]
    close = all(each.max() <= LEVELS and (each > 0).mean() <= SHARE for each in far)
    flat = min(picture.std() for pictures in want for picture in pictures)
    right = close and flat > 1 and (replayed == steps or device.type == "cpu")
    print(
        f"{'OK' if right else 'WRONG'}: {sum(map(len, got))} pictures on {device.type}, {replayed} of {steps} steps "
        f"replayed; at most {max(each.max() for each in far)} of 255 levels from the CPU's"
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
