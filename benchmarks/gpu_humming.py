"""humming-kernels as a peer for benchmarks/gpu_op.py: its two NVFP4 GEMMs alone, without sort, activation or combine.

Run with humming-kernels 0.1.19 on H200s (docs/hopper.md), with HUMMING_COMPILER=nvcc. `indexed` is its GEMM that
gathers rows itself, as ours does: GEMM1 from tokens to routes, GEMM2 from routes to routes. Its tables of sorted routes
are made beforehand and are not in the time.
"""

import json

import gpu_methods

from jax_moe import shapes
from jax_moe.cli import timing

_COMPUTE = {"use_f16_accum": False, "gemm_type": "indexed"}


def gemms(model: str):
    """Makes chains of pairs of GEMMs on random weights."""
    try:
        import humming.layer  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "peer humming: needs torch and humming-kernels with CUDA's compiler,"
            f" pip install 'humming-kernels[cu13]==0.1.19'; the import says: {error}"
        ) from error
    import torch

    shape = shapes.MODELS[model]
    torch.manual_seed(0)
    gate_up = _layer(shape, 2 * shape.intermediate_size, shape.hidden_size)
    down = _layer(shape, shape.hidden_size, shape.intermediate_size)

    def make(count, length):
        ids, _, touched = timing.routings(shape, count, length, seed=count)
        routes = count * shape.top_k
        x = torch.randn(count, shape.hidden_size, dtype=torch.bfloat16, device="cuda")
        h = torch.randn(routes, shape.intermediate_size, dtype=torch.bfloat16, device="cuda")
        first = torch.empty(routes, 2 * shape.intermediate_size, dtype=torch.bfloat16, device="cuda")
        second = torch.empty(routes, shape.hidden_size, dtype=torch.bfloat16, device="cuda")
        calls = []
        for call in ids:
            calls.append(_gemm(gate_up, x, first, call, shape.top_k))
            calls.append(_gemm(down, h, second, call, 1))

        def chain():
            for call in calls:
                call()

        return gpu_methods.Chain(gpu_methods.torch_graph(chain), touched)

    return make


def _layer(shape: shapes.LayerShape, rows: int, columns: int):
    """Random NVFP4 weights of all experts in humming's layout, with its table of kernels by number of routes."""
    from humming.layer import HummingLayer, HummingMethod
    import torch

    layer = HummingLayer(
        shape_n=rows,
        shape_k=columns,
        num_experts=shape.num_experts,
        weight_config={
            "dtype": "float4e2m1",
            "scale_dtype": "float8e4m3",
            "group_size": 16,
            "weight_scale_2_type": "tensor",  # the global scale of an expert
        },
        torch_dtype=torch.bfloat16,
        # What vLLM pads to; only gpt-oss's lengths are no multiples already.
        pad_n_to_multiple=256,
        pad_k_to_multiple=128,
    ).cuda()
    for parameter in layer.parameters():
        if parameter.dtype == torch.int32:  # eight codes
            parameter.data.random_(-(2**31), 2**31 - 1)
        elif parameter.dtype == torch.float8_e4m3fn:  # 0.5 to 2, as ours
            scales = torch.randint(0x30, 0x40, parameter.shape, dtype=torch.uint8, device="cuda")
            parameter.data.copy_(scales.view(torch.float8_e4m3fn))
        else:
            parameter.data.fill_(1 / (3.5 * columns**0.5))
    layer.transform()
    return layer, HummingMethod.get_default_tuning_configs(layer, use_f16_accum=False, gemm_type="indexed")


def _gemm(layer_and_table, inputs, outputs, ids, rows_per_input: int):
    """A call without arguments of one GEMM: row r of ``outputs`` is of route r, from input ``r // rows_per_input``."""
    import torch

    layer, table = layer_and_table
    routes = ids.size
    # Not the whole table goes to the call: every kernel in it would be compiled.
    config = next(config for low, high, config in table if low < routes and (routes <= high or not high))
    tables = sort(ids, config["block_shape"][0])
    sorted_ids, expert_ids = (torch.tensor(values, dtype=torch.int32, device="cuda") for values in tables)
    arguments = {
        "inputs": inputs, "outputs": outputs, "sorted_ids": sorted_ids, "expert_ids": expert_ids,
        "num_tokens_padded": torch.tensor(len(sorted_ids), dtype=torch.int32, device="cuda"), "top_k": rows_per_input,
        "valid_shape_m": routes, "compute_config": json.dumps(_COMPUTE), "tuning_config": json.dumps(config),
    }  # fmt: skip
    return lambda: layer(**arguments)


def sort(ids, block: int):
    """Routes by expert, each expert's padded to whole blocks with the number of routes, and the blocks' experts."""
    import numpy as np

    flat = ids.reshape(-1)
    sorted_ids, expert_ids = [], []
    for expert in np.unique(flat):
        routes = np.flatnonzero(flat == expert)
        blocks = -(-len(routes) // block)
        sorted_ids.append(np.pad(routes, (0, blocks * block - len(routes)), constant_values=flat.size))
        expert_ids += [expert] * blocks
    return np.concatenate(sorted_ids), np.array(expert_ids)
