"""Compile every kernel of models/triton_rows.py for compute capability 8.0 and 9.0, on any machine.

Prints a line for each; `ok` means that it spills no registers and adds nothing atomically.
"""

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models import triton_rows

KERNELS = (triton_rows._losses_kernel, triton_rows._sums_kernel, triton_rows._gradient_kernel)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(kernel, dtype: str, width: int, stablemax: bool, capability: int):
    options = triton_rows.launch_options(width)
    wide = "fp64" if dtype == "fp64" else "fp32"
    constants = {
        "STABLEMAX": stablemax, "WIDE": tl.float64 if wide == "fp64" else tl.float32,
        "GRADED": True, "BLOCK": options["BLOCK"],
    }  # fmt: skip
    kinds = {"width": "i32", "logits": f"*{dtype}", "labels": "*i64", "preds": "*i64"}
    kinds |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, f"*{wide}") for name in names},
        constexprs={(names.index(k),): v for k, v in constants.items() if k in names},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and (name != "width" or width % 16 == 0)
        },
    )
    warps = {"num_warps": options["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=warps)


def main() -> None:
    cases = [("bf16", 32000), ("fp64", 11)]
    for capability, kernel, (dtype, width), stablemax in product(
        (80, 90), KERNELS, cases, (True, False)
    ):
        compiled = compile_kernel(kernel, dtype, width, stablemax, capability)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
                capture_output=True, encoding="utf-8", check=True,
            ).stdout  # fmt: skip
        used = re.search(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        spills = used is None or used.group(1) != "0" or used.group(2) != "0"
        fine = not spills and not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
        name = f"{kernel.__name__} {dtype} {width} stablemax={stablemax} sm_{capability}"
        print(name, "ok" if fine else "WRONG", used.group() if used else usage)


if __name__ == "__main__":
    main()
