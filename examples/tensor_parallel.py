"""A tensor-parallel Llama through the piecewise runner: one model on several ranks, equal to one process.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py                  on the CPU, with gloo
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --device cuda    a device for each rank
    options: --layers N, --compiler eager|aot_eager|inductor, --keep-dtensor

`torch.distributed.tensor.parallel` cuts the weights: DTensor parameters, and hooks that communicate. A DTensor has no
address that a graph could read, and its operators communicate out of sight of the graph; so `plain_shards` takes the
local shards, and puts one functional all-reduce behind each row-wise layer. The runner splits there by itself. With
`--keep-dtensor` the model stays as it is: the runner says why it is not captured, and calls the original.

All ranks decide together (`agree`), and every n up to the largest size is compared with the whole model on this rank;
the exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from processes import end
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import fxpatch

SIZES = [2, 4, 8]
TOKENS = 12
TOLERANCE = 1e-4  # fp32 logits of order 1; partial sums of two ranks are added in another order
PLAN = {
    f"model.layers.*.{name}": style()
    for style, names in {
        ColwiseParallel: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"],
        RowwiseParallel: ["self_attn.o_proj", "mlp.down_proj"],
    }.items()
    for name in names
}


class Decoder(torch.nn.Module):
    """Token ids `[n, tokens]` to logits `[n, tokens, vocabulary]`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same weights on every rank
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=8,
                num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1,
            )
        ).eval()  # fmt: skip

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.llama(input_ids=input_ids, use_cache=False).logits


class RowShard(torch.nn.Module):
    """The local part of a row-wise layer, and the sum over all ranks."""

    def __init__(self, linear: torch.nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self.group = local(linear.weight), local(linear.bias), group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = funcol.all_reduce(torch.nn.functional.linear(x, self.weight), "sum", self.group)
        return total if self.bias is None else total + self.bias


class ColumnShard(torch.nn.Module):
    """The local part of a column-wise layer."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = local(linear.weight), local(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def local(parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
    """This rank's part of a DTensor parameter."""
    return None if parameter is None else torch.nn.Parameter(parameter.detach().to_local(), requires_grad=False)


def plain_shards(model: torch.nn.Module) -> None:
    """Replaces each linear layer whose weight is a DTensor by a plain one with this rank's part."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and isinstance(module.weight, DTensor):
            (placement,) = module.weight.placements
            assert isinstance(placement, Shard)
            row = RowShard(module, module.weight.device_mesh.get_group()) if placement.dim == 1 else ColumnShard(module)
            model.set_submodule(name, row)


def all_succeeded(ok: bool, device: torch.device) -> bool:
    """Whether every rank did."""
    answer = torch.tensor(int(ok), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--compiler", default="aot_eager")
    parser.add_argument("--keep-dtensor", action="store_true", help="leave the parameters as DTensors")
    options = parser.parse_args(arguments)

    dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(options.device, rank) if options.device != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    whole, model = Decoder(options.layers).to(device), Decoder(options.layers).to(device)
    parallelize_module(model.llama, init_device_mesh(device.type, (world,)), PLAN)
    if not options.keep_dtensor:
        plain_shards(model)

    runner = fxpatch.PiecewiseRunner(
        model,
        dynamic={"input_ids": 0},
        split=["scaled_dot_product_attention"],
        sizes=SIZES,
        compiler=options.compiler,
        graphs="recorder" if device.type == "cpu" else "device",
        agree=lambda ok: all_succeeded(ok, device),
    )

    def tokens(n: int) -> torch.Tensor:
        return torch.randint(0, 512, (n, TOKENS), generator=torch.Generator().manual_seed(n)).to(device)

    runner.prepare(input_ids=tokens(6))
    worst = 0.0
    with torch.no_grad():
        for n in range(1, max(SIZES) + 1):
            worst = max(worst, float((runner(input_ids=tokens(n)) - whole(tokens(n))).abs().max()))
    right = all_succeeded(worst <= TOLERANCE, device)
    if rank == 0:
        print(runner.report)
        print(
            f"{'OK' if right else 'WRONG'}: {world} ranks, n from 1 to {max(SIZES)}: "
            f"max |logit - one process| = {worst:.1e}"
        )
    dist.barrier()
    dist.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    end(main())
