"""Which of the three ideas of FlashDecoding++ (arXiv:2311.01282) are on: all but one, one alone, all and none."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from headrace.config import SoftmaxScheme
from headrace.kernels.tuning import ArmTimes, Inflections, LinearArm, TunedShape, find_inflections

_NEVER = 2**31
"""More rows than any layer gets."""


def _as_measured(measured: TunedShape, _: Inflections) -> Inflections:
    return measured.inflections


def _gemv_for_all(_measured: TunedShape, _default: Inflections) -> Inflections:
    return Inflections(flat_gemm_from=_NEVER, gemm_from=_NEVER)


def _gemm_for_flat(measured: TunedShape, _: Inflections) -> Inflections:
    return replace(measured.inflections, gemm_from=measured.inflections.flat_gemm_from)


def _by_default(_: TunedShape, default: Inflections) -> Inflections:
    return default


def _flat_for_all(_measured: TunedShape, _default: Inflections) -> Inflections:
    return Inflections(flat_gemm_from=1, gemm_from=_NEVER)


def _gemm_for_all(_measured: TunedShape, _default: Inflections) -> Inflections:
    return Inflections(flat_gemm_from=1, gemm_from=1)


def _without_flat(measured: TunedShape, default: Inflections) -> Inflections:
    """The point between GEMV and GEMM, which the measured ones do not say where flat GEMM lies between them."""
    times: ArmTimes = {arm: measured.times[arm] for arm in measured.times if arm is not LinearArm.FLAT_GEMM}
    return find_inflections(times, default)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the model.

    idea: the one that is switched off; None for the baseline, which has all of them.
    is_alone: the other way round: the idea is the only one that is on, and the baseline, NONE, has none of them.
    inflections: from what was measured for a shape, and the points that hold before that, to those used.
    """

    key: str
    idea: str | None
    label: str
    is_alone: bool = False
    softmax: SoftmaxScheme = SoftmaxScheme.ASYNCHRONIZED
    inflections: Callable[[TunedShape, Inflections], Inflections] = _as_measured

    @property
    def baseline(self) -> "Variant":
        """What it is compared with."""
        return NONE if self.is_alone else BASELINE


BASELINE = Variant(key="all", idea=None, label="all three on")
NONE = Variant(
    key="none",
    idea=None,
    is_alone=True,
    label="log-sum-exp softmax, GEMM for every M",
    softmax=SoftmaxScheme.SYNCHRONIZED,
    inflections=_gemm_for_all,
)
"""A good engine without the three ideas: contexts are split all the same, and merged by log-sum-exp; few rows take the
product of many, which on a GPU is the library's."""

VARIANTS = (
    BASELINE,
    Variant(
        key="synchronized",
        idea="asynchronized softmax",
        label="synchronized softmax",
        softmax=SoftmaxScheme.SYNCHRONIZED,
    ),
    Variant(key="lazy", idea="asynchronized softmax", label="lazy softmax", softmax=SoftmaxScheme.LAZY),
    Variant(key="gemv", idea="flat GEMM", label="GEMV, row by row", inflections=_gemv_for_all),
    Variant(key="gemm", idea="flat GEMM", label="GEMM in its place", inflections=_gemm_for_flat),
    Variant(key="default", idea="heuristic dataflow", label="default points", inflections=_by_default),
    Variant(key="flat_gemm", idea="heuristic dataflow", label="flat GEMM for every M", inflections=_flat_for_all),
    NONE,
    replace(
        NONE,
        key="asynchronized_alone",
        idea="asynchronized softmax",
        label="asynchronized softmax, GEMM for every M",
        softmax=SoftmaxScheme.ASYNCHRONIZED,
    ),
    replace(
        NONE,
        key="flat_gemm_alone",
        idea="flat GEMM",
        label="log-sum-exp softmax, flat GEMM for every M",
        inflections=_flat_for_all,
    ),
    replace(
        NONE,
        key="dataflow_alone",
        idea="heuristic dataflow",
        label="log-sum-exp softmax, GEMV or GEMM as measured",
        inflections=_without_flat,
    ),
    Variant(key="again", idea=None, label="the same again"),
)
