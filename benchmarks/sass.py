"""What the compiler makes of a kernel, for GPUs that are not in this machine: static figures from its machine code.

Triton's own package carries ptxas and cuobjdump, so nothing else is needed: no GPU, no driver, no CUDA toolkit.

    python3 benchmarks/sass.py [sm_86 ...]       prints a row for each tile and type of the INT4 GEMM
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"BRA (?:0x)?([0-9a-f]+)\b")


@dataclass(frozen=True)
class Figures:
    """Static figures of one compiled kernel.

    instructions_per_mma: issued instructions of the main loop per MMA in it; NaN where no loop has one ·
    mmas: MMAs of the main loop · registers: of a thread · spill_bytes: local memory of a thread · shared_bytes: of a
    block · epilogue_instructions: behind the main loop, in the machine code's order · opcodes: of the main loop.
    """

    instructions_per_mma: float
    mmas: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    epilogue_instructions: int
    opcodes: Counter

    @property
    def loop_spills(self) -> int:
        """Instructions of the main loop that read or write local memory."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(("LDL", "STL")))


def compile_for(
    fn,
    signature: dict[str, str],
    constants: dict,
    arch: str,
    warps: int,
    aligned: set[str],
    mma: str = "IMMA",
    **options: int,
) -> Figures:
    """Compile a Triton or Gluon kernel for ``arch`` ("sm_86") and read its machine code.

    signature: Triton types of the run-time arguments in order ("*i32", "i32") · constants: its constexpr arguments ·
    aligned: arguments that are multiples of 16 (for pointers: bytes), which the launcher finds out by itself ·
    mma: how opcodes of the matrix products start, by which the main loop is found · options: more of the compiler's.
    """
    from svdq.kernels.device import FMA

    full = signature | dict.fromkeys(constants, "constexpr")
    if list(full) != fn.arg_names:
        raise ValueError(f"{fn.__name__} takes {', '.join(fn.arg_names)}; expected {', '.join(full)}")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(full) if name in aligned}
    language = GluonASTSource if fn.is_gluon() else ASTSource
    source = language(fn=fn, signature=full, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    kernel = triton.compile(source, target=target, options={"num_warps": warps, **FMA, **options})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        sass = _cuobjdump("-sass", cubin)
        usage = _cuobjdump("-res-usage", cubin)
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return read_sass(sass, mma, registers, stack, kernel.metadata.shared)


def read_sass(sass: str, mma: str, registers: int, spill_bytes: int, shared_bytes: int) -> Figures:
    """Figures from the text of ``cuobjdump -sass``: the main loop is the backward branch over most ``mma`` opcodes."""
    code = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    best: list[str] = []
    behind = 0
    for i, (address, text) in enumerate(code):
        branch = _BRANCH.search(text)
        if branch is None or int(branch.group(1), 16) >= address:
            continue
        body = [_opcode(t) for a, t in code[: i + 1] if a >= int(branch.group(1), 16)]
        if _count(body, mma) > _count(best, mma):
            best, behind = body, sum(not t.startswith("NOP") for _, t in code[i + 1 :])
    mmas = _count(best, mma)
    return Figures(
        instructions_per_mma=len(best) / mmas if mmas else float("nan"),
        mmas=mmas,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=shared_bytes,
        epilogue_instructions=behind,
        opcodes=Counter(best),
    )


def gemm_int4_figures(
    tile,
    arch: str,
    dtype: str = "bf16",
    act_unsigned: bool = False,
    out: str = "",
    after: str = "NONE",
    parts: int = 1,
) -> Figures:
    """The INT4 GEMM with one tile; dtype and out: "bf16", "fp16" (out also "fp32"; default dtype); after: one of
    epilogue.KINDS; parts: 2 for a second, unsigned input."""
    from svdq.kernels.epilogue import KINDS
    from svdq.kernels.gemm_int4 import gemm_w4a4_kernel

    types = {"bf16": 0, "fp16": 1, "fp32": 2}
    out = out or dtype
    pointers = dict.fromkeys(("act_ptr", "ascales_ptr", "qweight_ptr", "wscales_ptr"), "*i32")
    pointers |= {"lora_act_ptr": "*fp32", "proj_up_ptr": "*i32"}
    pointers |= {name.replace("_ptr", "2_ptr"): kind for name, kind in pointers.items()}
    pointers |= {"bias_ptr": f"*{dtype}"}
    pointers |= {"out_ptr": "*fp32" if out == "fp32" else "*i32"}
    pointers |= {"gate_ptr": "*i32", "residual_ptr": "*i32", "norm_q_ptr": f"*{dtype}", "norm_k_ptr": f"*{dtype}"}
    pointers |= {"rotary_ptr": "*fp32"}
    aligned = ("N", "K", "R", "K2", "R2", "stride_out")
    sizes = dict.fromkeys(("M", *aligned, "row_blocks", "bias_size", "rows_per_gate"), "i32")
    constants = {
        "ACT_UNSIGNED": act_unsigned,
        "ACT2_UNSIGNED": True,
        "PARTS": parts,
        "T": types[dtype],
        "OUT": types[out],
        "EPILOGUE": KINDS.index(after),
        **tile.constants,
    }
    return compile_for(gemm_w4a4_kernel, pointers | sizes, constants, arch, tile.warps, {*pointers, *aligned})


def quantize_figures(
    arch: str, dtype: str = "bf16", rank: int = 32, act_unsigned: bool = False, norm: bool = False
) -> Figures:
    """The quantize kernel as quantize_act launches it for many rows. Its main loop: two groups of 16 rows a warp, which
    are 64 elements a thread; 64 is what its instructions are to be divided by."""
    from svdq.kernels.quantize import choose_cut, quantize_kernel

    ranks = triton.next_power_of_2(rank // 16) if rank else 0
    cut = choose_cut(row_tiles=288, groups=48, ranks=ranks, multiprocessors=132)
    pointers = dict.fromkeys(("x_ptr", "smooth_ptr", "proj_down_ptr", "codes_ptr", "ascales_ptr"), "*i32")
    pointers |= {"lora_act_ptr": "*fp32", "pieces_ptr": "*fp32", "arrived_ptr": "*i32", "statistics_ptr": "*fp32"}
    pointers |= {"scale_ptr": "*i32", "shift_ptr": "*i32"}
    sizes = dict.fromkeys(("M", "K", "R", "stride_x", "row_blocks", "groups_per_piece", "rows_per_batch"), "i32")
    constants = {
        "UNSIGNED": act_unsigned,
        "T": {"bf16": 0, "fp16": 1}[dtype],
        "XORSIGN": dtype == "bf16" and arch != "sm_80",
        "RT": ranks,
        "NORM": int(norm),
        "WM": cut.warps_m,
        "WK": cut.warps_k,
        "SLAB": cut.staged // cut.warps_k,
        "BUFFERS": cut.buffers(ranks),
        "PIECES": triton.next_power_of_2(cut.pieces) if ranks else 1,
    }
    aligned = {*pointers, "K", "R", "stride_x"}
    warps = cut.warps_m * cut.warps_k
    return compile_for(quantize_kernel, pointers | sizes, constants, arch, warps, aligned, mma="HMNMX2")


MULTIPROCESSORS = {"sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90": 132}  # of the largest, or the most common


def quantize_int8_figures(
    arch: str,
    dtype: str = "bf16",
    act_unsigned: bool = False,
    norm: bool = False,
    m: int = 4608,
    k: int = 3072,
    rank: int = 32,
    codes: bool = True,
) -> Figures:
    """The quantize kernel of the INT8 mode as quantize_act_int8 launches it for m rows; rank: up to 64 · codes: False
    for a launch that adds low-rank columns. Its main loop: two steps."""
    from svdq.kernels.quantize_int8 import choose_cut, quantize_int8_kernel

    cut = choose_cut(m, 1, k, rank // 16, MULTIPROCESSORS[arch], arch)
    names = ("x_ptr", "smooth_ptr", "proj_down_ptr", "scale_ptr", "shift_ptr", "codes_ptr")
    pointers = dict.fromkeys(names, "*i32") | {"scales_ptr": "*fp32", "lora_act_ptr": f"*{dtype}"}
    pointers |= {"parts_ptr": "*fp32", "low_rank_ptr": "*fp32", "arrived_ptr": "*i32"}
    aligned = ("K", "stride_x", "first_rank", "part_ranks", "part_stride", "stride_modulation")
    sizes = dict.fromkeys((*aligned, "rows_per_batch", "blocks_per_batch"), "i32")
    constants = {
        "NORM": norm,
        "UNSIGNED": act_unsigned,
        "CODES": codes,
        "T": {"bf16": 0, "fp16": 1}[dtype],
        "XORSIGN": dtype == "bf16" and arch != "sm_80",
        "RT": rank // 16,
        **cut.constants(k),
    }
    return compile_for(
        quantize_int8_kernel, pointers | sizes, constants, arch, cut.warps, {*pointers, *aligned}, mma="HMMA"
    )


def gemv_figures(arch: str, dtype: str = "bf16") -> Figures:
    """The AWQ GEMV as gemv_w4a16 launches it, for any number of rows."""
    from svdq.kernels.gemv import UNROLL, WARPS, gemv_kernel

    pointers = dict.fromkeys(("x_ptr", "qweight_ptr", "wscales_ptr", "wzeros_ptr"), "*i32")
    pointers |= {"bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    aligned = ("N", "K", "stride_xm", "stride_ym")
    sizes = dict.fromkeys(("M", *aligned[:2], "splits", *aligned[2:]), "i32")
    constants = {"HAS_BIAS": True, "T": {"bf16": 0, "fp16": 1}[dtype], "WARPS": WARPS, "UNROLL": UNROLL}
    return compile_for(gemv_kernel, pointers | sizes, constants, arch, WARPS, {*pointers, *aligned}, mma="HMMA")


def lora_rows_figures(kernel: str, arch: str, dtype: str = "bf16") -> Figures:
    """A kernel ("down" or "up") of a LoRA on few rows, as add_lora launches it."""
    from svdq.kernels import lora_rows

    if kernel == "down":
        pointers = {"x_ptr": f"*{dtype}", "down_ptr": f"*{dtype}", "t_ptr": "*fp32"}
        sizes, constants = dict.fromkeys(("K", "R", "stride_x"), "i32"), {"COLUMNS": lora_rows.COLUMNS}
    else:
        pointers = {"t_ptr": "*fp32", "up_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
        sizes = dict.fromkeys(("N", "R", "stride_y"), "i32")
        constants = {"OUTPUTS": lora_rows.OUTPUTS, "RANKS": lora_rows.RANKS}
    fn = getattr(lora_rows, f"lora_{kernel}_kernel")
    return compile_for(fn, pointers | sizes, constants, arch, 4, {*pointers, *sizes} - {"R"})


def feedback_figures(arch: str, steps: int) -> Figures:
    """The quantizer's rounding with error feedback, with so many step sizes to try; 0: with scales that are there."""
    from svdq.kernels.feedback import ROWS, WARPS, feedback_kernel
    from svdq.kernels.int4 import GROUP

    names = ("work", "inverse", "importance", "steps", "scales", "zeros", "codes", "errors")
    pointers = {f"{name}_ptr": "*i8" if name == "codes" else "*fp32" for name in names}
    sizes = dict.fromkeys(("N", "K", "start"), "i32")
    constants = {"STEPS": steps, "LOW": -8, "HIGH": 7, "BF16": True, "ROWS": ROWS, "GROUP": GROUP}
    return compile_for(feedback_kernel, pointers | sizes, constants, arch, WARPS, {*pointers, "N", "K"})


def gemm_gelu_quantize_figures(tile, arch: str, dtype: str = "bf16") -> Figures:
    """fc1 with GELU and the quantization for fc2 behind it (kernels/gemm_quantize.py)."""
    from svdq.kernels.gemm_quantize import gemm_gelu_quantize_kernel

    pointers = dict.fromkeys(("act_ptr", "ascales_ptr", "qweight_ptr", "wscales_ptr"), "*i32")
    pointers |= {"lora_act_ptr": "*fp32", "proj_up_ptr": "*i32", "bias_ptr": f"*{dtype}"}
    pointers |= dict.fromkeys(("smooth_ptr", "proj_down_ptr", "codes_ptr", "next_ascales_ptr"), "*i32")
    pointers |= {"partial_ptr": "*fp32"}
    sizes = dict.fromkeys(("M", "N", "K", "R", "NEXT_R", "row_blocks", "bias_size", "rounds"), "i32")
    constants = {
        "ACT_UNSIGNED": False,
        "T": {"bf16": 0, "fp16": 1}[dtype],
        **tile.constants,
    }
    aligned = {*pointers, "N", "K", "R", "NEXT_R"}
    return compile_for(gemm_gelu_quantize_kernel, pointers | sizes, constants, arch, tile.warps, aligned)


def gemm_int8_hopper_figures(tile) -> Figures:
    """The INT8 GEMM of sm_90 with one HopperTile, in bf16 and with a low-rank branch."""
    from triton.experimental.gluon import language as gl

    from svdq.kernels.epilogue import KINDS
    from svdq.kernels.gluon_hopper import gemm_w8a8_hopper_kernel as kernel

    def matrix(kind: str, columns: int, width: int) -> str:
        layout = gl.NVMMASharedLayout(min(128, columns * width), width * 8, 2)
        return f"tensordesc<{kind}[128, {columns}],{layout!r}>"

    def kind(name: str) -> str:
        if not name.endswith("_ptr"):
            return "i32"
        if "sums" in name or "counter" in name or ("partial" in name and not tile.second):
            return "*i32"
        return "*fp32" if "scales" in name or "partial" in name else "*bf16"

    types = dict.fromkeys(("a_desc", "w_desc", "a2_desc", "w2_desc"), matrix("i8", 128, 1))
    types |= dict.fromkeys(("lora_desc", "up_desc"), matrix("bf16", tile.ranks, 2))
    types |= dict.fromkeys(("beside_desc", "out_desc"), matrix("bf16", 64, 2))
    if KINDS[tile.epilogue] == "NORM_ROPE":
        types["beside_desc"] = matrix("fp32", 64, 4)
    signature = {name: types.get(name) or kind(name) for name in kernel.arg_names if name != "C"}
    aligned = {name for name, kind in signature.items() if kind[0] == "*"} | {"N"}
    return compile_for(kernel, signature, {"C": tile}, "sm_90", 4, aligned, "IGMMA")


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?PT?\d* ", "", text).split()[0]


def _count(body: list[str], prefix: str) -> int:
    return sum(opcode.startswith(prefix) for opcode in body)


_ROWS = {
    "bf16 s4xs4": {},
    "bf16 u4xs4": {"act_unsigned": True},
    "fp16 s4xs4": {"dtype": "fp16"},
    "+ GELU": {"after": "GELU"},
    "+ gate, residual": {"after": "GATE_RESIDUAL"},
    "+ norm, RoPE": {"after": "NORM_ROPE"},
    "two inputs": {"parts": 2},
    "two, gate, residual": {"parts": 2, "after": "GATE_RESIDUAL"},
}


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import conftest  # noqa: F401  makes the clone importable as svdq

    from svdq.kernels.tiles import TILES

    print(f"Triton {triton.__version__}")
    print("arch   block    stages kind             per MMA  registers  spills  shared  epilogue")
    for arch in sys.argv[1:] or ("sm_80", "sm_86", "sm_89"):
        for tile in TILES[arch]:
            for kind, options in _ROWS.items():
                f = gemm_int4_figures(tile, arch, **options)
                block = f"{tile.block_m:3} x {tile.block_n}  {tile.stages}     "
                usage = f"{f.registers:9}  {f.spill_bytes:6}  {f.shared_bytes:6}  {f.epilogue_instructions:8}"
                print(f"{arch}  {block} {kind:16} {f.instructions_per_mma:7.2f}  {usage}")


if __name__ == "__main__":
    main()
