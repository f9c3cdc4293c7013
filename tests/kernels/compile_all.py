"""Compiles the LLM kernels for an architecture without a GPU; prints a line a kernel. Run as a script (a fresh process)."""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from venturi.kernels.triton_kernels import (
    activations,
    argmax,
    decode,
    decode_fp8,
    decode_rotated,
    grouped_linear,
    norms,
    penalties,
    prefill,
    quantize,
    rotary,
    routing,
    sampling,
    small_linear,
    step_start,
    stream_linear,
)


def case(kernel, types: dict[str, str], constants: dict, **options):
    """`types` maps pointer and scalar argument names to types; all other arguments are constants or i32."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    for i, n in enumerate(names):
        if n in ("K", "N", "x_row", "q_row", "k_slot", "v_slot", "row_stride", "size", "q_head"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attrs), options


def cases(pdl: bool):
    b, f, i, l = "*bf16", "*fp32", "*i32", "*i64"
    yield (
        "rms_norm",
        case(
            norms.rms_norm_kernel,
            {"x": b, "residual": b, "weight": b, "out": b, "scales": b, "eps": "fp32", "offset": "fp32"},
            {"RESIDUAL": True, "FP8": False, "BLOCK": 4096, "PDL": pdl},
            num_warps=8,
        ),
    )
    yield "gated", case(activations.gated_kernel, {"gate_up": b, "out": b}, {"KIND": "silu", "BLOCK": 1024, "PDL": pdl})
    yield (
        "rotary",
        case(
            rotary.rotate_and_write_kernel,
            {"q": b, "k": b, "v": b, "angles": f, "positions": l, "slots": l, "k_cache": b, "v_cache": b},
            {
                "k_dim": 128,
                "v_dim": 128,
                "pairs": 64,
                "HEADS": 2,
                "PAIRS": 64,
                "K_DIM": 128,
                "V_DIM": 128,
                "ROTATE": True,
                "INTERLEAVED": False,
                "WRITE_V": True,
                "PDL": pdl,
            },
            num_warps=1,
        ),
    )
    attention_types = {
        "q": b,
        "k_cache": b,
        "v_cache": b,
        "k_scales": f,
        "v_scales": f,
        "out": b,
        "tables": i,
        "table_rows": i,
        "seq_lens": i,
        "sinks": b,
        "partial": f,
        "sums": f,
        "tickets": i,
        "scale": "fp32",
        "softcap": "fp32",
        "query_starts": i,
        "tile_seq": i,
        "tile_start": i,
    }
    for name, dims in {
        "": (32, 8, 128, 128, 128, 0, 128, 64, 4),
        " mla": (128, 1, 576, 512, 512, 64, 512, 32, 128),
    }.items():
        heads, kv, kd, vd, wide, tail, dv, n, group = dims
        shared = {
            "heads": heads,
            "kv_heads": kv,
            "k_dim": kd,
            "v_dim": vd,
            "SIZE": 32,
            "WINDOW": 0,
            "SOFTCAP": False,
            "SINKS": False,
            "N": n,
            "D": wide,
            "TAIL": tail,
            "DV": dv,
            "KIND": tl.bfloat16,
            "SCALED": False,
            "PDL": pdl,
        }
        group_rows = max(16, min(group, 16))
        yield (
            "decode" + name,
            case(
                decode.decode_kernel,
                attention_types,
                shared | {"SPLITS": 16, "GROUP": group, "M": group_rows},
                num_warps=4,
                num_stages=2 if tail else 3,
            ),
        )
        yield (
            "prefill" + name,
            case(
                prefill.prefill_kernel,
                attention_types,
                shared | {"M": 32 if tail else 128},
                num_warps=4 if tail else 8,
                num_stages=2 if tail else 3,
            ),
        )
    eight = shared | {
        "heads": 32, "kv_heads": 8, "k_dim": 128, "v_dim": 128, "D": 128, "DV": 128, "TAIL": 0, "N": 64, "SCALED": True,
    }  # fmt: skip
    int8 = attention_types | {"k_cache": "*i8", "v_cache": "*i8"}
    yield (
        "decode int8",
        case(decode.decode_kernel, int8, eight | {"SPLITS": 16, "GROUP": 4, "M": 16}, num_warps=4, num_stages=3),
    )
    yield "prefill int8", case(prefill.prefill_kernel, int8, eight | {"M": 128}, num_warps=4, num_stages=2)
    yield (
        "write int8",
        case(
            rotary.write_int8_kernel,
            {"k": b, "v": b, "k_cache": "*i8", "v_cache": "*i8", "k_scales": f, "v_scales": f, "slots": l},
            {"DIM": 128, "COLUMNS": 128, "HEADS": 8, "PDL": pdl},
            num_warps=1,
        ),
    )
    rotated_types = attention_types | {"k": b, "v": b, "angles": f, "positions": l, "slots": l}
    rotated = {k: v for k, v in shared.items() if k not in ("TAIL", "SCALED")} | {
        "k_dim": 128, "v_dim": 128, "D": 128, "DV": 128, "pairs": 64, "INTERLEAVED": False, "SPLITS": 16,
        "GROUP": 4, "M": 16, "N": 64, "heads": 32, "kv_heads": 8,
    }  # fmt: skip
    yield "decode rotated", case(decode_rotated.decode_rotated_kernel, rotated_types, rotated, num_warps=4)
    word_types = {k: v for k, v in attention_types.items() if k not in ("k_cache", "v_cache")}
    constants = {
        "heads": 32, "kv_heads": 8, "SIZE": 32, "WINDOW": 0, "SOFTCAP": False, "SINKS": False, "SPLITS": 4,
        "GROUP": 4, "M": 16, "N": 64, "DIM": 128, "ASM": True, "PDL": pdl,
    }  # fmt: skip
    yield (
        "decode fp8",
        case(decode_fp8.decode_fp8_kernel, word_types | {"k_words": "*i32", "v_words": "*i32"}, constants),
    )
    yield (
        "sample",
        case(
            sampling.sample_kernel,
            {"logits": f, "out": l, "temperature": f, "top_k": l, "top_p": f, "min_p": f, "seeds": l, "steps": l},
            {"ROUNDS": 26, "BLOCK": 4096},
            num_warps=8,
        ),
    )
    fp8 = "*fp8e4nv"
    yield (
        "norm fp8",
        case(
            norms.rms_norm_kernel,
            {"x": b, "residual": b, "weight": b, "out": fp8, "scales": f, "eps": "fp32", "offset": "fp32"},
            {"RESIDUAL": True, "FP8": True, "BLOCK": 4096, "PDL": pdl},
            num_warps=8,
        ),
    )
    yield (
        "gated fp8",
        case(
            activations.gated_fp8_kernel,
            {"gate_up": b, "out": fp8, "scales": f},
            {"KIND": "silu", "BLOCK": 16384, "PDL": pdl},
            num_warps=16,
        ),
    )
    yield (
        "quantize fp8",
        case(
            quantize.quantize_rows_kernel, {"x": b, "out": fp8, "scales": f}, {"BLOCK": 4096, "PDL": pdl}, num_warps=8
        ),
    )
    yield (
        "argmax",
        case(
            argmax.argmax_kernel,
            {"logits": b, "out": l, "keys": l, "tickets": i, "last_tokens": l, "owners": i, "ring": l, "entry": l},
            {"REMEMBER": True, "BLOCK": 8192, "PDL": pdl},
            num_warps=8,
        ),
    )
    pointers = dict.fromkeys(("ring", "last_tokens", "positions", "slots", "entry", "count"), l)
    pointers |= {"weight": b, "out": b, "owners": i, "lengths": i, "ticket": i, "scale": "fp32"}
    yield (
        "step start",
        case(
            step_start.step_start_kernel,
            pointers,
            {"ENTRIES": 8, "FIELDS": 8, "BLOCK": 1024, "PDL": pdl},
            num_warps=1,
        ),
    )
    linear = {
        "x": b,
        "w": b,
        "x_scales": f,
        "scales": f,
        "residual": b,
        "bias": b,
        "out": b,
        "partial": f,
        "tickets": i,
    }
    base = {
        "GATED": False,
        "RESIDUAL": False,
        "BIAS": False,
        "SCALED": False,
        "KIND": "silu",
        "EVEN_K": True,
        "SPLITS": 4,
        "M": 16,
        "BLOCK_N": 64,
        "BLOCK_K": 128,
        "PDL": pdl,
    }
    yield (
        "small gated",
        case(small_linear.small_linear_kernel, linear, base | {"GATED": True}, num_warps=4, num_stages=4),
    )
    yield (
        "small residual",
        case(
            small_linear.small_linear_kernel, linear, base | {"RESIDUAL": True, "SPLITS": 1}, num_warps=4, num_stages=6
        ),
    )
    yield (
        "small fp8",
        case(
            small_linear.small_linear_kernel,
            linear | {"w": fp8, "x": fp8},
            base | {"SCALED": True, "BLOCK_K": 256},
            num_warps=4,
            num_stages=4,
        ),
    )
    yield (
        "penalties",
        case(
            penalties.penalize_kernel,
            {"logits": f, "counts": i, "rows": l, "slots": l, "repetition": f, "presence": f, "frequency": f},
            {"FLAG": 1 << 24, "BLOCK": 4096},
            num_warps=8,
        ),
    )
    yield from expert_cases(pdl)


def expert_cases(pdl: bool):
    b, f, i = "*bf16", "*fp32", "*i32"
    types = {"logits": b, "correction": f, "weights": f, "experts": i, "scale": "fp32"}
    grouped = {
        "KIND": "grouped-sigmoid", "RENORMALIZE": True, "TOP_K": 8, "TOP_GROUPS": 4, "G": 8, "EACH": 32, "K_BLOCK": 8,
        "PDL": pdl,
    }  # fmt: skip
    yield "route in groups", case(routing.route_kernel, types | {"logits": f}, grouped, num_warps=1)
    flat = grouped | {"KIND": "softmax", "TOP_GROUPS": 0, "G": 1, "EACH": 128}
    yield "route", case(routing.route_kernel, types, flat, num_warps=1)
    numbers = {"experts": i, "order": i, "table": i}
    yield (
        "group",
        case(routing.group_kernel, numbers, {"ROWS": 16, "BINS": 256, "BLOCK": 256, "PDL": pdl}, num_warps=4),
    )
    for pairs, kind, dtype in [(8, "silu", b), (8, "", b), (4096, "silu", b), (65536, "clamped", b), (65536, "", f)]:
        tile = grouped_linear.GroupedConfig.of(pairs, 128, 4 if dtype == f else 2)
        pointers = {"x": dtype, "w": dtype, "bias": dtype, "out": dtype, "alpha": "fp32", "limit": "fp32"}
        constants = {
            "KIND": kind, "BIAS": kind == "clamped", "M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "EVEN_K": True,
            "PDL": pdl,
        }  # fmt: skip
        yield (
            f"experts {pairs} {kind or 'down'} {dtype}",
            case(
                grouped_linear.grouped_linear_kernel, pointers | {"order": i, "table": i}, constants,
                num_warps=tile.warps, num_stages=tile.stages,
            ),
        )  # fmt: skip
    yield (
        "combine",
        case(grouped_linear.combine_kernel, {"parts": b, "weights": f, "out": b}, {"K": 8, "BLOCK": 1024, "PDL": pdl}),
    )


def stream_case(dtype: str, gated: bool, rows: int, splits: int, inside: bool = False):
    kernel, size = stream_linear.stream_linear_kernel, 1 if "fp8" in dtype else 2
    step = stream_linear.STEP_BYTES // size
    layout = f"NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth={8 * size}, rank=2)"
    constants = {
        "GATED": gated, "RESIDUAL": not gated, "BIAS": True, "SCALED": size == 1, "KIND": "silu", "SPLITS": splits,
        "M": rows, "BN": 64, "BK": step, "DEPTH": 6, "AHEAD": 8, "PDL": True,
        "ROW": inside, "NORM": inside, "WIDTH": 32 * step if inside else 0, "FIXED_K": 32 * step if inside else 0,
    }  # fmt: skip
    types = {
        "x": "*bf16" if inside else f"tensordesc<{dtype}[{rows},{step}],{layout}>", "norm_weight": "*bf16",
        "eps": "fp32", "offset": "fp32", "w": f"tensordesc<{dtype}[64,{step}],{layout}>",
        "w_start": f"*{dtype}", "x_scales": "*fp32", "scales": "*fp32", "residual": "*bf16", "bias": "*bf16",
        "out": "*bf16", "partial": "*fp32", "tickets": "*i32",
    }  # fmt: skip
    source, options = case(kernel, types, constants, num_warps=stream_linear.WARPS)
    return GluonASTSource(kernel, source.signature, source.constants, source.attrs), options


def hopper_cases():
    yield "stream residual", stream_case("bf16", False, 8, 4)
    yield "stream gated", stream_case("bf16", True, 64, 1)
    yield "stream fp8", stream_case("fp8e4nv", True, 16, 2)
    yield "stream a row", stream_case("bf16", True, 8, 1, inside=True)
    yield "stream a row in fp8", stream_case("fp8e4nv", False, 8, 1, inside=True)


if __name__ == "__main__":
    arch = int(sys.argv[1])
    for name, (source, options) in [*cases(arch >= 90), *(hopper_cases() if arch == 90 else ())]:
        if arch < 90 and "fp8" in name:
            continue
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        print(f"{name}: shared {compiled.metadata.shared}", flush=True)
