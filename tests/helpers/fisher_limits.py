"""Shapes at the limits of csrc/cuda/conv2d_fisher/launch_plan.cuh, for a GPU and its emulation."""

from __future__ import annotations

from enum import IntEnum

from tests.helpers.fisher_cases import FisherCase


class Kernel(IntEnum):
    """FisherKernel in csrc/cuda/conv2d_fisher/launch_plan.cuh."""

    BLOCK, HALF_BLOCK, TALL, WIDE, SMALL, DEPTHWISE, SQUARE, SQUARE64 = range(8)


def both_orders(case: FisherCase) -> list[FisherCase]:
    last = {"layout": "channels_last", "grad_layout": "channels_last"}
    return [case, case._replace(name=f"{case.name}_channels_last", **last)]


#: A shape, and the kernel whose limit it crosses in float32, without tensor cores.
LIMITS = [
    (case, kernel)
    for kernel, wanted in {
        Kernel.TALL: [
            FisherCase("tall_tiles", (2, 190, 5, 5), (250, 190, 1, 1)),
            FisherCase("tall_vectors", (1, 128, 4, 8), (256, 128, 1, 1)),
            FisherCase("tall_spans", (1, 7, 19, 18), (128, 7, 3, 3), padding=(1, 1)),
        ],
        Kernel.WIDE: [
            FisherCase("wide_tiles", (1, 30, 4, 5), (180, 30, 3, 3), padding=(1, 1)),
            FisherCase("wide_vectors", (2, 16, 8, 8), (64, 16, 3, 3), padding=(1, 1)),
            FisherCase("wide_spans", (2, 13, 16, 32), (50, 13, 3, 3), padding=(1, 1)),
        ],
        Kernel.SMALL: [
            FisherCase("small_tiles", (2, 27, 6, 6), (70, 27, 3, 3)),
            FisherCase("small_vectors", (3, 128, 1, 17), (32, 128, 1, 1)),
            FisherCase("words", (2, 42, 2, 15), (10, 42, 1, 1)),
            FisherCase("half_a_span", (2, 40, 8, 8), (9, 40, 1, 1)),  # one in fp16 and TF32
            FisherCase("half_a_span_and_one", (2, 40, 5, 13), (9, 40, 1, 1)),
            FisherCase("one_span", (2, 40, 8, 16), (9, 40, 1, 1)),
            FisherCase("two_spans", (2, 40, 16, 16), (9, 40, 1, 1)),
            FisherCase("spans", (3, 40, 19, 17), (9, 40, 1, 1)),
            FisherCase("chunk_less_one", (3, 40, 3, 5), (11, 40, 1, 1)),
            FisherCase("chunk", (3, 40, 4, 4), (11, 40, 1, 1)),
            FisherCase("chunk_and_one", (3, 40, 3, 11), (11, 40, 1, 1)),
            FisherCase("splits", (17, 40, 3, 3), (11, 40, 1, 1)),
            FisherCase("groups", (2, 68, 5, 5), (22, 34, 2, 3), groups=2),
        ],
        Kernel.DEPTHWISE: [
            FisherCase("lanes", (2, 5, 4, 4), (5, 1, 3, 3), padding=(1, 1), groups=5),
            FisherCase("warps", (2, 3, 33, 35), (3, 1, 3, 3), (1, 2), (1, 1), groups=3),
            FisherCase("team_spans", (1, 2, 70, 150), (2, 1, 3, 3), padding=(1, 1), groups=2),
            FisherCase("taps", (2, 40, 9, 9), (40, 1, 5, 5), padding=(2, 2), groups=40),
            FisherCase("team_splits", (20, 33, 3, 3), (33, 1, 3, 3), padding=(1, 1), groups=33),
        ],
        Kernel.SQUARE: [
            FisherCase("square", (3, 50, 7, 6), (60, 5, 1, 1), groups=10),
            FisherCase("square_warps", (2, 6, 20, 20), (9, 2, 2, 1), groups=3),
        ],
        Kernel.SQUARE64: [
            FisherCase("far_padding", (2, 6, 5, 5), (10, 3, 2, 2), (9_000, 8_000),
                       (40_000, 32_000), (1, 3), groups=2),
            FisherCase("far_padding_depthwise", (2, 6, 5, 5), (6, 1, 2, 2), (9_000, 9_000),
                       (45_000, 45_000), groups=6),
        ],
    }.items()
    for contiguous in wanted
    for case in both_orders(contiguous)
]  # fmt: skip

#: The same for the pipelined kernel, and its copies of 16 or 4 bytes in either order.
PIPELINED = [
    (FisherCase("block_vectors", (2, 128, 4, 8), (256, 128, 1, 1)), Kernel.BLOCK),
    (FisherCase("block_words", (2, 130, 2, 17), (150, 130, 1, 1)), Kernel.BLOCK),
    (FisherCase("block_stages", (9, 72, 2, 2), (100, 72, 1, 1)), Kernel.BLOCK),
    *(
        (case._replace(layout="channels_last", grad_layout="channels_last"), kernel)
        for case, kernel in (
            (FisherCase("taps", (2, 24, 9, 7), (72, 24, 3, 3), (2, 1), (1, 2)), Kernel.BLOCK),
            (
                FisherCase("taps_words", (1, 26, 7, 7), (50, 26, 3, 3), (1, 1), (2, 2), (2, 2)),
                Kernel.HALF_BLOCK,
            ),
            (FisherCase("taps_groups", (2, 64, 5, 6), (192, 32, 2, 3), groups=2), Kernel.BLOCK),
            (FisherCase("half_block_vectors", (3, 128, 8, 9), (40, 128, 1, 1)), Kernel.HALF_BLOCK),
        )
    ),
]
#: With both buffers, and so fewer stages; and more examples to a block than a run.
PIPELINED_LONG = [
    FisherCase(
        "long", (1, 8, 64, 129), (72, 8, 1, 1), layout="channels_last", grad_layout="channels_last"
    ),
    FisherCase(
        "runs", (258, 40, 1, 2), (34, 40, 1, 1), layout="channels_last", grad_layout="channels_last"
    ),
]
#: What half types turn first: odd channels, single elements to gather, positions in odd runs.
TURNED = [
    (FisherCase("turned", (3, 20, 6, 5), (140, 20, 3, 3), padding=(1, 1)), Kernel.BLOCK),
    (FisherCase("turned_odd", (2, 67, 3, 5), (131, 67, 3, 3), padding=(1, 1),
                layout="channels_last", grad_layout="channels_last"), Kernel.BLOCK),
    (FisherCase("turned_groups", (2, 46, 9, 8), (122, 23, 3, 3), groups=2),
     Kernel.HALF_BLOCK),
    (FisherCase("turned_positions", (3, 300, 3, 3), (260, 300, 1, 1)), Kernel.BLOCK),
    (FisherCase("turned_gradient", (2, 24, 9, 9), (80, 24, 3, 3), layout="channels_last"),
     Kernel.BLOCK),
    (FisherCase("turned_stem", (1, 3, 21, 40), (64, 3, 7, 7), (2, 1), (3, 3)), Kernel.HALF_BLOCK),
]  # fmt: skip
PIPELINED_CASES = [case for case, _ in (*PIPELINED, *TURNED)]
LIMIT_CASES = [*(case for case, _ in LIMITS), *PIPELINED_CASES]

#: Layers of ResNet-50, ResNeXt-50, MobileNet v2, a ViT and its head, with many examples.
LAYERS = {
    FisherCase("stem", (256, 3, 224, 224), (64, 3, 7, 7), (2, 2), (3, 3)): Kernel.HALF_BLOCK,
    FisherCase("layer1", (256, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1)): Kernel.HALF_BLOCK,
    FisherCase("layer4", (256, 512, 7, 7), (512, 512, 3, 3), padding=(1, 1)): Kernel.BLOCK,
    FisherCase("expand", (256, 512, 7, 7), (2048, 512, 1, 1)): Kernel.BLOCK,
    FisherCase("resnext", (256, 128, 56, 56), (128, 4, 3, 3), groups=32): Kernel.SMALL,
    FisherCase("depthwise", (256, 96, 56, 56), (96, 1, 3, 3), groups=96): Kernel.DEPTHWISE,
    FisherCase("tokens", (256, 768, 197, 1), (3072, 768, 1, 1)): Kernel.BLOCK,
    FisherCase("head", (4096, 2048, 1, 1), (10, 2048, 1, 1)): Kernel.SMALL,
    FisherCase("wide_head", (4096, 25_088, 1, 1), (4096, 25_088, 1, 1)): Kernel.BLOCK,
    FisherCase("huge_example", (2, 4096, 2**19, 1), (4096, 4096, 1, 1)): Kernel.SQUARE64,
}
