"""What each kind of operation does with labels; importing a module registers its rules."""

from taylor_kernels.tracing.rules import (  # noqa: F401
    constants,
    convolutions,
    divisors,
    elementwise,
    joining,
    moves,
    norms,
    products,
    quantization,
    recurrent,
    reductions,
    reshapes,
    scatters,
    solving,
    views,
    windows,
)
