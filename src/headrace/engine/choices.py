"""What was chosen when a model was loaded, as plain data: which implementation multiplies how many rows, which softmax
attention uses, and how ranks share the work. Of rank 0, where ranks may differ.
"""

from collections import Counter
from typing import Any

from headrace.engine.load import LoadedModel


def dataflow_choice(model: LoadedModel) -> dict[str, Any]:
    """
    source: "measured" (on this machine, all shapes), "default" (none of them, as a small model's or on request),
        "partly measured", "forced" (one implementation, as asked for), or "none" where there is but one.
    shapes: each with the layers that have it, [n, k] (outputs, inputs), and arms: the implementation of from_rows to
        to_rows rows, None being all more.
    """
    dataflow = model.kernels.dataflow
    if dataflow is None:
        return {"source": "none", "shapes": []}
    weights = model.linear_weights
    shapes = [
        {
            "name": ", ".join(weights.names.get(shape, ())),
            "n": shape.out_features,
            "k": shape.in_features,
            "format": shape.weight_format.value,
            "source": dataflow.source(shape),
            "arms": [
                {"from_rows": first, "to_rows": last, "arm": arm.value} for arm, first, last in dataflow.ranges(shape)
            ],
        }
        for shape in weights.by_shape
    ]
    sources = {shape["source"] for shape in shapes}
    return {"source": "partly measured" if len(sources) > 1 else next(iter(sources), "none"), "shapes": shapes}


def softmax_choice(model: LoadedModel) -> dict[str, int]:
    """How many layers use each scheme."""
    return dict(Counter(layer.scheme.value for layer in model.softmax.layers))


def layout_choice(model: LoadedModel) -> dict[str, Any]:
    """num_threads: of each rank. transport: None with one rank, which has nobody to exchange anything with."""
    parallel = model.parallel
    return {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "transport": parallel.transport.value if parallel.world_size > 1 else None,
        "device": str(model.kernels.device),
        "num_threads": model.plan.num_threads,
    }
