"""The memory of the paged KV cache."""

from headrace.kernels import Kernels, KvCache, KvCacheSpec, SoftmaxCounts


class KvPool:
    """Keys and values of every block: one cache for each local layer, in the kernels' own layout.

    Memory is claimed from the system as blocks are first written, so an idle engine holds little of its budget.

    spec: of one layer.
    """

    def __init__(self, kernels: Kernels, spec: KvCacheSpec, *, num_layers: int) -> None:
        self.spec = spec
        self.layers: list[KvCache] = [kernels.make_kv_cache(spec) for _ in range(num_layers)]

    def softmax_counts(self) -> list[SoftmaxCounts]:
        """For each local layer."""
        return [layer.softmax_counts() for layer in self.layers]
