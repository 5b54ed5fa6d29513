"""Kernels as Triton's compiler takes them where there is no GPU to launch them on."""

FP32 = {"g", "kept", "pairs", "entering", "until", "incoming", "ends", "decays", "crossed", "dg"}
OTHERS = {"scale": "fp32", "strong": "*i8", "dtails": "*i8", "documents": "*i32"}


def source_of(kernel, known, element):
    """What to compile.

    Args:
        kernel: of `hybridsp.ops.gla.triton`.
        known: its compile-time constants, by name.
        element: of q, k, v and what has their dtype, e.g. "*bf16".
    """
    from triton.compiler import ASTSource

    from hybridsp.ops.gla.triton.blocks import SIZES

    def kind(name):
        if name in known:
            return "constexpr"
        if name in SIZES:
            return "i32"
        return OTHERS.get(name) or ("*fp32" if name in FP32 else element)

    names = kernel.arg_names
    signature = {name: kind(name) for name in names}
    constants = {(names.index(name),): value for name, value in known.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    return ASTSource(kernel, signature, constants, aligned)
